from ijepa.bench.timing import interleaved, medians, ratio


def test_interleaved_takes_turns_and_leaves_out_the_first_round():
    calls = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3 and {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2}


def test_ratio_is_the_median_of_the_ratios_of_each_round():
    seconds = {"ours": [1.0, 2.0, 1.0], "theirs": [3.0, 4.0, 50.0]}
    assert ratio(seconds, "theirs", "ours") == 3 and medians(seconds) == {"ours": 1, "theirs": 4}
