"""warm_up.py leaves in the compilers' caches what bench_psa.py compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.processes import BENCHMARKS

# A script of the benchmarks, and then what Inductor says of its cache.
RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
module = __import__(sys.argv[2])
arguments = sys.argv[3:]
if sys.argv[2] == "bench_psa":
    assert module.run(module.parse(arguments)) == 0
else:
    assert module.main(arguments) == 0
from torch._dynamo.utils import counters
print(json.dumps(dict(counters["inductor"])))
"""


def cache_use(script: str, cache: Path, *arguments: str) -> tuple[int, int]:
    """Hits and misses of a run of its own."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", RUN, str(BENCHMARKS), script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    return counted.get("fxgraph_cache_hit", 0), counted.get("fxgraph_cache_miss", 0)


def test_what_was_warmed_up_is_not_compiled_again(tmp_path: Path) -> None:
    arguments = ("--scope", "module", "--mode", "training", "--stages", "S4", "--batch", "2",
                 "--layout", "channels_last", "--input", "randn", "--device", "cpu",
                 "--reps", "1", "--no-plot", "--out", str(tmp_path / "out"), "--seconds", "500",
                 "--providers", "eager", "fused-compile")  # fmt: skip
    cache = tmp_path / "cache"
    hits, misses = cache_use("warm_up", cache, *arguments)
    assert misses > 0
    found, again = cache_use("bench_psa", cache, *arguments)
    assert (found, again) == (hits + misses, 0)
