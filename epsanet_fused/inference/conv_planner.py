"""Measure which equivalent convolution (merged groups, tiled pixels) is the fastest here.

``plan_convs`` measures for a model, ``use_plans`` applies the result to a model in training, and
``fastest`` measures one convolution.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from epsanet_fused.inference.conv import PlannedConv
from epsanet_fused.inference.plan_file import read_plans, write_plans
from epsanet_fused.nn.fused_psa import CONVS, FusedPSAModule, is_psa
from epsanet_fused.nn.grouped_conv import ConvPlan, is_plain_conv, merged_conv, numeric_padding
from epsanet_fused.utils.capture import inputs_of
from epsanet_fused.utils.device_info import conv_eps, device_name, library_versions
from epsanet_fused.utils.memory_format import MEMORY_FORMATS, memory_format_name
from epsanet_fused.utils.progress import progress
from epsanet_fused.utils.timing import Clock, Timing, Variant, interleave, make_clock

TILES = tuple(itertools.product((1, 2, 4), (1, 2, 4, 8)))[1:]
# In 16 bits oneDNN (as of PyTorch 2.13) gives wrong sums for some of the wider kernels that tiles
# need, such as 7 x 8. Tests show that the taller kernels of these tiles are right.
TALL_TILES = ((2, 1), (4, 1))
# A group with more channels than this after tiling is not tiled: that has never been faster.
MAX_WIDTH = 32
# On CUDA devices: matrix units make 64 to 128 outputs at a time, and 32 are worth a try.
CUDA_TILES = ((1, 2), (2, 2), (2, 4), (4, 4))
CUDA_WIDTHS = range(32, 129)
# A candidate that takes this many times as long as the fastest one is not timed a second time.
GIVE_UP_FACTOR = 1.5
REPS, SECONDS = 15, 0.4

_plan_cache: dict[str, ConvPlan] = {}  # by ConvProblem.key()


class ConvProblem(NamedTuple):
    """A convolution in its place in a model: all that its time depends on, except the machine."""

    device: torch.device
    training: bool
    dtype: torch.dtype
    memory_format: torch.memory_format  # of the input and the output
    shape: tuple[int, ...]  # of the input
    channels: int  # of the output
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def eps(self) -> float:
        """The relative rounding of the products."""
        return conv_eps(self.dtype, self.device)

    def key(self) -> str:
        """Return a line of text that identifies the problem and the machine."""
        is_tf32 = self.eps != torch.finfo(self.dtype).eps
        geometry = ("kernel", "stride", "padding", "dilation")
        return ", ".join(
            [
                device_name(self.device),
                library_versions(self.device),
                "training" if self.training else "inference",
                str(self.dtype).removeprefix("torch.") + (" as tf32" if is_tf32 else ""),
                memory_format_name(self.memory_format),
                f"{_by(self.shape)} to {self.channels} in {self.groups} groups",
                *(f"{name} {_by(getattr(self, name))}" for name in geometry),
            ]
        )

    def conv(self) -> nn.Conv2d:
        """Return such a convolution with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            conv = nn.Conv2d(
                self.shape[1],
                self.channels,
                self.kernel,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
                bias=False,
            )
        return conv.to(self.device, self.dtype)

    def input(self) -> Tensor:
        """Return a random input."""
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(0))
        return x.to(self.device, self.dtype).contiguous(memory_format=self.memory_format)


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def plan_convs(
    module: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    *,
    memory_format: torch.memory_format | None = None,
    training: bool = False,
    file: str | os.PathLike[str] | None = None,
) -> dict[str, ConvPlan]:
    """Find the fastest plan for each grouped convolution of the PSA modules in ``module``.

    Each candidate is checked against the unchanged convolution, then timed in turns with the others
    on the device, with the dtype and shape that ``example_input`` leads to. A convolution that was
    measured before on the same device, with the same library versions, isn't measured again. Under
    autocast the convolutions are measured in the dtype that autocast runs them in.

    Args:
        module: a PSA module, or a model that holds some. It is run once, in its own mode; its
            running statistics are restored afterwards.
        example_input: the input to call it with: a tensor, or a tuple of arguments.
        memory_format: of the activations; None takes the format of each convolution's input.
        training: measure forward and backward together, with merged groups only.
        file: a JSON file of plans to read, and to extend after each convolution; it serves all
            machines of the same kind.

    Returns:
        The plan of each grouped convolution, by its name in ``module``. Convolutions that the
        example input doesn't reach are missing.

    Raises:
        ValueError: if ``file`` holds no plans.
    """
    problems = find_problems(module, example_input, memory_format, training)
    path = None if file is None else Path(file)
    stored = read_plans(path) if path is not None and path.exists() else {}
    _plan_cache.update(stored)
    keys = {name: problem.key() for name, problem in problems.items()}
    new = {keys[name]: p for name, p in problems.items() if keys[name] not in _plan_cache}
    if new:
        for _, (key, problem) in progress(list(new.items()), "convolution", _describe):
            _plan_cache[key] = fastest(problem)
            if path is not None:  # at once: a search that is stopped keeps what it has found
                stored[key] = _plan_cache[key]
                write_plans(path, stored)
    if path is not None and not stored.keys() >= set(keys.values()):
        write_plans(path, stored | {key: _plan_cache[key] for key in keys.values()})
    return {name: _plan_cache[key] for name, key in keys.items()}


