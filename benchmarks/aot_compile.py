"""Triton's compiler by itself: for a card that need not be there, and in several processes.

What one process compiles, another finds in Triton's cache on disk.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class FakeDriver:
    """What the launch code asks of a driver, answered for a card that isn't there."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def launches(compile_only: bool = False) -> Iterator[list[tuple[str, Any]]]:
    """Name and compiled kernel of each launch meanwhile; each may stop after the compiler."""
    launched: list[tuple[str, Any]] = []
    launch_really = JITFunction.run

    def run(kernel: JITFunction, *args: object, **kwargs: object) -> object:
        compiled = launch_really(kernel, *args, **kwargs | {"warmup": compile_only})
        launched.append((kernel.__name__, compiled))
        return compiled

    with mock.patch.object(JITFunction, "run", run):
        yield launched


def compilers(target: GPUTarget) -> ProcessPoolExecutor:
    """Processes that see the target for their card, one for each core but ours."""
    cores = len(os.sched_getaffinity(0))
    return ProcessPoolExecutor(
        max(1, cores - 1), multiprocessing.get_context("spawn"), _stand_in, (target,)
    )


def _stand_in(target: GPUTarget) -> None:
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(FakeDriver(target))
