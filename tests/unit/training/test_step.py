"""One training step against the same step by hand."""

import pytest
import torch

from ijepa.distributed.process_group import World
from ijepa.model.ijepa import IJEPA
from ijepa.training.metrics import VALUES
from ijepa.training.optimizer import gradient_norm, make_optimizer
from ijepa.training.parallelize import parallelize
from ijepa.training.runtime import Resolved
from ijepa.training.step import TrainingStep
from tests.helpers.runs import batch_of, recipe

CPU = torch.device("cpu")


@pytest.fixture
def chosen(tmp_path):
    return recipe(tmp_path)


def step_of(chosen, micro: int, **calls) -> tuple[TrainingStep, IJEPA]:
    spread = parallelize(chosen, CPU, World(), autocast=False)
    calls = {"report": lambda step, doing: None, "count_replaced": lambda batch: 0, **calls}
    resolved = Resolved("cpu", False, micro, 0, 1)
    optimizer = make_optimizer(spread.model, chosen.optimizer)
    return TrainingStep(chosen, chosen.lengths(60), 60, resolved, spread, optimizer, **calls), spread.model


def test_step_equals_the_same_step_by_hand(chosen):
    batch = batch_of(chosen)
    step, model = step_of(chosen, micro=8)
    record = step(0, iter([batch]))
    found = dict(zip(VALUES, record.values.tolist(), strict=True))

    plain = IJEPA(chosen.model, chosen.seed)
    optimizer = make_optimizer(plain, chosen.optimizer)
    output = plain(batch)
    output.loss.backward()
    assert found["loss"] == pytest.approx(output.loss.item())
    assert found["grad_norm"] == pytest.approx(gradient_norm(plain, optimizer).item())
    assert (found["void"], found["replaced"]) == (0, 0)
    assert (record.step, record.epoch, record.images) == (1, pytest.approx(8 / 60), 8)
    # After the first step, the mean target of each position is that of the first batch.
    torch.testing.assert_close(model.position_mean, output.position_sums / 8)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_step_sums_the_counts_of_its_micro_batches_and_reports_what_it_does(chosen):
    batch, reported = batch_of(chosen), []
    counts = iter([2, 1])
    step, _ = step_of(
        chosen, micro=4, report=lambda *words: reported.append(words), count_replaced=lambda batch: next(counts)
    )
    record = step(5, iter([batch, batch]))
    assert dict(zip(VALUES, record.values.tolist(), strict=True))["replaced"] == 3
    assert reported == [(6, "loading data"), (6, "computing")] * 2


def test_step_with_a_non_finite_loss_is_void_and_changes_nothing(chosen):
    step, model = step_of(chosen, micro=8)
    with torch.no_grad():
        model.predictor.mask_token.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    record = step(0, iter([batch_of(chosen)]))
    assert dict(zip(VALUES, record.values.tolist(), strict=True))["void"] == 1
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
