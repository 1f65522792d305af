"""Record what the parts of a model are called with."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def inputs_of(
    modules: Mapping[str, nn.Module], model: nn.Module, example_input: Tensor | tuple[Any, ...]
) -> dict[str, Tensor]:
    """What each of these parts of the model is first called with, where that is one tensor."""
    seen: dict[str, Any] = {}

    def remember(_module: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
        seen.setdefault(name, args[0] if len(args) == 1 else None)

    hooks = [
        module.register_forward_pre_hook(functools.partial(remember, name=name))
        for name, module in modules.items()
    ]
    # What was made in inference mode changes in there alone.
    buffers = [buffer for buffer in model.buffers() if not buffer.is_inference()]
    before = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        with torch.no_grad():
            model(*as_arguments(example_input))
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, value in before:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
    return {name: x.detach() for name, x in seen.items() if isinstance(x, Tensor)}


def as_arguments(example_input: Tensor | tuple[Any, ...]) -> tuple[Any, ...]:
    return example_input if isinstance(example_input, tuple) else (example_input,)
