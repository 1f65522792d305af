"""Draw pictures of CSV files: the network, the tail against its limit, and memory.

    python benchmarks/plots.py out/results.csv --out out

Only the rows count: nothing is measured. A picture is drawn if there are rows for it. All axes are
linear and start at 0, and a provider has one colour everywhere. A result that was judged wrong is
marked and has no bar.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from harness.networks import baseline_of
from harness.providers import PROVIDERS
from harness.results import COLUMNS, POINT, read_rows

from epsanet_fused.utils.atomic_write import write_atomically

WIDTH, HEIGHT, DPI = 15.0, 9.5, 100  # inches, and pixels per inch: at most 1,600 x 1,000
# The label and the colour of the usual providers. The others keep their names.
STYLES = {
    "eager": ("official, eager", "#8c8c8c"),
    "cleaned": ("our formulation in plain PyTorch", "#c4b08b"),
    "compile": ("official, torch.compile", "#e69f00"),
    "compile-freezing": ("official, torch.compile, frozen", "#d55e00"),
    "onnxruntime": ("official, ONNX Runtime", "#009e73"),
    "openvino": ("official, OpenVINO", "#cc79a7"),
    "fused": ("this package, fused", "#56b4e9"),
    "planned": ("this package, merged groups", "#1fa2a2"),
    "optimized": ("this package, optimized", "#0072b2"),
    "optimized-compile": ("this package, optimized, compiled", "#003f6b"),
    "optimized-graph": ("this package, optimized, CUDA graph", "#5a3fb0"),
    "apart": ("psa_tail, norm, ReLU apart", "#7fae3f"),
}
BASELINE_NAMES = {"resnet50": "ResNet-50"}
NUMBERS = ("ms_p50", "batch", "necessary_bytes", "peak_extra_bytes")
# What a picture shows if the rows have several: the first of these.
FIRST = {"dtype": ("float16", "bfloat16", "float32"), "cache": ("cold", "warm")}
TAILS = ("tail", "norm")
OPTIONAL = ("ms_low", "ms_high")  # older files lack them


def load(paths: Sequence[Path]) -> pd.DataFrame:
    """Read the rows of some files: of each case and provider the faster memory format.

    Tails keep both formats, as their column ``shown`` says.

    Raises:
        ValueError: if a file lacks a column.
    """
    rows = pd.DataFrame([row for path in paths for row in read_rows(path)])
    if missing := [name for name in COLUMNS if name not in rows and name not in OPTIONAL]:
        raise ValueError(f"must be CSV files of the benchmarks, but they lack {missing[0]}")
    for name in NUMBERS:
        rows[name] = pd.to_numeric(rows[name])
    rows["state"] = rows["note"].map(lambda note: "WRONG" if note.startswith("WRONG") else "failed")
    rows["shown"] = rows["memory_format"].where(rows["scope"].isin(TAILS), "")
    is_result = rows["ms_p50"].notna() | (rows["ok"] == "False")
    rows = rows[is_result & (rows["provider"] != "all")].sort_values("ms_p50", kind="stable")
    by = ["scope", "mode", "case", "batch", "dtype", "shown", "cache", "provider"]
    return rows.drop_duplicates(by)


def network_panels(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the milliseconds of the network by dtype and batch."""
    rows = rows[rows["scope"] == "network"]
    rows = rows.assign(value=rows["ms_p50"], is_half=rows["dtype"] != "float32")
    by = ["mode", "is_half", "dtype", "batch"]
    return {
        f"{mode}, {dtype}, batch {batch}": panel
        for (mode, _, dtype, batch), panel in rows.groupby(by, sort=True)
    }


