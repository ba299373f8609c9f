"""The tables of GPUs and grids, and names that they do not have."""

import pytest

from ijepa.planning.hardware import find_country, find_gpu, gpus, grids
from ijepa.utils.errors import UserError


def test_every_gpu_has_figures_and_a_source():
    assert set(gpus()) == {"a100", "h100", "h200", "b200"}
    for gpu in gpus().values():
        assert "NVIDIA" in gpu.source and "data sheet" in gpu.source
        assert gpu.server_w > gpu.tdp_w
        # On these GPUs dense float8 is twice dense bfloat16; data sheets print sparse figures, again twice as high.
        assert gpu.fp8_tflops is None or gpu.fp8_tflops == pytest.approx(2 * gpu.bf16_tflops, rel=1e-3)
    assert gpus()["h100"].bf16_tflops == 989.4 and gpus()["a100"].fp8_tflops is None


def test_every_country_has_a_plausible_figure():
    assert grids().source and grids().pue_source and 1 < grids().pue < 2
    for name, grid in grids().countries.items():
        assert find_country(name.lower()) == (name, grid)
        assert 10 < grid.grams < 1000 and 2020 <= grid.year <= 2030


def test_find_gpu_and_find_country_accept_any_case():
    assert find_gpu("H100") is gpus()["h100"]
    assert find_country("united  states")[0] == "United States"


@pytest.mark.parametrize(
    ("find", "name", "hint"),
    [
        (find_gpu, "h10", "did you mean h100?"),
        (find_gpu, "v100x-pcie", "known: a100"),
        (find_country, "germny", "did you mean Germany?"),
        (find_country, "Atlantis", "known: World, Australia"),
    ],
)
def test_find_gpu_and_find_country_refuse_unknown_names_with_a_hint(find, name, hint):
    with pytest.raises(UserError) as err:
        find(name)
    assert name in err.value.where and hint in err.value.hint
