"""The launches of psa_tail_norm, in the order in which they happen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from epsanet_fused.backends.interface import NormParams, NormStats, SEWeights
from epsanet_fused.backends.triton import (
    common,
    config,
    normalize,
    psa_tail_norm,
    psa_tail_norm_backward,
)
from epsanet_fused.backends.triton.common import (
    GateTensors,
    NormGradTerms,
    NormTerms,
    SplitStats,
    TailTensors,
)
from epsanet_fused.backends.triton.launch import (
    ACC,
    OPTIONS,
    TailArgs,
    fc_tensors,
    flat_arguments,
    gate_arguments,
    is_flat,
    sum_arguments,
    tile_arguments,
)


def m2_and_gate(args: TailArgs, stats: NormStats, fc: SEWeights) -> None:
    """Forward: write squeeze, m2 and attention of ``stats``."""
    B, S, C, HW = args.sizes
    cfg = _sum_config(args)
    sums, m2 = stats.squeeze.new_empty((2, B, cfg.splits, S, C))
    split_stats = SplitStats(torch.empty_like(stats.squeeze), sums, m2)
    tail = TailTensors(args.branches, args.branch_strides)
    sum_constants = sum_arguments(args, cfg)
    weights, gate_constants = fc_tensors(fc), gate_arguments(S, C, R=fc.hidden)
    if cfg.fused_gate:
        psa_tail_norm.m2_gate_kernel[(B,)](
            tail, split_stats, stats, weights, **sum_constants, **gate_constants
        )
        return
    psa_tail_norm.m2_kernel[(B * cfg.splits * cdiv(C, cfg.block_c),)](
        tail, split_stats, splits=cfg.splits, **sum_constants
    )
    psa_tail_norm.norm_gate_kernel[(B,)](
        split_stats,
        stats,
        weights,
        C=C,
        HW=HW,
        splits=cfg.splits,
        split_pixels=cfg.tiles * cfg.block_p,
        S=S,
        ACC=ACC[args.acc],
        **gate_constants,
        **OPTIONS,
    )


def statistics(args: TailArgs, stats: NormStats, norm: NormParams) -> NormTerms:
    """Forward: write mean and var of ``stats``; return the terms of the output."""
    weight, shift = stats.squeeze.new_empty((2, *stats.squeeze.shape))
    grid, constants = _statistics_arguments(args, norm.eps)
    psa_tail_norm.statistics_kernel[grid](stats, norm.gamma, norm.beta, weight, shift, **constants)
    return NormTerms(stats.squeeze, weight, shift)


def gradient_sums(args: TailArgs, stats: NormStats, norm: NormParams) -> tuple[Tensor, Tensor]:
    """Backward: return the sums and products of gradient_sum_kernel, both (B, splits, S, C)."""
    B, S, C, _ = args.sizes
    cfg = _sum_config(args, may_fuse_gate=False)
    sums, products = stats.squeeze.new_empty((2, B, cfg.splits, S, C))
    psa_tail_norm_backward.gradient_sum_kernel[(B * cfg.splits * cdiv(C, cfg.block_c),)](
        args.tensors,
        sums,
        products,
        stats,
        norm.gamma,
        norm.beta,
        splits=cfg.splits,
        EPS=norm.eps,
        **sum_arguments(args, cfg),
    )
    return sums, products


def gradient_statistics(
    args: TailArgs,
    sums: tuple[Tensor, Tensor],
    stats: NormStats,
    norm: NormParams,
    grad_norm: tuple[Tensor | None, Tensor | None],
    terms: NormGradTerms | None,
) -> None:
    """Backward: write the gradients of gamma and beta, and ``terms``, unless None."""
    grid, constants = _statistics_arguments(args, norm.eps)
    psa_tail_norm_backward.gradient_statistics_kernel[grid](
        *sums,
        stats,
        norm.gamma,
        norm.beta,
        *grad_norm,
        terms,
        splits=sums[0].shape[1],
        **constants,
    )


def gate_backward(args: TailArgs, terms: NormGradTerms, se: GateTensors) -> NormTerms:
    """Backward: write the gate's gradients into ``se``; return the terms of the branches'."""
    B, S, C, HW = args.sizes
    psa_tail_norm_backward.norm_gate_backward_kernel[(B,)](
        terms.grad_attention,
        se.squeeze,
        se.attention,
        se.fc,
        terms.batch_grad_mean,
        se.grad_mean,
        se.fc_grad_inputs,
        C=C,
        HW=HW,
        S=S,
        ACC=ACC[args.acc],
        **gate_arguments(S, C, R=se.fc.fc1_weight.shape[-2]),
        **OPTIONS,
    )
    return NormTerms(se.squeeze, terms.weight, terms.shift, terms.factor, se.grad_mean)


def normalize_branches(args: TailArgs, terms: NormTerms) -> None:
    """Forward: write the concat from the branches. Backward: their gradients, from both."""
    B, _, C, HW = args.sizes
    cfg = config.normalize_config(C, HW, args.channels_last, common.INTERPRETED)
    grads, grad_strides = args.grad_branches or None, args.grad_strides or None
    if is_flat(args, cfg.block):
        normalize.normalize_flat_kernel[(B * cdiv(C * HW, cfg.block),)](
            args.branches,
            args.concat,
            grads,
            terms,
            **flat_arguments(args, math.gcd(8, HW), cfg),
        )
        return
    normalize.normalize_kernel[(B * cdiv(C, cfg.block_c) * cdiv(HW, cfg.block_p),)](
        args.tensors, grads, grad_strides, terms, **tile_arguments(args, cfg)
    )


def _sum_config(args: TailArgs, may_fuse_gate: bool = True) -> config.SumConfig:
    return config.sum_config(
        *args.sizes,
        args.concat.element_size(),
        args.channels_last,
        products=True,
        interpreted=common.INTERPRETED,
        may_fuse_gate=may_fuse_gate,
    )


def _statistics_arguments(args: TailArgs, eps: float) -> tuple[tuple[int], dict[str, Any]]:
    """Return the grid and the constants of a kernel that goes through the batch."""
    B, S, C, HW = args.sizes
    block_b, block_k = config.statistics_blocks(B, S * C, common.INTERPRETED)
    sizes = {"B": B, "C": C, "HW": HW, "S": S, "EPS": eps, "ACC": ACC[args.acc]}
    blocks = {"BLOCK_B": block_b, "BLOCK_K": block_k}
    return (cdiv(S * C, block_k),), sizes | blocks | OPTIONS
