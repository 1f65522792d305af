"""Find the parts of a model that can be rewritten, verify them, and build the rewritten model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from epsanet_fused.inference.blocks import (
    PlannedBlock,
    PlannedPSA,
    PlannedStage,
    Rewrites,
    is_batch_norm,
)
from epsanet_fused.inference.stem import fold_stem
from epsanet_fused.inference.verify import check_numbers, is_block_like
from epsanet_fused.nn.fused_psa import CONVS, is_psa
from epsanet_fused.nn.grouped_conv import is_plain_conv
from epsanet_fused.utils.capture import inputs_of
from epsanet_fused.utils.hooks import has_hooks, is_unmodified

_BLOCK_NORMS = ("bn1", "bn2", "bn3")


class Targets(NamedTuple):
    """The names of the modules that can be rewritten, and of those that cannot."""

    blocks: list[str]
    psas: list[str]  # PSA modules outside of these blocks
    stems: list[str]  # modules around the blocks whose bn1 can be folded into their conv1
    relu_stems: list[str]  # the stems whose relu can run in conv1 as well
    skipped: dict[str, str]  # the reason for each block or PSA module that cannot be rewritten


def find_targets(model: nn.Module, args: tuple[Any, ...]) -> Targets:
    """Find blocks and PSA modules by their structure, and verify each on random inputs.

    Args:
        model: in eval mode.
        args: the arguments to call it with.

    Raises:
        ValueError: if there is nothing to rewrite.
    """
    candidates = {n: m for n, m in model.named_modules() if is_block_like(m) or is_psa(m)}
    inputs = inputs_of(candidates, model, args)
    blocks: list[str] = []
    psas: list[str] = []
    skipped: dict[str, str] = {}
    for name, module in candidates.items():
        if name.rpartition(".")[0] in blocks:  # the PSA module of that block
            continue
        psa = f"{name}.conv2".lstrip(".")
        reason = (
            _check_structure(module)
            or check_numbers(module, inputs.get(name))
            # In the block's output, what the PSA module does differently may be too small to see.
            or (check_numbers(candidates[psa], inputs.get(psa)) if psa in candidates else None)
        )
        if reason is not None:
            skipped[name or type(model).__name__] = reason
        elif is_block_like(module):
            blocks.append(name)
        else:
            psas.append(name)
    if not blocks and not psas:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        found = f"has only {reasons}" if skipped else "has none"
        raise ValueError(
            f"optimize_for_inference: model must hold an EPSABlock or a PSA module that can be "
            f"rewritten, but {type(model).__name__} {found}"
        )
    return Targets(blocks, psas, *_find_stems(model, blocks, args), skipped)


def apply_rewrites(model: nn.Module, targets: Targets, rewrites: Rewrites) -> nn.Module:
    """Return the rewritten model. It shares its parameters with ``model``, which is unchanged."""
    rewritten = copy_sharing_tensors(model)
    if rewrites.fold:
        for name in targets.stems:
            relu = name in targets.relu_stems and rewrites.fused_calls
            fold_stem(rewritten.get_submodule(name), name, relu, rewrites)
    for name in targets.psas:
        psa = PlannedPSA(name, rewritten.get_submodule(name), None, rewrites)
        rewritten = _replace(rewritten, name, psa)
    for name in targets.blocks:
        block = PlannedBlock(name, rewritten.get_submodule(name), rewrites)
        rewritten = _replace(rewritten, name, block)
    for name, module in list(rewritten.named_modules()):
        if _is_planned_row(module):
            stage = PlannedStage(OrderedDict(module.named_children())).eval()
            rewritten = _replace(rewritten, name, stage)
    return rewritten


def copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """Return a copy of the modules with the very same parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, memo={id(t): t for t in tensors})


