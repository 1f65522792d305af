"""The compiled library: C++ kernels for CPUs and CUDA C++ kernels, found and loaded when needed.

On a CPU each sample is read once from memory: summed, gated and written while it is in the cache,
with AVX-512, AVX2 or the compiler's baseline, whichever is the widest that this CPU has
(EPSANET_FUSED_CPU_CAPABILITY names a smaller one). On CUDA a sample is held on chip where it fits,
else it is read twice.

The library registers kernels for ``psa_tail_native`` and its backward, on a CPU also for
``psa_tail_norm_native`` and its backward; what those lack is autograd, which only ``psa_tail`` and
``psa_tail_norm`` have.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PATH = Path(__file__).resolve().parents[1] / "_C.abi3.so"
# For a backend's name, the device it runs on and the number of its path in csrc/cuda/cuda.h.
ROOMS = {
    "cpu": ("cpu", 0),
    "cuda": ("cuda", 0),
    "cuda:one_pass": ("cuda", 1),
    "cuda:two_pass": ("cuda", 2),
}


class Library(NamedTuple):
    """What the library holds, or why there is none."""

    problem: str | None
    cpu_capability: str | None  # the instruction set in use, None if the environment's is unknown
    cuda_archs: str  # "" if it was built without CUDA
    build_note: str  # why there is no more in it, or ""


@functools.cache
def library() -> Library:
    """Load the library, once. Without one, or with one that fails to load, the package works."""
    if not PATH.exists():
        why = "this is a pure-Python package; reinstall with EPSANET_FUSED_BUILD=cpu to see why"
        return Library(why, None, "", "")
    try:
        loaded = ctypes.CDLL(str(PATH))  # registers its kernels with torch
    except OSError as error:
        return Library(f"the compiled library doesn't load: {error}", None, "", "")

    def text(name: str) -> str | None:
        function = getattr(loaded, f"epsanet_fused_{name}")
        function.restype = ctypes.c_char_p
        value = function()
        return None if value is None else value.decode()

    return Library(None, text("cpu_capability"), text("cuda_archs") or "", text("build_note") or "")


class Room:
    """A backend, as backends/__init__.py describes one."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.device_type, self.native_path = ROOMS[name]

    def unavailable(self, device_type: str) -> str | None:
        found = library()
        if found.problem is not None:
            return found.problem
        if self.device_type == "cpu":
            if found.cpu_capability is None:
                wanted = os.environ.get("EPSANET_FUSED_CPU_CAPABILITY")
                return f"EPSANET_FUSED_CPU_CAPABILITY={wanted!r} is nothing that this CPU has"
        elif not found.cuda_archs:
            return f"the compiled library was built without CUDA: {found.build_note}"
        elif not torch.cuda.is_available():
            return "torch sees no CUDA device"
        if device_type != self.device_type:
            return f"it runs on {self.device_type} tensors, not on {device_type}"
        return None

    def forward(
        self,
        branches: Sequence[Tensor],
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.epsanet_fused.psa_tail_native(
            branches, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, relu,
            self.native_path,
        )  # fmt: skip

    def backward(
        self,
        grad: Tensor,
        branches: Sequence[Tensor],
        squeeze: Tensor,
        attention: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        branch_grads: bool,
        fc_grads: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        return torch.ops.epsanet_fused.psa_tail_native_backward(
            grad, branches, squeeze, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
            branch_grads, fc_grads, self.native_path,
        )  # fmt: skip


class CpuRoom(Room):
    """The CPU kernels, which psa_tail_norm has too."""

    def norm_forward(
        self, branches: Sequence[Tensor], *fc_and_norm: Tensor | float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.epsanet_fused.psa_tail_norm_native(branches, *fc_and_norm)

    def norm_backward(
        self, grad: Tensor, branches: Sequence[Tensor], *rest: Tensor | float | bool | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return torch.ops.epsanet_fused.psa_tail_norm_native_backward(grad, branches, *rest)


def make_room(name: str) -> Room:
    return (CpuRoom if name == "cpu" else Room)(name)
