"""The ways to compare two rows of logits: ours, torch's, other people's packages, research code.

Each does some part of what `pair_stats` does: a divergence, a cross entropy of both rows, a
softmax of both. What it returns is judged against float64 formulas of that part. Divergences from
log-probabilities are timed with the log-softmax that they ask for.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prunekernels
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Absent, Verdict
from bench.peers import compiled, package

#: Largest error relative to the truth's largest value that still counts as right, by the
#: precision that a peer computes in. A divergence in bf16 keeps two digits.
FLOAT32, ROUNDED = 1e-3, 0.1
WIDTH = 576  # of the hidden states that the research code gets beside logits
#: Where torch.compile is measured, because each shape takes long to tune: rows at least, and V.
COMPILED_ROWS, COMPILED_VOCABULARIES = 256, (32000, 152064)


@dataclass(frozen=True)
class Inputs:
    """The tensors that the metric ops compare.

    Attributes:
        base: (N, V) logits, or (N, D) hidden states where there is a head.
        other: Like base.
        labels: (N,) token ids.
        head: (V, D) output embedding, or None.
    """

    base: Tensor
    other: Tensor
    labels: Tensor
    head: Tensor | None = None

    def first(self, rows: int) -> Inputs:
        """The first rows alone."""
        return Inputs(self.base[:rows], self.other[:rows], self.labels[:rows], self.head)


@dataclass(frozen=True)
class MetricPeer:
    """One way to compute some of the statistics.

    Attributes:
        name: Provider name in the results.
        run: The computation; raises Absent where its package is missing.
        returns: What it returns: names of `truth`, in order.
        mean: Whether it returns means over rows.
        precision: Largest relative error that counts as right.
        on_cpu: Whether it also runs without a GPU.
        graph: Whether a CUDA graph can hold it.
    """

    name: str
    run: Callable[[Inputs], Any]
    returns: tuple[str, ...]
    mean: bool = False
    precision: float = ROUNDED
    on_cpu: bool = True
    graph: bool = True


@torch.no_grad()
def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The statistics in float64 by their definitions, per row."""
    base, other = inputs.base.double(), inputs.other.double()
    if inputs.head is not None:
        base, other = base @ inputs.head.double().t(), other @ inputs.head.double().t()
    log_p, log_q = base.log_softmax(-1), other.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log().item()
    at = inputs.labels[:, None]
    return {
        "kl": (p * (log_p - log_q)).sum(-1),
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "js": ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2,
        "tv": (p - q).abs().sum(-1) / 2,
        "cos_prob": F.cosine_similarity(p, q, dim=-1),
        "entropy": -(p * log_p).sum(-1),
        "nll_base": -log_p.gather(-1, at)[:, 0],
        "nll_other": -log_q.gather(-1, at)[:, 0],
        "top_base": p.amax(-1),
        "top_other": q.amax(-1),
    }


def judge(peer: MetricPeer, inputs: Inputs, found: Any) -> Verdict:
    """Compare what a peer returned for (at least) the rows of `inputs` with float64."""
    exact = truth(inputs)
    rows = inputs.base.shape[0]
    values = found if isinstance(found, tuple | list) else (found,)
    worst, where = 0.0, ""
    for name, value in zip(peer.returns, values, strict=True):
        wanted = exact[name].mean() if peer.mean else exact[name]
        got = value.double() if peer.mean else value.double().reshape(-1)[:rows]
        error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3))
        if not error <= worst:  # NaN as well
            worst, where = error, name
    return Verdict(worst <= peer.precision, f"relative error {worst:.1e} {where}".strip())


def statistics(a: Tensor, b: Tensor, T: float = 1.0) -> tuple[Tensor, ...]:
    """Everything that a study reports, as plain torch in float32; the first as in `returns`."""
    a, b = a.float(), b.float()
    log_p, log_q = (a / T).log_softmax(-1), (b / T).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    d = b - a

    def variance(weight: Tensor) -> Tensor:
        mean = (weight * d).sum(-1, keepdim=True)
        return (weight * (d - mean) ** 2).sum(-1) / (2 * T * T)

    r = p * p
    along = (d * a).sum(-1, keepdim=True) / a.square().sum(-1, keepdim=True)
    across = d - along * a
    norm = a.norm(dim=-1)
    return (
        (p * (log_p - log_q)).sum(-1),
        (q * (log_q - log_p)).sum(-1),
        F.cosine_similarity(p, q, dim=-1),
        -(p * log_p).sum(-1),
        -(q * log_q).sum(-1),
        F.cosine_similarity(a, b, dim=-1),
        variance(p),
        variance(r / r.sum(-1, keepdim=True)),
        d.var(-1, correction=0),
        along[..., 0],
        (along * a).norm(dim=-1) / norm,
        across.norm(dim=-1) / norm,
        d.abs().sum(-1),
        d.norm(dim=-1),
        a.topk(2).values.diff()[..., 0],
        b.topk(2).values.diff()[..., 0],
        a.argmax(-1) != b.argmax(-1),
    )


