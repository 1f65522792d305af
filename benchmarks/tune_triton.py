"""Time other entries of the Triton kernels' table, each against the present one.

    python benchmarks/tune_triton.py --out out

backends/triton/config.py determines how the kernels are cut into programs. This tries other values
of each entry and times the whole tail (its forward, its backward, and psa_tail_norm in training) in
CUDA graphs. The provider of a row is the entry with its value: of SUM the tile, the tile of
products, the pixels and the warps. ``speedup`` is that over "triton", the present table;
``max_error`` is the largest difference from its results, relative to the largest of them. From
batch 2 on the cache is cold. Entries on which no kernel of a case depends are left out.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager

import torch
from harness.cases import MEMORY_FORMATS, STAGES, Case, Source, Workload, shape_of
from harness.clock import make_clock
from harness.machine import describe
from harness.options import DTYPES, add_shared, open_results, parse_shared, positive_int
from harness.providers import PROVIDERS, graphed
from harness.results import OUT_OF_TIME, WRONG, failure, results_table, timing_columns
from harness.steps import Step
from torch import Tensor
from triton.runtime.errors import TritonError

import epsanet_fused as ef
from epsanet_fused.backends.triton import common, config
from epsanet_fused.utils import timing
from epsanet_fused.utils.progress import progress

Entry = tuple[str, object]  # an attribute of config, and a value of it
Row = dict[str, object]
PRESENT = "triton"  # the provider of the present table
WRITES = ((2, 1, 1), (2, 1, 2), (1, 1, 0.5), (4, 1, 2), (0.5, 1, 0.5), (4, 1, 4), (1, 1, 2))
FACTORS = {  # for the fields of each row
    "SUM": (
        (2, 2, 1, 2), (0.5, 0.5, 1, 0.5), (0.5, 0.5, 1, 1), (2, 2, 1, 1), (1, 1, 1, 2),
        (1, 1, 0.25, 1), (1, 1, 0.125, 1), (1, 1, 0.5, 1), (1, 1, 2, 1), (1, 1, 1, 0.5),
    ),
    "RECALIBRATE": WRITES,
    "NORMALIZE": WRITES,
}  # fmt: skip
NUMBERS = {
    "SPLIT_PROGRAMS": (1024, 2048, 256),
    "LARGE_BRANCH": (1 << 20, 1 << 22),
    "FUSED_GATE_BYTES": (0, 64 * 1024, 256 * 1024, 512 * 1024),
}
MAX_DIFFERENCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2}
REPS, SECONDS = 40, 1.0  # for the timing of one case


def entries(case: Case) -> dict[str, Entry]:
    """Return the entries that cut the kernels of a case in different ways, the present first."""
    found: dict[str, Entry] = {PRESENT: ("SUM", config.SUM)}
    for table, factors in FACTORS.items():
        rows = getattr(config, table)
        for (row, present), by in itertools.product(rows.items(), factors):
            value = type(present)(*(int(a * b) for a, b in zip(present, by, strict=True)))
            name = f"{PRESENT} {table} {row}: {' x '.join(map(str, value))}"
            found[name] = (table, rows | {row: value})
    for number, values in NUMBERS.items():
        found |= {f"{PRESENT} {number}: {value}": (number, value) for value in values}
    first_of: dict[object, str] = {}
    for name, entry in found.items():
        with running(case, entry):
            first_of.setdefault(division(case), name)
    return {name: found[name] for name in first_of.values()}


def division(case: Case) -> object:
    """Return how the kernels of a case are cut into programs by the table."""
    channels, height, width = shape_of(case.case)
    C, HW, last = channels // 4, height * width, case.memory_format == "channels_last"
    sizes = (case.batch, 4, C, HW, case.torch_dtype.itemsize, last, case.mode != "inference")
    sums = [config.sum_config(*sizes, common.INTERPRETED, may_fuse) for may_fuse in (True, False)]
    is_norm = case.scope == "norm"
    write = config.normalize_config if is_norm else config.recalibrate_config
    written = write(C, HW, last, common.INTERPRETED)
    # Of a dense NCHW tensor each sample is one run of memory.
    return *sums[: 1 + is_norm], written[1:] if last else (written.block, written.warps)


@contextmanager
def running(case: Case, entry: Entry) -> Iterator[None]:
    """Run a case by the triton backend under an entry; restore the one before at the end."""
    name, value = entry
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        with ef.use_backend("triton"), torch.set_grad_enabled(case.mode != "inference"):
            yield
    finally:
        setattr(config, name, before)


def prepare(case: Case, workload: Workload, entry: Entry) -> tuple[Step, list[Tensor]]:
    """Return a step, in a CUDA graph on a GPU, and its results."""
    make = PROVIDERS["triton"].prepare
    if workload.inputs[0].is_cuda:
        make = functools.partial(graphed, make)
    with running(case, entry):
        step = make(workload, case).step
        for result in step():  # what a kernel does not write must not look right
            result.fill_(torch.nan)
        return step, [result.clone() for result in step()]


def compile_ahead(case: Case, device: torch.device, entry: Entry) -> None:
    """Run a case once, in another process: this fills Triton's cache on disk."""
    with running(case, entry):
        PROVIDERS["triton"].prepare(workload_of(case, device), case).step()


