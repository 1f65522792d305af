"""The compiled CPU kernels: every instruction set, any number of threads, invalid arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.cases import MEMORY_FORMATS, Case, Shape, assert_accurate, expected, make_case
from helpers.norm_cases import evaluate_norm, expected_norm, make_norm_case

import epsanet_fused as ef
from epsanet_fused.backends.compiled import load_library
from epsanet_fused.testing.accuracy import evaluate

OPS = torch.ops.epsanet_fused
CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16")
OTHER_CAPABILITY = 77  # the exit status of RUN_TESTS
# Run pytest, if the library runs with the instruction set that the first argument names.
RUN_TESTS = f"""
import sys, pytest
from epsanet_fused.backends import compiled
if compiled.load_library().cpu_capability != sys.argv[1]:
    sys.exit({OTHER_CAPABILITY})
sys.exit(pytest.main(sys.argv[2:]))
"""
VARIABLE = "EPSANET_FUSED_CPU_CAPABILITY"


def test_the_library_loads() -> None:
    assert load_library().unavailable_reason is None


def with_capability(capability: str, *command: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *command],
        # One thread: two that share a busy core wait for each other for most of the time.
        env=env | {VARIABLE: capability, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )


# Two choices of tests by their ids: those of two shapes, and all but this one.
@pytest.mark.parametrize(
    "which_tests",
    [
        pytest.param("cpu and (S4 or 5x9) and not every", id="sample"),
        pytest.param("cpu and not every", id="all", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_gives_the_right_numbers(capability: str, which_tests: str) -> None:
    """Run the operators' tests on the backend "cpu", in a process with this instruction set."""
    if capability == load_library().cpu_capability:
        pytest.skip("these tests run with it in this process, too")
    files = (
        "ops/test_psa_tail.py",
        "ops/test_psa_tail_norm.py",
        "ops/test_psa_tail_norm_errors.py",
        "backends/test_cpu_kernels.py",
    )
    tests = (*(f"tests/{file}" for file in files), "-k", which_tests)
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    done = with_capability(capability, "-c", RUN_TESTS, capability, *tests, *options)
    if done.returncode == OTHER_CAPABILITY:
        pytest.skip(f"this CPU has no {capability}")
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_unknown_instruction_set_is_named() -> None:
    code = (
        "import torch, warnings, epsanet_fused as ef; print(ef.list_backends()['cpu'].reason)\n"
        "x = [torch.ones(1, 4, 2, 2)] * 2\n"
        "w = (torch.ones(1, 4), torch.ones(1), torch.ones(4, 1), torch.ones(4))\n"
        "with warnings.catch_warnings(record=True): print(ef.psa_tail(x, *w).shape)\n"
        "try: torch.ops.epsanet_fused.psa_tail_native(x, *w, None, None, False, 0)\n"
        "except Exception as error: print(error)"
    )
    done = with_capability("avx9", "-c", code)
    reason, shape, error = done.stdout.splitlines()
    assert reason == f"{VARIABLE}='avx9' names no instruction set of this CPU"
    assert shape == "torch.Size([1, 8, 2, 2])"
    assert "must be one of" in error
    assert error.endswith("on this CPU, got avx9")


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_number_is_read_and_rounded_right(
    dtype: torch.dtype, memory_format: str
) -> None:
    """All bit patterns whose sum is finite, times a scale that needs rounding."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    bits = bits[bits.float().abs() < 1e30]
    x = torch.cat([bits, bits[:-1].flip(0)]).view(1, 1, -1, 1).expand(1, 18, -1, 1)
    x = x.contiguous(memory_format=MEMORY_FORMATS[memory_format])
    fc = (torch.zeros(1, 18), torch.zeros(1), torch.zeros(18, 1), torch.zeros(18))
    scale = torch.linspace(0.3, 3, 36)
    with ef.use_backend("cpu"):
        out = ef.psa_tail([x, x], *fc, scale=scale)
    exact = (torch.cat([x, x], 1).float() * (0.5 * scale)[:, None, None]).to(dtype)
    # The hardware's conversion to bfloat16 treats subnormal numbers as zero.
    tiny = torch.finfo(torch.float32).tiny if dtype == torch.bfloat16 else 0.0
    wrong = (out != exact) & (exact.float().abs() > tiny)
    assert not wrong.any(), (x[wrong][:5], out[wrong][:5], exact[wrong][:5])
    assert (out[exact.float().abs() <= tiny].float().abs() <= tiny).all()


SPLIT = {
    "a large sample": Shape(1, 4, 16, 61, 67, 1),
    "fewer samples than threads": Shape(3, 3, 40, 23, 29, 5),
    "many small samples": Shape(37, 2, 24, 5, 3, 2),
    "many branches": Shape(2, 40, 3, 7, 9, 2),
    "wide": Shape(1, 2, 700, 3, 3, 30),
}


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", SPLIT.values(), ids=SPLIT)
def test_the_same_bits_with_any_number_of_threads(
    shape: Shape, memory_format: str, threads: None
) -> None:
    case = make_case(shape, memory_format=MEMORY_FORMATS[memory_format])
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        with ef.use_backend("cpu"):
            results.append(evaluate(ef.psa_tail, *case))
    oracle, plain = expected(case)
    assert_accurate(results[0][: 1 + shape.S], oracle[: 1 + shape.S], plain[: 1 + shape.S])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", SPLIT.values(), ids=SPLIT)
def test_the_same_bits_of_psa_tail_norm_with_any_number_of_threads(
    shape: Shape, memory_format: str, threads: None
) -> None:
    case = make_norm_case(shape, memory_format=MEMORY_FORMATS[memory_format])
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        with ef.use_backend("cpu"):
            results.append(evaluate_norm(ef.psa_tail_norm, case))
    oracle, plain = expected_norm(case)
    assert_accurate(results[0], oracle, plain)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def good() -> tuple[Case, list[torch.Tensor]]:
    case = make_case(Shape(2, 3, 8, 4, 5, 2))
    return case, [t.flatten(1) if t.dim() == 4 else t for t in case.fc]


def bad_forwards() -> dict[str, list[object]]:
    case, fc = good()
    x = case.branches
    tail = [*fc, None, None, False, 0]
    return {
        "no branches": [[], *tail],
        "one branch": [x[:1], *tail],
        "three dimensions": [[t[0] for t in x], *tail],
        "unequal shapes": [[x[0], x[1][:, :4], x[2]], *tail],
        "unequal dtypes": [[x[0], x[1].double(), x[2]], *tail],
        "integers": [[t.int() for t in x], *tail],
        "no pixels": [[t[:, :, :0] for t in x], *tail],
        "fc1_weight too wide": [x, fc[0].repeat(1, 2), *tail[1:]],
        "fc1_weight a vector": [x, fc[0][0], *tail[1:]],
        "fc1_bias too short": [x, fc[0], fc[1][:1], *tail[2:]],
        "fc2_weight transposed": [x, *fc[:2], fc[2].T, *tail[3:]],
        "fc2_bias of integers": [x, *fc[:3], fc[3].int(), *tail[4:]],
        "a meta tensor": [x, *fc[:3], fc[3].to("meta"), *tail[4:]],
        "scale too short": [x, *fc, torch.ones(8), None, False, 0],
        "a sparse branch": [[x[0].to_sparse(), *x[1:]], *tail],
    }


@pytest.mark.parametrize("op", [OPS.psa_tail_native, OPS.psa_tail_inference], ids=str)
@pytest.mark.parametrize("name", bad_forwards())
def test_the_library_itself_refuses_bad_input(name: str, op: object) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, ValueError, TypeError)):
        op(*bad_forwards()[name])


@pytest.mark.parametrize(
    ("position", "value"),
    [
        pytest.param(0, torch.ones(2, 24, 4, 6), id="grad's shape"),
        pytest.param(0, torch.ones(2, 24, 4, 5).double(), id="grad's dtype"),
        pytest.param(1, [], id="no branches"),
        pytest.param(2, torch.ones(2, 3, 9), id="squeeze's shape"),
        pytest.param(3, torch.ones(2, 3, 8).double(), id="attention's dtype"),
        pytest.param(3, torch.ones(2, 8, 3).transpose(1, 2), id="attention's strides"),
    ],
)
def test_the_librarys_backward_refuses_bad_input(position: int, value: object) -> None:
    case, fc = good()
    _, squeeze, attention = OPS.psa_tail_native(case.branches, *fc, None, None, False, 0)
    arguments = [case.grad, case.branches, squeeze, attention, *fc, True, True, 0]
    OPS.psa_tail_native_backward(*arguments)
    arguments[position] = value
    with pytest.raises(RuntimeError):
        OPS.psa_tail_native_backward(*arguments)


def norm_arguments() -> tuple[list[object], list[object]]:
    """Return valid arguments of the library's psa_tail_norm and of its backward."""
    case, fc = good()
    rest = [*fc, torch.ones(24), torch.zeros(24), 1e-5]
    _, *stats = OPS.psa_tail_norm_native(case.branches, *rest)
    return [case.branches, *rest], [case.grad, case.branches, *stats, *rest, True, True, True]


