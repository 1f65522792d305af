"""Draw plots from the CSV files of bench_psa.py.

    python benchmarks/plots.py benchmarks/results/cpu-intel-xeon

reads all such files in the folder and draws up to four plots: the speed-up of the tail by stage and
batch, its bandwidth beside that of a copy, the latency of the network beside ResNet-50's, and the
peak memory of a call.

    python benchmarks/plots.py benchmarks/results/cpu-intel-xeon --network

draws one plot, network.png: the network in inference beside ResNet-50, as README shows it.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from report import COLUMNS, CsvRow, ResultRow, label, read_csv, varying_axes

from epsanet_fused.utils.atomic_write import write_atomically

Value = tuple[float, float, float]  # low, middle, high
# For each series, for example a provider, its values by place on the x axis.
Series = Mapping[str, Mapping[str, Value]]
# A plot shows one dtype and one cache: the first of these that was measured.
DTYPES = ("float16", "bfloat16", "float32")
CACHES = ("cold", "warm")


class Topic(NamedTuple):
    """One plot: the rows and the value that it shows."""

    scopes: tuple[str, ...]
    value: Callable[[ResultRow], Value]
    unit: str
    column: str  # rows without a value in it are left out
    batches: str  # "beside": all in one panel; "apart": a panel for each; "largest": the largest


def _milliseconds(row: ResultRow) -> Value:
    low, middle, high = (float(str(row[f"ms_{p}"])) for p in ("p20", "p50", "p80"))
    return low, middle, high


def _scaled(column: str, by: float = 1.0) -> Callable[[ResultRow], Value]:
    return lambda row: (float(str(row[column])) * by,) * 3


TAILS, WITH_CONVS = ("tail", "norm"), ("module", "block", "network")
TOPICS = {
    "speedup": Topic(TAILS, _scaled("speedup"), "times as fast as eager", "speedup", "beside"),
    "bandwidth": Topic(("tail",), _scaled("gbps"), "GB/s of necessary bytes", "gbps", "beside"),
    "latency": Topic(WITH_CONVS, _milliseconds, "ms (median, p20 to p80)", "ms_p50", "apart"),
    "memory": Topic(
        (*TAILS, *WITH_CONVS),
        _scaled("peak_extra_bytes", 1e-6),
        "peak extra memory, MB",
        "peak_extra_bytes",
        "largest",
    ),
}


def rows_in(folder: Path) -> list[CsvRow]:
    """Read all rows of bench_psa.py in the folder. Other CSV files are left out."""
    tables = [read_csv(path) for path in sorted(folder.glob("*.csv"))]
    return [row for rows in tables if rows and set(COLUMNS) <= set(rows[0]) for row in rows]


def draw_all(path: Path, rows: Sequence[ResultRow]) -> None:
    """Write all plots into one PDF file, a page for each. Without matplotlib, write nothing."""
    try:
        pyplot()
    except ModuleNotFoundError:
        return
    from matplotlib.backends.backend_pdf import PdfPages

    data = io.BytesIO()
    with PdfPages(data) as pages:
        for figure in figures(rows).values():
            pages.savefig(figure)
            pyplot().close(figure)
    write_atomically(path, data.getvalue())


def figures(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Draw a figure for each topic that has rows."""
    panels = {name: panels_of(topic, rows) for name, topic in TOPICS.items()}
    return {name: _figure(TOPICS[name], found) for name, found in panels.items() if found}


def panels_of(topic: Topic, rows: Sequence[ResultRow]) -> dict[str, list[ResultRow]]:
    """Return the rows of each panel by the panel's title."""
    timed = [row for row in rows if row["ms_p50"] != ""]
    shown = [row for row in timed if row["scope"] in topic.scopes and row[topic.column] != ""]
    if topic.column == "speedup":  # a copy does not compute the tail
        shown = [row for row in shown if row["provider"] != "copy"]
    kinds = dict.fromkeys(map(_kind, shown))
    panels: dict[str, list[ResultRow]] = {}
    for kind in kinds:
        of_kind = [row for row in shown if _kind(row) == kind]
        for axis, order in (("dtype", DTYPES), ("cache", CACHES)):
            first = next(value for value in order if any(r[axis] == value for r in of_kind))
            of_kind = [row for row in of_kind if row[axis] == first]
        if topic.batches == "largest":
            largest = max(int(str(row["batch"])) for row in of_kind)
            of_kind = [row for row in of_kind if row["batch"] == str(largest)]
        for row in of_kind:
            panels.setdefault(_title(topic, row), []).append(row)
    return panels


def _kind(row: ResultRow) -> tuple[object, ...]:
    """Return what is compared in one panel: rows of one step on one device."""
    return row["scope"], row["mode"], row["device"], row.get("step", "")


def _title(topic: Topic, row: ResultRow) -> str:
    words = [row["scope"], row["mode"], row["dtype"]]
    # With convolutions, each provider is shown in its faster memory format.
    words += [row["layout"], row["cache"]] if row["scope"] in TAILS else []
    words += [] if topic.batches == "beside" else [f"batch {row['batch']}"]
    words += [f"step {row['step']}"] if row.get("step") else []
    return f"{', '.join(map(str, words))}\n{row['device']}"


def series_of(topic: Topic, rows: Sequence[ResultRow]) -> Series:
    """Return each provider's value by stage and batch: of several rows, that of the fastest."""
    best: dict[str, dict[str, ResultRow]] = {}
    for row in rows:
        beside = topic.batches == "beside"
        place = f"{row['stage']} x {row['batch']}" if beside else str(row["stage"])
        places = best.setdefault(str(row["provider"]), {})
        if place not in places or float(str(row["ms_p50"])) < float(str(places[place]["ms_p50"])):
            places[place] = row
    return {
        provider: {place: topic.value(row) for place, row in places.items()}
        for provider, places in best.items()
    }


