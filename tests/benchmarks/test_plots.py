"""Test the pictures: what they show of a CSV file, and nothing else is needed."""

from __future__ import annotations

import struct
from pathlib import Path

import plots
import pytest
from harness.results import WRONG, Results
from helpers.processes import PNG, ROOT, script

MACHINE = {"device": "Some CPU", "threads": "3", "torch": "9.9", "epsanet_fused": "0.7"}
NETWORK = {"scope": "network", "mode": "inference", "case": "all", "batch": 4}
TAIL = {"scope": "tail", "mode": "backward", "case": "S2", "batch": 4, "cache": "warm"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Write results of a network, a tail and ResNet-50, one of them wrong."""
    results = Results(tmp_path / "results.csv")

    def add(point: dict[str, object], provider: str, ms: float | str, **columns: object) -> None:
        about = {"dtype": "float32", "memory_format": "nchw", "provider": provider, "ok": True}
        results.add(MACHINE | point | about | {"ms_p50": ms, "clock": "wall time"} | columns)

    add(NETWORK, "eager", 40.0, peak_extra_bytes=8e6)
    add(NETWORK, "eager", 30.0, memory_format="channels_last", peak_extra_bytes=9e6)
    add(NETWORK, "optimized", 12.5, peak_extra_bytes=5e6)
    add(NETWORK, "openvino", 20.0, backend="openvino 1.2 f32")
    add(NETWORK, "resnet50:eager", 25.0, peak_extra_bytes=7e6)
    add(NETWORK, "compile", "", ok=False, note=WRONG)
    add(NETWORK, "fused", "", note="skipped: out of time")
    add(TAIL, "eager", 8.0, necessary_bytes=3000, peak_extra_bytes=3e6)
    add(TAIL, "fused", 2.0, necessary_bytes=3000, peak_extra_bytes=1e6)
    add(TAIL | {"mode": "training"}, "eager", 9.0, peak_extra_bytes=4e6)
    add(TAIL, "copy", 1.0, necessary_bytes=2000)
    return tmp_path / "results.csv"


def bars(axes: object) -> dict[str, float]:
    """Return the width of each bar by its label."""
    labels = [text.get_text() for text in axes.get_yticklabels()]
    return {labels[round(p.get_y() + 0.4)]: p.get_width() for p in axes.patches}


def texts(axes: object) -> list[str]:
    return [text.get_text().strip() for text in axes.texts]


def test_three_pictures_of_at_most_1600_by_1000_pixels(file, tmp_path):
    done = script("plots.py", file, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("network", "tail", "memory"):
        data = (tmp_path / f"{name}.png").read_bytes()
        assert data.startswith(PNG)
        width, height = struct.unpack(">II", data[16:24])
        assert 600 < width <= 1600 and 100 < height <= 1000
    assert {p.name for p in tmp_path.iterdir()} == {
        "results.csv", "network.png", "tail.png", "memory.png"
    }  # fmt: skip


def test_network_has_each_provider_in_its_faster_memory_format(file):
    panels = plots.network_panels(plots.load([file]))
    figure = plots.draw("Title", "ms", panels)
    [axes] = figure.axes
    assert bars(axes) == {
        "official, eager": 30.0,
        "this package, optimized": 12.5,
        "official, OpenVINO": 20.0,
        "ResNet-50, eager": 25.0,
    }
    assert sorted(texts(axes)) == ["12.5", "20", "25", "30", "WRONG"]
    marked = [y for y, text in enumerate(axes.get_yticklabels()) if "compile" in text.get_text()]
    [wrong] = [text for text in axes.texts if "WRONG" in text.get_text()]
    assert [wrong.get_position()[1]] == marked
    assert axes.get_title() == "inference, float32, batch 4"
    title = figure._suptitle.get_text()
    for words in ("Some CPU", "3 thread(s)", "torch 9.9", "epsanet_fused 0.7", "openvino 1.2"):
        assert words in title


def test_tail_is_shown_in_percent_of_a_copy_of_the_necessary_bytes(file):
    panels = plots.tail_panels(plots.load([file]))
    figure = plots.draw("Title", "percent", panels, 100.0)
    [axes] = figure.axes
    # A copy of 2,000 bytes takes 1 ms, so 3,000 bytes take 1.5 ms at its speed.
    assert bars(axes) == pytest.approx({"official, eager": 18.75, "this package, fused": 75.0})
    assert axes.get_xlim()[1] > 100
    assert [line.get_xdata()[0] for line in axes.lines] == [100.0]


def test_axes_are_linear_and_start_at_zero(file):
    rows = plots.load([file])
    for name, (panels_for, title, unit, limit) in plots.PICTURES.items():
        for axes in plots.draw(title, unit, panels_for(rows), limit).axes:
            assert axes.get_xscale() == "linear", name
            assert axes.get_xlim()[0] == 0


def test_a_provider_has_one_colour_everywhere(file):
    names = [name for name in plots.PROVIDERS if not name.startswith("resnet50:")]
    colours = {name: plots.style(name)[1] for name in names}
    usual = [colours[name] for name in plots.STYLES]
    assert len(set(usual)) == len(usual)
    for name in plots.PROVIDERS:
        assert plots.style(name)[1] == colours[name.removeprefix("resnet50:")]
    hatches = {plots.style(name)[2] for name in ("resnet50:eager", "resnet50:optimized")}
    assert hatches != {plots.style("eager")[2]}


def test_memory_leaves_out_the_backward_and_what_nobody_measured(file):
    panels = plots.memory_panels(plots.load([file]))
    assert list(panels) == [
        "network, inference, float32, batch 4",
        "tail, training, float32, batch 4",
    ]
    found = {
        row.provider: row.value
        for row in panels["network, inference, float32, batch 4"].itertuples()
    }
    assert found == {"optimized": 5.0, "resnet50:eager": 7.0, "eager": 9.0}


def test_files_that_are_not_of_the_benchmarks_are_refused_in_one_line(tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit) as stopped:
        plots.main([str(other), "--out", str(tmp_path)])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "must be CSV files of the benchmarks, but they lack scope" in message


def test_a_file_without_measurements_has_no_picture(tmp_path, capsys):
    Results(tmp_path / "results.csv").add({"provider": "all", "note": "skipped: out of time"})
    assert plots.main([str(tmp_path / "results.csv"), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no row to draw\n"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/results/*/**/results.csv")), ids=str)
def test_every_kept_file_can_be_drawn(path, tmp_path):
    assert plots.draw_all([path], tmp_path)
