"""Arguments that the benchmarks share; every error names its argument."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

SKIPPED = 77  # the exit status of a script that finds it can't run here


def add_shared(parser: argparse.ArgumentParser, seconds: float, what_seconds_do: str) -> None:
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda if there is one, else cpu"
    )
    parser.add_argument(
        "--seconds", type=positive_float, default=seconds,
        help=f"{what_seconds_do}; default {seconds:.0f}",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out"), help="the folder for all files")


def finish_shared(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check what one argument alone can't say, and make ``device`` a device."""
    has_cuda = torch.cuda.is_available()
    args.device = torch.device(args.device or ("cuda" if has_cuda else "cpu"))
    if args.device.type == "cuda" and not has_cuda:
        parser.error("argument --device: cuda was asked for, but PyTorch finds no GPU here")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: must be a folder, but {args.out} is a file")


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value
