"""Turns a `Study` into figures, tables, sentences and the JSON of its page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from prunekit.analysis.answers import Answer
from prunekit.analysis.decoding import Decoding
from prunekit.analysis.findings import Findings
from prunekit.analysis.subspace import Item
from prunekit.analysis.transcripts import Generation, TopToken
from prunekit.report import answer_charts, grid_charts, sentences, summary_tables
from prunekit.report.charts import Figure, compact, compact_number
from prunekit.report.grid_charts import Traced

_MEASURES = (
    ("chrf", "chrF to the dense text", 1.0, ""),
    ("exact_prefix_share", "exact prefix", 100.0, " %"),
    ("repetition_dense", "repetition, dense", 100.0, " %"),
    ("repetition_pruned", "repetition, pruned", 100.0, " %"),
    ("perplexity_dense_text", "perplexity, dense text", 1.0, ""),
    ("perplexity_pruned_text", "perplexity, pruned text", 1.0, ""),
)


def figures(study: Findings) -> list[Figure]:
    """Every figure that the study has data for."""
    found: list[Figure | None] = []
    traced = _traced(study)
    if traced is not None:
        found += [grid_charts.layerwise_similarity(traced), grid_charts.layerwise_estimates(traced)]
    if study.accumulated is not None:
        found.append(grid_charts.accumulated_similarity(study.accumulated))
    if study.decoding is not None:
        first = [generation.first_divergence for generation in study.decoding.generations]
        found.append(grid_charts.stepwise(study.decoding.teacher_forced, first))
    if study.subspace is not None or study.decoding is not None:
        found.append(answer_charts.options(study.subspace, study.decoding))
    if study.scores is not None:
        found.append(answer_charts.scores(study.scores))
    return [figure for figure in found if figure is not None]


def tables(study: Findings) -> list[summary_tables.Table]:
    """The summary tables of the sections that the study has."""
    found = []
    if study.decoding is not None:
        found.append(summary_tables.inside_table(study.decoding.teacher_forced))
    if study.scores is not None and study.decoding is not None:
        first = study.decoding.sequence["first_divergence"]
        found.append(summary_tables.scores_table(study.scores, first))
    if study.subspace is not None:
        found += summary_tables.subspace_tables(study.subspace)
    return found


def payload(study: Findings) -> dict[str, Any]:
    """The data that the page's scripts draw."""
    decoding = study.decoding
    return {
        "names": study.meta["names"],
        "chips": _chips(study.meta),
        "hierarchy": [] if decoding is None else summary_tables.hierarchy(decoding.teacher_forced),
        "sentences": [{"text": said.text, "warn": said.warn} for said in sentences.describe(study)],
        "tables": [table.to_dict() for table in tables(study)],
        "figures": [figure.to_dict() for figure in figures(study)],
        "questions": []
        if study.subspace is None
        else [_question(item) for item in study.subspace.items],
        "answers": [] if study.answers is None else [_answer(item) for item in study.answers.items],
        "texts_lead": _TEXTS_LEAD,
        "generations": []
        if decoding is None
        else [_text(decoding, index) for index in range(len(decoding.generations))],
        "meta": [[name, value] for name, value in flatten(study.meta).items()],
    }


_TEXTS_LEAD = (
    "Both models answer the same prompts greedily. Up to the first difference they write the same "
    "tokens; the shade behind a token is how far apart the two distributions were when it was "
    "chosen. Point at a token, tap it or go to it with Tab and the arrow keys for the five tokens "
    "that each model found most likely."
)


def _traced(study: Findings) -> Traced | None:
    grid = study.layerwise if study.removal is None else study.removal
    if grid is None:
        return None
    kl = "kl_dense_pruned" if study.meta.get("weights", "base") == "base" else "kl_pruned_dense"
    return Traced(grid, study.removal is not None, dropped_layers(study.meta["models"]), kl)


def dropped_layers(models: Mapping[str, Mapping[str, Any]]) -> dict[str, list[int]]:
    """Per sublayer, the dense model's layers whose sublayer the pruned one lacks.

    Args:
        models: `Study.meta["models"]`; each numbers its own layers, `kept_blocks` tells which.
    """
    dense, pruned = models["dense"], models["pruned"]
    place = {original: index for index, original in enumerate(dense["kept_blocks"])}
    blocks = [place[original] for original in place if original not in set(pruned["kept_blocks"])]
    lacking = {}
    for sublayer, indices in pruned["dropped"].items():
        sublayers = [place[pruned["kept_blocks"][index]] for index in indices]
        already = set(dense["dropped"][sublayer])
        lacking[sublayer] = sorted({*blocks, *sublayers} - already)
    return lacking


def _chips(meta: Mapping[str, Any]) -> list[str]:
    models, counts = meta["models"], meta["counts"]
    lacking = dropped_layers(models)
    dropped = [f"{len(layers)} {name} dropped" for name, layers in lacking.items() if layers]
    before, after = (models[name]["parameters"] for name in ("dense", "pruned"))
    same = "same number of parameters" if before == after else f"{before:,} → {after:,} parameters"
    return [
        models["dense"]["architecture"],
        *dropped,
        same,
        f"{counts['prompts']} prompts, up to {counts['max_new_tokens']} tokens",
        *([f"{counts['choices']} questions"] if counts["choices"] else []),
        *([f"{counts['questions']} open questions"] if counts.get("questions") else []),
        f"T = {meta['temperature']:g}",
        *([] if meta["lens"] == "final_norm" else [f"lens {meta['lens']}"]),
        f"{meta['dtype']} on {meta['device']}",
        f"seed {meta['seed']}",
    ]


def _question(item: Item) -> dict[str, Any]:
    return {
        "question": item.question,
        "options": list(item.options),
        "answer": item.answer,
        "dense": compact(item.logprobs_dense),
        "pruned": compact(item.logprobs_pruned),
    }


def _answer(item: Answer) -> dict[str, Any]:
    sides = {
        side: {"text": reply.text, "given": reply.given, "right": reply.right}
        for side, reply in (("dense", item.dense), ("pruned", item.pruned))
    }
    return {"question": item.question, "right": item.right, **sides}


def _text(decoding: Decoding, index: int) -> dict[str, Any]:
    found: Generation = decoding.generations[index]
    sequence = {name: float(values[index]) for name, values in decoding.sequence.items()}
    return {
        "prompt": found.prompt,
        "dense": list(found.dense_tokens),
        "pruned": list(found.pruned_tokens),
        "divergence": found.first_divergence,
        "kl": compact(step.kl for step in found.steps),
        "cosine": compact(step.p_cosine for step in found.steps),
        "top": [[_top(step.top_dense), _top(step.top_pruned)] for step in found.steps],
        "measures": [
            [name, f"{summary_tables.number(scale * sequence[key])}{unit}"]
            for key, name, scale, unit in _MEASURES
            if not np.isnan(sequence[key])
        ],
    }


def _top(tokens: tuple[TopToken, ...]) -> list[list[Any]]:
    return [[token.text, compact_number(float(f"{token.probability:.4g}"))] for token in tokens]


def flatten(meta: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`meta` as dotted names and readable values; long lists of rows are left to study.json."""
    flat: dict[str, str] = {}
    for name, value in meta.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat
