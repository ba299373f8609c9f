import shutil
from pathlib import Path

import pytest

from ijepa.report.page import write_report
from tests.helpers.html import Page

RIGHT, WRONG = ", same class as the query", ", not the class of the query"


@pytest.fixture(scope="module")
def page(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(Path(shutil.copytree(whole_run, tmp_path_factory.mktemp("page") / "run"))).read_text())


def test_neighbors_are_marked_by_color_sign_and_text(page: Page) -> None:
    classes = [attributes.get("class") for attributes in page.of("span")]
    right, wrong = (sum(alt.endswith(end) for alt in page.alts) for end in (RIGHT, WRONG))
    assert (right, wrong) == (classes.count("hit right"), classes.count("hit wrong"))
    assert right + wrong == 2 * 6 * 6
    assert page.text("b").count("✓") == right and page.text("b").count("✗") == wrong


def test_neighbors_are_right_if_they_have_the_class_of_the_query(page: Page) -> None:
    asked = ""
    for alt in page.alts:
        if alt.startswith("Query: "):
            asked = alt.rpartition(", ")[2]
        elif alt.startswith("Neighbor by"):
            assert alt.endswith(RIGHT) == (alt.rsplit(", ", 2)[1] == asked)
