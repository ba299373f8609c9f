from pathlib import Path

from ijepa.report.run_data import read_run_data
from ijepa.report.run_images import RunImages
from ijepa.report.sections.maps import map_section


def test_map_section_has_maps_of_both_encoders_and_of_the_prediction(whole_run: Path) -> None:
    run = read_run_data(whole_run)
    found = map_section(run, RunImages(run, None))
    assert [name for name, _ in found.similarity.rows] == ["image", "trained", "random"]
    assert found.prediction is not None
    assert [(name, len(row)) for name, row in found.prediction.rows] == [("crop", 8), ("cosine", 8)]
    assert found.images == 20, "all test images, because there are fewer than 64"
    painted = {each.uri for name, row in found.similarity.rows if name != "image" for each in row}
    assert len(painted) == 16, "maps differ between images and encoders"


def test_map_section_without_a_predictor_has_no_prediction(run: Path) -> None:
    (file,) = run.rglob("predictor.safetensors")
    file.unlink()
    data = read_run_data(run)
    assert map_section(data, RunImages(data, None)).prediction is None
