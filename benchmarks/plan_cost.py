"""Time the plans of EPSANet-50's grouped convolutions: a CSV file, and a file of the fastest plans.

    python benchmarks/plan_cost.py --out out

The candidates are those of ``plan_convs``: merged groups, tiled pixels, both memory formats. A
convolution's rows and its plan are written as soon as it is measured. ``bench_psa.py --plan-file``
and ``optimize_for_inference(plan_file=...)`` read the plans.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from environment import describe
from inputs import IMAGE_SIZE, MEMORY_FORMATS
from options import DTYPES, add_shared, parse_shared, positive_int
from report import MACHINE, OUT_OF_TIME, failure, timing_columns, write_csv

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
from epsanet_fused.utils.timing import Timing

COLUMNS = (
    "use", "batch", "conv", "channels_in", "channels_out", "size", "kernel", "stride", "groups",
    "dtype", "layout", "merged_groups", "tile", "conv_layout", "chosen", "ms_p20", "ms_p50",
    "ms_p80", "samples", "vs_as_is", "tie", "note", *MACHINE,
)  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--batch", type=positive_int, nargs="+", default=[128])
    add("--dtype", choices=DTYPES, default="float16")
    add("--memory-format", choices=tuple(MEMORY_FORMATS), default="channels_last")
    add("--use", choices=("inference", "training"), nargs="+", default=["inference"])
    add_shared(parser, 300.0, "convolutions not begun by then are recorded as skipped")
    return parse_shared(parser, argv)


def problems(args: argparse.Namespace, use: str, batch: int) -> dict[ConvProblem, str]:
    """Return the different problems of EPSANet-50, each with the name of its first convolution."""
    training = use == "training"
    mixed = training and args.dtype != "float32"
    weights = torch.float32 if mixed else getattr(torch, args.dtype)
    model = ef.epsanet50().to(args.device, weights).train(training)
    images = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=args.device, dtype=weights)
    memory_format = MEMORY_FORMATS[args.memory_format]
    with torch.autocast(args.device.type, getattr(torch, args.dtype), enabled=mixed):
        found = find_problems(
            model.to(memory_format=memory_format), images, memory_format, training
        )
    first: dict[ConvProblem, str] = {}
    for name, problem in found.items():
        first.setdefault(problem, name)
    return first


def rows_of(timings: Mapping[ConvPlan, Timing]) -> list[dict[str, object]]:
    """Return a row for each candidate, without the shared columns."""
    plain, chosen = next(iter(timings.values())), choose(timings)
    return [
        {
            "merged_groups": plan.groups,
            "tile": "x".join(map(str, plan.tile)),
            "conv_layout": memory_format_name(plan.memory_format),
            "chosen": plan == chosen,
            "vs_as_is": plain.p50 / timing.p50,
            "tie": timing is not plain and timing.ties(plain),
            **timing_columns(timing),
        }
        for plan, timing in timings.items()
    ]


def shared_columns(problem: ConvProblem, name: str) -> dict[str, object]:
    """Return the columns that describe the problem."""
    return {
        "use": "training" if problem.training else "inference",
        "batch": problem.shape[0],
        "conv": name,
        "channels_in": problem.shape[1],
        "channels_out": problem.channels,
        "size": problem.shape[2],
        "kernel": problem.kernel[0],
        "stride": problem.stride[0],
        "groups": problem.groups,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "layout": memory_format_name(problem.memory_format),
    }


def run(args: argparse.Namespace) -> int:
    """Measure every convolution and write the files; return the exit status."""
    deadline = time.perf_counter() + args.seconds
    torch.backends.cudnn.benchmark = True
    args.out.mkdir(parents=True, exist_ok=True)
    plan_file, environment = args.out / "plans.json", describe(args.device)
    plans = read_plans(plan_file) if plan_file.exists() else {}
    todo = [
        item for batch in args.batch for use in args.use
        for item in problems(args, use, batch).items()
    ]  # fmt: skip
    rows: list[dict[str, object]] = []
    for _, (problem, name) in progress(todo, "convolution", lambda item: item[1]):
        about = dict.fromkeys(COLUMNS, "") | environment | shared_columns(problem, name)
        if time.perf_counter() > deadline:
            rows.append(about | {"note": OUT_OF_TIME})
            continue
        try:
            timings = time_candidates(problem)
        except RuntimeError as error:  # a library may not support a case: go on with the others
            rows.append(about | {"note": failure(error)["note"]})
            continue
        rows += [about | row for row in rows_of(timings)]
        plans[problem.key()] = choose(timings)
        write_plans(plan_file, plans)
        write_csv(args.out / "plan_cost.csv", rows, COLUMNS)
    write_csv(args.out / "plan_cost.csv", rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(run(parse()))
