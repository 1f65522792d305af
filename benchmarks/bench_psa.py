"""Time the PSA tail, module or network by every provider: a table, a CSV file and plots.

    python benchmarks/bench_psa.py                               # the tail, in float32 at batch 8
    python benchmarks/bench_psa.py --scope network --batch 1
    python benchmarks/bench_psa.py --shape 4 128 40 40           # your own size
    python benchmarks/bench_psa.py --model package.module:function --shape 1 3 224 224
    python benchmarks/bench_psa.py compare before.csv after.csv  # what got faster or slower

Each result is compared with the float64 oracle. A result whose error is over its bound is not
timed. All providers of a case are timed in turns in one process.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Otherwise the profiler that measures memory prints a line on stderr at each start.
os.environ.setdefault("KINETO_LOG_LEVEL", "10")

import torch
from harness import compare
from harness.cases import MEMORY_FORMATS, MODES, SCOPES, STAGES, Case, Source
from harness.networks import baseline_of
from harness.options import DTYPES, add_shared, open_results, parse_shared, positive_int
from harness.providers import PROVIDERS, defaults
from harness.results import OUT_OF_TIME, Results, results_table
from harness.runner import Runner
from torch import nn

import epsanet_fused as ef
from epsanet_fused.nn.psa import CONV_GROUPS, CONV_KERNELS
from epsanet_fused.utils.progress import progress


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what is computed").add_argument
    scopes = "; ".join(f"{name}: {about}" for name, about in SCOPES.items())
    add("--scope", choices=SCOPES, help=f"{scopes} (default: tail, or network with --model)")
    modes = "; ".join(f"{name}: {about}" for name, about in MODES.items())
    modes += " (default: inference; training for --scope norm)"
    add("--mode", choices=MODES, nargs="+", metavar="MODE", help=modes)
    stages_help = "stages of EPSANet-50, for all scopes but network (default: S1 S2 S3 S4)"
    add("--stages", choices=STAGES, nargs="+", metavar="STAGE", help=stages_help)
    add("--batch", type=positive_int, nargs="+", metavar="B", help="samples a call (default: 8)")
    dtypes = f"dtypes, of {', '.join(DTYPES)} (default: float32)"
    add("--dtype", choices=DTYPES, nargs="+", default=["float32"], metavar="DTYPE", help=dtypes)
    formats = (*MEMORY_FORMATS, "best")
    format_help = f"of {', '.join(formats)}; best: the faster one of each provider (default: nchw)"
    add("--memory-format", choices=formats, nargs="+", default=["nchw"], metavar="FORMAT",
        help=format_help)  # fmt: skip
    cache_help = "cold: empty the last-level cache before each call (default: warm)"
    add("--cache", choices=("warm", "cold"), nargs="+", default=["warm"], help=cache_help)
    input_help = (
        "photos: activations of EPSANet-50 for two photographs; randn: noise "
        "(default: photos, or randn with --shape, --kernels, --groups or --model)"
    )
    add("--input", choices=("photos", "randn"), help=input_help)

    add = parser.add_argument_group("your own size and network").add_argument
    shape_help = "size of the input, in the place of --stages and --batch"
    add("--shape", type=positive_int, nargs=4, metavar=("B", "C", "H", "W"), help=shape_help)
    add("--kernels", type=positive_int, nargs=4, metavar="K", default=CONV_KERNELS,
        help="kernel sizes of the four convolutions (default: 3 5 7 9)")  # fmt: skip
    add("--groups", type=positive_int, nargs=4, metavar="G", default=CONV_GROUPS,
        help="groups of the four convolutions (default: 1 4 8 16)")  # fmt: skip
    model_help = "a function without arguments that returns a network with PSA modules"
    add("--model", metavar="MODULE:FUNCTION", help=model_help)

    add = parser.add_argument_group("which code runs").add_argument
    provider_help = "see --list-providers (default: all that can run here)"
    add("--providers", nargs="+", metavar="NAME", help=provider_help)
    plan_help = "JSON file of convolution plans, to read and to extend (default: none)"
    add("--plan-file", type=Path, metavar="FILE", help=plan_help)
    add("--list-providers", action="store_true", help="print the providers and stop")
    add("--list-cases", action="store_true", help="print the cases that would be timed and stop")

    add = parser.add_argument_group("how it is measured").add_argument
    reps_help = "largest number of samples of a timing (default: 200)"
    add("--reps", type=positive_int, default=200, help=reps_help)
    pairs_help = (
        "time each provider against the first as soon as it is ready, instead of all together"
    )
    add("--pairs", action="store_true", help=pairs_help)
    prepare_help = "compile what would be timed, and measure nothing: fills the caches on disk"
    add("--prepare-only", action="store_true", help=prepare_help)
    add("--trace", action="store_true", help="write a torch.profiler trace of each provider's call")
    add("--no-plot", action="store_true", help="write no PNG files")
    add_shared(parser, 100.0)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = make_parser()
    args = parse_shared(parser, argv)
    args.scope = args.scope or ("network" if args.model else "tail")
    args.mode = args.mode or ["training" if args.scope == "norm" else "inference"]
    args.kernels, args.groups = tuple(args.kernels), tuple(args.groups)
    args.own_convs = (args.kernels, args.groups) != (CONV_KERNELS, CONV_GROUPS)
    own = bool(args.shape or args.model or args.own_convs)
    has_photos = importlib.util.find_spec("sklearn") is not None
    if args.input == "photos" and own:
        parser.error("argument --input: photos are for the stages of EPSANet-50, not for your own")
    if args.input is None and not own and not has_photos:
        print(
            "scikit-learn has the photographs and isn't installed: --input randn", file=sys.stderr
        )
    if args.input == "photos" and not has_photos:
        parser.error("argument --input: photos needs scikit-learn, which isn't installed")
    args.input = args.input or ("photos" if has_photos and not own else "randn")
    check_scope(parser, args)
    check_size(parser, args)
    args.build = load_model(parser, args.model) if args.model else None
    check_providers(parser, args)
    return args


def check_scope(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what --scope cannot measure."""
    if args.scope != "tail" and "backward" in args.mode:
        parser.error("argument --mode: backward by itself is timed for --scope tail only")
    if args.scope == "norm" and args.mode != ["training"]:
        parser.error("argument --mode: --scope norm is for training")
    if args.scope in ("tail", "norm") and "best" in args.memory_format:
        parser.error("argument --memory-format: best is for --scope module and network")
    if args.model and args.scope != "network":
        parser.error(f"argument --model: is for --scope network, got {args.scope}")
    if args.stages and (args.shape or args.scope == "network"):
        other = "--shape" if args.shape else "--scope network"
        parser.error(f"argument --stages: can't be combined with {other}")


