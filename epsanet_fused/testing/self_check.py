"""A quick check of every backend that can run here, against the float64 oracle."""

from __future__ import annotations

from typing import NamedTuple

import torch

from epsanet_fused.backends.registry import get_backend, list_backends, use_backend
from epsanet_fused.ops.psa_tail import psa_tail
from epsanet_fused.testing.accuracy import bound, evaluate, max_error, plain_tail


class BackendCheck(NamedTuple):
    """The result for one backend on one device.

    error_ratio: the largest error divided by the largest accurate one; None after an exception.
    message: the ratio or the exception in words.
    """

    backend: str
    device: str
    error_ratio: float | None
    message: str

    @property
    def passed(self) -> bool:
        """True if the backend ran and its errors are within the bound."""
        return self.error_ratio is not None and self.error_ratio <= 1.0


def self_check(devices: list[str]) -> list[BackendCheck]:
    """BackendCheck "auto" and each backend on each device that it can use.

    The checks run forward and backward in float32.
    """
    return [
        _check(name, device)
        for name in ("auto", *list_backends())
        for device in devices
        if name == "auto" or get_backend(name).unavailable_reason(torch.device(device).type) is None
    ]


def _check(name: str, device: str) -> BackendCheck:
    g = torch.Generator().manual_seed(0)
    branches = [torch.randn(2, 32, 14, 14, generator=g).to(device) for _ in range(4)]
    shapes = ((2, 32, 1, 1), (2,), (32, 2, 1, 1), (32,))
    fc = [torch.randn(s, generator=g).to(device) for s in shapes]
    grad = torch.randn(2, 128, 14, 14, generator=g).to(device)
    oracle = evaluate(plain_tail, branches, fc, grad, torch.float64)
    plain = evaluate(plain_tail, branches, fc, grad)
    try:
        with use_backend(name):
            results = evaluate(psa_tail, branches, fc, grad)
    except Exception as error:  # the check reports any fault of this machine
        return BackendCheck(name, device, None, f"{type(error).__name__}: {error}")
    size = max(t.abs().max().item() for t in oracle)
    ratio = max(
        max_error(r, o) / bound(p, o, torch.float32, size)
        for r, o, p in zip(results, oracle, plain, strict=True)
    )
    return BackendCheck(name, device, ratio, f"largest error is {ratio:.0%} of the accepted one")
