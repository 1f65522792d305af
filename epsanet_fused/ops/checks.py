"""Check the operators' arguments: errors name the argument, what came and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from epsanet_fused.backends.interface import DTYPES, SEWeights

_DTYPE_NAMES = "float16, bfloat16, float32 or float64"


def check_psa_tail(
    branches: Sequence[Tensor],
    fc: SEWeights,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> None:
    """Raise TypeError or ValueError unless psa_tail accepts these arguments."""
    _check_branches(branches)
    _check_fc(fc, len(branches), branches[0].shape[1], branches[0].device)
    _check_vectors(branches, scale=scale, shift=shift)
    if not isinstance(relu, bool):
        raise TypeError(f"psa_tail: relu must be a bool, got {type(relu).__name__}")
    if scale is not None or shift is not None or relu:
        _refuse_gradients([*branches, *fc, scale, shift])


def _check_fc(fc: SEWeights, S: int, C: int, device: torch.device) -> None:
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = fc
    # fc1_weight decides the number of hidden units R, and whether each branch has weights of its
    # own; the other three must agree with it.
    _check_tensor("fc1_weight", fc1_weight, device)
    if fc1_weight.dim() not in (2, 3, 4) or fc.hidden < 1:
        raise ValueError(
            f"psa_tail: fc1_weight must be (R, C, 1, 1) or (R, C), or (S, R, C) for weights of "
            f"each branch, with R >= 1, C = {C} and S = {S}, got {tuple(fc1_weight.shape)}"
        )
    R = fc.hidden
    first = (S,) if fc.per_branch else ()
    _check_shape("fc1_weight", fc1_weight, *_matrix_shapes(first, R, C))
    for name, tensor, shapes in (
        ("fc1_bias", fc1_bias, [(*first, R)]),
        ("fc2_weight", fc2_weight, _matrix_shapes(first, C, R)),
        ("fc2_bias", fc2_bias, [(*first, C)]),
    ):
        _check_tensor(name, tensor, device)
        _check_shape(name, tensor, *shapes)


def _matrix_shapes(first: tuple[int, ...], rows: int, columns: int) -> list[tuple[int, ...]]:
    """Return the shapes that a weight may have; that of a 1 x 1 convolution if it is shared."""
    if first:
        return [(*first, rows, columns)]
    return [(rows, columns, 1, 1), (rows, columns)]


def check_order(operator: str, order: str) -> None:
    """Raise a ValueError unless ``order`` is one of the orders of the branches in the output."""
    if order not in ("reversed", "natural"):
        raise ValueError(f"{operator}: order must be 'reversed' or 'natural', got {order!r}")


def _check_vectors(branches: Sequence[Tensor], **vectors: Tensor | None) -> None:
    """Check that each vector has a number for each of the output's channels."""
    for name, vector in vectors.items():
        if vector is not None:
            _check_tensor(name, vector, branches[0].device)
            _check_shape(name, vector, (len(branches) * branches[0].shape[1],))


def check_psa_tail_norm(branches: Sequence[Tensor], fc: SEWeights, norm: nn.BatchNorm2d) -> None:
    """Raise TypeError or ValueError unless psa_tail_norm accepts these arguments."""
    check_psa_tail(branches, fc, None, None, False)
    if not isinstance(norm, nn.BatchNorm2d):
        raise TypeError(
            f"psa_tail_norm: norm must be a torch.nn.BatchNorm2d, got {type(norm).__name__}"
        )
    if not norm.training and norm.running_mean is not None:
        raise ValueError(
            "psa_tail_norm: norm must use the batch's statistics, but it is in eval mode and has "
            "running ones; then it is a scale and a shift, which psa_tail takes"
        )
    first = branches[0]
    B, C, H, W = first.shape
    channels = len(branches) * C
    if norm.num_features != channels:
        raise ValueError(
            f"psa_tail_norm: norm must have num_features={channels}, one for each channel of "
            f"{len(branches)} branches with {C}, got {norm.num_features}"
        )
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (tensor := getattr(norm, name)) is not None:
            _check_tensor(f"norm.{name}", tensor, first.device)
    if B * H * W == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, "
            f"got input size {torch.Size((B, channels, H, W))}"
        )


def _check_branches(branches: Sequence[Tensor]) -> None:
    if not isinstance(branches, (list, tuple)):
        raise TypeError(
            f"psa_tail: branches must be a list or tuple of tensors, got {type(branches).__name__}"
        )
    if len(branches) < 2:
        raise ValueError(f"psa_tail: branches must hold at least two tensors, got {len(branches)}")
    device = getattr(branches[0], "device", None)
    for i, x in enumerate(branches):
        _check_tensor(f"branches[{i}]", x, device)
    shape, dtype = branches[0].shape, branches[0].dtype
    for i, x in enumerate(branches):
        if x.dim() != 4:
            raise ValueError(
                f"psa_tail: branches[{i}] must be (B, C, H, W), got {x.dim()} dimensions: "
                f"{tuple(x.shape)}"
            )
        if x.shape != shape:
            raise ValueError(
                f"psa_tail: branches must have one shape, but branches[0] is "
                f"{tuple(shape)} and branches[{i}] is {tuple(x.shape)}"
            )
        if x.dtype != dtype:
            raise TypeError(
                f"psa_tail: branches must have one dtype, but branches[0] is {dtype} "
                f"and branches[{i}] is {x.dtype}"
            )
    if min(shape[1:]) < 1:
        raise ValueError(
            f"psa_tail: branches must be (B, C, H, W) with C, H, W >= 1, got {tuple(shape)}"
        )


def _check_tensor(name: str, value: Tensor, device: torch.device | None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"psa_tail: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"psa_tail: {name} must be {_DTYPE_NAMES}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"psa_tail: {name} must be a dense tensor, got layout {value.layout}")
    if value.device != device:
        raise ValueError(
            f"psa_tail: all tensors must be on one device, but branches[0] is on {device} "
            f"and {name} is on {value.device}"
        )


def _check_shape(name: str, tensor: Tensor, *accepted: tuple[int, ...]) -> None:
    # Not `shape in accepted`: torch.compile can't trace that with dynamic sizes.
    if not any(tensor.shape == shape for shape in accepted):
        shapes = " or ".join(str(shape) for shape in accepted)
        raise ValueError(f"psa_tail: {name} must be {shapes}, got {tuple(tensor.shape)}")


def _refuse_gradients(tensors: Sequence[Tensor | None]) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            "psa_tail: scale, shift and relu are for inference and have no gradient, but an "
            "argument requires one; call it under torch.no_grad(), or apply them outside psa_tail"
        )
