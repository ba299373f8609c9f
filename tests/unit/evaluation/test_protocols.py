from pathlib import Path

import pytest

from ijepa.evaluation.protocols import DEFAULTS, KINDS, load_protocol, presets
from ijepa.utils.errors import UserError


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in presets(kind)])
def test_presets_are_valid_and_have_a_description(kind: str, name: str) -> None:
    protocol = load_protocol(kind, name)
    assert protocol.name == name
    assert len(protocol.description) > 40


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_default_and_a_demo(kind: str) -> None:
    assert load_protocol(kind).name == DEFAULTS[kind]
    assert "demo" in presets(kind)


def test_load_protocol_reads_a_file_over_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: heldout\nname: mine\nepochs: 5\n")
    protocol = load_protocol("linear", file)
    assert (protocol.name, protocol.epochs) == ("mine", 5)
    assert protocol.lrs == load_protocol("linear", "heldout").lrs


def test_a_file_over_a_preset_does_not_have_its_name(tmp_path: Path) -> None:
    """Its results would overwrite those of the preset, and be compared with published results of the preset."""
    file = tmp_path / "mine.yaml"
    file.write_text("base: ijepa\nepochs: 5\nselection: held-out\n")
    protocol = load_protocol("linear", file)
    assert protocol.name == "mine" and protocol.description == "As ijepa, except for epochs, selection."


def test_sections_of_a_file_over_a_preset_are_merged(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: demo-linear\nlinear: {lr: 0.01}\n")
    mine, base = load_protocol("segmentation", file), load_protocol("segmentation", "demo-linear")
    assert mine.linear == base.linear.model_copy(update={"lr": 0.01}) and base.linear.steps == 600


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("base: heldout\nepoch: 5", "epoch: unknown key; did you mean epochs?"),
        ("base: held-out\nname: x", "did you mean heldout"),
        ("base: heldout\nlrs: [0.1, -1]", "lrs"),
        ("name: x\nweight_decays: [0]", "lrs: missing"),
        ("base: heldout\nname: ijepa", "name = 'ijepa'"),
        ("name: dinov2\nlrs: [0.1]", "name = 'dinov2'"),
        ("base: heldout\nname: a/b", "name = 'a/b'"),
        ("just words", "mapping"),
        ("a: [1", "YAML"),
    ],
)
def test_load_protocol_refuses_invalid_files(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as err:
        load_protocol("linear", file)
    assert word in str(err.value)
    assert "\n" not in str(err.value)


def test_load_protocol_refuses_missing_presets_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError) as err:
        load_protocol("knn", "dina")
    assert "dina" in err.value.where and "did you mean dino" in err.value.hint
    with pytest.raises(UserError) as err:
        load_protocol("knn", tmp_path / "absent.yaml")
    assert "absent.yaml" in err.value.where


def test_knn_protocol_refuses_a_k_that_is_not_computed(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: dino\nk: 15\n")
    with pytest.raises(UserError) as err:
        load_protocol("knn", file)
    assert "k = 15" in err.value.where
