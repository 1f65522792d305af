"""The table of the ways to run a workload. Every backend of the package is in it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.backends.registry import PATHS, resolve
from harness import exported
from harness.cases import MODES, SCOPES, Case, NormTail, Workload
from harness.networks import BASELINES
from harness.steps import Step, make_step


class Prepared(NamedTuple):
    """A step to time."""

    step: Step
    backend: str  # the backend that runs, for example the one that "auto" takes
    choice: str = "auto"  # the argument of ef.use_backend with which step must be called
    # The step to measure peak memory on: a replay of a CUDA graph allocates nothing, and PyTorch
    # doesn't see what other libraries allocate.
    memory_step: Step | None = None


Prepare = Callable[[Workload, Case], Prepared]
Need = Callable[[torch.device], str | None]  # the reason why it can't run on the device, or None
# How long a provider takes to prepare. Where each is timed as soon as it is ready, the quick ones
# come first.
QUICK, OPTIMIZES, COMPILES, AUTOTUNES = range(4)


# Those that run the networks that EPSANet is compared with, too.
FOR_BASELINES = (
    "eager", "eager-graph", "compile", "compile-freezing", "compile-reduce-overhead",
    "compile-max-autotune", "optimized", "optimized-compile", "optimized-graph", "onnxruntime",
    "openvino",
)  # fmt: skip


class Provider(NamedTuple):
    """One way to run a workload."""

    about: str
    prepare: Prepare
    needs: tuple[Need, ...] = ()
    scopes: tuple[str, ...] = tuple(SCOPES)
    modes: tuple[str, ...] = tuple(MODES)
    cost: int = QUICK
    any_format: bool = False  # the workload's memory format makes no difference
    refuses: bool = False  # its ValueError says that it doesn't take this size or dtype

    def fits(self, scope: str, mode: str) -> bool:
        return scope in self.scopes and mode in self.modes

    def unavailable_reason(self, device: torch.device) -> str | None:
        """Return why this can't run on the device, or None."""
        return next(filter(None, (need(device) for need in self.needs)), None)


def backend_name(choice: str, device: torch.device) -> str:
    """Return the name of the backend that runs on the device for a choice such as "auto"."""
    return resolve(choice, device.type).name


def _eager(workload: Workload, case: Case) -> Prepared:
    step = make_step(workload.official, workload.inputs, case)
    return Prepared(step, "pytorch", memory_step=step)


def _ours(choice: str, workload: Workload, case: Case) -> Prepared:
    with ef.use_backend(choice):
        step = make_step(workload.fused, workload.inputs, case)
    backend = backend_name(choice, workload.inputs[0].device)
    return Prepared(step, backend, choice, step)


def _apart(workload: Workload, case: Case) -> Prepared:
    module = NormTail(workload.fused.tail, workload.fused.norm)
    return _ours("auto", dataclasses.replace(workload, fused=module), case)


def _compiled(ours: bool, compile_mode: str | None, workload: Workload, case: Case) -> Prepared:
    module = workload.fused if ours else workload.official
    if compile_mode:  # its CUDA graphs read the inputs in place, as those of the other providers
        for x in workload.inputs:
            torch._dynamo.mark_static_address(x)
    compiled = torch.compile(module, dynamic=False, mode=compile_mode)
    with _repeatable_backward() if case.mode == "backward" else nullcontext():
        step = make_step(compiled, workload.inputs, case)
        step()
    device = workload.inputs[0].device
    backend = f"inductor+{backend_name('auto', device)}" if ours else "inductor"
    # With a mode, torch.compile replays CUDA graphs.
    return Prepared(step, backend, memory_step=None if compile_mode else step)


def _frozen(prepare: Callable[[Workload], nn.Module], workload: Workload, case: Case) -> Prepared:
    """Compile with freezing: Inductor treats weights as constants, folds and packs them."""
    from torch._inductor import config as inductor

    compiled = torch.compile(prepare(workload), dynamic=False)
    with inductor.patch(freezing=True):
        step = make_step(compiled, workload.inputs, case)
        step()
    return Prepared(step, "inductor", memory_step=step)


def _optimized(cuda_graph: bool, workload: Workload, case: Case) -> Prepared:
    step = make_step(optimized(workload, cuda_graph), workload.inputs, case)
    return Prepared(step, backend_name("auto", workload.inputs[0].device), memory_step=step)


_optimized_models: list[tuple[nn.Module, bool, nn.Module]] = []


def optimized(workload: Workload, cuda_graph: bool = False) -> nn.Module:
    """Return the official network after optimize_for_inference; made once for all providers."""
    for model, with_graph, made in _optimized_models:
        if model is workload.official and with_graph == cuda_graph:
            return made
    x = workload.inputs[0]
    # On a GPU the search takes minutes, and 16-bit convolutions run in channels_last there.
    known = torch.channels_last if x.is_cuda and x.dtype.itemsize == 2 else None
    plans = workload.plan_file
    made = ef.optimize_for_inference(
        workload.official, x, memory_format=known, cuda_graph=cuda_graph, plan_file=plans
    )
    del _optimized_models[:-3]  # models of earlier cases
    _optimized_models.append((workload.official, cuda_graph, made))
    return made


def _of_baseline(name: str, prepare: Prepare, workload: Workload, case: Case) -> Prepared:
    return prepare(workload.baselines[name], case)


