"""What people do to a model that optimize_for_inference has returned."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers.networks import small
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import epsanet_fused as ef
from epsanet_fused.inference import conv_planner, optimize
from epsanet_fused.inference.blocks import PlannedBlock, Rewrites
from epsanet_fused.inference.rewrite import apply_rewrites, find_targets
from epsanet_fused.nn.grouped_conv import ConvPlan


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "SECONDS", 0.0)
    monkeypatch.setattr(conv_planner, "SECONDS", 0.0)


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def rewritten(model: nn.Module) -> nn.Module:
    """Return the model with all rewrites, and plans with merged groups and with tiles."""
    names = [n for n, m in model.named_modules() if getattr(m, "groups", 1) > 1]
    plans = {name: ConvPlan(1, ((1, 1), (2, 4))[i % 2]) for i, name in enumerate(names)}
    made = copy.deepcopy(model)
    with torch.no_grad():
        made = apply_rewrites(made, find_targets(made, (X,)), Rewrites(plans=plans))
        made(X)
    return made.requires_grad_(False)


@pytest.fixture
def fast() -> nn.Module:
    made = rewritten(small(ef.EPSABlock))
    assert any(isinstance(m, PlannedBlock) for m in made.modules())
    return made


def assert_same_function(model: nn.Module, expected: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected(X), rtol=1e-4, atol=1e-4)


def no_grad_copy(model: nn.Module, source: nn.Module) -> None:
    with torch.no_grad():
        for t, value in zip(tensors(model), tensors(source), strict=True):
            t.copy_(value)


def copy_to_data(model: nn.Module, source: nn.Module) -> None:
    for t, value in zip(tensors(model), tensors(source), strict=True):
        t.data.copy_(value.data)


def swap_data(model: nn.Module, source: nn.Module) -> None:
    for t, value in zip(tensors(model), tensors(copy.deepcopy(source)), strict=True):
        t.data, value.data = value.data, t.data


def set_storage(model: nn.Module, source: nn.Module) -> None:
    with torch.no_grad():
        for t, value in zip(tensors(model), tensors(source), strict=True):
            t.set_(value.detach().clone())


def from_vector(model: nn.Module, source: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(source.parameters()), model.parameters())
    for t, value in zip(model.buffers(), source.buffers(), strict=True):
        t.copy_(value)


def kept_alias(model: nn.Module, source: nn.Module) -> None:
    """The aliases are older than the last call, and written to after it."""
    aliases = [t.data for t in tensors(model)]
    with torch.no_grad():
        model(X)
    for alias, value in zip(aliases, tensors(source), strict=True):
        alias.copy_(value.detach())


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


WRITES: list[Callable[[nn.Module, nn.Module], None]] = [
    no_grad_copy, copy_to_data, swap_data, set_storage, from_vector, kept_alias
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("loaded", [False, True], ids=["made here", "unpickled"])
def test_every_way_to_write_to_a_tensor_is_noticed(
    fast: nn.Module, write: Callable[[nn.Module, nn.Module], None], loaded: bool
) -> None:
    if loaded:
        fast = saved_and_loaded(fast)
    torch.manual_seed(7)
    other = small(ef.EPSABlock)
    with torch.no_grad():
        fast(X)
    write(fast, other)
    assert_same_function(fast, other)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.slow
def test_torch_save_by_its_default_protocol() -> None:
    model = small(ef.EPSABlock)
    made = ef.optimize_for_inference(model, X)
    loaded = saved_and_loaded(made)
    assert_same_function(loaded, model)
    assert str(loaded.report) == str(made.report)
    for copied in (loaded, copy.deepcopy(made)):
        for name, tensor in copied.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])


def test_a_saved_parameter_is_an_ordinary_one(fast: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(list(fast.parameters()) + list(fast.buffers()), file)
    file.seek(0)
    kinds = {type(t) for t in torch.load(file, weights_only=True)}
    assert kinds == {nn.Parameter, Tensor}


@pytest.mark.parametrize("which", ["input", "weights"])
def test_a_backward_is_refused(fast: nn.Module, which: str) -> None:
    x = X.clone().requires_grad_(which == "input")
    fast.requires_grad_(which == "weights")
    with pytest.raises(RuntimeError, match="a model from optimize_for_inference has no gradients"):
        fast(x)
    with torch.no_grad():
        assert not fast(x).requires_grad


def test_a_trace_runs_the_original_convolutions(fast: nn.Module) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("error", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(fast, X)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for x in (X, torch.randn(1, 3, 50, 70)):
            torch.testing.assert_close(loaded(x), fast(x), rtol=1e-4, atol=1e-4)


def test_it_is_exported(fast: nn.Module) -> None:
    with torch.no_grad():
        exported = torch.export.export(fast, (X,))
        torch.testing.assert_close(exported.module()(X), fast(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_derived_tensors_are_made_anew_in_another_dtype(
    fast: nn.Module, dtype: torch.dtype
) -> None:
    original = small(ef.EPSABlock)
    original.load_state_dict(fast.state_dict())
    with torch.no_grad():
        expected = copy.deepcopy(original).double()(X.double())
        result = fast.to(dtype)(X.to(dtype)).double()
        plain = original.to(dtype)(X.to(dtype)).double()
    reordered = 1e-13 * expected.norm()  # of sums in float64
    limit = 2 * (plain - expected).norm() + reordered
    assert (result - expected).norm() <= limit


@pytest.mark.parametrize(
    "layer",
    ["bn1", "bn2", "bn3", "relu", "downsample.1", "conv2.se", "conv2.se.fc1", "conv2.se.sigmoid"],
)
def test_a_hook_on_any_layer_is_called(fast: nn.Module, layer: str) -> None:
    plain = small(ef.EPSABlock)
    plain.load_state_dict(fast.state_dict())
    seen: dict[nn.Module, int] = {}
    handles = []
    for model in (plain, fast):

        def change(module: nn.Module, _args: object, out: Tensor, model=model) -> Tensor:
            seen[model] = seen.get(model, 0) + 1
            return out * 0.5

        module = model.layer2[0].get_submodule(layer)
        handles.append(module.register_forward_hook(change))
    assert_same_function(fast, plain)
    assert seen[fast] == seen[plain] > 0
    for handle in handles:
        handle.remove()
    assert_same_function(fast, plain)


@pytest.mark.slow
def test_compiled_after_a_call_and_called_after_it(fast: nn.Module) -> None:
    """Compilers don't know tracked tensors; eager calls notice writes again afterwards."""
    plain = small(ef.EPSABlock)
    plain.load_state_dict(fast.state_dict())
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), fast(X), rtol=1e-4, atol=1e-4)
    torch.manual_seed(7)
    other = small(ef.EPSABlock)
    copy_to_data(fast, other)
    assert_same_function(fast, other)
    torch.compiler.reset()


def test_a_backward_is_refused_where_no_rewrite_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "_is_faster", lambda *_: False)
    result = ef.optimize_for_inference(small(ef.EPSABlock), X)
    assert result.report.rewrites is None
    for model in (result, pickle.loads(pickle.dumps(result))):
        with pytest.raises(RuntimeError, match="optimize_for_inference has no gradients"):
            model(X.clone().requires_grad_())
        with torch.no_grad():
            assert model(X).isfinite().all()
