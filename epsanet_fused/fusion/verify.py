"""Whether a module computes what a fused one would: shown on noise, in float64.

A module is a black box here. A copy of it with random weights runs beside each of the builds that
its parts allow. The noise is to reach whatever another activation, another softmax, a clamp or a
detach would change: hidden units on both sides of zero, small numbers, large ones, and NaN.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from epsanet_fused.backends.registry import use_backend
from epsanet_fused.fusion.detect import Parts, UnfusableError, bypassed, only_conv
from epsanet_fused.fusion.modules import Build, FusedPSAVariant

# As much as code loses that goes through float32 on its way, as some does for autocast.
TOLERANCE = 1e-6
LARGE = 50.0


class Trial(NamedTuple):
    """One run: on which noise, with which weights, in which mode."""

    seed: int
    B: int
    larger: tuple[int, int]  # than the smallest image that the convolutions take
    training: bool = False
    grads: bool = False
    scale: float = 1.0


TRIALS = (
    Trial(0, B=2, larger=(0, 3), training=True, grads=True),
    Trial(1, B=1, larger=(2, 1), grads=True),
    Trial(2, B=2, larger=(1, 1), scale=LARGE),
    Trial(3, B=1, larger=(13, 20)),
)


def prove(module: nn.Module, parts: Parts, is_reversed: bool) -> Build:
    """The build whose fused module computes what this one does.

    Raises:
        UnfusableError: if there is none.
    """
    failures = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), use_backend("reference"):
        try:
            twin = _twin(module)
        except Exception as error:  # what can be in a module that can't be copied is endless
            raise UnfusableError(f"it can't be copied: {_first_line(error)}") from None
        for split in (False, True):
            try:
                builds = _builds_that_agree(twin, parts, split)
            except UnfusableError:
                raise
            except Exception as error:  # nor is there an end to what a module may raise
                failures.append(_first_line(error))
                continue
            for build in builds:
                if build.reversed == is_reversed:
                    return build
                order = "reversed" if build.reversed else "natural"
                raise UnfusableError(f"its branches are in {order} order; order={order!r} takes it")
    if len(failures) == 2:
        raise UnfusableError(f"it can't be run on noise: {failures[0]}")
    raise UnfusableError("it computes something else than a PSA module of such parts")


def _twin(module: nn.Module) -> nn.Module:
    """A copy in float64, without hooks: who is behind them may be large, and needn't know."""
    hooks = (
        value
        for part in module.modules()
        for name, value in vars(part).items()
        if "_hooks" in name and isinstance(value, dict)
    )
    twin = copy.deepcopy(module, memo={id(each): OrderedDict() for each in hooks})
    if next(module.parameters()).device.type == "mps":  # which has no float64
        twin = twin.cpu()
    return twin.double().requires_grad_()


def _builds_that_agree(twin: nn.Module, parts: Parts, split: bool) -> list[Build]:
    """Those of the builds that give what the twin gives, in all trials."""
    builds: list[Build] | None = None
    for trial in TRIALS:
        generator = torch.Generator().manual_seed(trial.seed)
        _randomize(twin, parts, trial, generator)
        x = _noise(twin, parts, split, trial, generator)
        true = _observe(twin, parts, x, trial)
        if builds is None:
            overwrites = not torch.equal(true.after, x)
            kinds = itertools.product((False, True), repeat=2)
            builds = [Build(*parts, split, relu, order, overwrites) for relu, order in kinds]
        builds = [build for build in builds if _agrees(twin, build, x, trial, true)]
        if not builds:
            break
    return builds or []


@torch.no_grad()
def _randomize(twin: nn.Module, parts: Parts, trial: Trial, generator: torch.Generator) -> None:
    """Weights that keep the size of what they are applied to, so that no gate is saturated."""
    for p in twin.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype, device="cpu")
        # A bias is small, for a hidden unit to be on both sides of zero.
        p.copy_(noise * (0.3 if p.dim() < 2 else (len(p) / p.numel()) ** 0.5))
    for _, second in parts.ses:
        for p in twin.get_submodule(second).parameters():
            p /= trial.scale


