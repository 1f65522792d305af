"""A step is the mean over its micro-batches, and its random draws depend on the step only."""

from __future__ import annotations

import pytest
import torch
import training
from distributed import RunError
from helpers.small_trainer import ONE_PROCESS, make_batches, make_trainer, run_steps


def test_running_statistics_move_by_the_mean_over_the_micro_batches() -> None:
    trainer = make_trainer(accumulate=3)
    run_steps(trainer, 1)
    x = torch.stack(make_batches(3))  # (3, 5, 4)
    norm = trainer.model.norm
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var(1).mean(0))


def test_random_draws_of_a_model_depend_on_seed_and_step_only() -> None:
    at_once, in_two_parts, other_seed = make_trainer(), make_trainer(), make_trainer(seed=1)
    run_steps(at_once, 4)
    run_steps(other_seed, 4)
    run_steps(in_two_parts, 2)
    torch.rand(100)
    run_steps(in_two_parts, 2, start=2)
    torch.testing.assert_close(
        in_two_parts.model.state_dict(), at_once.model.state_dict(), rtol=0, atol=0
    )
    assert not torch.equal(at_once.model.fc.weight, other_seed.model.fc.weight)


def test_means_are_over_samples() -> None:
    meter = training.AverageMeter(ONE_PROCESS, "loss")
    meter.update(3, loss=torch.tensor(6.0))
    meter.update(1, loss=torch.tensor(4.0))
    assert meter.compute_finite("loss") == 2.5
    meter.update(1, loss=torch.tensor(float("inf")))
    with pytest.raises(RunError, match="the loss became inf"):
        meter.compute_finite("loss")
