"""Fills the compilers' caches on disk, so that a measurement that follows needn't wait for them.

    python benchmarks/warm_up.py ...    # what follows is for bench_psa.py

prepares what bench_psa.py would compile, the same cases in the same order, and measures nothing.
Several may run at once, beside checks that aren't timed: compiling takes the processor, not the
card, and these let others go first. What would choose by timing (max-autotune, plans) is left out.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

# Read by Inductor when it is imported. By default it starts a process for each core.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")

import torch
from baselines import baseline_of
from bench_psa import layouts, parse, sweep, words
from inputs import Settings, Source
from providers import PROVIDERS
from torch._inductor import config as inductor

from epsanet_fused.backends.registry import use_backend

COMPILED = ("compile", "compile-reduce-overhead")

# Of the card's memory, for this process: what runs beside it needs some, too.
MOST_MEMORY = {"network": 0.2}


def main(argv: Sequence[str] | None = None) -> int:
    began = time.perf_counter()
    args = parse(argv)
    os.nice(10)
    if args.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(MOST_MEMORY.get(args.scope, 0.1))
    inductor.autotune_local_cache = False  # nothing that was timed here is to be believed later
    names = [name for name in args.providers if name.endswith(COMPILED) and "planned" not in name]
    source = Source(args.input, args.device, dict.fromkeys(filter(None, map(baseline_of, names))))
    for settings in sweep(args):
        for name in names:
            for case in layouts(settings):
                if time.perf_counter() - began > args.seconds:
                    return 0
                if PROVIDERS[name].unavailable(args.device) is None:
                    compile_one(name, source, case)
    return 0


def compile_one(name: str, source: Source, settings: Settings) -> None:
    """Have one provider compiled; if that fails, the benchmark will tell."""
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
        end = f"{time.perf_counter() - began:.0f} s"
    except Exception as error:
        end = f"{type(error).__name__}: {error}"[:300]
    print(f"{words(settings)} {name}: {end}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
