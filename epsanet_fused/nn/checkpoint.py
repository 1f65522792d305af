"""Checkpoints in the official layout."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint of the official training script, or a bare state_dict, into ``model``.

    The official layout is ``{'epoch', 'arch', 'state_dict', 'best_prec1', 'optimizer'}`` with
    ``module.`` before each key; zip and legacy files are read, onto the CPU, with
    ``weights_only=True``.

    Args:
        model: its keys and shapes must be the checkpoint's; it is changed only if all of them are.
        path: the file.

    Returns:
        What else the checkpoint held: ``{'epoch': ..., 'arch': ...}``; empty for a bare state_dict.

    Raises:
        ValueError: if the file holds no state_dict, or one that doesn't fit; it names the keys.
    """
    state, rest = read_checkpoint(path)
    # Compared first: load_state_dict would copy what fits before it complains of what doesn't.
    check_fit(model.state_dict(), state, path)
    model.load_state_dict(state)
    return rest


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict in a file that ``load_checkpoint`` takes, without ``module.``, and the rest.

    Raises:
        ValueError: if the file holds no state_dict.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"load_checkpoint: {os.fspath(path)} must hold a dict, got {type(checkpoint).__name__}"
        )
    rest = {k: v for k, v in checkpoint.items() if k != "state_dict"}
    state = checkpoint.get("state_dict")
    if state is None:
        state, rest = checkpoint, {}
    if not _is_state_dict(state):
        raise ValueError(
            f"load_checkpoint: {os.fspath(path)} must hold a state_dict, alone or under the key "
            f"'state_dict'; found the keys {sorted(map(str, checkpoint))[:8]}"
        )
    state = {k.removeprefix("module."): v for k, v in state.items()}
    return state, rest


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def check_fit(
    own: dict[str, Tensor], given: dict[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Refuse a state_dict whose keys or shapes are not ``own``, with a ValueError."""
    problems = [f"missing {k}" for k in own if k not in given]
    problems += [f"unexpected {k}" for k in given if k not in own]
    problems += [
        f"{k} is {tuple(given[k].shape)}, the model's {tuple(own[k].shape)}"
        for k in own
        if k in given and own[k].shape != given[k].shape
    ]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(
            f"load_checkpoint: {os.fspath(path)} does not fit the model: "
            f"{'; '.join(problems[:6])}{more}"
        )
