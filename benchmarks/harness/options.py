"""Command-line arguments that the benchmarks share. Every error names its argument."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from harness.machine import unseen_gpu
from harness.results import Results

DTYPES = ("float32", "float16", "bfloat16")


def add_shared(parser: argparse.ArgumentParser, seconds: float) -> None:
    """Add the group of --device, --threads, --seconds, --out and --append."""
    add = parser.add_argument_group("where, and for how long").add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU, else cpu")
    add("--threads", type=positive_int, help="CPU threads; default: 1 if the CPU is timed")
    seconds_help = f"what is not begun by then is recorded as skipped (default: {seconds:.0f})"
    add("--seconds", type=positive_float, default=seconds, help=seconds_help)
    add("--out", type=Path, default=Path("out"), help="folder of results.csv (default: out)")
    add("--append", action="store_true", help="keep the rows that results.csv holds")


def parse_shared(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, check --device, turn it into a torch.device, and set the number of threads."""
    args = parser.parse_args(argv)
    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and not has_cuda:
        parser.error(
            f"argument --device: cuda was asked for, but PyTorch finds no GPU here"
            f"{f'. {line}' if (line := unseen_gpu()) else ''}"
        )
    if args.device is None and (line := unseen_gpu()):
        print(line, file=sys.stderr)
    args.device = torch.device(args.device or ("cuda" if has_cuda else "cpu"))
    if threads := args.threads or (1 if args.device.type == "cpu" else None):
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # for all providers alike
    return args


def open_results(args: argparse.Namespace) -> Results:
    """Open results.csv in the folder of --out, or end with one line that says why it can't."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        return Results(args.out / "results.csv", args.append)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        print(
            f"argument --out: must be a folder that can be written, got {args.out}: {reason}",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value
