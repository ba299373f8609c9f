"""The page stands alone, shows what the run's files hold, and says what is missing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ijepa.data.sources import open_source
from ijepa.errors import Refused
from ijepa.recipe import Recipe
from ijepa.report.page import write_report
from ijepa.training.loop import Callback, pretrain
from tests.conftest import TINY

VOID = {"meta", "img", "br", "link", "use", "path", "rect", "stop"}


class Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.sources: list[str] = []
        self._heading = False

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self._heading = tag in ("h1", "h2")
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self._heading:
            self.headings.append(data)
            self._heading = False


def parsed(page: Path) -> Balanced:
    found = Balanced()
    found.feed(page.read_text())
    assert not found.open
    return found


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    values = {**TINY, "data": {**TINY["data"], "path": str(scenes)}}
    watch = Callback(4, lambda model: {"rankme": 3.5})
    pretrain(Recipe.read(values, "test"), open_source(scenes, split="train"), folder, callbacks=[watch], quiet=True)
    data = {split: {"n": 9, "path": f"{scenes}/{name}-*.tar"} for split, name in (("train", "train"), ("test", "val"))}
    row = {"top1": 0.4321, "top5": 0.9}
    (folder / "evaluations").mkdir()
    result = {"kind": "knn", "level": None, "chance": 0.125, "protocol": {"name": "mine", "description": "a < b"}}
    rows = [{"encoder": "trained", **row}, {"encoder": "random", **row, "top1": 0.1234}]
    (folder / "evaluations" / "knn-mine.json").write_text(json.dumps({**result, "data": data, "rows": rows}))
    classes = {"classes": ["ground", "ring"], **data}
    masks = [{"encoder": "trained", "miou": 0.567, "per_class": [0.8, None]}]
    segmentation = {**result, "kind": "segmentation", "level": 1, "data": classes, "rows": masks}
    (folder / "evaluations" / "segmentation-mine.json").write_text(json.dumps(segmentation))
    return folder


def test_the_page_stands_alone_and_has_every_section(run):
    page = parsed(write_report(run))
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert sum(source.startswith("data:") for source in page.sources) == 4
    text = (run / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']https?:", text)
    for heading in ("How good is it?", "Curves", "Masks", "Patch features", "Nearest neighbours",
                    "Segmentation without training", "Recipe", "Run"):  # fmt: skip
        assert heading in page.headings
    assert "RankMe" in text and 'alt="' in text


def test_numbers_are_those_of_the_files(run):
    text = write_report(run).read_text()
    assert "<td>43.2</td>" in text and "<td>43.21</td>" in text and "<td>12.34</td>" in text and "<td>56.7</td>" in text
    assert "Chance 12.5." in text and "Level 1." in text and "a &lt; b" in text
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"loss {last['loss']:.4f}" in text and "8 steps" in text and "64 images seen" in text


def test_two_pages_of_one_run_are_equal(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_what_is_missing_is_left_out_and_said(run, tmp_path):
    values = json.loads(json.dumps({**TINY, "data": {**TINY["data"], "path": str(tmp_path / "gone")}}))
    (tmp_path / "recipe.yaml").write_text(Recipe.read(values, "test").dump())
    for name in ("run.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    page = parsed(write_report(tmp_path))
    text = (tmp_path / "report.html").read_text()
    assert "Masks" not in page.headings and "Curves" in page.headings
    assert "No pictures" in text and "gone" in text and "ijepa evaluate linear" in text


def test_no_run_is_refused(tmp_path):
    with pytest.raises(Refused, match="holds no run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
