"""Compile every Triton kernel for one target, without a GPU, and print the resources it needs.

    python tests/tools/compile_kernels.py cuda:90 [--sample]

This must be a process of its own, without TRITON_INTERPRET. The real launch code runs on CPU
tensors; only the driver is a fake, and each launch stops after the compiler. Each launch prints one
JSON line.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from helpers.aot_compile import FakeDriver, record_launches
from torch import Tensor
from triton.backends.compiler import GPUTarget

from epsanet_fused.backends.interface import NormParams, SEWeights
from epsanet_fused.backends.triton import backward, forward, launch, norm_backward, norm_forward
from epsanet_fused.utils.memory_format import empty_output

STAGES = {"S1": (16, 56), "S2": (32, 28), "S3": (64, 14), "S4": (128, 7)}  # C of a branch, H = W
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# A batch for each tile of config.SUM.
BATCHES = {"small": 1, "large": 512}
# The cases of psa_tail_norm are few, because compiling is slow. They have all of its kernels: one
# with an odd number of pixels, one with channels as the inner extent.
NORM_CASES = [("S4", "fp16", "nchw", "large"), ("S1", "bf16", "channels_last", "small")]


# All of psa_tail's kernels, and most of psa_tail_norm's.
SAMPLE = [("S1", "fp16", "nchw", "small"), ("S4", "bf16", "channels_last", "large")]


def main(name: str, sample: bool) -> None:
    kind, arch = name.split(":")
    target = GPUTarget(kind, int(arch) if kind == "cuda" else arch, 32 if kind == "cuda" else 64)
    triton.runtime.driver.set_active(FakeDriver(target))
    every = itertools.product(STAGES, DTYPES, MEMORY_FORMATS, BATCHES)
    cases = [(run_tail, *case) for case in (SAMPLE if sample else every)]
    cases += [(run_norm, *case) for case in NORM_CASES[: 1 if sample else None]]
    for run, stage, dtype, memory_format, batch in cases:
        with record_launches(compile_only=True) as compiled:
            run(
                *inputs(STAGES[stage], DTYPES[dtype], MEMORY_FORMATS[memory_format], BATCHES[batch])
            )
        for kernel, result in compiled:
            line = {"kernel": kernel, "stage": stage, "dtype": dtype, "batch": batch}
            line |= {"memory_format": memory_format, "shared": result.metadata.shared}
            if kind == "cuda":
                line |= machine_code(result.asm["cubin"])
            else:
                line |= amd_resources(result.asm["amdgcn"])
            print(json.dumps(line))


def inputs(
    stage: tuple[int, int], dtype: torch.dtype, memory_format: torch.memory_format, batch: int
) -> tuple[list[Tensor], SEWeights]:
    """Return the branches and the fc tensors."""
    C, H = stage
    # The tensors are neither written nor read, so most systems give them no memory.
    shape = (batch, C, H, H)
    branches = [torch.empty(shape, dtype=dtype, memory_format=memory_format) for _ in range(4)]
    R = C // 16
    return branches, SEWeights(*(torch.empty(s) for s in ((R, C), (R,), (C, R), (C,))))


def run_tail(branches: list[Tensor], fc: SEWeights) -> None:
    out, squeeze, attention = forward(branches, fc, None, None, False)
    grad = torch.empty_like(out)
    backward(grad, branches, squeeze, attention, fc, branch_grads=True, fc_grads=True)
    scale, shift = torch.empty(2, out.shape[1])
    args = launch.tail_args(branches, empty_output(branches))
    launch.recalibrate(args, attention, scale, shift, relu=True)


def run_norm(branches: list[Tensor], fc: SEWeights) -> None:
    gamma, beta = torch.empty(2, len(branches) * branches[0].shape[1])
    norm = NormParams(gamma, beta, 1e-5)
    out, stats = norm_forward(branches, fc, norm)
    grad = torch.empty_like(out)
    norm_backward(
        grad, branches, stats, fc, norm, branch_grads=True, fc_grads=True, norm_grads=True
    )


@functools.cache
def machine_code(cubin: bytes) -> dict[str, object]:
    """Return registers, stack and the widths (in bits) of the accesses to global memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tool, flag, file], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", sass, re.M)
    return {
        "registers": int(registers),
        "stack": int(stack),
        "instructions": len(instructions),
        "loads": widths(instructions, "LDG"),
        "stores": widths(instructions, "STG"),
    }


def widths(instructions: list[str], opcode: str) -> dict[int, int]:
    """Count the accesses by their width: LDG.E is 32 bits, LDG.E.128 and LDG.E.U16 name theirs."""
    found = Counter()
    for name in instructions:
        if name.split(".")[0] == opcode:
            bits = [int(b) for b in re.findall(r"\.[US]?(8|16|64|128)\b", name)]
            found[bits[0] if bits else 32] += 1
    return dict(found)


@functools.cache
def amd_resources(assembly: str) -> dict[str, object]:
    """Return registers and stack, which the compiler writes into the assembly."""

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    return {"registers": field("vgpr_count"), "stack": field("private_segment_fixed_size")}


if __name__ == "__main__":
    main(sys.argv[1], sample=sys.argv[2:] == ["--sample"])
