"""From tensors to launches: shapes, strides and what divides them, grids and constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2
from triton import language as tl

from epsanet_fused.backends.triton import config, psa_tail
from epsanet_fused.utils.memory_format import accumulator_dtype, output_format

ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
# Said aloud, since Triton 3.10 changes the default: a product and a sum may round once.
OPTIONS = {"enable_fp_fusion": True}
Strides = tuple[int, int, int]  # batch, channel, pixel


class Problem(NamedTuple):
    """S parts (B, C, H, W), the cat (B, S * C, H, W) that holds them in reverse, and any gradients.

    Strides are divided by ``div`` all but the inner one.
    """

    parts: tuple[Tensor, ...]
    cat: Tensor
    grads: tuple[Tensor, ...]  # of the parts, where they are written beside them
    part_strides: tuple[Strides, ...]
    cat_strides: Strides
    grad_strides: tuple[Strides, ...]
    div: int
    channels_last: bool  # how tiles are cut: as the parts lie, if they all do

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, S, C, HW."""
        B, C, H, W = self.parts[0].shape
        return B, len(self.parts), C, H * W

    @property
    def acc(self) -> torch.dtype:
        return accumulator_dtype(self.cat.dtype)


def problem(parts: Sequence[Tensor], cat: Tensor, grads: Sequence[Tensor] = ()) -> Problem:
    """Collect what the kernels need to know; parts whose H and W are no one run are copied."""
    _, C, H, W = parts[0].shape
    if H * W >= 2**31:
        raise ValueError(f"psa_tail: the triton backend takes H * W < 2**31, got {H} x {W}")
    channels_last = output_format(parts) == torch.channels_last
    *parts, cat = (_pixels_in_a_run(x) for x in (*parts, cat))
    strides = [_strides(x) for x in (*parts, cat, *grads)]
    extent, outer = (C, 2) if channels_last else (H * W, 1)
    div = math.gcd(16, extent, *(n for s in strides for n in (s[0], s[outer])))
    by = (div, 1, div) if channels_last else (div, div, 1)
    strides = [tuple(n // d for n, d in zip(s, by, strict=True)) for s in strides]
    S = len(parts)
    return Problem(
        tuple(parts),
        cat,
        tuple(grads),
        tuple(strides[:S]),
        strides[S],
        tuple(strides[S + 1 :]),
        div,
        channels_last,
    )


def sum_and_gate(
    p: Problem,
    with_cat: bool,
    squeeze: Tensor,
    attention: Tensor,
    fc: Sequence[Tensor],
    spread: Tensor | None = None,
    for_fc: Sequence[Tensor | None] = (None, None, None),
) -> None:
    """Forward: write squeeze and attention. Backward (with_cat): write spread and for_fc.

    for_fc are hidden (B, S, R), grad_pre1 (B, S, R) and grad_pre2 (B, S, C).
    """
    B, S, C, HW = p.sizes
    itemsize, interpreted = p.cat.element_size(), psa_tail.INTERPRETED
    cfg = config.sum_config(B, S, C, HW, itemsize, p.channels_last, with_cat, interpreted)
    sums = squeeze.new_empty((B, cfg.splits, S, C))
    cat, cat_strides = (p.cat, p.cat_strides) if with_cat else (None, None)
    tensors = (p.parts, p.part_strides, cat, cat_strides, sums)
    gate_tensors = (squeeze, attention, *fc, spread, *for_fc)
    gate = gate_constants(S, C, R=fc[0].shape[0])
    blocks = {"BLOCK_C": cfg.block_c, "BLOCK_P": cfg.block_p}
    if cfg.fold_gate:
        psa_tail.sum_gate_kernel[(B,)](
            *tensors, *gate_tensors, tiles=cfg.tiles, num_warps=cfg.warps,
            **blocks, **gate, **tile_arguments(p), **OPTIONS,
        )  # fmt: skip
        return
    psa_tail.sum_kernel[(B * cfg.splits * cdiv(C, cfg.block_c),)](
        *tensors, splits=cfg.splits, tiles=cfg.tiles, num_warps=cfg.warps,
        **blocks, **tile_arguments(p), **OPTIONS,
    )  # fmt: skip
    psa_tail.gate_kernel[(B,)](
        sums, *gate_tensors, C=C, HW=HW, splits=cfg.splits, S=S, ACC=ACC[p.acc], **gate, **OPTIONS
    )


def recalibrate(
    p: Problem,
    attention: Tensor,
    spread: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> None:
    """Forward: write the cat from the parts. Backward (with spread): the parts from the cat."""
    B, S, C, HW = p.sizes
    cfg = config.recalibrate_config(C, HW, p.channels_last, psa_tail.INTERPRETED)
    vectors = (attention, spread, scale, shift)
    if is_flat(p, cfg.block):
        group = 8 if HW % 8 == 0 else 1
        div = math.gcd(16, C * HW)
        psa_tail.recalibrate_flat_kernel[(B * cdiv(C * HW, cfg.block),)](
            p.parts, p.cat, *vectors, size=C * HW // div, C=C, groups=HW // group, S=S, DIV=div,
            GROUP=group, RELU=relu, BLOCK=cfg.block, ACC=ACC[p.acc], num_warps=cfg.warps,
            **OPTIONS,
        )  # fmt: skip
        return
    psa_tail.recalibrate_kernel[(B * cdiv(C, cfg.block_c) * cdiv(HW, cfg.block_p),)](
        p.parts, p.part_strides, p.cat, p.cat_strides, *vectors, RELU=relu,
        BLOCK_C=cfg.block_c, BLOCK_P=cfg.block_p, num_warps=cfg.warps,
        **tile_arguments(p), **OPTIONS,
    )  # fmt: skip


def is_flat(p: Problem, block: int) -> bool:
    """Whether each sample of each tensor is one run, whose elements int32 can count."""
    _, _, C, HW = p.sizes
    dense = all(x.is_contiguous() for x in (*p.parts, p.cat, *p.grads))
    return dense and C * HW + block < 2**31


def fc_grads(squeeze: Tensor, for_fc: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Write the gradients of fc1's weight (R, C) and bias, fc2's weight (C, R) and bias."""
    B, S, C = squeeze.shape
    R = grads[0].shape[0]
    block_c, block_r, block_n = config.fc_grad_blocks(C, R, psa_tail.INTERPRETED)
    psa_tail.fc_grad_kernel[(cdiv(C, block_c) * cdiv(R, block_r),)](
        squeeze, *for_fc, *grads, rows=B * S, C=C, R=R,
        BLOCK_C=block_c, BLOCK_R=block_r, BLOCK_N=block_n, ACC=ACC[squeeze.dtype],
        **OPTIONS,
    )  # fmt: skip


def tile_arguments(p: Problem) -> dict[str, Any]:
    """What every kernel that walks tiles takes; the inner extent comes divided by DIV."""
    _, S, C, HW = p.sizes
    inner = {"C": C // p.div, "HW": HW} if p.channels_last else {"C": C, "HW": HW // p.div}
    return {
        **inner,
        "S": S,
        "DIV": p.div,
        "CHANNELS_LAST": p.channels_last,
        "ACC": ACC[p.acc],
    }


def gate_constants(S: int, C: int, R: int) -> dict[str, int]:
    BLOCK_S, CHANNELS = next_power_of_2(S), next_power_of_2(C)
    block_r = max(1, config.GATE_TILE // (BLOCK_S * CHANNELS))
    return {
        "R": R,
        "BLOCK_S": BLOCK_S,
        "CHANNELS": CHANNELS,
        "BLOCK_R": min(next_power_of_2(R), block_r),
    }


def _pixels_in_a_run(x: Tensor) -> Tensor:
    """x itself if one stride leads from each pixel to the next, over rows too; else a copy."""
    H, W = x.shape[2:]
    if H == 1 or W == 1 or x.stride(2) == W * x.stride(3):
        return x
    return x.contiguous(memory_format=output_format([x]))


def _strides(x: Tensor) -> Strides:
    """Strides over (batch, channel, pixel), 0 where there is but one."""
    B, C, H, W = x.shape
    batch, channel, h, w = x.stride()
    pixel = w if W > 1 else h
    return batch if B > 1 else 0, channel if C > 1 else 0, pixel if H * W > 1 else 0
