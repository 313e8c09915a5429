"""TileLang's sparse tensor-core product as a peer: a 2:4 weight by its `gemm_sp`.

TileLang is a compiler of its own; it has the product of tiles, and its user writes the kernel.
This one is as plain as its documentation's. Written against its sources; it has never run here.
"""

# TileLang reads the annotations of its kernels, so they must not become text

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from bench.harness import Absent

#: Rows of the weight and columns of a tile; as many tokens as there are, up to a limit.
ROWS, COLUMNS, MOST_TOKENS = 128, 64, 128
#: Values for each metadata word, and its type, by compute capability.
METADATA = {(8, 0): (16, "int16"), (8, 9): (16, "int16"), (9, 0): (8, "uint8")}
_TYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Product:
    """x·Wᵀ for one weight.

    Args:
        tilelang: The package.
        weight: (N, K) on an NVIDIA GPU, with two of four values zero.

    Raises:
        Absent: The GPU, the type or the shape has no such product.
    """

    def __init__(self, tilelang: Any, weight: Tensor) -> None:
        capability = torch.cuda.get_device_capability(weight.device)
        rows, columns = weight.shape
        if capability not in METADATA or weight.dtype not in _TYPES:
            raise Absent(f"TileLang's gemm_sp: not for {capability} and {weight.dtype}")
        if rows % ROWS or columns % COLUMNS:
            raise Absent(f"TileLang's gemm_sp: not for {rows} × {columns}, parts of tiles")
        self.tilelang, self.shape = tilelang, (rows, columns)
        self.arch = ".".join(map(str, capability))
        self.type, self.metadata = _TYPES[weight.dtype], METADATA[capability]
        compress = importlib.import_module("tilelang.utils.sparse").compress
        self.values, self.indices = compress(
            weight, transposed=False, block_k=COLUMNS, arch=self.arch
        )

    @property
    def held(self) -> int:
        """Bytes of the packed weight."""
        return self.values.nbytes + self.indices.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """y (M, N), a transposed view, for x (M, K)."""
        tile = min(MOST_TOKENS, max(16, 1 << (len(x) - 1).bit_length()))
        padded = -(-len(x) // tile) * tile
        wide = torch.nn.functional.pad(x, (0, 0, 0, padded - len(x)))
        return self._kernel(padded, tile)(self.values, self.indices, wide).t()[: len(x)]

    @functools.cache  # noqa: B019 (as long-lived as the weight)
    def _kernel(self, tokens: int, tile: int) -> Any:
        T: Any = importlib.import_module("tilelang.language")
        layouts = importlib.import_module("tilelang.layout")
        # the function was renamed
        layout = getattr(layouts, "make_cutlass_metadata_layout", None)
        options = {"mma_dtype": self.type, "block_k": COLUMNS, "arch": self.arch}
        if layout is None:
            layout = functools.partial(layouts.make_metadata_layout, backend="cutlass")
        rows, columns = self.shape
        kind, (per_word, word) = self.type, self.metadata

        @self.tilelang.jit(out_idx=[-1])
        def build() -> Any:
            @T.prim_func
            def main(
                values: T.Tensor((rows, columns // 2), kind),
                indices: T.Tensor((rows, columns // per_word), word),
                x: T.Tensor((tokens, columns), kind),
                y: T.Tensor((rows, tokens), kind),
            ):
                with T.Kernel(tokens // tile, rows // ROWS, threads=256) as (bx, by):
                    a = T.alloc_shared((ROWS, COLUMNS // 2), kind)
                    e = T.alloc_shared((ROWS, COLUMNS // per_word), word)
                    b = T.alloc_shared((tile, COLUMNS), kind)
                    sums = T.alloc_fragment((ROWS, tile), "float")
                    T.annotate_layout(
                        {indices: layout(indices, **options), e: layout(e, **options)}
                    )
                    T.clear(sums)
                    for k in T.Pipelined(columns // COLUMNS, num_stages=3):
                        T.copy(values[by * ROWS, k * COLUMNS // 2], a)
                        T.copy(indices[by * ROWS, k * COLUMNS // per_word], e)
                        T.copy(x[bx * tile, k * COLUMNS], b)
                        T.gemm_sp(a, e, b, sums, False, True)
                    T.copy(sums, y[by * ROWS, bx * tile])

            return main

        return build()
