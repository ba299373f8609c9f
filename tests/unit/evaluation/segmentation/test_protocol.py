import pytest

from ijepa.evaluation.segmentation.protocol import SegmentationProtocol
from ijepa.utils.errors import UserError

LEVELS = {"kmeans": 0, "tokencut": 0, "retrieval": 1, "hummingbird": 1, "linear": 2}


@pytest.mark.parametrize(("method", "level"), LEVELS.items())
def test_level_and_unused_sections_of_each_method(method, level):
    protocol = SegmentationProtocol(name="mine", method=method, image_size=64)
    assert protocol.level == level
    assert protocol.unused == LEVELS.keys() - {method}
    assert protocol.unused <= set(SegmentationProtocol.model_fields)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("retrieval", "neighbors", [0]),
        ("retrieval", "neighbors", []),
        ("retrieval", "held_out", 1),
        ("hummingbird", "temperature", 0),
        ("linear", "dropout", 1),
        ("tokencut", "tau", 1),
        ("kmeans", "restarts", 0),
    ],
)
def test_settings_out_of_range_are_refused(section, key, value):
    values = {"name": "mine", "method": section, "image_size": 64, section: {key: value}}
    with pytest.raises(UserError) as err:
        SegmentationProtocol.read(values, "file")
    assert err.value.where.startswith(f"file: {section}.{key}")
