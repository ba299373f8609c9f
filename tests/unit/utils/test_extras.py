import pytest

from ijepa.utils.errors import UserError
from ijepa.utils.extras import require_extra


def test_require_extra_names_the_extra_of_a_missing_module() -> None:
    require_extra("numpy", "report", "ijepa report")
    with pytest.raises(UserError) as err:
        require_extra("no_such_module", "report", "ijepa report")
    assert err.value.where == "ijepa report"
    assert "no_such_module" in err.value.problem and "[report]" in err.value.hint
