import pytest
from pydantic import TypeAdapter, ValidationError

from ijepa.utils.quantities import Duration, Size


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("40 epochs", 400),
        ("1 epoch", 10),
        ("7", 7),
        (7, 7),
        ("7 steps", 7),
        ("640 images", 10),
        ("5 %", 50),
        ("5%", 50),
    ],
)
def test_duration_steps_in_every_unit(text, steps):
    duration = Duration.model_validate(text)
    assert duration.steps(images=640, global_batch=64, total=1000) == steps
    assert Duration.model_validate(str(duration)) == duration


@pytest.mark.parametrize("value", ["3 parsecs", "-1 epochs", "many", "inf", True, None])
def test_duration_refuses_other_values(value):
    with pytest.raises(ValidationError):
        Duration.model_validate(value)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (224, (224, 224)),
        ("224", (224, 224)),
        ("224x336", (224, 336)),
        ("224,336", (224, 336)),
        ("[224, 336]", (224, 336)),
        ([224], (224, 224)),
        ([224, 336], (224, 336)),
    ],
)
def test_size_in_every_notation(value, size):
    assert TypeAdapter(Size).validate_python(value) == size


@pytest.mark.parametrize("value", ["", "1x2x3", [1, 2, 3], "wide"])
def test_size_refuses_other_values(value):
    with pytest.raises(ValidationError):
        TypeAdapter(Size).validate_python(value)
