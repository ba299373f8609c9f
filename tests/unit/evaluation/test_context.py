from ijepa.evaluation.context import DEFAULT_CONTEXT, EvaluationContext


def test_report_calls_progress_if_there_is_one():
    lines: list[str] = []
    EvaluationContext(progress=lines.append).report("12 of 30 images")
    DEFAULT_CONTEXT.report("nothing is shown")
    assert lines == ["12 of 30 images"]
