import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ijepa.cli import cli
from ijepa.data.open import open_source
from ijepa.evaluation.protocols import KINDS, presets
from ijepa.evaluation.results.compare import FIGURES, compare_results, published
from ijepa.evaluation.segmentation.evaluate import evaluate_segmentation
from ijepa.evaluation.segmentation.protocol import SegmentationProtocol
from ijepa.utils.errors import UserError
from tests.helpers.encoders import MeanColour, block_mask, write_pairs

Rows = list[dict[str, object]]


def write(file: Path, rows: Rows, *, kind="linear", name="ijepa", fingerprint="f", notes=(), **settings) -> Path:
    encoders = [str(row["encoder"]) for row in rows]
    values = {
        "kind": kind,
        "protocol": {"name": name, "description": file.stem, **settings},
        "data": {"train": {"n": 5, "fingerprint": "t"}, "test": {"n": 9, "fingerprint": fingerprint, "path": "a/val"}},
        "weights_sha256": {encoder: f"{encoder}0123456789" for encoder in encoders},
        "rows": rows,
        "notes": list(notes),
    }
    file.write_text(json.dumps(values))
    return file


def columns(text: str) -> int:
    return text[text.index("┏") :].split("\n")[0].count("┳")


def test_what_is_the_same_shares_a_column_and_what_is_not_does_not(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", [{"encoder": "a", "top1": 0.5, "ci": [0.4, 0.6]}], epochs=50)
    again = write(tmp_path / "b.json", [{"encoder": "b", "top1": 0.6}], epochs=50, notes=["chosen on test"])
    other = write(tmp_path / "c.json", [{"encoder": "a", "top1": 0.7}], epochs=90)
    elsewhere = write(tmp_path / "d.json", [{"encoder": "a", "top1": 0.8}], epochs=50, fingerprint="g")
    assert columns(compare_results([first, again], beside=False)) == 1
    assert columns(compare_results([first, other], beside=False)) == 2, "other settings of the same name"
    assert columns(compare_results([first, elsewhere], beside=False)) == 2, "other data"
    text = compare_results([first, again, other, elsewhere], beside=False)
    assert columns(text) == 3
    (row,) = [line for line in text.splitlines() if "a [a0123456]" in line]
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["50.00 (40.0 to 60.0)", "70.00", "80.00"]
    assert "b.json: chosen on test" in text
    assert "b [b0123456]" in text


def test_one_label_map_file_with_other_classes_or_values_is_another_column(tmp_path: Path) -> None:
    train, test = (
        open_source(write_pairs(tmp_path / name, [block_mask(i) for i in (1, 2, 3, 4)[:count]]))
        for name, count in (("a", 4), ("b", 3))
    )
    rule = {"name": "r", "method": "retrieval", "image_size": 32, "retrieval": {"neighbours": [1]}}
    protocol = SegmentationProtocol.read({**rule, "labels": str(tmp_path / "map.yaml")}, "r")
    files = []
    for number, classes in enumerate(("{a: 0, b: 1, c: 2, d: 3}", "{a: [0, 1], b: [2, 3]}", "{a: [0, 2], b: [1, 3]}")):
        (tmp_path / "map.yaml").write_text(f"name: own\nclasses: {classes}\n")
        result = evaluate_segmentation({"toy": MeanColour()}, train, test, protocol, seed=0)
        assert set(result["data"]["labels_sha256"]) == {"train", "test"}
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(result))
    assert columns(compare_results([files[0], files[0]])) == 1
    text = compare_results(files)
    assert columns(text) == 3
    assert "4 classes" in text and "2 classes" in text


def test_published_figures_stand_apart_with_their_source(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", [{"encoder": "mine", "top1": 0.793}])
    text = compare_results([file])
    assert columns(text) == 2
    (row,) = [line for line in text.splitlines() if "I-JEPA ViT-H/14 (published)" in line]
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["-", "79.3"]
    assert "published: I-JEPA, arXiv 2301.08243" in text
    assert "DINOv2" not in text, "published by another protocol"


def test_segmentation_shows_its_readings(tmp_path: Path) -> None:
    rows: Rows = [{"encoder": "mine", "miou": 0.1, "miou_overclustered": 0.2, "pixel_accuracy": 0.9}]
    text = compare_results([write(tmp_path / "a.json", rows, kind="segmentation", name="kmeans")])
    assert columns(text) == 3
    assert "90.00" not in text


def test_published_figures_are_of_protocols_that_exist() -> None:
    for entry in published():
        assert entry.kind in KINDS
        assert entry.protocol in presets(entry.kind)
        assert entry.figure in FIGURES
        assert entry.source
        assert all(0 < value < 100 for value in entry.values.values())


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results given"):
        compare_results([])
    (tmp_path / "a.json").write_text('{"kind": "diagnosis"}')
    with pytest.raises(UserError, match=r"a\.json: is no result of an evaluation"):
        compare_results([tmp_path / "a.json"])
    with pytest.raises(UserError, match="cannot be read"):
        compare_results([tmp_path / "b.json"])


@pytest.mark.parametrize("words", [["compare"], ["--compare"], ["--no-published", "--compare"]])
def test_the_command(tmp_path: Path, words: list[str]) -> None:
    files = [str(write(tmp_path / f"{top}.json", [{"encoder": "mine", "top1": top}])) for top in (0.25, 0.75)]
    done = CliRunner().invoke(cli, ["evaluate", *words, *files])
    assert done.exit_code == 0, done.output
    assert "25.00" in done.output and "75.00" in done.output
    assert ("(published)" in done.output) == (len(words) == 1)


def test_the_option_is_shown_and_wants_files() -> None:
    assert "--compare" in CliRunner().invoke(cli, ["evaluate", "--help"]).output
    with pytest.raises(UserError, match="compare: no results given"):
        CliRunner().invoke(cli, ["evaluate", "--compare"], catch_exceptions=False)
