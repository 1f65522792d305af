"""psa_tail works with the rest of PyTorch: opcheck, autograd, compilers, export, checkpointing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from helpers.cases import (
    BACKENDS,
    MEMORY_FORMATS,
    OPERATOR_BACKENDS,
    Case,
    Shape,
    assert_accurate,
    expected,
    make_case,
    run_by,
    slow_if_interpreted,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import epsanet_fused as ef
from epsanet_fused.backends.registry import current_backend, get_backend
from epsanet_fused.testing.accuracy import evaluate, plain_tail

SHAPE = Shape(2, 3, 8, 4, 5, 2)
OPS = torch.ops.epsanet_fused
COMPILERS = ["aot_eager", "inductor"] if shutil.which("g++") else ["aot_eager"]


@pytest.fixture(params=OPERATOR_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the backend's name with which the operator is called."""
    with run_by(request.param):
        yield current_backend()
    torch.compiler.reset()


def inputs(kind: str) -> Case:
    if kind in MEMORY_FORMATS:
        return make_case(SHAPE, memory_format=MEMORY_FORMATS[kind])
    case = make_case(SHAPE)
    if kind == "permuted":
        return case._replace(branches=[x.mT.contiguous().mT for x in case.branches])
    return case._replace(branches=list(torch.cat(case.branches, 1).chunk(3, 1)))


INPUTS = [*MEMORY_FORMATS, "sliced", "permuted"]


@pytest.mark.parametrize("kind", INPUTS)
def test_opcheck_forward(backend: str, kind: str) -> None:
    branches, (w1, b1, w2, b2), _ = inputs(kind)
    fc = [t.requires_grad_() for t in (w1.flatten(1), b1, w2.flatten(1), b2)]
    leaves = [x.detach().requires_grad_() for x in branches]
    torch.library.opcheck(OPS.psa_tail, (leaves, *fc, None, None, False, backend))


@pytest.mark.parametrize("epilogue", ["scale", "shift", "relu"])
def test_opcheck_epilogue(backend: str, epilogue: str) -> None:
    branches, (w1, b1, w2, b2), _ = inputs("nchw")
    scale, shift = (torch.randn(24) if epilogue == name else None for name in ("scale", "shift"))
    fc = (w1.flatten(1), b1, w2.flatten(1), b2)
    torch.library.opcheck(OPS.psa_tail, (branches, *fc, scale, shift, epilogue == "relu", backend))


@pytest.mark.parametrize("branch_grads", [True, False])
@pytest.mark.parametrize("fc_grads", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
def test_opcheck_backward(backend: str, kind: str, branch_grads: bool, fc_grads: bool) -> None:
    branches, (w1, b1, w2, b2), grad = inputs(kind)
    fc = (w1.flatten(1), b1, w2.flatten(1), b2)
    _, squeeze, attention = OPS.psa_tail(branches, *fc, None, None, False, backend)
    torch.library.opcheck(
        OPS.psa_tail_backward,
        (grad, branches, squeeze, attention, *fc, branch_grads, fc_grads, backend),
    )


@pytest.mark.parametrize("backend", slow_if_interpreted(OPERATOR_BACKENDS), indirect=True)
def test_gradcheck(backend: str) -> None:
    branches, fc, _ = make_case(Shape(2, 2, 2, 1, 2, 2), torch.float64)
    leaves = [t.requires_grad_() for t in (*branches, *fc)]
    assert torch.autograd.gradcheck(lambda *t: ef.psa_tail(t[:2], *t[2:]), leaves)


def test_the_reference_backend_is_differentiable_to_any_order() -> None:
    branches, fc, _ = make_case(Shape(1, 2, 2, 2, 1, 1), torch.float64)
    leaves = [t.requires_grad_() for t in (*branches, *fc)]
    with ef.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda *t: ef.psa_tail(t[:2], *t[2:]), leaves)


def test_the_reference_backend_works_with_torch_func() -> None:
    branches, fc, _ = make_case(SHAPE)

    def loss(x: Tensor) -> Tensor:
        return ef.psa_tail([x, *branches[1:]], *fc).square().sum()

    with ef.use_backend("reference"):
        by_func = torch.func.grad(loss)(branches[0])
        leaf = branches[0].clone().requires_grad_()
        (by_autograd,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(by_func, by_autograd)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(backend: str, compiler: str, dynamic: bool) -> None:
    compiled = torch.compile(ef.psa_tail, fullgraph=True, dynamic=dynamic, backend=compiler)
    for shape in (SHAPE, SHAPE._replace(B=3, H=6)):
        for memory_format in MEMORY_FORMATS.values():
            case = make_case(shape, memory_format=memory_format)
            assert_accurate(evaluate(compiled, *case), *expected(case))


NATIVE_TESTS = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]


