"""Test the workloads that the benchmarks run."""

from __future__ import annotations

import pytest
import torch
from harness.cases import MEMORY_FORMATS, STAGES, Case, Source

CPU = torch.device("cpu")


def test_activations_have_a_usual_size_and_depend_on_the_photo(one_thread):
    pytest.importorskip("sklearn")
    source = Source(CPU)
    for stage, (channels, height, width) in STAGES.items():
        case = Case("module", "inference", stage, 3, "float32", "channels_last")
        (x,) = source.workload(case).inputs
        assert x.shape == (3, channels, height, width)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert 0.1 < x.std() < 10
        assert torch.equal(x[0], x[2]), "the two photographs alternate"
        assert not torch.allclose(x[0], x[1])


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scope", ["tail", "norm", "module"])
def test_inputs_have_the_shape_dtype_and_memory_format_of_the_case(scope, dtype, memory_format):
    mode = "training" if scope == "norm" else "inference"
    case = Case(scope, mode, "64x5x3", 3, dtype, memory_format)
    workload = Source(CPU, "randn").workload(case)
    assert sum(x.shape[1] for x in workload.inputs) == 64
    for x in workload.inputs:
        assert x.shape == (3, x.shape[1], 5, 3)
        assert x.dtype == case.torch_dtype and x.requires_grad == (mode == "training")
        assert x.is_contiguous(memory_format=MEMORY_FORMATS[memory_format])
    if scope == "tail":
        assert workload.output_bytes == 3 * 64 * 5 * 3 * case.torch_dtype.itemsize


def test_16_bit_training_of_modules_is_mixed_precision():
    case = Case("module", "training", "64x5x3", 2, "bfloat16", "nchw")
    workload = Source(CPU, "randn").workload(case)
    assert case.autocast == torch.bfloat16
    assert {t.dtype for t in (*workload.inputs, *workload.fused.parameters())} == {torch.float32}
    assert case._replace(mode="inference").autocast is None
    assert case._replace(dtype="float32").autocast is None


def test_own_kernels_and_groups_are_those_of_the_module():
    source = Source(CPU, "randn", kernels=(1, 3, 5, 7), groups=(1, 2, 4, 8))
    workload = source.workload(Case("module", "inference", "64x9x7", 2, "float32", "nchw"))
    assert workload.inputs[0].shape == (2, 64, 9, 7)
    convs = [getattr(workload.official, f"conv_{i}") for i in range(1, 5)]
    assert [conv.kernel_size[0] for conv in convs] == [1, 3, 5, 7]
    assert [conv.groups for conv in convs] == [1, 2, 4, 8]
