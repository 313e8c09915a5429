"""Tables of the bitmap kernels."""

from __future__ import annotations

import pytest
from prunekernels.sparse.bitmap.tuning import (
    bitmap_mma,
    bitmap_order,
    bitmap_portable,
    bitmap_splits,
)


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 64, 65, 4096])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4096, 4096), (28672, 8192), (576, 1536)])
def test_tables_give_configurations_that_cover_the_work(tokens, rows, columns):
    config = bitmap_mma(tokens, rows, columns, 132, (9, 0))
    # what the tile does, and not how tensor cores find the values, is the same on Blackwell
    blackwell = bitmap_mma(tokens, rows, columns, 132, (12, 0))
    assert config.count_bits and blackwell == config._replace(count_bits=False)
    assert config.token_tiles & (config.token_tiles - 1) == 0
    assert config.token_tiles >= min(-(-tokens // 8), 8) and config.stages >= 2
    assert 1 <= config.splits <= max(1, columns // 512)
    assert bitmap_order(tokens, rows, columns, (9, 0))
    for itemsize in (2, 4):
        portable = bitmap_portable(tokens, itemsize)
        assert portable.block_m >= 16 and portable.block_n % 16 == 0
    blocks = -(-columns // 64)
    assert 1 <= bitmap_splits(-(-rows // 64), blocks) <= max(1, blocks // 8)
