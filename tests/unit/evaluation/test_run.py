import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ijepa.config.recipe import Recipe
from ijepa.data.loading.decode import decode
from ijepa.data.open import open_dataset
from ijepa.evaluation.features.extract import center_view
from ijepa.evaluation.run import evaluate
from ijepa.interop.exchange import export_weights
from ijepa.interop.heads import Head
from ijepa.interop.weights import load_encoder
from ijepa.model.vision_transformer import VisionTransformer
from ijepa.utils.errors import RunError, UserError
from tests.conftest import TINY
from tests.helpers.encoders import block_mask, write_pairs

KINDS = {
    "linear": "base: demo\nname: small\nepochs: 2\nlrs: [1e-3]\n",
    "knn": "base: demo\nname: small\nneighbors: [5]\nk: 5\n",
    "segmentation": "base: demo\nname: small\nimage_size: 48\ntrain_images: 12\ntest_images: 6\n",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights as they may come from anywhere: a recipe and one encoder."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(TINY))
    vit = VisionTransformer(Recipe.load(folder / "recipe.yaml").model)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(value.shape, generator=generator) / 8 for name, value in vit.state_dict().items()}
    save_file(state, folder / "target_encoder.safetensors")
    return folder


@pytest.fixture
def small(tmp_path: Path) -> dict[str, str]:
    files = {kind: tmp_path / f"{kind}.yaml" for kind in KINDS}
    for kind, file in files.items():
        file.write_text(KINDS[kind])
    return {kind: str(file) for kind, file in files.items()}


def sets(scenes: Path) -> tuple[str, str]:
    return f"{scenes}/train-*.tar", f"{scenes}/val-*.tar"


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_adds_baselines_and_repeats(
    kind: str, weights: Path, scenes: Path, small: dict[str, str], tmp_path: Path
) -> None:
    lines: list[str] = []
    results = []
    for name in ("one", "two"):
        output = tmp_path / "results" / name
        result, file = evaluate(
            kind, str(weights), *sets(scenes), protocol=small[kind], output=output, progress=lines.append
        )
        assert file == output / f"{kind}-small.json"
        assert json.loads(file.read_text()) == result.to_json()
        assert result.seconds > 0
        results.append(json.dumps(result.to_json() | {"seconds": 0}))
    assert results[0] == results[1]
    assert [row.encoder for row in result.rows] == ["trained", "random", "pixels"]
    assert len({json.dumps(row.metrics) for row in result.rows}) == 3
    assert all(0 <= row.ci[0] <= row[result.headline] <= row.ci[1] <= 1 for row in result.rows)
    assert (result.kind, result.protocol_name) == (kind, "small")
    assert [result.data.of(role).path for role in ("train", "test")] == list(sets(scenes))
    assert result.data.test.n == (6 if kind == "segmentation" else 20)
    assert 0 < result.chance < 0.5
    assert result.versions.keys() >= {"ijepa", "torch"}
    assert result.weights == {"trained": weights.name}
    assert lines
    assert len(set(result.weights_sha256.values())) == 3
    assert all(len(digest) == 64 for digest in result.weights_sha256.values())
    assert "commit" in result.to_json()
    assert result.devices and result.cpu["name"]


def test_several_weights_and_no_baselines(weights: Path, scenes: Path, small, tmp_path: Path) -> None:
    named = {"a": str(weights), "b": str(weights)}
    result, _ = evaluate("knn", named, *sets(scenes), protocol=small["knn"], output=tmp_path, baselines=False)
    first, second = result.rows
    assert (first.encoder, second.encoder) == ("a", "b")
    assert first.model_copy(update={"encoder": "b"}) == second


def test_evaluate_refuses_an_output_folder_before_anything_is_computed(
    weights: Path, scenes: Path, small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("it began to compute")

    monkeypatch.setattr("ijepa.evaluation.features.extract.decode", never)
    (tmp_path / "file").write_text("in the way")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError) as err:
            evaluate("knn", str(weights), *sets(scenes), protocol=small["knn"], output=output)
        assert err.value.where == "--output"
    monkeypatch.setattr("os.access", lambda *args: False)
    with pytest.raises(UserError) as err:
        evaluate("knn", str(weights), *sets(scenes), protocol=small["knn"], output=tmp_path / "new")
    assert err.value.where == "--output"
    assert not (tmp_path / "new").exists()


