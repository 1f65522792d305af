"""optimize_for_inference: exact rewrites for speed, applied where they were measured to win."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from epsanet_fused.inference.blocks import Rewrites
from epsanet_fused.inference.conv_planner import FORMATS, plan_convs
from epsanet_fused.inference.cuda_graph import GraphedModel
from epsanet_fused.inference.report import Gain, Report, setting
from epsanet_fused.inference.rewrite import Targets, apply, find_targets, sharing_copy
from epsanet_fused.utils.capture import as_arguments
from epsanet_fused.utils.progress import progress
from epsanet_fused.utils.timing import Timing, Variant, interleave, make_clock

REPS, SECONDS = 15, 10.0
# What is measured by leaving it out.
_WITHOUT: Mapping[str, Mapping[str, Any]] = {
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
    """A faster model for inference, with the same state_dict and the same numbers up to rounding.

    Works on any model that holds EPSABlocks or PSA modules, ours or built like the official ones;
    each is first shown, on noise, to compute what its replacement does. What has hooks,
    parametrised weights or another structure is left alone, and the report names it.

    - BatchNorms are folded into the convolutions before them, bn2 and its ReLU into the tail of the
      PSA module, residuals and ReLUs into the library's own convolution calls.
    - Grouped convolutions run merged or widened, whichever is the fastest (``plan_convs``).
    - The memory format is chosen for the whole model.

    Each of these is measured on ``example_input``, on its device and with the present number of
    threads, and is applied only if it wins. The result takes other sizes and batches, too.

    Args:
        model: in eval mode.
        example_input: what it is called with: a tensor, or a tuple of arguments.
        memory_format: of the activations; None measures both.
        dtype: to convert a copy of the model to; the result takes inputs of this dtype. None keeps
            the model's.
        cuda_graph: also capture the whole model in a CUDA graph for inputs like the example; others
            run without. Only for a model that returns one tensor.
        inplace: change ``model`` itself, once all is measured, instead of a copy. A model that is
            itself nothing but a block, a PSA module or a row of blocks can only be replaced.
        plan_file: a file of convolution plans to read and to add to, see ``plan_convs``.

    Returns:
        The model. ``print(result.report)`` tells what was done, what each rewrite gained, what was
        left alone and why, and the largest error. It has no gradients and no training mode.
        Parameters may be changed or loaded later: what is derived from them follows.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if the model is in training mode, holds nothing to rewrite, or ``cuda_graph`` is
            asked for on another device.
    """
    _check(model, example_input, memory_format, dtype, cuda_graph)
    shares = inplace and dtype is None
    work = sharing_copy(model) if shares else copy.deepcopy(model)
    original, args = as_arguments(example_input), as_arguments(example_input)
    if dtype is not None:
        work = work.to(dtype)
        args = tree_map(lambda t: t.to(dtype) if _is_float(t) else t, args)
    with torch.no_grad():
        targets = find_targets(work, args)
        search = _Search(model, original, work, args, targets, plan_file)
        rewrites, report = search.run([memory_format] if memory_format else [*FORMATS.values()])
        made = work if rewrites is None else apply(work, targets, rewrites)
        report = report._replace(**_errors(made(*args), model(*original)))
        if inplace:
            made = _move(made, model, dtype)
        made.requires_grad_(False)
        if cuda_graph:
            made, report = _graphed(made, args, report)
    made.report = report
    return made


def _check(model, example_input, memory_format, dtype, cuda_graph) -> None:
    name = "optimize_for_inference"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")
    if training := [n or "the model itself" for n, m in model.named_modules() if m.training]:
        raise ValueError(
            f"{name}: model must be in eval mode, but {training[0]} is in training mode; call "
            f"model.eval() first"
        )
    if memory_format not in (None, *FORMATS.values()):
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
    """Looks for the rewrites that win."""

    model: nn.Module
    original: tuple[Any, ...]
    work: nn.Module
    args: tuple[Any, ...]
    targets: Targets
    plan_file: str | os.PathLike[str] | None

    def run(self, formats: list[torch.memory_format]) -> tuple[Rewrites | None, Report]:
        full = [Rewrites(memory_format=f, plans=self._plans(f)) for f in formats]
        before, *timings = self._time(full, with_original=True)
        best = min(range(len(full)), key=lambda i: timings[i].p50)
        chosen, after = full[best], timings[best]
        gains = [
            Gain(f"memory format {_name(chosen)}, not {_name(other)}", timing, after, True)
            for other, timing in zip(full, timings, strict=True)
            if other is not chosen
        ]
        chosen, tried = self._without_losses(chosen)
        gains += tried
        if not all(gain.applied for gain in gains):
            before, after = self._time([chosen], with_original=True)
        wins = after.p50 < before.p50 and not after.ties(before)
        report = Report(
            self.targets, setting(self.args), chosen if wins else None, before,
            after if wins else before,
            tuple(gains),
        )  # fmt: skip
        return (chosen if wins else None), report

    def _plans(self, memory_format: torch.memory_format):
        return plan_convs(self.work, self.args, memory_format=memory_format, file=self.plan_file)

    def _without_losses(self, full: Rewrites) -> tuple[Rewrites, list[Gain]]:
        """What is left of the rewrites when those are taken out without which it is no slower."""
        left_out = {
            name: change
            for name, change in _WITHOUT.items()
            if full.plans or not change.keys() & {"plans", "epilogue"}  # without a PSA module
        }
        others = [full._replace(**change) for change in left_out.values()]
        after, *timings = self._time([full, *others])
        gains, chosen = [], full
        for (name, change), other, timing in zip(left_out.items(), others, timings, strict=True):
            with_it = after
            if with_it.ties(timing):  # a small difference takes more samples to tell
                with_it, timing = self._time([full, other], reps=4 * REPS)
            applied = with_it.p50 < timing.p50 and not with_it.ties(timing)
            gains.append(Gain(name, timing, with_it, applied))
            if not applied:
                chosen = chosen._replace(**change)
        return chosen, gains

    def _time(
        self, variants: list[Rewrites], with_original: bool = False, reps: int = REPS
    ) -> list[Timing]:
        calls = [lambda: self.model(*self.original)] if with_original else []
        for _, rewrites in progress(variants, "model", lambda r: f"measure {_name(r)}"):
            made = apply(self.work, self.targets, rewrites)
            calls.append(lambda made=made: made(*self.args))
        clock = make_clock(_device(self.args))
        named = {str(i): Variant(call) for i, call in enumerate(calls)}
        return list(interleave(named, clock, reps, SECONDS).values())


def _name(rewrites: Rewrites) -> str:
    return next(name for name, f in FORMATS.items() if f == rewrites.memory_format)


def _device(args: tuple[Any, ...]) -> torch.device:
    return next(t.device for t in tree_leaves(args) if isinstance(t, Tensor))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _errors(result: Any, true: Any) -> dict[str, float]:
    """The largest difference in any tensor of the output, absolute and as a share of its size."""
    pairs = zip(tree_leaves(result), tree_leaves(true), strict=True)
    tensors = [(r.double(), t.double()) for r, t in pairs if _is_float(t)]
    if any(r.shape != t.shape for r, t in tensors):  # such as another number of detections
        return {"max_error": float("inf"), "relative_error": float("inf")}
    errors = [((r - t).abs().max().item(), t.abs().max().item()) for r, t in tensors if t.numel()]
    return {
        "max_error": max((error for error, _ in errors), default=0.0),
        "relative_error": max((error / (size or 1) for error, size in errors), default=0.0),
    }


def _move(made: nn.Module, model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Make ``model`` what was made of its copy; a model that is itself a block is replaced."""
    if type(made) is not type(model):
        return made
    if dtype is not None:
        model.to(dtype)
    for name, child in made.named_children():
        setattr(model, name, child)
    return model


def _graphed(made: nn.Module, args: tuple[Any, ...], report: Report) -> tuple[nn.Module, Report]:
    graphed = GraphedModel(made, args)
    clock = make_clock(_device(args))
    named = {"plain": Variant(lambda: made(*args)), "graph": Variant(lambda: graphed(*args))}
    plain, graph = interleave(named, clock, REPS, SECONDS).values()
    applied = graph.p50 < plain.p50 and not graph.ties(plain)
    gains = (*report.gains, Gain("CUDA graph", plain, graph, applied))
    if not applied:
        return made, report._replace(gains=gains)
    return graphed, report._replace(gains=gains, after=graph)
