"""Time the four branch convolutions with their own groups and with merged groups: a CSV file.

    python benchmarks/conv_cost.py --out out

Merging groups is exact: the weights of neighbouring groups form one block-diagonal weight with
zeros off the diagonal, and the convolution has fewer groups. It needs more arithmetic and often
less time, because a group with one output channel cannot fill a matrix unit. The fastest merge
depends on shape, dtype, memory format and device. All merges are measured, in forward, dgrad (the
gradient of the input) and wgrad (the gradient of the weight).
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from environment import describe
from inputs import MEMORY_FORMATS, SEED, STAGES
from options import add_shared, parse_shared, positive_int
from report import MACHINE, OUT_OF_TIME, align, failure, timing_columns, write_csv
from torch import Tensor

from epsanet_fused.nn.grouped_conv import merge_weight
from epsanet_fused.nn.psa import CONV_GROUPS, CONV_KERNELS
from epsanet_fused.utils.progress import progress
from epsanet_fused.utils.timing import Clock, Variant, interleave, make_clock

PASSES = ("forward", "dgrad", "wgrad")
# The minimum number of output channels of a merged group; 1 keeps the groups.
MIN_OUTPUTS = {"as_is": 1, "k8": 8, "k16": 16, "dense": math.inf}
COLUMNS = (
    "stage", "kernel", "groups", "merge", "merged_groups", "channels_in", "channels_out", "size",
    "batch", "dtype", "layout", "cudnn_benchmark", "pass", "ms_p20", "ms_p50", "ms_p80", "samples",
    "clock", "vs_as_is", "tie", "exact_error", "ok", "note", *MACHINE,
)  # fmt: skip
# In float64 the merged and the grouped convolution differ only by the order of their sums.
MAX_EXACT_ERROR = 1e-12


class ConvCase(NamedTuple):
    """One branch convolution in one setting. Its merges are timed against each other."""

    benchmark: bool
    dtype: str
    stage: str
    memory_format: str
    kernel: int
    groups: int


def plan(stages: Sequence[str], dtypes: Sequence[str], cuda: bool) -> list[ConvCase]:
    """Return all settings, the most important ones first: 16 bits with cuDNN autotuned."""
    return [
        ConvCase(*point, *conv)
        for *point, conv in itertools.product(
            (True, False) if cuda else (False,),
            dtypes,
            stages,
            ("channels_last", "nchw"),
            tuple(zip(CONV_KERNELS, CONV_GROUPS, strict=True)),
        )
    ]


def merges(channels_out: int, groups: int) -> dict[str, int]:
    """Return the number of groups after each merge, without merges that are equal to another."""
    divisors = [g for g in range(groups, 0, -1) if groups % g == 0]
    found: dict[str, int] = {}
    for name, minimum in MIN_OUTPUTS.items():
        merged = next((g for g in divisors if channels_out // g >= minimum), 1)
        if merged not in found.values():
            found[name] = merged
    return found


def unmerge_weight(weight: Tensor, groups: int, merged: int) -> Tensor:
    """Invert merge_weight, for gradients: return the blocks on the diagonals.

    The weight is (K, inputs, k, k); the result is (K, inputs // factor, k, k), where the factor is
    ``groups // merged``.
    """
    K, inputs, k, _ = weight.shape
    factor = groups // merged
    blocks = weight.reshape(merged, factor, K // groups, factor, inputs // factor, k, k)
    grouped = blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)
    return grouped.reshape(K, inputs // factor, k, k)


def passes(x: Tensor, weight: Tensor, grad: Tensor, groups: int) -> dict[str, Callable[[], Tensor]]:
    """Return functions that compute the convolution and its two gradients, each by itself."""
    padding = weight.shape[-1] // 2

    def backward(mask: list[bool]) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], groups, mask
        )

    return {
        "forward": lambda: F.conv2d(x, weight, padding=padding, groups=groups),
        "dgrad": lambda: backward([True, False, False])[0],
        "wgrad": lambda: backward([False, True, False])[1],
    }


class ConvBench:
    """Times one convolution after another, with all its merges, and collects the rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device: torch.device = args.device
        self.clock: Clock = make_clock(self.device)
        self.environment = describe(self.device)
        self.rows: list[dict[str, object]] = []
        self._errors: dict[tuple[str, int, int], float] = {}

    def measure(self, conv: ConvCase, seconds: float) -> None:
        """Time all passes of all merges, for each pass interleaved over the merges."""
        groups = merges(STAGES[conv.stage][0] // 4, conv.groups)
        rows = {name: self._row(conv, name, merged) for name, merged in groups.items()}
        exact = {name: row for name, row in rows.items() if row["ok"]}
        self.rows += (row for row in rows.values() if not row["ok"])
        # PyTorch lets cuDNN use TF32 for float32 convolutions by default.
        torch.backends.cudnn.benchmark = conv.benchmark
        calls = {name: passes(*self._tensors(conv, groups[name]), groups[name]) for name in exact}
        for kind in PASSES:
            variants = {name: Variant(calls[name][kind], nullcontext) for name in exact}
            share = seconds / len(PASSES)
            timings = interleave(variants, self.clock, self.args.reps, share)
            plain = timings["as_is"]
            for name, timing in timings.items():
                row = exact[name] | timing_columns(timing) | {"pass": kind}
                row |= {"vs_as_is": plain.p50 / timing.p50, "tie": timing.ties(plain)}
                self.rows.append(row)

    def skip(self, conv: ConvCase, columns: Mapping[str, object]) -> None:
        """Record a convolution that was not measured."""
        self.rows.append(self._shared_columns(conv) | columns)

    def _shared_columns(self, conv: ConvCase) -> dict[str, object]:
        channels, size = STAGES[conv.stage]
        return (
            dict.fromkeys(COLUMNS, "")
            | self.environment
            | {
                "stage": conv.stage,
                "kernel": conv.kernel,
                "groups": conv.groups,
                "channels_in": channels,
                "channels_out": channels // 4,
                "size": size,
                "batch": self.args.batch,
                "dtype": conv.dtype,
                "layout": conv.memory_format,
                "cudnn_benchmark": conv.benchmark,
                "clock": self.clock.name,
            }
        )

    def _row(self, conv: ConvCase, merge: str, merged: int) -> dict[str, object]:
        key = (conv.stage, conv.kernel, merged)
        if key not in self._errors:
            self._errors[key] = exact_error(conv, merged, self.device)
        error = self._errors[key]
        ok = error <= MAX_EXACT_ERROR
        return self._shared_columns(conv) | {
            "merge": merge,
            "merged_groups": merged,
            "exact_error": error,
            "ok": ok,
            "note": "" if ok else "WRONG: the merge isn't exact, so it isn't timed",
        }

    def _tensors(self, conv: ConvCase, merged: int) -> tuple[Tensor, ...]:
        """Return input, merged weight and gradient in the dtype and memory format to measure."""
        dtype = torch.float32 if conv.dtype == "tf32" else getattr(torch, conv.dtype)
        memory_format = MEMORY_FORMATS[conv.memory_format]
        x, weight, grad = noise(conv, self.args.batch, self.device)
        weight = merge_weight(weight, conv.groups, merged)
        return tuple(t.to(dtype, memory_format=memory_format) for t in (x, weight, grad))


def noise(conv: ConvCase, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return input, grouped weight and gradient of the output, the same for each call."""
    channels, size = STAGES[conv.stage]
    generator = torch.Generator(device).manual_seed(SEED)
    k = conv.kernel
    shapes = (
        (batch, channels, size, size),
        (channels // 4, channels // conv.groups, k, k),
        (batch, channels // 4, size, size),
    )
    x, weight, grad = (torch.randn(s, generator=generator, device=device) for s in shapes)
    return x, weight, grad


def exact_error(conv: ConvCase, merged: int, device: torch.device) -> float:
    """Return the largest relative difference between merged and grouped passes in float64."""
    x, weight, grad = (t.double() for t in noise(conv, 1, device))
    grouped = passes(x, weight, grad, conv.groups)
    other = passes(x, merge_weight(weight, conv.groups, merged), grad, merged)
    errors = []
    for kind in PASSES:
        expected, result = grouped[kind](), other[kind]()
        if kind == "wgrad":
            result = unmerge_weight(result, conv.groups, merged)
        errors.append(((result - expected).abs().max() / expected.abs().max()).item())
    return max(errors)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=positive_int, default=32)
    parser.add_argument("--quick", action="store_true", help="a few small cases, as a test")
    add_shared(parser, 600.0, "cases not begun by then are recorded as skipped")
    args = parse_shared(parser, argv)
    args.reps = 20
    if args.quick:
        args.batch, args.reps = 1, 5
    return args


def run(args: argparse.Namespace) -> int:
    """Measure every convolution, write the CSV file and print the table; return the exit status."""
    deadline = time.perf_counter() + args.seconds
    cuda = args.device.type == "cuda"
    dtypes = ("float16", "bfloat16", "tf32") if cuda else ("float32", "bfloat16")
    stages, dtypes = (("S4",), dtypes[:1]) if args.quick else (tuple(STAGES), dtypes)
    convs = plan(stages, dtypes, cuda)
    if not cuda:
        torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = ConvBench(args)
    for i, conv in progress(convs, "case", lambda conv: " ".join(map(str, conv))):
        left = deadline - time.perf_counter()
        try:
            if left > 0:
                bench.measure(conv, left / (len(convs) - i))
            else:
                bench.skip(conv, {"note": OUT_OF_TIME})
        except RuntimeError as error:  # a library may not support a case: go on with the others
            bench.skip(conv, failure(error))
        if i % 16 == 0 or i + 1 == len(convs):
            write_csv(args.out / "conv_cost.csv", bench.rows, COLUMNS)
    print(best_merges(bench.rows))
    skipped = sum(str(row["note"]).startswith("skipped") for row in bench.rows)
    print(f"{len(convs) - skipped} of {len(convs)} settings measured within --seconds")
    return 1 if any(row["ok"] is False for row in bench.rows) else 0


def best_merges(rows: Sequence[dict[str, object]]) -> str:
    """Format a line per convolution: its time, and the merge that is faster, if there is one."""
    settings = ("stage", "kernel", "dtype", "layout", "cudnn_benchmark")
    groups: dict[tuple[str, ...], dict[str, list[dict[str, object]]]] = {}
    for row in rows:
        if row["ms_p50"] != "":
            kinds = groups.setdefault(tuple(str(row[s]) for s in settings), {})
            kinds.setdefault(str(row["pass"]), []).append(row)
    head = (*settings[:-1], "autotuned", *(f"{kind} ms" for kind in PASSES))
    lines = [(*name, *(_best(kinds[kind]) for kind in PASSES)) for name, kinds in groups.items()]
    return align([head, *lines], left=len(head))


def _best(merges: list[dict[str, object]]) -> str:
    plain = next(row for row in merges if row["merge"] == "as_is")
    best = min(merges, key=lambda row: float(str(row["ms_p50"])))
    if best["tie"]:
        return f"{plain['ms_p50']:.3f}"
    return f"{plain['ms_p50']:.3f} -> {best['ms_p50']:.3f} {best['merge']}"


if __name__ == "__main__":
    sys.exit(run(parse()))
