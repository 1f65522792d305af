"""Test that `bench_psa.py --prepare-only` fills the caches that bench_psa.py compiles into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.processes import BENCHMARKS

# Run the script, then print Inductor's counters, which count the hits of its cache.
RUN = """
import json, sys
import bench_psa
assert bench_psa.main(sys.argv[1:]) == 0
from torch._dynamo.utils import counters
print(json.dumps(dict(counters["inductor"])))
"""


def cache_use(cache: Path, *arguments: str) -> tuple[int, int]:
    """Run bench_psa.py in its own process and return the hits and misses of Inductor's cache."""
    path = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
    env = os.environ | {
        "PYTHONPATH": path,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    return counted.get("fxgraph_cache_hit", 0), counted.get("fxgraph_cache_miss", 0)


def test_what_was_prepared_is_not_compiled_again(tmp_path: Path) -> None:
    options = "--scope module --mode training --stages S4 --batch 2 --memory-format channels_last"
    options += " --input randn --device cpu --reps 1 --no-plot --seconds 500"
    options += " --providers eager fused-compile --out"
    arguments = (*options.split(), str(tmp_path / "out"))
    cache = tmp_path / "cache"
    hits, misses = cache_use(cache, *arguments, "--prepare-only")
    assert misses > 0
    found, again = cache_use(cache, *arguments)
    assert (found, again) == (hits + misses, 0)
