"""Test that the plots show the values of the CSV files."""

from __future__ import annotations

import itertools

import plots
import pytest
import report
from helpers.processes import PNG, script

pytest.importorskip("matplotlib")


def row(**settings: object) -> dict[str, str]:
    plain = {
        "scope": "tail", "mode": "inference", "stage": "S1", "batch": 1, "dtype": "float32",
        "layout": "nchw", "cache": "warm", "provider": "fused", "device": "a GPU",
        "ms_p20": 1, "ms_p50": 2, "ms_p80": 4, "speedup": 3, "gbps": 500,
        "peak_extra_bytes": 7e6,
    }  # fmt: skip
    return {k: str(v) for k, v in (dict.fromkeys(report.COLUMNS, "") | plain | settings).items()}


def test_folder_of_csv_files_is_plotted(tmp_path):
    tail = [row(provider=name) for name in ("eager", "fused", "copy")]
    network = row(scope="network", stage="all", speedup="", gbps="")
    report.write_csv(tmp_path / "tail.csv", tail)
    report.write_csv(tmp_path / "network.csv", [network, row(ms_p50="", speedup="", gbps="")])
    (tmp_path / "other.csv").write_text("stage,ms\nS1,3\n")
    done = script("plots.py", tmp_path)
    assert done.returncode == 0, done.stderr
    names = {"speedup.png", "bandwidth.png", "latency.png", "memory.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == names
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in names)
    plots.draw_all(tmp_path / "plots.pdf", tail)
    assert (tmp_path / "plots.pdf").read_bytes().startswith(b"%PDF")


def test_each_panel_has_one_dtype_cache_mode_and_memory_format():
    axes = {
        "mode": ("inference", "backward"),
        "dtype": ("float32", "float16"),
        "layout": ("nchw", "channels_last"),
        "cache": ("warm", "cold"),
        "batch": (1, 128),
        "provider": ("eager", "fused", "copy"),
    }
    points = itertools.product(*axes.values())
    rows = [row(**dict(zip(axes, point, strict=True))) for point in points]
    panels = plots.panels_of(plots.TOPICS["speedup"], rows)
    assert len(panels) == 4
    for title, shown in panels.items():
        assert "float16" in title and "cold" in title and "a GPU" in title
        assert len({(r["mode"], r["dtype"], r["layout"], r["cache"]) for r in shown}) == 1
        assert {r["provider"] for r in shown} == {"eager", "fused"}
        assert {r["batch"] for r in shown} == {"1", "128"}
    memory = plots.panels_of(plots.TOPICS["memory"], rows)
    assert all(r["batch"] == "128" for shown in memory.values() for r in shown)


def test_with_convolutions_the_faster_memory_format_is_shown():
    rows = [
        row(scope="network", stage="all", layout=name, ms_p20=ms - 1, ms_p50=ms, ms_p80=ms + 2)
        for name, ms in (("nchw", 20), ("channels_last", 10))
    ]
    topic = plots.TOPICS["latency"]
    [(title, shown)] = plots.panels_of(topic, rows).items()
    assert title.startswith("network, inference, float32, batch 1\n")
    assert plots.series_of(topic, shown) == {"fused": {"all": (9, 10, 12)}}


def test_the_network_beside_resnet50_has_a_panel_per_dtype_and_batch():
    rows = [
        row(scope="network", dtype=dtype, batch=batch, provider=provider, ms_p50=ms, layout=name)
        for dtype, batch in (("bfloat16", 1), ("float32", 8), ("float32", 1))
        for provider, ms in (("eager", 20), ("optimized", 10), ("resnet50:eager", 15))
        for name, ms in (("nchw", ms), ("channels_last", ms + 1))
    ]
    axes = plots.network_figure([*rows, row(), row(scope="network", mode="training")]).axes
    titles = ["float32, batch 1", "float32, batch 8", "bfloat16, batch 1"]
    assert [ax.get_title() for ax in axes if ax.get_title()] == titles
    assert [bar.get_width() for bar in axes[0].patches] == [20, 10, 15]
    assert axes[0].get_xlim()[0] == 0


def test_folder_without_results_is_refused(tmp_path):
    done = script("plots.py", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path} has none" in done.stderr
