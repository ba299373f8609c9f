"""RUN/report.html: what a run did and what came of it, on one page that needs no network and no other file.

Numbers come from the run's files alone; pictures are made from its latest checkpoint and its data. What is missing is
left out, and a line in its place says which command would fill it. Nothing on the page depends on when or where it
was written, so the same run gives the same page.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path

from ijepa.interop.weights import shipped_folder, shipped_weights
from ijepa.report.curves import Panel, longer_panels, training_panels
from ijepa.report.image_sections import (
    FEATURES,
    MASKS,
    PANELS,
    RETRIEVAL,
    feature_section,
    mask_section,
    retrieval_section,
    segmentation_command,
    segmentation_section,
)
from ijepa.report.maps import MAPS, map_section
from ijepa.report.markup import Gap, Part, Section
from ijepa.report.material import Images, load_encoders
from ijepa.report.run_data import Record, read_record
from ijepa.report.style import CSS
from ijepa.report.tables import evaluation_section, glance_section, headline, recipe_section
from ijepa.utils.errors import RunError
from ijepa.utils.extras import require_extra
from ijepa.utils.files import write_text


def write_report(run: Path, *, data: str | None = None) -> Path:
    """Write the page of a run and return its path, RUN/report.html.

    Args:
        run: the run's folder.
        data: images for the pictures, where the run's own are elsewhere now or others are wanted.

    Raises:
        UserError: the folder holds no run, a file of it is damaged, `data` cannot be used, or matplotlib is missing.
        RunError: the page cannot be written.
    """
    require_extra("matplotlib", "report", "ijepa report")
    record = read_record(run)
    images, encoders = Images(record, data), load_encoders(record)
    command, measured = f"ijepa report {run} --data IMAGES", segmentation_command(record)
    parts = [
        glance_section(record),
        _curve_section(record),
        _attempted(MASKS, command, lambda: mask_section(record, images)),
        _attempted(FEATURES, command, lambda: feature_section(record, images, encoders)),
        _attempted(MAPS, command, lambda: map_section(record, images, encoders)),
        _attempted(RETRIEVAL, command, lambda: retrieval_section(record, images, encoders)),
        _attempted(PANELS, measured, lambda: segmentation_section(record, images, encoders)),
        evaluation_section(record),
        recipe_section(record),
    ]
    page = run / "report.html"
    try:
        write_text(page, _page(record, parts))
    except OSError as error:
        raise RunError(f"{page}: cannot be written: {error.strerror}") from None
    return page


def _attempted(names: tuple[str, str], command: str, make: Callable[[], Part]) -> Part:
    """Return a section of pictures; where what it is made of is at fault, its gap, which says so."""
    try:
        return make()
    except RunError as failure:
        return Gap(*names, str(failure), command)


def _curve_section(record: Record) -> Part:
    """Return the curves, in groups; measurements that were not made on the way leave their line."""
    title, groups = "Curves", training_panels(record)
    if not groups:
        return Gap("curves", title, "the run has no metrics", f"ijepa pretrain {record.recipe.name}")
    body = ["<p>Training steps run along every plot; the number at its right is the last value measured.</p>"]
    body += [_group(name, panels) for name, panels in groups.items()]
    if record.recipe.name in shipped_weights() and (longer := longer_panels(shipped_folder(record.recipe.name))):
        body.append(_group("The same recipe for longer", longer, "The run whose encoder comes with the package."))
    if not record.diagnostics:
        command = f"ijepa pretrain {record.recipe.name} --diagnose-every 500"
        body.append(Gap("diagnostics", "RankMe and other measurements", "none were made", command).html())
    return Section("curves", title, "\n".join(body))


def _group(title: str, panels: list[Panel], words: str = "") -> str:
    shown = "\n".join(panel.html() for panel in panels)
    told = f"<p>{escape(words)}</p>\n" if words else ""
    return f'<h3>{escape(title)}</h3>\n{told}<div class="panels">\n{shown}\n</div>'


def _page(record: Record, parts: list[Part]) -> str:
    links = "".join(f'<a href="#{part.key}">{escape(part.title)}</a>' for part in parts if isinstance(part, Section))
    version = ((record.info or {}).get("versions") or {}).get("ijepa")
    made = f"A run of ijepa {escape(str(version))}." if version else "A run of ijepa."
    body = "\n".join(part.html() for part in parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(record.recipe.name)}: a run of I-JEPA</title>
<style>
{CSS}
</style>
</head>
<body>
<main>
<header>
{headline(record)}
<nav aria-label="Sections">{links}</nav>
</header>
{body}
<footer>{made} Numbers on this page come from the run's files; pictures are made from its latest checkpoint.</footer>
</main>
</body>
</html>
"""
