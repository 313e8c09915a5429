"""Reports of a study: every file says what the study says, and the page is safe and alone."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from prunekit import report
from prunekit.analysis.decoding import Decoding
from prunekit.analysis.grid import MetricGrid
from prunekit.analysis.quality import generative
from prunekit.analysis.sequence_metrics import SEQUENCE_METRICS
from prunekit.analysis.spaces import METRICS
from prunekit.analysis.subspace import SUBSET_FIELDS, Item, Subspace
from prunekit.analysis.theory import theory
from prunekit.analysis.transcripts import Generation, Step, TopToken
from prunekit.errors import PrunekitError
from prunekit.evaluation.intervals import bootstrap_mean, wilson
from prunekit.report import (
    answer_charts,
    charts,
    contents,
    grid_charts,
    page,
    png,
    sentences,
    summary_tables,
    terminal,
)
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


def make_study(size: float = 0.1, right: tuple[int, int] = (50, 48), **meta: object) -> Study:
    decoding = make_decoding(size)
    layers = make_grid(("prompt", "step", "layer", "sublayer"), 4, size, shape=(6, 8, LAYERS, 2))
    model = {"architecture": "llama", "layers": LAYERS, "kept_blocks": list(range(LAYERS))}
    scores = {
        name: {"accuracy": wilson(found, 72), "accuracy_normalised": wilson(found, 72)}
        | generative(decoding.sequence, dense=name == "dense")
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
        theory=theory(layers),
        scores=scores,
    )


def sweep_rows() -> list[dict[str, object]]:
    def interval(mean: float) -> dict[str, object]:
        return {"mean": mean, "low": mean - 0.1, "high": None, "n": 24}

    keys = {"accuracy": 0.6, "exact_prefix_share": 0.5, "identical": 0.4, "chrf": 30.0}
    return [
        {"count": n, "scores": {key: interval(v - 0.01 * n) for key, v in keys.items()}}
        for n in (0, 2, 4)
    ]


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study(sweep=sweep_rows())


@pytest.fixture(scope="module")
def folder(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("report") / "deep" / "study"
    assert report.save(study, target) == target / "index.html"
    return target


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))


def test_json_holds_the_whole_study_without_nan(study, folder):
    text = (folder / "study.json").read_text(encoding="utf-8")

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    data = json.loads(text, parse_constant=refuse)
    assert data["schema_version"] == 1
    assert Study.load(folder).to_dict() == study.to_dict() == Study.from_dict(data).to_dict()
    assert data["decoding"]["sequence"]["first_divergence"][0] is None
    with pytest.raises(PrunekitError, match="schema version"):
        Study.from_dict({**data, "schema_version": 99})


def test_a_folder_without_study_is_named(tmp_path):
    with pytest.raises(PrunekitError, match=f"{tmp_path.name} holds no study"):
        Study.load(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(PrunekitError, match="holds no study that can be read"):
        Study.load(tmp_path)


def test_layer_tables_are_means_over_steps_with_intervals_over_prompts(study, folder):
    found = rows_of(folder / "layerwise.csv")
    assert len(found) == LAYERS * 2 * len(study.layerwise.metrics)
    row = next(
        r for r in found
        if (r["layer"], r["sublayer"], r["metric"]) == ("3", "mlp", "kl_dense_pruned")
    )  # fmt: skip
    per_prompt = study.layerwise["kl_dense_pruned"][:, :, 3, 1].mean(1)
    expected = bootstrap_mean(per_prompt)
    assert float(row["mean"]) == pytest.approx(per_prompt.mean(), rel=1e-12)
    assert float(row["low"]) == pytest.approx(expected.low, rel=1e-12)
    assert float(row["high"]) == pytest.approx(expected.high, rel=1e-12)
    assert row["n"] == "6"
    last = rows_of(folder / "accumulated.csv")[-1]
    assert last["layer"] == str(LAYERS - 1) and last["n"] == "6"


def test_step_tables(study, folder):
    found = rows_of(folder / "decoding.csv")
    row = next(r for r in found if (r["step"], r["metric"]) == ("5", "p_cosine"))
    mean = study.decoding.teacher_forced["p_cosine"][:, 5].mean()
    assert float(row["mean"]) == pytest.approx(mean, rel=1e-12)


def test_generation_table_keeps_texts_and_leaves_nan_empty(study, folder):
    found = rows_of(folder / "generations.csv")
    assert len(found) == PROMPTS
    assert found[0]["first_divergence"] == "" and found[0]["identical"] == "1.0"
    assert found[1]["first_divergence"] == "1.0"
    assert found[6]["dense_text"] == study.decoding.generations[6].dense_text  # a line break
    assert "\\ud800" in found[3]["dense_text"]  # has no UTF-8 form: written as an escape


def test_other_tables(study, folder):
    scores = rows_of(folder / "scores.csv")
    row = next(r for r in scores if (r["model"], r["score"]) == ("pruned", "accuracy"))
    assert float(row["mean"]) == pytest.approx(48 / 72) and row["n"] == "72"
    assert float(row["low"]) == pytest.approx(wilson(48, 72).low)
    questions = rows_of(folder / "subspace.csv")
    assert questions[2]["id"] == "q2" and float(questions[2]["logprob_pruned_1"]) == -3.0
    assert len(rows_of(folder / "theory.csv")) == 3 * LAYERS * 2
    swept = rows_of(folder / "sweep.csv")
    assert [r["count"] for r in swept if r["score"] == "chrf"] == ["0", "2", "4"]


def test_figures_show_data_in_the_colours_of_the_legend(folder):
    expected = {
        "layerwise_similarity": ("h", "z", "p"),
        "layerwise_estimates": ("p", "estimate"),
        "accumulated": ("h", "z", "p", "reverse"),
        "stepwise": ("h", "z", "p", "generative"),
        "options": ("dense", "pruned"),
        "single_step_vs_generative": ("dense", "pruned", "single"),
    }
    assert {path.stem for path in (folder / "figures").iterdir()} == set(expected)
    for name, roles in expected.items():
        image = imread(folder / "figures" / f"{name}.png")[..., :3]
        assert image.shape[0] > 400 and image.shape[1] > 700
        for role in roles:
            near = np.abs(image - to_rgb(charts.COLORS[role])).max(-1) < 0.02
            assert near.sum() > 100, (name, role)


def page_parts(folder: Path) -> tuple[str, str]:
    """The page without its data, and the data's JSON."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    match = re.search(r'<script type="application/json" id="study">(.*?)</script>', text, re.S)
    assert match is not None
    return text.replace(match[1], ""), match[1]


