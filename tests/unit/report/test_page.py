import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ijepa.report.markup import Gap
from ijepa.report.page import _attempted, write_report
from ijepa.utils.errors import RunError, UserError

VOID = {"meta", "img", "br", "hr", "input", "link"}
KEYS = ["glance", "curves", "masks", "features", "maps", "retrieval", "panels", "evaluations", "recipe"]


class Page(HTMLParser):
    """Parses a page, and fails where tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(run: Path, data: str | None = None) -> Page:
    return Page(write_report(run, data=data).read_text())


@pytest.fixture(scope="module")
def page(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(Path(shutil.copytree(whole_run, tmp_path_factory.mktemp("page") / "run")))


def test_stands_alone(page: Page) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "poster", "data", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, name, value)
    assert not page.of("link") and not page.of("script") and not page.of("iframe")


def test_style_loads_nothing(whole_run: Path, run: Path) -> None:
    text = write_report(run).read_text()
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text


def test_references_within_the_page_hold(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        target = attributes.get("href") or ""
        assert not target.startswith("#") or target[1:] in ids
        for name in re.findall(r"url\(#([^)]*)\)", " ".join(value or "" for value in attributes.values())):
            assert name in ids


def test_has_every_section_in_order(page: Page) -> None:
    assert [attributes["id"] for attributes in page.of("section")] == KEYS
    assert not [1 for _, attributes in page.tags if attributes.get("class") == "gap"]
    links = [attributes["href"] for attributes in page.of("a")]
    assert links[: len(KEYS)] == [f"#{key}" for key in KEYS]


def test_every_picture_has_words(page: Page) -> None:
    assert len(page.of("img")) > 80
    assert all(attributes["alt"] for attributes in page.of("img"))
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in page.of("svg"))
    assert len(page.of("figcaption")) == len(page.of("figure"))


def test_pictures_are_as_many_as_promised(page: Page) -> None:
    alts = [attributes["alt"] or "" for attributes in page.of("img")]
    labels = [attributes["aria-label"] or "" for attributes in page.of("svg")]
    assert sum("with its masks" in label for label in labels) == 6
    assert sum("patch features of" in alt for alt in alts) == 2 * 8
    assert sum("its middle patch outlined" in label for label in labels) == 8
    for name in ("trained", "random"):
        assert sum(alt.startswith(f"Cosine of the {name} encoder's patches") for alt in alts) == 8
    assert sum(alt.startswith("Cosine of prediction and target") for alt in alts) == 8
    assert sum(label.startswith("Singular values. trained: ") for label in labels) == 1
    assert sum(alt.startswith("Query: ") for alt in alts) == 6
    assert sum(alt.startswith("Near to the trained encoder: ") for alt in alts) == 6 * 6
    assert sum(alt.startswith("Near to the random encoder: ") for alt in alts) == 6 * 6
    for name in ("truth", "looked up, trained", "looked up, random", "clusters, trained", "clusters, random"):
        assert sum(alt.startswith(f"{name}, ") for alt in alts) == 6


def test_right_and_wrong_are_told_by_sign_and_word(page: Page) -> None:
    classes = [attributes.get("class") for attributes in page.of("span")]
    alts = [attributes["alt"] or "" for attributes in page.of("img")]
    right, wrong = (sum(alt.endswith(end) for alt in alts) for end in (", the query's class", ", another class"))
    assert (right, wrong) == (classes.count("hit right"), classes.count("hit wrong"))
    assert right + wrong == 2 * 6 * 6
    assert page.text.count("✓") == right and page.text.count("✗") == wrong


def test_right_is_what_has_the_query_s_class(page: Page) -> None:
    asked = ""
    for alt in (attributes["alt"] or "" for attributes in page.of("img")):
        if alt.startswith("Query: "):
            asked = alt.rpartition(", ")[2]
        elif alt.startswith("Near to"):
            _, found, verdict = alt.rsplit(", ", 2)
            assert (verdict == "the query's class") == (found == asked)


def test_numbers_are_those_of_the_files(page: Page, whole_run: Path) -> None:
    words = page.words
    last = json.loads((whole_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"loss at the end {last['loss']:.4g}" in words and f"skill at the end {last['skill']:.4g}" in words
    assert "steps 60 images seen 480 images in the data 60" in words and "training time 12s" in words
    assert "For <tests> & nothing else." in words
    for share in ("43.21", "23.45", "12.31", "33.33", "44.44", "24.68", "12.34", "13.57", "98.76", "75.31"):
        assert share in words
    assert "42.1 to 45.4" in words  # top-1's interval
    assert "top-1 by k 10: 22.2" in words and "blocks 4, lr 0.003, weight decay 0.1" in words
    assert "rates < 1 & decays" in words and "torch 9.8.7" in words and "Level 1:" in words
    assert "trained is run (step-00000060)" in words and "K = 200 is more than" in words
    assert "chance an answer that sees nothing 13.6 the commonest class 13.6 the commonest class –" in words
    assert "resolved.autocast False" in words and "commit c0ffee" in words and "ijepa pretrain tiny" in words


def test_best_of_each_column_is_bold(page: Page, run: Path) -> None:
    text = write_report(run).read_text()
    glance = text[text.index('id="glance"') : text.index('id="curves"')]
    assert re.findall(r"<strong>([\d.]+)</strong>", glance) == ["43.2", "24.7", "44.4"]


def test_every_measurement_has_a_curve(page: Page) -> None:
    titles = [attributes["aria-label"] or "" for attributes in page.of("svg")]
    for title in ("Loss", "Skill", "Gradient norm", "RankMe", "kNN on the way", "novelty", "EMA momentum"):
        assert any(label.startswith(f"{title} over training steps") for label in titles)
    assert any("learning" in label.lower() and "encoder" in label and "predictor" in label for label in titles)
    assert not any(label.startswith("Weight decay") for label in titles)  # constant, and in the recipe


def test_same_run_same_page(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_recipe_stands_on_the_page(page: Page, run: Path) -> None:
    assert " ".join((run / "recipe.yaml").read_text().split()) in page.words
    assert "details" in [tag for tag, _ in page.tags]


def missing(page: Page) -> dict[str, str]:
    """Keys of what is left out."""
    return {str(a["id"]): str(a["id"]) for _, a in page.tags if a.get("class") == "gap"}


def present(page: Page) -> set[str]:
    return {str(attributes["id"]) for attributes in page.of("section")}


def test_bare_recipe_gives_a_page_of_hints(run: Path) -> None:
    for part in ("checkpoints", "evaluations"):
        shutil.rmtree(run / part)
    for part in ("run.json", "metrics.jsonl", "timings.jsonl", "diagnostics.jsonl"):
        (run / part).unlink()
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(re.sub(r"(?m)^  path: .*$", "  path: null", recipe))
    page = page_of(run)
    assert present(page) == {"recipe"}
    assert set(missing(page)) == {*KEYS[:-1], "run"}
    for command in ("ijepa evaluate linear", "ijepa pretrain tiny", f"ijepa report {run} --data IMAGES"):
        assert command in page.words


def test_run_without_a_checkpoint_shows_its_masks(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    page = page_of(run)
    assert set(missing(page)) == {"features", "maps", "retrieval", "panels"}
    assert "the run has no checkpoint" in page.words


def test_run_without_measurements_says_how_to_get_them(run: Path) -> None:
    (run / "diagnostics.jsonl").unlink()
    page = page_of(run)
    assert set(missing(page)) == {"diagnostics"} and "--diagnose-every" in page.words


def test_data_that_moved_is_a_gap_that_names_it(run: Path, tmp_path: Path) -> None:
    for file in [run / "run.json", *(run / "evaluations").glob("*.json")]:
        file.write_text(re.sub(r'"path": "[^"]*"', f'"path": "{tmp_path}/gone"', file.read_text()))
    page = page_of(run)
    assert set(missing(page)) == {"masks", "features", "maps", "retrieval", "panels"}
    assert f"{tmp_path}/gone does not exist" in page.words


def test_data_given_stands_for_data_that_moved(run: Path, tmp_path: Path, scenes: Path) -> None:
    for file in [run / "run.json", *(run / "evaluations").glob("*.json")]:
        file.write_text(re.sub(r'"path": "[^"]*"', f'"path": "{tmp_path}/gone"', file.read_text()))
    assert not missing(page_of(run, str(scenes)))


def test_data_given_that_is_not_there_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match=r"^--data: "):
        write_report(run, data="/nowhere/at/all")
    assert not (run / "report.html").exists()


def test_images_without_masks_leave_the_panels_out(run: Path, tmp_path: Path, scenes: Path) -> None:
    shutil.rmtree(run / "evaluations")
    source = tmp_path / "flat"
    source.mkdir()
    from ijepa.data.open import open_source

    train = open_source(scenes, split="train")
    for index in range(20):
        (source / f"{index:03}.jpg").write_bytes(train.image(index))
    page = page_of(run, str(source))
    assert set(missing(page)) == {"glance", "panels", "evaluations"}
    assert "the images have no masks" in page.words
    assert "✓" not in page.words  # no labels, so neither right nor wrong
    assert "Images cropped by the recipe's rule" in page.words  # these are not what the run was trained on
    for attributes in page.of("img"):
        assert not (attributes["alt"] or "").endswith("class")


def test_masks_that_do_not_fit_cost_their_panels_alone(run: Path) -> None:
    file = run / "evaluations" / "segmentation-demo.json"
    result = json.loads(file.read_text())
    result["protocol"]["classes"] = 2
    file.write_text(json.dumps(result))
    page = page_of(run)
    assert present(page) == {*KEYS} - {"panels"} and set(missing(page)) == {"panels"}
    assert "in the mask is out of range, classes are 0 to 1" in page.words
    assert f"ijepa evaluate segmentation {run}" in page.words


def test_what_fails_in_a_section_is_its_gap() -> None:
    def fail() -> Gap:
        raise RunError("a.jpg: is cut short")

    assert _attempted(("maps", "Maps"), "a command", fail) == Gap("maps", "Maps", "a.jpg: is cut short", "a command")


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_extra_is_refused_by_its_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"ijepa-pretrain\[report\]"):
        write_report(run)


def test_page_that_cannot_be_written_fails_in_one_line(run: Path) -> None:
    (run / "report.html").mkdir()
    with pytest.raises(RunError, match="cannot be written"):
        write_report(run)
