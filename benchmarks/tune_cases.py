"""The cases of tune_triton.py: launches at the sizes of a network, and other table entries."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from aot_compile import record_launches
from inputs import MEMORY_FORMATS, SEED, STAGES
from torch import Tensor

from epsanet_fused.backends.interface import NormParams, NormStats, SEWeights
from epsanet_fused.backends.triton import common, config, launch, launch_norm
from epsanet_fused.backends.triton.common import FCGradInputs, GateTensors, NormTerms
from epsanet_fused.utils.memory_format import accumulator_dtype

BRANCHES = 4
REDUCTION = 16
# Factors of the present entries, the most promising first: more or fewer 16-byte loads in flight
# per thread, larger or smaller programs, and widths that divide 3136, 784 and 196 pixels better.
SUM_FACTORS = (  # (tile, pixels, warps)
    (2, 1, 2), (0.5, 1, 0.5), (0.5, 1, 1), (2, 1, 1), (1, 1, 2), (1, 0.25, 1), (1, 0.125, 1),
    (1, 0.5, 1), (1, 2, 1), (1, 1, 0.5),
)  # fmt: skip
WRITE_FACTORS = ((2, 1), (2, 2), (1, 0.5), (4, 2), (0.5, 0.5), (4, 4), (1, 2))  # (tile, warps)
FUSED_GATE_BYTES = (0, 64 * 1024, 256 * 1024, 512 * 1024)
SPLIT_PROGRAMS = (1024, 2048, 256)
LARGE_BRANCH = (1 << 20, 1 << 22)
MAX_WARPS = 32
Config = tuple[object, ...]  # block sizes and division of work: equal ones are the same launch


class Case(NamedTuple):
    """One launch at one size and in one memory format."""

    kind: str
    stage: str
    batch: int
    dtype: str
    memory_format: str

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The sizes B, S, C, HW."""
        channels, size = STAGES[self.stage]
        return self.batch, BRANCHES, channels // BRANCHES, size * size

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def channels_last(self) -> bool:
        return self.memory_format == "channels_last"

    @property
    def may_fuse_gate(self) -> bool:
        """True if the sums may be in one launch with the gate."""
        return self.kind != "gradient_sums"


class Override(NamedTuple):
    """Another value for an entry of backends/triton/config.py."""

    setting: str  # the entry and its field
    present: str  # the present value in words
    name: str  # the other value in words
    table: str  # the attribute of config
    row: str | None  # the row of that table; None where the attribute is a number
    value: object


# The table as it is.
PRESENT = Override("present", "", "", "", None, None)


