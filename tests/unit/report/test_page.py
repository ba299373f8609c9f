import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from ijepa.data.open import open_dataset
from ijepa.report.page import build_section, render_page, write_report
from ijepa.report.run_data import MissingInput, read_run_data
from ijepa.utils.errors import RunError, UserError
from tests.helpers.html import Page

KEYS = ["summary", "curves", "masks", "features", "maps", "retrieval", "segmentation", "evaluations", "recipe"]
PICTURES = {"masks", "features", "maps", "retrieval", "segmentation"}


def page_of(run: Path, data: str | None = None) -> Page:
    return Page(write_report(run, data=data).read_text())


@pytest.fixture(scope="module")
def page(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(Path(shutil.copytree(whole_run, tmp_path_factory.mktemp("page") / "run")))


def move_data(run: Path, to: Path) -> None:
    """Let run.json and all results name data that is not there."""
    for file in [run / "run.json", *(run / "evaluations").glob("*.json")]:
        file.write_text(re.sub(r'"path": "[^"]*"', f'"path": "{to}"', file.read_text()))


def test_page_needs_no_other_file(page: Page) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "poster", "data", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, name, value)
    assert not page.of("link") and not page.of("script") and not page.of("iframe")


def test_style_sheet_needs_no_other_file_and_has_a_dark_mode(run: Path) -> None:
    text = write_report(run).read_text()
    assert "@import" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text