def find_problems(
    module: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    memory_format: torch.memory_format | None,
    training: bool,
) -> dict[str, ConvProblem]:
    """Return the problem of each grouped convolution that the example input reaches, by name."""
    psas = {name: m for name, m in module.named_modules() if is_psa(m)}
    convs = {n: c for n, c in _branch_convs(psas).items() if is_plain_conv(c) and c.groups > 1}
    return {
        name: _make_problem(convs[name], x, memory_format, training)
        for name, x in inputs_of(convs, module, example_input).items()
    }


def _branch_convs(psas: Mapping[str, nn.Module]) -> dict[str, nn.Conv2d]:
    """Return the convolutions of these PSA modules, by their name in the model."""
    return {
        f"{name}.{conv}".lstrip("."): getattr(psa, conv)
        for name, psa in psas.items()
        for conv in CONVS
    }


def _describe(item: tuple[str, ConvProblem]) -> str:
    return f"plan {_by(item[1].shape)} {_by(item[1].kernel)}"


def use_plans(model: nn.Module, plans: Mapping[str, ConvPlan]) -> None:
    """Train ``model`` with merged groups, by the plans of ``plan_convs(model, training=True)``.

    Parameters, their gradients and the state_dict keep the checkpoint's shapes. Without this call
    no groups are merged in training. ``use_plans(model, {})`` undoes it.

    Args:
        model: the model whose ``FusedPSAModule``s are changed.
        plans: plans by the convolution's name in ``model``; the other convolutions run unchanged.

    Raises:
        ValueError: for a name that isn't that of a FusedPSAModule's convolution, and for a plan
            that isn't a merge; nothing is changed then.
    """
    psas = {name: m for name, m in model.named_modules() if isinstance(m, FusedPSAModule)}
    convs = _branch_convs(psas)
    for name, plan in plans.items():
        if name not in convs:
            raise ValueError(
                f"use_plans: plans must name convolutions of FusedPSAModules in the model, such as "
                f"{next(iter(convs), 'none here')}, got {name!r}"
            )
        groups = convs[name].groups
        if groups % plan.groups or plan.tile != (1, 1):
            raise ValueError(
                f"use_plans: plans[{name!r}] must leave a divisor of {groups} groups and make one "
                f"pixel at a time, got {plan}"
            )
    for name, psa in psas.items():
        own = _branch_convs({name: psa})
        merges = tuple(plans[n].groups if n in plans else own[n].groups for n in own)
        psa.merged_groups = None if own.keys().isdisjoint(plans) else merges


def _make_problem(
    conv: nn.Conv2d, x: Tensor, memory_format: torch.memory_format | None, training: bool
) -> ConvProblem:
    if memory_format is None:
        dense = x.is_contiguous()
        last = not dense and x.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if last else torch.contiguous_format
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return ConvProblem(
        x.device,
        training,
        dtype,
        memory_format,
        tuple(x.shape),
        conv.out_channels,
        _pair(conv.kernel_size),
        _pair(conv.stride),
        _pair(numeric_padding(conv)),
        _pair(conv.dilation),
        conv.groups,
    )


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    height, width = sizes
    return height, width


