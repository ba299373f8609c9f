from pathlib import Path

from ijepa.report.run_data import read_run_data
from ijepa.report.run_images import RunImages
from ijepa.report.sections.features import feature_section


def test_feature_section_colors_the_features_of_both_encoders(whole_run: Path) -> None:
    run = read_run_data(whole_run)
    found = feature_section(run, RunImages(run, None))
    rows = dict(found.images.rows)
    assert list(rows) == ["image", "trained", "random"] and {len(row) for row in rows.values()} == {8}
    assert found.fitted == 20, "all test images, because there are fewer than 64"
    assert len({each.uri for row in rows.values() for each in row}) == 24
    for image, colors in zip(rows["image"], rows["trained"], strict=True):
        assert colors.alt == f"trained encoder's patch features of {image.alt} as colors"


def test_feature_section_is_the_same_for_the_same_run(whole_run: Path) -> None:
    run = read_run_data(whole_run)
    first, second = (feature_section(run, RunImages(run, None)).images.rows for _ in range(2))
    assert first == second
