"""What do the four convolutions cost, as they are and with their groups merged? One CSV.

    python benchmarks/conv_cost.py --out out

Merging groups is exact: the weights of neighbouring groups go into one block-diagonal weight with
zeros between them, and the convolution has fewer groups. That is more arithmetic, often in less
time, as a group with one output channel fills no matrix unit. Which merge pays depends on the
shape, dtype, layout and device, so this measures them all, in forward, dgrad (the input's gradient)
and wgrad (the weight's).
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from environment import describe
from inputs import SEED, STAGES
from options import add_shared, finish_shared, positive_int
from report import align, write_csv
from torch import Tensor

from epsanet_fused.nn.grouped_conv import merge_weight
from epsanet_fused.nn.psa import CONV_GROUPS, CONV_KERNELS
from epsanet_fused.utils.progress import progress
from epsanet_fused.utils.timing import Clock, Timing, Variant, interleave, make_clock

PASSES = ("forward", "dgrad", "wgrad")
# The fewest output channels that a merged group may have; 1 leaves the groups as they are.
LEAST_OUTPUTS = {"as_is": 1, "k8": 8, "k16": 16, "dense": math.inf}
COLUMNS = (
    "stage", "kernel", "groups", "merge", "merged_groups", "channels_in", "channels_out", "size",
    "batch", "dtype", "layout", "cudnn_benchmark", "pass", "ms_p20", "ms_p50", "ms_p80", "samples",
    "clock", "vs_as_is", "tie", "exact_error", "ok", "note", "device", "driver", "python", "torch",
    "triton", "cuda", "cudnn", "epsanet_fused", "threads",
)  # fmt: skip
# In float64 the merged and the grouped convolution differ by the order of their sums at most.
EXACT = 1e-12


class Conv(NamedTuple):
    """One branch convolution in one setting; its merges are timed against each other."""

    benchmark: bool
    dtype: str
    stage: str
    layout: str
    kernel: int
    groups: int


def plan(stages: Sequence[str], dtypes: Sequence[str], cuda: bool) -> list[Conv]:
    """All settings, those that decide most first: the autotuned 16-bit ones."""
    return [
        Conv(*point, *conv)
        for *point, conv in itertools.product(
            (True, False) if cuda else (False,),
            dtypes,
            stages,
            ("channels_last", "nchw"),
            tuple(zip(CONV_KERNELS, CONV_GROUPS, strict=True)),
        )
    ]


def merges(channels_out: int, groups: int) -> dict[str, int]:
    """How many groups each merge leaves; merges that come to the same are named once."""
    divisors = [g for g in range(groups, 0, -1) if groups % g == 0]
    found: dict[str, int] = {}
    for name, least in LEAST_OUTPUTS.items():
        left = next((g for g in divisors if channels_out // g >= least), 1)
        if left not in found.values():
            found[name] = left
    return found


def unmerge_weight(weight: Tensor, groups: int, merged: int) -> Tensor:
    """The inverse of merge_weight, for gradients: what stands on the blocks' diagonals."""
    K, inputs, k, _ = weight.shape
    factor = groups // merged
    blocks = weight.reshape(merged, factor, K // groups, factor, inputs // factor, k, k)
    grouped = blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)
    return grouped.reshape(K, inputs // factor, k, k)


def passes(x: Tensor, weight: Tensor, grad: Tensor, groups: int) -> dict[str, Callable[[], Tensor]]:
    """The convolution and its two gradients, each by itself."""
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


class Bench:
    """Times one convolution's merges after another and keeps the rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device: torch.device = args.device
        self.clock: Clock = make_clock(self.device)
        self.environment = describe(self.device)
        self.rows: list[dict[str, object]] = []
        self._errors: dict[tuple[str, int, int], float] = {}

    def measure(self, conv: Conv, seconds: float) -> None:
        """All passes of all merges, each kind of pass interleaved over the merges."""
        rows = {name: self._row(conv, name, left) for name, left in self._merges(conv).items()}
        exact = {name: row for name, row in rows.items() if row["ok"]}
        if len(exact) < len(rows):
            self.rows += (row for row in rows.values() if not row["ok"])
        # float32 is TF32 where the card has it: cuDNN's default in PyTorch.
        torch.backends.cudnn.benchmark = conv.benchmark
        calls = {
            name: passes(*self._tensors(conv, int(str(row["merged_groups"]))))
            for name, row in exact.items()
        }
        for kind in PASSES:
            variants = {name: Variant(calls[name][kind], nullcontext) for name in exact}
            share = seconds / len(PASSES)
            timings = interleave(variants, self.clock, self.args.reps, share)
            self.rows += (exact[n] | figures(kind, t, timings) for n, t in timings.items())

    def note(self, conv: Conv, note: str, ok: bool | str) -> None:
        self.rows.append(self._row_head(conv) | {"note": note, "ok": ok})

    def _merges(self, conv: Conv) -> dict[str, int]:
        return merges(STAGES[conv.stage][0] // 4, conv.groups)

    def _row_head(self, conv: Conv) -> dict[str, object]:
        channels, size = STAGES[conv.stage]
        return dict.fromkeys(COLUMNS, "") | self.environment | {
            "stage": conv.stage, "kernel": conv.kernel, "groups": conv.groups,
            "channels_in": channels, "channels_out": channels // 4, "size": size,
            "batch": self.args.batch, "dtype": conv.dtype, "layout": conv.layout,
            "cudnn_benchmark": conv.benchmark, "clock": self.clock.name,
        }  # fmt: skip

    def _row(self, conv: Conv, merge: str, merged: int) -> dict[str, object]:
        key = (conv.stage, conv.kernel, merged)
        if key not in self._errors:
            self._errors[key] = exact_error(conv, merged, self.device)
        error = self._errors[key]
        ok = error <= EXACT
        return self._row_head(conv) | {
            "merge": merge, "merged_groups": merged, "exact_error": error, "ok": ok,
            "note": "" if ok else "WRONG: the merge isn't exact, so it isn't timed",
        }  # fmt: skip

    def _tensors(self, conv: Conv, merged: int) -> tuple[Tensor, Tensor, Tensor, int]:
        dtype = torch.float32 if conv.dtype == "tf32" else getattr(torch, conv.dtype)
        last = conv.layout == "channels_last"
        memory_format = torch.channels_last if last else torch.contiguous_format
        x, weight, grad = noise(conv, self.args.batch, self.device)
        weight = merge_weight(weight, conv.groups, merged)
        placed = (t.to(dtype, memory_format=memory_format) for t in (x, weight, grad))
        return *placed, merged


def figures(kind: str, timing: Timing, timings: dict[str, Timing]) -> dict[str, object]:
    """The columns that follow from one pass's timings."""
    return {
        "pass": kind, "ms_p20": timing.p20, "ms_p50": timing.p50, "ms_p80": timing.p80,
        "samples": timing.samples, "vs_as_is": timings["as_is"].p50 / timing.p50,
        "tie": timing.ties(timings["as_is"]),
    }  # fmt: skip


def noise(conv: Conv, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded input, grouped weight and gradient of the output."""
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


def exact_error(conv: Conv, merged: int, device: torch.device) -> float:
    """How far the merged convolution and its gradients are from the grouped, relative, float64."""
    x, weight, grad = (t.double() for t in noise(conv, 1, device))
    grouped = passes(x, weight, grad, conv.groups)
    other = passes(x, merge_weight(weight, conv.groups, merged), grad, merged)
    errors = []
    for kind in PASSES:
        true, result = grouped[kind](), other[kind]()
        if kind == "wgrad":
            result = unmerge_weight(result, conv.groups, merged)
        errors.append(((result - true).abs().max() / true.abs().max()).item())
    return max(errors)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=positive_int, default=32)
    parser.add_argument("--quick", action="store_true", help="a few small ones, to see it work")
    add_shared(parser, 600.0, "what isn't reached by then is recorded as skipped")
    args = parser.parse_args(argv)
    finish_shared(parser, args)
    args.reps = 20
    if args.quick:
        args.batch, args.reps = 1, 5
    return args


def run(args: argparse.Namespace) -> int:
    deadline = time.perf_counter() + args.seconds
    cuda = args.device.type == "cuda"
    dtypes = ("float16", "bfloat16", "tf32") if cuda else ("float32", "bfloat16")
    stages, dtypes = (("S4",), dtypes[:1]) if args.quick else (tuple(STAGES), dtypes)
    convs = plan(stages, dtypes, cuda)
    if not cuda:
        torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    for i, conv in progress(convs, "case", lambda conv: " ".join(map(str, conv))):
        left = deadline - time.perf_counter()
        try:
            if left > 0:
                bench.measure(conv, left / (len(convs) - i))
            else:
                bench.note(conv, "skipped: out of time", "")
        except RuntimeError as error:  # what a library doesn't support must not end the rest
            bench.note(conv, f"{type(error).__name__}: {error}"[:300], False)
        if i % 16 == 0 or i + 1 == len(convs):
            write_csv(args.out / "conv_cost.csv", bench.rows, COLUMNS)
    print(best_merges(bench.rows))
    skipped = sum(str(row["note"]).startswith("skipped") for row in bench.rows)
    print(f"{len(convs) - skipped} of {len(convs)} settings measured within --seconds")
    return 1 if any(row["ok"] is False for row in bench.rows) else 0


def best_merges(rows: Sequence[dict[str, object]]) -> str:
    """One line per convolution: what it takes as it is, and the merge that beats that, if any."""
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