def test_ids_are_unique_and_links_have_a_target(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in page.of("a"):
        assert (attributes["href"] or "").removeprefix("#") in ids


def test_page_has_every_section_in_order_and_links_to_it(page: Page) -> None:
    assert page.sections == KEYS and not page.missing
    assert [attributes["href"] for attributes in page.of("a")][: len(KEYS)] == [f"#{key}" for key in KEYS]


def test_every_picture_has_an_alternative_text(page: Page) -> None:
    assert len(page.of("img")) > 80 and all(page.alts)
    assert all(attributes["role"] == "img" for attributes in page.of("svg"))
    assert len(page.of("figcaption")) == len(page.of("figure"))


def test_page_has_all_pictures(page: Page) -> None:
    expected = {
        "with its masks": 6,
        "patch features of": 2 * 8,
        "middle patch outlined": 8,
        ", trained encoder, image": 8,
        ", random encoder, image": 8,
        "Cosine of prediction and target": 8,
        "Singular values": 1,
        "Query: ": 6,
        "Neighbor by the trained encoder: ": 6 * 6,
        "Neighbor by the random encoder: ": 6 * 6,
        **dict.fromkeys(("truth, ", "nearest patches, trained, ", "nearest patches, random, "), 6),
        **dict.fromkeys(("clusters, trained, ", "clusters, random, "), 6),
        "IoU in percent by class": 1,
    }
    assert {part: sum(part in alt for alt in page.alts) for part in expected} == expected


def test_numbers_are_those_of_the_files(page: Page, whole_run: Path) -> None:
    last = json.loads((whole_run / "metrics.jsonl").read_text().splitlines()[-1])
    facts = dict(zip(page.text("header", "dt"), page.text("header", "dd"), strict=True))
    assert facts["final loss"] == f"{last['loss']:.4g}" and facts["final skill"] == f"{last['skill']:.4g}"
    assert (facts["steps"], facts["images seen"], facts["training time"]) == ("60", "480", "12s")
    cells = page.text("#evaluations", "td")
    for share in ("43.21", "23.45", "12.31", "33.33", "44.44", "24.68", "12.34", "13.57", "98.76", "75.31"):
        assert share in cells
    assert "42.1 to 45.4" in cells  # the interval of top-1
    assert "k 20; top-1 by k 10: 22.2" in cells and "blocks 4, lr 0.003, weight decay 0.1" in cells


def test_texts_of_the_files_are_on_the_page(page: Page) -> None:
    assert "For <tests> & nothing else." in page.words("header")
    words = page.words("#evaluations")
    assert "rates < 1 & decays" in words and "torch 9.8.7" in words and "Level 1:" in words
    assert "trained is run (step-00000060)" in words and "K = 200 is more than" in words
    facts = dict(zip(page.text("#recipe", "dt"), page.text("#recipe", "dd"), strict=True))
    assert facts["resolved.autocast"] == "False" and facts["commit"] == "c0ffee"
    assert "ijepa pretrain tiny" in page.text("#recipe", "pre")


def test_recipe_is_on_the_page(page: Page, whole_run: Path) -> None:
    assert " ".join((whole_run / "recipe.yaml").read_text().split()) in page.words("details")


def test_write_report_writes_the_same_bytes_for_the_same_run(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_write_report_of_a_recipe_alone_says_how_to_make_the_rest(run: Path) -> None:
    for part in ("checkpoints", "evaluations"):
        shutil.rmtree(run / part)
    for part in ("run.json", "metrics.jsonl", "timings.jsonl", "diagnostics.jsonl"):
        (run / part).unlink()
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(re.sub(r"(?m)^  path: .*$", "  path: null", recipe))
    page = page_of(run)
    assert page.sections == ["recipe"] and page.missing == {*KEYS[:-1], "run"}
    commands = page.text("code")
    assert {"ijepa pretrain tiny", f"ijepa report {run} --data IMAGES"} < set(commands)
    assert any(command.startswith("ijepa evaluate linear") for command in commands)


def test_write_report_without_a_checkpoint_has_the_masks(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    page = page_of(run)
    assert page.missing == PICTURES - {"masks"}
    assert "checkpoint" in page.words("#maps")


def test_write_report_without_diagnostics_says_how_to_make_them(run: Path) -> None:
    (run / "diagnostics.jsonl").unlink()
    page = page_of(run)
    assert page.missing == {"diagnostics"} and "--diagnose-every" in page.words("#diagnostics")


def test_write_report_names_data_that_were_moved(run: Path, tmp_path: Path, scenes: Path) -> None:
    move_data(run, tmp_path / "gone")
    page = page_of(run)
    assert page.missing == PICTURES
    assert all(f"{tmp_path}/gone" in page.words(f"#{key}") for key in PICTURES)
    assert not page_of(run, str(scenes)).missing


def test_write_report_refuses_given_data_that_do_not_exist(run: Path) -> None:
    with pytest.raises(UserError) as err:
        write_report(run, data="/nowhere/at/all")
    assert err.value.where.startswith("--data") and not (run / "report.html").exists()


def test_write_report_of_images_without_labels_and_masks(run: Path, tmp_path: Path, scenes: Path) -> None:
    shutil.rmtree(run / "evaluations")
    folder = tmp_path / "flat"
    folder.mkdir()
    train = open_dataset(scenes, split="train")
    for index in range(20):
        (folder / f"{index:03}.jpg").write_bytes(train.image(index))
    page = page_of(run, str(folder))
    assert page.missing == {"summary", "segmentation", "evaluations"}
    assert "no masks" in page.words("#segmentation")
    assert "✓" not in page.words() and not any("class" in alt for alt in page.alts)
    assert "first training samples of this run" not in page.words("#masks")  # these are other images


def test_masks_that_do_not_fit_leave_out_only_their_section(run: Path) -> None:
    file = run / "evaluations" / "segmentation-demo.json"
    result = json.loads(file.read_text())
    result["protocol"]["classes"] = 2
    file.write_text(json.dumps(result))
    page = page_of(run)
    assert page.missing == {"segmentation"}
    assert "out of range" in page.words("#segmentation") and f"ijepa evaluate segmentation {run}" in page.words(
        "#segmentation"
    )


def test_build_section_turns_a_failure_into_a_missing_section(whole_run: Path) -> None:
    def fail() -> None:
        raise RunError("a.jpg: is cut short")

    section = build_section("maps", "Maps", fail, "a <command>")
    assert isinstance(section.missing, MissingInput)
    page = Page(render_page(read_run_data(whole_run), [section]))
    assert page.sections == [] and page.text("code") == ["a <command>"]
    assert "a.jpg: is cut short" in page.words("#maps")


def test_write_report_refuses_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError) as err:
        write_report(tmp_path)
    assert err.value.where == str(tmp_path) and not list(tmp_path.iterdir())


def test_write_report_names_the_extra_of_a_missing_matplotlib(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError) as err:
        write_report(run)
    assert "matplotlib" in err.value.problem and "ijepa-pretrain[report]" in err.value.hint


def test_write_report_fails_if_the_page_cannot_be_written(run: Path) -> None:
    (run / "report.html").mkdir()
    with pytest.raises(RunError, match="cannot be written"):
        write_report(run)
