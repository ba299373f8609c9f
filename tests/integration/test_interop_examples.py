"""The Python examples of docs/interop.md, run one after another."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from ijepa.interop.exchange import export_weights
from tests.helpers.libraries import random_model, recipe
from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "interop.md"


def test_the_examples_of_the_documentation_run_and_agree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = Path("runs/mine")
    mine.mkdir(parents=True)
    (mine / "recipe.yaml").write_text(recipe("tiny").dump())
    save_file(dict(random_model(recipe("tiny")).target_encoder.state_dict()), mine / "target_encoder.safetensors")
    export_weights(mine, Path("hf"), "transformers")
    export_weights(mine, Path("timm-mine"), "timm")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        assert len([line for line in block.splitlines() if line and "import" not in line]) <= 6
        exec(block, names)
    assert names["patches"].shape == (8, 36, 32) and names["nearest"][0, 0] == 0
    assert 0.5 <= names["accuracy"] <= 1
    torch.testing.assert_close(names["hidden"], names["patches"], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(names["pooled"], names["features"], rtol=1e-5, atol=2e-5)