def _replace(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    if not name:
        return module
    root.set_submodule(name, module)
    return root


def _is_planned_row(module: nn.Module) -> bool:
    """Return whether ``module`` is an unmodified nn.Sequential of PlannedBlocks alone."""
    if not is_unmodified(module, nn.Sequential) or len(module._modules) == 0:
        return False
    return all(isinstance(block, PlannedBlock) for block in module.children())


def _check_structure(module: Any) -> str | None:
    """Return why this block or PSA module cannot be replaced, or None if it can."""
    for name, part in module.named_modules():
        if has_hooks(part):
            return f"{name or 'it'} has hooks"
        if "forward" in vars(part):
            return f"{name or 'it'} has a forward that was replaced"
        if parametrize.is_parametrized(part):
            return f"{name or 'it'} has parametrised weights"
    if module._parameters or module._buffers:
        return "it has parameters or buffers of its own"
    is_block = is_block_like(module)
    psa = module.conv2 if is_block else module
    convs = {name: getattr(psa, name) for name in CONVS} if is_psa(psa) else {"conv2": psa}
    if is_block:
        convs |= {"conv1": module.conv1, "conv3": module.conv3}
    for name, conv in convs.items():
        if not is_plain_conv(conv):
            return f"{name} isn't a plain Conv2d with zeros around the image, but {conv}"
    for name in _BLOCK_NORMS if is_block else ():
        norm = getattr(module, name)
        if not is_batch_norm(norm):
            kind = type(norm).__name__
            return f"{name} is a {kind}, not a BatchNorm2d with running statistics"
    return None


def _find_stems(
    model: nn.Module, blocks: list[str], args: tuple[Any, ...]
) -> tuple[list[str], list[str]]:
    """Find the modules around the blocks whose bn1 and relu can be folded into their conv1.

    Returns:
        The names of the modules whose bn1 takes just the output of their conv1, and of those among
        them whose relu takes just the output of bn1.
    """
    candidates: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if _has_block_inside(name, blocks) and _is_stem_like(module)
    }
    parts = [getattr(m, n, None) for m in candidates.values() for n in ("conv1", "bn1", "relu")]
    log = _CallLog(model, args, parts)
    stems = [name for name, m in candidates.items() if log.feeds(m.conv1, m.bn1)]
    relu_stems = [
        name
        for name in stems
        if _has_plain_relu(m := candidates[name]) and log.feeds(m.bn1, m.relu)
    ]
    norms = [candidates[name].bn1 for name in relu_stems]
    if norms and not _can_move_relus(model, args, norms, log.output):
        relu_stems = []
    return stems, relu_stems


def _has_block_inside(name: str, blocks: list[str]) -> bool:
    """Return whether the module of this name holds one of the blocks."""
    return any(block.startswith(f"{name}.") or (not name and block) for block in blocks)


def _is_stem_like(module: Any) -> bool:
    conv: Any = getattr(module, "conv1", None)
    norm: Any = getattr(module, "bn1", None)
    if not is_plain_conv(conv) or not is_batch_norm(norm):
        return False
    return not parametrize.is_parametrized(norm) and all(
        is_unmodified(part, type(part)) for part in (conv, norm)
    )


def _has_plain_relu(stem: Any) -> bool:
    relu = getattr(stem, "relu", None)
    return isinstance(relu, nn.ReLU) and is_unmodified(relu, nn.ReLU)


class _CallLog:
    """The calls of some modules during one run of a model, and the model's output.

    Args:
        model: the model to run.
        args: its arguments.
        modules: the modules to log; those that are no nn.Module are ignored.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], modules: Iterable[Any]) -> None:
        self._calls: dict[nn.Module, list[tuple[tuple[Any, ...], Any]]] = {}
        hooks = {module: self._record for module in modules if isinstance(module, nn.Module)}
        self.output = _run_with_hooks(model, args, hooks)

    def _record(self, module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        self._calls.setdefault(module, []).append((inputs, out))

    def feeds(self, before: nn.Module, after: nn.Module) -> bool:
        """Return whether both were called once, and ``after`` with the output of ``before``."""
        calls, next_calls = self._calls.get(before, []), self._calls.get(after, [])
        if not len(calls) == len(next_calls) == 1:
            return False
        [(_, out)], [(inputs, _)] = calls, next_calls
        return len(inputs) == 1 and inputs[0] is out


def _can_move_relus(
    model: nn.Module, args: tuple[Any, ...], norms: Iterable[nn.Module], expected: Any
) -> bool:
    """Return whether the model's output stays the same with a ReLU right after these norms.

    A ReLU follows each of them already, and a second one changes nothing. The output differs only
    if something else reads the norm's output.
    """
    hooks = {norm: lambda _module, _inputs, out: F.relu(out) for norm in norms}
    output = _run_with_hooks(model, args, hooks)
    return all(map(_is_equal, tree_leaves(output), tree_leaves(expected)))


def _run_with_hooks(
    model: nn.Module, args: tuple[Any, ...], hooks: dict[nn.Module, Callable[..., Any]]
) -> Any:
    """Return the model's output with these forward hooks."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        return model(*args)
    finally:
        for handle in handles:
            handle.remove()


def _is_equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else True
