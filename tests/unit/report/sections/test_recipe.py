import json
from pathlib import Path

from ijepa.report.run_data import read_run_data
from ijepa.report.sections.recipe import recipe_section


def test_recipe_section_has_the_recipe_and_nested_facts_by_dotted_name(run: Path) -> None:
    info = json.loads((run / "run.json").read_text()) | {"devices": ["a", "b"], "nested": {"deep": {"value": None}}}
    (run / "run.json").write_text(json.dumps(info))
    found = recipe_section(read_run_data(run))
    assert found.recipe == (run / "recipe.yaml").read_text()
    assert found.facts is not None and "command" not in found.facts
    assert (found.facts["devices"], found.facts["nested.deep.value"]) == ("a, b", "none")
    assert (found.facts["commit"], found.facts["versions.ijepa"]) == ("c0ffee", "0.1.0")


def test_recipe_section_without_run_json_has_no_facts(run: Path) -> None:
    (run / "run.json").unlink()
    assert recipe_section(read_run_data(run)).facts is None
