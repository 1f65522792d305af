"""The launches of psa_tail_norm, in the order in which they happen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from epsanet_fused.backends.triton import config, psa_tail, psa_tail_norm, psa_tail_norm_backward
from epsanet_fused.backends.triton.launch import (
    ACC,
    OPTIONS,
    Problem,
    gate_constants,
    is_flat,
    tile_arguments,
)


class Norm(NamedTuple):
    """gamma and beta (S * C,) or None, the batch's mean and var (S * C,), and eps."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float


def deviations_and_gate(
    p: Problem, squeeze: Tensor, deviation: Tensor, attention: Tensor, fc: Sequence[Tensor]
) -> None:
    """Forward: write squeeze, deviation and attention (B, S, C)."""
    B, S, C, HW = p.sizes
    itemsize, interpreted = p.cat.element_size(), psa_tail.INTERPRETED
    cfg = config.sum_config(B, S, C, HW, itemsize, p.channels_last, True, interpreted)
    sums, squares = squeeze.new_empty((2, B, cfg.splits, S, C))
    scratch = (torch.empty_like(squeeze), sums, squares)
    samples = (squeeze, deviation, attention)
    gate = gate_constants(S, C, R=fc[0].shape[0])
    blocks = {"BLOCK_C": cfg.block_c, "BLOCK_P": cfg.block_p}
    if cfg.fold_gate:
        psa_tail_norm.deviation_gate_kernel[(B,)](
            p.parts, p.part_strides, *scratch, *samples, *fc, tiles=cfg.tiles, num_warps=cfg.warps,
            **blocks, **gate, **tile_arguments(p), **OPTIONS,
        )  # fmt: skip
        return
    psa_tail_norm.deviation_kernel[(B * cfg.splits * cdiv(C, cfg.block_c),)](
        p.parts, p.part_strides, *scratch, splits=cfg.splits, tiles=cfg.tiles, num_warps=cfg.warps,
        **blocks, **tile_arguments(p), **OPTIONS,
    )  # fmt: skip
    psa_tail_norm.norm_gate_kernel[(B,)](
        *scratch, *samples, *fc, C=C, HW=HW, splits=cfg.splits,
        share=cfg.tiles * cfg.block_p, S=S, ACC=ACC[p.acc], **gate, **OPTIONS,
    )  # fmt: skip


def statistics(
    p: Problem, squeeze: Tensor, deviation: Tensor, attention: Tensor, norm: Norm
) -> tuple[Tensor, Tensor]:
    """Forward: write the norm's mean and var; return its weight and shift (B, S, C) of x."""
    weight, shift = squeeze.new_empty((2, *squeeze.shape))
    grid, arguments = _statistics(p, norm)
    psa_tail_norm.statistics_kernel[grid](
        squeeze, deviation, attention, norm.mean, norm.var, norm.gamma, norm.beta, weight, shift,
        **arguments,
    )  # fmt: skip
    return weight, shift


def gradient_sums(
    p: Problem, squeeze: Tensor, attention: Tensor, norm: Norm
) -> tuple[Tensor, Tensor]:
    """Backward: sums of what the relu lets pass, and with x less its mean: (B, splits, S, C)."""
    B, S, C, HW = p.sizes
    itemsize, interpreted = p.cat.element_size(), psa_tail.INTERPRETED
    cfg = config.sum_config(
        B, S, C, HW, itemsize, p.channels_last, True, interpreted, may_fold=False
    )
    sums, products = squeeze.new_empty((2, B, cfg.splits, S, C))
    psa_tail_norm_backward.gradient_sum_kernel[(B * cfg.splits * cdiv(C, cfg.block_c),)](
        p.parts, p.part_strides, p.cat, p.cat_strides, sums, products, squeeze, attention,
        norm.mean, norm.var, norm.gamma, norm.beta, splits=cfg.splits, tiles=cfg.tiles,
        EPS=norm.eps, BLOCK_C=cfg.block_c, BLOCK_P=cfg.block_p, num_warps=cfg.warps,
        **tile_arguments(p), **OPTIONS,
    )  # fmt: skip
    return sums, products