STATISTICS = ("kl", "reverse_kl", "cos_prob", "entropy")


def kl_only(a: Tensor, b: Tensor) -> Tensor:
    """KL(p‖q) per row as plain torch in float32."""
    log_p, log_q = a.float().log_softmax(-1), b.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def _ours(inputs: Inputs, **options: Any) -> tuple[Tensor, ...]:
    found = prunekernels.pair_stats(inputs.base, inputs.other, **options)
    return found.kl_base_other, found.kl_other_base, found.cos_prob, found.entropy_base


def _ours_kl(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    found = prunekernels.pair_stats(
        inputs.base, inputs.other, fields=("kl_base_other", "kl_other_base"), **options
    )
    return found.kl_base_other, found.kl_other_base


def _ours_head(inputs: Inputs, **options: Any) -> tuple[Tensor, ...]:
    assert inputs.head is not None
    found = prunekernels.head_pair_stats(inputs.base, inputs.other, inputs.head, **options)
    return found.kl_base_other, found.kl_other_base, found.cos_prob, found.entropy_base


def _chunked_head(inputs: Inputs, rows: int = 256) -> tuple[Tensor, ...]:
    """Products in chunks, each followed by the logits op: what to beat without fusing."""
    assert inputs.head is not None
    head = inputs.head.t()
    parts = []
    for start in range(0, inputs.base.shape[0], rows):
        some = slice(start, start + rows)
        parts.append(_ours(Inputs(inputs.base[some] @ head, inputs.other[some] @ head, head)))
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def _eager_head(inputs: Inputs) -> tuple[Tensor, ...]:
    assert inputs.head is not None
    return statistics(inputs.base @ inputs.head.t(), inputs.other @ inputs.head.t())[:4]


def _compiled(function: Callable[..., Any], inputs: Inputs) -> Any:
    rows, vocabulary = inputs.base.shape
    if rows < COMPILED_ROWS or vocabulary not in COMPILED_VOCABULARIES:
        where = " or ".join(map(str, COMPILED_VOCABULARIES))
        raise Absent(f"tuning takes long: only for {COMPILED_ROWS} rows or more of {where} logits")
    return compiled(function)(inputs.base, inputs.other)


def _log_probabilities(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.base.float().log_softmax(-1), inputs.other.float().log_softmax(-1)


LIGER = functools.partial(package, install="pip install liger-kernel")
CCE = functools.partial(package, install="pip install cut-cross-entropy")
QUACK = functools.partial(package, install="pip install quack-kernels")
FLASHINFER = functools.partial(package, install="pip install flashinfer-python")
TRL = functools.partial(package, install="pip install trl")
FLA = functools.partial(package, install="pip install flash-linear-attention")


def _liger_kl(inputs: Inputs) -> Tensor:
    log_p, log_q = _log_probabilities(inputs)
    loss = LIGER("liger_kernel.transformers").LigerKLDIVLoss
    return loss(reduction="batchmean", log_target=True)(log_q, log_p)


def _liger_jsd(inputs: Inputs) -> Tensor:
    log_p, log_q = _log_probabilities(inputs)
    return LIGER("liger_kernel.transformers").LigerJSD(beta=0.5)(log_q, log_p)


def _liger_tvd(inputs: Inputs) -> Tensor:
    p, q = inputs.base.float().softmax(-1), inputs.other.float().softmax(-1)
    return LIGER("liger_kernel.transformers").LigerTVDLoss(reduction="batchmean")(p, q)


def _liger_fused_jsd(inputs: Inputs) -> Tensor:
    loss = LIGER("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=0.5)
    return loss(inputs.other, inputs.head, inputs.base, inputs.head, None)


def _cce_twice(inputs: Inputs) -> tuple[Tensor, Tensor]:
    loss = CCE("cut_cross_entropy").linear_cross_entropy
    options = {"reduction": "none"}
    first = loss(inputs.base, inputs.head, inputs.labels, **options)
    return first, loss(inputs.other, inputs.head, inputs.labels, **options)


def _quack_twice(inputs: Inputs) -> tuple[Tensor, Tensor]:
    loss = QUACK("quack").cross_entropy
    options = {"reduction": "none"}
    first = loss(inputs.base, inputs.labels, **options)
    return first, loss(inputs.other, inputs.labels, **options)


def _flashinfer_twice(inputs: Inputs) -> tuple[Tensor, Tensor]:
    softmax = FLASHINFER("flashinfer.sampling").softmax
    return softmax(inputs.base).amax(-1), softmax(inputs.other).amax(-1)


def _trl_jsd(inputs: Inputs) -> Tensor:
    loss = TRL("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss
    # a batch of rows of one token each: its batch mean is then a mean over rows
    return loss(inputs.other[:, None], inputs.base[:, None], beta=0.5, reduction="batchmean")


def _fla_kl(inputs: Inputs) -> Tensor:
    loss = FLA("fla.modules.fused_kl_div").fused_kl_div_loss
    return loss(inputs.other, inputs.base, inputs.head, inputs.head)


def research_function(path: Path | None) -> Callable[[Inputs], Tensor]:
    """The research code's function for one step: its products with the head and all it reports.

    Where there is no head it is given the logits for nothing, and as hidden states a few of them.
    """

    def run(inputs: Inputs) -> Tensor:
        if path is None:
            raise Absent("research code: give its checkout with --research PATH")
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
        module = package("transition_metrics_logging", f"not in {path}")
        said: list[str] = []
        for other, base in zip(inputs.other, inputs.base, strict=True):  # one token per call
            states = [base[None, None], other[None, None]]
            head: Callable[[Tensor], Tensor] = functools.partial(F.linear, weight=inputs.head)
            if inputs.head is None:
                # it asks for the logits of the one, then of the other
                logits = iter(states)
                states = [row[..., :WIDTH] for row in states]
                head = lambda _, logits=logits: next(logits)  # noqa: E731
            module.compute_and_log_transition_metrics(
                *states,
                head,
                0,
                0,
                log_path="",
                write_fn=lambda _, text: said.append(text),
            )
        # it prints its results; this direction is KL(other‖base)
        found = [re.search(r"REAL_KL:\s+(\S+)", text) for text in said]
        return torch.tensor([float(match[1]) for match in found if match])

    return run


#: Ways to compare (N, V) logits. Those that return means are probed on a few rows.
_LOGITS = (
    MetricPeer("prunekernels core", _ours, STATISTICS, precision=FLOAT32),
    MetricPeer(
        "prunekernels precise",
        functools.partial(_ours, level="precise"),
        STATISTICS,
        precision=FLOAT32,
    ),
    MetricPeer(
        "prunekernels full", functools.partial(_ours, level="full"), STATISTICS, precision=FLOAT32
    ),
    MetricPeer("prunekernels KL", _ours_kl, ("kl", "reverse_kl"), precision=FLOAT32),
    *(
        MetricPeer(
            f"prunekernels {level} warp",
            functools.partial(run, impl="triton_warp", **options),
            returns,
            precision=FLOAT32,
            on_cpu=False,
        )
        for level, run, options, returns in (
            ("core", _ours, {}, STATISTICS),
            ("full", _ours, {"level": "full"}, STATISTICS),
            ("KL", _ours_kl, {}, ("kl", "reverse_kl")),
        )
    ),
    MetricPeer(
        "torch eager",
        lambda i: statistics(i.base, i.other)[:4],
        STATISTICS,
        precision=FLOAT32,
    ),
    MetricPeer(
        "torch.compile",
        lambda i: _compiled(statistics, i)[:4],
        STATISTICS,
        precision=FLOAT32,
        on_cpu=False,
    ),
    MetricPeer("torch.compile KL", lambda i: _compiled(kl_only, i), ("kl",), on_cpu=False),
    MetricPeer("torch eager KL", lambda i: kl_only(i.base, i.other), ("kl",)),
    MetricPeer("Liger kl_div", _liger_kl, ("kl",), mean=True, on_cpu=False),
    MetricPeer("Liger jsd", _liger_jsd, ("js",), mean=True, on_cpu=False),
    MetricPeer("Liger tvd", _liger_tvd, ("tv",), mean=True, on_cpu=False),
    MetricPeer("TRL jsd", _trl_jsd, ("js",), mean=True),
    MetricPeer("QuACK CE x2", _quack_twice, ("nll_base", "nll_other"), on_cpu=False),
    MetricPeer("flashinfer softmax x2", _flashinfer_twice, ("top_base", "top_other"), on_cpu=False),
    MetricPeer("copy", lambda i: (i.base.clone(), i.other.clone()), ()),
)


def logit_peers(research: Path | None) -> tuple[MetricPeer, ...]:
    """Ways to compare (N, V) logits."""
    theirs = MetricPeer("research code", research_function(research), ("reverse_kl",), graph=False)
    return (*_LOGITS, theirs)


def head_peers(research: Path | None) -> tuple[MetricPeer, ...]:
    """Ways to compare (N, D) hidden states through a (V, D) head."""
    return (
        MetricPeer("prunekernels fused", _ours_head, STATISTICS, precision=FLOAT32),
        MetricPeer("prunekernels chunked", _chunked_head, STATISTICS),
        MetricPeer("torch eager", _eager_head, STATISTICS),
        MetricPeer("Liger fused jsd", _liger_fused_jsd, ("js",), mean=True, on_cpu=False),
        MetricPeer("fla fused KL", _fla_kl, ("kl",), mean=True, on_cpu=False),
        MetricPeer("cut-cross-entropy x2", _cce_twice, ("nll_base", "nll_other"), on_cpu=False),
        MetricPeer("products alone", _products, ()),
        MetricPeer("research code", research_function(research), ("reverse_kl",), graph=False),
    )


def _products(inputs: Inputs) -> tuple[Tensor, Tensor]:
    assert inputs.head is not None
    return inputs.base @ inputs.head.t(), inputs.other @ inputs.head.t()
