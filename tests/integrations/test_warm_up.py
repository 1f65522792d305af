"""Test that warm_up.py fills the caches that bench_psa.py compiles into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.processes import BENCHMARKS

# Run one of the two scripts, then print Inductor's counters, which count the hits of its cache.
RUN = """
import importlib, json, sys
name, *arguments = sys.argv[1:]
module = importlib.import_module(name)
if name == "bench_psa":
    assert module.run(module.parse(arguments)) == 0
else:
    assert module.main(arguments) == 0
from torch._dynamo.utils import counters
print(json.dumps(dict(counters["inductor"])))
"""


def cache_use(script: str, cache: Path, *arguments: str) -> tuple[int, int]:
    """Run a script in a process of its own and return the hits and misses of Inductor's cache."""
    path = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
    env = os.environ | {
        "PYTHONPATH": path,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", RUN, script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    return counted.get("fxgraph_cache_hit", 0), counted.get("fxgraph_cache_miss", 0)


def test_what_was_warmed_up_is_not_compiled_again(tmp_path: Path) -> None:
    options = "--scope module --mode training --stages S4 --batch 2 --memory-format channels_last"
    options += " --input randn --device cpu --reps 1 --no-plot --seconds 500"
    options += " --providers eager fused-compile --out"
    arguments = (*options.split(), str(tmp_path / "out"))
    cache = tmp_path / "cache"
    hits, misses = cache_use("warm_up", cache, *arguments)
    assert misses > 0
    found, again = cache_use("bench_psa", cache, *arguments)
    assert (found, again) == (hits + misses, 0)
