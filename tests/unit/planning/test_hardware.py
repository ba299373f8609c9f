"""The tables: complete, sourced, and refusing names that they do not have."""

import pytest

from ijepa.planning.hardware import find_country, find_gpu, gpus, grids
from ijepa.utils.errors import UserError


def test_every_gpu_has_figures_and_a_source():
    assert set(gpus()) == {"a100", "h100", "h200", "b200"}
    for gpu in gpus().values():
        assert "NVIDIA" in gpu.source and "data sheet" in gpu.source
        assert gpu.server_w > gpu.tdp_w
        # Float8 is twice bfloat16 on these, both dense; the sparse figures on data sheets are twice as high again.
        assert gpu.fp8_tflops is None or gpu.fp8_tflops == pytest.approx(2 * gpu.bf16_tflops, rel=1e-3)
    assert gpus()["h100"].bf16_tflops == 989.4 and gpus()["a100"].fp8_tflops is None


def test_grids_are_plausible():
    assert grids().source and grids().pue_source and 1 < grids().pue < 2
    for grid in grids().countries.values():
        assert 10 < grid.grams < 1000 and 2020 <= grid.year <= 2030


def test_names_are_found_in_any_case():
    assert find_gpu("H100") is gpus()["h100"]
    assert find_country("united  states")[0] == "United States"


@pytest.mark.parametrize(
    ("find", "name", "words"),
    [
        (find_gpu, "h10", "did you mean h100?"),
        (find_gpu, "v100x-pcie", "known: a100"),
        (find_country, "germny", "did you mean Germany?"),
        (find_country, "Atlantis", "known: World, Australia"),
    ],
)
def test_unknown_names_are_refused(find, name, words):
    with pytest.raises(UserError, match=name) as refused:
        find(name)
    assert words in str(refused.value)
