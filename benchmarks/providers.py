"""The table of all ways to run a workload. Every backend of the package is in it."""

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
from steps import Prepared, make_step
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.backends.registry import PATHS, resolve

SCOPES = ("tail", "norm", "module", "block", "network")
MODES = ("inference", "training", "backward")


Prepare = Callable[[Workload, str, torch.dtype | None], Prepared]


class Provider(NamedTuple):
    """One way to run a workload."""

    prepare: Prepare  # (workload, mode, autocast dtype) -> step
    unavailable_reason: Callable[[torch.device], str | None]
    scopes: tuple[str, ...] = SCOPES
    modes: tuple[str, ...] = MODES
    chooses_memory_format: bool = False

    def fits(self, scope: str, mode: str) -> bool:
        return scope in self.scopes and mode in self.modes


def _plain(workload: Workload, mode: str, autocast: torch.dtype | None) -> Prepared:
    step = make_step(workload.literal, workload.inputs, mode, autocast)
    return Prepared(step, "pytorch", "auto", step)


def _ours(choice: str, workload: Workload, mode: str, autocast: torch.dtype | None) -> Prepared:
    with ef.use_backend(choice):
        step = make_step(workload.fused, workload.inputs, mode, autocast)
    return Prepared(step, backend_name(choice, workload.inputs[0].device), choice, step)


def _apart(workload: Workload, mode: str, autocast: torch.dtype | None) -> Prepared:
    """Run psa_tail, then the norm, then the ReLU, each by itself."""
    module = NormTail(workload.fused.tail, workload.fused.norm)
    step = make_step(module, workload.inputs, mode, autocast)
    return Prepared(step, backend_name("auto", workload.inputs[0].device), "auto", step)


def backend_name(choice: str, device: torch.device) -> str:
    """Return the name of the backend that runs on the device for a choice such as "auto"."""
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
    backend = f"inductor+{backend_name('auto', workload.inputs[0].device)}" if ours else "inductor"
    # With a mode, torch.compile replays CUDA graphs, and a replay allocates nothing.
    return Prepared(step, backend, "auto", None if compile_mode else step)


def _frozen(
    prepare: Callable[[Workload], nn.Module],
    workload: Workload,
    mode: str,
    autocast: torch.dtype | None,
) -> Prepared:
    """Compile with freezing: Inductor treats weights as constants, folds and packs them."""
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
    return Prepared(step, backend_name("auto", workload.inputs[0].device), "auto", step)


_optimized_models: list[tuple[nn.Module, bool, nn.Module]] = []


def optimized(workload: Workload, cuda_graph: bool = False) -> nn.Module:
    """Return the official network after optimize_for_inference; made once for all providers."""
    for model, graphed, made in _optimized_models:
        if model is workload.literal and graphed == cuda_graph:
            return made
    x = workload.inputs[0]
    # On a GPU the search takes minutes, and 16-bit convolutions run in channels_last there.
    known = torch.channels_last if x.is_cuda and x.dtype.itemsize == 2 else None
    made = ef.optimize_for_inference(
        workload.literal,
        x,
        memory_format=known,
        cuda_graph=cuda_graph,
        plan_file=workload.plan_file,
    )
    print(f"\n{made.report}\n", file=sys.stderr)
    del _optimized_models[:-3]  # models of earlier cases
    _optimized_models.append((workload.literal, cuda_graph, made))
    return made


def _baseline(
    name: str, prepare: Prepare, workload: Workload, mode: str, autocast: torch.dtype | None
) -> Prepared:
    return prepare(workload.baselines[name], mode, autocast)


def _planned(
    prepare: Prepare, workload: Workload, mode: str, autocast: torch.dtype | None
) -> Prepared:
    """Run another provider of ours with each convolution's fastest merge of groups in training."""
    module = copy.deepcopy(workload.fused)
    device = workload.inputs[0].device.type
    with torch.autocast(device, autocast) if autocast else nullcontext():
        plans = ef.plan_convs(module, workload.inputs, training=True, file=workload.plan_file)
    ef.use_plans(module, plans)
    return prepare(dataclasses.replace(workload, fused=module), mode, autocast)


@contextmanager
def _repeatable_backward() -> Iterator[None]:
    """Compile a backward that can run several times: it must not overwrite the saved tensors.

    The caches on disk are off, because training may have left a backward there that does.
    """
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    with (
        functorch.patch(donated_buffer=False, enable_autograd_cache=False),
        inductor.patch(fx_graph_cache=False),
    ):
        yield


