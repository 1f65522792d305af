"""Test the check of results against the float64 oracle."""

from __future__ import annotations

import checks
import inputs
import steps
import torch


def test_one_wrong_gradient_among_many_is_seen():
    """With convolutions all gradients are checked as one: the smallest one must still count."""
    settings = inputs.Settings("module", "training", "S2", 1, "float32", "nchw")
    workload = inputs.Source("randn", torch.device("cpu")).workload(settings)
    checker = checks.AccuracyChecker(workload, settings)
    results = steps.make_step(workload.fused, workload.inputs, "training", None)()
    assert checker.check(results).ok
    fc1_bias = next(i for i, g in enumerate(results) if g.shape == (2,))
    results[fc1_bias] = results[fc1_bias] * 1.01
    assert not checker.check(results).ok
