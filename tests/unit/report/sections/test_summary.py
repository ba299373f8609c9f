import shutil
from pathlib import Path

import pytest

from ijepa.report.run_data import MissingInput, read_run_data
from ijepa.report.sections.summary import headline_facts, summary_section


def test_headline_facts_are_those_of_the_files(whole_run: Path) -> None:
    facts = headline_facts(read_run_data(whole_run))
    assert (facts["steps"], facts["images seen"], facts["training time"]) == ("60", "480", "12s")
    assert facts["images in the data set"] == "60" and facts["encoder"].startswith("ViT, width 32, 2 layers")


def test_headline_facts_of_a_recipe_alone(run: Path) -> None:
    for file in run.glob("*.json*"):
        file.unlink()
    facts = headline_facts(read_run_data(run))
    assert list(facts) == ["encoder", "image size", "batch size", "seed"]


def test_summary_section_explains_each_encoder_once(whole_run: Path) -> None:
    found = summary_section(read_run_data(whole_run))
    assert [result.kind for result in found.results] == ["linear", "knn", "segmentation"]
    assert list(found.encoders) == ["trained", "random", "pixels"]
    assert found.encoders["trained"] == "target encoder of this run"


def test_summary_section_without_evaluations_gives_the_command(run: Path) -> None:
    shutil.rmtree(run / "evaluations")
    with pytest.raises(MissingInput) as err:
        summary_section(read_run_data(run))
    assert err.value.command.startswith("ijepa evaluate")
