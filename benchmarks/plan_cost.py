"""Time the plans of EPSANet-50's grouped convolutions, and write a file of the fastest ones.

    python benchmarks/plan_cost.py --out out

The candidates are those of ``plan_convs``: merged groups, tiled pixels, both memory formats. A
convolution's rows (results.csv, scope "conv") and its plan (plans.json) are written as soon as it
is measured: all of inference first, then training. ``bench_psa.py --plan-file`` and
``optimize_for_inference(plan_file=...)`` read the plans.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from harness.cases import MEMORY_FORMATS
from harness.machine import describe
from harness.networks import IMAGE_SIZE
from harness.options import DTYPES, add_shared, open_results, parse_shared, positive_int
from harness.results import OUT_OF_TIME, failure, results_table, timing_columns

import epsanet_fused as ef
from epsanet_fused.inference.conv_planner import (
    ConvProblem,
    choose,
    find_problems,
    time_candidates,
)
from epsanet_fused.inference.plan_file import read_plans, write_plans
from epsanet_fused.nn.grouped_conv import ConvPlan
from epsanet_fused.utils.memory_format import memory_format_name
from epsanet_fused.utils.progress import progress
from epsanet_fused.utils.timing import Timing, make_clock


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--batch", type=positive_int, nargs="+", default=[128], help="(default: 128)")
    add("--dtype", choices=DTYPES, default="float16", help="(default: float16)")
    format_help = "of the network (default: channels_last)"
    add("--memory-format", choices=MEMORY_FORMATS, default="channels_last", help=format_help)
    uses = ("inference", "training")
    add("--mode", choices=uses, nargs="+", default=["inference"], help="(default: inference)")
    size_help = f"height and width of the images (default: {IMAGE_SIZE})"
    add("--image-size", type=positive_int, default=IMAGE_SIZE, help=size_help)
    plan_help = "of the fastest plans, to read and to extend (default: plans.json in --out)"
    add("--plan-file", type=Path, metavar="FILE", help=plan_help)
    add_shared(parser, 300.0)
    return parse_shared(parser, argv)


def problems(args: argparse.Namespace, mode: str, batch: int) -> dict[ConvProblem, str]:
    """Return the different problems of EPSANet-50, each with the name of its first convolution."""
    training = mode == "training"
    mixed = training and args.dtype != "float32"
    weights = torch.float32 if mixed else getattr(torch, args.dtype)
    model = ef.epsanet50().to(args.device, weights).train(training)
    shape = (batch, 3, args.image_size, args.image_size)
    images = torch.randn(shape, device=args.device, dtype=weights)
    memory_format = MEMORY_FORMATS[args.memory_format]
    with torch.autocast(args.device.type, getattr(torch, args.dtype), enabled=mixed):
        found = find_problems(
            model.to(memory_format=memory_format), images, memory_format, training
        )
    first: dict[ConvProblem, str] = {}
    for name, problem in found.items():
        first.setdefault(problem, name)
    return first


def point(problem: ConvProblem, name: str) -> dict[str, object]:
    """Return the columns that describe the problem."""
    sizes = f"{problem.shape[1]}x{problem.shape[2]}x{problem.shape[3]} to {problem.channels}"
    layer = f"kernel {problem.kernel[0]} stride {problem.stride[0]} groups {problem.groups}"
    return {
        "scope": "conv",
        "mode": "training" if problem.training else "inference",
        "case": f"{name} {sizes} {layer}",
        "batch": problem.shape[0],
        "dtype": str(problem.dtype).removeprefix("torch."),
        "memory_format": memory_format_name(problem.memory_format),
        "input": "randn",
        "cache": "warm",
        "clock": make_clock(problem.device).name,
    }


def plan_name(plan: ConvPlan) -> str:
    """Describe a plan."""
    tile = "x".join(map(str, plan.tile))
    return f"groups {plan.groups} tile {tile} {memory_format_name(plan.memory_format)}"


def rows_of(timings: Mapping[ConvPlan, Timing]) -> Iterator[dict[str, object]]:
    """Yield the columns of each plan."""
    first, chosen = next(iter(timings.values())), choose(timings)
    for plan, timing in timings.items():
        row = {"provider": plan_name(plan), "ok": True, "note": "chosen" if plan == chosen else ""}
        yield row | timing_columns(timing, first)


def run(args: argparse.Namespace) -> int:
    """Measure every convolution and write the files; return the exit status."""
    deadline = time.perf_counter() + args.seconds
    results, environment = open_results(args), describe(args.device)
    plan_file = args.plan_file or args.out / "plans.json"
    plans = read_plans(plan_file) if plan_file.exists() else {}
    todo = [
        item for mode in args.mode for batch in args.batch
        for item in problems(args, mode, batch).items()
    ]  # fmt: skip
    for _, (problem, name) in progress(todo, "convolution", lambda item: item[1]):
        about = environment | point(problem, name)
        if time.perf_counter() > deadline:
            results.add(about | {"note": OUT_OF_TIME})
            continue
        try:
            timings = time_candidates(problem)
        except RuntimeError as error:  # a library may not support a case: go on with the others
            results.add(about | failure(error))
            continue
        for row in rows_of(timings):
            results.add(about | row)
        plans[problem.key()] = choose(timings)
        write_plans(plan_file, plans)
    print(results_table(results.rows))
    return 0


if __name__ == "__main__":
    sys.exit(run(parse()))
