"""The block sizes of the kernels and the number of their programs: a static table, no autotuning.

The entries were chosen by counting (loads in flight, programs per multiprocessor, registers and
width of access in the machine code). Other entries haven't been measured yet.
"""

from __future__ import annotations

from typing import NamedTuple

from triton import cdiv, next_power_of_2

# The largest block (S, R, C) of the gate, and (rows, R, C) of the fc gradients, in elements.
GATE_TILE = 2048
# From this size of a branch, B * C * HW elements, large tiles still make enough programs.
LARGE_BRANCH = 1 << 21
# Up to this size of a sample's branches one program sums them all, and runs the gate, too.
FUSED_GATE_BYTES = 128 * 1024


class SumTile(NamedTuple):
    """Sizes of a tile, in elements of one branch; a program has one of each of the S branches."""

    tile: int
    product_tile: int  # where two tensors are read, or two numbers are kept for each pixel
    pixels: int  # the tile's width for NCHW; for channels_last the channels come first
    warps: int


class RecalibrateTile(NamedTuple):
    """Sizes of a tile in the kernels that write the output or the branches' gradients."""

    tile: int
    pixels: int
    warps: int


# For the kernels that sum over pixels. A large tile keeps several 16-byte loads per thread in
# flight, a small one makes more programs.
SUM = {
    "small": SumTile(tile=1024, product_tile=1024, pixels=256, warps=4),
    "large": SumTile(tile=4096, product_tile=2048, pixels=512, warps=4),
    "fused_gate": SumTile(tile=8192, product_tile=4096, pixels=512, warps=16),
    # Every interpreted program takes the same time, whatever its size.
    "interpreted": SumTile(tile=65536, product_tile=65536, pixels=4096, warps=4),
}
# Splits are added up to this number of programs; more gain nothing.
SPLIT_PROGRAMS = 512
# For recalibrate_kernel: no loop, one 16-byte load of each 16-bit branch per thread.
RECALIBRATE = {
    "compiled": RecalibrateTile(tile=1024, pixels=512, warps=4),
    "interpreted": RecalibrateTile(tile=65536, pixels=4096, warps=4),
}
# For normalize_kernel, which also loads three or five numbers of each channel. For channels_last a
# thread has one vector of channels, and keeps their numbers for two pixels.
NORMALIZE = {
    "nchw": RECALIBRATE["compiled"],
    "channels_last": RecalibrateTile(tile=2048, pixels=512, warps=4),
    "interpreted": RECALIBRATE["interpreted"],
}
# For the batch's statistics: the largest numbers of samples and of channels at a time.
STATISTICS = {"compiled": (256, 8), "interpreted": (4096, 4096)}
# For the fc gradients: the largest numbers of channels and of hidden units of a program.
FC_GRAD = {"compiled": (16, 4), "interpreted": (4096, 4096)}


class SumConfig(NamedTuple):
    """Block sizes and work division of a kernel that sums over pixels."""

    block_c: int
    block_p: int
    warps: int
    tiles: int  # that a program takes one after another
    splits: int  # the number of programs that share a channel's pixels
    fused_gate: bool  # the same launch runs the gate


class RecalibrateConfig(NamedTuple):
    """Block sizes of a kernel that writes the output or the branches' gradients."""

    block: int  # of a run of memory, for the flat kernel
    block_c: int
    block_p: int
    warps: int


def sum_tile_name(
    B: int, S: int, C: int, HW: int, itemsize: int, may_fuse_gate: bool = True
) -> str:
    """Return the key in SUM for S branches (B, C, HW)."""
    if may_fuse_gate and S * C * HW * itemsize <= FUSED_GATE_BYTES:
        return "fused_gate"
    return "large" if B * C * HW >= LARGE_BRANCH else "small"


def sum_config(
    B: int,
    S: int,
    C: int,
    HW: int,
    itemsize: int,
    channels_last: bool,
    products: bool,
    interpreted: bool,
    may_fuse_gate: bool = True,
) -> SumConfig:
    """Return how to sum S branches (B, C, HW) over their pixels.

    ``products``: the kernel reads two tensors, or keeps two numbers for each pixel.
    """
    name = sum_tile_name(B, S, C, HW, itemsize, may_fuse_gate)
    fused_gate = name == "fused_gate"
    row = SUM["interpreted" if interpreted else name]
    tile = row.product_tile if products else row.tile
    block_c, block_p = _tile_shape(tile, row.pixels, C, HW, channels_last)
    all_tiles = cdiv(HW, block_p)
    splits = 1
    if not fused_gate:
        splits = min(all_tiles, cdiv(SPLIT_PROGRAMS, B * cdiv(C, block_c)))
    tiles = cdiv(all_tiles, splits)
    return SumConfig(block_c, block_p, row.warps, tiles, cdiv(all_tiles, tiles), fused_gate)


def recalibrate_config(
    C: int, HW: int, channels_last: bool, interpreted: bool
) -> RecalibrateConfig:
    """Return the block sizes of recalibrate_kernel and recalibrate_flat_kernel."""
    row = RECALIBRATE["interpreted" if interpreted else "compiled"]
    return _write_config(row, C, HW, channels_last)


def normalize_config(C: int, HW: int, channels_last: bool, interpreted: bool) -> RecalibrateConfig:
    """Return the block sizes of normalize_kernel and normalize_flat_kernel."""
    compiled = "channels_last" if channels_last else "nchw"
    row = NORMALIZE["interpreted" if interpreted else compiled]
    return _write_config(row, C, HW, channels_last)


def _write_config(row: RecalibrateTile, C: int, HW: int, channels_last: bool) -> RecalibrateConfig:
    block_c, block_p = _tile_shape(row.tile, row.pixels, C, HW, channels_last)
    return RecalibrateConfig(row.tile, block_c, block_p, row.warps)


def statistics_blocks(B: int, SC: int, interpreted: bool) -> tuple[int, int]:
    """Return BLOCK_B and BLOCK_K."""
    max_b, max_k = STATISTICS["interpreted" if interpreted else "compiled"]
    return min(max_b, next_power_of_2(B)), min(max_k, next_power_of_2(SC))


def fc_grad_blocks(C: int, R: int, interpreted: bool) -> tuple[int, int, int]:
    """Return BLOCK_C, BLOCK_R and BLOCK_N, the rows that are loaded at a time."""
    max_c, max_r = FC_GRAD["interpreted" if interpreted else "compiled"]
    block_c, block_r = min(max_c, next_power_of_2(C)), min(max_r, next_power_of_2(R))
    return block_c, block_r, max(1, GATE_TILE // (block_c * block_r))


def _tile_shape(tile: int, pixels: int, C: int, HW: int, channels_last: bool) -> tuple[int, int]:
    """Return BLOCK_C and BLOCK_P of at most ``tile`` elements, filling the inner extent first."""
    if channels_last:
        block_c = min(next_power_of_2(C), 128)
        return block_c, min(next_power_of_2(HW), max(1, tile // block_c))
    block_p = min(next_power_of_2(HW), pixels)
    return min(next_power_of_2(C), max(1, tile // block_p)), block_p
