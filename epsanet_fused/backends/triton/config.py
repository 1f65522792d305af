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

    tile: int
    pixels: int  # the tile's width for NCHW; for channels_last the channels come first
    splits: int  # at most so many programs share the pixels of a sum
    warps: int


# What sums the pixels: a large tile keeps four 16-byte loads of each part in flight per thread, a
# small one spreads what little there is over the card.
SUM = {
    "small": Row(tile=1024, pixels=256, splits=16, warps=4),
    "large": Row(tile=4096, pixels=512, splits=1, warps=4),
    "large channels_last": Row(tile=4096, pixels=4096, splits=4, warps=4),
    "fold": Row(tile=8192, pixels=512, splits=1, warps=16),
    "interpreted": Row(tile=65536, pixels=4096, splits=1, warps=4),
}
# What recalibrates: no loop, one 16-byte load of each 16-bit part per thread.
RECALIBRATE = {
    "compiled": Row(tile=1024, pixels=512, splits=1, warps=4),
    "interpreted": Row(tile=65536, pixels=4096, splits=1, warps=4),
}


class Config(NamedTuple):
    block: int  # of a flat run
    block_c: int
    block_p: int
    tiles: int  # in a row, for one program
    splits: int
    warps: int
    fold_gate: bool = False


def sum_config(
    B: int, S: int, C: int, HW: int, itemsize: int, channels_last: bool, interpreted: bool
) -> Config:
    if interpreted:
        return _cut(SUM["interpreted"], C, HW, channels_last)
    if S * C * HW * itemsize <= FOLD_BYTES:
        return _cut(SUM["fold"], C, HW, channels_last)._replace(fold_gate=True)
    if B * C * HW < LARGE:
        return _cut(SUM["small"], C, HW, channels_last)
    return _cut(SUM["large channels_last" if channels_last else "large"], C, HW, channels_last)


def recalibrate_config(C: int, HW: int, channels_last: bool, interpreted: bool) -> Config:
    return _cut(RECALIBRATE["interpreted" if interpreted else "compiled"], C, HW, channels_last)


def _cut(row: Row, C: int, HW: int, channels_last: bool) -> Config:
    """A tile of at most row.tile elements, filled along the inner extent first."""
    if channels_last:
        block_c = min(next_power_of_2(C), 128)
        block_p = min(next_power_of_2(HW), max(1, row.tile // block_c))
    else:
        block_p = min(next_power_of_2(HW), row.pixels)
        block_c = min(next_power_of_2(C), max(1, row.tile // block_p))
    all_tiles = cdiv(HW, block_p)
    tiles = cdiv(all_tiles, row.splits)
    return Config(row.tile, block_c, block_p, tiles, cdiv(all_tiles, tiles), row.warps)
