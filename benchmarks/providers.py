"""The ways to run a workload: one table. A backend of the package joins it by being in it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from baselines import BASELINES
from inputs import NormTail, Workload
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.backends.registry import VARIANTS, resolve
from epsanet_fused.inference.cuda_graph import GraphedModel

Step = Callable[[], list[Tensor]]


class Prepared(NamedTuple):
    """Something to time: ``step()`` returns the output and, in training, the gradients."""

    step: Step
    backend: str  # what ran, e.g. what "auto" came to
    choice: str  # for ef.use_backend, to be in force whenever step is called
    # What to measure peak memory on, where replays allocate nothing.
    memory_step: Step | None


class Provider(NamedTuple):
    """How to build it, and why it can't run on a device, or None."""

    prepare: Callable[[Workload, str, torch.dtype | None], Prepared]
    unavailable: Callable[[torch.device], str | None]
    scopes: tuple[str, ...] = ("tail", "norm", "module", "block", "network")
    modes: tuple[str, ...] = ("inference", "training", "backward")
    own_layout: bool = False  # whether it chooses its memory format itself

    def fits(self, scope: str, mode: str) -> bool:
        return scope in self.scopes and mode in self.modes


def make_step(
    module: nn.Module, inputs: tuple[Tensor, ...], mode: str, autocast: torch.dtype | None
) -> Step:
    """One inference, one training step (forward and backward), or one backward by itself.

    Whoever calls an inference turns gradients off, once for all calls: that isn't to be timed.
    """
    device = inputs[0].device.type

    def forward() -> Tensor:
        with torch.autocast(device, autocast) if autocast else nullcontext():
            return module(*inputs)

    if mode == "inference":
        return lambda: [forward()]
    leaves = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    out = forward()
    grad = output_gradient(out)
    if mode == "backward":
        return lambda: list(torch.autograd.grad(out, leaves, grad, retain_graph=True))

    def train() -> list[Tensor]:
        result = forward()
        return [result.detach(), *torch.autograd.grad(result, leaves, grad)]

    return train


def output_gradient(out: Tensor) -> Tensor:
    """Seeded noise; the same numbers for every provider and for the oracle, in out's format."""
    generator = torch.Generator(out.device).manual_seed(1)
    noise = torch.randn(out.shape, generator=generator, device=out.device)
    noise = noise.bfloat16()  # exact in every dtype but float16, where no sane value overflows
    return torch.empty_like(out).copy_(noise)


def _plain(workload: Workload, mode: str, autocast: torch.dtype | None) -> Prepared:
    step = make_step(workload.literal, workload.inputs, mode, autocast)
    return Prepared(step, "pytorch", "auto", step)


def _ours(choice: str, workload: Workload, mode: str, autocast: torch.dtype | None) -> Prepared:
    with ef.use_backend(choice):
        step = make_step(workload.fused, workload.inputs, mode, autocast)
    return Prepared(step, ran(choice, workload.inputs[0].device), choice, step)


def _apart(workload: Workload, mode: str, autocast: torch.dtype | None) -> Prepared:
    """psa_tail, then the norm, then the relu."""
    module = NormTail(workload.fused.tail, workload.fused.norm)
    step = make_step(module, workload.inputs, mode, autocast)
    return Prepared(step, ran("auto", workload.inputs[0].device), "auto", step)


def ran(choice: str, device: torch.device) -> str:
    """The name of the backend that a choice comes to."""
    return resolve(choice, device.type).name


def _compiled(
    ours: bool,
    compile_mode: str | None,
    workload: Workload,
    mode: str,
    autocast: torch.dtype | None,
) -> Prepared:
    module = workload.fused if ours else workload.literal
    compiled = torch.compile(module, dynamic=False, mode=compile_mode)
    with _repeatable_backward() if mode == "backward" else nullcontext():
        step = make_step(compiled, workload.inputs, mode, autocast)
        step()
    backend = f"inductor+{ran('auto', workload.inputs[0].device)}" if ours else "inductor"
    # max-autotune replays CUDA graphs, whose memory pool a replay doesn't allocate from.
    return Prepared(step, backend, "auto", None if compile_mode else step)


