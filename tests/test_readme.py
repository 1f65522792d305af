"""README's and the docs' code runs as it stands; their figures are those of benchmarks/results."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from harness.results import read_rows
from helpers.processes import PAGES, ROOT, python_blocks

import epsanet_fused as ef
from epsanet_fused.inference import conv_planner, optimize
from epsanet_fused.utils import timing
from epsanet_fused.utils.timing import Timing

TEXT = {page.name: page.read_text() for page in PAGES}
README, USAGE = TEXT["README.md"], TEXT["usage.md"]
PATHS = {page.name: page for page in PAGES}


@pytest.fixture
def quick_measurements(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measure two candidates of each convolution once; one thread, as it waits for no other."""
    monkeypatch.setattr(optimize, "SECONDS", 0.0)
    monkeypatch.setattr(conv_planner, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "MIN_SAMPLES", 1)
    all_candidates = conv_planner.candidates
    monkeypatch.setattr(conv_planner, "candidates", lambda problem: all_candidates(problem)[:2])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("quick_measurements")
def test_the_example_of_readme_runs() -> None:
    [use] = python_blocks(PATHS["README.md"], needs_more=False)
    names: dict[str, object] = {}
    exec(use, names)
    assert names["logits"].shape == (2, 10)
    assert names["fast"](torch.randn(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_measurements")
def test_the_examples_of_usage_run() -> None:
    use, operator, fuse, training = python_blocks(PATHS["usage.md"], needs_more=False)
    names: dict[str, object] = {}
    exec(use, names)
    assert names["logits"].shape == (2, 10)
    se = ef.SEWeightModule(16)
    names["branches"] = [torch.randn(2, 16, 5, 5) for _ in range(4)]
    names |= {"fc1_weight": se.fc1.weight, "fc1_bias": se.fc1.bias}
    names |= {"fc2_weight": se.fc2.weight, "fc2_bias": se.fc2.bias}
    exec(operator, names)
    assert names["out"].shape == (2, 64, 5, 5)
    exec(training, names)
    assert names["images"].shape == (2, 3, 224, 224)
    names["model"] = ef.epsanet50(num_classes=10, fused=False)
    exec(fuse, names)
    assert isinstance(names["model"].layer4[2].conv2, ef.FusedPSAModule)


def test_every_python_block_is_run() -> None:
    """They are in README and usage.md: run by the tests above, and by tests/integrations."""
    for name, text in TEXT.items():
        assert name in ("README.md", "usage.md") or "```python" not in text, name
    assert python_blocks(PATHS["README.md"], needs_more=True) == []


RESULTS = read_rows(ROOT / "benchmarks/results/cpu-amd-epyc/results.csv")
# The rows of the tables by their labels: the provider in inference, and in training.
PROVIDERS = {
    "official, eager": ("eager", "eager"),
    "official, torch.compile": ("compile-freezing", None),
    "official, ONNX Runtime": ("onnxruntime", None),
    "official, OpenVINO": ("openvino", None),
    "this package": ("optimized", "planned"),
    "this package, torch.compile": ("optimized-compile", None),
}
POINTS = [(dtype, batch) for dtype in ("float32", "bfloat16") for batch in ("1", "8")]


def timed(scope: str, mode: str, provider: str | None, **columns: str) -> dict[str, str] | None:
    """Return the fastest row of a provider, or None if it was not timed."""
    wanted = columns | {"scope": scope, "mode": mode, "provider": provider}
    rows = [r for r in RESULTS if r["ms_p50"] and all(r[k] == v for k, v in wanted.items())]
    return min(rows, key=lambda r: float(r["ms_p50"]), default=None)


def table_rows(text: str, heading: str) -> dict[str, list[str]]:
    """Return the cells of a table by the label of each row; the table's first cell is given."""
    found = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    lines = [line.strip("|").split("|") for line in found[1].splitlines()]
    return {label.strip(): [cell.strip() for cell in cells] for label, *cells in lines}


def milliseconds(row: dict[str, str] | None, digits: int) -> str:
    return "" if row is None else f"{float(row['ms_p50']):.{digits}f}"


def networks(provider: tuple[str | None, str | None], baseline: str = "") -> list[str]:
    """Return the cells of README's first table."""
    inference, training = (name and baseline + name for name in provider)
    cells = [
        milliseconds(timed("network", "inference", inference, dtype=dtype, batch=batch), 1)
        for dtype, batch in POINTS
    ]
    for dtype in ("float32", "bfloat16"):
        row = timed("network", "training", training, dtype=dtype)
        cells.append(milliseconds(row, 1))
    return cells


def test_the_networks_of_readme_are_the_measured_ones() -> None:
    shown = table_rows(README, "ms")
    fewer = PROVIDERS.keys() - {"this package, torch.compile"}
    assert set(shown) == {*fewer, "ResNet-50, fastest of these"}
    for label in fewer:
        assert shown[label] == networks(PROVIDERS[label]), label
    others = [networks(provider, "resnet50:") for provider in PROVIDERS.values()]
    fastest = [
        min((cell for cell in cells if cell), key=float) for cells in zip(*others, strict=True)
    ]
    assert shown["ResNet-50, fastest of these"] == fastest


def test_the_tails_of_readme_are_the_measured_ones() -> None:
    shown = table_rows(README, "tail, ms")
    providers = {"official, eager": "eager", "official, torch.compile": "compile"}
    providers["this package"] = "fused"
    assert set(shown) == set(providers)
    for label, provider in providers.items():
        point = {"batch": "8", "dtype": "float32", "memory_format": "nchw"}
        rows = [timed("tail", "inference", provider, case=f"S{i}", **point) for i in (1, 2, 3, 4)]
        assert shown[label] == [milliseconds(row, 3) for row in rows], label


def test_the_networks_of_performance_are_the_measured_ones() -> None:
    """The same in docs/performance.md, ResNet-50 by each provider included, with the memory."""
    for heading, baseline in (("EPSANet-50", ""), ("ResNet-50", "resnet50:")):
        shown = table_rows(TEXT["performance.md"], heading)
        assert set(shown) == set(PROVIDERS)
        for label, (provider, _) in PROVIDERS.items():
            for cell, (dtype, batch) in zip(shown[label], POINTS, strict=True):
                row = timed("network", "inference", baseline + provider, dtype=dtype, batch=batch)
                peak = row and row["peak_extra_bytes"]
                memory = f", {float(peak) / 1e6:.1f} MB" if peak else ""
                expected = "" if row is None else f"{milliseconds(row, 1)} ms{memory}"
                assert cell == expected, (label, dtype, batch)


def interval(row: dict[str, str]) -> Timing:
    names = ("ms_p20", "ms_p50", "ms_p80", "ms_low", "ms_high")
    return Timing(*(float(row[name]) for name in names), int(row["samples"]))


def test_who_wins_in_performance_is_what_was_measured() -> None:
    """The speed-ups over the others, and "tie" where the intervals of the medians overlap."""
    lines = re.findall(
        r"^\| (float32|bfloat16) \| (1|8) \| (\d.*) \|$", TEXT["performance.md"], re.MULTILINE
    )
    assert len(lines) == len(POINTS)
    for dtype, batch, cells in lines:
        point = {"dtype": dtype, "batch": batch}
        found = {
            label: timed("network", "inference", provider, **point)
            for label, (provider, _) in PROVIDERS.items()
        }
        ours = interval(found["this package"])
        others = [row for label, row in found.items() if label.startswith("official")]
        for cell, row in zip(cells.split(" | "), others, strict=False):
            theirs = row and interval(row)
            expected = "" if theirs is None else f"{theirs.p50 / ours.p50:.2f}x"
            expected += " (tie)" if theirs is not None and theirs.ties(ours) else ""
            assert re.sub(r", .*", "", cell).strip() == expected, (dtype, batch)


def test_the_output_of_make_bench_is_the_measured_one() -> None:
    pattern = r"^(S\d)\s+(\S+)\s+\S+\s+([\d.]+)\s+\["
    shown = re.findall(pattern, TEXT["performance.md"], re.MULTILINE)
    assert len(shown) == 20
    for stage, provider, found in shown:
        point = {"batch": "8", "dtype": "float32", "memory_format": "nchw", "case": stage}
        assert found == milliseconds(timed("tail", "inference", provider, **point), 3)


def speeds(dtype: str, batch: str) -> list[float]:
    """Return the tail's speed-ups over the official one, in both memory formats."""
    rows = [
        timed("tail", "inference", "fused", dtype=dtype, batch=batch, case=f"S{i}", memory_format=f)
        for f in ("nchw", "channels_last")
        for i in (1, 2, 3, 4)
    ]
    return [float(row["speedup"]) for row in rows]


def test_the_speeds_at_batch_1_are_the_measured_ones() -> None:
    words = " ".join(README.split())
    for dtype in ("float32", "bfloat16"):
        low, high = re.search(rf"([\d.]+) to ([\d.]+) times \({dtype}\)", words).groups()
        found = speeds(dtype, "1")
        assert (float(low), float(high)) == (round(min(found), 1), round(max(found), 1))


def test_the_speeds_of_the_tail_in_performance_are_the_measured_ones() -> None:
    lines = re.findall(
        r"^\| (float32|bfloat16) \| (1|16) \| (nchw|channels_last) \| \d+x \|(.*)\|$",
        TEXT["performance.md"],
        re.MULTILINE,
    )
    assert len(lines) == 8
    for dtype, batch, memory_format, cells in lines:
        for i, cell in enumerate(cells.split("|"), 1):
            point = {"dtype": dtype, "batch": batch, "memory_format": memory_format}
            ours, eager, compiled = (
                float(timed("tail", "inference", name, case=f"S{i}", **point)["ms_p50"])
                for name in ("fused", "eager", "compile")
            )
            expected = f"{1e3 * ours:.0f} us, {eager / ours:.1f}x, {compiled / ours:.1f}x"
            assert cell.strip().removesuffix(" **short**") == expected, (dtype, batch, i)


def test_the_times_of_a_training_step_are_the_measured_ones() -> None:
    measured = {
        (
            dtype,
            provider,
        ): f"{float(timed('network', 'training', provider, dtype=dtype)['ms_p50']) / 1e3:.2f}"
        for dtype in ("float32", "bfloat16")
        for provider in ("planned", "eager")
    }
    words = " ".join(USAGE.split())
    shown = re.search(
        r"takes (\S+) s where the .* takes (\S+) s \(float32; (\S+) and (\S+) s", words
    )
    assert list(shown.groups()) == list(measured.values())
