"""Time the host's part of a fused call, and modules with other SEs beside the official: a CSV file.

    python benchmarks/host_cost.py --out out

``call``: a FusedPSAModule at S4, batch 1, with its convolutions' results given: Python, the checks
and the tail alone. ``module``: the official module (one SE, reversed) by FusedPSAModule, beside one
with an SE for each branch in natural order by what ``fuse`` makes of it. Process CPU time, one
thread, interleaved. With PYTHONPATH=OTHER_CLONE the package of another version is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from environment import describe
from inputs import STAGES
from options import add_shared, parse_shared, positive_int
from report import MACHINE, timing_columns, write_csv
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.utils.timing import Variant, interleave, make_clock

COLUMNS = (
    "case", "stage", "batch", "variant", "ms_p20", "ms_p50", "ms_p80", "samples", "vs_first",
    *MACHINE,
)  # fmt: skip


class OwnSEs(nn.Module):
    """A PSA module with an SE for each branch, in natural order."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        official = ef.PSAModule(channels, channels)
        self.branches = nn.ModuleList(getattr(official, f"conv_{i}") for i in (1, 2, 3, 4))
        self.ses = nn.ModuleList(ef.SEWeightModule(channels // 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        made = [branch(x) for branch in self.branches]
        gates = torch.stack([se(m) for se, m in zip(self.ses, made, strict=True)], 1).softmax(1)
        return torch.cat([m * gates[:, i] for i, m in enumerate(made)], 1)


def call_variants() -> dict[str, Variant]:
    """Return a call of a fused module at S4, without the time of its convolutions."""
    channels, size = STAGES["S4"]
    psa = ef.FusedPSAModule(channels, channels).eval()
    x = torch.randn(1, channels, size, size)
    branches = [torch.randn(1, channels // 4, size, size) for _ in range(4)]
    psa.convolve = lambda _x: branches
    return {"FusedPSAModule": Variant(lambda: psa(x), nullcontext)}


def module_variants(stage: str, batch: int) -> dict[str, Variant]:
    """Return the official module and one with own SEs, both fused."""
    channels, size = STAGES[stage]
    x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
    made = {
        "official": ef.FusedPSAModule(channels, channels),
        "own SEs": ef.fuse(nn.Sequential(OwnSEs(channels)), order="natural")[0],
    }
    ready = {name: m.eval().to(memory_format=torch.channels_last) for name, m in made.items()}
    return {name: Variant(lambda m=m: m(x), nullcontext) for name, m in ready.items()}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1, 8])
    add_shared(parser, 120.0, "for all cases together")
    return parse_shared(parser, argv)


def run(args: argparse.Namespace) -> int:
    """Time all cases, write the CSV file and print it; return the exit status."""
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    clock, environment = make_clock(torch.device("cpu")), describe(torch.device("cpu"))
    cases = [("call", "S4", 1, call_variants())]
    cases += [("module", s, b, module_variants(s, b)) for s in STAGES for b in args.batch]
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        for case, stage, batch, variants in cases:
            timings = interleave(variants, clock, 1000, args.seconds / len(cases))
            first = next(iter(timings.values()))
            for name, timing in timings.items():
                about = {"case": case, "stage": stage, "batch": batch, "variant": name}
                columns = timing_columns(timing) | {"vs_first": timing.p50 / first.p50}
                rows.append(dict.fromkeys(COLUMNS, "") | environment | about | columns)
                print(case, stage, batch, name, f"{timing.p50:.4f} ms", flush=True)
            write_csv(args.out / "host_cost.csv", rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(run(parse()))
