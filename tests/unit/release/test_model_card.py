import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from ijepa.cli import cli
from ijepa.data.open import open_dataset
from ijepa.evaluation.run import evaluate
from ijepa.planning.hardware import find_country, find_gpu, grids
from ijepa.release.archive import verify_archive, write_archive
from ijepa.release.model_card import About, estimate_energy
from ijepa.report.page import write_report
from tests.helpers.images import write_tree


def header_of(archive: Path) -> dict[str, Any]:
    return yaml.safe_load((archive / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def facts_of(archive: Path) -> dict[str, str]:
    """Return the rows of the tables with two columns."""
    return dict(re.findall(r"(?m)^\| (\S[^|]*) \| ([^|]*) \|$", (archive / "README.md").read_text()))


def test_model_card_is_valid_for_the_hub(finished_run: Path, archive: Path) -> None:
    from huggingface_hub import ModelCard

    checked = ModelCard((archive / "README.md").read_text(), ignore_metadata_errors=False)
    values = header_of(archive)
    assert values["license"] == "apache-2.0" and values["library_name"] == "ijepa" and values["datasets"] == ["scenes"]
    row = json.loads((finished_run / "evaluations/knn-small.json").read_text())["rows"][0]
    (entry,) = values["model-index"][0]["results"]
    assert entry["dataset"]["name"] == "scenes"
    assert entry["metrics"] == [{"type": "accuracy", "name": "top-1 (%)", "value": round(100 * row["top1"], 2)}]
    assert checked.data.eval_results[0].metric_value == round(100 * row["top1"], 2)
    assert checked.data.to_dict()["co2_eq_emissions"] == values["co2_eq_emissions"]
    assert checked.data.pipeline_tag == "image-feature-extraction"


def test_model_card_estimates_emissions_from_the_stated_power(finished_run: Path, archive: Path) -> None:
    emissions = header_of(archive)["co2_eq_emissions"]
    assert emissions["geographical_location"] == "Sweden" and emissions["training_type"] == "pre-training"
    assert "CPU" in emissions["hardware_used"]
    seconds = sum(json.loads(line)["seconds"] for line in (finished_run / "timings.jsonl").read_text().splitlines())
    grams = seconds / 3600 * 65.0 / 1e3 * grids().pue * grids().countries["Sweden"].grams
    assert emissions["emissions"] == pytest.approx(grams, rel=0.01)
    assert "65 W (stated)" in (archive / "README.md").read_text()


def test_model_card_has_the_facts_of_the_run(finished_run: Path, archive: Path) -> None:
    facts, row = facts_of(archive), json.loads((finished_run / "evaluations/knn-small.json").read_text())["rows"][0]
    assert facts["initial weights"] == "encoder of earlier (step-00000003)" and facts["country"] == "Sweden"
    assert facts["hardware"].endswith("; 1 process") and facts["length"].startswith("8 of 8 steps")
    assert facts["trained"] == f"{100 * row['top1']:.2f}" and {"random", "pixels"} < facts.keys()
    text = (archive / "README.md").read_text()
    assert "protocol `small`" in text and "This run is not finished" not in text
    assert not re.search(r"(?m) $|\n\n\n|\{", text.split("## How to load it")[0]), "spaces, empty lines, braces"


def test_model_card_does_not_guess_an_unknown_power(finished_run: Path, tmp_path: Path) -> None:
    norway = write_archive(finished_run, tmp_path / "norway", About(country="norway"))
    assert "Not estimated" in (norway / "README.md").read_text() and "co2_eq_emissions" not in header_of(norway)
    assert facts_of(norway)["country"] == "Norway"
    assert facts_of(write_archive(finished_run, tmp_path / "out", About()))["country"] == "not stated"


def test_estimate_energy_uses_the_stated_power_or_the_table_of_gpus() -> None:
    _, grid = find_country("Sweden")
    info = {"devices": ["NVIDIA H100 80GB HBM3"] * 8}
    known, stated = estimate_energy(info, 2.0, None, grid), estimate_energy(info, 2.0, 100.0, grid)
    assert known is not None and known.watts == find_gpu("h100").server_w and "H100" in known.source
    assert stated is not None and stated.kilowatt_hours == pytest.approx(0.2 * grids().pue)
    assert estimate_energy({"devices": ["a CPU"]}, 2.0, None, grid) is None
    assert estimate_energy(info, 0.0, 100.0, grid) is None


def test_model_card_names_evaluations_of_other_weights(run: Path, scenes: Path, tmp_path: Path) -> None:
    sets, earlier = (f"{scenes}/train-*.tar", f"{scenes}/val-*.tar"), min((run / "checkpoints").iterdir())
    evaluate("knn", str(earlier), *sets, protocol="demo", output=run / "evaluations", baselines=False)
    evaluate("knn", str(run), *sets, protocol=str(run / "small.yaml"), which="context", baselines=False)
    text = (write_archive(run, tmp_path / "out", About()) / "README.md").read_text()
    assert "other weights, which are not shown: `knn-demo.json`" in text and "protocol `demo`" not in text
    assert text.index("| trained | ") < text.index("| trained (context encoder) | ")


def test_code_on_the_model_card_loads_the_weights(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(archive)
    section = (archive / "README.md").read_text().split("## How to load it")[1]
    names: dict[str, Any] = {}
    for language, block in re.findall(r"```(python|sh)\n(.*?)```", section, flags=re.S):
        if language == "python":
            with torch.no_grad():
                exec(block, names)
            continue
        for line in block.splitlines():
            program, *words = shlex.split(line)
            assert program == "ijepa"
            CliRunner().invoke(cli, words, catch_exceptions=False, standalone_mode=False)
    expected = names["patches"]
    assert expected.shape == (2, 36, 32)
    for name in ("hidden", "features", "output", "result"):
        torch.testing.assert_close(torch.as_tensor(names[name]), expected, rtol=1e-5, atol=2e-5)
    target = load_file(archive / "target_encoder.safetensors")
    for state in (names["state"], names["original"]):
        assert all(torch.equal(state[key], value) for key, value in target.items())
    verify_archive(archive)


def test_names_that_are_not_utf8_are_printable_in_report_and_model_card(
    run: Path, scenes: Path, tmp_path: Path
) -> None:
    odd = os.fsdecode(b"caf\xe9")
    source = open_dataset(scenes, split="train")
    for split, start in (("train", 0), ("val", 12)):
        names = (f"{odd}-{split}/{(odd, 'b')[number % 2]}/{odd}{number}.png" for number in range(start, start + 12))
        write_tree(tmp_path, {name: source.image(start + place) for place, name in enumerate(names)})
    shutil.rmtree(run / "evaluations")
    sets = (str(tmp_path / f"{odd}-{split}") for split in ("train", "val"))
    _, file = evaluate("knn", str(run), *sets, protocol=str(run / "small.yaml"))
    assert json.loads(file.read_text())["data"]["classes"] == ["b", "caf\\xe9"]
    write_report(run, data=str(tmp_path / f"{odd}-train"))
    assert "caf\\xe9" in (run / "report.html").read_text(encoding="utf-8")
    (entry,) = header_of(write_archive(run, tmp_path / "out", About()))["model-index"][0]["results"]
    assert entry["dataset"]["name"] == "caf\\xe9-val"
    verify_archive(tmp_path / "out")
