"""Measure one case after another: check each provider, time it, and write its rows at once."""

from __future__ import annotations

import functools
import gc
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch._inductor import config as inductor

import epsanet_fused as ef
from epsanet_fused.utils.timing import Clock, Variant, interleave
from harness.accuracy import NetworkCheckers
from harness.cases import MEMORY_FORMATS, Case, Source, Workload
from harness.clock import make_clock
from harness.machine import describe
from harness.memory import peak_extra_bytes
from harness.providers import COMPILES, PROVIDERS, QUICK, Prepared
from harness.results import OUT_OF_TIME, WRONG, Results, failure, timing_columns

# The traffic that each mode needs, in units of N: read the branches and write the output; read the
# gradient and the branches, write the branches' gradients; both, where the output is written.
NECESSARY = {"inference": 2, "training": 5, "backward": 3}
# The largest share of the remaining time that one case may spend on preparing its providers.
MAX_PREPARE_SHARE = 0.7
PAIR_SECONDS = 4.0


class Candidate(NamedTuple):
    """A provider's row, and its step if the result is right."""

    row: dict[str, object]
    prepared: Prepared | None


class Runner:
    """Measures cases.

    Args:
        source: makes the workloads.
        providers: names; those that can't run here are left out, see ``skipped``.
        caches: "warm", "cold" or both.
        results: where the rows go.
        reps: the largest number of samples of a timing.
        pairs: time each provider against the first as soon as it is ready.
        trace: the folder for a profiler's trace of each step, or None.
    """

    def __init__(
        self,
        source: Source,
        providers: Sequence[str],
        caches: Sequence[str],
        results: Results,
        reps: int = 200,
        pairs: bool = False,
        trace: Path | None = None,
    ) -> None:
        self.source = source
        self.device = source.device
        self.results = results
        self.reps = reps
        self.pairs = pairs
        self.trace = trace
        self.clocks: dict[str, Clock] = {c: make_clock(self.device, c == "cold") for c in caches}
        self.environment = describe(self.device)
        reasons = {n: PROVIDERS[n].unavailable_reason(self.device) for n in providers}
        self.skipped = {name: reason for name, reason in reasons.items() if reason}
        self.names = [name for name in providers if name not in self.skipped]
        gc.collect()
        gc.freeze()  # or each collection would take as long as a case of the tail
        if pairs:  # after the first, those that are ready soonest
            self.names[1:] = sorted(self.names[1:], key=lambda name: PROVIDERS[name].cost)

    # Dynamo counts all compilations of one forward together, and gives up without an error.
    @torch._dynamo.config.patch(recompile_limit=100, fail_on_recompile_limit_hit=True)
    def measure(self, case: Case, seconds: float, left: float) -> None:
        """Check every provider against the oracle, then time those that pass.

        Args:
            case: to measure. The memory format "best" is the faster one of each provider.
            seconds: this case's share of the remaining time.
            left: all of the remaining time. Without ``pairs`` compiling may take more than the
                share; when it has taken most of ``left``, the remaining providers are skipped.
        """
        began = time.perf_counter()
        # The compilations of earlier cases would count against the limit above.
        torch._dynamo.reset()
        try:
            with torch.set_grad_enabled(case.mode != "inference"):
                workloads = {c: self.source.workload(c) for c in in_each_format(case)}
                if self.pairs:
                    self._measure_pairs(workloads, began + seconds)
                else:
                    deadline = began + MAX_PREPARE_SHARE * left
                    self._measure_together(workloads, deadline, began + seconds)
        except RuntimeError as error:  # for example, for lack of memory
            self.results.add(self.row(case, "all") | failure(error))
        gc.collect()

    def _measure_together(
        self, workloads: Mapping[Case, Workload], deadline: float, end: float
    ) -> None:
        """Prepare all providers, then time them in turns."""
        first, workload = next(iter(workloads.items()))
        checkers = NetworkCheckers()
        found: dict[str, Candidate] = {}
        for name in self._fitting(first):
            if found and time.perf_counter() > deadline:
                found[name] = Candidate(self.row(first, name) | {"note": OUT_OF_TIME}, None)
            else:
                found[name] = self._prepare_best(name, workloads, checkers)
        rows = self._time(first, workload, found, max(0.0, end - time.perf_counter()))
        for row in rows:
            self.results.add(row)

    def _measure_pairs(self, workloads: Mapping[Case, Workload], deadline: float) -> None:
        """Time each provider against the first one, and write its rows before the next is made."""
        case, workload = next(iter(workloads.items()))
        checkers = NetworkCheckers()
        first: dict[str, Candidate] = {}
        for name in self._fitting(case):
            if first and time.perf_counter() > deadline:
                self.results.add(self.row(case, name) | {"note": OUT_OF_TIME})
                continue
            candidate = self._prepare_best(name, workloads, checkers)
            first = first or {name: candidate}
            seconds = min(PAIR_SECONDS, max(0.0, deadline - time.perf_counter()))
            try:
                rows = self._time(case, workload, first | {name: candidate}, seconds)
            except RuntimeError as error:  # for example, for lack of memory
                rows = [candidate.row | failure(error)]
            for row in rows:
                if row["provider"] in ((name, "copy") if name in first else (name,)):
                    self.results.add(row)
            del candidate
            gc.collect()

    # Timings taken beside other processes must not stay in the cache.
    @inductor.patch(autotune_local_cache=False)
    def prepare_only(self, case: Case, deadline: float) -> None:
        """Compile what measuring the case would compile, and fill the caches on disk with it.

        Providers that choose by timing are left out.
        """
        torch._dynamo.reset()
        names = [n for n in self._fitting(case) if PROVIDERS[n].cost in (QUICK, COMPILES)]
        names.sort(key=lambda name: -PROVIDERS[name].cost)
        workloads = {c: self.source.workload(c) for c in in_each_format(case)}
        for name, (each, workload) in itertools.product(names, workloads.items()):
            began = time.perf_counter()
            if began > deadline:
                return
            try:
                run_once(name, each, workload)
                result = f"{time.perf_counter() - began:.0f} s"
            except Exception as error:  # the measurement will report it
                result = f"{type(error).__name__}: {error}"[:300]
            print(f"{' '.join(map(str, each))} {name}: {result}", flush=True)

    def _fitting(self, case: Case) -> list[str]:
        return [name for name in self.names if PROVIDERS[name].fits(case.scope, case.mode)]

    def _prepare_best(
        self, name: str, workloads: Mapping[Case, Workload], checkers: NetworkCheckers
    ) -> Candidate:
        """Prepare and check a provider in its faster memory format."""
        tried = list(workloads.items())[: 1 if PROVIDERS[name].any_format else None]
        candidates = [self._prepare(name, *point, checkers) for point in tried]
        right = {i: c.prepared for i, c in enumerate(candidates) if c.prepared is not None}
        best = next(iter(right), 0)
        if len(right) > 1:
            variants = {i: make_variant(prepared) for i, prepared in right.items()}
            timings = interleave(variants, next(iter(self.clocks.values())), reps=5, seconds=0)
            best = min(timings, key=lambda i: timings[i].p50)
        for i, candidate in enumerate(candidates):
            if candidate.row["ok"] is False and i != best:
                self.results.add(candidate.row)
        if self.trace is not None and candidates[best].prepared is not None:
            self._write_trace(*candidates[best])
        return candidates[best]

    def _prepare(
        self, name: str, case: Case, workload: Workload, checkers: NetworkCheckers
    ) -> Candidate:
        """Prepare a provider, compare its result with the expected one, and measure its memory."""
        row = self.row(case, name)
        try:
            prepared = PROVIDERS[name].prepare(workload, case)
            with ef.use_backend(prepared.choice):
                accuracy = checkers.check(name, prepared.step(), workload, case)
                if accuracy.ok and prepared.memory_step is not None:
                    row["peak_extra_bytes"] = peak_extra_bytes(prepared.memory_step, self.device)
        except Exception as error:  # an error of one provider must not end the others
            refused = isinstance(error, ValueError) and PROVIDERS[name].refuses
            return Candidate(row | ({"note": str(error)} if refused else failure(error)), None)
        error, bound, ok = accuracy
        row |= {"max_error": float(f"{error:.3g}"), "error_bound": float(f"{bound:.3g}"), "ok": ok}
        row["backend"] = prepared.backend
        return Candidate(row, prepared) if ok else Candidate(row | {"note": WRONG}, None)

    def _time(
        self, case: Case, workload: Workload, candidates: Mapping[str, Candidate], seconds: float
    ) -> list[dict[str, object]]:
        """Time the candidates in turns with every clock; return a row for each and each clock."""
        rows = {name: candidate.row for name, candidate in candidates.items()}
        variants = {n: make_variant(c.prepared) for n, c in candidates.items() if c.prepared}
        if workload.output_bytes is not None:
            for row in rows.values():
                row["necessary_bytes"] = NECESSARY[case.mode] * workload.output_bytes
            out = torch.cat([x.detach() for x in workload.inputs], 1)
            variants["copy"] = Variant(out.clone)
            rows["copy"] = self.row(case, "copy") | {"backend": "pytorch"}
            rows["copy"]["necessary_bytes"] = NECESSARY["inference"] * workload.output_bytes
        found = []
        for cache, clock in self.clocks.items():
            timings = interleave(variants, clock, self.reps, seconds / len(self.clocks))
            first = timings.get(next(iter(candidates)))
            for name, row in rows.items():
                timed = {"cache": cache, "clock": clock.name}
                if name in timings:
                    timed |= timing_columns(timings[name], first)
                found.append(row | timed)
        return found

    def _write_trace(self, row: Mapping[str, object], prepared: Prepared) -> None:
        """Write a trace of one call, to open in https://ui.perfetto.dev."""
        words = (row[key] for key in ("mode", "case", "batch", "dtype", "memory_format"))
        name = "-".join(str(word) for word in (row["provider"], *words)).replace(":", "-")
        with ef.use_backend(prepared.choice), torch.profiler.profile() as profiled:
            prepared.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        profiled.export_chrome_trace(str(self.trace / f"trace-{name}.json"))

    def row(self, case: Case, provider: str) -> dict[str, object]:
        """Return a row without results."""
        about = {"provider": provider, "input": self.source.input, "ok": ""}
        return case._asdict() | self.environment | about


def in_each_format(case: Case) -> list[Case]:
    """Return the case in every memory format to try: for "best" in all of them."""
    best = case.memory_format == "best"
    formats = tuple(MEMORY_FORMATS) if best else (case.memory_format,)
    return [case._replace(memory_format=name) for name in formats]


def run_once(name: str, case: Case, workload: Workload) -> None:
    """Prepare a provider and run its step once."""
    with torch.set_grad_enabled(case.mode != "inference"):
        prepared = PROVIDERS[name].prepare(workload, case)
        with ef.use_backend(prepared.choice):
            prepared.step()


def make_variant(prepared: Prepared) -> Variant:
    """Wrap a step for ``interleave``, which runs it with its backend."""
    return Variant(prepared.step, functools.partial(ef.use_backend, prepared.choice))
