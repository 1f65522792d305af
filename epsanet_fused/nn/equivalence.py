"""Prove by numbers that one module computes what another one does.

The module is a black box. A float64 copy of it runs on random weights and random inputs, and so
does each candidate for its replacement. A candidate is right if outputs, gradients and the effect
on the input agree in all trials.

The trials are chosen so that another activation, softmax, clamp or detach changes the results:
hidden units on both sides of zero, small numbers, large numbers, and NaN.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from epsanet_fused.backends.registry import use_backend
from epsanet_fused.nn.effects import (
    changed_attribute,
    random_states,
    take_snapshot,
    unchanged_random_states,
)
from epsanet_fused.nn.psa_layers import (
    PSALayers,
    UnfusableError,
    branch_convs,
    bypassed_modules,
)

# Relative. Modules that convert to float32 inside, as some do for autocast, reach no better.
TOLERANCE = 1e-6
# What is not this close computes something else, and need not be run in float32.
NEAR = 1e-2
LARGE = 50.0


class Trial(NamedTuple):
    """The random input and the mode of one run.

    Attributes:
        seed: of weights and input.
        B: batch size.
        extra_size: height and width of the input beyond the smallest that the convolutions accept.
        training: run in training mode.
        grads: compare gradients too.
        scale: factor of the input.
    """

    seed: int
    B: int
    extra_size: tuple[int, int]
    training: bool = False
    grads: bool = False
    scale: float = 1.0


TRIALS = (
    Trial(0, B=2, extra_size=(0, 3), training=True, grads=True),
    Trial(1, B=1, extra_size=(2, 1), grads=True),
    Trial(2, B=2, extra_size=(1, 1), scale=LARGE),
    Trial(3, B=1, extra_size=(13, 20)),
)


class CallResult(NamedTuple):
    """The effects of one call of a module.

    Attributes:
        out: the output.
        input_after: the input after the call.
        grads: the gradients of input and parameters, if the trial asks for them.
    """

    out: Tensor
    input_after: Tensor
    grads: list[Tensor] | None


def copy_in_float64(module: nn.Module) -> nn.Module:
    """Return a copy without hooks: they must not be called, and may refer to large objects."""
    hooks = (
        value
        for part in module.modules()
        for name, value in vars(part).items()
        if "_hooks" in name and isinstance(value, dict)
    )
    try:
        copied = copy.deepcopy(module, memo={id(each): OrderedDict() for each in hooks})
        if next(module.parameters()).device.type == "mps":  # which has no float64
            copied = copied.cpu()
        return copied.double().requires_grad_()
    except Exception as error:  # any attribute of a module can raise any exception
        raise UnfusableError(f"it can't be copied: {first_line(error)}") from None


Candidate = TypeVar("Candidate")


class Verdict(NamedTuple, Generic[Candidate]):
    """The candidates that agreed in all trials, and how far the module got.

    Attributes:
        found: the candidates.
        progress: the number of trials that the module ran in and some candidate agreed in.
        reason: why no candidate is left, or "".
    """

    found: list[Candidate]
    progress: int
    reason: str


def prove(
    module: nn.Module,
    layers: PSALayers,
    split_input: bool,
    candidates: Callable[[bool], Sequence[Candidate]],
    build: Callable[[nn.Module, Candidate], nn.Module],
) -> Verdict[Candidate]:
    """Find the candidates that compute what ``module`` computes.

    Args:
        module: it is not run or changed; a float64 copy of it is.
        layers: the names of its layers.
        split_input: whether each branch takes an equal share of the input's channels.
        candidates: makes the candidates, told whether the module overwrites its input.
        build: makes the replacement for a candidate, with the layers of the module that it gets.

    Raises:
        UnfusableError: if the module has effects that no replacement has.
    """
    with (
        unchanged_random_states(),
        torch.inference_mode(False),
        use_backend("reference"),
    ):
        module = copy_in_float64(module)
        left: Sequence[Candidate] | None = None
        for progress, trial in enumerate(TRIALS):
            generator = torch.Generator().manual_seed(trial.seed)
            randomize(module, generator)
            _shrink_hidden_units(module, layers, trial.scale)
            x = _random_input(module, layers, split_input, trial, generator)
            try:
                expected = _run_original(module, layers, x, trial)
            except UnfusableError:
                raise
            except Exception as error:  # a module can raise any exception
                return Verdict([], progress, f"it can't be run on noise: {first_line(error)}")
            if left is None:
                left = candidates(not torch.equal(expected.input_after, x))
            left = [c for c in left if _agrees(module, c, build, x, trial, expected)]
            if not left:
                reason = "it computes something else than a PSA module of such parts"
                return Verdict([], progress + 1, reason)
        return Verdict(list(left or []), len(TRIALS), "")


@torch.no_grad()
def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Draw parameters that preserve the size of activations, so that no sigmoid saturates.

    Biases are small: hidden units occur on both sides of zero.
    """
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype, device="cpu")
        p.copy_(noise * (0.3 if p.dim() < 2 else (len(p) / p.numel()) ** 0.5))


