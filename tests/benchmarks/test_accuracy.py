"""Test the check of results against the float64 oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from harness.accuracy import AccuracyChecker
from harness.cases import ORACLE_BATCH, Case, Source, Workload
from harness.steps import make_step
from torch import Tensor, nn

import epsanet_fused as ef

CPU = torch.device("cpu")
BATCH = 2 * ORACLE_BATCH


def test_one_wrong_gradient_among_many_is_seen():
    """With convolutions all gradients are checked as one: the smallest one must still count."""
    case = Case("module", "training", "S2", 1, "float32", "nchw")
    workload = Source(CPU, "randn").workload(case)
    checker = AccuracyChecker(workload, case)
    results = make_step(workload.fused, workload.inputs, case)()
    assert checker.check(results, workload, case).ok
    fc1_bias = next(i for i, g in enumerate(results) if g.shape == (2,))
    results[fc1_bias] = results[fc1_bias] * 1.01
    assert not checker.check(results, workload, case).ok


def test_nan_is_wrong():
    case = Case("tail", "inference", "S4", 2, "float32", "nchw")
    workload = Source(CPU, "randn").workload(case)
    with torch.no_grad():
        checker = AccuracyChecker(workload, case)
        (result,) = make_step(workload.fused, workload.inputs, case)()
    assert checker.check([result], workload, case).ok
    result[1, 2, 3, 4] = torch.nan
    assert not checker.check([result], workload, case).ok


class Recorder(nn.Module):
    """Passes its input on, and records dtype and batch. Copies of it write to the same list."""

    seen: list[tuple[torch.dtype, int]] = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x.dtype, x.shape[0]))
        return x


def small_network() -> nn.Module:
    return nn.Sequential(
        Recorder(),
        nn.Conv2d(3, 64, 3, 2, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        ef.PSAModule(64, 64),
        nn.BatchNorm2d(64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@pytest.fixture(scope="module")
def repeated(one_thread) -> tuple[Workload, Case]:
    """A small network's training at twice the batch of its oracle."""
    case = Case("network", "training", "all", BATCH, "float32", "nchw")
    source = Source(CPU, "randn", image_shape=(3, 32, 32), model=small_network)
    torch.manual_seed(0)
    return source.workload(case), case


def test_oracle_of_repeated_images_is_that_of_the_whole_batch(repeated):
    workload, case = repeated
    Recorder.seen.clear()
    checker = AccuracyChecker(workload, case)
    assert set(Recorder.seen) == {(torch.float64, ORACLE_BATCH)}
    inputs = tuple(x.double() for x in workload.inputs)
    whole = make_step(copy.deepcopy(workload.official).double(), inputs, case)()
    assert len(whole) == len(checker._expected) == 1 + len(list(workload.official.parameters()))
    for found, expected in zip(checker._expected, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_repeated_images_are_all_checked(repeated):
    workload, case = repeated
    checker = AccuracyChecker(workload, case)
    results = make_step(workload.fused, workload.inputs, case)()
    assert checker.check(results, workload, case).ok
    results[0][-1, -1] += 1e-3
    assert not checker.check(results, workload, case).ok


@pytest.mark.parametrize("batch, period", [(8, 8), (16, 16), (24, 24), (32, 16), (128, 16)])
def test_only_a_multiple_of_the_oracles_batch_repeats(batch, period):
    """Otherwise the images would not all count the same in BatchNorm's statistics."""
    assert Case("network", "training", "all", batch, "float32", "nchw").period == period
    assert Case("network", "inference", "all", batch, "float32", "nchw").period == batch
    assert Case("module", "training", "S1", batch, "float32", "nchw").period == batch
