"""Models exported by torch.export and TorchScript give the same numbers."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from helpers.networks import CASES, exported, other_inputs

import epsanet_fused as ef

OPERATOR = torch.ops.epsanet_fused.psa_tail.default
each_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case == "channels_last")) for case in CASES],
)


def operators(program: torch.export.ExportedProgram) -> list[object]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


# torch warns when it saves a channels_last parameter and, in 2.11, when it loads one.
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@each_case
def test_export_contains_the_operator(case: str, tmp_path: Path) -> None:
    model, x = CASES[case]()
    program = exported(model, x)
    modules = sum(isinstance(m, ef.FusedPSAModule) for m in model.modules())
    assert operators(program).count(OPERATOR) == modules > 0
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        for other in other_inputs(x):
            torch.testing.assert_close(loaded(other), model(other))


@each_case
def test_export_by_the_reference_backend_contains_no_operator(case: str) -> None:
    model, x = CASES[case]()
    with ef.use_backend("reference"):
        program = exported(model, x)
    assert not [op for op in operators(program) if "epsanet_fused" in str(op)]
    with torch.no_grad():
        for other in other_inputs(x):
            torch.testing.assert_close(program.module()(other), model(other))


@each_case
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_trace_contains_pytorch_operators_only(case: str, grad: bool, tmp_path: Path) -> None:
    model, x = CASES[case]()
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
        if case == "channels_last":  # the example fixes the output's format
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(model, x)
        traced.save(tmp_path / "model.pt")
        loaded = torch.jit.load(tmp_path / "model.pt")
    assert "epsanet_fused::" not in str(loaded.inlined_graph)
    with torch.no_grad():
        for other in other_inputs(x):
            torch.testing.assert_close(loaded(other), model(other))


@pytest.mark.slow
@each_case
def test_compiles_without_a_graph_break(case: str) -> None:
    model, x = CASES[case]()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for other in other_inputs(x):
            torch.testing.assert_close(compiled(other), model(other))