@torch.no_grad()
def _shrink_hidden_units(module: nn.Module, layers: PSALayers, scale: float) -> None:
    """Divide the SEs' second layers by the factor of the input."""
    for _, second in layers.ses:
        for p in module.get_submodule(second).parameters():
            p.div_(scale)


def _random_input(
    module: nn.Module,
    layers: PSALayers,
    split_input: bool,
    trial: Trial,
    generator: torch.Generator,
) -> Tensor:
    """Return (B, C_in, H, W); the channels' means differ, and a scaled input holds one NaN."""
    convs = branch_convs(module, layers)
    # A convolution without padding leaves a smaller input to the next one.
    side = max(sum(map(_smallest_side, branch)) for branch in convs)
    widths = [branch[0].in_channels for branch in convs]
    C = sum(widths) if split_input else widths[0]
    H, W = (side + extra for extra in trial.extra_size)
    noise = torch.randn(trial.B, C, H, W, generator=generator, device="cpu")
    means = torch.randn(trial.B, C, 1, 1, generator=generator, device="cpu")
    x = (noise + means) * trial.scale
    if trial.scale != 1:
        x[0, 0, 0, 0] = torch.nan
    return x.to(convs[0][0].weight)


def _smallest_side(conv: nn.Conv2d) -> int:
    """Return a height and width that ``conv`` accepts, also with reflection padding."""
    extents = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    padding = conv.padding
    if isinstance(padding, str):
        padding = (0, 0) if padding == "valid" else tuple(extents)
    if padding == (0, 0):
        return max(extents) + 1
    return max(3, *(p + 1 for p in padding))


def _run_original(module: nn.Module, layers: PSALayers, x: Tensor, trial: Trial) -> CallResult:
    """Run the module; raise an UnfusableError if it has effects that a fused module lacks."""
    module.train(trial.training)  # before the snapshot, because it sets an attribute
    parts = bypassed_modules(module, layers)
    before = take_snapshot(parts)
    states = random_states()
    result = _run(module, x, trial)
    if random_states() != states:
        raise UnfusableError("it draws random numbers")
    changed = changed_attribute(before, take_snapshot(parts))
    if changed is not None:
        raise UnfusableError(f"it keeps something from call to call: {changed}")
    return result


def _agrees(
    module: nn.Module,
    candidate: Candidate,
    build: Callable[[nn.Module, Candidate], nn.Module],
    x: Tensor,
    trial: Trial,
    expected: CallResult,
) -> bool:
    """Return whether the candidate gives the expected result.

    Gradients are compared if the original has them.
    """
    try:
        actual = _run(build(module, candidate), x, trial)
        if _is_close(actual, expected):
            return True
        if not _is_close(actual, expected, NEAR):
            return False
        single = _run(build(copy.deepcopy(module).float(), candidate), x.float(), trial)
    except Exception:  # the branches' shapes differ, or they are no tensors
        return False
    return _is_close(actual, expected, TOLERANCE, single)


def _is_close(
    actual: CallResult,
    expected: CallResult,
    tolerance: float = TOLERANCE,
    single: CallResult | None = None,
) -> bool:
    """Compare two results.

    A gradient can be a difference of nearly equal numbers, of which float32 loses more than of
    others: ``single``, the candidate's result in float32, shows how much.
    """
    if expected.grads is not None and actual.grads is None:
        return False
    pairs = [(actual.out, expected.out), (actual.input_after, expected.input_after)]
    pairs += zip(actual.grads or (), expected.grads or (), strict=False)
    rounded: list[Tensor | None] = [None] * len(pairs)
    if single is not None:
        rounded = [single.out, single.input_after, *(single.grads or ())]
    return all(_close(a, b, tolerance, r) for (a, b), r in zip(pairs, rounded, strict=False))


def _run(module: nn.Module, x: Tensor, trial: Trial) -> CallResult:
    """Run the module as the trial says, and restore its buffers, such as a norm's statistics."""
    module.train(trial.training)
    buffers = [(b, b.clone()) for b in module.buffers()]
    try:
        with torch.set_grad_enabled(trial.grads), torch.autocast(x.device.type, enabled=False):
            return _call(module, x, trial.grads)
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _call(module: nn.Module, x: Tensor, grads: bool) -> CallResult:
    leaves = [x.clone().requires_grad_(), *module.parameters()]
    given = leaves[0] * 1  # not a leaf, so that the module may write to it
    out = module(given)
    if not isinstance(out, Tensor):
        raise TypeError(f"it returns a {type(out).__name__}")
    input_after = given.detach().clone()
    if not grads:
        return CallResult(out, input_after, None)
    ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    try:
        found = torch.autograd.grad((out * ramp).sum(), leaves, allow_unused=True)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        # The module overwrote what its own backward needs: it can't be trained.
        return CallResult(out.detach(), input_after, None)
    return CallResult(
        out.detach(), input_after, [torch.zeros(()) if g is None else g for g in found]
    )


def _close(a: Tensor, b: Tensor, tolerance: float, rounded: Tensor | None) -> bool:
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    allowed = tolerance * b.norm() + 1e-12
    if rounded is not None:
        allowed = allowed + 2 * (rounded.nan_to_num().to(a) - a).norm()
    return bool((a - b).norm() <= allowed)


def first_line(error: Exception) -> str:
    """Return the class of the error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
