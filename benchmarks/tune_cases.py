"""What tune_triton.py times: launches at the sizes they serve, and other entries of their table."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from aot_compile import launches
from inputs import SEED, STAGES
from torch import Tensor

from epsanet_fused.backends.triton import config, launch, launch_norm, psa_tail
from epsanet_fused.utils.memory_format import accumulator_dtype

BRANCHES = 4
REDUCTION = 16
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Factors of the entries there are, the likeliest first: more or fewer 16-byte loads in flight per
# thread, larger or smaller programs; and widths that divide 3136, 784 and 196 pixels better.
SUM_FACTORS = (  # of the tile, its pixels and the warps
    (2, 1, 2), (0.5, 1, 0.5), (0.5, 1, 1), (2, 1, 1), (1, 1, 2), (1, 0.25, 1), (1, 0.125, 1),
    (1, 0.5, 1), (1, 2, 1), (1, 1, 0.5),
)  # fmt: skip
WRITE_FACTORS = ((2, 1), (2, 2), (1, 0.5), (4, 2), (0.5, 0.5), (4, 4), (1, 2))  # tile and warps
FOLD_BYTES = (0, 64 * 1024, 256 * 1024, 512 * 1024)
PROGRAMS = (1024, 2048, 256)
LARGE = (1 << 20, 1 << 22)
MOST_WARPS = 32
Cut = tuple[object, ...]


class Case(NamedTuple):
    """One launch at one size."""

    kind: str
    stage: str
    batch: int
    dtype: str
    layout: str

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, S, C, HW."""
        channels, size = STAGES[self.stage]
        return self.batch, BRANCHES, channels // BRANCHES, size * size

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def channels_last(self) -> bool:
        return self.layout == "channels_last"

    @property
    def may_fold(self) -> bool:
        return self.kind != "gradient_sums"


class Candidate(NamedTuple):
    """Another value for an entry of the table; ``setting`` names the entry and its field."""

    setting: str
    present: str
    name: str
    table: str  # an attribute of config
    row: str | None  # None where that is a number
    value: object


# What runs as the table is.
PRESENT = Candidate("present", "", "", "", None, None)


