"""The sweep of tiles: what is tried can run, and what its table chooses is among it."""

from __future__ import annotations

import pytest

from bench import bench_sweep


@pytest.mark.parametrize("kernel", bench_sweep.TOKENS)
@pytest.mark.parametrize(("rows", "columns"), bench_sweep.SHAPES)
def test_what_the_table_chooses_is_tried(kernel, rows, columns):
    for tokens in bench_sweep.TOKENS[kernel]:
        tried = [tuple(c) for c in bench_sweep.configurations(kernel, tokens)]
        assert len(tried) == len(set(tried))
        assert bench_sweep.chosen(kernel, tokens, rows, columns, 132) in tried


def test_the_best_is_named_beside_the_table():
    shape = "M=64 N=4096 K=14336 sparsity=0.5"

    def row(provider, ms, status="ok"):
        columns = {"mode": "mma_sp", "shape": shape, "provider": provider}
        return columns | {"status": status, "p50_ms": ms}

    table = f"mma_sp {bench_sweep.chosen('mma_sp', 64, 4096, 14336, 132)}"
    rows = [row("dense", "0.04"), row(table, "0.032"), row("mma_sp (9, 9, 9, 9, 9)", "0.02")]
    (line,) = bench_sweep.best([*rows, row("mma_sp (1, 1, 1, 1, 1)", "", "failed")], 132)
    assert line == (f"{shape}: best mma_sp (9, 9, 9, 9, 9) 2.00× dense; table {table} 1.25")
    assert bench_sweep.best(rows[1:], 132) == []
