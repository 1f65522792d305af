"""What of a model can be rewritten, shown to be the same, and the rewritten model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from epsanet_fused.inference.blocks import (
    PassedNorm,
    PlannedBlock,
    PlannedPSA,
    PlannedStage,
    Rewrites,
    is_norm,
    is_plain_conv,
)
from epsanet_fused.nn.fused_psa import CONVS, is_psa
from epsanet_fused.utils.capture import inputs_of
from epsanet_fused.utils.device_info import conv_eps
from epsanet_fused.utils.hooks import hooked

_BLOCK = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample")
_STEM = ("conv1", "bn1", "relu")


class Targets(NamedTuple):
    """The names of what can be rewritten, and of what can't, with the reason."""

    blocks: list[str]
    psas: list[str]  # that are in no such block
    stems: list[str]  # modules with a conv1 and then a bn1 of their own around the blocks
    rectified: list[str]  # those of them where a relu comes next
    left_alone: dict[str, str]


def find_targets(model: nn.Module, args: tuple[Any, ...]) -> Targets:
    """Looks for blocks and PSA modules by structure, and shows on noise that they are such.

    Raises:
        ValueError: if there are none.
    """
    modules = dict(model.named_modules())
    seen = {name: m for name, m in modules.items() if _like_block(m) or is_psa(m)}
    inputs = inputs_of(seen, model, args)
    left: dict[str, str] = {}
    blocks, psas = [], []
    for name, module in seen.items():
        inside = name.rpartition(".")[0]
        if inside in blocks:
            continue
        kind = blocks if _like_block(module) else psas
        reason = _why_not(module) or _differs(name, module, inputs.get(name))
        if reason is None:
            kind.append(name)
        else:
            left[name or type(model).__name__] = reason
    if not blocks and not psas:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise ValueError(
            f"optimize_for_inference: model must hold an EPSABlock or a PSA module that can be "
            f"rewritten, but {type(model).__name__} {f'has only {reasons}' if left else 'has none'}"
        )
    return Targets(blocks, psas, *_stems(model, modules, blocks, args), left)


def apply(model: nn.Module, targets: Targets, rewrites: Rewrites) -> nn.Module:
    """The rewritten model. It shares its parameters with ``model``, which stays as it is."""
    made = sharing_copy(model)
    for name in targets.stems:
        stem = made.get_submodule(name)
        if rewrites.fold:
            relu = name in targets.rectified and rewrites.fused_calls
            stem.conv1 = rewrites.conv(f"{name}.conv1".lstrip("."), stem.conv1, stem.bn1, relu)
            stem.bn1 = PassedNorm(stem.bn1)
            if relu:
                stem.relu = nn.Identity()
    for name in targets.psas:
        made = _replace(made, name, PlannedPSA(name, made.get_submodule(name), None, rewrites))
    for name in targets.blocks:
        made = _replace(made, name, PlannedBlock(name, made.get_submodule(name), rewrites))
    for name, stage in list(made.named_modules()):
        in_row = type(stage) is nn.Sequential and len(stage) > 0 and not hooked(stage)
        if in_row and all(isinstance(block, PlannedBlock) for block in stage):
            made = _replace(made, name, PlannedStage(OrderedDict(stage.named_children())).eval())
    return made


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules, with the very same parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, memo={id(t): t for t in tensors})


