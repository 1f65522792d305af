"""Choose the backend that runs an operator, and report which backends can run on this machine."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from epsanet_fused.backends import defaults, reference, triton
from epsanet_fused.backends.compiled import CompiledBackend, CompiledCpuBackend
from epsanet_fused.backends.interface import Backend

# A new backend is one more line. A name with a colon is a backend that takes one of its paths only,
# for benchmarks.
_BACKENDS: dict[str, Backend] = {
    "reference": reference,
    "cpu": CompiledCpuBackend("cpu", "cpu"),
    "triton": triton,
    "cuda": CompiledBackend("cuda", "cuda"),
    "cuda:one_pass": CompiledBackend("cuda:one_pass", "cuda", path=1),
    "cuda:two_pass": CompiledBackend("cuda:two_pass", "cuda", path=2),
}
NAMES = tuple(name for name in _BACKENDS if ":" not in name)
PATHS = tuple(name for name in _BACKENDS if ":" in name)
_CHOICES = ("auto", *_BACKENDS)

# One choice for the whole process, as with torch.backends: torch.compile can guard on a global, but
# can't trace a ContextVar.
_choice = os.environ.get("EPSANET_FUSED_BACKEND", "auto")


class BackendStatus(NamedTuple):
    """Availability of a backend on this machine; the reason is "" if it can run."""

    available: bool
    reason: str


def list_backends() -> dict[str, BackendStatus]:
    """Return which backends can run on this machine, and for the others the reason.

    Returns:
        For each backend's name a ``BackendStatus(available, reason)``. A backend is available if it
        can run on the CPU or on the accelerator; its reason is "" then.
    """
    found = {}
    for name in NAMES:
        reasons = [get_backend(name).unavailable_reason(device) for device in _device_types()]
        available = None in reasons
        found[name] = BackendStatus(available, "" if available else str(reasons[-1]))
    return found


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every ``psa_tail`` inside the ``with`` block, and its backward, by this backend.

    The choice holds for the process, not for the thread: don't open such blocks in several threads
    at a time. The environment variable EPSANET_FUSED_BACKEND sets it from outside.

    Args:
        name: "auto" takes the fastest backend that can run where the tensors are. "reference" runs
            plain PyTorch in place of the operator, which autograd differentiates to any order and
            torch.func transforms. Any other backend raises an error where it can't run.

    Raises:
        ValueError: if there is no such backend.
    """
    global _choice
    _check_name(name, "use_backend: name")
    before, _choice = _choice, name
    try:
        yield
    finally:
        _choice = before


def current_backend() -> str:
    """Return the name that the user asked for: "auto" by default.

    It is "reference" while TorchScript or ONNX traces, as the result must run without this package.

    Raises:
        ValueError: if the environment variable EPSANET_FUSED_BACKEND names no backend.
    """
    if _is_exporting():
        return "reference"
    _check_name(_choice, "the environment variable EPSANET_FUSED_BACKEND")
    return _choice


def _is_exporting() -> bool:
    """Tell whether a TorchScript trace or an ONNX file is being made."""
    if torch.jit.is_tracing():
        return True
    return "torch.onnx._internal.exporter" in sys.modules and torch.onnx.is_in_onnx_export()


# A constant to torch.compile, which can't trace it. torch.compiler.assume_constant_result sets the
# same mark, but imports the whole compiler.
_is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def get_backend(name: str) -> Backend:
    """Return the backend of this name, be it available or not."""
    return _BACKENDS[name]


def resolve(name: str, device_type: str, branches: Sequence[Tensor] = ()) -> Backend:
    """Return the backend that runs on such a device when the user asks for ``name``.

    Args:
        name: "auto" or a backend's name.
        device_type: "cpu", "cuda", ...
        branches: with them, "auto" takes the backend that was measured to be the fastest for them.

    Raises:
        RuntimeError: if the backend asked for can't run on such a device.
    """
    if name != "auto":
        backend = _BACKENDS[name]
        if (reason := backend.unavailable_reason(device_type)) is not None:
            raise RuntimeError(f"psa_tail: the backend {name!r} can't run here: {reason}")
        return backend
    if device_type == "cuda" and branches and defaults.CUDA_TABLE:
        fastest = defaults.look_up(defaults.describe(branches), defaults.CUDA_TABLE)
        if fastest is not None and _BACKENDS[fastest].unavailable_reason(device_type) is None:
            return _BACKENDS[fastest]
    return _first_available(device_type, defaults.PREFERRED.get(device_type, ("reference",)))


@functools.cache
def _first_available(device_type: str, names: tuple[str, ...]) -> Backend:
    for name in names:
        if (reason := _BACKENDS[name].unavailable_reason(device_type)) is None:
            return _BACKENDS[name]
        # The cache limits this to one warning: a slow fallback must not go unnoticed.
        warnings.warn(
            f"epsanet_fused: the backend {name!r} can't run on {device_type} tensors ({reason}); "
            f"falling back to {names[-1]!r}, which is slower",
            RuntimeWarning,
            stacklevel=2,
        )
    raise AssertionError("unreachable: the reference backend runs everywhere")


def _check_name(name: str, where: str) -> None:
    if name not in _CHOICES:
        known = ", ".join(repr(n) for n in ("auto", *NAMES))
        raise ValueError(f"{where} must be one of {known}, got {name!r}")


def _device_types() -> list[str]:
    """Return this machine's types of device, the accelerator last: its reasons say the most."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]
