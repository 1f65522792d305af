"""Fill the compilers' caches on disk, so that a later measurement does not compile.

    python benchmarks/warm_up.py ...    # the arguments of bench_psa.py

Prepares the cases that bench_psa.py would compile, in the same order, and measures nothing. Several
such processes may run at once, beside checks that are not timed: compiling needs the CPU and not
the GPU, and these processes have low priority. Providers that choose by timing (max-autotune,
plans) are left out.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

# Inductor reads this when it is imported. By default it starts one process for each core.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")

import torch
from baselines import baseline_of
from bench_psa import each_memory_format, parse, sweep, words
from inputs import Settings, Source
from providers import PROVIDERS
from torch._inductor import config as inductor

from epsanet_fused.backends.registry import use_backend

COMPILED = ("compile", "compile-reduce-overhead")

# This process's share of the GPU's memory: other processes need memory at the same time.
MEMORY_SHARE = {"network": 0.2}


def main(argv: Sequence[str] | None = None) -> int:
    """Compile every provider at every point until the time is over."""
    began = time.perf_counter()
    args = parse(argv)
    os.nice(10)
    if args.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE.get(args.scope, 0.1))
    # Timings taken beside other processes must not stay in the cache.
    inductor.autotune_local_cache = False
    names = [name for name in args.providers if name.endswith(COMPILED) and "planned" not in name]
    baselines = dict.fromkeys(filter(None, map(baseline_of, names)))
    source = Source(args.input, args.device, baselines)
    points = [
        (name, settings)
        for point in sweep(args)
        for name in names
        for settings in each_memory_format(point)
    ]
    for name, settings in points:
        if time.perf_counter() - began > args.seconds:
            return 0
        if PROVIDERS[name].unavailable_reason(args.device) is None:
            compile_one(name, source, settings)
    return 0


def compile_one(name: str, source: Source, settings: Settings) -> None:
    """Compile one provider. An error is printed: the benchmark will report it."""
    if not PROVIDERS[name].fits(settings.scope, settings.mode):
        return
    began = time.perf_counter()
    torch._dynamo.reset()
    try:
        workload = source.workload(settings)
        with torch.set_grad_enabled(settings.mode != "inference"):
            prepared = PROVIDERS[name].prepare(workload, settings.mode, settings.autocast)
            with use_backend(prepared.choice):
                prepared.step()
        result = f"{time.perf_counter() - began:.0f} s"
    except Exception as error:
        result = f"{type(error).__name__}: {error}"[:300]
    print(f"{words(settings)} {name}: {result}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
