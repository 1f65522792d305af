"""``fuse``: replace the PSA modules of any model by fused ones."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.fx
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from epsanet_fused.fusion.detect import find_layers, layer_widths, name_lookalike
from epsanet_fused.fusion.modules import FusedPSAVariant, PSASpec
from epsanet_fused.fusion.verify import verify_module
from epsanet_fused.fusion.watch import has_gated_branches
from epsanet_fused.nn.fused_psa import CONVS, FusedPSAModule, is_psa, kinds_of_bypassed
from epsanet_fused.nn.psa_layers import (
    PSALayers,
    UnfusableError,
    branch_convs,
    bypassed_modules,
)
from epsanet_fused.ops.checks import check_order
from epsanet_fused.utils.hooks import has_hooks
from epsanet_fused.utils.progress import progress
from epsanet_fused.utils.replacing import replace_class

FUSED_CLASSES = (FusedPSAModule, FusedPSAVariant)

GATED_BRANCHES = (
    "it has several branches and a softmax or SE over them, but not the layers of a PSA module: "
    "an SE of two pointwise layers as wide as each branch"
)

# If a class overrides one of these, a fused module would behave differently.
_MODULE_METHODS = (
    "__call__",
    "train",
    "_apply",
    "state_dict",
    "load_state_dict",
    "get_extra_state",
    "set_extra_state",
    "_save_to_state_dict",
    "_load_from_state_dict",
)


def fuse(model: nn.Module, *, order: str = "reversed", dry_run: bool = False) -> nn.Module:
    """Replace every PSA module (arXiv 2105.14447) in ``model`` by a fused one.

    A PSA module is recognised by its layers, not by names of classes or layers: two or more sibling
    branches that end in a convolution, and an SE as wide as each of them, or one SE per branch. A
    branch may be any module. All sizes and biases are those of the layers. Each branch may take all
    input channels or an equal share of them.

    Each replacement is verified before it is used: a float64 copy of the module and the fused one
    run on random inputs with random weights, and must agree in outputs, gradients and effects on
    the input. A module that differs, keeps state, draws random numbers or has further layers is
    skipped with a warning that gives its name and the reason.

    Parameters are shared, so optimizers and EMA copies that hold them remain valid. Names,
    state_dict, device, dtype, training mode, hooks and other attributes are kept. Methods of the
    original class are not. If somebody relies on calls of an SE afterwards, for example by a hook
    or an adapter, the original's forward runs.

    Args:
        model: any model. It is changed in place, after all its modules have been examined.
        order: order of the branches in the output. "reversed" fuses the PSA modules whose last
            branch comes first, as in the official code; "natural" those whose first branch comes
            first. A state_dict doesn't show the order.
        dry_run: print a table of the replacements, and change nothing.

    Returns:
        ``model``, or its replacement if ``model`` itself is a PSA module.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if ``order`` is unknown, or ``model`` holds no PSA module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}")
    check_order("fuse", order)
    findings = _examine(_detect(model), order == "reversed")
    fused = any(isinstance(m, FUSED_CLASSES) for m in model.modules())
    if not fused and not any(f.looks_like_one for f in findings):
        named = "; ".join(f"{f.names[0] or 'the model'}: {f.skip_reason}" for f in findings)
        raise ValueError(
            f"fuse: model must hold a PSA module, sibling branches that end in a Conv2d and an SE "
            f"as wide as each of them, but {type(model).__name__} has none"
            + (f" ({named})" if named else "")
        )
    if dry_run:
        print(_table(findings))
        return model
    _warn_of_skipped(findings)  # before any replacement, because a warning may raise
    return _replace_modules(model, findings)


class Finding(NamedTuple):
    """A module that looks like a PSA module, and its replacement or the reason to skip it.

    Attributes:
        module: the module.
        names: all its names in the model; "" is the model itself.
        layers: the names of its layers; None if they are not those of a PSA module.
        replacement: the fused module; None if the module is skipped or not examined yet.
        skip_reason: the reason why the module is skipped, or "".
        looks_like_one: False for a module that is only named, so that nobody looks for it.
        is_gated: what ``has_gated_branches`` returned.
    """

    module: nn.Module
    names: list[str]
    layers: PSALayers | None
    replacement: nn.Module | None = None
    skip_reason: str = ""
    looks_like_one: bool = True
    is_gated: bool | None = True


