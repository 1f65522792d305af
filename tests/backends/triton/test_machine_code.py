"""Every Triton kernel compiles for every target, without spills and with wide memory accesses.

No GPU is needed: the compiler runs ahead of time, with the constants and alignments that the real
launch code chooses at EPSANet's four stages.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import ROOT

pytest.importorskip("triton")

# The shared memory that one block may have, in bytes.
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
    "m2_kernel",
    "norm_gate_kernel",
    "m2_gate_kernel",
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
    "m2_kernel",
    "m2_gate_kernel",
    "gradient_sum_kernel",
}
# The kernels that only the second case of psa_tail_norm has.
NOT_SAMPLED = {"m2_kernel", "norm_gate_kernel", "normalize_kernel"}
# A target takes some minutes. The groups are for xdist's workers.
TARGET_PARAMS = [
    pytest.param(target, marks=[pytest.mark.xdist_group(target), pytest.mark.slow])
    for target in TARGETS
]
# The widest access of the sum kernels, in bits: rows of 196 and 49 pixels are less aligned.
NCHW_SUM_WIDTH = {"S1": 128, "S2": 128, "S3": 64, "S4": 16}


@functools.cache
def compile_for(target: str, *options: str) -> list[dict[str, Any]]:
    """Return the lines that compile_kernels.py prints for a target."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[2] / "tools" / "compile_kernels.py"
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, str(script), target, *options],
            capture_output=True,
            text=True,
            env=env | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT / "tests")},
            check=False,
        )
    assert done.returncode == 0, f"{target}: {done.stderr[-2000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", TARGET_PARAMS)
def test_all_kernels_compile_at_all_stages(target: str) -> None:
    compiled = compile_for(target)
    assert {k["kernel"] for k in compiled} == KERNELS
    assert {k["stage"] for k in compiled} == {"S1", "S2", "S3", "S4"}
    assert {k["dtype"] for k in compiled} == {"fp16", "bf16", "fp32"}
    assert {k["memory_format"] for k in compiled} == {"nchw", "channels_last"}


def check_resources(kernel: dict[str, Any], target: str) -> None:
    assert kernel["stack"] <= 16, kernel
    assert kernel["shared"] <= TARGETS[target], kernel


def check_access(kernel: dict[str, Any]) -> None:
    name, nchw = kernel["kernel"], kernel["memory_format"] == "nchw"
    if name in SUM_KERNELS:
        # 49 floats leave a row 4 bytes aligned, 196 floats 16 bytes.
        itemsize = 4 if kernel["dtype"] == "fp32" else 2
        width = NCHW_SUM_WIDTH[kernel["stage"]] * itemsize // 2 if nchw else 128
        assert kernel["loads"].get(str(min(width, 128)), 0) >= 4, kernel
    elif name.startswith(("recalibrate", "normalize")):
        assert kernel["loads"].get("128", 0) >= 4, kernel
        assert set(kernel["stores"]) == {"128"}, kernel


def test_a_sample_needs_few_resources_and_accesses_128_bits() -> None:
    compiled = compile_for("cuda:90", "--sample")
    assert {k["kernel"] for k in compiled} == KERNELS - NOT_SAMPLED
    for kernel in compiled:
        check_resources(kernel, "cuda:90")
        check_access(kernel)


@pytest.mark.parametrize("target", TARGET_PARAMS)
def test_nothing_spills_and_shared_memory_fits(target: str) -> None:
    for kernel in compile_for(target):
        check_resources(kernel, target)


@pytest.mark.parametrize("target", [t for t in TARGET_PARAMS if t.values[0].startswith("cuda")])
def test_streams_are_accessed_128_bits_at_a_time(target: str) -> None:
    """In each kernel that streams, S loads (and S stores) are as wide as the alignment allows."""
    for kernel in compile_for(target):
        check_access(kernel)