def tail_panels(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the tail's speed in percent of its limit: a copy of the bytes that it has to move."""
    rows = select(rows[rows["scope"] == "tail"])
    copies = rows[rows["provider"] == "copy"].set_index([*POINT])
    copies = copies[["ms_p50", "necessary_bytes"]].add_suffix("_copy")
    rows = rows[rows["provider"] != "copy"].join(copies, on=[*POINT])
    limit = rows["ms_p50_copy"] * rows["necessary_bytes"] / rows["necessary_bytes_copy"]
    rows = rows.assign(value=100 * limit / rows["ms_p50"])
    return panels_of(rows[rows["value"].notna() | rows["ms_p50"].isna()])


def memory_panels(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the peak extra memory of a call in MB, of the largest stage."""
    rows = rows[(rows["peak_extra_bytes"] > 0) & (rows["mode"] != "backward")]
    rows = rows[~rows["provider"].str.endswith("-graph")]  # a replay allocates nothing
    kinds = [part for _, part in rows.groupby(["scope", "mode"])]
    rows = pd.concat([select(part[part["case"] == min(part["case"])]) for part in kinds] or [rows])
    by = ["scope", "mode", "provider"]
    return panels_of(
        rows.assign(value=rows["peak_extra_bytes"] / 1e6, shown="").drop_duplicates(by)
    )


def select(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep one dtype, one cache, and of the batches with the most rows the largest."""
    for column, order in FIRST.items():
        kept = next((value for value in order if (rows[column] == value).any()), None)
        rows = rows if kept is None else rows[rows[column] == kept]
    counts = rows["batch"].value_counts()
    return rows[rows["batch"] == max(counts.index[counts == counts.max()], default=0)]


def panels_of(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return a panel for each scope, mode and, where the tail is alone, memory format."""
    by = ["scope", "mode", "dtype", "batch", "shown"]
    return {
        f"{scope}, {mode}, {dtype}, batch {batch} {shown}".strip(): panel
        for (scope, mode, dtype, batch, shown), panel in rows.groupby(by, sort=True)
    }


def draw(title: str, unit: str, panels: dict[str, pd.DataFrame], limit: float | None = None) -> Any:
    """Draw a panel of horizontal bars for each frame: its cases, and a bar for each provider."""
    plt = pyplot()
    columns = 1 if len(panels) == 1 else 2
    grid = (-(-len(panels) // columns), columns)
    bars = max(len(panel) for panel in panels.values())
    height = min(HEIGHT, 1.4 + grid[0] * (0.9 + 0.27 * bars))
    figure, axes = plt.subplots(*grid, figsize=(WIDTH, height), squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (name, rows) in zip(axes.flat, panels.items(), strict=False):
        draw_panel(ax, rows)
        if limit is not None:
            ax.set_xlim(0, max(ax.get_xlim()[1], 1.05 * limit))
            ax.axvline(limit, color="black", linestyle="--", linewidth=1)
        cases = set(rows["case"]) - {"all"}
        ax.set_title(f"{name}, {cases.pop()}" if len(cases) == 1 else name, fontsize=10)
        ax.set_xlabel(unit, fontsize=9)
    rows = pd.concat(panels.values())
    figure.suptitle(f"{title}\n{machine_of(rows)}", fontsize=11)
    return figure


def draw_panel(ax: Any, rows: pd.DataFrame) -> None:
    """Draw the bars of one panel, with their values."""
    order = {name: i for i, name in enumerate(PROVIDERS)}
    places = rows["provider"].map(lambda name: order.get(name, len(order)))
    rows = rows.assign(place=places).sort_values(["case", "place"], kind="stable")
    several = rows["case"].nunique() > 1
    for y, row in enumerate(rows.itertuples()):
        _, colour, hatch = style(row.provider)
        if pd.isna(row.value):
            ax.text(0, y, f" {row.state}", va="center", color="red", fontsize=8)
        else:
            ax.barh(y, row.value, color=colour, hatch=hatch, edgecolor="white", height=0.8)
            value = f"{row.value:.3g}" if row.value < 1000 else f"{row.value:,.0f}"
            ax.text(row.value, y, f" {value}", va="center", fontsize=8)
    names = [style(row.provider)[0] for row in rows.itertuples()]
    if several:
        names = [f"{case}  {name}" for case, name in zip(rows["case"], names, strict=True)]
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.4, -0.6)
    largest = rows["value"].max()
    ax.set_xlim(0, 1.12 * largest if largest > 0 else 1)
    ax.spines[["top", "right"]].set_visible(False)


def style(provider: str) -> tuple[str, Any, str]:
    """Return a provider's label, its colour, and the hatch of another network."""
    baseline = baseline_of(provider)
    base = provider.partition(":")[2] if baseline else provider
    fallback = pyplot().get_cmap("tab20b")([*PROVIDERS, base].index(base) % 20)
    label, colour = STYLES.get(base, (base, fallback))
    if baseline is None:
        return label, colour, ""
    return f"{BASELINE_NAMES[baseline]}, {label.removeprefix('official, ')}", colour, "//"


def machine_of(rows: pd.DataFrame) -> str:
    """Return the device, the threads and the versions of the rows."""
    found = []
    for column, words in (("device", ""), ("threads", " thread(s)"), ("clock", " per call")):
        found += [f"{value}{words}" for value in rows[column].unique() if value]
    for column in ("torch", "cuda", "triton", "epsanet_fused"):
        found += [f"{column} {value}" for value in rows[column].unique() if value]
    others = rows["backend"].str.extract(r"^((?:onnxruntime|openvino) \S+)")[0].dropna()
    return ", ".join([*found, *others.unique()])


def pyplot() -> Any:
    """Import matplotlib, an optional dependency, without a display."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


PICTURES = {
    "network": (network_panels, "Time of a network: less is better", "ms per call (median)", None),
    "tail": (
        tail_panels,
        "Speed of the tail: more is better; the line is a copy of the bytes that it has to move",
        "percent of the limit",
        100.0,
    ),
    "memory": (memory_panels, "Peak extra memory of one call: less is better", "MB", None),
}


def draw_all(paths: Sequence[Path], out: Path) -> list[Path]:
    """Write a picture for each topic that has rows; return the files."""
    rows, files = load(paths), []
    for name, (panels_for, title, unit, limit) in PICTURES.items():
        panels = panels_for(rows)
        if panels:
            figure = draw(title, unit, panels, limit)
            data = io.BytesIO()
            figure.savefig(data, format="png", dpi=DPI)
            pyplot().close(figure)
            write_atomically(out / f"{name}.png", data.getvalue())
            files.append(out / f"{name}.png")
    return files


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="CSV files of the benchmarks")
    parser.add_argument("--out", type=Path, default=Path(), help="folder (default: this one)")
    args = parser.parse_args(argv)
    try:
        files = draw_all(args.files, args.out)
    except (OSError, ValueError) as error:
        parser.error(f"argument files: {error}")
    print("\n".join(map(str, files)) or "no row to draw")
    return 0


if __name__ == "__main__":
    sys.exit(main())
