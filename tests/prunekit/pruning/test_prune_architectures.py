"""Every method on every architecture: exact counts, kept weights untouched."""

from __future__ import annotations

import pytest
import torch
from pruned_models import METHODS, prune, refs_of

from prunekit.pruning import (
    patterns,
)

PATTERNS = ["unstructured", "2:4"]
MORE_PATTERNS = ["4:8", "1:4", "3:4"]


def check_exact(ref, report, dense, method, pattern):
    """Counts are exact, and kept weights of mask-only methods are untouched."""
    parsed = patterns.parse(pattern)
    matrix = ref.matrix
    zero = matrix == 0
    if parsed.structured:
        groups = zero.reshape(-1, parsed.of).sum(-1)
        assert bool((groups == parsed.of - parsed.keep).all())
    elif method == "wanda":
        assert bool((zero.sum(-1) == matrix.shape[1] // 2).all())
    else:
        assert int(zero.sum()) == matrix.numel() // 2
    assert report.zeros == int(zero.sum()) and report.kept == int((~zero).sum())
    assert report.shape == tuple(matrix.shape)
    if method not in ("sparsegpt", "admm"):
        assert torch.equal(matrix, dense.masked_fill(zero, 0))


def check_architecture(tiny, architecture, method, pattern, tokens, dtype=torch.float32):
    model = tiny(architecture).to(dtype)
    tokens = tokens.repeat(16, 1) if method == "admm" else tokens  # as many as there are inputs
    dense = {ref.name: ref.matrix.clone() for ref in refs_of(model)}
    before = model(tokens).logits
    others = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not any(part in name for part in ("layers.", ".h."))
    }
    report = prune(model, METHODS[method](pattern=pattern), tokens, batch_size=1)
    by_name = {matrix.name: matrix for matrix in report.matrices}
    for ref in refs_of(model):
        if ref.name.endswith("shared_expert_gate"):
            assert ref.name in report.left_dense
            assert torch.equal(ref.matrix, dense[ref.name])
            continue
        check_exact(ref, by_name[ref.name], dense[ref.name], method, pattern)
        error = by_name[ref.name].relative_error
        if by_name[ref.name].note:
            assert ref.expert is not None
        else:
            assert error is not None and 0 < error < 1
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in others.items())
    after = model(tokens).logits
    assert bool(torch.isfinite(after).all()) and not torch.equal(before, after)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_every_architecture(architecture, tiny, token_ids, method, pattern):
    check_architecture(tiny, architecture, method, pattern, token_ids)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", [*PATTERNS, *MORE_PATTERNS])
@pytest.mark.parametrize("method", METHODS)
def test_every_architecture_pattern_and_dtype(
    architecture, tiny, token_ids, method, pattern, dtype
):
    check_architecture(tiny, architecture, method, pattern, token_ids, dtype)