def _frozen(
    prepare: Callable[[Workload], nn.Module],
    workload: Workload,
    mode: str,
    autocast: torch.dtype | None,
) -> Prepared:
    """torch.compile with freezing: weights are constants, folded and packed by Inductor."""
    from torch._inductor import config as inductor

    module = prepare(workload)
    compiled = torch.compile(module, dynamic=False)
    with inductor.patch(freezing=True):
        step = make_step(compiled, workload.inputs, mode, autocast)
        step()
    return Prepared(step, "inductor", "auto", step)


def _optimized(
    cuda_graph: bool, workload: Workload, mode: str, autocast: torch.dtype | None
) -> Prepared:
    module = optimized(workload, cuda_graph)
    step = make_step(module, workload.inputs, mode, autocast)
    return Prepared(step, ran("auto", workload.inputs[0].device), "auto", step)


_optimized_models: list[tuple[nn.Module, bool, nn.Module]] = []


def optimized(workload: Workload, cuda_graph: bool = False) -> nn.Module:
    """What optimize_for_inference makes of the official network; made once for all providers."""
    for model, graphed, made in _optimized_models:
        if model is workload.literal and graphed == cuda_graph:
            return made
    if cuda_graph:  # of the same rewrites: they needn't be looked for twice
        made = GraphedModel(optimized(workload), workload.inputs)
    else:
        made = ef.optimize_for_inference(workload.literal, *workload.inputs)
        print(f"\n{made.report}\n", file=sys.stderr)
    del _optimized_models[:-3]  # those of earlier cases
    _optimized_models.append((workload.literal, cuda_graph, made))
    return made


def _of_baseline(
    name: str, prepare, workload: Workload, mode: str, autocast: torch.dtype | None
) -> Prepared:
    return prepare(workload.baselines[name], mode, autocast)


def _planned(prepare, workload: Workload, mode: str, autocast: torch.dtype | None) -> Prepared:
    """Another provider of ours, its groups merged as measured to be the fastest in training."""
    module = copy.deepcopy(workload.fused)
    device = workload.inputs[0].device.type
    with torch.autocast(device, autocast) if autocast else nullcontext():
        plans = ef.plan_convs(module, workload.inputs, training=True)
    ef.use_plans(module, plans)
    return prepare(dataclasses.replace(workload, fused=module), mode, autocast)


@contextmanager
def _repeatable_backward() -> Iterator[None]:
    """Compile a backward that may run again and again: it must not use what was saved as scratch.

    Inductor's cache on disk would give back one that does, if training compiled that before.
    """
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    with (
        functorch.patch(donated_buffer=False, enable_autograd_cache=False),
        inductor.patch(fx_graph_cache=False),
    ):
        yield


