"""The folder of a study: JSON, CSV tables, what is refused, what is documented."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from made_studies import LAYERS, PROMPTS, make_study

from prunekit import report
from prunekit.analysis.sequence_metrics import SEQUENCE_METRICS
from prunekit.analysis.spaces import METRICS
from prunekit.errors import PrunekitError
from prunekit.evaluation.intervals import bootstrap_mean, wilson
from prunekit.report import (
    png,
)
from prunekit.study.study import Study


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
    answers = rows_of(folder / "answers.csv")
    assert [row["pruned_right"] for row in answers] == ["False", "True", *["False"] * 4]
    assert answers[0]["pruned_text"] == "It is <b>3</b>" and answers[0]["right_answer"] == "4"


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


def test_the_schema_is_documented():
    text = (Path(__file__).parents[3] / "docs" / "study.md").read_text(encoding="utf-8")
    for section in fields(Study):
        assert re.search(rf"^{section.name} ?$|^{section.name}  ", text, re.M), section.name
    known = re.findall(r"`([\w…]+)`", text)
    for metric in (*METRICS, *SEQUENCE_METRICS):
        whole = [name.replace("…", r"\w+") for name in known]
        ends = [f"{name}_(dense|pruned)" for name in whole]
        assert any(re.fullmatch(name, metric) for name in (*whole, *ends)), metric