def _planned(prepare: Prepare, workload: Workload, case: Case) -> Prepared:
    """Run another provider of ours with each convolution's fastest merge of groups in training."""
    module = copy.deepcopy(workload.fused)
    device = workload.inputs[0].device.type
    with torch.autocast(device, case.autocast) if case.autocast else nullcontext():
        plans = ef.plan_convs(module, workload.inputs, training=True, file=workload.plan_file)
    ef.use_plans(module, plans)
    return prepare(dataclasses.replace(workload, fused=module), case)


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


def graphed(prepare: Prepare, workload: Workload, case: Case) -> Prepared:
    """Capture another provider's step in a CUDA graph. Memory is measured without the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Everything runs on one stream: autograd runs a node's backward on the stream of its forward.
    with torch.cuda.stream(stream):
        # The workload is copied: leaves that another provider's graph holds accumulate gradients
        # on that graph's stream, and a capture cannot wait for another stream.
        inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in workload.inputs)
        official, fused = copy.deepcopy((workload.official, workload.fused))
        inner = prepare(
            dataclasses.replace(workload, official=official, fused=fused, inputs=inputs), case
        )
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


def _rival(prepare: exported.Prepare, workload: Workload, case: Case) -> Prepared:
    step, backend = prepare(workload.official, workload.inputs[0])
    return Prepared(step, backend)


def _compiler(device: torch.device) -> str | None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton, which isn't installed"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and there is no {compiler}"
    return None


def _cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"CUDA graphs don't exist on {device.type}"


def _backend(name: str, device: torch.device) -> str | None:
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set: the time of an interpreted kernel has no meaning"
    try:
        resolve(name, device.type)
    except RuntimeError as error:
        return str(error)
    return None


def _table() -> dict[str, Provider]:
    """Return all providers by name."""
    P, bind = Provider, functools.partial
    ours, frozen = bind(_ours, "auto"), bind(_frozen, lambda workload: workload.official)
    graph, network = (_cuda, _compiler), {"scopes": ("network",), "modes": ("inference",)}
    tuned = {**network, "any_format": True}
    table = {
        "eager": P("the official code", _eager),
        "cleaned": P("our formulation in plain PyTorch", bind(_ours, "reference")),
        "eager-graph": P("the official code in a CUDA graph", bind(graphed, _eager), (_cuda,)),
        "fused": P("this package, with the backend that it chooses", ours),
        "fused-graph": P("fused, in a CUDA graph", bind(graphed, ours), (_cuda,)),
        "apart": P("psa_tail, then norm, then ReLU", _apart, scopes=("norm",)),
        "optimized": P("optimize_for_inference", bind(_optimized, False), cost=OPTIMIZES, **tuned),
        "optimized-graph": P("optimized, in a CUDA graph", bind(_optimized, True), (_cuda,),
                             cost=OPTIMIZES, **tuned),
        "onnxruntime": P("the official code, exported, by ONNX Runtime",
                         bind(_rival, exported.onnxruntime), (exported.needs("onnxruntime"),),
                         cost=OPTIMIZES, refuses=True, **tuned),
        "openvino": P("the official code, exported, by OpenVINO", bind(_rival, exported.openvino),
                      (exported.needs("openvino"),), cost=OPTIMIZES, refuses=True, **tuned),
        "compile": P("the official code under torch.compile", bind(_compiled, False, None),
                     (_compiler,), cost=COMPILES),
        "compile-freezing": P("compile with Inductor's freezing", frozen, (_compiler,),
                              cost=COMPILES, **network),
        "fused-compile": P("fused, under torch.compile", bind(_compiled, True, None), (_compiler,),
                           cost=COMPILES),
        "optimized-compile": P("optimized, under torch.compile with freezing",
                               bind(_frozen, optimized), (_compiler,), cost=COMPILES, **tuned),
        "compile-reduce-overhead": P("torch.compile(mode='reduce-overhead')",
                                     bind(_compiled, False, "reduce-overhead"), graph,
                                     cost=COMPILES),
        "compile-max-autotune": P("torch.compile(mode='max-autotune')",
                                  bind(_compiled, False, "max-autotune"), graph, cost=AUTOTUNES),
    }  # fmt: skip
    # "norm" is left out: not every backend has psa_tail_norm, and "fused" takes one that has it.
    for name in (*ef.list_backends(), *PATHS):
        if name != "reference":  # the provider "cleaned"
            scopes = ("tail", "module", "network")
            table[name] = P(f"fused, with the backend {name}", bind(_ours, name),
                            (bind(_backend, name),), scopes, refuses=name in PATHS)  # fmt: skip
    table["planned"] = P(
        "fused, with the fastest merges of groups", bind(_planned, ours),
        scopes=("module", "network"), modes=("training",), cost=OPTIMIZES,
    )  # fmt: skip
    for baseline, name in itertools.product(BASELINES, FOR_BASELINES):
        prepare = bind(_of_baseline, baseline, table[name].prepare)
        table[f"{baseline}:{name}"] = table[name]._replace(
            about=f"{baseline} by {name}", prepare=prepare, scopes=("network",)
        )
    return table


PROVIDERS = _table()


def defaults(device: torch.device, scope: str, modes: Sequence[str]) -> list[str]:
    """Return the providers that run by default: all that fit, without duplicates.

    "compile" and the package's backends are in the list even where they cannot run, so that the
    reason is printed.
    """
    duplicates = {backend_name("auto", device), *PATHS}  # the first one is the same as "fused"
    if scope == "tail":
        duplicates.add("fused-compile")  # there is nothing to compile but the operator
    shown = ("compile", *ef.list_backends())
    return [
        name
        for name, provider in PROVIDERS.items()
        if any(provider.fits(scope, mode) for mode in modes)
        and name not in duplicates
        and (name in shown or provider.unavailable_reason(device) is None)
    ]