def _graphed(
    prepare: Prepare,
    workload: Workload,
    mode: str,
    autocast: torch.dtype | None,
) -> Prepared:
    """Capture another provider's step in a CUDA graph. Memory is measured without the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Everything runs on one stream: autograd runs a node's backward on the stream of its forward.
    with torch.cuda.stream(stream):
        # The workload is copied: leaves that another provider's graph holds accumulate gradients
        # on that graph's stream, and a capture cannot wait for another stream.
        inner = prepare(_copy_workload(workload), mode, autocast)
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


def _copy_workload(workload: Workload) -> Workload:
    inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in workload.inputs)
    literal, fused = copy.deepcopy((workload.literal, workload.fused))
    return dataclasses.replace(workload, literal=literal, fused=fused, inputs=inputs)


def _always_available(device: torch.device) -> None:
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


def _needs_cuda_and_compiler(device: torch.device) -> str | None:
    return _needs_cuda(device) or _needs_compiler(device)


def _needs_backend(name: str, device: torch.device) -> str | None:
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set: the time of an interpreted kernel has no meaning"
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


def _fused_providers() -> dict[str, Provider]:
    """Return the providers for every scope and mode: plain PyTorch, compiled and fused."""
    bind = functools.partial
    ours = bind(_ours, "auto")
    reduce_overhead = bind(_compiled, False, "reduce-overhead")
    autotune = bind(_compiled, False, "max-autotune")
    return {
        "eager": Provider(_plain, _always_available),
        "cleaned": Provider(bind(_ours, "reference"), _always_available),
        "compile": Provider(bind(_compiled, False, None), _needs_compiler),
        "compile-reduce-overhead": Provider(reduce_overhead, _needs_cuda_and_compiler),
        "compile-max-autotune": Provider(autotune, _needs_cuda_and_compiler),
        "eager-graph": Provider(bind(_graphed, _plain), _needs_cuda),
        "fused": Provider(ours, _always_available),
        "fused-compile": Provider(bind(_compiled, True, None), _needs_compiler),
        "fused-graph": Provider(bind(_graphed, ours), _needs_cuda),
        "apart": Provider(_apart, _always_available, scopes=("norm",)),
    }


def _with_plan(provider: Provider) -> Provider:
    """Return the provider for training with merged groups."""
    return provider._replace(
        prepare=functools.partial(_planned, provider.prepare),
        scopes=("module", "block", "network"),
        modes=("training",),
    )


def _inference_providers() -> dict[str, Provider]:
    """Return the providers for inference of a block or a network."""
    bind = functools.partial
    options = {"scopes": ("block", "network"), "modes": ("inference",)}
    frozen = bind(_frozen, lambda workload: workload.literal)
    ours = {**options, "chooses_memory_format": True}
    return {
        "compile-freezing": Provider(frozen, _needs_compiler, **options),
        "optimized": Provider(bind(_optimized, False), _always_available, **ours),
        "optimized-compile": Provider(bind(_frozen, optimized), _needs_compiler, **ours),
        "optimized-graph": Provider(bind(_optimized, True), _needs_cuda, **ours),
    }


def _backend_providers() -> dict[str, Provider]:
    """Return a provider for each backend of the package and each variant of one."""
    # "norm" is left out: not every backend has psa_tail_norm, and "fused" takes one that has it.
    scopes = ("tail", "module", "block", "network")
    return {
        name: Provider(
            functools.partial(_ours, name), functools.partial(_needs_backend, name), scopes
        )
        for name in (*ef.list_backends(), *PATHS)
        if name != "reference"  # the provider "cleaned"
    }


def _table() -> dict[str, Provider]:
    table = _fused_providers()
    for name in ("fused", "fused-compile", "fused-graph"):
        table[name.replace("fused", "planned")] = _with_plan(table[name])
    table |= _inference_providers()
    for baseline, name in itertools.product(BASELINES, _FOR_BASELINES):
        prepare = functools.partial(_baseline, baseline, table[name].prepare)
        table[f"{baseline}:{name}"] = table[name]._replace(prepare=prepare, scopes=("network",))
    table |= _backend_providers()
    # A backend that is named also runs psa_tail_norm where "auto" does not take it.
    table["planned-triton"] = _with_plan(table["triton"])
    return table


PROVIDERS = _table()


def defaults(device: torch.device, scope: str) -> list[str]:
    """Return the providers that run by default: all that can run here, without duplicates.

    "compile" and the package's backends are in the list even where they cannot run, so that the
    reason is printed.
    """
    duplicates = {backend_name("auto", device)}  # the same as "fused"
    if scope == "tail":
        duplicates.add("fused-compile")  # there is nothing to compile but the operator
    return [
        name
        for name, provider in PROVIDERS.items()
        if scope in provider.scopes
        and name not in (*duplicates, *PATHS)
        and (
            name in ("compile", *ef.list_backends()) or provider.unavailable_reason(device) is None
        )
    ]
