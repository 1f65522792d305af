"""Which execution of a convolution is the fastest here: measured, and remembered."""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from epsanet_fused.inference.conv import PlannedConv
from epsanet_fused.nn.fused_psa import CONVS, FusedPSAModule, is_psa
from epsanet_fused.nn.grouped_conv import ConvPlan, merged_conv
from epsanet_fused.utils.atomic_write import write_atomically
from epsanet_fused.utils.capture import inputs_of
from epsanet_fused.utils.device_info import conv_eps, device_name, library_versions
from epsanet_fused.utils.progress import progress
from epsanet_fused.utils.timing import Variant, interleave, make_clock

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_FORMAT_NAMES = {memory_format: name for name, memory_format in FORMATS.items()}
TILES = tuple(itertools.product((1, 2, 4), (1, 2, 4, 8)))[1:]
# In 16 bits oneDNN (as of PyTorch 2.13) gives wrong sums for some kernels that tiles make wider, of
# 7 x 8 for one. Those that become only taller, by these, are tested to be right.
TALL_TILES = ((2, 1), (4, 1))
# Groups with more outputs than this aren't widened: it has never paid there.
MOST_WIDE = 32
# What takes so many times as long as the best so far isn't timed any further.
HOPELESS = 1.5
REPS, SECONDS = 15, 0.4

_known: dict[str, ConvPlan] = {}


class Problem(NamedTuple):
    """A convolution where it is used: all that its time depends on, but for the machine."""

    device: torch.device
    training: bool
    dtype: torch.dtype
    memory_format: torch.memory_format  # of what comes in and of what is to come out
    shape: tuple[int, ...]  # of its input
    channels: int  # of its output
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def eps(self) -> float:
        """The relative rounding of the products."""
        return conv_eps(self.dtype, self.device)

    def key(self) -> str:
        """The problem and the machine in a line of text."""
        own = self.eps == torch.finfo(self.dtype).eps
        geometry = ("kernel", "stride", "padding", "dilation")
        return ", ".join(
            [
                device_name(self.device),
                library_versions(self.device),
                "training" if self.training else "inference",
                str(self.dtype).removeprefix("torch.") + ("" if own else " as tf32"),
                _FORMAT_NAMES[self.memory_format],
                f"{_by(self.shape)} to {self.channels} in {self.groups} groups",
                *(f"{name} {_by(getattr(self, name))}" for name in geometry),
            ]
        )

    def conv(self) -> nn.Conv2d:
        """Such a convolution, with noise for weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            conv = nn.Conv2d(
                self.shape[1], self.channels, self.kernel, self.stride, self.padding,
                self.dilation, self.groups, bias=False,
            )  # fmt: skip
        return conv.to(self.device, self.dtype)

    def input(self) -> Tensor:
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
    """Find out how the grouped convolutions of all PSA modules in ``module`` run fastest.

    Every candidate is checked against the convolution as it is, then timed in turns with the
    others on the device, in the dtype and shape that ``example_input`` leads to. What was found
    before on the same device, in the same versions of the libraries, isn't measured again. Called
    under autocast, it measures the convolutions in the dtype that autocast runs them in.

    Args:
        module: a PSA module, or a model that holds some. It is run once, in its own mode, and is
            afterwards as it was, running statistics included.
        example_input: what it is called with: a tensor, or a tuple of arguments.
        memory_format: of the activations; None takes each convolution's input as it comes.
        training: measure forward and backward together, with merged groups only.
        file: a JSON file of plans, to read and to add to; it can be shipped to machines of a kind.

    Returns:
        For each grouped convolution's name in ``module`` its plan; what runs best as it is has a
        plan that says so. Convolutions that the example doesn't reach are left out.

    Raises:
        ValueError: if ``file`` holds no plans.
    """
    convs = {
        f"{name}.{conv}".lstrip("."): getattr(psa, conv)
        for name, psa in module.named_modules()
        if is_psa(psa)
        for conv in CONVS
        if getattr(psa, conv).groups > 1
    }
    problems = {
        name: _problem(convs[name], x, memory_format, training)
        for name, x in inputs_of(convs, module, example_input).items()
    }
    path = None if file is None else Path(file)
    filed = _read(path) if path is not None and path.exists() else {}
    _known.update(filed)
    keys = {name: problem.key() for name, problem in problems.items()}
    new = {keys[name]: p for name, p in problems.items() if keys[name] not in _known}
    if new:
        for _, (key, problem) in progress(list(new.items()), "convolution", _describe):
            _known[key] = fastest(problem)
    if path is not None and not filed.keys() >= set(keys.values()):
        _write(path, filed | {key: _known[key] for key in keys.values()})
    return {name: _known[key] for name, key in keys.items()}


def _describe(item: tuple[str, Problem]) -> str:
    return f"plan {_by(item[1].shape)} {_by(item[1].kernel)}"


def use_plans(model: nn.Module, plans: Mapping[str, ConvPlan]) -> None:
    """Train ``model`` with merged groups, as ``plan_convs(model, ..., training=True)`` found best.

    Parameters, their gradients and the state_dict keep the checkpoint's shapes. Nothing is merged
    in training unless this was called; call it with {} to undo it.

    Args:
        model: its ``FusedPSAModule``s are changed.
        plans: for the name of a convolution in ``model`` its plan; those not named run as they are.

    Raises:
        ValueError: for a name that isn't that of a FusedPSAModule's convolution, and for a plan
            that isn't a merge; nothing is changed then.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, FusedPSAModule)}
    convs = {f"{name}.{conv}".lstrip("."): getattr(m, conv) for name, m in found.items()
             for conv in CONVS}  # fmt: skip
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
    for name, module in found.items():
        names = [f"{name}.{conv}".lstrip(".") for conv in CONVS]
        merges = tuple(plans[n].groups if n in plans else convs[n].groups for n in names)
        module.merged_groups = merges if any(n in plans for n in names) else None


