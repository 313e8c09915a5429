"""The tables of the first pass against the sweep that they come from, and what they predict."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from prunekernels.metrics import tuning

H200 = Path(__file__).parents[3] / "bench" / "results" / "NVIDIA_H200"
SWEEP = H200 / "sweep_pair.csv"
Shape = tuple[int, int, str, str]


def sweep() -> dict[Shape, dict[tuple[int, ...], float]]:
    """Microseconds by (lanes, units, warps, registers, splits), by what was swept."""
    found: dict[Shape, dict[tuple[int, ...], float]] = defaultdict(dict)
    with SWEEP.open() as file:
        for line in csv.DictReader(file):
            shape = (int(line["rows"]), int(line["vocab"]), line["dtype"], line["fields"])
            names = ("lanes", "units", "warps", "registers", "splits")
            found[shape][tuple(int(line[name]) for name in names)] = float(line["microseconds"])
    return found


SWEPT = sweep()


@pytest.mark.parametrize("shape", SWEPT, ids=lambda shape: "-".join(map(str, shape)))
def test_the_table_is_within_3_percent_of_the_best_that_was_swept(shape: Shape) -> None:
    rows, vocab, dtype, _ = shape
    itemsize = getattr(torch, dtype).itemsize
    config = tuning.pair_config(rows, vocab, itemsize)
    splits = tuning.pair_splits(rows, vocab, config, tuning.tile_columns(config, itemsize == 2))
    chosen = (config.lanes, config.units, config.num_warps, config.registers, splits)
    times = SWEPT[shape]
    assert chosen in times, f"{chosen} was not measured; the best is {min(times, key=times.get)}"  # type: ignore[arg-type]
    assert times[chosen] <= 1.03 * min(times.values()), (chosen, times[chosen])


def test_heads_are_fused_where_that_was_measured_faster() -> None:
    times: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (H200 / "metrics.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["op"] == "head_pair_stats" and line["status"] == "ok":
                rows = int(re.findall(r"N=(\d+)", line["shape"])[0])
                times[rows][line["provider"]].append(float(line["p50_ms"]))
    assert set(times) == {1, 64, 2048}
    for rows, found in times.items():
        fused, chunked = (sum(found[f"prunekernels {name}"]) for name in ("fused", "chunked"))
        assert tuning.head_fused(rows, True) == (fused < chunked), rows


@pytest.mark.parametrize("design", tuning.DESIGNS)
@pytest.mark.parametrize("rows", [1, 3, 64, 130, 500, 2048, 10000])
@pytest.mark.parametrize("vocab", [1, 700, 4096, 32000, 152064, 262144])
def test_splits_have_whole_tiles_and_fill_the_machine(design: str, rows: int, vocab: int) -> None:
    """A split without a tile would be a program for nothing; a second wave for a few rows too."""
    config = tuning.pair_config(rows, vocab, 2, design=design)
    columns = tuning.tile_columns(config, True)
    splits = tuning.pair_splits(rows, vocab, config, columns)
    assert 1 <= splits <= max(1, vocab // columns)
    if rows <= 132:
        assert rows * splits <= 132 * 16
    if rows == 1:  # as many as have something to read
        assert splits >= vocab // columns // 2


def test_the_one_warp_design_takes_no_wave_that_is_nearly_empty() -> None:
    """2049 rows on 2112 places run at once; 2113 rows would wait for one: splits share them out."""
    config = tuning.pair_config(2113, 152064, 2, design="warp")
    columns = tuning.tile_columns(config, True)
    assert tuning.pair_splits(2049, 152064, config, columns) == 1
    splits = tuning.pair_splits(2113, 152064, config, columns)
    waves, tiles = -(-2113 * splits // 2112), 152064 // columns
    assert waves * -(-tiles // splits) < 1.3 * tiles
