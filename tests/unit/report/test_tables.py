import re
from dataclasses import replace
from pathlib import Path

from ijepa.report.markup import Section
from ijepa.report.run_data import Record, Result, read_record
from ijepa.report.tables import evaluation_section, glance_section
from tests.unit.report.conftest import results


def of_every_kind(run: Path, scenes: Path) -> Record:
    kinds = [{**values, "chance": 0.1357} for values in results(scenes).values()]
    row = {"encoder": "trained", "jf": 0.5, "ci": [0.4, 0.6], "j": 0.5, "f": 0.5, "objects": 9}
    data = {"test": {"n": 30, "path": "videos"}}
    kinds.append({"kind": "propagation", "level": 1, "chance": 0.2468, "data": data, "rows": [row]})
    kinds[2]["rows"] = [{**row, "ci": [0.1, 0.2]} for row in kinds[2]["rows"]]
    return replace(read_record(run), results=tuple(Result(run / "none", values) for values in kinds))


def told(part: object) -> str:
    assert isinstance(part, Section)
    return " ".join(re.sub(r"<[^>]*>", " ", part.body).replace("&amp;", "&").split())


def test_chance_is_named_by_kind(whole_run: Path, scenes: Path) -> None:
    record = of_every_kind(whole_run, scenes)
    words = told(glance_section(record))
    assert (
        "chance an answer that sees nothing 13.6 the commonest class 13.6 the commonest class "
        "13.6 one class everywhere 24.7 first mask left in place"
    ) in words
    words = told(evaluation_section(record))
    assert words.count("Chance, the share of the commonest class: 13.6.") == 2
    assert words.count("Chance, the mIoU of giving every pixel the commonest class: 13.6.") == 1
    assert words.count("Chance, J&F of the first mask left in place: 24.7.") == 1


def test_intervals_say_what_they_draw(whole_run: Path, scenes: Path) -> None:
    words = told(evaluation_section(of_every_kind(whole_run, scenes)))
    assert words.count("Below top-1 its 95 % interval over test images.") == 2
    assert words.count("Below mIoU its 95 % interval over test images.") == 1
    assert words.count("Below J&F its 95 % interval over test videos.") == 1
    assert words.count("Data: test 30 videos (videos).") == 1
