"""Exported ONNX files have standard operators only, and onnxruntime gives the same numbers."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.networks import CASES, DYNAMIC, other_inputs
from helpers.psa_variants import VARIANTS, holder
from torch import nn

import epsanet_fused as ef

TOLERANCE = 1e-4
each_case = pytest.mark.parametrize("case", CASES)


def check(path: Path, model: nn.Module, x: torch.Tensor) -> None:
    """Check a file's operators, and its outputs for inputs of several sizes."""
    onnx.checker.check_model(path, full_check=True)
    proto = onnx.load(path)
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    assert {opset.domain for opset in proto.opset_import} <= {"", "ai.onnx"}
    assert not proto.functions
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [name] = [given.name for given in session.get_inputs()]
    for other in other_inputs(x):
        [found] = session.run(None, {name: other.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, model(other).numpy(), rtol=0, atol=TOLERANCE)


def export(model: object, x: torch.Tensor, path: Path, dynamo: bool = True) -> None:
    shapes = (
        {"dynamic_shapes": DYNAMIC}
        if dynamo
        else {"dynamic_axes": {"x": {0: "B", 2: "H", 3: "W"}}, "input_names": ["x"]}
    )
    with warnings.catch_warnings():
        # The exporters' own warnings.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)
        if x.is_contiguous(memory_format=torch.channels_last):
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        torch.onnx.export(model, (x,), path, dynamo=dynamo, verbose=False, **shapes)


@each_case
@pytest.mark.parametrize("dynamo", [True, False], ids=["by torch.export", "by TorchScript"])
def test_a_model_exports_to_onnx(case: str, dynamo: bool, tmp_path: Path) -> None:
    model, x = CASES[case]()
    export(model, x, tmp_path / "model.onnx", dynamo)
    check(tmp_path / "model.onnx", model, x)


@each_case
def test_an_exported_program_exports_to_onnx(case: str, tmp_path: Path) -> None:
    """The program must be exported by the reference backend, without the operator."""
    model, x = CASES[case]()
    with ef.use_backend("reference"):
        program = torch.export.export(model, (x,), dynamic_shapes=DYNAMIC)
    export(program, x, tmp_path / "model.onnx")
    check(tmp_path / "model.onnx", model, x)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dynamo", [True, False], ids=["by torch.export", "by TorchScript"])
def test_a_fused_model_of_another_package_exports_to_onnx(
    name: str, dynamo: bool, tmp_path: Path
) -> None:
    model, x, order, _ = holder(name)
    ef.fuse(model, order=order)
    # ReLU gives a new tensor: one variant modifies its input, which a graph's input forbids.
    model = nn.Sequential(nn.ReLU(), model).eval()
    export(model, x, tmp_path / "model.onnx", dynamo)
    check(tmp_path / "model.onnx", model, x)
