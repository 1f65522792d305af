"""optimize_for_inference: exact rewrites for speed, each applied only where it measures faster.

The rewrites:

- BatchNorms are folded into the convolutions before them, bn2 and its ReLU into the tail of the PSA
  module, residuals and ReLUs into the library's own convolution calls.
- Grouped convolutions run merged or tiled, whichever is the fastest (``plan_convs``).
- The whole model runs in its faster memory format.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from epsanet_fused.inference.blocks import Rewrites
from epsanet_fused.inference.conv import refuse_transforms
from epsanet_fused.inference.conv_planner import plan_convs
from epsanet_fused.inference.cuda_graph import GraphedModel
from epsanet_fused.inference.report import Gain, Report, describe_setting
from epsanet_fused.inference.rewrite import (
    Targets,
    apply_rewrites,
    copy_sharing_tensors,
    find_targets,
)
from epsanet_fused.inference.stem import move_stem
from epsanet_fused.nn.grouped_conv import ConvPlan
from epsanet_fused.utils.capture import as_arguments
from epsanet_fused.utils.memory_format import MEMORY_FORMATS, memory_format_name
from epsanet_fused.utils.progress import progress
from epsanet_fused.utils.timing import Timing, Variant, interleave, make_clock

REPS, SECONDS = 15, 10.0
# Each of these is measured by removing it from all rewrites.
_REMOVALS: Mapping[str, Mapping[str, Any]] = {
    "norms folded into convolutions": {"fold": False},
    "norm and relu in the PSA tail": {"epilogue": False},
    "fused calls: convolution + residual + relu": {"fused_calls": False},
    "convolution plans": {"plans": {}},
}


def optimize_for_inference(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    *,
    memory_format: torch.memory_format | None = None,
    dtype: torch.dtype | None = None,
    cuda_graph: bool = False,
    inplace: bool = False,
    plan_file: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Return a faster model for inference, with the same state_dict and numbers up to rounding.

    Any model that holds EPSABlocks or PSA modules is accepted, this package's or others built like
    the official ones. Each is first verified on random inputs; one with hooks, parametrised weights
    or another structure is skipped. Each rewrite (folded norms, fused calls, merged or tiled convs,
    the memory format) is measured on ``example_input``, on its device and with the current number
    of threads, and is applied only if it wins. The result accepts other sizes and batches, too.

    Args:
        model: in eval mode.
        example_input: the input to measure with: a tensor, or a tuple of arguments.
        memory_format: of the activations; None measures both.
        dtype: convert a copy of the model to it; the result takes inputs of this dtype. None keeps
            the model's.
        cuda_graph: also capture the model in a CUDA graph for inputs like the example; others run
            without it. Only for a model that returns one tensor.
        inplace: change ``model`` itself, after all measurements. A model that is itself a block, a
            PSA module or a row of blocks is replaced nevertheless.
        plan_file: a file of convolution plans to read and to extend, see ``plan_convs``.

    Returns:
        The model. ``print(result.report)`` shows the rewrites and their gains, the skipped modules
        with reasons, and the largest error. It has no gradients, no vmap and no training mode. It
        follows later changes of its parameters.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if the model is in training mode or holds nothing to rewrite, or ``cuda_graph``
            is asked for on another device.
    """
    _check_arguments(model, example_input, memory_format, dtype, cuda_graph)
    original_args = args = as_arguments(example_input)
    work = copy_sharing_tensors(model) if inplace and dtype is None else copy.deepcopy(model)
    if dtype is not None:
        work, args = work.to(dtype), _cast(args, dtype)
    with torch.no_grad():
        search = _Search(
            model, original_args, work, args, find_targets(work, args), plan_file, cuda_graph
        )
        result, report = search.run(memory_format)
        if inplace:
            result = _move_into(model, result, dtype)
        result.requires_grad_(False)
        if cuda_graph:
            result, report = _capture_graph(result, args, report)
    if report.rewrites is None and not isinstance(result, GraphedModel):
        result.register_forward_pre_hook(_refuse_transforms)
    result.report = report  # type: ignore[assignment]
    return result


