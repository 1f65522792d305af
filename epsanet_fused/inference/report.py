"""The report of optimize_for_inference: which rewrites were applied, and their gains."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from epsanet_fused.inference.blocks import Rewrites
from epsanet_fused.inference.rewrite import Targets
from epsanet_fused.utils.device_info import device_name, library_versions
from epsanet_fused.utils.memory_format import memory_format_name
from epsanet_fused.utils.timing import Timing, make_clock


class Gain(NamedTuple):
    """One rewrite: milliseconds without it and with it, all others applied."""

    name: str
    without: Timing
    with_it: Timing
    applied: bool

    def __str__(self) -> str:
        times = f"{self.without.p50:9.3f} -> {self.with_it.p50:9.3f} ms"
        result = f"{self.without.p50 / self.with_it.p50:.2f}x" if self.applied else "not applied"
        return f"  {self.name:45s} {times}  {result}"


class Report(NamedTuple):
    """The results of ``optimize_for_inference``, to be printed.

    targets: what can be rewritten, and what was skipped.
    setting: the inputs, device, library versions and clock of the measurements.
    rewrites: the applied rewrites; None if nothing was rewritten.
    before, after: times of the original model and of the result.
    gains: of each rewrite.
    max_error, relative_error: the largest difference from the original model's output, absolute and
        relative to the largest number in the same tensor.
    """

    targets: Targets
    setting: str
    rewrites: Rewrites | None
    before: Timing
    after: Timing
    gains: tuple[Gain, ...]
    max_error: float = 0.0
    relative_error: float = 0.0

    def __str__(self) -> str:
        found = self.targets
        kinds = {"block": found.blocks, "PSA module": found.psas, "stem": found.stems}
        counts = [f"{len(n)} {kind}{'s' * (len(n) > 1)}" for kind, n in kinds.items() if n]
        lines = [self.setting, ""]
        if self.rewrites is None:
            lines.append("NOTHING was rewritten: it wouldn't be faster")
        else:
            lines.append(f"rewritten: {', '.join(counts)}")
        lines += [f"skipped: {name}: {reason}" for name, reason in found.skipped.items()]
        lines += ["", "each rewrite, without it and with it (all others applied)"]
        lines += [str(gain) for gain in self.gains]
        if self.rewrites is not None:
            lines += ["", *_plan_lines(self.rewrites)]
        speedup = self.before.p50 / self.after.p50
        lines += [
            "",
            f"in all {self.before.p50:.3f} -> {self.after.p50:.3f} ms, {speedup:.2f}x",
            f"largest error against the original model {self.max_error:.1e}, "
            f"relative {self.relative_error:.1e}",
        ]
        return "\n".join(lines)


def describe_setting(args: tuple[Any, ...]) -> str:
    """Return a line that names the inputs, device, library versions and clock."""
    tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
    shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors)
    device = tensors[0].device
    return (
        f"measured on {shapes}; {device_name(device)}; {library_versions(device)}; "
        f"{make_clock(device).name}"
    )


def _plan_lines(rewrites: Rewrites) -> list[str]:
    """Return one line for each distinct plan of a stage, with its number of convolutions."""
    counts: Counter[str] = Counter()
    for name, (groups, (rows, columns), memory_format) in rewrites.plans.items():
        stage, conv = name.split(".")[0], name.split(".")[-1]
        form = memory_format_name(memory_format)
        counts[f"{stage} {conv}: {groups} group(s), {rows}x{columns} pixels at once, {form}"] += 1
    return [f"  {count} x {text}" for text, count in counts.items()]