def test_evaluate_writes_nothing_if_data_is_refused(weights: Path, scenes: Path, small, tmp_path: Path) -> None:
    train, _ = sets(scenes)
    with pytest.raises(UserError, match="train set"):
        evaluate("knn", str(weights), train, train, protocol=small["knn"], output=tmp_path / "new")
    (tmp_path / "copy").mkdir()
    for number, shard in enumerate([next(scenes.glob("train-*.tar")), next(scenes.glob("val-*.tar"))]):
        (tmp_path / "copy" / f"{number}.tar").symlink_to(shard)
    with pytest.raises(UserError, match="in the train set"):
        evaluate("knn", str(weights), train, str(tmp_path / "copy"), protocol=small["knn"], output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_a_run_error(
    weights: Path, scenes: Path, small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if target.suffix == ".json":
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunError, match=r"knn-small\.json.*No space") as caught:
        evaluate("knn", str(weights), *sets(scenes), protocol=small["knn"], output=tmp_path / "new")
    assert caught.value.exit_code == 1


def test_level_0_ignores_the_train_set(weights: Path, scenes: Path, tmp_path: Path) -> None:
    """If a path is given, it is not opened."""
    rule = tmp_path / "clusters.yaml"
    rule.write_text("base: demo-kmeans\nname: clusters\nimage_size: 48\ntest_images: 6\n")
    settings = {"protocol": str(rule), "output": tmp_path, "baselines": False}
    results = [
        evaluate("segmentation", str(weights), train, sets(scenes)[1], **settings)[0] for train in (None, "nowhere")
    ]
    assert results[0] == results[1].model_copy(update={"seconds": results[0].seconds})
    assert results[0].to_json()["data"]["train"] == {"n": 0}
    for kind in ("knn", "segmentation"):
        with pytest.raises(UserError) as err:
            evaluate(kind, str(weights), None, sets(scenes)[1], output=tmp_path)
        assert err.value.where == "--train"


def test_result_has_lists_and_label_maps(weights: Path, small, tmp_path: Path) -> None:
    for split, first in (("train", 0), ("val", 100)):
        write_pairs(tmp_path / "set" / split, [block_mask(first + i) for i in range(14)])
    (tmp_path / "list.txt").write_text("".join(f"{i:03d}\n" for i in range(12)))
    (tmp_path / "map.yaml").write_text("name: two\nclasses: {low: [0, 1], high: 2-3}\n")
    options = {"protocol": small["segmentation"], "output": tmp_path / "new", "baselines": False}
    lists = {"train_list": str(tmp_path / "list.txt"), "labels": str(tmp_path / "map.yaml")}
    result, _ = evaluate("segmentation", str(weights), *[str(tmp_path / "set")] * 2, **options, **lists)
    assert result.data.classes == ("low", "high")
    assert result.data.labels == {"train": "two", "test": "two"}
    data = result.to_json()["data"]
    assert data["train"] | {"fingerprint": ""} == {
        "n": 12,
        "fingerprint": "",
        "path": str(tmp_path / "set"),
        "list": str(tmp_path / "list.txt"),
    }
    assert "list" not in data["test"]
    assert result.protocol["labels"] == str(tmp_path / "map.yaml")
    with pytest.raises(UserError, match="tow"):
        evaluate("segmentation", str(weights), *[str(tmp_path / "set")] * 2, **options, labels="tow")


def test_saved_head_has_the_accuracy_of_the_row(weights: Path, scenes: Path, tmp_path: Path) -> None:
    file, protocol = tmp_path / "head.safetensors", tmp_path / "last.yaml"
    protocol.write_text("base: demo\nname: last\nepochs: 3\nblocks: [1]\n")
    result, _ = evaluate("linear", str(weights), *sets(scenes), protocol=str(protocol), output=tmp_path, save_head=file)
    head, encoder = Head.read(file, Recipe.load(weights / "recipe.yaml").model), load_encoder(weights)
    source = open_dataset(f"{scenes}/val-*.tar")
    view = center_view((48, 48), 1.0)
    pixels = torch.stack([view(decode(source.image(index)), 0) for index in range(len(source))])
    right = (encoder(pixels).mean(1) @ head.weight.T + head.bias).argmax(1).numpy() == source.labels
    assert right.mean() == pytest.approx(result.rows[0]["top1"], abs=1 / len(source))  # features rounded to float16
    assert head.classes == tuple(source.classes or map(str, range(len(head.bias))))
    export_weights(weights, tmp_path / "hf", "transformers", head=file)
    with pytest.raises(UserError, match="exists"):
        evaluate("linear", str(weights), *sets(scenes), protocol=str(protocol), output=tmp_path, save_head=file)
    with pytest.raises(UserError, match="linear head"):
        evaluate(
            "linear", str(weights), *sets(scenes), protocol="attentive", output=tmp_path, save_head=tmp_path / "other"
        )
