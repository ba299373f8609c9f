import pytest

from ijepa.evaluation.protocols import DEFAULTS, KINDS, load_protocol, presets
from ijepa.utils.errors import UserError


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in presets(kind)])
def test_presets_are_valid_and_say_what_they_are(kind, name):
    protocol = load_protocol(kind, name)
    assert protocol.name == name
    assert len(protocol.description) > 40


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_default_and_a_demo(kind):
    assert load_protocol(kind).name == DEFAULTS[kind]
    assert "demo" in presets(kind)


def test_file_over_a_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: heldout\nname: mine\nepochs: 5\n")
    protocol = load_protocol("linear", file)
    assert (protocol.name, protocol.epochs) == ("mine", 5)
    assert protocol.lrs == load_protocol("linear", "heldout").lrs


def test_a_file_over_a_preset_never_passes_for_it(tmp_path):
    """Its results would be filed over the preset's, and published figures of the preset stand beside them."""
    file = tmp_path / "mine.yaml"
    file.write_text("base: ijepa\nepochs: 5\nselection: held-out\n")
    protocol = load_protocol("linear", file)
    assert protocol.name == "mine" and protocol.description == "As ijepa, but for epochs, selection."


def test_sections_are_changed_field_by_field(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: demo-linear\nlinear: {lr: 0.01}\n")
    mine, base = load_protocol("segmentation", file), load_protocol("segmentation", "demo-linear")
    assert mine.linear == base.linear.model_copy(update={"lr": 0.01}) and base.linear.steps == 600


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: heldout\nepoch: 5", "epoch: unknown key; did you mean epochs?"),
        ("base: held-out\nname: x", "did you mean heldout?"),
        ("base: heldout\nlrs: [0.1, -1]", "lrs"),
        ("name: x\nweight_decays: [0]", "lrs: missing"),
        ("base: heldout\nname: ijepa", "name = 'ijepa': is the name of a linear preset"),
        ("name: dinov2\nlrs: [0.1]", "is the name of a linear preset"),
        ("base: heldout\nname: a/b", "name = 'a/b': cannot be part of a file's name"),
        ("just words", "holds no keys"),
        ("a: [1", "is no YAML"),
    ],
)
def test_bad_files_in_one_line(tmp_path, text, said):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        load_protocol("linear", file)
    assert said in str(refused.value)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_such_protocol(tmp_path):
    with pytest.raises(UserError, match="no knn protocol 'dina'; did you mean dino"):
        load_protocol("knn", "dina")
    with pytest.raises(UserError, match="cannot be read"):
        load_protocol("knn", tmp_path / "absent.yaml")


def test_knn_scores_the_k_it_reports(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: dino\nk: 15\n")
    with pytest.raises(UserError, match="k = 15"):
        load_protocol("knn", file)
