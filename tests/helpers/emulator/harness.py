"""Build the CUDA kernels' sources for a CPU and call them with CPU tensors.

Every tensor lies between margins of NaN, so that a test fails if a kernel reads or writes outside
of it. emulator.cpp lists the other errors that the emulator reports.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from epsanet_fused.backends.interface import SEWeights
from epsanet_fused.utils.memory_format import empty_grad, empty_output

REPO = Path(__file__).parents[3]
SOURCES = [
    "csrc/cuda/sums.cu",
    "csrc/cuda/recalibrate.cu",
    "csrc/cuda/one_pass.cu",
    "csrc/cuda/fc_grad.cu",
    "csrc/cuda/cuda.cpp",
    "tests/helpers/emulator/emulator.cpp",
    "tests/helpers/emulator/operator.cpp",
]
PATHS = {"automatic": 0, "one_pass": 1, "two_pass": 2}
ORDERS = {"forwards": 0, "backwards": 1, "shuffled": 2}
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_MARGIN = 64  # elements


class DeviceLimits(NamedTuple):
    """The limits of the emulated device; the default is an H100."""

    arch: int = 90
    multiprocessors: int = 132
    shared_per_block: int = 227 * 1024
    shared_per_multiprocessor: int = 228 * 1024


class Strided(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("batch", "channel", "pixel")
    ]


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("row", ctypes.c_int64),
        ("column", ctypes.c_int64),
        ("branch", ctypes.c_int64),
    ]


class SEMatrices(ctypes.Structure):
    """SEWeights of psa.h; the other structures have the same names there."""

    _fields_ = [
        ("R", ctypes.c_int64),
        ("per_branch", ctypes.c_bool),
        *((name, Matrix) for name in SEWeights._fields),
    ]


class Tail(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "S", "C", "HW")),
        ("dtype", ctypes.c_int32),
        ("branches", ctypes.POINTER(Strided)),
        ("concat", Strided),
        ("se", SEMatrices),
        ("squeeze", ctypes.c_void_p),
        ("attention", ctypes.c_void_p),
    ]


class Epilogue(ctypes.Structure):
    _fields_ = [("scale", Matrix), ("shift", Matrix), ("relu", ctypes.c_bool)]


class Gradients(ctypes.Structure):
    _fields_ = [
        ("branches", ctypes.POINTER(Strided)),
        ("fc", ctypes.c_bool),
        *((name, Matrix) for name in SEWeights._fields),
    ]


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")


def build(folder: Path, root: Path = REPO) -> Path:
    """Compile the kernels below ``root`` with the emulator into a library in ``folder``."""
    command = [compiler(), "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DPSA_EMULATED", "-shared"]
    library = folder / "emulated.so"
    command += ["-I", str(root / "tests/helpers/emulator"), "-x", "c++"]
    command += [str(root / source) for source in SOURCES] + ["-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


class Guarded:
    """A tensor between margins of NaN, with the shape, strides and misalignment of ``like``.

    It holds the values of ``like`` if ``values``, else NaN.
    """

    def __init__(self, like: Tensor, values: bool) -> None:
        extent = sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) + 1
        extent = extent if like.numel() else 0
        size = like.element_size()
        self._memory = torch.full((extent + 2 * _MARGIN + 16,), float("nan"), dtype=like.dtype)
        skew = (like.data_ptr() - self._memory.data_ptr()) // size % (16 // size)
        self._begin, self._end = _MARGIN + skew, _MARGIN + skew + extent
        self.tensor = self._memory.as_strided(like.shape, like.stride(), self._begin)
        if values:
            flat = like.detach().as_strided((extent,), (1,))
            self._memory[self._begin : self._end] = flat
        self._before = self._memory.clone()

    def address_range(self) -> tuple[int, int]:
        size = self._memory.element_size()
        return self._memory.data_ptr() + self._begin * size, (self._end - self._begin) * size

    def check(self, unchanged: bool) -> None:
        same = self._memory.view(torch.uint8) == self._before.view(torch.uint8)
        same = same.view(-1, self._memory.element_size()).all(1)
        assert same[: self._begin].all(), "a write before the tensor"
        assert same[self._end :].all(), "a write after the tensor"
        assert not unchanged or same.all(), "an input was written to"


def _strided(t: Tensor | None) -> Strided:
    if t is None:
        return Strided()
    if t.dim() == 4:
        # H and W must have one stride; the stride of a dimension of size one is meaningless.
        _, _, H, W = t.shape
        pixel = t.stride(3) if W > 1 else t.stride(2)
        assert H == 1 or W == 1 or t.stride(2) == W * t.stride(3)
        return Strided(t.data_ptr(), t.stride(0), t.stride(1), pixel)
    return Strided(t.data_ptr(), *t.stride())


def _matrix(t: Tensor | None) -> Matrix:
    if t is None:
        return Matrix()
    return Matrix(t.data_ptr(), _DTYPES[t.dtype], t.stride(0), t.stride(1) if t.dim() > 1 else 0, 0)


def _se_matrix(t: Tensor, per_branch: bool) -> Matrix:
    if not per_branch:
        return _matrix(t)
    return Matrix(
        t.data_ptr(), _DTYPES[t.dtype], t.stride(1), t.stride(2) if t.dim() > 2 else 0, t.stride(0)
    )


class Emulator:
    """psa::cuda::forward and backward for CPU tensors."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("launches", "forward", "forward_workspace", "backward", "backward_workspace"):
            getattr(self._library, f"emulator_{name}").restype = ctypes.c_char_p
        self._library.emulator_wide_accesses.restype = ctypes.c_int64
        self.path, self.order, self.limits = "automatic", "forwards", DeviceLimits()
        self.wide_bytes = 0  # bytes of global memory that 16-byte accesses of the last call moved
        self.launches: list[str] = []  # kernels of the last call; "one_pass*4": in clusters of 4

    def forward(
        self,
        branches: Sequence[Tensor],
        fc: Sequence[Tensor],
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        relu: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, C = branches[0].shape[:2]
        sums = torch.empty((B, len(branches), C))
        inputs = [Guarded(t, True) for t in (*branches, *fc)]
        extra = [Guarded(t, True) if t is not None else None for t in (scale, shift)]
        outputs = [Guarded(t, False) for t in (empty_output(branches), sums, sums)]
        tail = self._tail(inputs, *outputs)
        epilogue = Epilogue(*(_matrix(t.tensor if t else None) for t in extra), relu)
        inputs += [t for t in extra if t]
        self._call("forward", tail, epilogue, inputs, outputs)
        return tuple(t.tensor for t in outputs)

    def backward(
        self,
        grad: Tensor,
        branches: Sequence[Tensor],
        squeeze: Tensor,
        attention: Tensor,
        fc: Sequence[Tensor],
        branch_grads: Sequence[bool] | None = None,
        fc_grads: bool = True,
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """Return the gradients of the branches and of fc.

        branch_grads: which branches need one; None for all, [] to request none at all.
        """
        requested = [True] * len(branches) if branch_grads is None else branch_grads
        inputs = [Guarded(t, True) for t in (*branches, *fc, grad, squeeze, attention)]
        grads = [
            Guarded(empty_grad(x), False) if wanted else None
            for x, wanted in zip(branches if requested else [], requested, strict=True)
        ]
        fc_out = [Guarded(torch.empty(t.shape, dtype=t.dtype), False) for t in fc if fc_grads]
        tail = self._tail(inputs[:-3], *inputs[-3:])
        strided = [_strided(t.tensor if t else None) for t in grads]
        gradients = Gradients(
            (Strided * len(strided))(*strided) if strided else None,
            fc_grads,
            *(_se_matrix(t.tensor, SEWeights(*fc).per_branch) for t in fc_out),
        )
        self._call("backward", tail, gradients, inputs, [*filter(None, grads), *fc_out])
        return [t.tensor if t else None for t in grads], [t.tensor for t in fc_out]

    def _tail(
        self, inputs: Sequence[Guarded], concat: Guarded, squeeze: Guarded, attention: Guarded
    ) -> Tail:
        tensors = [t.tensor for t in inputs]
        branches, fc = tensors[:-4], SEWeights(*tensors[-4:])
        B, C, H, W = branches[0].shape
        return Tail(
            *(B, len(branches), C, H * W, _DTYPES[branches[0].dtype]),
            (Strided * len(branches))(*map(_strided, branches)),
            _strided(concat.tensor),
            SEMatrices(fc.hidden, fc.per_branch, *(_se_matrix(t, fc.per_branch) for t in fc)),
            squeeze.tensor.data_ptr(),
            attention.tensor.data_ptr(),
        )

    def _call(
        self,
        name: str,
        tail: Tail,
        other: Epilogue | Gradients,
        inputs: Sequence[Guarded],
        outputs: Sequence[Guarded],
    ) -> None:
        self._library.emulator_configure(
            *self.limits[:2], *map(ctypes.c_int64, self.limits[2:]), ORDERS[self.order]
        )
        size, path = ctypes.c_int64(), PATHS[self.path]
        arguments = [ctypes.byref(tail), ctypes.byref(other), path, ctypes.byref(size)]
        if name == "forward":
            del arguments[1]  # forward_workspace doesn't take the epilogue
        self._try(f"{name}_workspace", *arguments)
        workspace = Guarded(torch.empty(size.value // 4), False)
        for t in (*inputs, *outputs, workspace):
            start, length = t.address_range()
            self._library.emulator_add_tensor(ctypes.c_void_p(start), ctypes.c_int64(length))
        memory = ctypes.c_void_p(workspace.address_range()[0])
        self._try(name, ctypes.byref(tail), ctypes.byref(other), path, memory)
        self.launches = self._library.emulator_launches().decode().split()
        self.wide_bytes = 16 * self._library.emulator_wide_accesses()
        for t in inputs:
            t.check(unchanged=True)
        for t in (*outputs, workspace):
            t.check(unchanged=False)

    def _try(self, name: str, *arguments: object) -> None:
        message = getattr(self._library, f"emulator_{name}")(*arguments).decode()
        if message:
            kind, _, text = message.partition(": ")
            raise (ValueError if kind == "invalid" else RuntimeError)(text)

    def psa_tail(
        self,
        branches: Sequence[Tensor],
        *fc: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """Compute epsanet_fused.psa_tail, differentiably."""
        return _PsaTail.apply(self, (scale, shift, relu), *branches, *fc)


class _PsaTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, emulator, epilogue, *tensors):
        *branches, _, _, _, _ = tensors
        out, squeeze, attention = emulator.forward(branches, tensors[-4:], *epilogue)
        ctx.emulator, ctx.tensors, ctx.saved = emulator, tensors, (squeeze, attention)
        return out

    @staticmethod
    def backward(ctx, grad):
        branches, fc = ctx.tensors[:-4], ctx.tensors[-4:]
        grads, fc_grads = ctx.emulator.backward(grad, branches, *ctx.saved, fc)
        return None, None, *grads, *fc_grads