def _refuse_transforms(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Refuse what rewritten modules refuse, for a model in which no rewrite was faster."""
    for x in tree_leaves(args):
        if isinstance(x, Tensor):
            refuse_transforms(x, module.parameters())


def _check_arguments(
    model: Any,
    example_input: Any,
    memory_format: torch.memory_format | None,
    dtype: torch.dtype | None,
    cuda_graph: bool,
) -> None:
    name = "optimize_for_inference"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")
    if training := [n or "the model itself" for n, m in model.named_modules() if m.training]:
        raise ValueError(
            f"{name}: model must be in eval mode, but {training[0]} is in training mode; call "
            f"model.eval() first"
        )
    if memory_format not in (None, *MEMORY_FORMATS.values()):
        raise ValueError(
            f"{name}: memory_format must be None, torch.contiguous_format or torch.channels_last, "
            f"got {memory_format}"
        )
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"{name}: dtype must be None, float16, bfloat16, float32 or float64, got {dtype}"
        )
    tensors = [t for t in tree_leaves(as_arguments(example_input)) if isinstance(t, Tensor)]
    if not tensors:
        raise ValueError(
            f"{name}: example_input must be a tensor or a tuple that holds one, got "
            f"{type(example_input).__name__}"
        )
    if cuda_graph and tensors[0].device.type != "cuda":
        raise ValueError(
            f"{name}: cuda_graph needs a model on a CUDA device, but example_input is on "
            f"{tensors[0].device}"
        )


class _Search(NamedTuple):
    """The search for the rewrites that make ``work`` faster than ``model``.

    model, original_args: as the user gave them.
    work, args: the copy to rewrite and its arguments, both in the dtype that was asked for.
    targets: what can be rewritten in ``work``.
    plan_file, cuda_graph: see ``optimize_for_inference``. A graph's replay costs no host time.
    """

    model: nn.Module
    original_args: tuple[Any, ...]
    work: nn.Module
    args: tuple[Any, ...]
    targets: Targets
    plan_file: str | os.PathLike[str] | None
    cuda_graph: bool

    def run(self, memory_format: torch.memory_format | None) -> tuple[nn.Module, Report]:
        """Return the fastest model, which is ``work`` itself if no rewrite wins, and the report."""
        memory_formats = [memory_format] if memory_format else [*MEMORY_FORMATS.values()]
        candidates = [Rewrites(memory_format=f, plans=self._plan(f)) for f in memory_formats]
        before, *timings = self._time(candidates, with_original=True)
        best = min(range(len(candidates)), key=lambda i: timings[i].p50)
        chosen, after = candidates[best], timings[best]
        gains = [
            Gain(f"memory format {_name(chosen)}, not {_name(other)}", timing, after, True)
            for other, timing in zip(candidates, timings, strict=True)
            if other is not chosen
        ]
        chosen, removal_gains = self._drop_useless(chosen)
        gains += removal_gains
        if not all(gain.applied for gain in gains):
            before, after = self._time([chosen], with_original=True)
        wins = _is_faster(after, before)
        result = apply_rewrites(self.work, self.targets, chosen) if wins else self.work
        errors = _output_errors(result(*self.args), self.model(*self.original_args))
        report = Report(
            targets=self.targets,
            setting=describe_setting(self.args),
            rewrites=chosen if wins else None,
            before=before,
            after=after if wins else before,
            gains=tuple(gains),
            max_error=errors[0],
            relative_error=errors[1],
        )
        return result, report

    def _plan(self, memory_format: torch.memory_format) -> Mapping[str, ConvPlan]:
        return plan_convs(self.work, self.args, memory_format=memory_format, file=self.plan_file)

    def _drop_useless(self, rewrites: Rewrites) -> tuple[Rewrites, list[Gain]]:
        """Drop each rewrite whose removal does not slow the model down."""
        removals = _removals(rewrites)
        reduced = [rewrites._replace(**change) for change in removals.values()]
        with_all, *timings = self._time([rewrites, *reduced])
        kept, gains = rewrites, []
        for (name, change), other, without in zip(removals.items(), reduced, timings, strict=True):
            with_it = with_all
            if with_it.ties(without):  # a small difference takes more samples to tell
                with_it, without = self._time([rewrites, other], reps=4 * REPS)
            gains.append(Gain(name, without, with_it, _is_faster(with_it, without)))
            if not gains[-1].applied:
                kept = kept._replace(**change)
        return kept, gains

    def _time(
        self, candidates: list[Rewrites], with_original: bool = False, reps: int = REPS
    ) -> list[Timing]:
        """Time the models with these rewrites in turns, the original one first if asked for."""
        calls = [functools.partial(self.model, *self.original_args)] if with_original else []
        for _, rewrites in progress(candidates, "model", lambda r: f"measure {_name(r)}"):
            rewritten = apply_rewrites(self.work, self.targets, rewrites)
            calls.append(functools.partial(rewritten, *self.args))
        clock = make_clock(_device(self.args), queued=self.cuda_graph)
        variants = {str(i): Variant(call) for i, call in enumerate(calls)}
        return list(interleave(variants, clock, reps, SECONDS).values())


def _removals(rewrites: Rewrites) -> dict[str, Mapping[str, Any]]:
    """Return the removals to measure: without plans there is no PSA module, and no epilogue."""
    if rewrites.plans:
        return dict(_REMOVALS)
    psa_only = {"plans", "epilogue"}
    return {name: change for name, change in _REMOVALS.items() if not change.keys() & psa_only}


def _is_faster(timing: Timing, other: Timing) -> bool:
    return timing.p50 < other.p50 and not timing.ties(other)


def _name(rewrites: Rewrites) -> str:
    return memory_format_name(rewrites.memory_format)


def _device(args: tuple[Any, ...]) -> torch.device:
    return next(t.device for t in tree_leaves(args) if isinstance(t, Tensor))


def _cast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Convert the floating-point tensors among the arguments."""
    cast: tuple[Any, ...] = tree_map(lambda t: t.to(dtype) if _is_float(t) else t, args)
    return cast


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _output_errors(result: Any, expected: Any) -> tuple[float, float]:
    """Return the largest error of any floating-point tensor, absolute and relative to its size."""
    pairs = zip(tree_leaves(result), tree_leaves(expected), strict=True)
    tensors = [(r.double(), e.double()) for r, e in pairs if _is_float(e)]
    if any(r.shape != e.shape for r, e in tensors):  # such as another number of detections
        return float("inf"), float("inf")
    errors = [((r - e).abs().max().item(), e.abs().max().item()) for r, e in tensors if e.numel()]
    absolute = max((error for error, _ in errors), default=0.0)
    relative = max((error / (largest or 1) for error, largest in errors), default=0.0)
    return absolute, relative


def _move_into(model: nn.Module, made: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Give ``model`` the children of ``made``; a model that is itself a block is replaced."""
    if type(made) is not type(model):
        return made
    if dtype is not None:
        model.to(dtype)
    for name, child in made.named_children():
        setattr(model, name, child)
    move_stem(made, model)
    return model


def _capture_graph(
    model: nn.Module, args: tuple[Any, ...], report: Report
) -> tuple[nn.Module, Report]:
    """Capture the model in a CUDA graph, and return that if it is faster."""
    graphed = GraphedModel(model, args)
    variants = {
        "plain": Variant(functools.partial(model, *args)),
        "graph": Variant(functools.partial(graphed, *args)),
    }
    plain, graph = interleave(variants, make_clock(_device(args)), REPS, SECONDS).values()
    applied = _is_faster(graph, plain)
    report = report._replace(gains=(*report.gains, Gain("CUDA graph", plain, graph, applied)))
    if not applied:
        return model, report
    return graphed, report._replace(after=graph)