class Tensors:
    """The tensors that the launches of one case read and write; not initialised unless filled."""

    def __init__(self, case: Case, device: torch.device, filled: bool) -> None:
        B, S, C, _ = case.sizes
        side = STAGES[case.stage][1]
        dtype = getattr(torch, case.dtype)

        def image(channels: int) -> Tensor:
            shape = (B, channels, side, side)
            memory_format = MEMORY_FORMATS[case.memory_format]
            x = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
            return x.normal_(generator=generator) if filled else x

        def numbers(*shape: int) -> Tensor:
            x = torch.empty(shape, dtype=accumulator_dtype(dtype), device=device)
            return x.uniform_(0.1, 0.9, generator=generator) if filled else x

        generator = torch.Generator(device).manual_seed(SEED)
        R = max(1, C // REDUCTION)
        self.branches = [image(C) for _ in range(S)]
        self.concat = image(S * C)
        self.grad_branches = [torch.empty_like(x) for x in self.branches]
        # Divided by the fan-in: otherwise the gate's sigmoid is 1 and its gradient 0.
        self.fc = SEWeights(*(numbers(*s).div_(s[-1]) for s in ((R, C), (R,), (C, R), (C,))))
        samples = (numbers(B, S, C) for _ in range(3))  # squeeze, m2, attention
        self.stats = NormStats(*samples, mean=numbers(S * C), var=numbers(S * C))
        self.norm = NormParams(numbers(S * C), numbers(S * C), eps=1e-5)
        weight, shift, factor, grad_mean = (numbers(B, S, C) for _ in range(4))
        squeeze, attention = self.stats.squeeze, self.stats.attention
        self.terms = NormTerms(squeeze, weight, shift)
        self.grad_terms = NormTerms(squeeze, weight, shift, factor, grad_mean)
        fc_grad_inputs = FCGradInputs(numbers(B, S, R), numbers(B, S, R), numbers(B, S, C))
        fc = launch.fc_tensors(self.fc)
        self.se = GateTensors(squeeze, attention, fc, grad_mean, fc_grad_inputs)
        self.args = launch.tail_args(self.branches, self.concat)


def sum_forward(t: Tensors) -> Sequence[Tensor]:
    """Launch the sums and the gate of the forward."""
    launch.sum_and_gate(t.args, t.se.squeeze, t.se.attention, t.fc)
    return t.se.squeeze, t.se.attention


def sum_backward(t: Tensors) -> Sequence[Tensor]:
    """Launch the sums and the gate of the backward."""
    launch.sum_and_gate_backward(t.args, t.se)
    return t.se.grad_mean, *t.se.fc_grad_inputs


def m2_forward(t: Tensors) -> Sequence[Tensor]:
    """Launch the sums, the m2 and the gate of psa_tail_norm."""
    launch_norm.m2_and_gate(t.args, t.stats, t.fc)
    return t.stats.squeeze, t.stats.m2, t.stats.attention


def gradient_sums(t: Tensors) -> Sequence[Tensor]:
    """Launch the sums of the gradients of psa_tail_norm."""
    return launch_norm.gradient_sums(t.args, t.stats, t.norm)


def recalibrate(t: Tensors) -> Sequence[Tensor]:
    """Launch the recalibration of the forward."""
    launch.recalibrate(t.args, t.se.attention)
    return (t.concat,)


def recalibrate_backward(t: Tensors) -> Sequence[Tensor]:
    """Launch the recalibration of the backward."""
    launch.recalibrate_backward(launch.tail_args(t.grad_branches, t.concat), t.se)
    return t.grad_branches


def normalize(t: Tensors) -> Sequence[Tensor]:
    """Launch the normalization of psa_tail_norm."""
    launch_norm.normalize_branches(t.args, t.terms)
    return (t.concat,)


def normalize_backward(t: Tensors) -> Sequence[Tensor]:
    """Launch the backward of that normalization."""
    args = launch.tail_args(t.branches, t.concat, t.grad_branches)
    launch_norm.normalize_branches(args, t.grad_terms)
    return t.grad_branches


KINDS: dict[str, Callable[[Tensors], Sequence[Tensor]]] = {
    "sum": sum_forward,
    "recalibrate": recalibrate,
    "sum_backward": sum_backward,
    "recalibrate_backward": recalibrate_backward,
    "m2": m2_forward,
    "normalize": normalize,
    "gradient_sums": gradient_sums,
    "normalize_backward": normalize_backward,
}
INFERENCE = ("sum", "recalibrate")
SUMS = ("sum", "sum_backward", "m2", "gradient_sums")


def plan(
    kinds: Sequence[str],
    stages: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    memory_formats: Sequence[str],
) -> list[Case]:
    """Return all cases, dtype by dtype and batch by batch. A batch of one is for inference only."""
    points = itertools.product(dtypes, batches, kinds, stages, memory_formats)
    return [
        Case(kind, stage, batch, dtype, memory_format)
        for dtype, batch, kind, stage, memory_format in points
        if batch > 1 or kind in INFERENCE
    ]


def prepare(
    case: Case, device: torch.device, filled: bool = True
) -> Callable[[], Sequence[Tensor]]:
    """Return the launch as a function. It returns the tensors that it writes."""
    return functools.partial(KINDS[case.kind], Tensors(case, device, filled))


def compile_ahead(case: Case, override: Override) -> None:
    """Compile the launch's kernels into Triton's cache on disk; see aot_compile.compiler_pool."""
    run = prepare(case, torch.device("cpu"), filled=False)
    with record_launches(compile_only=True), applied(override):
        run()


def applied(override: Override) -> AbstractContextManager[object]:
    """Change the table inside the context."""
    if override == PRESENT:
        return nullcontext()
    if override.row is None:
        return mock.patch.object(config, override.table, override.value)
    row = "interpreted" if common.INTERPRETED else override.row
    return mock.patch.dict(getattr(config, override.table), {row: override.value})


def trials(case: Case, limit: int) -> list[tuple[Override, Config]]:
    """Return PRESENT and at most ``limit`` overrides of each entry, with the resulting config."""
    found = []
    seen: Counter[str] = Counter()
    for override in (PRESENT, *overrides(case)):
        seen[override.setting] += 1
        if seen[override.setting] <= limit:
            with applied(override):
                found.append((override, _config(case)))
    return found


def distinct(tried: Sequence[tuple[Override, Config]]) -> dict[Config, Override]:
    """Return the first override of each config, so that no launch is timed twice."""
    found: dict[Config, Override] = {}
    for override, cfg in tried:
        found.setdefault(cfg, override)
    return found


def _config(case: Case) -> Config:
    if case.kind in SUMS:
        return config.sum_config(
            *case.sizes,
            case.itemsize,
            case.channels_last,
            products=case.kind != "sum",
            interpreted=common.INTERPRETED,
            may_fuse_gate=case.may_fuse_gate,
        )
    normalizes = case.kind.startswith("normalize")
    make = config.normalize_config if normalizes else config.recalibrate_config
    _, _, C, HW = case.sizes
    found = make(C, HW, case.channels_last, common.INTERPRETED)
    # For NCHW a sample is one flat run, and only the block and the warps matter.
    return found if case.channels_last else (found.block, found.warps)


def overrides(case: Case) -> list[Override]:
    """Return other values for the entries that the case uses."""
    if case.kind not in SUMS:
        if case.kind.startswith("normalize"):
            return _write_overrides("NORMALIZE", case.memory_format)
        return _write_overrides("RECALIBRATE", "compiled")
    row = config.sum_tile_name(*case.sizes, case.itemsize, case.may_fuse_gate)
    found = _sum_overrides(row, "tile" if case.kind == "sum" else "product_tile")
    if row != "fused_gate":
        found += _number_overrides("SPLIT_PROGRAMS", SPLIT_PROGRAMS)
        found += _number_overrides("LARGE_BRANCH", LARGE_BRANCH)
    if case.may_fuse_gate:
        found += _number_overrides("FUSED_GATE_BYTES", FUSED_GATE_BYTES)
    return found


def _sum_overrides(row: str, field: str) -> list[Override]:
    """Vary the tile's size for sums (or for sums of products), its width and the warps."""
    present = config.SUM[row]
    words = "{" + field + "} x {pixels} x {warps}"
    found = []
    for by_tile, by_pixels, by_warps in SUM_FACTORS:
        value = present._replace(
            **{field: int(getattr(present, field) * by_tile)},
            pixels=int(present.pixels * by_pixels),
            warps=int(present.warps * by_warps),
        )
        found.append(
            _row_override("SUM", row, f"SUM {row}: {field} x pixels x warps", words, value)
        )
    return [override for override in found if override.value.warps <= MAX_WARPS]


def _write_overrides(table: str, row: str) -> list[Override]:
    present = getattr(config, table)[row]
    values = [
        present._replace(tile=int(present.tile * by_tile), warps=int(present.warps * by_warps))
        for by_tile, by_warps in WRITE_FACTORS
    ]
    setting = f"{table} {row}: tile x warps"
    return [_row_override(table, row, setting, "{tile} x {warps}", value) for value in values]


def _row_override(table: str, row: str, setting: str, words: str, value: NamedTuple) -> Override:
    present = words.format(**getattr(config, table)[row]._asdict())
    return Override(setting, present, words.format(**value._asdict()), table, row, value)


def _number_overrides(name: str, values: Sequence[int]) -> list[Override]:
    present = str(getattr(config, name))
    return [Override(name, present, str(value), name, None, value) for value in values]
