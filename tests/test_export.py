"""A model leaves Python by torch.export, AOTInductor and TorchScript, with its numbers."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from export_cases import CASES, DYNAMIC, module, other_inputs
from torch import nn

import epsanet_fused as ef

OPERATOR = torch.ops.epsanet_fused.psa_tail.default
each_case = pytest.mark.parametrize("case", CASES)


def exported(model: nn.Module, x: torch.Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=DYNAMIC)


def operators(program: torch.export.ExportedProgram) -> list[object]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


# torch's own: in saving a parameter in channels_last, and, in 2.11, in loading.
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@each_case
def test_an_exported_program_holds_the_operator(case: str, tmp_path: Path) -> None:
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
def test_without_the_operator_by_the_reference_backend(case: str) -> None:
    model, x = CASES[case]()
    with ef.use_backend("reference"):
        program = exported(model, x)
    assert not [op for op in operators(program) if "epsanet_fused" in str(op)]
    with torch.no_grad():
        for other in other_inputs(x):
            torch.testing.assert_close(program.module()(other), model(other))


@each_case
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_trace_holds_plain_operators(case: str, grad: bool, tmp_path: Path) -> None:
    model, x = CASES[case]()
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
        if case == "channels_last":  # which format comes out is fixed by the example
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(model, x)
        traced.save(tmp_path / "model.pt")
        loaded = torch.jit.load(tmp_path / "model.pt")
    assert "epsanet_fused::" not in str(loaded.inlined_graph)
    with torch.no_grad():
        for other in other_inputs(x):
            torch.testing.assert_close(loaded(other), model(other))


@each_case
def test_compiles_without_a_graph_break(case: str) -> None:
    model, x = CASES[case]()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for other in other_inputs(x):
            torch.testing.assert_close(compiled(other), model(other))


RUN_PACKAGE = """
import sys, warnings
import torch
warnings.simplefilter("ignore")
{first}
run = torch._inductor.aoti_load_package(sys.argv[1])
inputs, expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    for x, y in zip(inputs, expected):
        torch.testing.assert_close(run(x), y)
print("epsanet_fused" in sys.modules)
"""


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_aotinductor_package_runs_in_another_process(backend: str, tmp_path: Path) -> None:
    """With the operator it needs this package there; exported by "reference" it needs none."""
    model, x = module()
    with ef.use_backend(backend):
        program = exported(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Inductor
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
    inputs = other_inputs(x)
    with torch.no_grad():
        torch.save((inputs, [model(t) for t in inputs]), tmp_path / "cases.pt")
    first = "import epsanet_fused" if backend == "auto" else ""
    command = [
        sys.executable,
        "-c",
        RUN_PACKAGE.format(first=first),
        package,
        tmp_path / "cases.pt",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(backend == "auto")]