def check_size(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse kernels, groups and shapes that no PSA module has; set batch and cases."""
    args.cases = args.stages or list(STAGES)
    if args.batch and args.shape:
        parser.error("argument --batch: can't be combined with --shape, which has it")
    args.batch = args.shape[:1] if args.shape else args.batch or [8]
    if args.scope == "network" and args.own_convs:
        parser.error("argument --kernels, --groups: are for --scope tail, norm and module")
    if args.shape:
        args.cases = ["x".join(map(str, args.shape[1:]))]
    if args.scope == "network":
        own = (args.model, *args.cases) if args.shape else (args.model,)
        args.cases = [" ".join(filter(None, own)) or "all"]
    if args.own_convs:  # a row says what it is of
        kernels, groups = ("-".join(map(str, sizes)) for sizes in (args.kernels, args.groups))
        args.cases = [f"{case} kernels {kernels} groups {groups}" for case in args.cases]
    if args.shape and args.scope == "network" and not args.model and args.shape[1] != 3:
        parser.error(f"argument --shape: C must be 3 for EPSANet-50, got {args.shape[1]}")
    if args.scope != "network":
        channels = args.shape[1] if args.shape else min(STAGES[s][0] for s in args.stages or STAGES)
        try:
            ef.PSAModule(channels, channels, args.kernels, 1, args.groups)
        except ValueError as error:
            parser.error(f"argument --shape, --kernels, --groups: {error}")


def load_model(parser: argparse.ArgumentParser, name: str) -> Callable[[], nn.Module]:
    """Import the function of --model, and check what it returns."""
    module, colon, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        build = getattr(importlib.import_module(module), function) if colon else None
        model = build() if callable(build) else None
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        message = " ".join(str(error).split())
        parser.error(f"argument --model: {name}: {type(error).__name__}: {message}")
    if not isinstance(model, nn.Module):
        parser.error(
            f"argument --model: must be MODULE:FUNCTION, a function that returns a network, got "
            f"{name}{f', which returns a {type(model).__name__}' if callable(build) else ''}"
        )
    try:
        ef.fuse(model)
    except ValueError as error:
        parser.error(f"argument --model: {name}: {error}")
    return build


def check_providers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse unknown providers and those of other scopes; set the default."""
    for name in args.providers or ():
        if name not in PROVIDERS:
            parser.error(f"argument --providers: must be of {', '.join(PROVIDERS)}, got {name!r}")
        if not any(PROVIDERS[name].fits(args.scope, mode) for mode in args.mode):
            parser.error(
                f"argument --providers: {name} is for --scope {' '.join(PROVIDERS[name].scopes)} "
                f"and --mode {' '.join(PROVIDERS[name].modes)}"
            )
        if args.model and baseline_of(name):
            parser.error(f"argument --providers: {name} isn't for --model")
    args.providers = list(dict.fromkeys(args.providers or ())) or [
        name
        for name in defaults(args.device, args.scope, args.mode)
        if not (args.model and baseline_of(name))
    ]


def sweep(args: argparse.Namespace) -> list[Case]:
    """Return every case, dtype by dtype and batch by batch."""
    points = itertools.product(args.mode, args.dtype, args.batch, args.memory_format, args.cases)
    return [
        Case(args.scope, mode, case, batch, dtype, memory_format)
        for mode, dtype, batch, memory_format, case in points
    ]


def make_runner(args: argparse.Namespace, results: Results) -> Runner:
    """Return the runner of these arguments."""
    source = Source(
        args.device,
        args.input,
        dict.fromkeys(filter(None, map(baseline_of, args.providers))),
        args.plan_file,
        args.kernels,
        args.groups,
        tuple(args.shape[1:]) if args.shape else Source.image_shape,
        args.build,
    )
    trace = args.out if args.trace else None
    return Runner(source, args.providers, args.cache, results, args.reps, args.pairs, trace)


def run(args: argparse.Namespace) -> int:
    """Measure every case, write the files and print the table; return the exit status."""
    began = time.perf_counter()
    args.append |= args.prepare_only  # or results.csv would lose its rows
    results = open_results(args)
    runner, cases = make_runner(args, results), sweep(args)
    for i, case in progress(cases, "case", lambda case: " ".join(map(str, case))):
        left = args.seconds - (time.perf_counter() - began)
        if args.prepare_only:
            runner.prepare_only(case, began + args.seconds)
        elif left <= 0 and i > 0:
            results.add(runner.row(case, "all") | {"note": OUT_OF_TIME})
        else:
            runner.measure(case, left / (len(cases) - i), left)
    if args.prepare_only:
        return 0
    shown = [row for row in results.rows if row["provider"] != "all"]
    print(results_table(shown) if shown else "nothing was measured")
    for line in notes(runner, results.rows):
        print(line)
    files = ["results.csv"]
    if not args.no_plot:
        files += draw(args.out)
    print(f"{time.perf_counter() - began:.0f} s; written to {args.out}: {', '.join(files)}")
    return 1 if any(row["ok"] is False for row in results.rows) else 0


def draw(out: Path) -> list[str]:
    """Draw the pictures of results.csv; return their names, or why there are none."""
    if importlib.util.find_spec("matplotlib") is None or importlib.util.find_spec("pandas") is None:
        return ["no PNG, which needs matplotlib and pandas"]
    from plots import draw_all

    return [path.name for path in draw_all([out / "results.csv"], out)]


def notes(runner: Runner, rows: Sequence[dict[str, object]]) -> list[str]:
    """Return the lines below the table: the machine, and each provider without a timing."""
    env, device = runner.environment, runner.device
    clocks = " and ".join(clock.name for clock in runner.clocks.values())
    lines = [
        f"{env['device']}, {env['threads']} thread(s), torch {env['torch']}; {clocks}; "
        f"input {runner.source.input}; error against the float64 oracle"
    ]
    if {str(r["backend"]) for r in rows if r["provider"] == "fused" and r["ok"]} == {"reference"}:
        lines.append(
            f"fused: no compiled backend runs on {device.type} here, so it is plain PyTorch "
            f"behind the operator; expect 'cleaned' plus the operator's own cost"
        )
    lines += [f"skipped {name}: {reason}" for name, reason in runner.skipped.items()]
    for row in rows:
        if row["note"]:
            kind = "FAILED " if row["ok"] is False else ""
            point = " ".join(str(row[key]) for key in ("mode", "case", "batch", "dtype"))
            lines.append(f"{kind}{point} {row['provider']}: {row['note']}")
    return list(dict.fromkeys(lines))


def list_providers(device: torch.device) -> str:
    """Return a line for each provider: its scopes, and why it can't run here if it can't."""
    lines = []
    for name, provider in PROVIDERS.items():
        reason = provider.unavailable_reason(device)
        unavailable = f" [not here: {reason}]" if reason else ""
        lines.append(f"{name}: {provider.about} ({', '.join(provider.scopes)}){unavailable}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["compare"]:
        return compare.main(arguments[1:])
    args = parse(arguments)
    if args.list_providers:
        print(list_providers(args.device))
        return 0
    if args.list_cases:
        print("\n".join(" ".join(map(str, case)) for case in sweep(args)))
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
