"""summarize: the numbers of llama.cpp's --kl-divergence, from rows whose truth is known."""

from __future__ import annotations

import math

import pytest
import torch
from prunekernels import pair_stats, summarize


def test_matches_plain_statistics() -> None:
    base = torch.randn(7, 11, 60)
    other = base + 0.5 * torch.randn(7, 11, 60)
    labels = torch.randint(60, (7, 11))
    stats = pair_stats(base, other, labels=labels, level="precise")
    found = summarize(stats)
    kl = stats.kl_base_other.flatten().double()
    assert found["rows"] == 77 and found["rows_nan"] == 0
    assert found["kl_mean"] == pytest.approx(float(kl.mean()))
    assert found["kl_mean_stderr"] == pytest.approx(float(kl.std()) / math.sqrt(77))
    assert found["kl_median"] == pytest.approx(float(kl.quantile(0.5)))
    assert found["kl_p99.9"] == pytest.approx(float(kl.quantile(0.999)))
    assert found["kl_p5"] == pytest.approx(float(kl.quantile(0.05)))
    assert found["kl_max"] == float(kl.max()) and found["kl_min"] == float(kl.min())
    agree = (base.argmax(-1) == other.argmax(-1)).double().mean()
    assert found["same_top"] == pytest.approx(float(agree))
    log_p, log_q = (torch.log_softmax(z.double(), -1) for z in (base, other))
    picked = [z.gather(-1, labels[..., None]).flatten() for z in (log_p, log_q)]
    delta = picked[1].exp() - picked[0].exp()
    assert found["prob_delta_mean"] == pytest.approx(float(delta.mean()), abs=1e-8)
    assert found["prob_delta_rms"] == pytest.approx(float(delta.square().mean().sqrt()), rel=1e-6)
    assert found["prob_delta_p90"] == pytest.approx(float(delta.quantile(0.9)), abs=1e-7)
    ratio = float((picked[0] - picked[1]).mean())
    assert found["ln_ppl_ratio"] == pytest.approx(ratio, abs=1e-6)
    assert found["ppl_ratio"] == pytest.approx(math.exp(ratio), rel=1e-6)
    assert found["ln_ppl_base"] == pytest.approx(-float(picked[0].mean()), rel=1e-6)


def test_results_of_parts_are_put_together_row_by_row() -> None:
    base = torch.randn(7, 60)
    other = base + 0.5 * torch.randn(7, 60)
    options = {"labels": torch.arange(7), "topk": 2, "subset": [3, 4], "level": "full"}
    whole = pair_stats(base, other, **options)  # type: ignore[arg-type]
    joined = type(whole).cat([whole[:3], whole[3:6], whole[6:]])
    assert joined.topk is not None and joined.topk.ids_base.shape == (7, 2)
    for name, value in whole.as_dict().items():
        assert torch.equal(joined.as_dict()[name], value), name
    assert summarize(joined) == summarize(whole)


def test_identical_rows() -> None:
    base = torch.randn(5, 60)
    found = summarize(pair_stats(base, base, labels=torch.arange(5)))
    assert found["kl_mean"] == found["kl_max"] == found["prob_delta_rms"] == 0.0
    assert found["same_top"] == found["ppl_ratio"] == found["estimate_valid"] == 1.0


def test_broken_rows_are_counted_and_left_out() -> None:
    base = torch.randn(5, 60)
    other = base + 0.1 * torch.randn(5, 60)
    whole = summarize(pair_stats(base[:4], other[:4]))
    base[4, 3] = float("nan")
    found = summarize(pair_stats(base, other))
    assert found["rows"] == 4 and found["rows_nan"] == 1
    assert found["kl_mean"] == pytest.approx(whole["kl_mean"], rel=1e-5)
    assert "prob_delta_mean" not in found


def test_infinite_divergences_stay_visible() -> None:
    base, other = torch.randn(4, 60), torch.randn(4, 60)
    other[0, 5] = float("-inf")
    found = summarize(pair_stats(base, other))
    assert found["kl_mean"] == found["kl_max"] == math.inf
    assert math.isfinite(found["kl_median"])


def test_nothing_to_summarise() -> None:
    with pytest.raises(ValueError, match="no rows to summarize"):
        summarize(pair_stats(torch.empty(0, 5), torch.empty(0, 5)))
