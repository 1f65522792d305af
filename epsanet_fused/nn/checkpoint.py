"""Loading of checkpoints in the official layout."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

_MAX_PROBLEMS = 6  # so many misfits an error message names
_PREFIXES = ("module.", "ema_model.")
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
    own = model.state_dict()
    # First, because load_state_dict copies the tensors that fit before it raises an error.
    check_fit(unwrapped(own), state, path)
    keys = short_keys(own)
    given = {key: state[short] for key, short in keys.items() if short in state}
    model.load_state_dict({k: v for k, v in own.items() if k not in keys} | given)
    return rest


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that ``load_checkpoint`` accepts.

    Returns:
        The state_dict without what wrappers add to its keys, and the other entries of the
        checkpoint.

    Raises:
        ValueError: if the file holds no state_dict.
    """
    # The namespace is that of argparse, in which timm's scripts store their options.
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"load_checkpoint: {os.fspath(path)} must hold a dict, got {type(checkpoint).__name__}"
        )
    present = [k for k in _STATE_DICT_KEYS if checkpoint.get(k) is not None]
    fitting = [k for k in present if _is_state_dict(checkpoint[k])]
    key = next(iter(fitting or present), None)
    rest = {} if key is None else {k: v for k, v in checkpoint.items() if k != key}
    state = checkpoint if key is None else checkpoint[key]
    if not _is_state_dict(state):
        raise ValueError(
            f"load_checkpoint: {os.fspath(path)} must hold a state_dict, alone or under the key "
            f"'state_dict'; found the keys {sorted(map(str, checkpoint))[:8]}"
        )
    return unwrapped(state), rest


def unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state_dict of the model inside of wrappers."""
    return {short: state[key] for key, short in short_keys(state).items()}


def short_keys(state: dict[str, Tensor]) -> dict[str, str]:
    """Return for each key of a state_dict the one that the model inside of wrappers has.

    DistributedDataParallel and AveragedModel put "module." before all keys, averages of weights
    "ema_model."; torch.compile puts "_orig_mod." where the compiled module is. AveragedModel has a
    counter, too, which is left out.
    """
    whole = {k: k for k in state}
    keys = {k: k.replace("_orig_mod.", "") for k in state if k.split(".")[-1] != "n_averaged"}
    while prefix := _common_prefix(keys.values()):
        keys = {k: short.removeprefix(prefix) for k, short in keys.items()}
    return keys if len(set(keys.values())) == len(keys) else whole  # two must not become one


def _common_prefix(keys: Collection[str]) -> str | None:
    """Return the prefix of a wrapper that all keys have."""
    return next((p for p in _PREFIXES if keys and all(k.startswith(p) for k in keys)), None)


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
    # Norms of old versions of PyTorch have no counter; load_state_dict starts it at 0.
    missing = [k for k in own if k not in given and not k.endswith(".num_batches_tracked")]
    problems = [f"missing {k}" for k in missing]
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
