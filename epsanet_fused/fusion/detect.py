"""What PSA modules are made of, whatever they and their parts are called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn


class UnfusableError(Exception):
    """Why a module that looks like a PSA module stays as it is."""


class Parts(NamedTuple):
    """The names of what makes the branches, and of the two layers of each SE."""

    branches: tuple[str, ...]
    ses: tuple[tuple[str, str], ...]


def find_parts(module: nn.Module) -> Parts | None:
    """The parts of a PSA module, or None if this module has no such parts.

    They are two or more children with a Conv2d each, of which not all have one kernel, number of
    groups and dilation, and an SE as wide as each of their outputs, or one for each.

    Raises:
        UnfusableError: if there are such parts, and something else or something amiss.
    """
    branches: dict[str, nn.Conv2d] = {}
    ses: dict[tuple[str, str], tuple[int, int]] = {}
    others = []
    for name, child in children_of(module):
        if not layers_of(child):
            continue
        if (se := _se_layers(name, child)) is not None:
            ses |= se
        elif (conv := only_conv(child)) is not None:
            branches[name] = conv
        else:
            others.append(name)
    widths = {width for width, _ in ses.values()}
    wide = [conv for conv in branches.values() if conv.out_channels in widths]
    if len(wide) < 2 or len({(c.kernel_size, c.groups, c.dilation) for c in wide}) < 2:
        return None
    others += [name for name, conv in branches.items() if conv.out_channels not in widths]
    if others or module._parameters:
        extra = ", ".join([*others, *module._parameters])
        raise UnfusableError(f"it has more than the parts of a PSA module: {extra}")
    if len(widths) > 1 or len(ses) not in (1, len(branches)):
        raise UnfusableError(f"it has {len(ses)} SEs for {len(branches)} branches")
    if 0 in {hidden for _, hidden in ses.values()}:
        raise UnfusableError("its SE has no hidden unit")
    return Parts(tuple(branches), tuple(ses))


def children_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children, those of lists by themselves."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from ((f"{name}.{inner}", part) for inner, part in child.named_children())
        else:
            yield name, child


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The layers inside, by name: what has parameters of its own.

    A parametrised layer has none left of its own, and its parametrisation, which has them, is no
    layer. Its weight isn't looked at: merely to read it may change it, as spectral_norm does.
    """
    return {
        name: m
        for name, m in module.named_modules()
        if (m._parameters or isinstance(m, (nn.Conv2d, nn.Linear)))
        and "parametrizations" not in name.split(".")
    }


def _se_layers(name: str, module: nn.Module) -> dict[tuple[str, str], tuple[int, int]] | None:
    """The names of the two layers and their widths C, R if they map C -> R -> C in each pixel."""
    layers = layers_of(module)
    if len(layers) != 2:
        return None
    widths = []
    for layer in layers.values():
        if isinstance(layer, nn.Linear):
            widths.append((layer.in_features, layer.out_features))
        elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
            widths.append((layer.in_channels, layer.out_channels))
    if len(widths) != 2 or widths[0] != widths[1][::-1]:
        return None
    first, second = (f"{name}.{layer}" for layer in layers)
    return {(first, second): widths[0]}


def only_conv(module: nn.Module) -> nn.Conv2d | None:
    """The Conv2d inside, if there is one alone; norms and activations may come with it."""
    heavy = [m for m in layers_of(module).values() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return heavy[0] if len(heavy) == 1 and isinstance(heavy[0], nn.Conv2d) else None


def bypassed(module: nn.Module, parts: Parts) -> dict[str, nn.Module]:
    """What a fused module wouldn't call any more: all but the branches, the module itself as ""."""
    called = {m for name in parts.branches for m in module.get_submodule(name).modules()}
    return {name: part for name, part in module.named_modules() if part not in called}
