"""What optimize_for_inference did, and what it was worth."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from epsanet_fused.inference.blocks import Rewrites
from epsanet_fused.inference.rewrite import Targets
from epsanet_fused.utils.device_info import device_name, library_versions
from epsanet_fused.utils.timing import Timing, make_clock


class Gain(NamedTuple):
    """One rewrite: milliseconds without it and with it, all others applied."""

    name: str
    without: Timing
    with_it: Timing
    applied: bool

    def __str__(self) -> str:
        times = f"{self.without.p50:9.3f} -> {self.with_it.p50:9.3f} ms"
        verdict = f"{self.without.p50 / self.with_it.p50:.2f}x" if self.applied else "not applied"
        return f"  {self.name:45s} {times}  {verdict}"


class Report(NamedTuple):
    """``print`` it. Times are medians; before is the model as it was given."""

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
        lines = [self.setting, ""]
        counts = {"block": found.blocks, "PSA module": found.psas, "stem": found.stems}
        what = [
            f"{len(names)} {kind}{'s' * (len(names) > 1)}"
            for kind, names in counts.items()
            if names
        ]
        if self.rewrites is None:
            lines.append("NOTHING was rewritten: it wouldn't be faster")
        else:
            lines.append(f"rewritten: {', '.join(what)}")
        lines += [f"left alone: {name}: {reason}" for name, reason in found.left_alone.items()]
        lines += ["", "each rewrite, without it and with it (all others applied)"]
        lines += [str(gain) for gain in self.gains]
        if self.rewrites is not None:
            lines += ["", *_plan_lines(self.rewrites)]
        speed = self.before.p50 / self.after.p50
        lines += [
            "",
            f"in all {self.before.p50:.3f} -> {self.after.p50:.3f} ms, {speed:.2f}x",
            f"largest error against the model it came from {self.max_error:.1e}, "
            f"relative {self.relative_error:.1e}",
        ]
        return "\n".join(lines)


def setting(args: tuple[Any, ...]) -> str:
    """What was measured, on what."""
    tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
    shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors)
    device = tensors[0].device
    return (
        f"measured on {shapes}; {device_name(device)}; {library_versions(device)}; "
        f"{make_clock(device).name}"
    )


def _plan_lines(rewrites: Rewrites) -> list[str]:
    """The plans, those of a stage that are alike in one line."""
    names: dict[str, int] = {}
    for name, (groups, (rows, columns), memory_format) in rewrites.plans.items():
        stage, conv = name.split(".")[0], name.split(".")[-1]
        form = "channels_last" if memory_format == torch.channels_last else "contiguous"
        text = f"{stage} {conv}: {groups} group(s), {rows}x{columns} pixels at once, {form}"
        names[text] = names.get(text, 0) + 1
    return [f"  {count} x {text}" for text, count in names.items()]
