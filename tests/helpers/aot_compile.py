"""Compile Triton kernels ahead of time, for a GPU that is not present."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class FakeDriver:
    """A Triton driver for a GPU that is not present. The launch code calls these methods alone."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def record_launches(compile_only: bool = False) -> Iterator[list[tuple[str, Any]]]:
    """Record the name and the compiled kernel of each launch inside the context.

    With ``compile_only`` a launch compiles its kernel and does not run it.
    """
    launched: list[tuple[str, Any]] = []
    original = JITFunction.run

    def run(kernel: JITFunction, *args: object, **kwargs: object) -> object:
        compiled = original(kernel, *args, **kwargs | {"warmup": compile_only})
        launched.append((kernel.__name__, compiled))
        return compiled

    with mock.patch.object(JITFunction, "run", run):
        yield launched
