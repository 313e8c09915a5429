"""Tables of the bitmap kernels."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prunekernels.sparse.bitmap.tuning import (
    bitmap_mma,
    bitmap_order,
    bitmap_portable,
    bitmap_shared_bytes,
    bitmap_splits,
)
from prunekernels.sparse.tuning import packed_speedup


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 64, 65, 4096])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4096, 4096), (28672, 8192), (576, 1536)])
def test_tables_give_configurations_that_cover_the_work(tokens, rows, columns):
    for capability, processors in (((9, 0), 132), ((8, 9), 128), ((8, 0), 108)):
        for chunks, gated in ((1, False), (5, True), (9, False)):
            where = chunks, processors, capability
            config = bitmap_mma(tokens, rows, columns, *where, gated=gated)
            assert config.token_tiles in (1, 2, 4) and config.slots in (2, 3)
            # the warps of a program share columns, and none of the splits is without
            assert 1 <= config.splits <= max(1, -(-columns // 128))
            assert config.warps & (config.warps - 1) == 0 and (config.warps > 1 or not gated)
            sizes = config.warps, config.token_tiles, config.slots, chunks
            assert bitmap_shared_bytes(*sizes) <= 99 << 10
            assert not config.bulk and not config.dependent
    # seven programs fit one of an H200's multiprocessors at 50 % zeros, and three slots at 70 %
    if rows == 28672 and tokens == 1:
        assert bitmap_mma(1, rows, columns, 5, 132, (9, 0)).slots == 2
        assert bitmap_mma(1, rows, columns, 4, 132, (9, 0)).slots == 3
    assert bitmap_order(tokens, rows, columns, (9, 0))
    for itemsize in (2, 4):
        portable = bitmap_portable(tokens, itemsize)
        assert portable.block_m >= 16 and portable.block_n % 16 == 0
    blocks = -(-columns // 64)
    assert 1 <= bitmap_splits(-(-rows // 64), blocks) <= max(1, blocks // 8)


def measured() -> Iterator[tuple[str, int, int, float, float]]:
    """Provider, tokens, dense bytes, bytes of the packed weight, and gain over dense on an H200."""
    folder = Path(__file__).parents[3] / "bench" / "results" / "NVIDIA_H200"
    with (folder / "sparse.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["mode"] == "unstructured"]
    dense = {row["shape"]: row for row in rows if row["provider"] == "dense"}
    for row in rows:
        m, n, k = map(int, re.findall(r"[MNK]=(\d+)", row["shape"]))
        gain = float(dense[row["shape"]]["p50_ms"]) / float(row["p50_ms"])
        yield row["provider"], m, 2 * n * k, float(row["held_mb"]) * 1e6, gain


def test_what_the_portable_kernel_gains_is_what_was_measured() -> None:
    seen = 0
    for provider, tokens, dense, packed, gain in measured():
        if provider == "bitmap triton":
            promised = packed_speedup("triton", tokens, dense, int(packed), "bitmap")
            assert 0.6 * gain < promised < 1.1 * gain
            seen += 1
    assert seen == 9


@pytest.mark.parametrize(
    ("zeros", "low", "high"), [(0.5, 1.4, 1.5), (0.6, 1.6, 1.8), (0.7, 1.8, 2.1)]
)
def test_what_the_tensor_core_kernel_gains_is_predicted(zeros, low, high) -> None:
    dense = 2 * 14336 * 4096
    packed = int(dense * (1 - zeros + 1 / 16))

    def gain(tokens: int) -> float:
        return packed_speedup("mma", tokens, dense, packed, "bitmap")

    assert 0.98 * low < gain(1) < high < dense / packed
    assert gain(1) > gain(8) > gain(16) > gain(32) > 1.9 * gain(33)
    # a layer stays dense where its weight is expanded twice
    assert gain(64) < 1 < gain(16)
