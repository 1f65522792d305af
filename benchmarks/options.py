"""Command-line arguments that the benchmarks share. Every error names its argument."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

DTYPES = ("float32", "float16", "bfloat16")
SKIPPED = 77  # exit status of a script that cannot run on this machine


def add_shared(parser: argparse.ArgumentParser, seconds: float, seconds_help: str) -> None:
    """Add --device, --seconds and --out."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU, else cpu")
    seconds_help = f"{seconds_help}; default {seconds:.0f}"
    add("--seconds", type=positive_float, default=seconds, help=seconds_help)
    add("--out", type=Path, default=Path("out"), help="folder for all files")


def parse_shared(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, check --device and --out, and turn ``device`` into a torch.device."""
    args = parser.parse_args(argv)
    has_cuda = torch.cuda.is_available()
    args.device = torch.device(args.device or ("cuda" if has_cuda else "cpu"))
    if args.device.type == "cuda" and not has_cuda:
        parser.error("argument --device: cuda was asked for, but PyTorch finds no GPU here")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: must be a folder, but {args.out} is a file")
    return args


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
