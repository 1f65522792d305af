"""The launches of the Triton kernels, interpreted, with the tilings that a GPU would get."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers.cases import MEMORY_FORMATS, Shape, assert_accurate, expected, make_case
from helpers.norm_cases import evaluate_norm, expected_norm, make_norm_case
from torch import Tensor, nn

pytest.importorskip("triton")

import epsanet_fused as ef
from epsanet_fused.backends.triton import config, launch
from epsanet_fused.testing.accuracy import evaluate

SUM_TILES = [name for name in config.SUM if name != "interpreted"]
SHAPES = {
    "many tiles": Shape(2, 4, 20, 30, 33, 2),
    "rows of eight": Shape(1, 3, 9, 24, 25, 3),
    "many channels": Shape(1, 2, 300, 3, 5, 40),
}


@pytest.mark.parametrize("tile", SUM_TILES)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tiling_gives_the_right_numbers(
    monkeypatch: pytest.MonkeyPatch, tile: str, memory_format: str, shape: str
) -> None:
    monkeypatch.setitem(config.SUM, "interpreted", config.SUM[tile])
    for table in (config.RECALIBRATE, config.FC_GRAD):
        monkeypatch.setitem(table, "interpreted", table["compiled"])
    monkeypatch.setattr(config, "FUSED_GATE_BYTES", 1 << 30 if tile == "fused_gate" else 0)
    monkeypatch.setattr(config, "SPLIT_PROGRAMS", 16)  # for two splits, of several tiles each
    case = make_case(SHAPES[shape], memory_format=MEMORY_FORMATS[memory_format])
    with ef.use_backend("triton"):
        assert_accurate(evaluate(ef.psa_tail, *case), *expected(case))


@pytest.mark.parametrize("tile", SUM_TILES)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_every_tiling_gives_the_right_norm(
    monkeypatch: pytest.MonkeyPatch, tile: str, memory_format: str
) -> None:
    """There are several tiles in each of several splits, and several steps over the batch."""
    monkeypatch.setitem(config.SUM, "interpreted", config.SUM[tile])
    monkeypatch.setitem(config.NORMALIZE, "interpreted", config.NORMALIZE[memory_format])
    monkeypatch.setitem(config.FC_GRAD, "interpreted", config.FC_GRAD["compiled"])
    monkeypatch.setitem(config.STATISTICS, "interpreted", (2, 8))
    monkeypatch.setattr(config, "FUSED_GATE_BYTES", 1 << 30 if tile == "fused_gate" else 0)
    monkeypatch.setattr(config, "SPLIT_PROGRAMS", 8)
    case = make_norm_case(Shape(3, 2, 5, 23, 30, 2), memory_format=MEMORY_FORMATS[memory_format])
    with ef.use_backend("triton"):
        assert_accurate(evaluate_norm(ef.psa_tail_norm, case), *expected_norm(case))


def test_splits_cover_every_pixel_once() -> None:
    for channels_last in (False, True):
        for C, HW in ((1, 1), (16, 3136), (16, 3137), (48, 10_000_019), (4096, 49)):
            for B, products in ((1, False), (10_000, True)):
                cfg = config.sum_config(B, 4, C, HW, 4, channels_last, products, False)
                covered = cfg.splits * cfg.tiles * cfg.block_p
                assert covered >= HW
                assert covered - cfg.tiles * cfg.block_p < HW  # no split is empty
                assert not (cfg.fused_gate and cfg.splits > 1)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 16, 160_000), (2, 16, 66_800), (1, 64, 262_144)], ids=str)
def test_a_few_large_images_make_enough_programs(
    shape: tuple[int, int, int], channels_last: bool
) -> None:
    B, C, HW = shape
    cfg = config.sum_config(B, 4, C, HW, 2, channels_last, False, False)
    assert B * cfg.splits * -(-C // cfg.block_c) >= 256


def test_dense_inputs_are_not_copied() -> None:
    """The kernels read the caller's memory, in either memory format and as slices of either."""
    dense = torch.randn(2, 12, 6, 8)
    for x in (dense, dense.contiguous(memory_format=torch.channels_last)):
        for branches in (x.chunk(3, 1), x[:, :, 1:4].chunk(3, 1)):
            concat = torch.empty(2, 12, *branches[0].shape[2:])
            grads = [torch.empty_like(branch) for branch in branches]
            args = launch.tail_args(branches, concat, grads)
            assert [t.data_ptr() for t in args.branches] == [t.data_ptr() for t in branches]
            assert [t.data_ptr() for t in args.grad_branches] == [t.data_ptr() for t in grads]


def test_strides_keep_their_divisor() -> None:
    """With 196 pixels all strides but the inner one are multiples of 4, and are divided by it."""
    branches = [torch.empty(2, 3, 14, 14) for _ in range(2)]
    args = launch.tail_args(branches, torch.empty(2, 6, 14, 14))
    assert args.div == 4
    assert args.branch_strides == ((147, 49, 1), (147, 49, 1))
    assert args.concat_strides == (294, 49, 1)


@pytest.mark.parametrize("far", ["sample", "channel"])
def test_offsets_beyond_32_bits(far: str) -> None:
    """Samples and channels more than 2**31 elements into their tensor are read correctly."""
    step = 2**31 + 64
    strides = (step, 16, 4, 1) if far == "sample" else (16, step, 4, 1)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pages not touched cost nothing
    try:
        memory = torch.empty(step + 64, dtype=torch.float16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    case = make_case(Shape(2, 2, 2, 4, 4, 1), torch.float16)
    leaf = memory.as_strided((2, 2, 4, 4), strides).copy_(case.branches[0]).requires_grad_()

    def tail_norm(branches: Sequence[Tensor], *fc: Tensor) -> Tensor:
        return ef.psa_tail_norm(branches, *fc, nn.BatchNorm2d(4))

    with ef.use_backend("triton"):
        for tail in (ef.psa_tail, tail_norm):
            out = tail([leaf, case.branches[1]], *case.fc)
            (grad,) = torch.autograd.grad(out, leaf, case.grad)
            near = evaluate(tail, *case)
            assert torch.equal(out, near[0])
            assert torch.equal(grad, near[1])


def test_an_image_of_too_many_pixels_is_refused() -> None:
    x = torch.empty(1).expand(1, 2, 2**16, 2**15)
    with pytest.raises(ValueError, match=r"H \* W < 2\*\*31, got 65536 x 32768"):
        launch.tail_args([x, x], torch.empty(1).expand(1, 4, 2**16, 2**15))
