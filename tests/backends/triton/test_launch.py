"""The cuts that a card would get, run interpreted: many tiles, splits, both ways to the gate."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers.cases import LAYOUTS, Shape, assert_accurate, expected, make_case
from helpers.norm_cases import evaluate_norm, expected_norm, make_norm_case
from torch import Tensor, nn

pytest.importorskip("triton")

import epsanet_fused as ef
from epsanet_fused.backends.triton import config, launch
from epsanet_fused.testing.accuracy import evaluate

SHAPES = {
    "many tiles": Shape(2, 4, 20, 30, 33, 2),
    "rows of eight": Shape(1, 3, 9, 24, 25, 3),
    "many channels": Shape(1, 2, 300, 3, 5, 40),
}


@pytest.mark.parametrize("cut", [name for name in config.SUM if name != "interpreted"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_cut_gives_the_right_numbers(
    monkeypatch: pytest.MonkeyPatch, cut: str, layout: str, shape: str
) -> None:
    monkeypatch.setitem(config.SUM, "interpreted", config.SUM[cut])
    for table in (config.RECALIBRATE, config.FC_GRAD):
        monkeypatch.setitem(table, "interpreted", table["compiled"])
    monkeypatch.setattr(config, "FOLD_BYTES", 1 << 30 if cut == "fold" else 0)
    monkeypatch.setattr(config, "PROGRAMS", 16)  # for two splits, of several tiles each
    case = make_case(SHAPES[shape], layout=LAYOUTS[layout])
    with ef.use_backend("triton"):
        assert_accurate(evaluate(ef.psa_tail, *case), *expected(case))


@pytest.mark.parametrize("cut", [name for name in config.SUM if name != "interpreted"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_cut_gives_the_right_norm(
    monkeypatch: pytest.MonkeyPatch, cut: str, layout: str
) -> None:
    """Several tiles in each of several splits, and several steps over the batch."""
    monkeypatch.setitem(config.SUM, "interpreted", config.SUM[cut])
    monkeypatch.setitem(config.NORMALIZE, "interpreted", config.NORMALIZE[layout])
    monkeypatch.setitem(config.FC_GRAD, "interpreted", config.FC_GRAD["compiled"])
    monkeypatch.setitem(config.STATISTICS, "interpreted", (2, 8))
    monkeypatch.setattr(config, "FOLD_BYTES", 1 << 30 if cut == "fold" else 0)
    monkeypatch.setattr(config, "PROGRAMS", 8)
    case = make_norm_case(Shape(3, 2, 5, 23, 30, 2), layout=LAYOUTS[layout])
    with ef.use_backend("triton"):
        assert_accurate(evaluate_norm(ef.psa_tail_norm, case), *expected_norm(case))


def test_splits_cover_every_pixel_once() -> None:
    for channels_last in (False, True):
        for C, HW in ((1, 1), (16, 3136), (16, 3137), (48, 10_000_019), (4096, 49)):
            for B, products in ((1, False), (10_000, True)):
                cut = config.sum_config(B, 4, C, HW, 4, channels_last, products, False)
                covered = cut.splits * cut.tiles * cut.block_p
                assert covered >= HW
                assert covered - cut.tiles * cut.block_p < HW  # no split is empty
                assert not (cut.fold_gate and cut.splits > 1)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 16, 160_000), (2, 16, 66_800), (1, 64, 262_144)], ids=str)
def test_a_few_large_images_keep_a_card_busy(
    shape: tuple[int, int, int], channels_last: bool
) -> None:
    B, C, HW = shape
    cut = config.sum_config(B, 4, C, HW, 2, channels_last, False, False)
    assert B * cut.splits * -(-C // cut.block_c) >= 256


def test_dense_inputs_are_not_copied() -> None:
    """What the kernels read is the caller's memory, in either format and as slices of either."""
    x = torch.randn(2, 12, 6, 8)
    for whole in (x, x.contiguous(memory_format=torch.channels_last)):
        for parts in (list(whole.chunk(3, 1)), list(whole[:, :, 1:4].chunk(3, 1))):
            cat = torch.empty(2, 12, *parts[0].shape[2:])
            grads = [torch.empty_like(x) for x in parts]
            problem = launch.problem(parts, cat, grads)
            assert [p.data_ptr() for p in problem.parts] == [p.data_ptr() for p in parts]
            assert [g.data_ptr() for g in problem.grads] == [g.data_ptr() for g in grads]


def test_strides_keep_their_divisor() -> None:
    """196 pixels a row: everything but the inner stride divides by 4, and comes divided."""
    parts = [torch.empty(2, 3, 14, 14) for _ in range(2)]
    problem = launch.problem(parts, torch.empty(2, 6, 14, 14))
    assert problem.div == 4
    assert problem.part_strides == ((147, 49, 1), (147, 49, 1))
    assert problem.cat_strides == (294, 49, 1)


@pytest.mark.parametrize("far", ["sample", "channel"])
def test_offsets_beyond_32_bits(far: str) -> None:
    """What starts further than 2**31 elements into its tensor is read from there."""
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
        launch.problem([x, x], torch.empty(1).expand(1, 4, 2**16, 2**15))