def _problem(
    conv: nn.Conv2d, x: Tensor, memory_format: torch.memory_format | None, training: bool
) -> Problem:
    if memory_format is None:
        dense = x.is_contiguous()
        last = not dense and x.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if last else torch.contiguous_format
    padding = PlannedConv(conv).padding  # in numbers
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return Problem(
        x.device, training, dtype, memory_format, tuple(x.shape), conv.out_channels,
        conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups,
    )  # fmt: skip


def candidates(problem: Problem) -> list[ConvPlan]:
    """All plans worth a try, the convolution as it is first."""
    groups, memory_format = problem.groups, problem.memory_format
    divisors = [g for g in range(groups, 0, -1) if groups % g == 0]
    plans = [ConvPlan(g, (1, 1), memory_format) for g in divisors]
    if problem.training:
        return plans
    other = next(f for f in FORMATS.values() if f != memory_format)
    plans += [ConvPlan(g, (1, 1), other) for g in divisors]
    if problem.dilation != (1, 1) or problem.dtype == torch.float64:
        return plans
    # A vector takes the inputs of a group one by one, a matrix unit many at a time.
    single = problem.dtype == torch.float32
    plans += [
        ConvPlan(g, tile, memory_format)
        for g in (divisors[:2] if single else divisors)
        for tile in (TILES if single else TALL_TILES)
        if tile[0] * tile[1] * problem.channels // g <= MOST_WIDE
    ]
    return plans


def fastest(problem: Problem) -> ConvPlan:
    """The plan that beats the convolution as it is by more than the measurement's error, or it."""
    own, *others = candidates(problem)
    # The dtypes here are chosen, the wide one above all.
    no_autocast = torch.autocast(problem.device.type, enabled=False)
    with torch.set_grad_enabled(problem.training), no_autocast:
        x, conv = problem.input(), problem.conv()
        wide = torch.promote_types(problem.dtype, torch.float32)
        true = _call(problem, copy.deepcopy(conv).to(wide), x.to(wide), own)()
        calls = {own: _call(problem, conv, x, own)}
        rounding = max(4 * problem.eps, 1e-5)
        for plan in others:
            call = _call(problem, conv, x, plan)
            if _agrees(call(), true, rounding):
                calls[plan] = call
        clock = make_clock(problem.device)
        best = float("inf")
        hopeful = {}
        for plan, call in calls.items():
            call()
            ms = min(clock.measure(call, 1) for _ in range(2))
            best = min(best, ms)
            hopeful[plan] = ms
        near = {plan for plan, ms in hopeful.items() if ms <= HOPELESS * best} | {own}
        variants = {plan: Variant(calls[plan]) for plan in calls if plan in near}
        timings = interleave(variants, clock, REPS, SECONDS)
    winner = min(timings, key=lambda plan: timings[plan].p50)
    return own if timings[winner].ties(timings[own]) else winner


def _call(
    problem: Problem, conv: nn.Conv2d, x: Tensor, plan: ConvPlan
) -> Callable[[], tuple[Tensor, ...]]:
    """What to time: it returns the output, or in training the output and the gradients."""
    if not problem.training:
        planned = PlannedConv(conv, plan=plan, memory_format=problem.memory_format)
        return lambda: (planned(x),)
    x = x.detach().requires_grad_()

    def train() -> tuple[Tensor, ...]:
        out = merged_conv(x, conv, plan.groups)
        grads = torch.autograd.grad(out, (x, conv.weight), torch.ones_like(out))
        return out.detach(), *grads

    return train


def _agrees(results: tuple[Tensor, ...], true: tuple[Tensor, ...], rounding: float) -> bool:
    """Whether it is what the convolution as it is gives, within rounding. Libraries do err."""
    return all(
        bool((out.to(exact) - exact).abs().max() <= rounding * exact.abs().max())
        for out, exact in zip(results, true, strict=True)
    )


def _read(path: Path) -> dict[str, ConvPlan]:
    try:
        entries = json.loads(path.read_text())
        return {
            key: ConvPlan(int(groups), (int(rows), int(columns)), FORMATS[memory_format])
            for key, (groups, rows, columns, memory_format) in entries.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"plan_convs: file must hold plans as plan_convs writes them, but {path} doesn't "
            f"({type(error).__name__}: {error}); remove it, or name another"
        ) from None


def _write(path: Path, plans: Mapping[str, ConvPlan]) -> None:
    entries = {key: (p.groups, *p.tile, _FORMAT_NAMES[p.memory_format]) for key, p in plans.items()}
    write_atomically(path, (json.dumps(entries, indent=1, sort_keys=True) + "\n").encode())