def test_page_is_one_small_file_that_loads_nothing(folder):
    frame, data = page_parts(folder)
    assert len(frame) + len(data) < 2_000_000
    assert "http:" not in frame and "https:" not in frame and "//cdn" not in frame
    assert not re.search(r"<link|<img|<iframe|@import|url\(|\bsrc=|fetch\(|XMLHttp", frame)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', frame))
    assert "Content-Security-Policy" in frame and "default-src 'none'" in frame
    assert 'name="viewport"' in frame and 'data-theme="dark"' in frame


def test_page_data_is_safe_and_complete(study, folder):
    frame, data = page_parts(folder)
    assert frame.count("</script>") == frame.count("<script") == 3
    assert not set("<>&\u2028\u2029") & set(data)
    found = json.loads(data, parse_constant=lambda name: pytest.fail(name))
    assert found == json.loads(json.dumps(contents.payload(study)).replace(r"\ud800", r"\ufffd"))
    tokens = [item["dense"][3] for item in found["generations"][: len(EVIL)]]
    assert tokens == [text.replace("\ud800", "\ufffd") for text in EVIL]
    assert "Dense &lt;one&gt; → Pruned &amp; two" in frame
    first = found["generations"][1]
    assert first["divergence"] == 1 and len(first["kl"]) == len(first["top"]) == STEPS
    assert first["top"][0][1][0] == [" t4", 0.1]
    shown = [figure["key"] for figure in found["figures"]]
    assert shown == [
        path.stem
        for path in sorted((folder / "figures").iterdir(), key=lambda p: shown.index(p.stem))
    ]


