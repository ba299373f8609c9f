"""RUN/report.html: the curves, pictures and evaluations of a run on one page without external files.

Numbers come from the files of the run only. Pictures are made from its latest checkpoint and its data. A section whose
input is missing is replaced by a line with the reason and the command that makes the input. Nothing on the page depends
on the time or the machine, so that the same run gives the same page.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ijepa.evaluation.results.schema import METRIC_NAMES
from ijepa.report.formatting import format_number, format_percent
from ijepa.report.run_data import MissingInput, RunData, read_run_data
from ijepa.report.run_images import RunImages
from ijepa.report.sections.curves import curve_section
from ijepa.report.sections.evaluations import evaluation_section
from ijepa.report.sections.features import feature_section
from ijepa.report.sections.maps import map_section
from ijepa.report.sections.masks import mask_section
from ijepa.report.sections.recipe import recipe_section
from ijepa.report.sections.retrieval import retrieval_section
from ijepa.report.sections.segmentation import segmentation_section
from ijepa.report.sections.summary import headline_facts, summary_section
from ijepa.utils.errors import RunError
from ijepa.utils.extras import require_extra
from ijepa.utils.files import write_errors, write_text


@dataclass(frozen=True)
class Section:
    """A section of the page: `content` for templates/sections/KEY.html.j2, or what is missing."""

    key: str
    title: str
    content: Any = None
    missing: MissingInput | None = None


def write_report(run_folder: Path, *, data: str | None = None) -> Path:
    """Write the page of a run and return its path, RUN/report.html.

    Args:
        run_folder: the folder of the run.
        data: images for the pictures; those of the run if None.

    Raises:
        UserError: the folder is not a run, a file of it is damaged, `data` cannot be used, or matplotlib is missing.
        RunError: the page cannot be written.
    """
    require_extra("matplotlib", "report", "ijepa report")
    run = read_run_data(run_folder)
    images = RunImages(run, data)
    command = f"ijepa report {run_folder} --data IMAGES"
    builders: list[tuple[str, str, Callable[[], Any]]] = [
        ("summary", "How good is it?", lambda: summary_section(run)),
        ("curves", "Curves", lambda: curve_section(run)),
        ("masks", "Masks", lambda: mask_section(run, images)),
        ("features", "Patch features", lambda: feature_section(run, images)),
        ("maps", "Similarity between patches", lambda: map_section(run, images)),
        ("retrieval", "Nearest neighbors", lambda: retrieval_section(run, images)),
        ("segmentation", "Segmentation without training", lambda: segmentation_section(run, images)),
        ("evaluations", "Evaluations", lambda: evaluation_section(run)),
        ("recipe", "Recipe and run", lambda: recipe_section(run)),
    ]
    sections = [build_section(*builder, command) for builder in builders]
    page = run_folder / "report.html"
    with write_errors(page):
        write_text(page, render_page(run, sections, images.checkpoint.name if images.checkpoint else ""))
    return page


def build_section(key: str, title: str, build: Callable[[], Any], command: str) -> Section:
    """Return the section that `build` makes; if its input is missing or cannot be read, the section says so."""
    try:
        return Section(key, title, build())
    except MissingInput as missing:
        return Section(key, title, missing=missing)
    except RunError as error:
        return Section(key, title, missing=MissingInput(str(error), command))


def render_page(run: RunData, sections: list[Section], step: str = "") -> str:
    """Return the page as HTML; `step` is the name of the latest checkpoint."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.loader, environment.undefined = PackageLoader("ijepa.report"), StrictUndefined
    environment.filters |= {"number": format_number, "percent": format_percent}
    environment.globals["metric_names"] = METRIC_NAMES
    version = ((run.info or {}).get("versions") or {}).get("ijepa")
    template = environment.get_template("report.html.j2")
    return template.render(run=run, step=step, facts=headline_facts(run), sections=sections, version=version)
