"""All linear layers of a decoder block of Llama-3-8B, one after the other, with 2:4 weights.

    python -m bench.bench_block             dense, and each implementation of packed layers
    python -m bench.bench_block --quick     does it work? A small block

What decides a model's speed beside attention: query, key and value as one product, the output
projection, SiLU(gate)·up in one call, and down; half of each weight is zero. One token and sixteen
are decoding, 2048 are a prompt. A graph holds the whole block, whose weights exceed every L2 cache.
`items_s` is tokens per second of 32 such blocks. Results go to results/<device>/block.csv.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence

import prunekernels
import torch
import torch.nn.functional as F
from prunekernels import Sparse24, nm_mask, runtime
from torch import Tensor

from bench import bounds
from bench.harness import Absent, Case, Contender, Prepared, Session, Verdict, add_options

TOKENS = (1, 16, 2048)
#: Hidden size, rows of query, key and value together, and the MLP's width.
LLAMA = {"hidden": 4096, "qkv": 6144, "mlp": 14336}
SMALL = {"hidden": 64, "qkv": 96, "mlp": 128}
LAYERS = 32


class Block:
    """The weights of one block, dense or packed.

    Args:
        sizes: As `LLAMA`.
        dtype: Type of the weights.
        device: Where they are.
    """

    def __init__(self, sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> None:
        hidden, qkv, mlp = sizes["hidden"], sizes["qkv"], sizes["mlp"]
        shapes = {"qkv": (qkv, hidden), "out": (hidden, hidden), "gate": (mlp, hidden)}
        shapes |= {"up": (mlp, hidden), "down": (hidden, mlp)}
        self.dense: dict[str, Tensor] = {}
        for name, (rows, columns) in shapes.items():
            weight = torch.randn(rows, columns, device=device) / columns**0.5
            self.dense[name] = (weight * nm_mask(weight.abs(), 2, 4)).to(dtype)

    @functools.cached_property
    def packed(self) -> dict[str, Sparse24]:
        """The weights as `Sparse24`."""
        return {name: prunekernels.sparse24_pack(w) for name, w in self.dense.items()}

    def run_dense(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The block's output for x (M, hidden), with the dense weights in some type."""
        w = {name: weight.to(dtype or weight.dtype) for name, weight in self.dense.items()}
        # what attention would make of query, key and value: as many numbers
        heads = F.linear(x, w["qkv"])[:, : x.shape[1]]
        x = F.linear(heads, w["out"])
        return F.linear(F.silu(F.linear(x, w["gate"])) * F.linear(x, w["up"]), w["down"])

    def run_packed(self, x: Tensor, impl: str) -> Tensor:
        """The same by an implementation of packed layers."""
        w, linear = self.packed, prunekernels.sparse24_linear
        heads = linear(x, w["qkv"], impl=impl)[:, : x.shape[1]]
        x = linear(heads, w["out"], impl=impl)
        return linear(
            prunekernels.sparse24_gate_up(x, w["gate"], w["up"], impl=impl), w["down"], impl=impl
        )


def contenders(block: Block, tokens: int) -> list[Contender]:
    """Dense layers, and every implementation of packed ones."""
    weight = block.dense["out"]
    x = torch.randn(tokens, weight.shape[1], device=weight.device).to(weight.dtype)

    def judge(found: Tensor) -> Verdict:
        some = x[:32]
        exact = block.run_dense(some.double(), torch.float64)
        allowed = 2 * (block.run_dense(some).double() - exact).abs().max()
        error = (found[:32].double() - exact).abs().max()
        return Verdict(bool(error <= allowed), f"error {error:.2g}, allowed {allowed:.2g}")

    def cost(kind: str) -> list[bounds.Cost]:
        return [
            part for w in block.dense.values() for part in bounds.linear(kind, tokens, *w.shape)
        ]

    def dense() -> Prepared:
        held = sum(w.nbytes for w in block.dense.values())
        run = functools.partial(block.run_dense, x)
        return Prepared([run], judge, cost("dense"), held, items=tokens / LAYERS)

    def packed(impl: str) -> Prepared:
        shapes = [(tokens, *w.shape) for w in block.dense.values()]
        try:
            for shape in shapes:
                problem = runtime.Problem(weight.device, weight.dtype, shape)
                runtime.ops()["sparse24_linear"].select(problem, impl)
        except ValueError as error:
            raise Absent(str(error)) from error
        held = sum(w.nbytes for w in block.packed.values())
        run = functools.partial(block.run_packed, x, impl)
        return Prepared([run], judge, cost("24 wgmma"), held, items=tokens / LAYERS)

    impls = runtime.ops()["sparse24_linear"].impls
    named = {("2:4 expand" if impl == "eager" else f"2:4 {impl}"): impl for impl in impls}
    return [
        Contender("dense", dense),
        *(Contender(name, functools.partial(packed, impl)) for name, impl in named.items()),
    ]


def plan(session: Session) -> list[Case]:
    """The cases of a run."""
    sizes = SMALL if session.quick or session.device.type == "cpu" else LLAMA
    tokens = TOKENS[:2] if session.quick else TOKENS
    return [Case("block", "2:4", "bfloat16", {"M": count, **sizes}) for count in tokens]


@functools.lru_cache(maxsize=1)
def _block(sizes: tuple[tuple[str, int], ...], device: torch.device) -> Block:
    return Block(dict(sizes), torch.bfloat16, device)


def make(session: Session, case: Case) -> Sequence[Contender]:
    """A case's contenders; all cases of a size share one block."""
    sizes = {name: int(size) for name, size in case.sizes.items() if name != "M"}
    return contenders(_block(tuple(sizes.items()), session.device), int(case.sizes["M"]))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    options = parser.parse_args()
    session = Session.begin(options, "block.csv")
    torch.manual_seed(0)
    return session.run([(case, functools.partial(make, session, case)) for case in plan(session)])


if __name__ == "__main__":
    sys.exit(main())
