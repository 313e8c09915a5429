"""`bits` in the pipeline: what a model holds, what packing gets, killed runs."""

from __future__ import annotations

import copy

import pytest
import torch
from pruned_models import METHODS, prune, refs_of

import prunekit as pk
from prunekit.errors import PrunekitError
from prunekit.pruning import Magnitude, Recipe, Reconstruction, SparseGPT, Wanda, rounding


@pytest.fixture
def many_tokens():
    return torch.randint(3, 97, (8, 40), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("bits", "limit"), [(8, 127), (4, 7)])
def test_weights_are_integers_times_scales(tiny, many_tokens, method, bits, limit):
    model = tiny("llama")
    recipe = METHODS[method](pattern="2:4", update="admm", bits=bits, group=16)
    report = prune(model, recipe, many_tokens)
    for ref, matrix in zip(refs_of(model), report.matrices, strict=True):
        held = rounding.attached(ref.module)
        assert held is not None and torch.equal(held.to_dense(), ref.matrix)
        assert int(held.codes.abs().max()) <= limit
        assert int((held.codes.view(-1, 4) != 0).sum(1).max()) <= 2
        assert matrix.bits == bits and matrix.kept == matrix.size // 2 <= matrix.zeros
        assert matrix.relative_error < 1


def test_eight_bits_cost_little(tiny, many_tokens):
    errors = []
    for bits in (None, 8, 4):
        recipe = Recipe({"*.0.*": SparseGPT(pattern="2:4", update="admm", bits=bits)})
        report = prune(tiny("llama"), recipe, many_tokens)
        errors.append(sum(matrix.relative_error for matrix in report.matrices))
    assert errors[0] * 0.999 < errors[1] < errors[0] * 1.02 < errors[2]


def test_experts_are_rounded_whatever_reaches_them(tiny, many_tokens):
    model = tiny("mixtral")
    report = prune(model, Wanda(pattern="2:4", bits=4, group=8), many_tokens[:1])
    assert any("no calibration token" in matrix.note for matrix in report.matrices)
    for ref in refs_of(model):
        for part in ref.matrix.split(8, dim=1):
            for row in part:
                assert len(row.abs().unique()) <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, None), ("fp8", None)])
def test_packing_takes_the_numbers_that_pruning_chose(tiny, many_tokens, dtype, bits, group):
    model = tiny("llama").to(dtype)
    report = prune(model, SparseGPT(pattern="2:4", bits=bits, group=group), many_tokens)
    assert ("2:4, fp8" if bits == "fp8" else f"2:4, {bits} bits") in report.table()
    before = {ref.name: ref.matrix.clone() for ref in refs_of(model)}
    held = {ref.name: rounding.attached(ref.module) for ref in refs_of(model)}
    report = pk.swap_(model, merge=False)
    name = "2:4-fp8" if bits == "fp8" else f"2:4-int{bits}"
    assert {module.format for module in report.swapped} == {name}
    assert len(report.swapped) == len(before)
    for ref in refs_of(model):
        packed = ref.module.weight
        assert torch.equal(packed.to_dense(), before[ref.name])
        assert torch.equal(packed.to_dense() == 0, held[ref.name].codes.float() == 0)


@pytest.mark.parametrize("bits", [4, "fp8"])
def test_a_killed_run_goes_on_to_the_same_codes(tiny, many_tokens, tmp_path, bits):
    recipe = Wanda(pattern="2:4", bits=bits)
    dense = tiny("llama")
    whole = copy.deepcopy(dense)
    prune(whole, recipe, many_tokens, journal=tmp_path / "journal")
    (tmp_path / "journal" / "block-0003.safetensors").unlink()
    prune(dense, recipe, many_tokens, journal=tmp_path / "journal")
    for first, second in zip(refs_of(whole), refs_of(dense), strict=True):
        assert torch.equal(first.matrix, second.matrix)
        held, again = rounding.attached(first.module), rounding.attached(second.module)
        assert torch.equal(held.codes.float(), again.codes.float())
        assert torch.equal(held.scales, again.scales)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "3 bits are not supported: use 8, 4 or fp8"),
        ({"bits": "fp8", "group": 64}, "group 64 with bits fp8: a row has one scale"),
        ({"group": 64}, "group 64 with bits None: give bits"),
        ({"bits": 4, "group": 0}, "group 0 with bits 4"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(PrunekitError, match=message):
        Wanda(**settings)


def test_refusals_in_a_run(tiny, many_tokens):
    model = tiny("llama")
    with pytest.raises(PrunekitError, match="magnitude needs calibration"):
        prune(model, Magnitude(bits=8))
    with pytest.raises(PrunekitError, match=r"wanda as set fits 48 weights a row of .*down_proj"):
        prune(model, Wanda(bits=8), many_tokens[:1, :20])
    with pytest.raises(PrunekitError, match=r"reconstruction would move .* off its 8-bit values"):
        prune(model, Wanda(bits=8), many_tokens, reconstruct=Reconstruction())
