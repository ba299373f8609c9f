"""Every command that takes WEIGHTS, with a checkpoint of the original code whose width no known model has.

The file does not state its number of attention heads. The target encoder's positions have drifted, as in training.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from ijepa.__main__ import main
from ijepa.cli import cli
from ijepa.interop.exchange import export_weights
from ijepa.interop.init_from import initial_weights
from ijepa.interop.weights import load_encoder, resolve_weights
from ijepa.utils.errors import Notice, UserError
from tests.conftest import TINY
from tests.helpers.libraries import averaged, pixels, recipe, write_weights
from tests.helpers.videos import write_video

GUESS = (
    "number of attention heads is not in .*vit.pth.tar; 1 x 32 channels are assumed; --heads N sets a different number"
)
DRIFT = r"positions in .*vit.pth.tar differ from the sin-cos table by up to \d\.\de-05, .*; the exact table is used"


@pytest.fixture(scope="module")
def official(tiny, tmp_path_factory) -> Path:
    """The weights `tiny`, 32 wide with 4 heads, in the format of the original."""
    file = export_weights(tiny, tmp_path_factory.mktemp("official") / "vit.pth.tar", "official")
    content = torch.load(file, weights_only=True)
    for name in content["target_encoder"]:
        if name == "module.pos_embed":
            content["target_encoder"][name] = averaged(content["target_encoder"][name], 20_000)
    torch.save(content, file)
    return file


def ijepa(*words: object) -> str:
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False, standalone_mode=False).stdout


def rows(folder: Path) -> list[dict]:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())["rows"]


PROTOCOLS = {
    "linear": "base: demo\nname: small\nepochs: 1\nlrs: [1e-3]\n",
    "knn": "base: demo\nname: small\nneighbors: [5]\nk: 5\n",
    "segmentation": "base: demo\nname: small\nimage_size: 48\ntrain_images: 4\ntest_images: 2\n",
    "propagation": "base: demo\nname: small\n",
}


@pytest.mark.parametrize("kind", PROTOCOLS)
def test_evaluate(tiny, official, scenes, tmp_path, kind):
    (tmp_path / "small.yaml").write_text(PROTOCOLS[kind])
    data = ["--train", f"{scenes}/train-*.tar", "--test", f"{scenes}/val-*.tar"]
    if kind == "propagation":
        write_video(tmp_path / "videos", "one", frames=3)
        data = ["--data", tmp_path / "videos"]

    def evaluated(name: str, *words: object) -> list[dict]:
        common = ["--protocol", tmp_path / "small.yaml", "--no-baselines", "--output", tmp_path / name]
        said.append(ijepa("evaluate", kind, *words, *data, *common))
        return rows(tmp_path / name)

    said: list[str] = []
    wanted = evaluated("ours", tiny)
    with pytest.warns(Notice, match=DRIFT) as drift:
        assert evaluated("four", official, "--heads", 4) == wanted
    assert len([each for each in drift if each.category is Notice]) == 1
    with pytest.warns(Notice, match=DRIFT), pytest.warns(Notice, match=GUESS):
        evaluated("guessed", official)
    assert ["note: the number of attention heads is not in" in text for text in said] == [False, False, True]


def test_diagnose(tiny, official, scenes):
    words = ["--data", f"{scenes}/val-*.tar", "--images", "16", "--views", "0"]
    wanted = json.loads(ijepa("diagnose", tiny, *words))["numbers"]
    with pytest.warns(Notice, match=DRIFT):
        assert json.loads(ijepa("diagnose", official, *words, "--heads", 4))["numbers"] == wanted
    with pytest.warns(Notice, match=GUESS):
        ijepa("diagnose", official, *words)


def test_export_and_import(tiny, official, tmp_path):
    raw, _ = pixels(load_encoder(tiny))
    wanted = load_encoder(tiny)(raw)
    with pytest.warns(Notice, match=DRIFT):
        ijepa("export", official, tmp_path / "hf", "--format", "transformers", "--heads", 4)
    assert torch.equal(load_encoder(tmp_path / "hf")(raw), wanted)
    with pytest.warns(Notice, match=DRIFT):
        assert "4 heads" in ijepa("import", official, tmp_path / "ours", "--heads", 4)
    assert torch.equal(load_encoder(tmp_path / "ours")(raw), wanted)
    with pytest.warns(Notice, match=GUESS):
        assert "1 heads" in ijepa("import", official, tmp_path / "guessed")
    with pytest.warns(Notice, match=GUESS):
        ijepa("export", official, tmp_path / "timm", "--format", "timm")
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["model_args"]["num_heads"] == 1


def test_a_run_starts_with_the_heads_of_its_recipe(official, scenes, tmp_path):
    model = recipe("tiny").model.model_dump(mode="json")
    values = {**TINY, "steps": 3, "model": model, "init": {"from": str(official), "parts": "all"}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    with pytest.warns(Notice, match=DRIFT) as said:
        ijepa("pretrain", tmp_path / "tiny.yaml", "--data.path", scenes, "--output", tmp_path / "run")
    assert "attention heads" not in str([each.message for each in said]) and (tmp_path / "run" / "checkpoints").is_dir()


def test_a_known_width_keeps_its_heads_for_any_recipe(tmp_path):
    shape = {"encoder": {"width": 192, "heads": 3}, "predictor": {"heads": 3}}
    official = export_weights(
        write_weights(tmp_path / "ours", recipe("tiny", **shape)), tmp_path / "a.pth.tar", "official"
    )
    other = recipe("tiny", encoder={"width": 192, "heads": 6}, predictor={"heads": 6})
    other = other.model_copy(update={"init": other.init.model_copy(update={"source": str(official)})})
    with pytest.raises(UserError) as err:
        initial_weights(other)
    assert err.value.hint == "add --model.encoder.heads 3"


def test_a_timm_folder_without_its_number_of_heads(tiny, tmp_path):
    out = export_weights(tiny, tmp_path / "timm", "timm")
    values = json.loads((out / "config.json").read_text())
    del values["model_args"]["num_heads"]
    (out / "config.json").write_text(json.dumps(values))
    assert resolve_weights(out, heads=4).recipe.model.encoder.heads == 4
    with pytest.warns(Notice, match=r"model\.safetensors"):
        assert resolve_weights(out).recipe.model.encoder.heads == 1


def test_a_width_that_no_common_head_divides_is_refused(tmp_path):
    ours = write_weights(tmp_path / "ours", recipe("tiny", encoder={"width": 20}, predictor={"width": 24}))
    file = export_weights(ours, tmp_path / "a.pth.tar", "official")
    with pytest.raises(UserError) as err:
        resolve_weights(file)
    assert err.value.where == str(file) and "--heads" in err.value.hint
    assert resolve_weights(file, heads=4).recipe.model.encoder.heads == 4


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_command_line_prints_each_notice_once_in_one_line(official, tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("sys.argv", ["ijepa", "import", str(official), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    lines = capsys.readouterr().err.splitlines()
    wanted = [f"ijepa: the {each}" for each in (GUESS, DRIFT)] if rank == "0" else []
    assert len(lines) == len(wanted) and all(map(re.match, wanted, lines))
