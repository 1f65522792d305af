"""Detect PSA modules by the layers they hold; class names and layer names do not matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from epsanet_fused.nn.psa_layers import PSALayers, UnfusableError, convs_of, parameter_layers

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class _SEWidths(NamedTuple):
    channels: int
    hidden: int


class _Children(NamedTuple):
    """The children of a module, by name.

    Attributes:
        convs: the convolutions of each child that holds some and is no SE.
        ses: the SEs, by the names of their two layers.
        others: the names of the other children with parameters.
        in_lists: the names of children that are members of a ModuleList or ModuleDict.
    """

    convs: dict[str, list[nn.Conv2d]]
    ses: dict[tuple[str, str], _SEWidths]
    others: list[str]
    in_lists: set[str]


def find_layers(module: nn.Module) -> PSALayers | None:
    """Find the layers of a PSA module among the children of ``module``.

    A PSA module has two or more children that end in a Conv2d, and one SE as wide as the output of
    each of them, or one SE per branch. The branches differ in kernel size, groups or dilation, are
    members of one list, or are at least three: two equal convolutions and an SE are a usual block.

    Returns:
        The names of the layers, or None if ``module`` does not look like a PSA module.

    Raises:
        UnfusableError: if it looks like one, but has other layers too or an SE that does not fit.
    """
    if is_plain_container(module):
        return None
    convs, ses, others, in_lists = _classify_children(module)
    widths = {se.channels for se in ses.values()}
    branches = {name: c for name, c in convs.items() if c[-1].out_channels in widths}
    if not _look_like_branches(branches, in_lists):
        return None
    others += [name for name in convs if name not in branches]
    if others and len({c[0].in_channels for c in branches.values()}) > 1:
        return None  # they are no branches: they take inputs of different widths
    if others or module._parameters:
        extra = ", ".join([*others, *module._parameters])
        raise UnfusableError(f"it has more than the parts of a PSA module: {extra}")
    if len(widths) > 1 or len(ses) not in (1, len(branches)):
        raise UnfusableError(f"it has {len(ses)} SEs for {len(branches)} branches")
    if any(se.hidden == 0 for se in ses.values()):
        raise UnfusableError("its SE has no hidden unit")
    return PSALayers(tuple(branches), tuple(ses))


def is_plain_container(module: nn.Module) -> bool:
    """Whether ``module`` calls its children one after another, or not at all."""
    forward = type(module).forward
    return isinstance(module, _CONTAINERS) and forward in (nn.Sequential.forward, nn.Module.forward)


def _look_like_branches(branches: Mapping[str, list[nn.Conv2d]], in_lists: set[str]) -> bool:
    kinds = {tuple((c.kernel_size, c.groups, c.dilation) for c in b) for b in branches.values()}
    if len(branches) < 2:
        return False
    return len(kinds) > 1 or len(branches) > 2 or branches.keys() <= in_lists


def name_lookalike(module: nn.Module) -> str | None:
    """Return what ``module`` is, if people take it for a PSA module or its layers can't be seen."""
    if "PSA" in type(module).__name__ and {"attn", "cv1"} & module._modules.keys():
        return "it is YOLO's partial self-attention, another operator"
    for name, value in vars(module).items():
        if isinstance(value, (list, tuple)) and not name.startswith("_"):
            hidden = [m for m in value if isinstance(m, nn.Module) and convs_of(m)]
            if len(hidden) > 1:
                return (
                    f"{name} is a Python list, in which PyTorch sees no layers; use nn.ModuleList"
                )
    return None


def _classify_children(module: nn.Module) -> _Children:
    found = _Children({}, {}, [], set())
    for name, child in iter_children(module):
        layers = parameter_layers(child)
        if not layers:
            continue
        if "." in name:
            found.in_lists.add(name)
        if (widths := _se_widths(layers)) is not None:
            first, second = (f"{name}.{layer}" for layer in layers)
            found.ses[first, second] = widths
        elif convs := convs_of(child):
            found.convs[name] = convs
        else:
            found.others.append(name)
    return found


def iter_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
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
