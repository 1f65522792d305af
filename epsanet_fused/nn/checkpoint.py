"""Loading of checkpoints in the official layout."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

_MAX_PROBLEMS = 6  # so many misfits an error message names
# Where training scripts store the state_dict; the first one that is there counts. The last three
# are averages of the weights (EMA), as timm's scripts and others name them.
_STATE_DICT_KEYS = ("state_dict", "model", "state_dict_ema", "model_ema", "ema")


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint of the official training script, or a bare state_dict, into ``model``.

    The official layout is ``{'epoch', 'arch', 'state_dict', 'best_prec1', 'optimizer'}``, with the
    prefix ``module.`` on every key of the state_dict. The state_dict may also be that of a model
    that torch.compile or ``torch.optim.swa_utils.AveragedModel`` has wrapped, or stand under
    ``model``, ``state_dict_ema``, ``model_ema`` or ``ema``. The file is read onto the CPU with
    ``weights_only=True``; both of torch's file formats, zip and legacy, are accepted.

    Args:
        model: a model with exactly the keys and shapes of the checkpoint.
        path: the file.

    Returns:
        The other entries of the checkpoint, ``{'epoch': ..., 'arch': ...}``; empty for a bare
        state_dict.

    Raises:
        ValueError: if the file holds no state_dict, or one with other keys or shapes; the message
            names them, and ``model`` is not changed.
    """
    state, rest = read_checkpoint(path)
    # First, because load_state_dict copies the tensors that fit before it raises an error.
    check_fit(model.state_dict(), state, path)
    model.load_state_dict(state)
    return rest


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that ``load_checkpoint`` accepts.

    Returns:
        The state_dict without what wrappers add to its keys, and the other entries of the
        checkpoint.

    Raises:
        ValueError: if the file holds no state_dict.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"load_checkpoint: {os.fspath(path)} must hold a dict, got {type(checkpoint).__name__}"
        )
    key = next((k for k in _STATE_DICT_KEYS if checkpoint.get(k) is not None), None)
    rest = {} if key is None else {k: v for k, v in checkpoint.items() if k != key}
    state = checkpoint if key is None else checkpoint[key]
    if not _is_state_dict(state):
        raise ValueError(
            f"load_checkpoint: {os.fspath(path)} must hold a state_dict, alone or under the key "
            f"'state_dict'; found the keys {sorted(map(str, checkpoint))[:8]}"
        )
    return _unwrapped(state), rest


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state_dict of the model inside of wrappers."""
    # DistributedDataParallel and AveragedModel put "module." before all keys; torch.compile puts
    # "_orig_mod." where the compiled module is. AveragedModel also counts.
    averaged = {k: v for k, v in state.items() if k != "n_averaged"}
    keys = {k: k.replace("_orig_mod.", "") for k in averaged}
    while keys and all(k.startswith("module.") for k in keys.values()):
        keys = {k: short.removeprefix("module.") for k, short in keys.items()}
    if len(set(keys.values())) < len(state.keys() - {"n_averaged"}):  # two would become one
        return state
    return {keys[k]: v for k, v in averaged.items()}


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def check_fit(
    own: dict[str, Tensor], given: dict[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Raise a ValueError if ``given`` has other keys or shapes than ``own``.

    Args:
        own: the model's state_dict.
        given: the checkpoint's state_dict.
        path: the checkpoint's file, for the message.
    """
    problems = [f"missing {k}" for k in own if k not in given]
    problems += [f"unexpected {k}" for k in given if k not in own]
    problems += [
        f"{k} is {tuple(given[k].shape)}, the model's {tuple(own[k].shape)}"
        for k in own
        if k in given and own[k].shape != given[k].shape
    ]
    if problems:
        hidden = len(problems) - _MAX_PROBLEMS
        more = f"; and {hidden} more" if hidden > 0 else ""
        raise ValueError(
            f"load_checkpoint: {os.fspath(path)} does not fit the model: "
            f"{'; '.join(problems[:_MAX_PROBLEMS])}{more}"
        )
