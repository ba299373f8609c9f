import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file

from ijepa.cli import cli
from ijepa.config.recipe import ModelSection, Recipe
from ijepa.evaluation.features.extract import extract, weights_hash
from ijepa.evaluation.features.precision import name_of, resolved
from ijepa.evaluation.results.compare import compare_results
from ijepa.model.encoder import FrozenEncoder
from ijepa.model.vision_transformer import VisionTransformer
from tests.conftest import TINY
from tests.helpers.feature_clouds import color_sets

SHAPE = ModelSection(image_size=32, patch_size=8, encoder={"width": 32, "depth": 3, "heads": 2})


@pytest.mark.parametrize("native", [True, False])
def test_resolved_auto_is_bfloat16_on_a_gpu_that_supports_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolved("auto", gpu) == (torch.bfloat16 if native else torch.float32)
    assert resolved("auto", cpu) == torch.float32
    for device in (cpu, gpu):
        assert resolved("none", device) == torch.float32
        assert resolved("bf16", device) == torch.bfloat16
    assert (name_of(torch.bfloat16), name_of(torch.float32)) == ("bfloat16", "float32")


def test_compute_in_sets_the_precision_of_an_encoder() -> None:
    encoder = FrozenEncoder.initial(SHAPE, seed=3)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen: list[torch.dtype] = []
    encoder.vit.blocks[1].mlp.fc1.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    exact, digest = encoder(pixels), weights_hash(encoder)
    assert encoder.precision == torch.float32
    rough = encoder.compute_in(torch.bfloat16)(pixels)
    assert seen == [torch.float32, torch.bfloat16]
    assert exact.dtype == rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().max() < 0.1
    assert weights_hash(encoder) == digest, "the hash does not depend on the precision"
    assert torch.equal(encoder.compute_in(torch.float32)(pixels), exact)
    with torch.autocast("cpu", torch.bfloat16):
        encoder(pixels)
    assert seen[-1] == torch.bfloat16, "autocast of the caller is kept"


def test_extract_caches_each_precision_separately(tmp_path: Path) -> None:
    source, _ = color_sets(tmp_path)
    encoder = FrozenEncoder.initial(SHAPE, seed=3)
    setting = {"image_size": (32, 32), "last": 1, "label": "toy", "cache": tmp_path / "cache"}
    exact = extract(encoder, source, **setting)
    rough = extract(encoder.compute_in(torch.bfloat16), source, **setting)
    assert not torch.equal(exact, rough)
    assert torch.equal(extract(encoder.compute_in(torch.float32), source, **setting), exact)


def test_result_states_its_precision(tmp_path: Path) -> None:
    """On a CPU the default is float32. Each precision has its own result file."""
    color_sets(tmp_path, size=48)
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(TINY))
    vit = VisionTransformer(Recipe.load(folder / "recipe.yaml").model)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(value.shape, generator=generator) / 8 for name, value in vit.state_dict().items()}
    save_file(state, folder / "target_encoder.safetensors")
    command = ["evaluate", "knn", str(folder), "--train", f"{tmp_path}/train", "--test", f"{tmp_path}/val"]
    command += ["--protocol", "demo", "--no-baselines", "--output", str(tmp_path / "results")]
    printed = {}
    for autocast in ("none", "bf16"):
        done = CliRunner().invoke(cli, [*command, "--autocast", autocast])
        assert done.exit_code == 0, done.output
        printed[autocast] = done.output
    default = CliRunner().invoke(cli, command)
    assert default.exit_code == 0, default.output
    files = sorted((tmp_path / "results").glob("*.json"))
    results = [json.loads(file.read_text()) for file in files]
    found = {(result["protocol"]["autocast"], result["precision"]) for result in results}
    assert found == {("none", "float32"), ("bf16", "bfloat16"), ("auto", "float32")}
    assert "bfloat16" in printed["bf16"] and "float32" in printed["none"]
    assert "bfloat16" in str(compare_results(files, with_published=False).columns)
    assert CliRunner().invoke(cli, [*command, "--autocast", "fp16"]).exit_code == 2
