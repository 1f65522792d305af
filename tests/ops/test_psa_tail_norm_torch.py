"""psa_tail_norm works with the rest of PyTorch: opcheck, autograd, compilers, checkpointing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from helpers.cases import MEMORY_FORMATS, Shape, assert_accurate, run_by
from helpers.norm_cases import (
    FAST_BACKENDS,
    NormCase,
    by_backend,
    evaluate_norm,
    expected_norm,
    make_norm_case,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import epsanet_fused as ef
from epsanet_fused.backends.registry import current_backend, get_backend

SHAPE = Shape(2, 3, 8, 4, 5, 2)
OPS = torch.ops.epsanet_fused


@pytest.fixture(params=FAST_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the backend's name with which the operator is called."""
    with run_by(request.param):
        yield current_backend()
    torch.compiler.reset()


def inputs(kind: str) -> NormCase:
    if kind in MEMORY_FORMATS:
        return make_norm_case(SHAPE, memory_format=MEMORY_FORMATS[kind])
    if kind == "permuted":
        return make_norm_case(SHAPE, change=lambda bs: [x.mT.contiguous().mT for x in bs])
    return make_norm_case(SHAPE, change=lambda bs: list(torch.cat(bs, 1).chunk(3, 1)))


def matrices(case: NormCase) -> list[Tensor]:
    return [t.flatten(1) if t.dim() == 4 else t for t in case.fc]


INPUTS = [*MEMORY_FORMATS, "sliced", "permuted"]


@pytest.mark.parametrize(
    ("backend", "kind", "affine"),
    by_backend([(kind, a) for kind in INPUTS for a in (True, False)], [("sliced", True)]),
    indirect=["backend"],
)
def test_opcheck_forward(backend: str, kind: str, affine: bool) -> None:
    case = inputs(kind)
    leaves = [x.detach().requires_grad_() for x in case.branches]
    parameters = [t.detach().requires_grad_() for t in (*matrices(case), *case.affine)]
    if not affine:
        parameters[4:] = [None, None]
    torch.library.opcheck(OPS.psa_tail_norm, (leaves, *parameters, 1e-5, backend))


ASKED = [
    (kind, asked)
    for kind in INPUTS
    for asked in [
        (True, True, True),
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (False, False, False),
    ]
]


@pytest.mark.parametrize(
    ("backend", "kind", "asked"),
    by_backend(ASKED, [("channels_last", (True, True, True))]),
    indirect=["backend"],
)
def test_opcheck_backward(backend: str, kind: str, asked: tuple[bool, ...]) -> None:
    case = inputs(kind)
    rest = (*matrices(case), *case.affine, 1e-5)
    _, *stats = OPS.psa_tail_norm(case.branches, *rest, backend)
    arguments = (case.grad, case.branches, *stats, *rest, *asked, backend)
    torch.library.opcheck(OPS.psa_tail_norm_backward, arguments)
    grads = OPS.psa_tail_norm_backward(*arguments)
    assert [len(g) for g in grads] == [n * a for n, a in zip((3, 4, 2), asked, strict=True)]


@pytest.mark.parametrize("kind", INPUTS)
def test_opcheck_of_the_librarys_own_operators(kind: str) -> None:
    """They have no autograd by design, so its tests are left out."""
    assert get_backend("cpu").unavailable_reason("cpu") is None
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    case = inputs(kind)
    rest = (*matrices(case), *case.affine, 1e-5)
    torch.library.opcheck(OPS.psa_tail_norm_native, (case.branches, *rest), test_utils=utils)
    _, *stats = OPS.psa_tail_norm_native(case.branches, *rest)
    arguments = (case.grad, case.branches, *stats, *rest, True, True, True)
    torch.library.opcheck(OPS.psa_tail_norm_native_backward, arguments, test_utils=utils)


class Weights(nn.BatchNorm2d):
    """A BatchNorm2d whose gamma and beta are tensors that a test holds."""

    def __init__(self, gamma: Tensor, beta: Tensor) -> None:
        super().__init__(len(gamma), dtype=gamma.dtype)
        del self.weight, self.bias
        self.weight, self.bias = gamma, beta


def call(tensors: Sequence[Tensor], S: int) -> Tensor:
    branches, fc, affine = tensors[:S], tensors[S : S + 4], tensors[S + 4 :]
    return ef.psa_tail_norm(branches, *fc, Weights(*affine))


def leaves_of(case: NormCase) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in (*case.branches, *case.fc, *case.affine)]


def test_gradcheck(backend: str) -> None:
    case = make_norm_case(Shape(2, 2, 2, 2, 3, 2), torch.float64)
    leaves = leaves_of(case)
    assert torch.autograd.gradcheck(lambda *t: call(t, 2), leaves)


def test_the_reference_backend_is_differentiable_twice() -> None:
    leaves = leaves_of(make_norm_case(Shape(2, 2, 2, 2, 1, 1), torch.float64))
    with ef.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda *t: call(t, 2), leaves)


def test_backward_twice_over_one_graph(backend: str) -> None:
    leaves = leaves_of(make_norm_case(SHAPE))
    out = call(leaves, 3)
    grad = torch.randn_like(out)
    once = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_checkpointing_gives_the_same_gradients(backend: str) -> None:
    case = make_norm_case(SHAPE)

    def recomputed(*arguments: object) -> Tensor:
        return checkpoint(ef.psa_tail_norm, *arguments, use_reentrant=False)

    alone, again = (evaluate_norm(f, case)[:-2] for f in (ef.psa_tail_norm, recomputed))
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))


@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(backend: str, dynamic: bool, options: dict) -> None:
    """Forward, backward and the update of the running statistics."""
    compiled = torch.compile(ef.psa_tail_norm, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in (SHAPE, SHAPE._replace(B=3, H=6)):
        for memory_format in MEMORY_FORMATS.values():
            case = make_norm_case(shape, memory_format=memory_format, **options)
            assert_accurate(evaluate_norm(compiled, case), *expected_norm(case))


def test_saves_only_inputs_and_small_tensors(backend: str) -> None:
    leaves = leaves_of(make_norm_case(Shape(2, 4, 16, 16, 16, 1)))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = call(leaves, 4)
    inputs = {t.data_ptr() for t in leaves}
    extra = [t for t in saved if t.data_ptr() not in inputs]
    assert sum(t.numel() for t in extra) < 0.05 * out.numel()