def _detect(model: nn.Module) -> list[Finding]:
    """Return all modules that look like PSA modules and are not fused yet."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    found: dict[nn.Module, Finding] = {}
    for module in reversed(names):  # a module comes after those that it is a part of
        if isinstance(module, FUSED_CLASSES):
            continue
        try:
            layers = find_layers(module)
        except UnfusableError as error:
            if has_gated_branches(module, try_sizes=True) is not False:
                found[module] = Finding(module, names[module], None, skip_reason=str(error))
            continue
        if layers is not None:
            is_gated = has_gated_branches(module)
            found[module] = Finding(module, names[module], layers, is_gated=is_gated)
        elif reason := name_lookalike(module) or _name_gated_branches(module, found):
            found[module] = Finding(module, names[module], None, None, reason, False)
    return [found[module] for module in names if module in found]


def _name_gated_branches(module: nn.Module, found: Mapping[nn.Module, Finding]) -> str | None:
    """Return what ``module`` is, if it gates several branches and no part of it is found or fused.

    The gates of a part would count as gates of ``module``.
    """
    for part in module.modules():
        if isinstance(part, FUSED_CLASSES) or (part in found and found[part].is_gated is not False):
            return None
    return GATED_BRANCHES if has_gated_branches(module) else None


def _examine(findings: Sequence[Finding], is_reversed: bool) -> list[Finding]:
    """Return the findings with a verified replacement or a reason to skip each.

    What has neither a replacement nor a gate over its branches is an ordinary block, and left out.
    """
    items = progress(findings, "module", lambda f: f"examine {f.names[0] or 'the model'}")
    examined = []
    for _, finding in items:
        if finding.layers is not None:
            try:
                fused = _make_replacement(finding.module, finding.layers, is_reversed)
                finding = finding._replace(replacement=fused)
            except UnfusableError as error:
                finding = finding._replace(skip_reason=str(error))
        examined.append(finding)
    return [f for f in examined if f.replacement is not None or f.is_gated is not False]


def _make_replacement(module: nn.Module, layers: PSALayers, is_reversed: bool) -> nn.Module:
    """Return the fused module that can replace ``module``, or raise an UnfusableError."""
    _check_class_and_hooks(module, layers)
    spec = verify_module(module, layers, is_reversed)
    if _is_official(module, spec):
        fused = replace_class(module, FusedPSAModule)
        fused._kinds = kinds_of_bypassed(module)
        return fused
    return FusedPSAVariant.from_module(module, spec)


def _is_official(module: nn.Module, spec: PSASpec) -> bool:
    """Return whether ``FusedPSAModule`` computes what a module with this spec computes."""
    layers = PSALayers(CONVS, (("se.fc1", "se.fc2"),))
    if not is_psa(module) or spec != PSASpec(layers):
        return False
    se: Any = module.se
    if not kinds_of_bypassed(module):
        return False
    return se.fc1.bias is not None and se.fc2.bias is not None


def _check_class_and_hooks(module: nn.Module, layers: PSALayers) -> None:
    """Raise an UnfusableError for properties that a run on random inputs doesn't show."""
    for name in _MODULE_METHODS:
        if getattr(type(module), name) is not getattr(nn.Module, name):
            raise UnfusableError(f"{type(module).__name__} has a {name} of its own")
    if module._load_state_dict_pre_hooks:
        raise UnfusableError("it has hooks for loading a state_dict")
    if type(module) is nn.Module or isinstance(module, torch.fx.GraphModule):
        raise UnfusableError(
            "it is part of a graph that torch.fx traced; fuse the model before that"
        )
    arguments = list(inspect.signature(module.forward).parameters.values())
    if len(arguments) != 1 or arguments[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise UnfusableError("its forward takes more than one tensor")
    if any(is_lazy(p) or p.is_meta for p in module.parameters()):
        raise UnfusableError("it can't be run: its parameters aren't there yet")
    for name, part in bypassed_modules(module, layers).items():
        where = name or "it"
        if "forward" in vars(part):
            raise UnfusableError(f"{where} has a forward that was replaced")
        if part._compiled_call_impl is not None:
            raise UnfusableError(f"{where} is compiled; fuse the model first")
        if name and has_hooks(part):
            raise UnfusableError(f"{where} has hooks, which would not be called any more")
        if part._buffers or isinstance(part, _DropoutNd):
            raise UnfusableError(f"{where} has a buffer, or is a dropout")


def _warn_of_skipped(findings: Sequence[Finding]) -> None:
    for finding in findings:
        kind, reason = type(finding.module).__name__, finding.skip_reason
        for name in finding.names if reason else ():
            text = f"fuse: {name or 'the model'} ({kind}) is skipped: {reason}"
            warnings.warn(text, UserWarning, stacklevel=3)


def _replace_modules(model: nn.Module, findings: Sequence[Finding]) -> nn.Module:
    """Put the replacements into ``model``; return it, or its own replacement."""
    for finding in findings:
        if finding.replacement is None:
            continue
        for name in finding.names:
            if name:
                model.set_submodule(name, finding.replacement)
            else:
                model = finding.replacement
    return model


def _table(findings: Sequence[Finding]) -> str:
    """Format one line per name of each module: its class, its layers and its replacement."""
    lines = [("module", "class", "kernels/groups", "SE", "input", "becomes")]
    for finding in findings:
        row = (
            type(finding.module).__name__,
            *_describe_layers(finding),
            *_describe_result(finding),
        )
        lines += [(name or ".", *row) for name in finding.names]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _describe_layers(finding: Finding) -> tuple[str, str]:
    """Return the convolutions' kernels and groups, and the number and widths of the SEs."""
    if finding.layers is None:
        return "?", "?"
    convs = branch_convs(finding.module, finding.layers)
    kernels = " ".join("+".join(map(_describe_conv, branch)) for branch in convs)
    ses = finding.layers.ses
    widths = layer_widths(finding.module.get_submodule(ses[0][0]))
    assert widths is not None  # find_layers accepts no other layer
    C, R = widths
    count = f"{len(ses)} x " if len(ses) > 1 else ""
    return kernels, f"{count}{C}-{R}-{C}"


def _describe_conv(conv: nn.Conv2d) -> str:
    return f"{'x'.join(map(str, conv.kernel_size))}/{conv.groups}"


def _describe_result(finding: Finding) -> tuple[str, str]:
    """Return how the branches use the input, and the class of the replacement."""
    fused = finding.replacement
    if fused is None:
        return "?", f"skipped: {finding.skip_reason}"
    split = isinstance(fused, FusedPSAVariant) and fused.spec.split_input
    return "split" if split else "whole", type(fused).__name__
