"""A sweep against the functions that it is made from; resumed, ended early, and refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import prunekit as pk
from prunekit.divergence.run import kld
from prunekit.errors import PrunekitError
from prunekit.evaluation.answering import Asking, answered
from prunekit.evaluation.intervals import Interval, paired
from prunekit.evaluation.items import Choice
from prunekit.evaluation.likelihood import option_logliks
from prunekit.evaluation.questions import Question
from prunekit.pruning import RIA, Drop, DropReport, Magnitude, Wanda, drop_
from prunekit.report import png
from prunekit.sweeping.contents import table
from prunekit.sweeping.edges import Edge
from prunekit.sweeping.floors import Floor
from prunekit.sweeping.measuring import Asked
from prunekit.sweeping.prediction import hazards, survival
from prunekit.sweeping.run import sweep

CHOICES = [
    Choice(str(index), f"w{index + 5} w6", ("w10", "w11", "w12 w13", "w14"), index % 4)
    for index in range(8)
]
QUESTIONS = [Question(str(n), f"w{n} w{n + 1} w9", f"w{n}", f"w{n}") for n in range(10, 60, 5)]
ASKING = Asking(max_new_tokens=5, batch_size=4)
TEXT = " ".join(f"w{3 + (7 * n) % 89}" for n in range(200))


@pytest.fixture
def asked(tiny, word_tokenizer, monkeypatch):
    # drawing is tests/prunekit/report's, and slow
    monkeypatch.setattr(png, "draw", lambda figure, path: path.touch())
    tokens = torch.randint(3, 93, (3, 16), generator=torch.Generator().manual_seed(2))
    options = {
        "choices": CHOICES,
        "questions": QUESTIONS,
        "asking": ASKING,
        "text": TEXT,
        "context": 32,
        "calibration": tokens,
        "speed": False,
        "progress": False,
    }

    def run(plans, **changes):
        return sweep(tiny("llama"), word_tokenizer, plans, **{**options, **changes})

    run.tokens = tokens
    return run


def test_methods_keep_their_proper_names(asked):
    found = asked([Magnitude(sparsity=0.5), RIA(sparsity=0.5)])
    assert [row.label for row in found.rows] == ["magnitude 50 %", "RIA 50 %"]
    assert not found.failed


def test_a_point_equals_what_it_is_made_from(asked, tiny, word_tokenizer, tmp_path):
    dense = tiny("llama")
    plans = [Drop("attn", 3), Wanda(sparsity=0.5)]
    found = asked(plans, counts=[2], output=tmp_path / "out", speed=True)
    assert [row.label for row in found.rows] == ["2 attentions", "Wanda 50 %"]
    pruned = copy.deepcopy(dense)
    report = drop_(pruned, Drop("attn", 2), asked.tokens, progress=False)
    (row, wanda) = found.rows
    assert row.facts["dropped"]["attn"] == list(report.dropped_attn)
    before, after = (
        option_logliks(model, word_tokenizer, CHOICES, progress=False).correct
        for model in (dense, pruned)
    )
    assert row.changes["accuracy"] == paired(before.tolist(), after.tolist())
    ours, theirs = (answered(m, word_tokenizer, QUESTIONS, ASKING) for m in (dense, pruned))
    assert row.scores["exact_match"].mean == np.mean([reply.right for reply in theirs])
    same = [a.ids == b.ids for a, b in zip(ours, theirs, strict=True)]
    assert row.scores["same_text"].mean == np.mean(same)
    kl = kld(
        dense, {"x": pruned}, [TEXT], context=32, floor="none", tokenizer=word_tokenizer,
        progress=False,
    )  # fmt: skip
    assert row.kl["kl"] == kl["x"]["means"]["kl"]
    assert row.sizes["parameters"] == sum(p.numel() for p in pruned.parameters())
    assert wanda.facts["sparsity"] == pytest.approx(0.5, abs=0.02) and wanda.speed.n == 5
    # what is on disk says the same
    told = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert told == json.loads(json.dumps(found.to_dict()))
    assert len((tmp_path / "out" / "sweep.csv").read_text().splitlines()) == 4
    assert "<script" in (tmp_path / "out" / "index.html").read_text()


def test_a_copy_that_is_the_same_loses_nothing(asked, tiny):
    found = asked({"twin": tiny("llama")})
    (row,) = found.rows
    assert row.changes["accuracy"].difference.mean == row.kl["kl"]["mean"] == 0
    assert row.scores["same_text"].mean == row.scores["same_answer"].mean == 1
    assert row.prediction["observed_same"] == 1 and row.prediction["predicted_same"] > 0.5
    assert found.best()[0].name == "twin"
    assert any("twin: accuracy changes by 0 points" in said for said in found.sentences())


def test_a_floor_is_made_of_the_dense_answers(asked, tiny, monkeypatch):
    dense = Asked.of_dense

    def right_every_other_time(self):
        found = dense(self)
        for index, reply in enumerate(found["replies"]):
            reply["right"] = index % 2 == 0
        return found

    monkeypatch.setattr(Asked, "of_dense", right_every_other_time)
    monkeypatch.setattr(Asked, "complete", lambda self, own: [2] * len(QUESTIONS))
    flips = []
    measure = Asked.of_copy

    def noted(self, *others):
        found = measure(self, *others)
        flips.append(found["kl"]["flips"])
        return found

    monkeypatch.setattr(Asked, "of_copy", noted)
    found = asked([Drop("attn", 2)], choices=())
    told = found.to_dict()
    for row, counted, data in zip(found.rows, flips, told["series"][0]["rows"], strict=True):
        curves = survival(hazards(counted), [r["entropies"] for r in found.dense["replies"]])
        kept = np.mean([curve[1] * (i % 2 == 0) for i, curve in enumerate(curves)])
        assert row.floor.floor == pytest.approx(kept) == data["exact_match_floor"]["floor"]
        assert row.floor.observed == pytest.approx(row.scores["exact_match"].mean)
        assert f"{row.floor.floor:.6f}" in found.csv() or str(row.floor.floor) in found.csv()
    assert told["exact_match_prediction"]["points"] == 2
    assert told["series"][0]["exact_match_lost_from"] == found.lost_from(found.series[0])
    assert "predicted floor" in table(found).columns


@pytest.mark.parametrize(
    ("floors", "verdict", "places"),
    [
        ([0.49, 0.3], "predict exact match: it reaches its predicted floor at 2 of 2", (1, 1)),
        ([0.25, 0.1], "give exact match a floor but do not predict it", (0, 1)),
        ([0.50, 0.5], "do not predict exact match, nor a floor of it", (None, 1)),
    ],
)
def test_whether_exact_match_is_predicted_is_said(asked, monkeypatch, floors, verdict, places):
    dense = Asked.of_dense

    def half(self):
        found = dense(self)
        for index, reply in enumerate(found["replies"]):
            reply["right"] = index % 2 == 0
        return found

    monkeypatch.setattr(Asked, "of_dense", half)
    found = asked([Drop("attn", 2)], choices=())
    (one,) = found.series
    rows = [
        replace(row, floor=Floor(0.5, floor, Interval(m - floor, m - floor, m - floor, 10), 5, 2))
        for row, floor, m in zip(one.rows, floors, (0.5, 0.32), strict=True)
    ]
    changed = replace(found, series=(replace(one, rows=tuple(rows)),))
    said = changed.sentences()
    assert any(f"Single steps {verdict}" in sentence for sentence in said)
    assert "Of 10 right answers that were complete before a text left, 4 turned wrong." in said[-2]
    labels = ["nowhere" if at is None else f"from {rows[at].label} on" for at in places]
    assert said[-1].endswith(f"may go: attentions dropped {labels[0]} (observed {labels[1]}).")


def test_nothing_is_said_of_exact_match_where_nothing_is_right(asked):
    found = asked([Drop("attn", 2)], choices=())
    assert found.floor_calibration()["dense_mean_distance"] < 0.1
    assert "can't be seen where so little is right" in found.sentences()[-1]
    assert not any("may go" in said for said in found.sentences())


def test_columns_that_nothing_was_measured_for_are_left_out(asked):
    found = asked([Drop("attn", 1)], choices=())
    columns = table(found).columns
    assert "× dense speed" not in columns and "accuracy" not in columns
    assert {"exact match", "same answer", "KL, nats", "in memory"} <= set(columns)
    assert all(len(row) == len(columns) for row in table(found).rows)
    assert "× dense speed" in table(asked([Drop("attn", 1)], kl=False, speed=True)).columns


@pytest.mark.parametrize("by_chance", [0.2, 1.0])
def test_agreement_by_chance_is_told(asked, tiny, by_chance):
    found = asked({"twin": tiny("llama")}, choices=(), kl=False)
    (one,) = found.series
    assert found.to_dict()["series"][0]["rows"][0]["same_answer_by_chance"] == one.rows[0].by_chance
    row = replace(one.rows[0], by_chance=by_chance)
    said = replace(found, series=(replace(one, rows=(row,)),)).sentences()
    told = any("usual answers to any question: twin (100 %, by chance 100 %)." in s for s in said)
    assert told == (by_chance == 1)


def test_it_goes_on_where_it_stopped(asked, tmp_path, monkeypatch):
    plans, measure = [Drop("mlp", 2)], Asked.of_copy

    def killed(self, key, *others):
        if key == "mlp-002":
            raise KeyboardInterrupt
        return measure(self, key, *others)

    monkeypatch.setattr(Asked, "of_copy", killed)
    with pytest.raises(KeyboardInterrupt):
        asked(plans, output=tmp_path, kl=False)
    measured = []
    monkeypatch.setattr(
        Asked, "of_copy", lambda self, key, *o: (measured.append(key), measure(self, key, *o))[1]
    )
    whole = asked(plans, output=tmp_path, kl=False)
    assert measured == ["mlp-002"]
    assert asked([*plans, Drop("attn", 1)], output=tmp_path, kl=False).series[0] == whole.series[0]
    assert measured == ["mlp-002", "attn-001"]
    fresh = asked(plans, kl=False).to_dict()
    again = whole.to_dict()
    for one in (fresh, again):
        for row in one["series"][0]["rows"]:
            del row["seconds"]
    assert fresh == again
    with pytest.raises(PrunekitError, match=r"other open questions .*: choose another output"):
        asked(plans, output=tmp_path, kl=False, questions=QUESTIONS[1:])


def test_a_report_is_a_ranking(asked, tiny):
    report = drop_(tiny("llama"), Drop("all", 2), asked.tokens, progress=False)
    found = asked([report], counts=[1, 5], kl=False)
    assert isinstance(report, DropReport)
    first, many = (row.facts["dropped"] for row in found.rows)
    assert sum(map(len, first.values())) == 1 and sum(map(len, many.values())) == 5
    with pytest.raises(PrunekitError, match="this model can lose 1 to 8"):
        asked([report], counts=[9])
    with pytest.raises(PrunekitError, match="this model can lose 1 to 3"):
        asked([Drop("block", 1)], counts=[4])


def test_a_series_ends_where_both_sides_are_lost(asked, monkeypatch):
    real = Asked.of_copy

    def ruined(self, key, *others):
        found = real(self, key, *others)
        right = key == "attn-001"
        found["choices"]["right"] = [right] * len(CHOICES)
        found["answers"]["right"] = [float(right)] * len(QUESTIONS)
        return found

    dense = Asked.of_dense

    def perfect(self):
        found = dense(self)
        found["choices"]["right"] = [True] * len(CHOICES)
        for reply in found["replies"]:
            reply["right"] = True
        return found

    monkeypatch.setattr(Asked, "of_copy", ruined)
    monkeypatch.setattr(Asked, "of_dense", perfect)
    found = asked([Drop("attn", 4)], kl=False, budget=2)
    (series,) = found.series
    assert [row.label for row in series.rows][-1] == "2 attentions"
    assert series.left == ("3 attentions", "4 attentions")
    assert found.edges(series)["exact_match"] == Edge(holds=0, shown=None, lost=1)
    assert any("not measured, by the budget: 3 attentions, 4" in said for said in found.sentences())
    assert found.best() == (series, 0)
    whole = asked([Drop("attn", 4)], kl=False)
    assert len(whole.series[0].rows) == 4


def test_a_copy_that_fails_leaves_the_others(asked, tiny, tmp_path):
    broken = tiny("llama")
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    plans = {"broken": broken, "nowhere": str(tmp_path / "nowhere"), "whole": tiny("llama")}
    found = asked(plans, kl=False)
    assert [row.label for row in found.failed] == ["broken", "nowhere"]
    assert "NaN" in found.rows[0].error and "nowhere" in found.rows[1].error
    assert found.rows[2].scores["same_text"].mean == 1
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_one_kind_of_question_is_enough(asked):
    choosing = asked([Drop("attn", 1)], questions=(), kl=False)
    assert choosing.sides() == ("accuracy",) and not choosing.rows[0].prediction
    writing = asked([Drop("attn", 1)], choices=())
    assert f"on {len(QUESTIONS)} open questions." in writing.sentences()[0]
    assert writing.sides() == ("exact_match",) and "accuracy" not in writing.rows[0].scores


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plans": []}, "nothing to try"),
        ({"choices": (), "questions": ()}, "nothing to ask"),
        ({"budget": 0.0}, "budget is 0"),
        ({"asking": replace(ASKING, max_new_tokens=64)}, "the model's context is 64"),
        ({"plans": [Drop("attn", 2, "consecutive")]}, "use discrete or iterative"),
        ({"plans": [Wanda(), Wanda()]}, "asked for twice"),
    ],
)
def test_what_can_not_be_swept(asked, changes, message):
    with pytest.raises(PrunekitError, match=message):
        asked(changes.pop("plans", [Drop("attn", 1)]), **changes)


def test_it_is_public():
    assert pk.sweep is sweep
