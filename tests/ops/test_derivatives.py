"""Derivatives of any order, forward mode and torch.func, of both operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.cases import OPERATOR_BACKENDS, Shape, make_case, run_by, slow_if_interpreted
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import epsanet_fused as ef
from epsanet_fused.backends.registry import NAMES, current_backend

SHAPE = Shape(2, 2, 3, 2, 2, 2)
Operator = Callable[..., Tensor]


@pytest.fixture(params=slow_if_interpreted(OPERATOR_BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with run_by(request.param):
        yield current_backend()


def tail(*tensors: Tensor) -> Tensor:
    return ef.psa_tail(tensors[:-4], *tensors[-4:])


def norm_tail(*tensors: Tensor) -> Tensor:
    channels = (len(tensors) - 4) * tensors[0].shape[1]
    norm = nn.BatchNorm2d(channels, dtype=tensors[0].dtype, track_running_stats=False)
    return ef.psa_tail_norm(tensors[:-4], *tensors[-4:], norm)


def leaves() -> list[Tensor]:
    case = make_case(SHAPE, torch.float64)
    return [t.requires_grad_() for t in (*case.branches, *case.fc)]


@pytest.mark.parametrize("operator", [tail, norm_tail])
def test_first_and_second_derivatives_are_right(backend: str, operator: Operator) -> None:
    assert gradcheck(operator, leaves(), check_batched_grad=operator is tail)
    assert gradgradcheck(operator, leaves())


DEPENDENT: dict[str, Callable[[Tensor, list[Tensor]], list[Tensor]]] = {
    "one tensor twice": lambda x, fc: [x, x, *fc],
    "one branch of another": lambda x, fc: [x, x.sin(), *fc],
    "fc of a branch": lambda x, fc: [x, x.cos(), fc[0] * x.mean(), *fc[1:]],
    "fc2 of fc1": lambda x, fc: [x, x * 2, fc[0], fc[1], fc[0].transpose(0, 1), fc[3]],
}


@pytest.mark.parametrize("operator", [tail, norm_tail])
@pytest.mark.parametrize("kind", DEPENDENT)
def test_inputs_that_depend_on_each_other(kind: str, operator: Operator) -> None:
    x, _, *fc = leaves()

    def function(x: Tensor, *fc: Tensor) -> Tensor:
        return operator(*DEPENDENT[kind](x, list(fc)))

    def with_graph(*tensors: Tensor) -> list[Tensor]:
        out = function(*tensors).square().sum()
        found = torch.autograd.grad(out, tensors, create_graph=True, materialize_grads=True)
        return [g.detach() for g in found]

    found = with_graph(x, *fc)
    with ef.use_backend("reference"):
        expected = with_graph(x, *fc)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert gradgradcheck(function, (x, *fc))
    if operator is tail:
        assert gradcheck(function, (x, *fc), check_batched_grad=True)


def test_a_module_applied_twice_with_a_graph() -> None:
    torch.manual_seed(0)
    plain = ef.PSAModule(16, 16, conv_groups=(1, 1, 2, 4), reduction=1).double()
    fused = ef.FusedPSAModule.from_reference(plain)
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(m(m(x)).sin().sum(), list(m.parameters()), create_graph=True)
        for m in (fused, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_norm_of_another_dtype_has_second_derivatives() -> None:
    *branches, fc1_weight, fc1_bias, fc2_weight, fc2_bias = (t.float() for t in leaves())
    norm = nn.BatchNorm2d(sum(b.shape[1] for b in branches), dtype=torch.float64)
    leaf = branches[0].detach().requires_grad_()
    fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    out = ef.psa_tail_norm([leaf, *branches[1:]], *fc, norm)
    (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    assert second.isfinite().all() and second.any()


def test_samples_in_channels_last() -> None:
    plain = ef.PSAModule(16, 16, conv_groups=(1, 1, 2, 4), reduction=2)
    fused = ef.FusedPSAModule.from_reference(plain)
    x = torch.randn(3, 16, 4, 5).to(memory_format=torch.channels_last)
    for m in (plain, fused):
        m.to(memory_format=torch.channels_last)
    weights = dict(plain.named_parameters())

    def loss(model: nn.Module, weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, weights, (sample[None],)).sin().sum()

    found, expected = (
        vmap(grad(lambda w, s, m=m: loss(m, w, s)), (None, 0))(weights, x) for m in (fused, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_tangent_of_the_epilogue() -> None:
    case = make_case(SHAPE, torch.float64)
    scale = torch.ones(SHAPE.S * SHAPE.C, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(scale, torch.ones_like(scale))
        out = ef.psa_tail(case.branches, *case.fc, scale=dual)
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(tangent, ef.psa_tail(case.branches, *case.fc))


@pytest.mark.parametrize("operator", [tail, norm_tail])
def test_forward_mode_is_right(operator: Operator) -> None:
    assert gradcheck(
        operator,
        leaves(),
        check_forward_ad=True,
        check_backward_ad=False,
        check_undefined_grad=False,
    )


def test_third_derivatives_are_those_of_the_reference() -> None:
    def third(tensors: list[Tensor]) -> Tensor:
        out = tail(*tensors).sin().sum()
        for _ in range(3):
            (found,) = torch.autograd.grad(out, tensors[0], create_graph=True)
            out = found.sin().sum()
        return found

    ours = third(leaves())
    with ef.use_backend("reference"):
        torch.testing.assert_close(ours, third(leaves()))


def per_sample(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of each sample by itself."""

    def loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(module, weights, (sample[None],)).square().sum()

    weights = {name: p.detach() for name, p in module.named_parameters()}
    return vmap(grad(loss), (None, 0))(weights, x)


def batch_of_gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    out = module(x.requires_grad_())
    gradients = torch.stack([torch.cos(out), torch.sin(out)]).detach()
    return torch.autograd.grad(out, x, gradients, is_grads_batched=True)


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "grad": lambda f, x: grad(lambda t: f(t).square().sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](f(x)),
    "jvp": lambda f, x: jvp(f, (x,), (torch.cos(x),)),
    "jacrev": lambda f, x: jacrev(f)(x[:1, :, :2, :2]),
    "vmap": lambda f, x: vmap(f)(x[:, None]),
    "hessian": lambda f, x: hessian(lambda t: f(t).square().sum())(x[:1, :, :1, :1]),
    "gradients of each sample": per_sample,
    "a batch of gradients": batch_of_gradients,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_a_fused_module_are_those_of_the_plain_one(transform: str) -> None:
    plain = ef.PSAModule(16, 16, conv_groups=(1, 1, 2, 4), reduction=2)
    fused = ef.FusedPSAModule.from_reference(plain)
    x = torch.randn(2, 16, 4, 4)
    ours, expected = (TRANSFORMS[transform](m, x.clone()) for m in (fused, plain))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("triton", "cuda")])
def test_a_compiled_transform(name: str) -> None:
    tensors = [t.detach() for t in leaves()]

    def of_branch(x: Tensor) -> Tensor:
        return tail(x[None], x[None] * 2, *tensors[2:]).square().sum()

    with ef.use_backend(name):
        x = tensors[0]
        made = torch.compile(vmap(grad(of_branch)), fullgraph=True, backend="aot_eager")(x)
    torch.compiler.reset()
    torch.testing.assert_close(made, torch.stack([grad(of_branch)(sample) for sample in x]))
