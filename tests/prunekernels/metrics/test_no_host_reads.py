"""The kernels' path never waits for a value on the host: what capture in a CUDA graph needs.

Run in the interpreter, where a mode sees every operation of torch between the kernels and refuses
those whose result the host reads, whose shape depends on values, or whose operands come from
Python: on a GPU those would be copied from pageable memory, which no capture allows.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import run_interpreted
from prunekernels import checks, reference
from prunekernels.metrics import partial, tuning
from prunekernels.metrics.options import OutputHead, PairOptions, checked_subset
from prunekernels.metrics.top_tokens import top_ids
from prunekernels.runtime import interpreting
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(interpreting(), reason="already in the interpreter's process")

#: Operations that wait for the device; with indices of bool, `index` looks for the true ones.
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")
READS += ("unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor")


class NoHostReads(TorchDispatchMode):
    """Refuses what a stream that is being captured could not do."""

    def __init__(self) -> None:
        super().__init__()
        self.from_host: list[Tensor] = []  # tensors of one number that Python made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        # What Python makes a tensor of (an index that is a list, `torch.tensor`) passes here first.
        if name == "lift_fresh":
            if args[0].dim():
                raise RuntimeError(f"the host copies to the device: {tuple(args[0].shape)}")
            self.from_host.append(args[0])
        elif not name.startswith(("fill_", "index_put_")) and any(
            operand is number for operand in args for number in self.from_host
        ):
            raise RuntimeError(f"the host copies a number to the device: {func.name()}")
        booleans = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for place in args[1:2]
            if isinstance(place, list | tuple)
            for index in place
        )
        if name in READS or name.split(".")[0] in READS or booleans:
            raise RuntimeError(f"the host reads a value: {func.name()}")
        return func(*args, **(kwargs or {}))


@compiled
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: float(x.max()),
        lambda x: torch.equal(x, x),
        lambda x: torch.unique(x),
    ],
)
def test_the_mode_sees_reads(read: Any) -> None:
    with pytest.raises(RuntimeError, match="the host reads"), NoHostReads():
        read(torch.randn(3))


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: x[[0, 2]],
        lambda x: x.__setitem__([0, 2], 1.0),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x + torch.tensor(1.0, device=x.device),
        lambda x: torch.where(x > 0, x, x.new_tensor(3.0)),
    ],
)
def test_the_mode_sees_copies_from_the_host(copy: Any) -> None:
    with pytest.raises(RuntimeError, match="the host copies"), NoHostReads():
        copy(torch.randn(3))


def test_the_mode_lets_kernels_fill_with_a_number() -> None:
    x = torch.randn(3)
    with NoHostReads():
        x[1:] = 7.0
        x.masked_fill_(x < 0, 1.0)
    assert x[1:].tolist() == [7.0, 7.0]


@compiled
def test_nothing_is_copied_to_the_host_in_ways_that_no_mode_sees() -> None:
    from prunekernels.metrics import (
        head_triton,
        merge_triton,
        pair_triton,
        rows,
        second_pass_triton,
        top_tokens,
        vector_triton,
    )

    kernels = (head_triton, merge_triton, pair_triton, second_pass_triton, rows, vector_triton)
    for module in (*kernels, partial, top_tokens):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert names.isdisjoint({"tolist", "numpy", "cpu", "synchronize"}), module.__name__


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a CUDA graph is captured, where checks of values are left out."""
    monkeypatch.setattr(checks, "_capturing", lambda tensor: True)


def logits() -> tuple[Tensor, Tensor]:
    base = torch.randn(2, 2, 700).transpose(0, 1)  # rows that no view flattens
    other = base + 0.2 * torch.randn(2, 2, 700)
    base[0, 1, 5:90] = -torch.inf  # in the kernel's rare paths too
    return base, other


@interpreted
@pytest.mark.parametrize("fields", ["", "kl_base_other,flipped"])
def test_pair_stats_with_everything(fields: str, capturing: None) -> None:
    from prunekernels.metrics import pair_triton

    base, other = logits()
    labels, subset = torch.arange(4).reshape(2, 2), torch.tensor([4, 600, 2])
    with NoHostReads():
        checks.token_ids("pair_stats", 700, labels, subset)
        options = PairOptions(0.8, 5, "full", "other", fields, labels=True)
        for design in tuning.DESIGNS:
            pair_triton.pair_stats(base, other, labels, subset, options, design)
        pair_triton.pair_stats(base, other, None, None, PairOptions(fields=fields))


@interpreted
def test_pair_state_and_merge() -> None:
    from prunekernels.metrics import pair_triton

    base, other = logits()
    labels = torch.arange(4).reshape(2, 2)
    options = PairOptions(level="precise", labels=True)
    with NoHostReads():
        states = [
            pair_triton.pair_state(base[..., a:b], other[..., a:b], labels, a, options)
            for a, b in ((0, 300), (300, 700))
        ]
        whole = partial.merge(torch.stack(states), 1.0)
        partial.finish(whole, options)


@interpreted
@pytest.mark.parametrize(("level", "topk"), [("core", 0), ("full", 3)])
def test_heads_fused_and_through_logits(level: str, topk: int) -> None:
    """A second head: with one head, a CPU (not a GPU) looks for states that both sides share."""
    from prunekernels.metrics import head_triton

    hidden, head = torch.randn(2, 2, 16), torch.randn(90, 16)
    labels, subset = torch.tensor([3, 89]), torch.tensor([4, 60, 2])
    with NoHostReads():
        head_triton.head_pair_stats(
            *hidden,
            OutputHead(head, head.clone(), head[:, 0], torch.ones(16), 1e-6, 3.0, 0.5),
            labels,
            subset,
            PairOptions(topk=topk, level=level, labels=True),
        )


@interpreted
def test_vectors() -> None:
    from prunekernels.metrics import vector_triton

    with NoHostReads():
        vector_triton.vector_stats(*logits())
        vector_triton.vector_stats_by_warps(*logits())


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_without_reading_are_those_with(dtype: torch.dtype) -> None:
    """Ties across the cut, both zeros, both signs, infinities; every id counted once."""
    rows = torch.randn(6, 500).mul(3).to(dtype)
    rows[1] = rows[1].round()
    rows[2, ::2] = 0.0
    rows[2, 1::2] = -0.0
    rows[3, 10:] = -torch.inf
    rows[4] = -rows[4].abs()
    rows[5, 7] = torch.inf
    for k in (1, 7, 60, 500):
        with NoHostReads():
            found = top_ids(rows, k, reads=False)
        assert torch.equal(found, top_ids(rows, k, reads=True))
        wanted = rows.double().sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(found, wanted)


@compiled
def test_a_subset_that_would_be_copied_into_a_graph_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match=r"subset is a list, .* torch.tensor\(subset, device='cu"):
        checked_subset("pair_stats", [1, 2], torch.device("cuda"))


@compiled
def test_rows_that_no_view_flattens_are_taken_in_order() -> None:
    from prunekernels import pair_stats

    base, other = (torch.randn(3, 4, 5, 40).permute(2, 0, 1, 3) for _ in range(2))
    found = pair_stats(base, other, topk=2).as_dict()
    exact = reference.pair_stats(base.double(), other.double(), topk=2)
    assert torch.equal(found["topk.ids_base"], exact["topk.ids_base"])
    torch.testing.assert_close(
        found["kl_base_other"].double(), exact["kl_base_other"], rtol=1e-4, atol=1e-6
    )
