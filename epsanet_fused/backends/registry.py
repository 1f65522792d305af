"""The ways to run the operator: the table of them, what can run here, and which one is chosen.

A backend is a module or an object with three functions (``reference`` is the shortest example):

- ``unavailable(device_type)``: why it can't run on such a device here, or None if it can;
- ``forward(branches, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, relu)``
  -> (out, squeeze, attention);
- ``backward(grad, branches, squeeze, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
  branch_grads, fc_grads)`` -> (gradients of the branches, gradients of the four fc tensors),
  each list empty where it isn't asked for.

Arguments arrive checked, the fc weights as matrices (R, C) and (C, R). A room may be wrong about
nothing but speed: shapes, strides and dtypes of what it returns are those of ops.py's fake kernels.

A backend may also have the pair of psa_tail_norm, ``norm_forward`` and ``norm_backward``, with the
arguments and results of its operators in norm_tail.py, less the backend's name.

One that runs in the compiled library also has ``native_path``, the number that tells
``psa_tail_native`` which kernels to run.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epsanet_fused.backends import defaults

NAMES = ("reference", "cpu", "triton", "cuda")
# Parts of a backend, for measuring them against each other.
VARIANTS = ("cuda:one_pass", "cuda:two_pass")
# The rest are rooms of the compiled library.
_MODULES = {"reference": "reference", "triton": "triton"}
# For a device type, what "auto" takes: the first that can run.
_PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}

ENV = "EPSANET_FUSED_BACKEND"
# One choice for the whole process, as with torch.backends: torch.compile can guard on a global, but
# can't trace a ContextVar.
_chosen = os.environ.get(ENV, "auto")


class Backend(NamedTuple):
    """Whether a backend can run on this machine, and if not, why."""

    available: bool
    reason: str


def list_backends() -> dict[str, Backend]:
    """What can run here, and the reason for what cannot.

    Returns:
        For each backend's name a ``Backend(available, reason)``; the reason is "" if it can run.
    """
    found = {}
    for name in NAMES:
        reasons = [room(name).unavailable(device) for device in _device_types()]
        available = None in reasons
        found[name] = Backend(available, "" if available else str(reasons[-1]))
    return found


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every ``psa_tail`` inside the ``with`` block, and its backward, by this backend.

    Args:
        name: "auto" takes the fastest that can run where the tensors are. "reference" takes the
            operator out of the way altogether: plain PyTorch, which autograd differentiates to any
            order and torch.func transforms. Any other backend raises an error where it can't run.

    The choice is the process's, not the thread's: don't open such blocks in several threads at a
    time. The environment variable EPSANET_FUSED_BACKEND
    sets it from outside.

    Raises:
        ValueError: if there is no such backend.
    """
    global _chosen
    _check_name(name, "use_backend: name")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def chosen() -> str:
    """The name that the user asked for: "auto", unless told otherwise."""
    if _leaves_the_package():
        return "reference"
    _check_name(_chosen, f"the environment variable {ENV}")
    return _chosen


def _leaves_the_package() -> bool:
    """Whether a TorchScript trace or an ONNX file is being made, which are to run without it."""
    if torch.jit.is_tracing():
        return True
    return "torch.onnx._internal.exporter" in sys.modules and torch.onnx.is_in_onnx_export()


_leaves_the_package._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as with prefers_norm, below


def resolve(name: str, device_type: str, branches: Sequence[Tensor] = ()) -> Any:
    """The backend that runs on such a device when the user asks for ``name``.

    With the branches, "auto" can be the one that was measured to be the fastest for them.

    Raises:
        RuntimeError: if the one asked for can't run on such a device.
    """
    if name == "auto":
        if device_type == "cuda" and branches and defaults.CUDA_TABLE:
            name = defaults.look_up(defaults.describe(branches), defaults.CUDA_TABLE) or name
        if name == "auto" or room(name).unavailable(device_type) is not None:
            return _first_available(device_type)
    if (reason := room(name).unavailable(device_type)) is not None:
        raise RuntimeError(f"psa_tail: the backend {name!r} can't run here: {reason}")
    return room(name)


def resolve_norm(name: str, device_type: str, branches: Sequence[Tensor] = ()) -> Any:
    """The backend whose ``norm_forward`` and ``norm_backward`` run when the user asks for ``name``.

    Raises:
        RuntimeError: if the one asked for can't run on such a device, or lacks them.
    """
    found = resolve(name, device_type, branches)
    if not hasattr(found, "norm_forward"):
        if name != "auto":
            raise RuntimeError(
                f"psa_tail_norm: the backend {name!r} doesn't have it; 'auto' runs it in plain "
                f"PyTorch where no other backend has it"
            )
        # What is the fastest for the tail may lack it.
        found = _first_available(device_type)
    return found if hasattr(found, "norm_forward") else room("reference")


def prefers_norm(name: str, device_type: str) -> bool:
    """Whether a block in training is to take psa_tail_norm when the user asks for ``name``."""
    if name == "auto":
        measured = defaults.NORM_TABLE.get(device_type)
        return measured is not None and resolve(name, device_type) is room(measured)
    if name == "reference" or room(name).unavailable(device_type) is not None:
        return False
    return hasattr(room(name), "norm_forward")


# A constant to torch.compile, which can't trace it. torch.compiler.assume_constant_result sets the
# same mark, but imports the whole compiler.
prefers_norm._dynamo_marked_constant = True  # type: ignore[attr-defined]


def native_path(name: str, branches: Sequence[Tensor]) -> int | None:
    """The ``path`` with which ``psa_tail_native`` is what this choice comes to, or None."""
    return getattr(resolve(name, branches[0].device.type, branches), "native_path", None)


@functools.cache
def _first_available(device_type: str) -> Any:
    names = _PREFERRED.get(device_type, ("reference",))
    for name in names:
        if (reason := room(name).unavailable(device_type)) is None:
            return room(name)
        # Slow without a word is what users of such libraries complain of most.
        warnings.warn(
            f"epsanet_fused: the backend {name!r} can't run on {device_type} tensors ({reason}); "
            f"falling back to {names[-1]!r}, which is slower",
            RuntimeWarning,
            stacklevel=2,
        )
    raise AssertionError("unreachable: the reference backend runs everywhere")


@functools.cache
def room(name: str) -> Any:
    """The backend, imported when first asked for."""
    module = importlib.import_module(f"epsanet_fused.backends.{_MODULES.get(name, 'compiled')}")
    return module if name in _MODULES else module.make_room(name)


def _check_name(name: str, where: str) -> None:
    if name not in ("auto", *NAMES, *VARIANTS):
        known = ", ".join(repr(n) for n in ("auto", *NAMES))
        raise ValueError(f"{where} must be one of {known}, got {name!r}")


def _device_types() -> list[str]:
    """The kinds of device on this machine, the accelerator last: its reasons tell the most."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]
