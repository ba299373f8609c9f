"""Every module has its file of unit tests: `src/ijepa/PACKAGE/MODULE.py` has `tests/unit/PACKAGE/test_MODULE.py`."""

from pathlib import Path

from tests.helpers.paths import ROOT

SOURCE, UNIT = ROOT / "src" / "ijepa", ROOT / "tests" / "unit"
WITHOUT_TESTS = {
    "evaluation/video/protocol.py": "it has settings only; test_protocols reads all presets",
}
"""Modules that have no file of unit tests, each with the reason."""
OTHER_NAMES = {"__main__.py": "test_main.py"}
WITHOUT_MODULE = {
    "evaluation/test_published_protocols.py": "it compares all presets with the publications that they follow",
}
"""Files of unit tests that test no module of the same name, each with the reason."""


def place_of(module: Path) -> Path:
    """Return where the tests of a module belong."""
    relative = module.relative_to(SOURCE)
    return UNIT / relative.with_name(OTHER_NAMES.get(str(relative), f"test_{relative.name}"))


def modules() -> set[Path]:
    return {path for path in SOURCE.rglob("*.py") if path.name != "__init__.py"}


def test_every_module_has_a_file_of_tests():
    missing = {str(module.relative_to(SOURCE)) for module in modules() if not place_of(module).is_file()}
    assert missing == WITHOUT_TESTS.keys()


def test_every_file_of_unit_tests_has_its_module():
    extra = set(UNIT.rglob("test_*.py")) - {place_of(module) for module in modules()}
    assert {str(file.relative_to(UNIT)) for file in extra} == WITHOUT_MODULE.keys()
