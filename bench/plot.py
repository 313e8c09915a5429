"""Draw figures from result files: nothing here computes a number that is not in a CSV.

    python -m bench.plot [FOLDER]        results/, or an OUT of gpu.sh: PNGs beside the CSVs

Per device: the roofline of the linear layers; speed-up over tokens, over sparsity and over the
vocabulary; whole models. A figure whose rows are missing is not drawn.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.bounds import RESULTS

Row = dict[str, Any]

#: One colour per provider wherever it appears (Okabe-Ito, which colour-blind readers can tell
#: apart); peers beyond these share grey tones and differ by marker.
COLORS = {
    "dense": "#000000",
    "2:4 auto": "#D55E00",
    "2:4 mma_sp": "#E69F00",
    "2:4 triton": "#CC79A7",
    "2:4 wgmma_sp": "#7F3C00",
    "2:4 wgmma_tma": "#B22222",
    "2:4 expand": "#999999",
    "bitmap auto": "#0072B2",
    "bitmap triton": "#8C6BB1",
    "bitmap mma": "#009E73",
    "bitmap expand": "#56B4E9",
    "cuSPARSELt": "#009E73",
    "cuSPARSELt best": "#66C2A5",
    "prunekernels core": "#D55E00",
    "prunekernels precise": "#E69F00",
    "prunekernels full": "#CC79A7",
    "torch eager": "#000000",
    "torch.compile": "#0072B2",
    "dropped": "#0072B2",
    "2:4": "#D55E00",
    "bitmap": "#009E73",
}
MARKERS = "osD^v<>Pp*hX"
#: What is drawn as a mark to measure others by, without a band; with what the legend says.
MARKS = {"copy": "copying both (read and write)"}
BAND = "; band: 20th to 80th percentile"


def read(path: Path) -> list[Row]:
    """The rows of a result file that have a time, with the shape's sizes as columns."""
    if not path.is_file():
        return []
    rows: list[Row] = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["status"] == "ok":
                sizes = dict(part.split("=") for part in row["shape"].split())
                rows.append(row | {name: float(value) for name, value in sizes.items()})
    return rows