def _replace(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    if not name:
        return module
    root.set_submodule(name, module)
    return root


def _like_block(module: nn.Module) -> bool:
    has_all = all(hasattr(module, name) for name in _BLOCK)
    return has_all and (is_psa(module.conv2) or isinstance(module.conv2, nn.Conv2d))


def _why_not(module: nn.Module) -> str | None:
    """What forbids to go around the parts of a block or of a PSA module."""
    for name, part in module.named_modules():
        if hooked(part):
            return f"{name or 'it'} has hooks"
        if parametrize.is_parametrized(part):
            return f"{name or 'it'} has parametrised weights"
    if module._parameters or module._buffers:
        return "it has parameters or buffers of its own"
    is_block = _like_block(module)
    psa = module.conv2 if is_block else module
    convs = [(name, getattr(psa, name)) for name in CONVS] if is_psa(psa) else [("conv2", psa)]
    if is_block:
        convs += [(name, getattr(module, name)) for name in ("conv1", "conv3")]
    for name, conv in convs:
        if not is_plain_conv(conv):
            return f"{name} isn't a plain Conv2d with zeros around the image, but {conv}"
    if is_block:
        for name in ("bn1", "bn2", "bn3"):
            if not is_norm(getattr(module, name)):
                kind = type(getattr(module, name)).__name__
                return f"{name} is a {kind}, not a BatchNorm2d with running statistics"
    return None


def _differs(name: str, module: nn.Module, x: Tensor | None) -> str | None:
    """Whether the module is something else than what it is built like."""
    if x is None:
        return "the example input doesn't reach it, or it takes more than one tensor"
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    rewrites = Rewrites()
    planned = (
        PlannedBlock(name, module, rewrites)
        if _like_block(module)
        else PlannedPSA(name, module, None, rewrites)
    )
    true, out = module(noise.clone()), planned(noise)
    if not isinstance(true, Tensor) or true.shape != out.shape:
        return "its output isn't that of such a module"
    true, out = true.double(), out.double()
    distance = ((out - true).norm() / (true.norm() or 1)).item()
    allowed = max(1e-4, 16 * conv_eps(x.dtype, x.device))
    if not distance <= allowed:
        return f"it computes something else: {distance:.1e} from what such a module gives"
    return None


def _stems(
    model: nn.Module, modules: dict[str, nn.Module], blocks: list[str], args: tuple[Any, ...]
) -> tuple[list[str], list[str]]:
    """Modules around the blocks whose own bn1 gets just what their own conv1 makes.

    And those of them whose relu gets just what bn1 makes, where nothing else depends on it.
    """
    around = [
        name
        for name, m in modules.items()
        if any(block.startswith(f"{name}.") or (not name and block) for block in blocks)
        and is_plain_conv(getattr(m, "conv1", None))
        and is_norm(getattr(m, "bn1", None))
        and not any(hooked(part) or parametrize.is_parametrized(part) for part in (m.conv1, m.bn1))
    ]
    calls: dict[nn.Module, list[tuple[tuple[Any, ...], Any]]] = {}

    def remember(module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        calls.setdefault(module, []).append((inputs, out))

    parts = (getattr(modules[name], part, None) for name in around for part in _STEM)
    hooks = {part: remember for part in parts if isinstance(part, nn.Module)}
    result = _with_hooks(model, args, hooks)

    def follows(after: Any, before: nn.Module) -> bool:
        if not len(calls.get(after, ())) == len(calls.get(before, ())) == 1:
            return False
        [(inputs, _)], [(_, made)] = calls[after], calls[before]
        return len(inputs) == 1 and inputs[0] is made

    stems = [name for name in around if follows(modules[name].bn1, modules[name].conv1)]
    rectified = [
        name
        for name in stems
        if type(relu := getattr(modules[name], "relu", None)) is nn.ReLU
        and not hooked(relu)
        and follows(relu, modules[name].bn1)
    ]
    # Done twice, a relu changes nothing, unless something else takes what comes before it.
    if rectified:
        early = {modules[name].bn1: lambda _module, _inputs, out: F.relu(out) for name in rectified}
        twice = _with_hooks(model, args, early)
        if not all(map(_same, tree_leaves(twice), tree_leaves(result))):
            rectified = []
    return stems, rectified


def _with_hooks(
    model: nn.Module, args: tuple[Any, ...], hooks: dict[nn.Module, Callable[..., Any]]
) -> Any:
    """What the model returns with these forward hooks."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        return model(*args)
    finally:
        for handle in handles:
            handle.remove()


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else True