def _graphed(
    prepare: Callable[[Workload, str, torch.dtype | None], Prepared],
    workload: Workload,
    mode: str,
    autocast: torch.dtype | None,
) -> Prepared:
    """A CUDA graph of another provider's step; its memory is what the step takes uncaptured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # All on one stream: autograd runs a node's backward on the stream of its forward.
    with torch.cuda.stream(stream):
        # Leaves of its own: those that another provider's graph still holds accumulate on that
        # one's stream, which a capture can't wait for.
        inner = prepare(_own_copy(workload), mode, autocast)
        with ef.use_backend(inner.choice):
            for _ in range(3):
                inner.step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                outputs = inner.step()
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> list[Tensor]:
        graph.replay()
        return outputs

    return Prepared(replay, inner.backend, inner.choice, inner.step)


def _own_copy(workload: Workload) -> Workload:
    inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in workload.inputs)
    literal, fused = copy.deepcopy((workload.literal, workload.fused))
    return dataclasses.replace(workload, literal=literal, fused=fused, inputs=inputs)


def _anywhere(device: torch.device) -> None:
    return None


def _needs_compiler(device: torch.device) -> str | None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton, which isn't installed"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and there is no {compiler}"
    return None


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"CUDA graphs don't exist on {device.type}"


def _needs_both(device: torch.device) -> str | None:
    return _needs_cuda(device) or _needs_compiler(device)


def _needs_backend(name: str, device: torch.device) -> str | None:
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, and an interpreter's time says nothing of a kernel's"
    try:
        resolve(name, device.type)
    except RuntimeError as error:
        return str(error)
    return None


_FOR_BASELINES = (
    "eager",
    "eager-graph",
    "compile",
    "compile-reduce-overhead",
    "compile-max-autotune",
    "compile-freezing",
    "optimized",
    "optimized-compile",
    "optimized-graph",
)


def _table() -> dict[str, Provider]:
    bind = functools.partial
    ours = bind(_ours, "auto")
    table = {
        "eager": Provider(_plain, _anywhere),
        "cleaned": Provider(bind(_ours, "reference"), _anywhere),
        "compile": Provider(bind(_compiled, False, None), _needs_compiler),
        "compile-reduce-overhead": Provider(bind(_compiled, False, "reduce-overhead"), _needs_both),
        "compile-max-autotune": Provider(bind(_compiled, False, "max-autotune"), _needs_both),
        "eager-graph": Provider(bind(_graphed, _plain), _needs_cuda),
        "fused": Provider(ours, _anywhere),
        "fused-compile": Provider(bind(_compiled, True, None), _needs_compiler),
        "fused-graph": Provider(bind(_graphed, ours), _needs_cuda),
    }
    table["apart"] = Provider(_apart, _anywhere, scopes=("norm",))
    whole = {"scopes": ("block", "network"), "modes": ("inference",)}
    frozen = bind(_frozen, lambda workload: workload.literal)
    optimal = {**whole, "own_layout": True}
    merges = {"scopes": ("module", "block", "network"), "modes": ("training",)}
    table |= {
        name.replace("fused", "planned"): table[name]._replace(
            prepare=bind(_planned, table[name].prepare), **merges
        )
        for name in ("fused", "fused-compile", "fused-graph")
    }
    table |= {
        "compile-freezing": Provider(frozen, _needs_compiler, **whole),
        "optimized": Provider(bind(_optimized, False), _anywhere, **optimal),
        "optimized-compile": Provider(bind(_frozen, optimized), _needs_compiler, **optimal),
        "optimized-graph": Provider(bind(_optimized, True), _needs_cuda, **optimal),
    }
    for baseline, name in itertools.product(BASELINES, _FOR_BASELINES):
        prepare = bind(_of_baseline, baseline, table[name].prepare)
        table[f"{baseline}:{name}"] = table[name]._replace(prepare=prepare, scopes=("network",))
    for name in (*ef.list_backends(), *VARIANTS):
        if name != "reference":  # that is "cleaned"
            runs = Provider(bind(_ours, name), bind(_needs_backend, name))
            # Not every backend has the operator of training; "fused" takes the one that does.
            table[name] = runs._replace(scopes=("tail", "module", "block", "network"))
    # By its name, a backend's operator of training runs where "auto" doesn't take it yet.
    by_name = bind(_planned, table["triton"].prepare)
    table["planned-triton"] = table["triton"]._replace(prepare=by_name, **merges)
    return table


PROVIDERS = _table()


def defaults(device: torch.device, scope: str) -> list[str]:
    """Everything that can run here and that isn't the same as another one.

    The compiler and the package's backends are named also where they can't: the run says why.
    """
    # The tail by itself leaves nothing for the compiler to do around the operator.
    doubles = {ran("auto", device)} | ({"fused-compile"} if scope == "tail" else set())
    return [
        name
        for name, provider in PROVIDERS.items()
        if scope in provider.scopes
        and name not in (*doubles, *VARIANTS)
        and (name in ("compile", *ef.list_backends()) or provider.unavailable(device) is None)
    ]