def gradient_statistics(
    p: Problem,
    sums: tuple[Tensor, Tensor],
    squeeze: Tensor,
    deviation: Tensor,
    attention: Tensor,
    norm: Norm,
    grad_norm: Sequence[Tensor | None],
    for_attention: Sequence[Tensor | None],
) -> None:
    """Backward: write the gradients of gamma and beta, and for_attention, all (B, S, C).

    Those are the attention's gradient; weight, shift and factor for ``normalize``; and the constant
    for ``gate_backward``.
    """
    grid, arguments = _statistics(p, norm)
    psa_tail_norm_backward.gradient_statistics_kernel[grid](
        *sums, squeeze, deviation, attention, norm.mean, norm.var, norm.gamma, norm.beta,
        *grad_norm, *for_attention, splits=sums[0].shape[1], **arguments,
    )  # fmt: skip


def gate_backward(
    p: Problem,
    grad_attention: Tensor,
    squeeze: Tensor,
    attention: Tensor,
    fc: Sequence[Tensor],
    constant: Tensor,
    spread: Tensor,
    for_fc: Sequence[Tensor | None],
) -> None:
    """Backward: write spread, and for_fc as ``launch.sum_and_gate`` does."""
    B, S, C, HW = p.sizes
    psa_tail_norm_backward.norm_gate_backward_kernel[(B,)](
        grad_attention, squeeze, attention, *fc, constant, spread, *for_fc,
        C=C, HW=HW, S=S, ACC=ACC[p.acc], **gate_constants(S, C, R=fc[0].shape[0]), **OPTIONS,
    )  # fmt: skip


def normalize(
    p: Problem,
    squeeze: Tensor,
    weight: Tensor,
    shift: Tensor,
    factor: Tensor | None = None,
    spread: Tensor | None = None,
) -> None:
    """Forward: write the cat from the parts. Backward (with gradients): those from both."""
    B, S, C, HW = p.sizes
    cfg = config.normalize_config(C, HW, p.channels_last, psa_tail.INTERPRETED)
    vectors = (squeeze, weight, shift, factor, spread)
    grads, grad_strides = (p.grads, p.grad_strides) if p.grads else (None, None)
    if is_flat(p, cfg.block):
        group = math.gcd(8, HW)
        div = math.gcd(16, C * HW)
        psa_tail_norm.normalize_flat_kernel[(B * cdiv(C * HW, cfg.block),)](
            p.parts, p.cat, grads, *vectors, size=C * HW // div, C=C, groups=HW // group, S=S,
            DIV=div, GROUP=group, BLOCK=cfg.block, ACC=ACC[p.acc], num_warps=cfg.warps, **OPTIONS,
        )  # fmt: skip
        return
    psa_tail_norm.normalize_kernel[(B * cdiv(C, cfg.block_c) * cdiv(HW, cfg.block_p),)](
        p.parts, p.part_strides, p.cat, p.cat_strides, grads, grad_strides, *vectors,
        BLOCK_C=cfg.block_c, BLOCK_P=cfg.block_p, num_warps=cfg.warps,
        **tile_arguments(p), **OPTIONS,
    )  # fmt: skip


def _statistics(p: Problem, norm: Norm) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the sizes of what runs over all samples for some channels of the cat."""
    B, S, C, HW = p.sizes
    block_b, block_k = config.statistics_blocks(B, S * C, psa_tail.INTERPRETED)
    sizes = {"B": B, "C": C, "HW": HW, "S": S, "EPS": norm.eps, "ACC": ACC[p.acc]}
    blocks = {"BLOCK_B": block_b, "BLOCK_K": block_k}
    return (cdiv(S * C, block_k),), sizes | blocks | OPTIONS
