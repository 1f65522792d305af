"""Record the inputs of a model's modules."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def inputs_of(
    modules: Mapping[str, nn.Module], model: nn.Module, example_input: Tensor | tuple[Any, ...]
) -> dict[str, Tensor]:
    """Run the model once and return the first input of each of these modules.

    Args:
        modules: parts of the model, by names of the caller's choice.
        model: runs without gradients; its buffers are as before afterwards.
        example_input: the model's argument, or a tuple of its arguments.

    Returns:
        For each name the input; without the modules that didn't run or whose input isn't exactly
        one tensor.
    """
    seen: dict[str, Any] = {}

    def remember(_module: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
        seen.setdefault(name, args[0] if len(args) == 1 else None)

    hooks = [
        module.register_forward_pre_hook(functools.partial(remember, name=name))
        for name, module in modules.items()
    ]
    # Buffers made in inference mode can't be changed outside of it, so they need no restoring.
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
    """Return the arguments of a call: the tuple itself, or a tensor as the only one."""
    return example_input if isinstance(example_input, tuple) else (example_input,)
