"""psa_tail raises errors that name the argument, and changes none of its inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import Shape, make_case, run_by
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import epsanet_fused as ef

GOOD = Shape(2, 3, 8, 4, 5, 2)


def arguments(**changes: Any) -> dict[str, Any]:
    case = make_case(GOOD)
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    return {"branches": case.branches} | dict(zip(names, case.fc, strict=True)) | changes


SHAPE = (2, 8, 4, 5)


def branches_with(last: Any) -> list[Any]:
    return [*make_case(GOOD).branches[:2], last]


BAD = {
    "branches is a tensor": (
        {"branches": torch.ones(3, 2, 8, 4, 5)},
        TypeError,
        "branches must be a list or tuple",
    ),
    "branches is a generator": (
        {"branches": iter([])},
        TypeError,
        "branches must be a list or tuple",
    ),
    "no branch": ({"branches": []}, ValueError, "branches must hold at least two tensors, got 0"),
    "one branch": ({"branches": [torch.ones(SHAPE)]}, ValueError, "at least two tensors, got 1"),
    "an array": (
        {"branches": branches_with([[1.0]])},
        TypeError,
        r"branches\[2\] must be a tensor, got list",
    ),
    "three dimensions": (
        {"branches": [torch.ones(8, 4, 5)] * 2},
        ValueError,
        r"branches\[0\] must be \(B, C, H, W\)",
    ),
    "unequal shapes": (
        {"branches": branches_with(torch.ones(2, 8, 4, 6))},
        ValueError,
        r"branches must have one shape.*branches\[2\] is \(2, 8, 4, 6\)",
    ),
    "unequal dtypes": (
        {"branches": branches_with(torch.ones(SHAPE).half())},
        TypeError,
        r"branches must have one dtype.*float16",
    ),
    "unequal devices": (
        {"branches": branches_with(torch.ones(SHAPE, device="meta"))},
        ValueError,
        r"one device.*branches\[2\] is on meta",
    ),
    "no pixels": ({"branches": [torch.ones(2, 8, 0, 5)] * 3}, ValueError, "C, H, W >= 1"),
    "no channels": ({"branches": [torch.ones(2, 0, 4, 5)] * 3}, ValueError, "C, H, W >= 1"),
    "integers": (
        {"branches": [torch.ones(SHAPE, dtype=torch.int64)] * 3},
        TypeError,
        r"branches\[0\] must be float16, .* got torch.int64",
    ),
    "complex numbers": (
        {"branches": [torch.ones(SHAPE, dtype=torch.complex64)] * 3},
        TypeError,
        r"branches\[0\] must be",
    ),
    "eight bits": (
        {"branches": [torch.ones(SHAPE).to(torch.float8_e4m3fn)] * 3},
        TypeError,
        r"branches\[0\] must be",
    ),
    "a sparse tensor": (
        {"fc2_bias": torch.ones(8).to_sparse()},
        TypeError,
        "fc2_bias must be a dense tensor",
    ),
    "no fc1_weight": ({"fc1_weight": None}, TypeError, "fc1_weight must be a tensor, got NoneType"),
    "fc1_weight of other channels": (
        {"fc1_weight": torch.ones(2, 7)},
        ValueError,
        r"fc1_weight must be \(2, 8, 1, 1\) or \(2, 8\), got \(2, 7\)",
    ),
    "fc1_weight as a vector": ({"fc1_weight": torch.ones(8)}, ValueError, "fc1_weight must be"),
    "fc1_weight without a row": (
        {"fc1_weight": torch.ones(0, 8)},
        ValueError,
        "fc1_weight must be .* R >= 1",
    ),
    "fc1_weight with a kernel": (
        {"fc1_weight": torch.ones(2, 8, 3, 3)},
        ValueError,
        "fc1_weight must be",
    ),
    "fc1_bias too long": (
        {"fc1_bias": torch.ones(8)},
        ValueError,
        r"fc1_bias must be \(2,\), got \(8,\)",
    ),
    "fc1_bias missing": ({"fc1_bias": None}, TypeError, "fc1_bias must be a tensor"),
    "fc2_weight transposed": (
        {"fc2_weight": torch.ones(2, 8)},
        ValueError,
        r"fc2_weight must be \(8, 2, 1, 1\) or \(8, 2\)",
    ),
    "fc2_bias too short": ({"fc2_bias": torch.ones(2)}, ValueError, "fc2_bias must be"),
    "fc2_bias of integers": (
        {"fc2_bias": torch.ones(8, dtype=torch.int32)},
        TypeError,
        "fc2_bias must be float16",
    ),
    "fc2_bias elsewhere": (
        {"fc2_bias": torch.ones(8, device="meta")},
        ValueError,
        "fc2_bias is on meta",
    ),
    "scale for one branch": (
        {"scale": torch.ones(8)},
        ValueError,
        r"scale must be \(24,\), got \(8,\)",
    ),
    "scale as a number": ({"scale": 2.0}, TypeError, "scale must be a tensor, got float"),
    "shift as a map": ({"shift": torch.ones(1, 24, 1, 1)}, ValueError, "shift must be"),
    "relu as a string": ({"relu": "yes"}, TypeError, "relu must be a bool, got str"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("backend", ["reference", "fallback", "cpu"])
def test_bad_argument_is_named(
    backend: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = arguments(**change)
    tensors = [t for v in given.values() for t in (v if isinstance(v, list) else [v])]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
    before = [t.clone() for t in tensors]
    with run_by(backend), pytest.raises(error, match=message) as raised:
        ef.psa_tail(**given)
    assert str(raised.value).startswith("psa_tail: ")
    for t, b in zip(tensors, before, strict=True):
        assert torch.equal(t.to_dense(), b.to_dense()) or t.dtype == torch.float8_e4m3fn


FAKEABLE = [name for name in BAD if name != "a sparse tensor"]


@pytest.mark.parametrize("name", FAKEABLE)
def test_bad_argument_is_named_without_data(name: str) -> None:
    """Under FakeTensorMode, where the library's own operators run by their fake kernels."""
    change, error, message = BAD[name]
    with FakeTensorMode() as mode:
        given = tree_map_only(torch.Tensor, mode.from_tensor, arguments(**change))
        with pytest.raises(error, match=message) as raised:
            ef.psa_tail(**given)
    assert str(raised.value).startswith("psa_tail: ")


@pytest.mark.parametrize(
    "epilogue", [{"relu": True}, {"scale": torch.ones(24)}, {"shift": torch.ones(24)}]
)
@pytest.mark.parametrize("needs_gradient", ["branches", "fc1_weight", "epilogue"])
@pytest.mark.parametrize("backend", ["reference", "fallback", "cpu"])
def test_epilogue_refuses_gradients(
    backend: str, needs_gradient: str, epilogue: dict[str, Any]
) -> None:
    given = arguments(**{k: v.clone() if v is not True else v for k, v in epilogue.items()})
    name = next(iter(epilogue)) if needs_gradient == "epilogue" else needs_gradient
    target = given["fc2_bias" if name == "relu" else name]  # relu is no tensor
    (target[1] if isinstance(target, list) else target).requires_grad_()
    with run_by(backend):
        with pytest.raises(ValueError, match="scale, shift and relu are for inference"):
            ef.psa_tail(**given)
        with torch.no_grad():
            ef.psa_tail(**given)
