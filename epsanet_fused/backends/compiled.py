"""The compiled library: C++ kernels for CPUs and CUDA C++ kernels for NVIDIA GPUs.

On a CPU each sample is read once from memory: it is summed, gated and written while it is in the
cache. The kernels use AVX-512, AVX2 or the compiler's baseline, whichever is the widest that this
CPU has; EPSANET_FUSED_CPU_CAPABILITY names a smaller one. On CUDA a sample is held on chip where it
fits, else it is read twice.

The library registers its kernels for operators of its own, whose schemas and fake kernels are in
this file: ``psa_tail_native``, ``psa_tail_inference`` (the output alone), ``psa_tail_norm_native``
and the backwards, ``..._native_backward``. They choose no backend and have no autograd: that is for
``psa_tail`` and ``psa_tail_norm``.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epsanet_fused.backends.interface import (
    DTYPES,
    NORM_ARGS,
    SAVED_ARGS,
    SE_ARGS,
    STATS_ARGS,
    NormParams,
    NormStats,
    SEWeights,
    empty_backward,
    empty_forward,
    empty_norm_backward,
    empty_norm_forward,
)

LIBRARY_FILE = Path(__file__).parents[1] / "_C.abi3.so"

_TAIL = f"Tensor[] branches, {SE_ARGS}, Tensor? scale, Tensor? shift, bool relu, int path"
_LIBRARY = torch.library.Library("epsanet_fused", "FRAGMENT")
# The forwards also take fc weights with the 1 x 1 of a convolution. ``path`` is the number of a
# psa::cuda::Path in csrc/cuda/cuda.h.
_LIBRARY.define(f"psa_tail_native({_TAIL}) -> (Tensor out, {SAVED_ARGS})")
_LIBRARY.define(f"psa_tail_inference({_TAIL}) -> Tensor")
_LIBRARY.define(
    f"psa_tail_native_backward(Tensor grad, Tensor[] branches, {SAVED_ARGS}, {SE_ARGS}, "
    "bool branch_grads, bool fc_grads, int path) -> (Tensor[] grad_branches, Tensor[] grad_fc)"
)
_LIBRARY.define(
    f"psa_tail_norm_native(Tensor[] branches, {SE_ARGS}, {NORM_ARGS}) -> (Tensor out, {STATS_ARGS})"
)
_LIBRARY.define(
    f"psa_tail_norm_native_backward(Tensor grad, Tensor[] branches, {STATS_ARGS}, {SE_ARGS}, "
    f"{NORM_ARGS}, bool branch_grads, bool fc_grads, bool norm_grads) "
    "-> (Tensor[] grad_branches, Tensor[] grad_fc, Tensor[] grad_norm)"
)
_forward = torch.ops.epsanet_fused.psa_tail_native.default
_inference = torch.ops.epsanet_fused.psa_tail_inference.default
_backward = torch.ops.epsanet_fused.psa_tail_native_backward.default
_norm_forward = torch.ops.epsanet_fused.psa_tail_norm_native.default
_norm_backward = torch.ops.epsanet_fused.psa_tail_norm_native_backward.default


class LibraryInfo(NamedTuple):
    """Contents of the compiled library; ``unavailable_reason`` says why there is none."""

    unavailable_reason: str | None
    cpu_capability: str | None  # the instruction set in use, None if the environment's is unknown
    cuda_archs: str  # "" if it was built without CUDA
    build_note: str  # why it was built without CUDA, or ""


@functools.cache
def load_library() -> LibraryInfo:
    """Load the library, once. Without it, or if it fails to load, the rest of the package works."""
    if not LIBRARY_FILE.exists():
        why = "this is a pure-Python package; reinstall with EPSANET_FUSED_BUILD=cpu to see why"
        return LibraryInfo(why, None, "", "")
    try:
        loaded = ctypes.CDLL(str(LIBRARY_FILE))  # registers its kernels with torch
    except OSError as error:
        return LibraryInfo(f"the compiled library doesn't load: {error}", None, "", "")

    def text(name: str) -> str | None:
        function = getattr(loaded, f"epsanet_fused_{name}")
        function.restype = ctypes.c_char_p
        value: bytes | None = function()
        return None if value is None else value.decode()

    return LibraryInfo(
        None, text("cpu_capability"), text("cuda_archs") or "", text("build_note") or ""
    )


class CompiledBackend:
    """psa_tail by the library's kernels for one type of device.

    Args:
        name: of the backend.
        device_type: "cpu" or "cuda".
        path: of the CUDA kernels; 0 chooses automatically.
    """

    def __init__(self, name: str, device_type: str, path: int = 0) -> None:
        self.name = name
        self._device_type, self._path = device_type, path

    def unavailable_reason(self, device_type: str) -> str | None:
        """Return why the library can't run on such a device here, or None if it can."""
        found = load_library()
        if found.unavailable_reason is not None:
            return found.unavailable_reason
        if self._device_type == "cpu":
            if found.cpu_capability is None:
                wanted = os.environ.get("EPSANET_FUSED_CPU_CAPABILITY")
                return (
                    f"EPSANET_FUSED_CPU_CAPABILITY={wanted!r} names no instruction set of this CPU"
                )
        elif not found.cuda_archs:
            return f"the compiled library was built without CUDA: {found.build_note}"
        elif not torch.cuda.is_available():
            return "torch sees no CUDA device"
        if device_type != self._device_type:
            return f"it runs on {self._device_type} tensors, not on {device_type}"
        return None

    def forward(
        self,
        branches: Sequence[Tensor],
        fc: SEWeights,
        scale: Tensor | None,
        shift: Tensor | None,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run ``psa_tail_native``."""
        return _forward(branches, *fc, scale, shift, relu, self._path)

    def inference(
        self,
        branches: Sequence[Tensor],
        fc: tuple[Tensor, Tensor, Tensor, Tensor],
        scale: Tensor | None,
        shift: Tensor | None,
        relu: bool,
    ) -> Tensor:
        """Run ``psa_tail_inference``."""
        return _inference(branches, *fc, scale, shift, relu, self._path)

    def backward(
        self,
        grad: Tensor,
        branches: Sequence[Tensor],
        squeeze: Tensor,
        attention: Tensor,
        fc: SEWeights,
        branch_grads: bool,
        fc_grads: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run ``psa_tail_native_backward``."""
        saved = (squeeze, attention)
        return _backward(grad, branches, *saved, *fc, branch_grads, fc_grads, self._path)


class CompiledCpuBackend(CompiledBackend):
    """The CPU kernels, which have psa_tail_norm too."""

    def norm_forward(
        self, branches: Sequence[Tensor], fc: SEWeights, norm: NormParams
    ) -> tuple[Tensor, NormStats]:
        """Run ``psa_tail_norm_native``."""
        out, *stats = _norm_forward(branches, *fc, *norm)
        return out, NormStats(*stats)

    def norm_backward(
        self,
        grad: Tensor,
        branches: Sequence[Tensor],
        stats: NormStats,
        fc: SEWeights,
        norm: NormParams,
        branch_grads: bool,
        fc_grads: bool,
        norm_grads: bool,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Run ``psa_tail_norm_native_backward``."""
        asked = (branch_grads, fc_grads, norm_grads)
        return _norm_backward(grad, branches, *stats, *fc, *norm, *asked)


def _check(branches: Sequence[Tensor], fc: SEWeights, *vectors: Tensor | None) -> None:
    """Raise ValueError for what the library's kernels refuse: the fake kernels must do so, too."""
    if len(branches) < 2 or branches[0].dim() != 4 or fc.fc1_weight.dim() < 2:
        raise ValueError("psa_tail: branches must be two or more (B, C, H, W), fc1_weight (R, C)")
    x, S, R = branches[0], len(branches), fc.hidden
    C = x.shape[1]
    first = (S,) if fc.per_branch else ()
    given = [v for v in vectors if v is not None]
    matrices = [w[..., 0, 0] if w.shape[2:] == (1, 1) else w for w in fc[::2]]
    shapes = [
        *((b.shape, x.shape) for b in branches),
        *zip((w.shape for w in matrices), [(*first, R, C), (*first, C, R)], strict=True),
        *zip((b.shape for b in fc[1::2]), [(*first, R), (*first, C)], strict=True),
        *((v.shape, (S * C,)) for v in given),
    ]
    if min(R, *x.shape[1:]) < 1 or any(shape != expected for shape, expected in shapes):
        raise ValueError("psa_tail: an argument has another shape than it must have")
    if any(b.dtype != x.dtype for b in branches):
        raise ValueError("psa_tail: branches of two dtypes")
    for t in (*branches, *fc, *given):
        if t.device != x.device or t.dtype not in DTYPES or t.layout != torch.strided:
            raise ValueError("psa_tail: an argument has another device, dtype or layout")


@torch.library.register_fake("epsanet_fused::psa_tail_native", lib=_LIBRARY)
def _fake_forward(branches: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fc, scale, shift, _relu, _path = rest
    _check(branches, SEWeights(*fc), scale, shift)
    return empty_forward(branches)


@torch.library.register_fake("epsanet_fused::psa_tail_inference", lib=_LIBRARY)
def _fake_inference(branches: list[Tensor], *rest: Any) -> Tensor:
    return _fake_forward(branches, *rest)[0]


@torch.library.register_fake("epsanet_fused::psa_tail_native_backward", lib=_LIBRARY)
def _fake_backward(
    _grad: Tensor, branches: list[Tensor], _squeeze: Tensor, _attention: Tensor, *rest: Any
) -> tuple[list[Tensor], list[Tensor]]:
    *fc, branch_grads, fc_grads, _path = rest
    return empty_backward(branches, SEWeights(*fc), branch_grads, fc_grads)


@torch.library.register_fake("epsanet_fused::psa_tail_norm_native", lib=_LIBRARY)
def _fake_norm_forward(branches: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    *fc, gamma, beta, _eps = rest
    _check(branches, SEWeights(*fc), gamma, beta)
    out, stats = empty_norm_forward(branches)
    return out, *stats


@torch.library.register_fake("epsanet_fused::psa_tail_norm_native_backward", lib=_LIBRARY)
def _fake_norm_backward(
    _grad: Tensor, branches: list[Tensor], *rest: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    *fc, gamma, beta, eps, branch_grads, fc_grads, norm_grads = rest[5:]
    norm = NormParams(gamma, beta, eps)
    return empty_norm_backward(branches, SEWeights(*fc), norm, branch_grads, fc_grads, norm_grads)