def candidates(problem: ConvProblem) -> list[ConvPlan]:
    """Return all plans worth measuring; the first one leaves the convolution unchanged."""
    groups, memory_format = problem.groups, problem.memory_format
    divisors = [g for g in range(groups, 0, -1) if groups % g == 0]
    plans = [ConvPlan(g, (1, 1), memory_format) for g in divisors]
    if problem.training:
        return plans
    other = next(f for f in MEMORY_FORMATS.values() if f != memory_format)
    plans += [ConvPlan(g, (1, 1), other) for g in divisors]
    if problem.dilation != (1, 1) or problem.dtype == torch.float64:
        return plans
    if problem.device.type == "cuda":
        return plans + [
            ConvPlan(g, tile, memory_format)
            for g in divisors
            for tile in CUDA_TILES
            if tile[0] * tile[1] * problem.channels // g in CUDA_WIDTHS
        ]
    # Vector units take the inputs of a group one by one, so that merging costs time there; matrix
    # units, which 16-bit dtypes run on, take many at a time.
    vector = problem.dtype == torch.float32
    plans += [
        ConvPlan(g, tile, memory_format)
        for g in (divisors[:2] if vector else divisors)
        for tile in (TILES if vector else TALL_TILES)
        if tile[0] * tile[1] * problem.channels // g <= MAX_WIDTH
    ]
    return plans


def fastest(problem: ConvProblem) -> ConvPlan:
    """Return the fastest plan; the unchanged convolution's, unless another one clearly beats it."""
    return choose(time_candidates(problem))


def choose(timings: Mapping[ConvPlan, Timing]) -> ConvPlan:
    """Return the plan that ``fastest`` takes by these timings, the unchanged plan's first."""
    unchanged = next(iter(timings))
    winner = min(timings, key=lambda plan: timings[plan].p50)
    return unchanged if timings[winner].ties(timings[unchanged]) else winner


def time_candidates(problem: ConvProblem) -> dict[ConvPlan, Timing]:
    """Time the unchanged plan, and after it all right ones that are near the fastest."""
    # Every dtype here is chosen: the problem's, and a wider one for the check.
    no_autocast = torch.autocast(problem.device.type, enabled=False)
    with torch.set_grad_enabled(problem.training), no_autocast:
        calls = _correct_calls(problem)
        unchanged = next(iter(calls))
        # A convolution takes less time than its launch at batch 1, but not in a CUDA graph.
        clock = make_clock(problem.device, queued=True)
        promising = _promising(calls, clock) | {unchanged}
        variants = {plan: Variant(call) for plan, call in calls.items() if plan in promising}
        return interleave(variants, clock, REPS, SECONDS)


# Runs a convolution: returns the output, or in training the output and the gradients.
_Call = Callable[[], tuple[Tensor, ...]]


def _correct_calls(problem: ConvProblem) -> dict[ConvPlan, _Call]:
    """Return calls of the candidates whose results are right, the unchanged convolution first.

    The libraries do have wrong kernels. The expected results are the unchanged convolution's, at
    least in float32.
    """
    unchanged, *others = candidates(problem)
    x, conv = problem.input(), problem.conv()
    wide = torch.promote_types(problem.dtype, torch.float32)
    expected = _make_call(problem, copy.deepcopy(conv).to(wide), x.to(wide), unchanged)()
    rounding = max(4 * problem.eps, 1e-5)
    calls = {unchanged: _make_call(problem, conv, x, unchanged)}
    for plan in others:
        call = _make_call(problem, conv, x, plan)
        if _agrees(call(), expected, rounding):
            calls[plan] = call
    return calls


def _promising(calls: Mapping[ConvPlan, _Call], clock: Clock) -> set[ConvPlan]:
    """Return the plans that are near the fastest one in a first quick measurement."""
    milliseconds = {}
    for plan, call in calls.items():
        call()
        milliseconds[plan] = min(clock.measure(call, 1) for _ in range(2))
    limit = GIVE_UP_FACTOR * min(milliseconds.values())
    return {plan for plan, ms in milliseconds.items() if ms <= limit}


def _make_call(problem: ConvProblem, conv: nn.Conv2d, x: Tensor, plan: ConvPlan) -> _Call:
    if not problem.training:
        planned = PlannedConv(conv, plan=plan, memory_format=problem.memory_format)
        return lambda: (planned(x),)
    x = x.detach().requires_grad_()

    def train() -> tuple[Tensor, ...]:
        out = merged_conv(x, conv, plan.groups)
        grads = torch.autograd.grad(out, (x, conv.weight), torch.ones_like(out))
        return out.detach(), *grads

    return train


def _agrees(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], rounding: float) -> bool:
    """Return whether each result is within ``rounding`` of the expected one's largest number."""
    return all(
        bool((result.to(exact) - exact).abs().max() <= rounding * exact.abs().max())
        for result, exact in zip(results, expected, strict=True)
    )
