"""A block in training uses psa_tail_norm where it computes the same, and trains the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.cases import run_by
from helpers.norm_cases import FAST_BACKENDS
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.backends import defaults
from epsanet_fused.backends.registry import get_backend
from epsanet_fused.nn import fused_psa
from epsanet_fused.ops.psa_tail_norm import fuses_norm_by_default
from epsanet_fused.testing.accuracy import max_error


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The norms that psa_tail_norm is called with."""
    found: list[nn.Module] = []
    run = fused_psa.psa_tail_norm

    def spy(*arguments: Any) -> Tensor:
        found.append(arguments[-1])
        return run(*arguments)

    monkeypatch.setattr(fused_psa, "psa_tail_norm", spy)
    return found


@pytest.fixture(params=FAST_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with run_by(request.param):
        if request.param == "fallback":  # not fused by default
            monkeypatch.setattr(defaults, "NORM_TABLE", {"cpu": "reference"})
        yield request.param


def block(**options: Any) -> ef.EPSABlock:
    torch.manual_seed(0)
    return ef.EPSABlock(64, 64, downsample=nn.Conv2d(64, 256, 1), **options)


def network(**options: Any) -> ef.EPSANet:
    torch.manual_seed(0)
    return ef.EPSANet(ef.EPSABlock, (1, 1, 1, 1), 5, planes=(64,) * 4, **options)


def images(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))


