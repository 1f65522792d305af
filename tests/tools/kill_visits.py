"""Kill each part of a rehearsed visit at ten random moments: no row may be lost. A quarter hour.

python tests/tools/kill_visits.py
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks"), str(ROOT)]

from helpers.visits import kill_after  # noqa: E402, as it needs the path above

MOMENTS = 10
# Fewer rows than a part writes, so that the moments are all over it.
ROWS = {1: 80, 2: 12, 3: 32}


def main() -> int:
    draw = random.Random(0)
    for part, most in ROWS.items():
        for moment in range(MOMENTS):
            rows, seconds = draw.randrange(most), draw.uniform(0, 2)
            with tempfile.TemporaryDirectory() as folder:
                kept = kill_after(part, rows, seconds, Path(folder))
            print(f"part {part}, moment {moment + 1}: {kept} rows kept, all valid", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
