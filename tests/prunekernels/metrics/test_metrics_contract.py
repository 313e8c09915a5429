"""What every metric op promises besides its values: shapes, strides, memory, tracing, errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from allocations import Allocations
from prunekernels import PairStats, head_pair_loss, head_pair_stats, pair_stats, vector_stats
from prunekernels.metrics import eager
from prunekernels.metrics.options import OutputHead, PairOptions
from torch import Tensor

LOGITS = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1))
CHANGED = LOGITS + 0.2 * torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(2))
HIDDEN, OTHER_HIDDEN = LOGITS[..., :16].contiguous(), CHANGED[..., :16].contiguous()
HEAD = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))
EVERYTHING: dict[str, Any] = {
    "temperature": 0.8,
    "labels": torch.arange(6).reshape(2, 3),
    "subset": [4, 0, 33],
    "topk": 4,
    "level": "full",
}


def same(one: PairStats, two: PairStats) -> None:
    first, second = one.as_dict(), two.as_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_leading_dimensions_only_shape_the_result() -> None:
    stats = pair_stats(LOGITS, CHANGED, **EVERYTHING)
    for name, value in stats.as_dict().items():
        per_token = "topk." in name and value.dim() == 3
        assert value.shape == ((2, 3, 4) if per_token else (2, 3)), name
    flat = pair_stats(
        LOGITS.view(6, 50), CHANGED.view(6, 50), **{**EVERYTHING, "labels": torch.arange(6)}
    )
    same(flat, stats.map(lambda tensor: tensor.flatten(0, 1)))
    one = pair_stats(LOGITS[1, 2], CHANGED[1, 2])
    assert one.kl_base_other.shape == ()
    wanted = pair_stats(LOGITS, CHANGED).kl_base_other[1, 2]
    torch.testing.assert_close(one.kl_base_other, wanted, rtol=1e-5, atol=1e-7)
    deep = pair_stats(LOGITS[None, :, :, None], CHANGED[None, :, :, None])
    assert deep.kl_base_other.shape == (1, 2, 3, 1)


def test_non_contiguous_inputs() -> None:
    wanted = pair_stats(LOGITS, CHANGED, **EVERYTHING)
    strided = torch.zeros(2, 3, 100)
    strided[..., ::2] = LOGITS
    transposed = CHANGED.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not transposed.is_contiguous()
    same(pair_stats(strided[..., ::2], transposed, **EVERYTHING), wanted)
    turned = pair_stats(LOGITS.transpose(0, 1), CHANGED.transpose(0, 1))
    assert torch.equal(turned.kl_base_other, pair_stats(LOGITS, CHANGED).kl_base_other.T)
    expanded = pair_stats(LOGITS[:1].expand(4, 3, 50), CHANGED[:1].expand(4, 3, 50))
    assert torch.equal(expanded.kl_base_other[3], pair_stats(LOGITS, CHANGED).kl_base_other[0])


@pytest.mark.parametrize("shape", [(0, 50), (2, 0, 50)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    stats = pair_stats(empty, empty, **{**EVERYTHING, "labels": labels})
    assert stats.kl_base_other.shape == shape[:-1]
    assert stats.topk is not None and stats.topk.ids_base.shape == (*shape[:-1], 4)
    hidden = head_pair_stats(empty[..., :16], empty[..., :16], HEAD)
    assert hidden.argmax_base.shape == shape[:-1]
    assert vector_stats(empty, empty).cosine.shape == shape[:-1]


def test_results_repeat_and_share_no_memory_with_the_inputs() -> None:
    base, other = LOGITS.clone(), CHANGED.clone()
    first, second = (pair_stats(base, other, **EVERYTHING) for _ in range(2))
    same(first, second)
    assert torch.equal(base, LOGITS) and torch.equal(other, CHANGED)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (base, other)}
    for name, value in first.as_dict().items():
        assert value.untyped_storage().data_ptr() not in inputs, name
    once, again = (vector_stats(base, other) for _ in range(2))
    assert all(torch.equal(once.as_dict()[name], value) for name, value in again.as_dict().items())


def test_a_row_alone_agrees_with_the_row_in_a_batch() -> None:
    base, other = torch.randn(130, 3001), torch.randn(130, 3001)
    batch = pair_stats(base, other)
    for row in (0, 64, 129):
        alone = pair_stats(base[row], other[row])
        for name, value in alone.as_dict().items():
            torch.testing.assert_close(
                value, batch.as_dict()[name][row], rtol=2e-6, atol=1e-6, msg=name
            )


def test_a_vocabulary_larger_than_a_tile_is_split() -> None:
    """Sums over tiles add up: one row of 200 000 takes several tiles, the reference none."""
    base = torch.randn(2, 200_000)
    other = base + 0.1 * torch.randn(2, 200_000)
    stats = pair_stats(base, other, level="full", topk=3)
    p = torch.softmax(base.double(), -1)
    q = torch.softmax(other.double(), -1)
    torch.testing.assert_close(
        stats.total_variation, (0.5 * (p - q).abs().sum(-1)).float(), rtol=1e-6, atol=0
    )
    kl = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(stats.kl_base_other.double(), kl, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["core", "precise", "full"])
def test_pair_stats_takes_a_tenth_of_the_logits_in_memory(level: str, dtype: torch.dtype) -> None:
    base, other = torch.randn(64, 49152).to(dtype), torch.randn(64, 49152).to(dtype)
    with Allocations() as memory:
        eager.pair_stats(base, other, None, None, PairOptions(level=level))
    logits = base.nbytes + other.nbytes
    assert 0.005 * logits < memory.peak < 0.10 * logits


def test_head_pair_stats_memory_does_not_grow_with_rows() -> None:
    head = torch.randn(60_000, 8)
    peaks = []
    for rows in (500, 1000):
        hidden = torch.randn(rows, 8)
        with Allocations() as memory:
            eager.head_pair_stats(hidden, hidden + 0.1, OutputHead(head), None, None, PairOptions())
        peaks.append(memory.peak)
    logits = 2 * 1000 * 60_000 * 4
    assert peaks[1] < peaks[0] + 500 * 1200  # the sums and results of a row, in bytes
    assert peaks[1] < 0.33 * logits


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_opcheck(options: dict[str, Any]) -> None:
    labels = options.get("labels")
    subset = torch.tensor(options["subset"]) if options else None
    tail = (options.get("temperature", 1.0), options.get("topk", 0), options.get("level", "core"))
    ops = torch.ops.prunekernels
    head = (HIDDEN, OTHER_HIDDEN, HEAD, None, None, None)
    torch.library.opcheck(
        ops.pair_stats.default, (LOGITS, CHANGED, labels, subset, *tail, "base", "", "auto")
    )
    torch.library.opcheck(
        ops.head_pair_stats.default,
        (*head, labels, subset, 1e-6, None, None, *tail, "other", "", "auto"),
    )
    torch.library.opcheck(ops.vector_stats.default, (LOGITS, CHANGED, "auto"))


def test_fullgraph_compile() -> None:
    options = {name: value for name, value in EVERYTHING.items() if name != "labels"}

    def everything(base: Tensor, other: Tensor, hidden: Tensor, labels: Tensor) -> Any:
        stats = pair_stats(base, other, labels=labels, **options)
        fused = head_pair_stats(hidden, hidden * 1.1, HEAD, topk=2)
        return stats.as_dict(), fused.as_dict(), vector_stats(base, other).as_dict()

    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="eager")
    for rows in (3, 2):
        whole = (LOGITS, CHANGED, HIDDEN, EVERYTHING["labels"])
        inputs = tuple(tensor[:, :rows] for tensor in whole)
        for found, wanted in zip(compiled(*inputs), everything(*inputs), strict=True):
            for name, value in wanted.items():
                assert torch.equal(found[name], value), name


def bad_calls() -> dict[str, tuple[Any, str]]:
    vector = torch.zeros(4, 50)
    nan = float("nan")
    return {
        "shapes": (lambda: pair_stats(LOGITS, CHANGED[:1]), r"shape, got \(2, 3, 50\) and \(1, 3"),
        "dtypes": (lambda: pair_stats(LOGITS, CHANGED.half()), "float32 and torch.float16"),
        "devices": (lambda: pair_stats(LOGITS, CHANGED.to("meta")), "device, got cpu and meta"),
        "float64": (lambda: pair_stats(LOGITS.double(), CHANGED.double()), "float64; convert"),
        "integers": (lambda: pair_stats(LOGITS.long(), CHANGED.long()), "int64; convert"),
        "not tensors": (lambda: pair_stats([1.0], [2.0]), "base must be a tensor, got list"),
        "no vocabulary": (lambda: pair_stats(LOGITS[..., :0], CHANGED[..., :0]), "non-empty"),
        "scalars": (lambda: pair_stats(LOGITS.sum(), CHANGED.sum()), "non-empty last"),
        "temperature 0": (lambda: pair_stats(LOGITS, CHANGED, temperature=0.0), "above 0, got 0"),
        "temperature -1": (lambda: pair_stats(LOGITS, CHANGED, temperature=-1), "got -1"),
        "temperature inf": (
            lambda: pair_stats(LOGITS, CHANGED, temperature=float("inf")),
            "got inf",
        ),
        "temperature nan": (lambda: pair_stats(LOGITS, CHANGED, temperature=nan), "got nan"),
        "temperature text": (
            lambda: pair_stats(LOGITS, CHANGED, temperature="1"),  # type: ignore[arg-type]
            "temperature must be a finite number above 0, got '1'",
        ),
        "temperature list": (
            lambda: pair_stats(LOGITS, CHANGED, temperature=[1.0]),  # type: ignore[arg-type]
            r"temperature must be a finite number above 0, got \[1.0\]",
        ),
        "temperature a tensor": (  # which may change after the call was prepared
            lambda: pair_stats(LOGITS, CHANGED, temperature=torch.tensor(0.7)),  # type: ignore[arg-type]
            r"temperature must be a finite number above 0, got tensor\(0.7",
        ),
        "temperature an array": (
            lambda: pair_stats(LOGITS, CHANGED, temperature=np.array([0.7, 1.0])),  # type: ignore[arg-type]
            "pair_stats: temperature must be a finite number above 0, got array",
        ),
        "loss temperature": (
            lambda: head_pair_loss(HIDDEN, HIDDEN, HEAD, temperature="1"),  # type: ignore[arg-type]
            "head_pair_loss: temperature must be a finite number above 0, got '1'",
        ),
        "fields a number": (
            lambda: pair_stats(vector, vector, fields=3),  # type: ignore[arg-type]
            "pair_stats: fields must be a sequence of names, got 3",
        ),
        "fields a list of lists": (
            lambda: pair_stats(vector, vector, fields=[["js"]]),  # type: ignore[list-item]
            r"pair_stats: fields holds \['js'\], which is not one of",
        ),
        "vector fields a number": (
            lambda: vector_stats(vector, vector, fields=3),  # type: ignore[arg-type]
            "vector_stats: fields must be a sequence of names, got 3",
        ),
        "label too large": (
            lambda: pair_stats(vector, vector, labels=torch.tensor([0, 50, 1, 2])),
            r"labels holds token id 50, outside the vocabulary 0\.\.49",
        ),
        "negative label": (
            lambda: pair_stats(vector, vector, labels=torch.tensor([0, 1, -100, 2])),
            "labels holds token id -100",
        ),
        "label shape": (
            lambda: pair_stats(vector, vector, labels=torch.tensor([0, 1])),
            r"leading shape \(4,\), got \(2,\)",
        ),
        "label dtype": (
            lambda: pair_stats(vector, vector, labels=torch.zeros(4)),
            "int64 or int32 tensor, got torch.float32",
        ),
        "subset out of range": (
            lambda: pair_stats(vector, vector, subset=[1, 70]),
            "subset holds token id 70",
        ),
        "subset twice": (
            lambda: pair_stats(vector, vector, subset=[1, 7, 1]),
            "3 ids of which 2 differ; token id 1 appears twice",
        ),
        "subset empty": (lambda: pair_stats(vector, vector, subset=[]), "non-empty list"),
        "subset floats": (
            lambda: pair_stats(vector, vector, subset=torch.tensor([0.5])),
            "subset must be an int64",
        ),
        "subset a number": (
            lambda: pair_stats(vector, vector, subset=3),  # type: ignore[arg-type]
            "subset must be a non-empty list of token ids, got 3",
        ),
        "subset of nothing": (
            lambda: pair_stats(vector, vector, subset=[None]),  # type: ignore[list-item]
            r"subset must be a non-empty list of token ids, got \[None\]",
        ),
        "subset rounded": (
            lambda: pair_stats(vector, vector, subset=[1.5, 2.5]),
            "subset must be an int64",
        ),
        "topk a fraction": (lambda: pair_stats(vector, vector, topk=1.5), "whole number, got 1.5"),
        "missing": (lambda: pair_stats(vector, None), "other must be a tensor, got NoneType"),  # type: ignore[arg-type]
        "head missing": (
            lambda: head_pair_stats(HIDDEN, HIDDEN, None),  # type: ignore[arg-type]
            "head_weight must be a tensor",
        ),
        "topk above V": (lambda: pair_stats(vector, vector, topk=51), r"0\.\.50 .* got 51"),
        "topk negative": (lambda: pair_stats(vector, vector, topk=-1), "got -1"),
        "level": (lambda: pair_stats(vector, vector, level="fast"), "core, precise, full, got"),
        "weights": (lambda: pair_stats(vector, vector, weights="p"), "base, other, got 'p'"),
        "impl": (
            lambda: pair_stats(vector, vector, impl="cuda"),
            "auto, eager, triton, triton_warp, got",
        ),
        "grad": (
            lambda: pair_stats(vector.clone().requires_grad_(), vector),
            "base requires grad, but the op has no backward",
        ),
        "head width": (lambda: head_pair_stats(HIDDEN, HIDDEN, HEAD.T), r"\(V, 16\) .* \(16, 50\)"),
        "other head": (
            lambda: head_pair_stats(HIDDEN, HIDDEN, HEAD, other_head_weight=HEAD[:4]),
            r"other_head_weight must be \(50, 16\), got \(4, 16\)",
        ),
        "bias": (
            lambda: head_pair_stats(HIDDEN, HIDDEN, HEAD, bias=torch.zeros(16)),
            r"bias must be \(50,\), got \(16,\)",
        ),
        "norm": (
            lambda: head_pair_stats(HIDDEN, HIDDEN, HEAD, norm_weight=torch.zeros(50)),
            r"norm_weight must be \(16,\), got \(50,\)",
        ),
        "softcap": (lambda: head_pair_stats(HIDDEN, HIDDEN, HEAD, softcap=0.0), "softcap must"),
        "eps": (lambda: head_pair_stats(HIDDEN, HIDDEN, HEAD, norm_eps=-1.0), "norm_eps must"),
        "scale": (lambda: head_pair_stats(HIDDEN, HIDDEN, HEAD, logit_scale=nan), "logit_scale"),
        "scale text": (
            lambda: head_pair_stats(HIDDEN, HIDDEN, HEAD, logit_scale="2"),  # type: ignore[arg-type]
            "logit_scale must be finite and not 0, got '2'",
        ),
        "head device": (
            lambda: head_pair_stats(HIDDEN, HIDDEN, HEAD.to("meta")),
            "head_weight is on meta and the rest on cpu",
        ),
        "vectors": (lambda: vector_stats(LOGITS, CHANGED[..., 1:]), r"50\) and \(2, 3, 49\)"),
        "vector missing": (lambda: vector_stats(vector, None), "other must be a tensor"),  # type: ignore[arg-type]
        "vector grad": (
            lambda: vector_stats(vector, vector.clone().requires_grad_()),
            "other requires grad",
        ),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_input_is_a_value_error_that_names_the_fix(name: str) -> None:
    call, message = bad_calls()[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_meta_tensors_give_results_of_the_right_shapes() -> None:
    on_meta = {**EVERYTHING, "labels": EVERYTHING["labels"].to("meta")}
    logits, hidden, head = (tensor.to("meta") for tensor in (LOGITS, HIDDEN, HEAD))
    for here, there in (
        (pair_stats(LOGITS, CHANGED, **EVERYTHING), pair_stats(logits, logits, **on_meta)),
        (
            head_pair_stats(HIDDEN, HIDDEN, HEAD, topk=2),
            head_pair_stats(hidden, hidden, head, topk=2),
        ),
    ):
        wanted = {name: (x.shape, x.dtype) for name, x in here.as_dict().items()}
        assert {name: (x.shape, x.dtype) for name, x in there.as_dict().items()} == wanted
        assert all(x.is_meta for x in there.as_dict().values())


def test_generators_name_fields_too() -> None:
    asked = (name for name in ("kl_base_other", "tie"))
    assert set(pair_stats(LOGITS, CHANGED, fields=asked).as_dict()) == {"kl_base_other", "tie"}  # type: ignore[arg-type]


def test_parameters_pass_where_no_gradient_is_recorded() -> None:
    head = torch.nn.Parameter(HEAD.clone())
    with torch.no_grad():
        found = head_pair_stats(HIDDEN, OTHER_HIDDEN, head)
    same(found, head_pair_stats(HIDDEN, OTHER_HIDDEN, HEAD))
    with torch.inference_mode():
        same(head_pair_stats(HIDDEN, OTHER_HIDDEN, HEAD), found)


def test_results_are_indexed_mapped_and_moved_together() -> None:
    stats = pair_stats(LOGITS, CHANGED, **EVERYTHING)
    assert dataclasses.is_dataclass(stats)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.alpha = stats.alpha  # type: ignore[misc]
    row = stats[1, 2]
    assert row.topk is not None and row.topk.ids_base.shape == (4,)
    assert row.subset is not None and row.subset.kl_base_other.shape == ()
    assert stats.topk is not None
    assert torch.equal(row.topk.ids_base, stats.topk.ids_base[1, 2])
    moved = stats.to("meta", torch.float64)
    assert moved.kl_base_other.device.type == "meta"
    assert moved.kl_base_other.dtype == torch.float64
    assert moved.argmax_base.dtype == torch.int64
    assert moved.flipped.dtype == torch.bool
    plain = pair_stats(LOGITS, CHANGED)
    assert plain.topk is plain.subset is plain.nll_base is plain.js is None
    assert "js" not in plain.as_dict()
