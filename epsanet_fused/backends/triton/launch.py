"""The launches of psa_tail: from tensors to the kernels' arguments, constants and grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2
from triton import language as tl

from epsanet_fused.backends.interface import SEWeights
from epsanet_fused.backends.triton import common, config, gate, psa_tail
from epsanet_fused.backends.triton.common import (
    FCGradInputs,
    FCTensors,
    GateTensors,
    Strides,
    TailTensors,
)
from epsanet_fused.utils.memory_format import accumulator_dtype, output_memory_format

ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
# A product and a sum may be rounded once. This is explicit because Triton 3.10 changes the default.
OPTIONS = {"enable_fp_fusion": True}


class TailArgs(NamedTuple):
    """The large tensors of a call, with their strides as the kernels take them.

    Strides are divided by ``div``, all but the inner one.
    """

    branches: tuple[Tensor, ...]  # S x (B, C, H, W)
    branch_strides: tuple[Strides, ...]
    concat: Tensor  # (B, S * C, H, W)
    concat_strides: Strides
    grad_branches: tuple[Tensor, ...]  # where a kernel reads branches and writes their gradients
    grad_strides: tuple[Strides, ...]
    div: int
    channels_last: bool  # the inner extent of the tiles: channels if all branches are so

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, S, C, HW."""
        B, C, H, W = self.branches[0].shape
        return B, len(self.branches), C, H * W

    @property
    def acc(self) -> torch.dtype:
        """The accumulator's dtype."""
        return accumulator_dtype(self.concat.dtype)

    @property
    def tensors(self) -> TailTensors:
        """The branches and the concat, for a kernel."""
        return TailTensors(*self[:4])