@pytest.mark.parametrize("kind", INPUTS)
def test_opcheck_of_the_librarys_own_operators(kind: str) -> None:
    """They have no autograd by design, so its tests are left out."""
    assert get_backend("cpu").unavailable_reason("cpu") is None
    branches, (w1, b1, w2, b2), grad = inputs(kind)
    for fc in ((w1, b1, w2, b2), (w1.flatten(1), b1, w2.flatten(1), b2)):
        arguments = (branches, *fc, torch.randn(24), None, True, 0)
        torch.library.opcheck(OPS.psa_tail_native, arguments, test_utils=NATIVE_TESTS)
        torch.library.opcheck(OPS.psa_tail_inference, arguments, test_utils=NATIVE_TESTS)
    _, squeeze, attention = OPS.psa_tail_native(branches, *fc, None, None, False, 0)
    arguments = (grad, branches, squeeze, attention, *fc, True, True, 0)
    torch.library.opcheck(OPS.psa_tail_native_backward, arguments, test_utils=NATIVE_TESTS)


def test_compiled_dynamic_shapes_are_not_recompiled() -> None:
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ef.psa_tail, fullgraph=True, dynamic=True, backend=count)
    for B, H in ((7, 4), (3, 6), (5, 9)):  # all sizes differ
        case = make_case(SHAPE._replace(B=B, H=H))
        compiled(case.branches, *case.fc)
    torch.compiler.reset()
    assert count.frame_count == 1


def test_a_compiled_function_follows_use_backend() -> None:
    case = make_case(SHAPE)
    compiled = torch.compile(ef.psa_tail, fullgraph=True, backend="aot_eager")
    for name in ("auto", "reference", "triton", "cpu"):
        with ef.use_backend(name):
            assert_accurate(evaluate(compiled, *case), *expected(case))
    with pytest.raises(ValueError, match="name must be one of"), ef.use_backend("fastest"):
        pass
    torch.compiler.reset()


class Tail(torch.nn.Module):
    def __init__(self, fc: list[Tensor]) -> None:
        super().__init__()
        self.fc = torch.nn.ParameterList(fc)

    def forward(self, *branches: Tensor) -> Tensor:
        return ef.psa_tail(branches, *self.fc)


def test_exports_with_a_dynamic_batch(backend: str) -> None:
    case = make_case(SHAPE)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        Tail(case.fc), tuple(case.branches), dynamic_shapes={"branches": ({0: batch},) * 3}
    )
    targets = [node.target for node in program.graph.nodes]
    assert OPS.psa_tail.default in targets
    for B in (1, 2, 7):
        other = make_case(SHAPE._replace(B=B)).branches
        torch.testing.assert_close(program.module()(*other), plain_tail(other, *case.fc))


def test_checkpointing_gives_the_same_gradients(backend: str) -> None:
    case = make_case(SHAPE)

    def recomputed(branches: list[Tensor], *fc: Tensor) -> Tensor:
        return checkpoint(ef.psa_tail, branches, *fc, use_reentrant=False)

    for a, b in zip(evaluate(ef.psa_tail, *case), evaluate(recomputed, *case), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("where", BACKENDS)
def test_autocast_leaves_the_tail_its_dtypes(where: str) -> None:
    """With 16-bit branches and float32 weights, the small products stay in float32."""
    case = make_case(SHAPE, torch.bfloat16, fc_dtype=torch.float32)

    def tail(branches: list[Tensor], *fc: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ef.psa_tail(branches, *fc)

    with run_by(where):
        under, outside = evaluate(tail, *case), evaluate(ef.psa_tail, *case)
    assert [t.dtype for t in under] == [torch.bfloat16] * 4 + [torch.float32] * 4
    for a, b in zip(under, outside, strict=True):
        assert torch.equal(a, b)


def test_saves_only_inputs_and_small_tensors(backend: str) -> None:
    case = make_case(Shape(2, 4, 16, 16, 16, 1))
    leaves = [x.requires_grad_() for x in case.branches]
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ef.psa_tail(leaves, *case.fc)
    inputs = {t.data_ptr() for t in leaves}
    extra = [t for t in saved if t.data_ptr() not in inputs]
    assert sum(t.numel() for t in extra) < 0.05 * case.grad.numel()
