"""Types for argparse that the recipes share. Each error names the value and the accepted range."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return a parser for an integer from low to high, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be an integer of {low} to {high}, got {text!r}")
        return value

    return parse


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def fraction(text: str) -> float:
    """Parse a number in [0, 1)."""
    if not 0 <= (value := _number(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of 0 to below 1, got {text!r}")
    return value


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    if not 0 < (value := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def non_negative(text: str) -> float:
    """Parse a finite number of at least 0."""
    if not 0 <= (value := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def device(text: str) -> torch.device:
    """Parse a device that supports float64, the dtype in which the recipes sum losses."""
    try:
        torch.zeros(1, device=text, dtype=torch.float64)
        return torch.device(text)
    except Exception as error:  # each device type raises an exception type of its own
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"can't use {text!r} here: {reason}") from None


def folder(text: str) -> Path:
    """Parse a folder to write into; create it if it is missing."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"can't make the folder {text!r}: {error}") from None
    return path


def existing_file(text: str) -> Path:
    """Parse the path of an existing file."""
    if not (path := Path(text)).is_file():
        raise argparse.ArgumentTypeError(f"must be a file, got {text!r}, which is none")
    return path


def existing_folder(text: str) -> Path:
    """Parse the path of an existing folder."""
    if not (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, got {text!r}, which is none")
    return path
