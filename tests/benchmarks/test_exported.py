"""Test that the official network, exported, gives the same result by other libraries."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from harness import exported
from harness.accuracy import AccuracyChecker
from harness.cases import Case, Source, Workload
from torch import nn

import epsanet_fused as ef

CPU = torch.device("cpu")
# The exporter of torch uses names that it deprecates itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 2, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        ef.PSAModule(64, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def small_workload(dtype: str, memory_format: str = "nchw") -> tuple[Workload, Case]:
    case = Case("network", "inference", "all", 2, dtype, memory_format)
    source = Source(CPU, "randn", image_shape=(3, 32, 32), model=small_network)
    return source.workload(case), case


@pytest.fixture(autouse=True)
def _without_gradients(one_thread):
    with torch.no_grad():
        yield


def require(name: str) -> None:
    """Skip the test unless this rival and the exporter are installed."""
    for package in (*exported.PACKAGES, name):
        pytest.importorskip(package)


@pytest.mark.parametrize(
    "name, dtype, memory_format",
    [
        ("onnxruntime", "float32", "nchw"),
        ("onnxruntime", "float32", "channels_last"),
        ("openvino", "float32", "channels_last"),
        ("openvino", "bfloat16", "nchw"),
    ],
)
def test_rival_is_within_the_bound_of_eager(name, dtype, memory_format):
    require(name)
    workload, case = small_workload(dtype, memory_format)
    step, backend = getattr(exported, name)(workload.official, workload.inputs[0])
    results = step()
    assert AccuracyChecker(workload, case).check(results, workload, case).ok
    assert results[0].dtype == case.torch_dtype
    assert backend.startswith(f"{name} ") and backend[-1] != " ", "with its version"
    if dtype == "float32":
        torch.testing.assert_close(results[0], workload.official(workload.inputs[0]))


@pytest.mark.parametrize(
    "name, dtype", [("onnxruntime", torch.bfloat16), ("openvino", torch.float16)]
)
def test_dtype_that_a_rival_does_not_run_is_refused_before_the_export(name, dtype):
    require(name)
    with pytest.raises(ValueError, match=f"{name} runs .*, not in {dtype}"):
        getattr(exported, name)(nn.Identity(), torch.ones(1, 3, 4, 4, dtype=dtype))


def test_missing_packages_are_named(monkeypatch):
    find = importlib.util.find_spec
    reason = exported.needs("no_such_rival")(CPU)
    assert reason.startswith("it needs ")
    assert reason.endswith("no_such_rival; see make bench-rivals")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    assert "onnxscript" in exported.needs("onnxruntime")(CPU)
    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert exported.needs("json")(torch.device("cuda")) == "json is compared on CPUs only"
