"""How the kernels are cut into programs: a static table, no autotuning.

The rows were chosen by counting (loads in flight, programs per multiprocessor, registers and width
of access in the machine code); none has been measured on a card yet.
"""

from __future__ import annotations

from typing import NamedTuple

from triton import cdiv, next_power_of_2

# The largest tile (S, R, C) of the gate, and (rows, R, C) of the fc gradients.
GATE_TILE = 2048
# Elements of one part, B * C * HW, from which large tiles still make enough programs for a card.
LARGE = 1 << 21
# Up to this size of a sample's parts one program sums them all, and the gate needs no launch.
FOLD_BYTES = 128 * 1024


class SumRow(NamedTuple):
    """Sizes of a tile, in elements of one part; a program has a tile of each of the S parts."""

    tile: int
    product_tile: int  # of each of the two tensors whose products are summed
    pixels: int  # the tile's width for NCHW; for channels_last the channels come first
    warps: int


class RecalibrateRow(NamedTuple):
    """Likewise."""

    tile: int
    pixels: int
    warps: int


# What sums the pixels: a large tile keeps several 16-byte loads per thread in flight, a small one
# spreads what little there is over the card.
SUM = {
    "small": SumRow(tile=1024, product_tile=1024, pixels=256, warps=4),
    "large": SumRow(tile=4096, product_tile=2048, pixels=512, warps=4),
    "fold": SumRow(tile=8192, product_tile=4096, pixels=512, warps=16),
    # Every interpreted program costs the same, whatever its size.
    "interpreted": SumRow(tile=65536, product_tile=65536, pixels=4096, warps=4),
}
# From this many programs on, sharing a channel's pixels among several more gains nothing.
PROGRAMS = 512
# What recalibrates: no loop, one 16-byte load of each 16-bit part per thread.
RECALIBRATE = {
    "compiled": RecalibrateRow(tile=1024, pixels=512, warps=4),
    "interpreted": RecalibrateRow(tile=65536, pixels=4096, warps=4),
}
# What normalizes loads three or five numbers of each channel too. For channels_last a thread has
# one vector of channels, and keeps their numbers for two pixels.
NORMALIZE = {
    "nchw": RECALIBRATE["compiled"],
    "channels_last": RecalibrateRow(tile=2048, pixels=512, warps=4),
    "interpreted": RECALIBRATE["interpreted"],
}
# What gathers a batch's statistics: at most so many samples and channels at a time.
STATISTICS = {"compiled": (256, 8), "interpreted": (4096, 4096)}
# What sums up the fc gradients: at most so many channels and hidden units for one program.
FC_GRAD = {"compiled": (16, 4), "interpreted": (4096, 4096)}


class SumConfig(NamedTuple):
    block_c: int
    block_p: int
    warps: int
    tiles: int  # in a row, for one program
    splits: int  # so many programs share the pixels
    fold_gate: bool


class RecalibrateConfig(NamedTuple):
    block: int  # of a flat run
    block_c: int
    block_p: int
    warps: int


def sum_row(B: int, S: int, C: int, HW: int, itemsize: int, may_fold: bool = True) -> str:
    """The row of SUM for such parts."""
    if may_fold and S * C * HW * itemsize <= FOLD_BYTES:
        return "fold"
    return "large" if B * C * HW >= LARGE else "small"


def sum_config(
    B: int, S: int, C: int, HW: int, itemsize: int, channels_last: bool, products: bool,
    interpreted: bool, may_fold: bool = True,
) -> SumConfig:  # fmt: skip
    """How to sum the parts, or, with two numbers to keep in mind, products of or with them."""
    name = sum_row(B, S, C, HW, itemsize, may_fold)
    fold_gate = name == "fold"
    row = SUM["interpreted" if interpreted else name]
    block_c, block_p = _cut(
        row.product_tile if products else row.tile, row.pixels, C, HW, channels_last
    )
    all_tiles = cdiv(HW, block_p)
    splits = 1
    if not fold_gate:
        splits = min(all_tiles, cdiv(PROGRAMS, B * cdiv(C, block_c)))
    tiles = cdiv(all_tiles, splits)
    return SumConfig(block_c, block_p, row.warps, tiles, cdiv(all_tiles, tiles), fold_gate)


def recalibrate_config(
    C: int, HW: int, channels_last: bool, interpreted: bool
) -> RecalibrateConfig:
    row = RECALIBRATE["interpreted" if interpreted else "compiled"]
    return _write_config(row, C, HW, channels_last)


def normalize_config(C: int, HW: int, channels_last: bool, interpreted: bool) -> RecalibrateConfig:
    compiled = "channels_last" if channels_last else "nchw"
    row = NORMALIZE["interpreted" if interpreted else compiled]
    return _write_config(row, C, HW, channels_last)


def _write_config(row: RecalibrateRow, C: int, HW: int, channels_last: bool) -> RecalibrateConfig:
    block_c, block_p = _cut(row.tile, row.pixels, C, HW, channels_last)
    return RecalibrateConfig(row.tile, block_c, block_p, row.warps)


def statistics_blocks(B: int, SC: int, interpreted: bool) -> tuple[int, int]:
    """BLOCK_B and BLOCK_K."""
    most_b, most_k = STATISTICS["interpreted" if interpreted else "compiled"]
    return min(most_b, next_power_of_2(B)), min(most_k, next_power_of_2(SC))


def fc_grad_blocks(C: int, R: int, interpreted: bool) -> tuple[int, int, int]:
    """BLOCK_C, BLOCK_R and BLOCK_N, the rows that are loaded at a time."""
    most_c, most_r = FC_GRAD["interpreted" if interpreted else "compiled"]
    block_c, block_r = min(most_c, next_power_of_2(C)), min(most_r, next_power_of_2(R))
    return block_c, block_r, max(1, GATE_TILE // (block_c * block_r))


def _cut(tile: int, pixels: int, C: int, HW: int, channels_last: bool) -> tuple[int, int]:
    """BLOCK_C and BLOCK_P of at most ``tile`` elements, filled along the inner extent first."""
    if channels_last:
        block_c = min(next_power_of_2(C), 128)
        return block_c, min(next_power_of_2(HW), max(1, tile // block_c))
    block_p = min(next_power_of_2(HW), pixels)
    return min(next_power_of_2(C), max(1, tile // block_p)), block_p