def _noise(
    twin: nn.Module, parts: Parts, split: bool, trial: Trial, generator: torch.Generator
) -> Tensor:
    """(B, C_in, H, W), channels with means of their own; a large one has a NaN in one sample."""
    convs = [only_conv(twin.get_submodule(name)) for name in parts.branches]
    least = max(_smallest_image(conv) for conv in convs)
    C = sum(conv.in_channels for conv in convs) if split else convs[0].in_channels
    H, W = (least + more for more in trial.larger)
    shape, options = (trial.B, C), {"generator": generator, "device": "cpu"}
    x = torch.randn(*shape, H, W, **options) + torch.randn(*shape, 1, 1, **options)
    x *= trial.scale
    if trial.scale != 1:
        x[0, 0, 0, 0] = torch.nan
    return x.to(convs[0].weight)


def _smallest_image(conv: nn.Conv2d) -> int:
    """A side that the convolution takes, also where it mirrors the image around its edges."""
    extents = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "valid" or conv.padding == (0, 0):
        return max(extents) + 1
    padding = extents if conv.padding == "same" else conv.padding
    return max(3, *(p + 1 for p in padding))


class Result(NamedTuple):
    """What a module makes, what it leaves of its input, and the gradients if it has any."""

    out: Tensor
    after: Tensor
    grads: list[Tensor] | None


def _observe(twin: nn.Module, parts: Parts, x: Tensor, trial: Trial) -> Result:
    """``_run``, and an eye on what a fused module would not do."""
    twin.train(trial.training)  # which is a mark, too
    parts_before = {name: _marks(part) for name, part in bypassed(twin, parts).items()}
    random_before = torch.get_rng_state()
    result = _run(twin, x, trial)
    if not torch.equal(torch.get_rng_state(), random_before):
        raise UnfusableError("it draws random numbers")
    for name, part in bypassed(twin, parts).items():
        before, now = parts_before[name], _marks(part)
        for mark in before.keys() | now.keys():
            if before.get(mark) != now.get(mark):
                kept = f"{name}.{mark}" if name else mark
                raise UnfusableError(f"it keeps something from call to call: {kept}")
    return result


def _marks(part: nn.Module) -> dict[str, tuple[int, Any]]:
    """What is written on a module, in a form in which a change shows."""
    return {
        name: (id(value), len(value) if isinstance(value, (list, dict, set)) else None)
        for name, value in vars(part).items()
    }


def _run(module: nn.Module, x: Tensor, trial: Trial) -> Result:
    module.train(trial.training)
    buffers = [(b, b.clone()) for b in module.buffers()]
    try:
        with torch.set_grad_enabled(trial.grads), torch.autocast(x.device.type, enabled=False):
            return _results(module, x, trial)
    finally:
        with torch.no_grad():
            for buffer, before in buffers:  # the statistics of a norm
                buffer.copy_(before)


def _results(module: nn.Module, x: Tensor, trial: Trial) -> Result:
    leaves = [x.clone().requires_grad_(), *module.parameters()]
    given = leaves[0] * 1  # no leaf, which a module may not write over
    out = module(given)
    if not isinstance(out, Tensor):
        raise TypeError(f"it returns a {type(out).__name__}")
    after = given.detach().clone()
    if not trial.grads:
        return Result(out, after, None)
    ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    try:
        grads = torch.autograd.grad((out * ramp).sum(), leaves, allow_unused=True)
    except RuntimeError:
        if torch.equal(after, x):
            raise
        return Result(out.detach(), after, None)  # it wrote over what its own gradient needs
    return Result(out.detach(), after, [torch.zeros(()) if g is None else g for g in grads])


def _agrees(twin: nn.Module, build: Build, x: Tensor, trial: Trial, true: Result) -> bool:
    """Whether the fused module of this build does the same; gradients only if there are some."""
    try:
        found = _run(FusedPSAVariant.standing_for(twin, build), x, trial)
    except Exception:  # the branches don't fit together, or aren't even tensors
        return False
    if not (_close(found.out, true.out) and _close(found.after, true.after)):
        return False
    if true.grads is None:
        return True
    return found.grads is not None and all(map(_close, found.grads, true.grads))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    return bool((a - b).norm() <= TOLERANCE * b.norm() + 1e-12)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