@pytest.mark.parametrize(
    ("position", "value"),
    [
        pytest.param(0, [], id="no branches"),
        pytest.param(0, [torch.ones(2, 8, 0, 5)] * 3, id="no pixels"),
        pytest.param(1, torch.ones(2, 9), id="fc1_weight"),
        pytest.param(4, torch.ones(7), id="fc2_bias"),
        pytest.param(5, torch.ones(8), id="gamma"),
        pytest.param(6, torch.ones(24, device="meta"), id="a meta tensor"),
        pytest.param(6, torch.ones(24, dtype=torch.int), id="beta's dtype"),
    ],
)
def test_the_librarys_psa_tail_norm_refuses_bad_input(position: int, value: object) -> None:
    arguments, _ = norm_arguments()
    arguments[position] = value
    with pytest.raises((RuntimeError, ValueError)):
        OPS.psa_tail_norm_native(*arguments)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        pytest.param(0, torch.ones(2, 24, 4, 6), id="grad's shape"),
        pytest.param(0, torch.ones(2, 24, 4, 5).double(), id="grad's dtype"),
        pytest.param(1, [], id="no branches"),
        pytest.param(2, torch.ones(2, 3, 9), id="squeeze's shape"),
        pytest.param(3, torch.ones(2, 3, 8).double(), id="m2's dtype"),
        pytest.param(4, torch.ones(2, 8, 3).transpose(1, 2), id="attention's strides"),
        pytest.param(5, torch.ones(8), id="mean's shape"),
        pytest.param(6, torch.ones(48)[::2], id="var's strides"),
        pytest.param(11, torch.ones(23), id="gamma's shape"),
    ],
)
def test_the_backward_of_psa_tail_norm_refuses_bad_input(position: int, value: object) -> None:
    _, arguments = norm_arguments()
    OPS.psa_tail_norm_native_backward(*arguments)
    arguments[position] = value
    with pytest.raises(RuntimeError):
        OPS.psa_tail_norm_native_backward(*arguments)