@functools.lru_cache(maxsize=1)  # a worker compiles the entries of a case one after another
def workload_of(case: Case, device: torch.device) -> Workload:
    return Source(device, "randn").workload(case)


def difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference relative to the largest element; NaN if there is one."""
    pairs = zip(results, expected, strict=True)
    found = [((r - e).abs().max() / e.abs().max()).float() for r, e in pairs]
    return torch.stack(found).max().item()


def measure(case: Case, args: argparse.Namespace, about: Row) -> list[Row]:
    """Compare each entry with the present table and time the right ones; return their rows."""
    on_gpu, tried = args.device.type == "cuda", entries(case)
    # With a warm cache a graph is so short that the host is slower than the device.
    cold = on_gpu and case.batch > 1
    clock = make_clock(args.device, True) if cold else timing.make_clock(args.device, queued=True)
    about = about | {"cache": "cold" if cold else "warm", "clock": clock.name, "backend": "triton"}
    workload = workload_of(case, args.device)
    rows, variants, expected = [], {}, []
    for name, entry in tried.items():
        rows.append(about | {"provider": name})
        try:
            step, results = prepare(case, workload, entry)
        except (RuntimeError, TritonError) as error:  # for example, too many registers
            if name == PRESENT:
                raise
            rows[-1] |= failure(error) | {"ok": ""}
            continue
        expected = expected or results
        error, bound = difference(results, expected), MAX_DIFFERENCE[case.dtype]
        rows[-1] |= {"max_error": error, "error_bound": bound, "ok": error <= bound}
        if error <= bound:
            variants[name] = timing.Variant(step, functools.partial(running, case, entry))
        else:
            rows[-1]["note"] = WRONG
    timings = timing.interleave(variants, clock, args.reps, SECONDS)
    for row in rows:
        if row["provider"] in timings:
            row |= timing_columns(timings[row["provider"]], timings[PRESENT])
    return rows


def plan(args: argparse.Namespace) -> list[Case]:
    """Return all cases, dtype by dtype and batch by batch. A batch of one is for inference only."""
    uses = (("tail", "inference"), ("tail", "backward"), ("norm", "training"))
    points = itertools.product(args.dtype, args.batch, args.stages, uses, args.memory_format)
    return [
        Case(*use, stage, batch, dtype, memory_format)
        for dtype, batch, stage, use, memory_format in points
        if batch > 1 or use == uses[0]
    ]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stages", choices=STAGES, nargs="+", default=list(STAGES), help="(default: all)")
    add("--batch", type=positive_int, nargs="+", default=[128, 1, 32], help="(default: 128 1 32)")
    add("--dtype", choices=DTYPES, nargs="+", default=["float16"], help="(default: float16)")
    add("--memory-format", choices=MEMORY_FORMATS, nargs="+", default=list(MEMORY_FORMATS))
    prepare_help = "compile the entries of all cases in processes, and measure nothing"
    add("--prepare-only", action="store_true", help=prepare_help)
    add("--quick", action="store_true", help=argparse.SUPPRESS)  # a test with interpreted kernels
    add_shared(parser, 150.0)
    args = parse_shared(parser, argv)
    if args.device.type != "cuda" and not args.quick:
        parser.error("argument --device: the time of interpreted kernels says nothing about a GPU")
    args.stages, args.reps = (["64x3x3"], 1) if args.quick else (args.stages, REPS)
    return args


def prepare_all(args: argparse.Namespace) -> int:
    """Compile the entries of one case after another in other processes until the time is over."""
    with ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as workers:
        tasks = [
            workers.submit(compile_ahead, case, args.device, entry)
            for case in plan(args)
            for entry in entries(case).values()
        ]
        done, _ = wait(tasks, timeout=args.seconds)
        print(f"{len(done)} of {len(tasks)} entries compiled")
        workers.shutdown(cancel_futures=True)
    return 0


def run(args: argparse.Namespace) -> int:
    """Measure one case after another and print the faster entries; return the exit status."""
    if args.prepare_only:
        return prepare_all(args)
    deadline, results = time.perf_counter() + args.seconds, open_results(args)
    environment = describe(args.device) | {"provider": PRESENT, "input": "randn"}
    for _, case in progress(plan(args), "case", lambda case: " ".join(map(str, case))):
        about = case._asdict() | environment | {"scope": f"tune {case.scope}"}
        rows = [about | {"note": OUT_OF_TIME}]
        try:
            if time.perf_counter() < deadline:
                rows = measure(case, args, about)
        except (RuntimeError, TritonError) as error:  # for example, for lack of memory
            rows = [about | failure(error)]
        for row in rows:
            results.add(row)
        gc.collect()  # the tensors of the graphs
    faster = [row for row in results.rows if row["tie"] is False and row["speedup"] > 1]
    print(results_table(faster) if faster else "no other entry is faster")
    return 1 if any(row["ok"] is False for row in results.rows) else 0


if __name__ == "__main__":
    sys.exit(run(parse()))
