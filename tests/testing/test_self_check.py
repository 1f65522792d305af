"""The self-check passes for right backends and fails for a wrong one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import epsanet_fused as ef
from epsanet_fused.backends.registry import get_backend
from epsanet_fused.testing.self_check import self_check


def test_report_of_this_machine() -> None:
    """``python -m epsanet_fused`` prints versions, devices, backends and a self-check."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "epsanet_fused"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in (f"epsanet_fused {ef.__version__}", torch.__version__, "devices", "backends"):
        assert text in done.stdout
    assert "reference  on cpu      ok" in done.stdout
    assert "cannot run: " in done.stdout or torch.cuda.is_available()


def test_self_check_fails_for_a_backend_with_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    right = {"auto": True, "reference": True, "cpu": True, "triton": True}
    assert {c.backend: c.passed for c in self_check(["cpu"])} == right
    triton = get_backend("triton")
    forward = triton.forward

    def slightly_wrong(*args: object) -> tuple[torch.Tensor, ...]:
        out, squeeze, attention = forward(*args)
        return out * 1.0001, squeeze, attention

    monkeypatch.setattr(triton, "forward", slightly_wrong)
    assert {c.backend: c.passed for c in self_check(["cpu"])} == right | {"triton": False}
