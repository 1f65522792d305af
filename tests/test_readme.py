"""README's and the docs' code runs as it stands; their figures are those of benchmarks/results."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator

import pytest
import torch
from helpers.processes import PAGES, ROOT, python_blocks

import epsanet_fused as ef
from epsanet_fused.inference import conv_planner, optimize
from epsanet_fused.utils import timing

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


def results(name: str) -> list[dict[str, str]]:
    file = ROOT / "benchmarks/results/cpu-intel-xeon" / name
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


# What the columns of README's table hold, for networks and for the tail.
NETWORK = ("eager", "compile-freezing", "optimized", "optimized-compile",
           "resnet50:compile-freezing")  # fmt: skip
TRAINING = ("eager", None, "planned", None, None)
TAIL = ("eager", "compile", "fused", None, None)


@pytest.mark.parametrize(
    ("what", "file", "providers", "digits"),
    [
        ("EPSANet-50, inference", "network-inference.csv", NETWORK, 1),
        ("EPSANet-50, training step", "network-training.csv", TRAINING, 1),
        ("tail, inference, S", "tail-inference.csv", TAIL, 3),
    ],
)
def test_the_table_of_readme_is_the_measured_one(what, file, providers, digits) -> None:
    shown = re.findall(rf"^\| {what}(\d?) \| (\w+) \| (\d+) \|(.*)\|$", README, re.MULTILINE)
    rows = results(file)
    assert len(shown) == len({(r["stage"], r["dtype"], r["batch"]) for r in rows})
    for stage, dtype, batch, cells in shown:
        point = (f"S{stage}" if stage else "all", dtype, batch)
        measured = {
            r["provider"]: float(r["ms_p50"])
            for r in rows
            if (r["stage"], r["dtype"], r["batch"]) == point
        }
        for cell, provider in zip(cells.split("|"), providers, strict=True):
            expected = "" if provider is None else f"{measured[provider]:.{digits}f}"
            assert cell.strip() == expected, (point, provider)


def test_the_output_of_make_bench_is_the_measured_one() -> None:
    rows = results("tail-inference.csv")
    measured = {(r["stage"], r["provider"]): float(r["ms_p50"]) for r in rows}
    pattern = r"^(S\d)\s+(\S+)\s+\S+\s+([\d.]+)\s+\["
    shown = re.findall(pattern, TEXT["performance.md"], re.MULTILINE)
    assert len(shown) == len(measured)
    for stage, provider, milliseconds in shown:
        assert float(milliseconds) == round(measured[stage, provider], 3)


def test_the_speeds_at_batch_1_are_the_measured_ones() -> None:
    words = " ".join(README.split())
    for dtype in ("float32", "bfloat16"):
        low, high = re.search(rf"([\d.]+) to ([\d.]+) times \({dtype}\)", words).groups()
        speeds = [
            float(r["speedup"])
            for r in results("tail-targets.csv")
            if (r["batch"], r["dtype"], r["provider"]) == ("1", dtype, "fused")
        ]
        assert len(speeds) == 8
        assert (float(low), float(high)) == (round(min(speeds), 1), round(max(speeds), 1))


def test_the_times_of_a_training_step_are_the_measured_ones() -> None:
    measured = {
        (r["dtype"], r["provider"]): f"{float(r['ms_p50']) / 1e3:.2f}"
        for r in results("network-training.csv")
    }
    words = " ".join(USAGE.split())
    shown = re.search(
        r"takes (\S+) s where the .* takes (\S+) s \(float32; (\S+) and (\S+) s", words
    )
    expected = [(d, p) for d in ("float32", "bfloat16") for p in ("planned", "eager")]
    assert list(shown.groups()) == [measured[point] for point in expected]
