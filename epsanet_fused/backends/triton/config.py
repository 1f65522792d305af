"""How the kernels are cut into programs: a static table, no autotuning.

The rows were chosen by counting (loads in flight, programs per multiprocessor, registers and width
of access in the machine code); none has been measured on a card yet.
"""

from __future__ import annotations

from typing import NamedTuple

from triton import cdiv, next_power_of_2

# The largest tile (S, R, C) of the gate, and (rows, R, C) of the fc gradients.
GATE_TILE = 4096
# Elements of one part, B * C * HW, from which large tiles still make enough programs for a card.
LARGE = 1 << 21
# Up to this size of a sample's parts one program sums them all, and the gate needs no launch.
FOLD_BYTES = 128 * 1024


class Row(NamedTuple):
    """Sizes of a tile, in elements of one part; a program has a tile of each of the S parts."""

    tile: int  # where two tensors are read together, half as much of each
    pixels: int  # the tile's width for NCHW; for channels_last the channels come first
    splits: int  # at most so many programs share the pixels of a sum
    warps: int


# What sums the pixels: a large tile keeps four 16-byte loads of each part in flight per thread, a
# small one spreads what little there is over the card. "fold" must not split.
SUM = {
    "small": Row(tile=1024, pixels=256, splits=16, warps=4),
    "large": Row(tile=4096, pixels=512, splits=1, warps=4),
    "large channels_last": Row(tile=4096, pixels=4096, splits=4, warps=4),
    "fold": Row(tile=8192, pixels=512, splits=1, warps=16),
    # Every interpreted program costs the same, whatever its size.
    "interpreted": Row(tile=65536, pixels=4096, splits=1, warps=4),
}
# What recalibrates: no loop, one 16-byte load of each 16-bit part per thread.
RECALIBRATE = {
    "compiled": Row(tile=1024, pixels=512, splits=1, warps=4),
    "interpreted": Row(tile=65536, pixels=4096, splits=1, warps=4),
}
# What sums up the fc gradients: at most so many channels and hidden units for one program.
FC_GRAD = {"compiled": (16, 4), "interpreted": (4096, 4096)}


class Config(NamedTuple):
    block: int  # of a flat run
    block_c: int
    block_p: int
    tiles: int  # in a row, for one program
    splits: int
    warps: int
    fold_gate: bool = False


def sum_config(
    B: int, S: int, C: int, HW: int, itemsize: int, channels_last: bool, products: bool,
    interpreted: bool,
) -> Config:  # fmt: skip
    """How to sum the parts, or their products with the cat."""
    fold_gate = S * C * HW * itemsize <= FOLD_BYTES
    if interpreted:
        row = "interpreted"
    elif fold_gate:
        row = "fold"
    elif B * C * HW < LARGE:
        row = "small"
    else:
        row = "large channels_last" if channels_last else "large"
    config = _cut(SUM[row], C, HW, channels_last, share=2 if products else 1)
    return config._replace(fold_gate=fold_gate)


def recalibrate_config(C: int, HW: int, channels_last: bool, interpreted: bool) -> Config:
    return _cut(RECALIBRATE["interpreted" if interpreted else "compiled"], C, HW, channels_last)


def fc_grad_blocks(C: int, R: int, interpreted: bool) -> tuple[int, int, int]:
    """BLOCK_C, BLOCK_R and BLOCK_N, the rows that are loaded at a time."""
    most_c, most_r = FC_GRAD["interpreted" if interpreted else "compiled"]
    block_c, block_r = min(most_c, next_power_of_2(C)), min(most_r, next_power_of_2(R))
    return block_c, block_r, max(1, GATE_TILE // (block_c * block_r))


def _cut(row: Row, C: int, HW: int, channels_last: bool, share: int = 1) -> Config:
    """A tile of at most row.tile // share elements, filled along the inner extent first."""
    tile = row.tile // share
    if channels_last:
        block_c = min(next_power_of_2(C), 128)
        block_p = min(next_power_of_2(HW), max(1, tile // block_c))
    else:
        block_p = min(next_power_of_2(HW), row.pixels)
        block_c = min(next_power_of_2(C), max(1, tile // block_p))
    all_tiles = cdiv(HW, block_p)
    tiles = cdiv(all_tiles, row.splits)
    return Config(tile, block_c, block_p, tiles, cdiv(all_tiles, tiles), row.warps)
