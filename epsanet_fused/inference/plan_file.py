"""Read and write files of plans."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from epsanet_fused.nn.grouped_conv import ConvPlan
from epsanet_fused.utils.atomic_write import write_atomically
from epsanet_fused.utils.memory_format import MEMORY_FORMATS, memory_format_name


def read_plans(path: Path) -> dict[str, ConvPlan]:
    """Return the plans of a file, by ``ConvProblem.key()``.

    Raises:
        ValueError: if the file holds no plans.
    """
    try:
        entries = json.loads(path.read_text())
        return {
            key: ConvPlan(int(groups), (int(rows), int(columns)), MEMORY_FORMATS[memory_format])
            for key, (groups, rows, columns, memory_format) in entries.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"plan_convs: file must hold plans as plan_convs writes them, but {path} doesn't "
            f"({type(error).__name__}: {error}); remove it, or name another"
        ) from None


def write_plans(path: Path, plans: Mapping[str, ConvPlan]) -> None:
    """Write plans, by ``ConvProblem.key()``, to a file."""
    entries = {
        key: (plan.groups, *plan.tile, memory_format_name(plan.memory_format))
        for key, plan in plans.items()
    }
    write_atomically(path, (json.dumps(entries, indent=1, sort_keys=True) + "\n").encode())
