"""Studies with made-up numbers, for tests of what is shown of them."""

from __future__ import annotations

import math

import numpy as np

from prunekit.analysis.answers import Answer, Answers, reply_scores
from prunekit.analysis.decoding import Decoding
from prunekit.analysis.grid import MetricGrid
from prunekit.analysis.quality import generative
from prunekit.analysis.spaces import METRICS
from prunekit.analysis.subspace import SUBSET_FIELDS, Item, Subspace
from prunekit.analysis.theory import theory
from prunekit.analysis.transcripts import Generation, Step, TopToken
from prunekit.evaluation.answering import Reply
from prunekit.evaluation.intervals import wilson
from prunekit.study.study import Study

PROMPTS, STEPS, LAYERS = 24, 36, 30
# What a model may write: markup, comments, separators, quotes, half of a surrogate pair.
EVIL = ("</script><script>alert(1)</script>", "<!--", "\u2028", "\ud800", '"', "&lt;", "\n", " é")


def make_grid(
    axes: tuple[str, ...], seed: int, size: float = 0.1, shape: tuple[int, ...] = (PROMPTS, STEPS)
) -> MetricGrid:
    """Random metrics that agree with each other, KL about `size` nats."""
    shape = shape[: len(axes)]
    labels = {axis: list(range(length)) for axis, length in zip(axes, shape, strict=True)}
    if "sublayer" in labels:
        labels["sublayer"] = ["attn", "mlp"]
    random = np.random.default_rng(seed)
    kl = size * np.exp(random.normal(0, 1, shape))
    values = {name: random.random(shape) for name in METRICS}
    values |= {"kl_dense_pruned": kl, "kl_pruned_dense": 1.2 * kl, "kl_estimate": 0.9 * kl}
    values |= {"estimate_valid": (kl < 0.3) * 1.0, "flipped": (kl > 0.2) * 1.0}
    for space, factor in (("h", 0.02), ("z", 0.05), ("p", 0.3)):
        values[f"{space}_one_minus_cosine"] = np.minimum(kl * factor, 1)
        values[f"{space}_cosine"] = 1 - values[f"{space}_one_minus_cosine"]
    values["p_one_minus_cosine_estimate"] = values["p_one_minus_cosine"] * 1.5
    return MetricGrid(axes, labels, values)


def make_decoding(size: float) -> Decoding:
    grid = make_grid(("prompt", "step"), 1, size)
    texts, first = [], []
    for index in range(PROMPTS):
        dense = [f" word{step}" for step in range(STEPS)]
        dense[3] = EVIL[index % len(EVIL)]
        fork = None if index % 8 == 0 else index % STEPS
        pruned = [t if fork is None or i < fork else f" other{i}" for i, t in enumerate(dense)]
        top = tuple(TopToken(i, dense[3] if i == 0 else f" t{i}", 0.5 / (i + 1)) for i in range(5))
        steps = tuple(
            Step(float(grid["kl_dense_pruned"][index, i]), 0.9, top, top[::-1])
            for i in range(STEPS)
        )
        ids = tuple(range(STEPS))
        texts.append(
            Generation(
                f"Prompt {index}: {EVIL[index % len(EVIL)]}",
                (1, 2),
                ids,
                tuple(i if fork is None or i < fork else 99 for i in ids),
                "".join(dense),
                "".join(pruned),
                tuple(dense),
                tuple(pruned),
                fork,
                steps,
            )
        )
        first.append(math.nan if fork is None else float(fork))
    divergence = np.array(first)
    random = np.random.default_rng(5).random
    sequence = {
        "identical": np.isnan(divergence) * 1.0,
        "first_divergence": divergence,
        "exact_prefix": np.where(np.isnan(divergence), STEPS, divergence),
        "exact_prefix_share": np.where(np.isnan(divergence), STEPS, divergence) / STEPS,
        "chrf": 100 * random(PROMPTS),
        **{
            f"{name}_{m}": random(PROMPTS)
            for name in ("repetition", "distinct2", "eos")
            for m in ("dense", "pruned")
        },
        "length_dense": np.full(PROMPTS, float(STEPS)),
        "length_pruned": np.full(PROMPTS, float(STEPS)),
        "nll_dense_text": random(PROMPTS),
        "nll_pruned_text": 1 + random(PROMPTS),
        "perplexity_dense_text": np.exp(random(PROMPTS)),
        "perplexity_pruned_text": np.exp(1 + random(PROMPTS)),
    }
    return Decoding(grid, tuple(texts), sequence)


def make_subspace() -> Subspace:
    random = np.random.default_rng(2)
    whole = make_grid(("prompt",), 3)
    names = (*SUBSET_FIELDS, "correct_dense", "correct_pruned", "agreement", "kendall", "spearman")
    extra = {name: random.random(PROMPTS) for name in (*names, "outside_dense", "outside_pruned")}
    grid = MetricGrid(("prompt",), whole.labels, {**whole.values, **extra})
    top = tuple(TopToken(i, f" t{i}", 0.1) for i in range(5))
    items = tuple(
        Item(f"q{i}", "Costs <b>$5</b>?", ("yes", "no", "<i>", "maybe"), 1,
             (-1.0, -2.0, -3.0, -4.0), (-1.5, -1.0 - i, -3.0, -4.0), top, top)
        for i in range(PROMPTS)
    )  # fmt: skip
    return Subspace((" A", " B", " C", " D"), (1, 2, 3, 4), grid, items)


def make_answers() -> Answers:
    def reply(given: str, right: bool) -> Reply:
        return Reply((5, 6), f"It is <b>{given}</b>", given, right)

    return Answers(
        tuple(
            Answer(f"a{i}", "How <i>many</i>?", "4", reply("4", True), reply(str(i), i == 4))
            for i in range(3, 9)
        )
    )


def make_study(size: float = 0.1, right: tuple[int, int] = (50, 48), **meta: object) -> Study:
    decoding = make_decoding(size)
    layers = make_grid(("prompt", "step", "layer", "sublayer"), 4, size, shape=(6, 8, LAYERS, 2))
    model = {"architecture": "llama", "layers": LAYERS, "kept_blocks": list(range(LAYERS))}
    scores = {
        name: {"accuracy": wilson(found, 72), "accuracy_normalised": wilson(found, 72)}
        | generative(decoding.sequence, dense=name == "dense")
        | reply_scores(make_answers().measures(name))
        for name, found in zip(("dense", "pruned"), right, strict=True)
    }
    facts = {
        "names": {"dense": "Dense <one>", "pruned": "Pruned & two"},
        "models": {
            "dense": {**model, "dropped": {"attn": [], "mlp": []}, "parameters": 1000},
            "pruned": {**model, "dropped": {"attn": [7, 9], "mlp": []}, "parameters": 900},
        },
        "seed": 0,
        "temperature": 1.0,
        "lens": "final_norm",
        "weights": "base",
        "dtype": "float32",
        "device": "cpu",
        "counts": {"prompts": PROMPTS, "max_new_tokens": STEPS, "choices": 72},
        **meta,
    }
    return Study(
        facts,
        layerwise=layers,
        accumulated=make_grid(("prompt", "step", "layer"), 6, size, shape=(6, 8, LAYERS)),
        decoding=decoding,
        subspace=make_subspace(),
        answers=make_answers(),
        theory=theory(layers),
        scores=scores,
        right={
            name: tuple(question < found for question in range(72))
            for name, found in zip(("dense", "pruned"), right, strict=True)
        },
    )