def tail_args(
    branches: Sequence[Tensor], concat: Tensor, grad_branches: Sequence[Tensor] = ()
) -> TailArgs:
    """Collect the strides of the tensors and what divides them.

    Tensors to read whose H and W can't be one dimension are copied.
    """
    _, C, H, W = branches[0].shape
    if H * W >= 2**31:
        raise ValueError(f"psa_tail: the triton backend takes H * W < 2**31, got {H} x {W}")
    channels_last = output_memory_format(branches) == torch.channels_last
    *branches, concat = (_merge_pixels(x) for x in (*branches, concat))
    strides = [_strides(x) for x in (*branches, concat, *grad_branches)]
    extent, outer = (C, 2) if channels_last else (H * W, 1)
    div = math.gcd(16, extent, *(n for s in strides for n in (s[0], s[outer])))
    by_c, by_p = (1, div) if channels_last else (div, 1)  # the inner stride isn't divided
    strides = [(b // div, c // by_c, p // by_p) for b, c, p in strides]
    S = len(branches)
    return TailArgs(
        branches=tuple(branches),
        branch_strides=tuple(strides[:S]),
        concat=concat,
        concat_strides=strides[S],
        grad_branches=tuple(grad_branches),
        grad_strides=tuple(strides[S + 1 :]),
        div=div,
        channels_last=channels_last,
    )


def sum_and_gate(args: TailArgs, squeeze: Tensor, attention: Tensor, fc: SEWeights) -> None:
    """Forward: write squeeze and attention (B, S, C)."""
    tail = TailTensors(args.branches, args.branch_strides)
    _sum_and_gate(args, tail, GateTensors(squeeze, attention, fc_tensors(fc)))


def empty_se_grads(
    squeeze: Tensor, attention: Tensor, fc: SEWeights, fc_grads: bool
) -> GateTensors:
    """Return the gate's tensors, with uninitialized ones for the results of its backward."""
    fc_grad_inputs = None
    if fc_grads:
        hidden = squeeze.new_empty((*squeeze.shape[:2], fc.hidden))  # (B, S, R)
        fc_grad_inputs = FCGradInputs(hidden, torch.empty_like(hidden), torch.empty_like(squeeze))
    grad_mean = torch.empty_like(squeeze)
    return GateTensors(squeeze, attention, fc_tensors(fc), grad_mean, fc_grad_inputs)


def fc_tensors(fc: SEWeights) -> FCTensors:
    """Return the weights as the kernels take them."""
    return FCTensors(*fc, len(fc.fc1_weight) if fc.per_branch else None)


def sum_and_gate_backward(args: TailArgs, se: GateTensors) -> None:
    """Backward: write se.grad_mean and, unless None, se.fc_grad_inputs."""
    _sum_and_gate(args, args.tensors, se)


def _sum_and_gate(args: TailArgs, tail: TailTensors, se: GateTensors) -> None:
    B, S, C, HW = args.sizes
    itemsize, products = args.concat.element_size(), tail.concat is not None
    cfg = config.sum_config(B, S, C, HW, itemsize, args.channels_last, products, common.INTERPRETED)
    sums = se.squeeze.new_empty((B, cfg.splits, S, C))
    sum_constants = sum_arguments(args, cfg)
    gate_constants = gate_arguments(S, C, R=se.fc.fc1_weight.shape[-2])
    if cfg.fused_gate:
        psa_tail.sum_gate_kernel[(B,)](tail, sums, se, **sum_constants, **gate_constants)
        return
    psa_tail.sum_kernel[(B * cfg.splits * cdiv(C, cfg.block_c),)](
        tail, sums, splits=cfg.splits, **sum_constants
    )
    psa_tail.gate_kernel[(B,)](
        sums, se, C=C, HW=HW, splits=cfg.splits, S=S, ACC=ACC[args.acc], **gate_constants, **OPTIONS
    )


def recalibrate(
    args: TailArgs,
    attention: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> None:
    """Forward: write the concat from the branches."""
    _recalibrate(args, (attention, None, scale, shift), relu)


def recalibrate_backward(args: TailArgs, se: GateTensors) -> None:
    """Backward: write the branches, which are gradients, from the concat and se.grad_mean."""
    _recalibrate(args, (se.attention, se.grad_mean, None, None), False)


def _recalibrate(args: TailArgs, vectors: tuple[Tensor | None, ...], relu: bool) -> None:
    B, _, C, HW = args.sizes
    cfg = config.recalibrate_config(C, HW, args.channels_last, common.INTERPRETED)
    if is_flat(args, cfg.block):
        group = 8 if HW % 8 == 0 else 1
        psa_tail.recalibrate_flat_kernel[(B * cdiv(C * HW, cfg.block),)](
            args.branches,
            args.concat,
            *vectors,
            RELU=relu,
            **flat_arguments(args, group, cfg),
        )
        return
    psa_tail.recalibrate_kernel[(B * cdiv(C, cfg.block_c) * cdiv(HW, cfg.block_p),)](
        args.tensors, *vectors, RELU=relu, **tile_arguments(args, cfg)
    )


def is_flat(args: TailArgs, block: int) -> bool:
    """Return whether each sample of each tensor is one run, whose elements int32 can count."""
    _, _, C, HW = args.sizes
    dense = all(x.is_contiguous() for x in (*args.branches, args.concat, *args.grad_branches))
    return dense and C * HW + block < 2**31


def fc_grads(se: GateTensors, grad_fc: SEWeights) -> None:
    """Backward: write grad_fc, the gradients of the four fc tensors, from se.fc_grad_inputs."""
    B, S, C = se.squeeze.shape
    R, modules = grad_fc.hidden, S if grad_fc.per_branch else 1
    block_c, block_r, block_n = config.fc_grad_blocks(C, R, common.INTERPRETED)
    gate.fc_grad_kernel[(cdiv(C, block_c) * cdiv(R, block_r) * modules,)](
        se.squeeze,
        se.fc_grad_inputs,
        grad_fc,
        rows=B * S,
        modules=modules,
        C=C,
        R=R,
        BLOCK_C=block_c,
        BLOCK_R=block_r,
        BLOCK_N=block_n,
        ACC=ACC[se.squeeze.dtype],
        **OPTIONS,
    )


def sum_arguments(args: TailArgs, cfg: config.SumConfig) -> dict[str, Any]:
    """Return the sizes and constants of a kernel that sums over pixels."""
    return tile_arguments(args, cfg) | {"tiles": cfg.tiles}


def tile_arguments(
    args: TailArgs, cfg: config.SumConfig | config.RecalibrateConfig
) -> dict[str, Any]:
    """Return the sizes and constants of a kernel that works on tiles."""
    _, S, C, HW = args.sizes
    by_c, by_p = (args.div, 1) if args.channels_last else (1, args.div)  # the inner is divided
    return {
        "C": C // by_c,
        "HW": HW // by_p,
        "S": S,
        "DIV": args.div,
        "CHANNELS_LAST": args.channels_last,
        "BLOCK_C": cfg.block_c,
        "BLOCK_P": cfg.block_p,
        "ACC": ACC[args.acc],
        "num_warps": cfg.warps,
        **OPTIONS,
    }


def flat_arguments(args: TailArgs, group: int, cfg: config.RecalibrateConfig) -> dict[str, Any]:
    """Return the sizes and constants of a kernel that works on runs of memory."""
    _, S, C, HW = args.sizes
    div = math.gcd(16, C * HW)
    return {
        "size": C * HW // div,
        "C": C,
        "groups": HW // group,
        "S": S,
        "DIV": div,
        "GROUP": group,
        "BLOCK": cfg.block,
        "ACC": ACC[args.acc],
        "num_warps": cfg.warps,
        **OPTIONS,
    }


def gate_arguments(S: int, C: int, R: int) -> dict[str, int]:
    """Return R and the constants of a kernel that runs the gate or its backward."""
    block_s, channels = next_power_of_2(S), next_power_of_2(C)
    block_r = max(1, config.GATE_TILE // (block_s * channels))
    return {
        "R": R,
        "BLOCK_S": block_s,
        "CHANNELS": channels,
        "BLOCK_R": min(next_power_of_2(R), block_r),
    }


def _merge_pixels(x: Tensor) -> Tensor:
    """Return x if its H and W can be one dimension, else a copy."""
    H, W = x.shape[2:]
    if H == 1 or W == 1 or x.stride(2) == W * x.stride(3):
        return x
    return x.contiguous(memory_format=output_memory_format([x]))


def _strides(x: Tensor) -> Strides:
    """Return the strides (batch, channel, pixel), 0 for a dimension of size one."""
    B, C, H, W = x.shape
    batch, channel, h, w = x.stride()
    pixel = w if W > 1 else h
    return batch if B > 1 else 0, channel if C > 1 else 0, pixel if H * W > 1 else 0