def test_page_curves_equal_the_grid(study, folder):
    found = json.loads(page_parts(folder)[1])
    charts_of = {chart["key"]: chart for figure in found["figures"] for chart in figure["charts"]}
    chart = charts_of["stepwise-kl"]
    series = {one["name"]: one for one in chart["series"]}
    expected = study.decoding.teacher_forced.interval("kl_dense_pruned", ("step",))
    for end in ("mean", "low", "high"):
        assert series["KL(dense‖pruned)"][end] == pytest.approx(getattr(expected, end), rel=1e-4)
    valid = study.decoding.teacher_forced.mean("estimate_valid", ("step",))
    assert series["estimate"]["valid"] == pytest.approx(valid, abs=1e-4)
    assert series["estimate"]["dashed"] and not series["estimate"]["low"]
    assert (
        charts_of["layerwise-attn"]["marks"] == [7, 9] and not charts_of["layerwise-mlp"]["marks"]
    )
    counts = charts_of["first-divergence"]["series"][0]
    steps = [g.first_divergence for g in study.decoding.generations]
    assert sum(counts["mean"]) == sum(step is not None for step in steps)
    assert f"{steps.count(None)} of {PROMPTS}" in charts_of["first-divergence"]["note"]


def drawn_by_a_browser(html: Path, profile: Path) -> str:
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    quiet = "--disable-component-update --disable-sync --virtual-time-budget=2000 --dump-dom"
    done = subprocess.run(
        ["chromium", *flags.split(), *quiet.split(), f"--user-data-dir={profile}",
         f"file://{html}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.stdout.partition('id="study"')[0]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_draws_the_page(folder, tmp_path):
    drawn = drawn_by_a_browser(folder / "index.html", tmp_path / "profile")
    assert drawn.count("<path") > 50 and "hidden state h" in drawn
    assert drawn.count('data-step="') == 2 * STEPS
    assert "Prompt 0: &lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in drawn
    assert "<script>alert" not in drawn
    small = tmp_path / "small.html"
    small.write_text(page.render(contents.payload(make_study(0.001))), encoding="utf-8")
    drawn = drawn_by_a_browser(small, tmp_path / "profile")
    assert ">5·10⁻⁴<" in drawn and "10^" not in drawn  # short enough for the ticks' margin


def test_the_right_option_is_marked_where_a_long_one_is_not_cut(study):
    item = study.subspace.items[0]
    long = replace(item, options=tuple(f"{option} and so on" * 9 for option in item.options))
    subspace = replace(study.subspace, items=(long,))
    chart = answer_charts.options(subspace, None).charts[0]
    assert [name[:4] for name in chart.categories if "✓" in name] == [f"✓ {'ABCD'[item.answer]}."]


def test_a_folder_with_something_else_is_refused(study, folder, tmp_path):
    before = (folder / "study.json").stat().st_mtime_ns
    with pytest.raises(PrunekitError, match="not empty"):
        report.save(study, folder)
    assert (folder / "study.json").stat().st_mtime_ns == before
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(PrunekitError, match=r"study\.json"):
        report.save(study, tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_interrupted_saving_leaves_the_old_study(tmp_path, monkeypatch):
    bare = Study({**make_study().meta})
    report.save(bare, tmp_path / "out")
    before = (tmp_path / "out" / "index.html").read_text()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(png, "draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report.save(make_study(), tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "index.html").read_text() == before


def test_sections_that_are_missing_are_left_out(tmp_path):
    whole = make_study()
    for only in ("accumulated", "subspace"):
        part = Study(whole.meta, **{only: getattr(whole, only)})
        report.save(part, tmp_path / only)
        names = {path.name for path in (tmp_path / only).iterdir()}
        assert names == {"study.json", "index.html", "figures", f"{only}.csv"}


def said(study: Study) -> str:
    return " ".join(one.text for one in sentences.describe(study))


def test_sentences_say_whether_the_estimate_holds():
    small, middle, large = (make_study(size) for size in (0.005, 0.15, 2.0))
    assert "estimate of KL is valid at" in said(small)
    assert not any(one.warn for one in sentences.describe(small))
    assert "so take it with care" in said(middle)
    assert "is not usable here" in said(large)
    assert [one.warn for one in sentences.describe(large)].count(True) == 1


@pytest.mark.parametrize(
    ("right", "verdict", "claim"),
    [
        ((50, 48), "within the dense one's interval", True),
        ((50, 40), "though the two intervals overlap", False),
        ((50, 20), "the intervals do not overlap", False),
    ],
)
def test_sentences_claim_no_more_than_the_scores_show(right, verdict, claim):
    text = said(make_study(right=right))
    assert verdict in text and "goes from 69.44 % [" in text
    assert ("does not show what happened" in text) == claim


def test_sentences_about_few_prompts_and_questions():
    whole = make_study()
    assert "Only" not in said(whole)
    decoding = replace(whole.decoding, generations=whole.decoding.generations[:5])
    few = {name: {"accuracy": wilson(6, 10)} for name in ("dense", "pruned")}
    text = said(replace(whole, decoding=decoding, scores=few))
    assert "Only 5 prompts" in text and "Only 10 questions" in text
    assert "does not show what happened" not in text


def test_identical_models_are_called_identical(tmp_path):
    whole = make_study()
    grid = whole.decoding.teacher_forced
    values = {
        n: np.ones_like(v) if n.endswith("cosine") else np.zeros_like(v)
        for n, v in grid.values.items()
    }
    values |= {n: np.zeros_like(v) for n, v in values.items() if "one_minus" in n}
    same = MetricGrid(grid.axes, grid.labels, values)
    nothing = np.full(PROMPTS, math.nan)
    texts = tuple(replace(g, first_divergence=None) for g in whole.decoding.generations)
    sequence = {
        **whole.decoding.sequence,
        "first_divergence": nothing,
        "identical": nothing * 0 + 1,
    }
    sequence["identical"] = np.ones(PROMPTS)
    study = replace(whole, decoding=Decoding(same, texts, sequence))
    text = said(study)
    assert "identical at every position" in text and "all 24 greedy texts are identical" in text
    assert "KL(dense‖pruned) averages" not in text
    # its figures have a logarithmic axis without any positive value
    report.save(Study(study.meta, decoding=study.decoding), tmp_path / "out")
    cards = contents.payload(study)["hierarchy"]
    assert [card["value"]["mean"] for card in cards] == [1, 1, 1]


def test_removal_replaces_the_layerwise_figure():
    whole = make_study()
    other = replace(whole, removal=make_grid(whole.layerwise.axes, 11, shape=(6, 8, LAYERS, 2)))
    titles = [contents.figures(one)[0].text for one in (whole, other)]
    assert "replaced by its pruned twin" in titles[0] and "is removed" in titles[1]
    means = [contents.figures(one)[0].charts[0].series[2].mean for one in (whole, other)]
    assert (
        means[1] == pytest.approx(other.removal["p_cosine"][:, :, :, 0].mean((0, 1)), rel=1e-12)
        and means[0] != means[1]
    )


def test_estimates_go_with_the_kl_whose_weights_they_have():
    whole = make_study()
    labels = [
        contents.figures(replace(whole, meta={**whole.meta, "weights": w}))[1].charts[0].y_label
        for w in ("base", "other")
    ]
    assert labels == ["KL(dense‖pruned) (nats)", "KL(pruned‖dense) (nats)"]


def test_layers_without_change_have_no_estimate_figure():
    whole = make_study().layerwise
    values = {name: value.copy() for name, value in whole.values.items()}
    values["kl_dense_pruned"][:] = 0
    still = MetricGrid(whole.axes, whole.labels, values)
    assert grid_charts.layerwise_estimates(grid_charts.Traced(still, False, {})) is None
    values["kl_dense_pruned"][:, :, 4, 1] = 0.5
    figure = grid_charts.layerwise_estimates(grid_charts.Traced(still, False, {}))
    assert [chart.key for chart in figure.charts] == ["estimate-kl-mlp", "estimate-cos-mlp"]


def test_dropped_layers_are_counted_in_the_dense_model():
    dense = {"kept_blocks": [0, 1, 2, 3, 4, 6], "dropped": {"attn": [1], "mlp": []}}
    pruned = {"kept_blocks": [0, 1, 3, 4, 6], "dropped": {"attn": [1, 3], "mlp": [4]}}
    models = {"dense": dense, "pruned": pruned}
    assert contents.dropped_layers(models) == {"attn": [2, 4], "mlp": [2, 5]}


def test_invalid_estimates_are_marked(tmp_path):
    x = list(range(6))
    exact = charts.Series("exact", "p", x, [1.0] * 6)
    for valid, marked in (([1.0] * 6, []), ([1, 0.4, 0.5, 0, 1, math.nan], [1, 3])):
        estimate = charts.Series("estimate", "estimate", x, [2.0] * 6, valid=valid)
        assert estimate.invalid_at() == marked
        chart = charts.Chart("c", "t", "layer", "KL", [exact, estimate], log=True)
        png.draw(charts.Figure("f", "t", "", [chart]), tmp_path / f"{len(marked)}.png")
    drawn = [imread(tmp_path / f"{count}.png") for count in (0, 2)]
    assert drawn[0].shape == drawn[1].shape and not np.array_equal(*drawn)


def test_series_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="differ in length"):
        charts.Series("a", "p", [0, 1], [0.5])


@pytest.mark.parametrize(
    ("number", "short", "shown"),
    [
        (0.99999871, 0.9999987, "0.999999"),
        (0.99312346, 0.9931235, "0.9931"),
        (1234567.0, 1234567, "1.23e+06"),
        (0.000123456, 0.00012346, "1.23e-04"),
        (3.0, 3, "3"),
        (45.6789, 45.6789, "45.68"),
        (math.nan, None, "–"),
        (math.inf, None, "∞"),
    ],
)
def test_numbers_keep_what_matters(number, short, shown):
    assert charts.compact_number(number) == short
    assert summary_tables.number(number) == shown


def test_values_hide_intervals_that_say_nothing():
    assert str(summary_tables.Value(50.0, 41.25, 58.75, "%")) == "50 % [41.25, 58.75]"
    assert str(summary_tables.Value(25.0, 25.0, 25.0, "%")) == "25 %"
    assert str(summary_tables.Value(2.5)) == "2.5"


def test_terminal_tables_show_the_numbers(study):
    def text(shown: object) -> str:
        out = io.StringIO()
        terminal.show(shown, out)
        return out.getvalue()

    summary = text(terminal.study_summary(study))
    for metric in ("kl_dense_pruned", "kl_pruned_dense", "kl_estimate"):
        found = study.summary()[metric]
        ends = [
            summary_tables.number(float(getattr(found, end))) for end in ("mean", "low", "high")
        ]
        assert f"{ends[0]} nats [{ends[1]}, {ends[2]}]" in summary
    assert "estimates valid" in summary and "first difference after" in summary
    assert "single-step: accuracy" in summary and "69.44 % [" in summary and "66.67 % [" in summary
    other = make_study(size=2.0)
    both = text(terminal.studies_side_by_side({"small": study, "large": other}))
    ends = [
        summary_tables.number(float(s.summary()["kl_dense_pruned"].mean)) for s in (study, other)
    ]
    line = next(line for line in both.splitlines() if line.startswith("KL(dense‖pruned)"))
    assert line.index(ends[0]) < line.index(ends[1])
    assert "small: whole vocabulary" in both and "large: whole vocabulary" in both
    row = [line for line in both.splitlines() if line.startswith("KL(dense‖pruned)")][1]
    metrics = ("subset_kl_dense_pruned", "kl_dense_pruned")
    wanted = [
        summary_tables.number(float(one.subspace.grid.interval(name).mean))
        for one in (study, other)
        for name in metrics
    ]
    assert [word for word in row.split() if word in wanted] == wanted
    swept = text(terminal.sweep_table(sweep_rows()))
    assert "60" in swept and "58" in swept and "30" in swept


def test_sizes_for_people():
    assert [terminal.size(n) for n in (999, 1500, 269_000_000)] == ["999 B", "1.5 kB", "269 MB"]


def test_the_schema_is_documented():
    text = (Path(__file__).parents[3] / "docs" / "study.md").read_text(encoding="utf-8")
    for section in fields(Study):
        assert re.search(rf"^{section.name} ?$|^{section.name}  ", text, re.M), section.name
    known = re.findall(r"`([\w…]+)`", text)
    for metric in (*METRICS, *SEQUENCE_METRICS):
        whole = [name.replace("…", r"\w+") for name in known]
        ends = [f"{name}_(dense|pruned)" for name in whole]
        assert any(re.fullmatch(name, metric) for name in (*whole, *ends)), metric
