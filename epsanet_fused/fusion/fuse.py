"""fuse: finds the PSA modules in anybody's model and puts fused ones in their place."""

from __future__ import annotations

import inspect
import warnings

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from epsanet_fused.fusion.detect import Parts, UnfusableError, bypassed, find_parts, only_conv
from epsanet_fused.fusion.modules import FusedPSAVariant, stand_in
from epsanet_fused.fusion.verify import prove
from epsanet_fused.nn.fused_psa import CONVS, FusedPSAModule, is_psa
from epsanet_fused.utils.hooks import hooked
from epsanet_fused.utils.progress import progress

ORDERS = ("reversed", "natural")


def fuse(model: nn.Module, *, order: str = "reversed", dry_run: bool = False) -> nn.Module:
    """Put a fused module in the place of every PSA module (arXiv 2105.14447) of ``model``.

    PSA modules are recognised by what they are made of: two or more sibling convolutions of
    different kernels, groups or dilations, and an SE as wide as each of them, or one SE for each.
    Class names and the names of the parts don't matter. Kernels, groups, strides, biases and
    reduction are those of the parts. Convolutions may take all of the input or a share each, and
    may have a norm and an activation behind them.

    Each is first run on noise, a copy with random weights in float64, beside what would succeed it:
    output, gradients, and what it does to its input have to agree. Whatever doesn't, keeps state,
    is random, or has more to it than a PSA module stays as it is, with a warning that names it and
    says why.

    Parameters are shared: optimizers and EMA copies that hold them go on. Names, state_dict,
    device, dtype, training mode, hooks and other attributes stay; methods of the old class are
    gone, and so are derivatives beyond the first (see ``psa_tail``). Hooks that are put on an SE
    later aren't called.

    Args:
        model: any model. It is changed in place, after all of it has been looked at.
        order: "reversed" for PSA modules whose last branch comes first in the output, as in the
            official code; "natural" for those that concatenate in order. A state_dict can't tell.
        dry_run: change nothing, and print a table of what would be done.

    Returns:
        ``model``, or what replaces it if it is itself a PSA module.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: for another order, and if there is no PSA module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}")
    if order not in ORDERS:
        raise ValueError(f"fuse: order must be 'reversed' or 'natural', got {order!r}")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    parts = {module: found for module in names if (found := _find(module)) is not None}
    if not parts and not any(isinstance(m, (FusedPSAModule, FusedPSAVariant)) for m in names):
        raise ValueError(
            f"fuse: model must hold a PSA module, sibling Conv2d layers and an SE as wide as each "
            f"of them, but {type(model).__name__} has none"
        )
    findings = _examine_all(parts, names, order == "reversed")
    if dry_run:
        print(_table(findings, names, parts))
        return model
    for module, found in findings.items():  # before anything is changed, as a warning may raise
        if isinstance(found, UnfusableError):
            for name in names[module]:
                _warn(name, module, found)
    for module, found in findings.items():
        for name in names[module] if isinstance(found, nn.Module) else ():
            if name:
                model.set_submodule(name, found)
            else:
                model = found
    return model


def _examine_all(
    parts: dict[nn.Module, Parts | UnfusableError],
    names: dict[nn.Module, list[str]],
    is_reversed: bool,
) -> dict[nn.Module, nn.Module | UnfusableError]:
    """For each module the one that takes its place, or why there is none."""
    findings: dict[nn.Module, nn.Module | UnfusableError] = {}
    items = progress(list(parts), "module", lambda m: f"examine {names[m][0] or 'the model'}")
    for _, module in items:
        found = parts[module]
        if isinstance(found, Parts):
            try:
                findings[module] = _successor(module, found, is_reversed)
            except UnfusableError as reason:
                findings[module] = reason
        else:
            findings[module] = found
    return findings


def _find(module: nn.Module) -> Parts | UnfusableError | None:
    if isinstance(module, (FusedPSAModule, FusedPSAVariant)):
        return None
    try:
        return find_parts(module)
    except UnfusableError as reason:
        return reason


def _successor(module: nn.Module, parts: Parts, is_reversed: bool) -> nn.Module:
    """The module that can take the place of this one."""
    _check_surroundings(module, parts)
    build = prove(module, parts, is_reversed)
    plain = not (build.split or build.relu or build.overwrites) and build.reversed
    official = is_psa(module) and build.branches == CONVS
    if plain and official and module.se.fc1.bias is not None and module.se.fc2.bias is not None:
        return stand_in(module, FusedPSAModule)
    return FusedPSAVariant.standing_for(module, build)


# What a class may do its own way, and a fused module would not.
_OF_MODULE = (
    "__call__", "train", "_apply", "state_dict", "load_state_dict", "get_extra_state",
    "set_extra_state", "_save_to_state_dict", "_load_from_state_dict",
)  # fmt: skip


def _check_surroundings(module: nn.Module, parts: Parts) -> None:
    """Raise an UnfusableError for what no run on noise would show."""
    for name in _OF_MODULE:
        if getattr(type(module), name) is not getattr(nn.Module, name):
            raise UnfusableError(f"{type(module).__name__} has a {name} of its own")
    if module._load_state_dict_pre_hooks:
        raise UnfusableError("it has hooks for loading a state_dict")
    arguments = list(inspect.signature(module.forward).parameters.values())
    if len(arguments) != 1 or arguments[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise UnfusableError("its forward takes more than one tensor")
    if any(is_lazy(p) or p.is_meta for p in module.parameters()):
        raise UnfusableError("it can't be run: its parameters aren't there yet")
    for name, part in bypassed(module, parts).items():
        where = name or "it"
        if "forward" in vars(part):
            raise UnfusableError(f"{where} has a forward that was replaced")
        if part._compiled_call_impl is not None:
            raise UnfusableError(f"{where} is compiled; fuse the model first")
        if name and hooked(part):
            raise UnfusableError(f"{where} has hooks, which would not be called any more")
        if part._buffers or isinstance(part, _DropoutNd):
            raise UnfusableError(f"{where} has a buffer, or is a dropout")


def _warn(name: str, module: nn.Module, reason: UnfusableError) -> None:
    text = f"fuse: {name or 'the model'} ({type(module).__name__}) is left alone: {reason}"
    warnings.warn(text, UserWarning, stacklevel=3)


def _table(
    findings: dict[nn.Module, nn.Module | UnfusableError],
    names: dict[nn.Module, list[str]],
    parts: dict[nn.Module, Parts | UnfusableError],
) -> str:
    """One line for each module: its name, what it is made of, and what becomes of it."""
    lines = [("module", "class", "kernels/groups", "SE", "input", "becomes")]
    for module, found in findings.items():
        made_of = _summary(module, parts[module])
        split = isinstance(found, FusedPSAVariant) and found.build.split
        if isinstance(found, UnfusableError):
            taken, becomes = "?", f"left alone: {found}"
        else:
            taken, becomes = "split" if split else "whole", type(found).__name__
        lines += [
            (name or ".", type(module).__name__, *made_of, taken, becomes) for name in names[module]
        ]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[5]])
        for line in lines
    )


def _summary(module: nn.Module, parts: Parts | UnfusableError) -> tuple[str, str]:
    """Kernels and groups of the convolutions, and the widths of the SE."""
    if isinstance(parts, UnfusableError):
        return "?", "?"
    convs = [only_conv(module.get_submodule(name)) for name in parts.branches]
    kernels = " ".join(f"{'x'.join(map(str, c.kernel_size))}/{c.groups}" for c in convs)
    layer = module.get_submodule(parts.ses[0][0])
    linear = isinstance(layer, nn.Linear)
    C = layer.in_features if linear else layer.in_channels
    R = layer.out_features if linear else layer.out_channels
    each = f"{len(parts.ses)} x " if len(parts.ses) > 1 else ""
    return kernels, f"{each}{C}-{R}-{C}"