def _figure(topic: Topic, panels: Mapping[str, Sequence[ResultRow]]) -> Any:
    """Draw the panels of a topic below each other."""
    all_series = {title: series_of(topic, rows) for title, rows in panels.items()}
    places = max(len({x for by_place in s.values() for x in by_place}) for s in all_series.values())
    size = (min(24.0, max(7.0, 1.6 * places)), 3.6 * len(panels))
    figure, axes = pyplot().subplots(len(panels), figsize=size, squeeze=False, layout="constrained")
    for ax, (title, series) in zip(axes[:, 0], all_series.items(), strict=True):
        grouped_bars(ax, series)
        ax.set_title(title, fontsize=9)
        ax.set_ylabel(topic.unit)
    return figure


def plot(path: Path, rows: Sequence[ResultRow], title: str) -> bool:
    """Draw grouped bars of the median on a log scale, with whiskers from p20 to p80.

    Returns:
        False if matplotlib is not installed: then no plot is written.
    """
    try:
        plt = pyplot()
    except ModuleNotFoundError:
        return False
    timed = [row for row in rows if row["ms_p50"] != ""]
    varying = varying_axes(timed)
    series: dict[str, dict[str, Value]] = {}
    for row in timed:
        series.setdefault(str(row["provider"]), {})[label(row, varying)] = _milliseconds(row)
    cases = len({label(row, varying) for row in timed})
    figure, ax = plt.subplots(figsize=(max(7.0, 1.6 * cases), 4.5))
    grouped_bars(ax, series)
    if varying:
        ax.tick_params("x", labelrotation=30)
    ax.set_yscale("log")
    ax.set_ylabel("ms per call (median, p20 to p80)")
    ax.set_title(title, fontsize=9)
    write_atomically(path, _png(figure))
    return True


def grouped_bars(ax: Any, series: Series) -> None:
    """Draw a group of bars for each place on the x axis, one bar per series, with whiskers."""
    places = list(dict.fromkeys(place for values in series.values() for place in values))
    width = 0.8 / max(1, len(series))
    for i, (name, values) in enumerate(series.items()):
        x = [places.index(place) + i * width for place in values]
        low, middle, high = zip(*values.values(), strict=True)
        below = [m - lo for m, lo in zip(middle, low, strict=True)]
        above = [hi - m for m, hi in zip(middle, high, strict=True)]
        whiskers = {"yerr": [below, above], "capsize": 2} if any(below + above) else {}
        ax.bar(x, middle, width, label=name, **whiskers)
    ax.set_xticks([x + 0.4 - width / 2 for x in range(len(places))], places)
    if series:
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


# The bars of network.png from top to bottom: provider, label, colour.
NETWORK_BARS = {
    "eager": ("EPSANet-50, official, eager", "#9e9e9e"),
    "compile-freezing": ("EPSANet-50, official, compiled", "#9e9e9e"),
    "optimized": ("EPSANet-50, optimized", "#1f6fb4"),
    "optimized-compile": ("EPSANet-50, optimized, compiled", "#1f6fb4"),
    "resnet50:eager": ("ResNet-50, eager", "#d9c3a5"),
    "resnet50:compile-freezing": ("ResNet-50, compiled", "#d9c3a5"),
}


def network_figure(rows: Sequence[ResultRow]) -> Any:
    """Draw the time of the network in inference beside ResNet-50, one panel per dtype and batch."""
    shown = [r for r in rows if (r["scope"], r["mode"]) == ("network", "inference")]
    shown = [r for r in shown if r["provider"] in NETWORK_BARS and r["ms_p50"] != ""]
    panels: dict[tuple[str, str], dict[str, float]] = {}
    for row in sorted(shown, key=lambda r: (r["dtype"] != "float32", r["dtype"], int(r["batch"]))):
        times = panels.setdefault((row["dtype"], row["batch"]), {})
        times[row["provider"]] = min(float(row["ms_p50"]), times.get(row["provider"], math.inf))
    figure, axes = pyplot().subplots(
        -(-len(panels) // 2), 2, figsize=(10, 5.2), squeeze=False, layout="constrained"
    )
    for ax, ((dtype, batch), times) in zip(axes.flat, panels.items(), strict=False):
        for provider, (name, colour) in NETWORK_BARS.items():
            if provider in times:
                ax.bar_label(ax.barh(name, times[provider], color=colour), fmt="{:.1f}", padding=3)
        ax.set_title(f"{dtype}, batch {batch}", fontsize=10)
        ax.set_xlabel(f"ms per call ({shown[0]['clock']}, median)", fontsize=9)
        ax.set_xlim(0, 1.2 * max(times.values()))
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params("y", labelleft=ax in axes[:, 0])
    threads = "one thread" if shown[0]["threads"] == "1" else f"{shown[0]['threads']} threads"
    figure.suptitle(
        f"Inference at 224x224 on {threads} of {shown[0]['device']}, "
        f"torch {shown[0]['torch']}, epsanet_fused {shown[0]['epsanet_fused']}",
        fontsize=11,
    )
    return figure


def pyplot() -> Any:
    """Import matplotlib, an optional dependency, without a display."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130, bbox_inches="tight")
    pyplot().close(figure)
    return data.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of CSV files; plots are written there")
    parser.add_argument("--network", action="store_true", help="draw network.png only")
    args = parser.parse_args(argv)
    if not (rows := rows_in(args.folder)):
        parser.error(
            f"argument folder: must hold a CSV of bench_psa.py, but {args.folder} has none"
        )
    drawn = {"network": network_figure(rows)} if args.network else figures(rows)
    for name, figure in drawn.items():
        path = args.folder / f"{name}.png"
        write_atomically(path, _png(figure))
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
