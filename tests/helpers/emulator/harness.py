"""Builds the CUDA kernels' sources for the CPU, and calls them on tensors of the CPU.

Every tensor is handed over between margins of NaN: an element that is read or written outside of it
shows. See emulator.cpp for what else is made to fail.
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

from epsanet_fused.utils.memory_format import empty_grad, empty_output

REPO = Path(__file__).parents[3]
SOURCES = [
    *(
        f"csrc/cuda/{name}"
        for name in ("sums.cu", "recalibrate.cu", "one_pass.cu", "fc_grad.cu", "cuda.cpp")
    ),
    "tests/helpers/emulator/emulator.cpp",
    "tests/helpers/emulator/operator.cpp",
]
PATHS = {"automatic": 0, "one_pass": 1, "two_pass": 2}
ORDERS = {"forwards": 0, "backwards": 1, "shuffled": 2}
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_MARGIN = 64  # elements


class Card(NamedTuple):
    """What the kernels are told of the device that they run on."""

    arch: int = 90
    processors: int = 132
    shared_per_block: int = 227 * 1024
    shared_per_processor: int = 228 * 1024


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
    ]


FC = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


class Excitation(ctypes.Structure):
    _fields_ = [("R", ctypes.c_int64), *((name, Matrix) for name in FC)]


class Tail(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "S", "C", "HW")),
        ("dtype", ctypes.c_int32),
        ("branches", ctypes.POINTER(Strided)),
        ("cat", Strided),
        ("se", Excitation),
        ("squeeze", ctypes.c_void_p),
        ("attention", ctypes.c_void_p),
    ]


class Epilogue(ctypes.Structure):
    _fields_ = [("scale", Matrix), ("shift", Matrix), ("relu", ctypes.c_bool)]


class Gradients(ctypes.Structure):
    _fields_ = [
        ("branches", ctypes.POINTER(Strided)),
        ("fc", ctypes.c_bool),
        *((name, Matrix) for name in FC),
    ]


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")


def build(folder: Path, root: Path = REPO) -> Path:
    """Compiles the kernels below ``root`` with the emulator into a library in ``folder``."""
    command = [compiler(), "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DPSA_EMULATED", "-shared"]
    library = folder / "emulated.so"
    command += ["-I", str(root / "tests/emulator"), "-x", "c++"]
    command += [str(root / source) for source in SOURCES] + ["-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


class Guarded:
    """A tensor between margins, as misaligned as the one it copies; its memory starts as NaN."""

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
        assert same[: self._begin].all(), "written before the tensor"
        assert same[self._end :].all(), "written behind the tensor"
        assert not unchanged or same.all(), "an input was written to"


def _strided(t: Tensor | None) -> Strided:
    if t is None:
        return Strided()
    if t.dim() == 4:
        # H and W must be one run; a stride along a dimension of size one means nothing.
        _, _, H, W = t.shape
        pixel = t.stride(3) if W > 1 else t.stride(2)
        assert H == 1 or W == 1 or t.stride(2) == W * t.stride(3)
        return Strided(t.data_ptr(), t.stride(0), t.stride(1), pixel)
    return Strided(t.data_ptr(), *t.stride())


def _matrix(t: Tensor | None) -> Matrix:
    if t is None:
        return Matrix()
    return Matrix(t.data_ptr(), _DTYPES[t.dtype], t.stride(0), t.stride(1) if t.dim() > 1 else 0)


class Emulator:
    """psa::cuda::forward and backward, on tensors of the CPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("launches", "forward", "forward_workspace", "backward", "backward_workspace"):
            getattr(self._library, f"emulator_{name}").restype = ctypes.c_char_p
        self._library.emulator_wide_accesses.restype = ctypes.c_int64
        self.path, self.order, self.card = "automatic", "forwards", Card()
        self.wide_bytes = 0  # of global memory, read or written 16 at a time by the last call
        self.launches: list[str] = []  # the last call's, "*4" behind it: clusters of 4

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
        """branch_grads: which are asked for; None for all, [] for a call without any."""
        asked = [True] * len(branches) if branch_grads is None else branch_grads
        inputs = [Guarded(t, True) for t in (*branches, *fc, grad, squeeze, attention)]
        grads = [
            Guarded(empty_grad(x), False) if wanted else None
            for x, wanted in zip(branches if asked else [], asked, strict=True)
        ]
        fc_out = [Guarded(torch.empty(t.shape, dtype=t.dtype), False) for t in fc if fc_grads]
        tail = self._tail(inputs[:-3], *inputs[-3:])
        strided = [_strided(t.tensor if t else None) for t in grads]
        gradients = Gradients(
            (Strided * len(strided))(*strided) if strided else None,
            fc_grads,
            *(_matrix(t.tensor) for t in fc_out),
        )
        self._call("backward", tail, gradients, inputs, [*filter(None, grads), *fc_out])
        return [t.tensor if t else None for t in grads], [t.tensor for t in fc_out]

    def _tail(
        self, inputs: Sequence[Guarded], cat: Guarded, squeeze: Guarded, attention: Guarded
    ) -> Tail:
        *branches, w1, b1, w2, b2 = (t.tensor for t in inputs)
        B, C, H, W = branches[0].shape
        return Tail(
            *(B, len(branches), C, H * W, _DTYPES[branches[0].dtype]),
            (Strided * len(branches))(*map(_strided, branches)),
            _strided(cat.tensor),
            Excitation(w1.shape[0], *map(_matrix, (w1, b1, w2, b2))),
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
            *self.card[:2], *map(ctypes.c_int64, self.card[2:]), ORDERS[self.order]
        )
        size, path = ctypes.c_int64(), PATHS[self.path]
        arguments = [ctypes.byref(tail), ctypes.byref(other), path, ctypes.byref(size)]
        if name == "forward":
            del arguments[1]  # the epilogue needs no memory
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
        """As epsanet_fused.psa_tail, differentiable."""
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