class Tensors:
    """All that the launches of one case read and write; left as allocated unless ``filled``."""

    def __init__(self, case: Case, device: torch.device, filled: bool) -> None:
        B, S, C, _ = case.sizes
        side = STAGES[case.stage][1]
        dtype = getattr(torch, case.dtype)

        def image(channels: int) -> Tensor:
            x = torch.empty(
                (B, channels, side, side),
                dtype=dtype, device=device, memory_format=LAYOUTS[case.layout],
            )  # fmt: skip
            return x.normal_(generator=generator) if filled else x

        def numbers(*shape: int) -> Tensor:
            x = torch.empty(shape, dtype=accumulator_dtype(dtype), device=device)
            return x.uniform_(0.1, 0.9, generator=generator) if filled else x

        generator = torch.Generator(device).manual_seed(SEED)
        R = max(1, C // REDUCTION)
        self.branches = [image(C) for _ in range(S)]
        self.cat = image(S * C)
        self.grads = [torch.empty_like(x) for x in self.branches]
        # Divided, so that the gate's sigmoid isn't 1 and its gradient 0.
        self.fc = [numbers(*s).div_(s[-1]) for s in ((R, C), (R,), (C, R), (C,))]
        self.squeeze, self.deviation, self.attention = (numbers(B, S, C) for _ in range(3))
        self.weight, self.shift, self.factor, self.spread = (numbers(B, S, C) for _ in range(4))
        self.for_fc = [numbers(B, S, R), numbers(B, S, R), numbers(B, S, C)]
        self.norm = launch_norm.Norm(*(numbers(S * C) for _ in range(4)), eps=1e-5)
        self.problem = launch.problem(self.branches, self.cat)


def sum_forward(t: Tensors) -> Sequence[Tensor]:
    launch.sum_and_gate(t.problem, False, t.squeeze, t.attention, t.fc)
    return t.squeeze, t.attention


def sum_backward(t: Tensors) -> Sequence[Tensor]:
    launch.sum_and_gate(t.problem, True, t.squeeze, t.attention, t.fc, t.spread, t.for_fc)
    return t.spread, *t.for_fc


def deviations(t: Tensors) -> Sequence[Tensor]:
    launch_norm.deviations_and_gate(t.problem, t.squeeze, t.deviation, t.attention, t.fc)
    return t.squeeze, t.deviation, t.attention


def gradient_sums(t: Tensors) -> Sequence[Tensor]:
    return launch_norm.gradient_sums(t.problem, t.squeeze, t.attention, t.norm)


def recalibrate(t: Tensors) -> Sequence[Tensor]:
    launch.recalibrate(t.problem, t.attention)
    return (t.cat,)


def recalibrate_backward(t: Tensors) -> Sequence[Tensor]:
    launch.recalibrate(launch.problem(t.grads, t.cat), t.attention, t.spread)
    return t.grads


def normalize(t: Tensors) -> Sequence[Tensor]:
    launch_norm.normalize(t.problem, t.squeeze, t.weight, t.shift)
    return (t.cat,)


def normalize_backward(t: Tensors) -> Sequence[Tensor]:
    problem = launch.problem(t.branches, t.cat, t.grads)
    launch_norm.normalize(problem, t.squeeze, t.weight, t.shift, t.factor, t.spread)
    return t.grads


KINDS: dict[str, Callable[[Tensors], Sequence[Tensor]]] = {
    "sum": sum_forward,
    "recalibrate": recalibrate,
    "sum_backward": sum_backward,
    "recalibrate_backward": recalibrate_backward,
    "deviations": deviations,
    "normalize": normalize,
    "gradient_sums": gradient_sums,
    "normalize_backward": normalize_backward,
}
INFERENCE = ("sum", "recalibrate")
SUMS = ("sum", "sum_backward", "deviations", "gradient_sums")


def plan(
    kinds: Sequence[str],
    stages: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    layouts: Sequence[str],
) -> list[Case]:
    """All cases, dtype by dtype and batch by batch; nobody trains with a batch of one."""
    points = itertools.product(dtypes, batches, kinds, stages, layouts)
    return [
        Case(kind, stage, batch, dtype, layout)
        for dtype, batch, kind, stage, layout in points
        if batch > 1 or kind in INFERENCE
    ]


def prepare(
    case: Case, device: torch.device, filled: bool = True
) -> Callable[[], Sequence[Tensor]]:
    """The launch, which returns what it has written."""
    return functools.partial(KINDS[case.kind], Tensors(case, device, filled))


def compile_ahead(case: Case, candidate: Candidate) -> None:
    """Leave the launch's kernels in Triton's cache; see aot_compile.compilers."""
    run = prepare(case, torch.device("cpu"), filled=False)
    with launches(compile_only=True), applied(candidate):
        run()


def applied(candidate: Candidate) -> AbstractContextManager[object]:
    """Meanwhile the table has the candidate's value."""
    if candidate == PRESENT:
        return nullcontext()
    if candidate.row is None:
        return mock.patch.object(config, candidate.table, candidate.value)
    row = "interpreted" if psa_tail.INTERPRETED else candidate.row
    return mock.patch.dict(getattr(config, candidate.table), {row: candidate.value})


def trials(case: Case, most: int) -> list[tuple[Candidate, Cut]]:
    """The table as it is, then ``most`` candidates of each entry, and how each cuts the case."""
    found = []
    seen: Counter[str] = Counter()
    for candidate in (PRESENT, *candidates(case)):
        seen[candidate.setting] += 1
        if seen[candidate.setting] <= most:
            with applied(candidate):
                found.append((candidate, _cut(case)))
    return found


def distinct(tried: Sequence[tuple[Candidate, Cut]]) -> dict[Cut, Candidate]:
    """The first candidate of each cut: equal cuts are the same launch."""
    found: dict[Cut, Candidate] = {}
    for candidate, cut in tried:
        found.setdefault(cut, candidate)
    return found


def _cut(case: Case) -> Cut:
    B, S, C, HW = case.sizes
    if case.kind in SUMS:
        return config.sum_config(
            B, S, C, HW, case.itemsize, case.channels_last, case.kind != "sum",
            psa_tail.INTERPRETED, case.may_fold,
        )  # fmt: skip
    normalizes = case.kind.startswith("normalize")
    make = config.normalize_config if normalizes else config.recalibrate_config
    found = make(C, HW, case.channels_last, psa_tail.INTERPRETED)
    return found if case.channels_last else (found.block, found.warps)  # NCHW is one flat run


def candidates(case: Case) -> list[Candidate]:
    """What to try in place of the entries that serve the case."""
    if case.kind not in SUMS:
        if case.kind.startswith("normalize"):
            return _write_candidates("NORMALIZE", case.layout)
        return _write_candidates("RECALIBRATE", "compiled")
    row = config.sum_row(*case.sizes, case.itemsize, case.may_fold)
    found = _sum_candidates(row, "tile" if case.kind == "sum" else "product_tile")
    if row != "fold":
        found += _number_candidates("PROGRAMS", PROGRAMS)
        found += _number_candidates("LARGE", LARGE)
    if case.may_fold:
        found += _number_candidates("FOLD_BYTES", FOLD_BYTES)
    return found


def _sum_candidates(row: str, field: str) -> list[Candidate]:
    """Of the tile's size for sums, or for sums of products, with its width and warps."""
    present = config.SUM[row]
    words = "{" + field + "} x {pixels} x {warps}"
    found = []
    for by_tile, by_pixels, by_warps in SUM_FACTORS:
        value = present._replace(
            **{field: int(getattr(present, field) * by_tile)},
            pixels=int(present.pixels * by_pixels),
            warps=int(present.warps * by_warps),
        )
        found.append(_of_row("SUM", row, f"SUM {row}: {field} x pixels x warps", words, value))
    return [candidate for candidate in found if candidate.value.warps <= MOST_WARPS]


def _write_candidates(table: str, row: str) -> list[Candidate]:
    present = getattr(config, table)[row]
    values = [
        present._replace(tile=int(present.tile * by_tile), warps=int(present.warps * by_warps))
        for by_tile, by_warps in WRITE_FACTORS
    ]
    setting = f"{table} {row}: tile x warps"
    return [_of_row(table, row, setting, "{tile} x {warps}", value) for value in values]


def _of_row(table: str, row: str, setting: str, words: str, value: NamedTuple) -> Candidate:
    present = words.format(**getattr(config, table)[row]._asdict())
    return Candidate(setting, present, words.format(**value._asdict()), table, row, value)


def _number_candidates(name: str, values: Sequence[int]) -> list[Candidate]:
    present = str(getattr(config, name))
    return [Candidate(name, present, str(value), name, None, value) for value in values]
