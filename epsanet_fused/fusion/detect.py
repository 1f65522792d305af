"""Detect PSA modules by the layers they hold; class names and layer names do not matter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from epsanet_fused.nn.equivalence import PSALayers, UnfusableError, parameter_layers, single_conv


class _SEWidths(NamedTuple):
    channels: int
    hidden: int


def find_layers(module: nn.Module) -> PSALayers | None:
    """Find the layers of a PSA module among the children of ``module``.

    A PSA module has two or more children with one Conv2d each, which differ in kernel size, groups
    or dilation, and one SE as wide as the output of each of them, or one SE per branch.

    Returns:
        The names of the layers, or None if ``module`` does not look like a PSA module.

    Raises:
        UnfusableError: if it looks like one, but has other layers too or an SE that does not fit.
    """
    convs, ses, others = _classify_children(module)
    widths = {se.channels for se in ses.values()}
    branches = {name: conv for name, conv in convs.items() if conv.out_channels in widths}
    shapes = {(conv.kernel_size, conv.groups, conv.dilation) for conv in branches.values()}
    if len(shapes) < 2:
        return None
    others += [name for name in convs if name not in branches]
    if others or module._parameters:
        extra = ", ".join([*others, *module._parameters])
        raise UnfusableError(f"it has more than the parts of a PSA module: {extra}")
    if len(widths) > 1 or len(ses) not in (1, len(branches)):
        raise UnfusableError(f"it has {len(ses)} SEs for {len(branches)} branches")
    if any(se.hidden == 0 for se in ses.values()):
        raise UnfusableError("its SE has no hidden unit")
    return PSALayers(tuple(branches), tuple(ses))


def _classify_children(
    module: nn.Module,
) -> tuple[dict[str, nn.Conv2d], dict[tuple[str, str], _SEWidths], list[str]]:
    """Return the children with one Conv2d, the SEs, and the names of the others with parameters."""
    convs: dict[str, nn.Conv2d] = {}
    ses: dict[tuple[str, str], _SEWidths] = {}
    others = []
    for name, child in _iter_children(module):
        layers = parameter_layers(child)
        if not layers:
            continue
        if (widths := _se_widths(layers)) is not None:
            first, second = (f"{name}.{layer}" for layer in layers)
            ses[first, second] = widths
        elif (conv := single_conv(child)) is not None:
            convs[name] = conv
        else:
            others.append(name)
    return convs, ses, others


def _iter_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and children of ``module``, and the members of its lists and dicts."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from ((f"{name}.{inner}", part) for inner, part in child.named_children())
        else:
            yield name, child


def _se_widths(layers: dict[str, nn.Module]) -> _SEWidths | None:
    """Return the widths of an SE, or None if ``layers`` do not map C -> R -> C in each pixel."""
    if len(layers) != 2:
        return None
    first, second = map(layer_widths, layers.values())
    if first is None or second is None or first != second[::-1]:
        return None
    return _SEWidths(*first)


def layer_widths(layer: nn.Module) -> tuple[int, int] | None:
    """Return the input and output channels of a Linear or plain 1x1 Conv2d, else None."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        return layer.in_channels, layer.out_channels
    return None