def groups(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some columns, in the order of their first appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def speedups(rows: Sequence[Row], base: str, *case: str) -> list[Row]:
    """Rows with `speedup` over the provider `base` of the same case, with low and high."""
    found = []
    for together in groups(rows, *case).values():
        reference = next((row for row in together if row["provider"] == base), None)
        if reference is not None:
            middle = float(reference["p50_ms"])
            ends = {"low": "p80_ms", "speedup": "p50_ms", "high": "p20_ms"}
            found += [
                row | {name: middle / float(row[column]) for name, column in ends.items()}
                for row in together
            ]
    return found


_seen: dict[str, int] = {}  # providers in the order in which they were first drawn


def look(provider: str) -> dict[str, Any]:
    """Colour and marker of a provider, the same in every panel."""
    index = _seen.setdefault(provider, len(_seen))
    grey = f"{0.35 + 0.06 * (index % 8):.2f}"
    return {"color": COLORS.get(provider, grey), "marker": MARKERS[index % len(MARKERS)]}


def panels(count: int, title: str, note: str) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, at most three beside each other."""
    columns = min(3, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns + 1.8, 3.5 * lines + 0.9), squeeze=False
    )
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.remove()
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    figure.text(0.01, 0.005, note, fontsize=7, color="0.35")
    return figure, flat[:count]


def lines(axis: Axes, rows: Sequence[Row], x: str, y: str = "speedup") -> None:
    """One line with its spread per provider over the column x."""
    order = list(dict.fromkeys(row["provider"] for row in rows))
    for provider in order:
        own = sorted((row for row in rows if row["provider"] == provider), key=lambda r: r[x])
        places, values = [row[x] for row in own], [row[y] for row in own]
        style = look(provider)
        if provider in MARKS:
            label, dashed = MARKS[provider], {"linestyle": "--", "marker": "", "color": "0.45"}
            axis.plot(places, values, label=label, linewidth=1.0, **dashed)
            continue
        axis.plot(places, values, label=provider, linewidth=1.4, markersize=4, **style)
        low, high = [row["low"] for row in own], [row["high"] for row in own]
        axis.fill_between(places, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axis.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
    axis.grid(alpha=0.25)


def measured_ticks(axis: Axes, values: Sequence[float]) -> None:
    """Ticks at the measured places, as plain numbers, on a logarithmic axis."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(set(values)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.tick_params(axis="x", rotation=45, labelsize=7)
    axis.minorticks_off()


def ratio_ticks(low: float, high: float) -> list[float]:
    """Places between two ratios that are read easily: 1, 2, 5, 10; closer ones in a narrow span."""
    span = math.log10(high / low)
    steps = (1.0,) if span > 3 else (1.0, 2.0, 5.0) if span > 0.7 else (1, 1.2, 1.5, 2, 3, 4, 6, 8)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    places = [float(f"{step}e{power}") for power in powers for step in steps]
    return [place for place in places if low <= place <= high]


def ratio_axis(axis: Axes) -> None:
    """A logarithmic axis around 1, where half and double are as far: 0.02 × is no more all flat."""
    axis.set_yscale("log")
    bottom, top = axis.get_ylim()
    axis.set_ylim(min(bottom, 0.7), max(top, 1.4))
    axis.set_yticks(ratio_ticks(*axis.get_ylim()))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.minorticks_off()


def finish(figure: Figure, axes: Sequence[Axes], path: Path) -> Path:
    """One legend for all panels, and the file."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.tight_layout(rect=(0, 0.03, 1, 0.97))
    figure.legend(
        entries.values(), entries, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8
    )
    figure.savefig(path, dpi=140, bbox_inches="tight")
    plt.close(figure)
    return path


def made_with(rows: Sequence[Row], spread: str = "") -> str:
    """The foot of a figure: the source of its numbers, and the meaning of its error bars."""
    row = rows[0]
    commits = ", ".join(dict.fromkeys(r["commit"] for r in rows))
    triton = f", Triton {row['triton']}" if row["triton"] else ""
    return f"{row['device']}, torch {row['torch']}{triton}, commit {commits}; medians{spread}"


def over_tokens(folder: Path) -> Path | None:
    """Speed-up of 2:4 layers over dense, over M."""
    rows = [r for r in read(folder / "sparse.csv") if r["mode"] == "2:4"]
    rows = speedups(rows, "dense", "N", "K", "M")
    if len({row["M"] for row in rows}) < 2:
        return None
    shapes = groups(rows, "N", "K")
    note = made_with(rows, BAND)
    figure, axes = panels(len(shapes), "2:4 linear layers: speed-up over dense", note)
    for axis, ((N, K), own) in zip(axes, shapes.items(), strict=True):
        lines(axis, own, "M")
        measured_ticks(axis, [row["M"] for row in own])
        ratio_axis(axis)
        axis.set(title=f"{N:g} × {K:g}", xlabel="tokens M", ylabel="× dense")
    return finish(figure, axes, folder / "speedup_over_tokens.png")


def over_sparsity(folder: Path) -> Path | None:
    """Speed-up of unstructured layers over dense, over the share of zeros."""
    rows = [r for r in read(folder / "sparse.csv") if r["mode"] == "unstructured"]
    rows = speedups(rows, "dense", "N", "K", "M", "sparsity")
    rows = [row for row in rows if row["M"] == min(r["M"] for r in rows)]
    if len({row["sparsity"] for row in rows}) < 2:
        return None
    shapes = groups(rows, "N", "K")
    title = f"Unstructured linear layers at M = {rows[0]['M']:g}: speed-up over dense"
    figure, axes = panels(len(shapes), title, made_with(rows, BAND))
    for axis, ((N, K), own) in zip(axes, shapes.items(), strict=True):
        lines(axis, own, "sparsity")
        places = sorted({row["sparsity"] for row in own})
        axis.set_xticks(places, [f"{place:.4g} %" for place in (100 * p for p in places)])
        ratio_axis(axis)
        axis.set(title=f"{N:g} × {K:g}", xlabel="zeros", ylabel="× dense")
    return finish(figure, axes, folder / "speedup_over_sparsity.png")


def over_vocabulary(folder: Path) -> Path | None:
    """Speed-up of the pair statistics over eager torch, over V."""
    rows = [r for r in read(folder / "metrics.csv") if r["op"] == "pair_stats"]
    rows = speedups(rows, "torch eager", "dtype", "N", "V")
    kinds = {
        key: own
        for key, own in groups(rows, "dtype", "N").items()
        if len({row["V"] for row in own}) > 1
    }
    if not kinds:
        return None
    title = "Statistics of two rows of logits: speed-up over the same in eager torch"
    figure, axes = panels(len(kinds), title, made_with(rows, BAND))
    for axis, ((dtype, N), own) in zip(axes, kinds.items(), strict=True):
        lines(axis, own, "V")
        measured_ticks(axis, [row["V"] for row in own])
        ratio_axis(axis)
        axis.set(title=f"{dtype}, {N:g} rows", xlabel="vocabulary V", ylabel="× torch eager")
    return finish(figure, axes, folder / "speedup_over_vocabulary.png")


def roofline(folder: Path) -> Path | None:
    """FLOP/s over FLOP per byte of the linear layers, under the roofs of the same run."""
    rows = [r for r in read(folder / "sparse.csv") if r["tflop_s"] and r["gb_s"]]
    if not rows:
        return None
    modes = groups(rows, "mode")
    figure, axes = panels(len(modes), "Linear layers under the measured roofs", made_with(rows))
    for axis, ((mode,), own) in zip(axes, modes.items(), strict=True):
        for row in own:
            row["intensity"] = 1000 * float(row["tflop_s"]) / float(row["gb_s"])
            row["rate"] = float(row["tflop_s"])
        places = [row["intensity"] for row in own]
        ends = [min(places) / 2, max(places) * 2]
        bandwidth, top = float(own[0]["roof_gb_s"]) / 1000, float(own[0]["roof_tflop_s"])
        ridge = sorted({*ends, min(max(top / bandwidth, ends[0]), ends[1])})
        roof = [min(place * bandwidth, top) for place in ridge]
        axis.plot(ridge, roof, color="0.5", linewidth=1, label="roof (copy, dense product)")
        for (provider,), points in groups(own, "provider").items():
            style = look(provider)
            x, y = [p["intensity"] for p in points], [p["rate"] for p in points]
            axis.scatter(x, y, s=14, label=provider, alpha=0.8, linewidths=0, **style)
        axis.set(title=mode, xlabel="FLOP per byte moved", ylabel="TFLOP/s", xscale="log")
        axis.set_yscale("log")
        axis.grid(alpha=0.25)
    return finish(figure, axes, folder / "roofline.png")


def end_to_end(folder: Path) -> Path | None:
    """Tokens per second of whole models, by batch and cache."""
    rows = read(folder / "model.csv")
    if not rows:
        return None
    kinds = groups(rows, "op", "mode")
    note = made_with(rows, "; whiskers: 20th to 80th percentile")
    figure, axes = panels(len(kinds), "Whole models: tokens per second", note)
    for axis, ((op, mode), own) in zip(axes, kinds.items(), strict=True):
        batches = sorted({row["batch"] for row in own})
        providers = list(dict.fromkeys(row["provider"] for row in own))
        width = 0.8 / len(providers)
        for index, provider in enumerate(providers):
            mine = {row["batch"]: row for row in own if row["provider"] == provider}
            places = [i for i, batch in enumerate(batches) if batch in mine]
            found = [mine[batches[i]] for i in places]
            rate = [float(row["items_s"]) for row in found]
            spread = [
                [
                    r - r * float(m["p50_ms"]) / float(m["p80_ms"])
                    for r, m in zip(rate, found, strict=True)
                ],
                [
                    r * float(m["p50_ms"]) / float(m["p20_ms"]) - r
                    for r, m in zip(rate, found, strict=True)
                ],
            ]
            at = [place + (index - (len(providers) - 1) / 2) * width for place in places]
            color = look(provider)["color"]
            axis.bar(
                at, rate, width, yerr=spread, label=provider, color=color, error_kw={"lw": 0.8}
            )
        room = max(0.0, (3 - len(batches)) / 2)  # a single group is as narrow as one of three
        axis.set_xlim(-0.55 - room, len(batches) - 0.45 + room)
        axis.set_axisbelow(True)
        axis.set_xticks(range(len(batches)), [f"{batch:g}" for batch in batches])
        axis.set(title=f"{op}, {mode} cache", xlabel="batch", ylabel="tokens / s")
        axis.grid(alpha=0.25, axis="y")
    return finish(figure, axes, folder / "end_to_end.png")


FIGURES: tuple[Callable[[Path], Path | None], ...] = (
    roofline,
    over_tokens,
    over_sparsity,
    over_vocabulary,
    end_to_end,
)


def draw(root: Path) -> list[Path]:
    """Every figure that the results below a folder allow."""
    folders = sorted({path.parent for path in root.rglob("*.csv")})
    made = [figure(folder) for folder in folders for figure in FIGURES]
    return [path for path in made if path is not None]


def main() -> None:
    """The command line."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    if not root.is_dir():
        sys.exit(f"{root} is no folder of results: run a benchmark first")
    for path in draw(root):
        print(path)


if __name__ == "__main__":
    main()
