"""Every Triton kernel compiles for every card we name, and its machine code is what we meant.

No card is needed: the compiler runs ahead of time, with the constants and alignments that the real
launch code chooses at EPSANet's four stages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# Shared memory that one block may have, in bytes, and registers per thread.
TARGETS = {
    "cuda:80": 163 * 1024,
    "cuda:89": 99 * 1024,
    "cuda:90": 227 * 1024,
    "cuda:100": 227 * 1024,
    "cuda:120": 99 * 1024,
    "hip:gfx942": 64 * 1024,
}
KERNELS = {
    "sum_kernel",
    "gate_kernel",
    "sum_gate_kernel",
    "fc_grad_kernel",
    "recalibrate_kernel",
    "recalibrate_flat_kernel",
    "deviation_kernel",
    "norm_gate_kernel",
    "deviation_gate_kernel",
    "statistics_kernel",
    "normalize_kernel",
    "normalize_flat_kernel",
    "gradient_sum_kernel",
    "gradient_statistics_kernel",
    "norm_gate_backward_kernel",
}
SUM_KERNELS = {
    "sum_kernel",
    "sum_gate_kernel",
    "deviation_kernel",
    "deviation_gate_kernel",
    "gradient_sum_kernel",
}
# The widest access, in bits, to each stream: 196 and 49 pixels leave rows of pixels less aligned.
NCHW_SUM_WIDTH = {"S1": 128, "S2": 128, "S3": 64, "S4": 16}


def compile_for(target: str, cache: Path) -> list[dict[str, Any]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), target],
        capture_output=True,
        text=True,
        env=env | {"TRITON_CACHE_DIR": str(cache)},
        check=False,
    )
    assert done.returncode == 0, f"{target}: {done.stderr[-2000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """What each target's compiler made; the targets are compiled two at a time."""
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(2) as pool:
        jobs = {target: pool.submit(compile_for, target, cache / target) for target in TARGETS}
        yield {target: job.result() for target, job in jobs.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_all_kernels_compile_at_all_stages(compiled: dict[str, Any], target: str) -> None:
    made = compiled[target]
    assert {k["kernel"] for k in made} == KERNELS
    assert {k["stage"] for k in made} == {"S1", "S2", "S3", "S4"}
    assert {k["dtype"] for k in made} == {"fp16", "bf16", "fp32"}
    assert {k["layout"] for k in made} == {"nchw", "channels_last"}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills_and_shared_memory_fits(compiled: dict[str, Any], target: str) -> None:
    for kernel in compiled[target]:
        assert kernel["stack"] <= 16, kernel
        assert kernel["shared"] <= TARGETS[target], kernel


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("cuda")])
def test_streams_are_accessed_128_bits_at_a_time(compiled: dict[str, Any], target: str) -> None:
    """In each kernel that streams, S loads (and S stores) are as wide as the layout allows."""
    for kernel in compiled[target]:
        name, nchw = kernel["kernel"], kernel["layout"] == "nchw"
        if name in SUM_KERNELS:
            # 49 floats leave a row 4 bytes aligned, 196 floats 16 bytes.
            itemsize = 4 if kernel["dtype"] == "fp32" else 2
            width = NCHW_SUM_WIDTH[kernel["stage"]] * itemsize // 2 if nchw else 128
            assert kernel["loads"].get(str(min(width, 128)), 0) >= 4, kernel
        elif name.startswith(("recalibrate", "normalize")):
            assert kernel["loads"].get("128", 0) >= 4, kernel
            assert set(kernel["stores"]) == {"128"}, kernel