def sgd(model: nn.Module, x: Tensor, steps: int) -> dict[str, Tensor]:
    """Return the state after some steps, and the last output."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(steps):
        out = model(x)
        optimizer.zero_grad()
        (out * torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view(out.shape)).mean().backward()
        optimizer.step()
    return {"out": out.detach(), **model.state_dict()}


@pytest.mark.parametrize("build", [block, network])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"]
)
def test_ten_steps_equal_those_of_the_plain_network(
    backend: str, calls: list, build: Callable[..., nn.Module], memory_format: torch.memory_format
) -> None:
    x = images(8, 64) if build is block else images()
    x = x.double().contiguous(memory_format=memory_format)
    fused, plain = (build(fused=f).double().to(memory_format=memory_format) for f in (True, False))
    assert list(fused.state_dict()) == list(plain.state_dict())
    expected = sgd(plain, x, 10)
    assert not calls
    results = sgd(fused, x, 10)
    assert len(calls) == 10 * sum(isinstance(m, ef.EPSABlock) for m in fused.modules())
    for name, exact in expected.items():
        limit = 1e-9 * max(1.0, exact.abs().max().item())
        assert max_error(results[name].double(), exact.double()) <= limit, name


def test_under_autocast(backend: str, calls: list) -> None:
    fused, plain = network(), network(fused=False)
    exact = plain(images())
    plain = network(fused=False)
    with torch.autocast("cpu", torch.bfloat16):
        same, out = plain(images()), fused(images())
    assert len(calls) == 4
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() <= 2 * (same - exact).norm()
    out.float().sum().backward()
    assert {p.grad.dtype for p in fused.parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in fused.parameters())


def test_copies_and_pickles(backend: str, calls: list) -> None:
    model = network().double()
    sgd(model, images().double(), 1)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected, *others = (sgd(m, images().double(), 2) for m in (model, *copies))
    for other in others:
        torch.testing.assert_close(other, expected, rtol=0, atol=0)


def test_compiles_without_a_graph_break(backend: str) -> None:
    eager, compiled = block().double(), block().double()
    x = images(8, 64).double()
    expected = sgd(eager, x, 2)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    out = run(x)
    assert max_error(out, block().double()(x)) < 1e-12
    out.sum().backward()
    torch.compiler.reset()
    assert expected.keys() == {"out", *compiled.state_dict()}
    assert compiled.bn2.num_batches_tracked == 1


class Subclass(nn.BatchNorm2d):
    pass


def hooked(name: str, register: str) -> Callable[[ef.EPSABlock], None]:
    def change(b: ef.EPSABlock) -> None:
        getattr(getattr(b, name), register)(lambda *_: None)

    return change


def parametrised(b: ef.EPSABlock) -> None:
    nn.utils.parametrize.register_parametrization(b.bn2, "weight", nn.Identity())


def replaced(name: str, module: nn.Module) -> Callable[[ef.EPSABlock], None]:
    return lambda b: setattr(b, name, module)


def patched(b: ef.EPSABlock) -> None:
    b.bn2.forward = b.bn2.forward


PLAIN = {
    "eval": lambda b: b.eval(),
    "frozen norm": lambda b: b.bn2.eval(),
    "SyncBatchNorm": replaced("bn2", nn.SyncBatchNorm(64)),
    "subclass": replaced("bn2", Subclass(64)),
    "GroupNorm": replaced("bn2", nn.GroupNorm(4, 64)),
    "another relu": replaced("relu", nn.SiLU()),
    "PSAModule": replaced("conv2", ef.PSAModule(64, 64)),
    "parametrised": parametrised,
    "patched forward": patched,
    **{
        f"{register} of {name}": hooked(name, register)
        for name in ("conv2", "bn2", "relu")
        for register in ("register_forward_hook", "register_forward_pre_hook")
    },
    "backward hook": hooked("conv2", "register_full_backward_hook"),
    "backward pre-hook": hooked("conv2", "register_full_backward_pre_hook"),
}


@pytest.mark.parametrize("change", PLAIN.values(), ids=PLAIN)
def test_other_modules_take_the_plain_path(
    calls: list, change: Callable[[ef.EPSABlock], None]
) -> None:
    model = block()
    model(images(8, 64))
    assert calls == [model.bn2]
    change(model)
    if isinstance(model.bn2, nn.SyncBatchNorm):
        assert not model._uses_fused_norm(images(8, 64))  # it has no CPU forward
    else:
        model(images(8, 64))
    assert len(calls) == 1


def test_a_converted_model_takes_the_plain_path() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    blocks = [m for m in model.modules() if isinstance(m, ef.EPSABlock)]
    assert len(blocks) == 4
    assert not any(b._uses_fused_norm(images()) for b in blocks)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_a_backend_without_it_takes_the_plain_path(
    calls: list, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(get_backend("triton"), "norm_forward")
    with ef.use_backend(name):
        block()(images(8, 64)).sum().backward()
    assert not calls


def test_use_backend_selects_the_kernels(calls: list) -> None:
    """Triton's, which "auto" does not select."""
    memory_format = torch.channels_last
    x = images(8, 64).double().contiguous(memory_format=memory_format)
    fused, plain = (block(fused=f).double().to(memory_format=memory_format) for f in (True, False))
    with ef.use_backend("triton"):
        results = sgd(fused, x, 2)
    assert calls == 2 * [fused.bn2]
    for name, exact in sgd(plain, x, 2).items():
        limit = 1e-9 * max(1.0, exact.abs().max().item())
        assert max_error(results[name].double(), exact.double()) <= limit, name


def test_tracing_takes_the_plain_path(calls: list) -> None:
    traced = torch.fx.symbolic_trace(block())
    torch.testing.assert_close(traced(images(8, 64)), block()(images(8, 64)))
    assert len(calls) == 1


def test_only_the_compiled_cpu_kernels_are_the_default(calls: list) -> None:
    assert defaults.NORM_TABLE == {"cpu": "cpu"}
    assert not fuses_norm_by_default("cuda")
    with run_by("fallback"):
        block()(images(8, 64))
    assert not calls
    block()(images(8, 64))
    assert len(calls) == 1


def test_hooks_on_all_modules_see_every_part(calls: list) -> None:
    model, seen = block(), []
    hook = nn.modules.module.register_module_forward_hook(lambda m, _x, _out: seen.append(m))
    try:
        model(images(8, 64))
    finally:
        hook.remove()
    assert {model.conv2, model.bn2, model.relu} <= set(seen)
    assert not calls
    model(images(8, 64))
    assert calls
