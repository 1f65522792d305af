"""README's code runs as it stands, and the table it shows is the one in benchmarks/results."""

from __future__ import annotations

import csv
import re

import pytest
import torch
from helpers.processes import PAGES, ROOT, python_blocks

import epsanet_fused as ef
from epsanet_fused.inference import conv_planner, optimize
from epsanet_fused.utils import timing

README = PAGES[0].read_text()


def test_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "SECONDS", 0.0)
    monkeypatch.setattr(conv_planner, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "FEWEST_SAMPLES", 1)
    all_candidates = conv_planner.candidates
    monkeypatch.setattr(conv_planner, "candidates", lambda problem: all_candidates(problem)[:2])
    use, operator, training, fuse, inference_block = python_blocks(PAGES[0], needs_more=False)
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
    exec(inference_block, names)
    assert names["fast"](torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_every_python_block_of_the_docs_is_run() -> None:
    """All of them are README's: by the test above, and by tests/integrations."""
    for page in PAGES[1:]:
        assert "```python" not in page.read_text(), page


def results(name: str) -> list[dict[str, str]]:
    file = ROOT / "benchmarks/results/cpu-intel-xeon" / name
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_table_is_the_measured_one() -> None:
    rows = results("tail-inference.csv")
    measured = {(r["stage"], r["provider"]): float(r["ms_p50"]) for r in rows}
    shown = re.findall(r"^(S\d)\s+(\S+)\s+\S+\s+([\d.]+)\s+\[", README, re.MULTILINE)
    assert len(shown) == len(measured)
    for stage, provider, milliseconds in shown:
        assert float(milliseconds) == round(measured[stage, provider], 3)


def test_the_speeds_at_batch_1_are_the_measured_ones() -> None:
    for dtype in ("float32", "bfloat16"):
        low, high = re.search(rf"([\d.]+) to ([\d.]+) times \({dtype}\)", README).groups()
        speeds = [
            float(r["speedup"])
            for r in results("tail-targets.csv")
            if (r["batch"], r["dtype"], r["provider"]) == ("1", dtype, "fused")
        ]
        assert len(speeds) == 8
        assert (float(low), float(high)) == (round(min(speeds), 1), round(max(speeds), 1))


def test_the_network_table_is_the_measured_one() -> None:
    rows = results("network-inference.csv")
    shown = re.findall(r"^\| (float32|bfloat16) \| (\d+) \| (.*) \|$", README, re.MULTILINE)
    providers = ("eager", "compile-freezing", "optimized", "optimized-compile",
                 "resnet50:compile-freezing")  # fmt: skip
    assert len(shown) == len({(r["dtype"], r["batch"]) for r in rows})
    for dtype, batch, numbers in shown:
        measured = {r["provider"]: r for r in rows if (r["dtype"], r["batch"]) == (dtype, batch)}
        for number, provider in zip(numbers.split(" | "), providers, strict=True):
            assert float(number) == round(float(measured[provider]["ms_p50"]), 1)


def test_the_times_of_a_training_step_are_the_measured_ones() -> None:
    measured = {
        (r["dtype"], r["provider"]): f"{float(r['ms_p50']) / 1e3:.2f}"
        for r in results("network-training.csv")
    }
    words = " ".join(README.split())
    shown = re.search(
        r"takes (\S+) s where the .* takes (\S+) s \(float32; (\S+) and (\S+) s", words
    )
    expected = [(d, p) for d in ("float32", "bfloat16") for p in ("planned", "eager")]
    assert list(shown.groups()) == [measured[point] for point in expected]
