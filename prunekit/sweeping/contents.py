"""A sweep as sentences, a table and figures, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunekit.evaluation.intervals import Interval, Paired, needed_pairs
from prunekit.report import terminal
from prunekit.report.contents import flatten
from prunekit.report.sentences import Sentence
from prunekit.report.summary_tables import NONE, Table, Value, number
from prunekit.sweeping.edges import Edge
from prunekit.sweeping.figures import figures, plain
from prunekit.sweeping.findings import SweepFindings, Swept
from prunekit.sweeping.rows import Row, dense_scores

SIDES = {"accuracy": "accuracy", "exact_match": "exact match"}
# An exact match below this can hardly lose anything.
_NOTHING_TO_LOSE = 0.1
# Same answers in a smaller share are few anyway.
_MANY_SAME = 0.1
# Mean absolute error, as a share, from which on the prediction is said to fail.
_MISSES = 0.1
# So many of the 95 % intervals may lie below floors that hold.
_CHANCE = 0.05
HEAD = (
    "copy",
    "accuracy",
    "change, points",
    "exact match",
    "change, points ",
    "predicted floor",
    "same answer",
    "same text",
    "KL, nats",
    "× dense speed",
    "in memory",
)
_SPARE = ("in memory", "same text", "predicted floor", "× dense speed", "same answer")


def sentences(found: SweepFindings) -> list[Sentence]:
    """Where each series breaks, what the questions could show, and whether drift is predicted."""
    said: list[Sentence] = []
    scores = dense_scores(found.dense)
    openly = "open ones" if found.meta["choices"] else "open questions"
    n = " and ".join(
        f"{found.meta[count]} {what}"
        for count, what in (("choices", "multiple-choice questions"), ("questions", openly))
        if found.meta[count]
    )
    base = " and its ".join(
        f"{SIDES[side]} is {Value.of(scores[side], '%', 100)}" for side in found.sides()
    )
    said.append(Sentence(f"The dense model's {base}, on {n}."))
    if "exact_match" in scores and float(scores["exact_match"].mean) < _NOTHING_TO_LOSE:
        said.append(
            Sentence(
                "The dense model answers so few of the open questions right that exact match can "
                "hardly fall: look at the share of answers that stay the same.",
                warn=True,
            )
        )
    for one in found.series:
        if len(one.rows) == 1 and not one.rows[0].error:
            said.append(_single(one.rows[0], found))
        elif any(not row.error for row in one.rows):
            said.append(_edge(one, found))
        said += [
            Sentence(f"{row.label} failed: {row.error}", True) for row in one.rows if row.error
        ]
        if one.left:
            said.append(Sentence(f"{one.name}: not measured, by the budget: {_listed(one.left)}."))
    said += _by_chance(found)
    said += _power(found)
    said += _predicted(found)
    said += _floors(found)
    return said


def _edge(one: Swept, found: SweepFindings) -> Sentence:
    rows = [row for row in one.rows if not row.error]
    parts = [_side(side, edge, rows, found.margin) for side, edge in found.edges(one).items()]
    return Sentence(f"{one.name[:1].upper()}{one.name[1:]}: {'; '.join(parts)}.")


def _side(side: str, edge: Edge, rows: Sequence[Row], margin: float) -> str:
    """What a series does to one side: `accuracy within 2 points up to 6 (…), lost from 10`."""
    n = int(rows[0].changes[side].difference.n)
    what, points = f"{SIDES[side]} (n = {n})", f"{margin:g} points"
    if edge.holds is None:
        text = f"{what} loses more than {points} from the first copy on ({rows[0].label}"
        text += f", {_change(rows[0].changes[side])})"
    else:
        at = rows[edge.holds]
        text = f"{what} within {points} up to {at.label} ({_change(at.changes[side])})"
        if edge.shown is None:
            text += ", though at no copy are greater losses ruled out"
        elif edge.shown < edge.holds:
            text += f", greater losses being ruled out up to {rows[edge.shown].label} only"
    if edge.lost is not None:
        text += f", certainly lost from {rows[edge.lost].label} on"
    elif edge.holds is None or edge.holds < len(rows) - 1:
        text += ", certainly lost nowhere"
    return text


def _single(row: Row, found: SweepFindings) -> Sentence:
    parts = [
        f"{SIDES[side]} changes by {_change(row.changes[side])} points, {_flips(row.changes[side])}"
        for side in found.sides()
    ]
    return Sentence(f"{row.label}: {'; '.join(parts)}.")


def _change(change: Paired) -> str:
    return str(Value.of(change.difference, "", 100))


def _flips(change: Paired) -> str:
    return f"{change.lost} lost and {change.gained} gained (McNemar's p = {number(change.p)})"


def _by_chance(found: SweepFindings) -> list[Sentence]:
    """Copies whose answers agree with the dense model's no more than by chance."""
    told = []
    for row in found.rows:
        same = row.scores.get("same_answer")
        if same is None or row.by_chance is None or float(same.mean) < _MANY_SAME:
            continue
        if row.by_chance >= float(same.low):
            share, chance = (f"{100 * float(one):.0f} %" for one in (same.mean, row.by_chance))
            told.append(f"{row.label} ({share}, by chance {chance})")
    if not told:
        return []
    return [
        Sentence(
            "The share of answers that stay the same says nothing of copies that would agree as "
            f"often if they gave their usual answers to any question: {_listed(told)}.",
            warn=True,
        )
    ]


def _power(found: SweepFindings) -> list[Sentence]:
    """How many questions 2 points would take, by the median of the points' changed answers."""
    said = []
    for side in found.sides():
        changes = [row.changes[side] for row in found.rows if side in row.changes]
        if not changes:
            continue
        middle = sorted(changes, key=lambda one: one.gained + one.lost)[len(changes) // 2]
        n = int(middle.difference.n)
        needed = needed_pairs(middle.gained + middle.lost, n)
        if needed > n:
            said.append(
                Sentence(
                    f"Two points of {SIDES[side]} can't be told from zero with {n} questions: with "
                    f"as many changed answers as the middle copy has, {needed} would be needed.",
                    warn=True,
                )
            )
    return said


def _predicted(found: SweepFindings) -> list[Sentence]:
    told = found.calibration()
    if told is None:
        return []
    error, flat = told["mean_absolute_error"], told["constant_mean_absolute_error"]
    verdict = (
        "Single steps predict where the answers leave the dense model's"
        if error < _MISSES
        else "Single steps do not predict where the answers leave the dense model's"
    )
    return [
        Sentence(
            f"{verdict}: the predicted share of unchanged answers is off by {100 * error:.1f} "
            f"points on average (mean error {100 * told['mean_error']:+.1f}) over {told['points']} "
            f"copies and all steps, against {100 * flat:.1f} for one flip rate at all entropies.",
            warn=error >= _MISSES,
        )
    ]


def _floors(found: SweepFindings) -> list[Sentence]:
    """Whether exact match is predicted, and where it may fall by the prediction."""
    told = found.floor_calibration()
    if told is None:
        return []
    points, distance = told["points"], told["mean_distance"]
    flat = told["dense_mean_distance"]
    seen = float(dense_scores(found.dense)["exact_match"].mean) >= _NOTHING_TO_LOSE
    bounded = points - told["allows"] <= _CHANCE * points
    predicted = seen and bounded and distance < min(_MISSES, flat)
    if not seen:
        verdict = "Whether single steps predict exact match can't be seen where so little is right"
    elif predicted:
        verdict = "Single steps predict exact match"
    elif bounded:
        verdict = "Single steps give exact match a floor but do not predict it"
    else:
        verdict = "Single steps do not predict exact match, nor a floor of it"
    said = [
        Sentence(
            f"{verdict}: it reaches its predicted floor at {told['reached']} of {points} copies "
            f"(at {told['allows']} within its interval) and is {100 * distance:.1f} points from it "
            f"on average (mean {100 * told['mean_above']:+.1f}), {100 * flat:.1f} from the dense "
            f"model's. Of {told['kept']} right answers that were complete before a text left, "
            f"{told['strayed']} turned wrong.",
            warn=not predicted,
        )
    ]
    series = [one for one in found.series if len(one.rows) > 1 and found.lost_from(one)]
    if series and seen:
        places = "; ".join(_lost_from(one, found) for one in series)
        text = f"By the floors more than {found.margin:g} points of exact match may go: {places}."
        said.append(Sentence(text))
    return said


def _lost_from(one: Swept, found: SweepFindings) -> str:
    """`attentions dropped from 2 attentions on (observed from 8 attentions on)`."""
    labels = [row.label for row in one.rows if row.floor is not None]
    places = {
        name: "nowhere" if at is None else f"from {labels[at]} on"
        for name, at in (found.lost_from(one) or {}).items()
    }
    return f"{one.name} {places['predicted']} (observed {places['observed']})"


def lines(found: SweepFindings) -> list[list[Value | str]]:
    """The cells of the table, the dense model first."""
    scores = dense_scores(found.dense)
    size = terminal.size
    own: list[Value | str] = [
        str(found.meta["dense"]),
        _cell(scores.get("accuracy")),
        NONE,
        _cell(scores.get("exact_match")),
        *([NONE] * 6),
        size(found.dense["bytes_in_memory"]),
    ]
    rows = [own]
    for row in found.rows:
        if row.error:
            rows.append([row.label, f"failed: {row.error}", *[NONE] * 9])
            continue
        kl = (row.kl or {}).get("kl")
        rows.append(
            [
                row.label,
                _cell(row.scores.get("accuracy")),
                _difference(row, "accuracy"),
                _cell(row.scores.get("exact_match")),
                _difference(row, "exact_match"),
                NONE if row.floor is None else Value(100 * row.floor.floor, unit="%"),
                _cell(row.scores.get("same_answer")),
                _cell(row.scores.get("same_text")),
                NONE if kl is None else _value(kl),
                _cell(row.speed, "", 1),
                size(int(row.sizes["bytes_in_memory"] or 0)),
            ]
        )
    return rows


def table(found: SweepFindings) -> Table:
    """All points as one table, without columns that nothing was measured for."""
    n = f"{found.meta['choices']} multiple-choice and {found.meta['questions']} open questions"
    rows = lines(found)
    kept = [i for i in range(len(HEAD)) if any(row[i] != NONE for row in rows)]
    rows = [[row[i] for i in kept] for row in rows]
    return Table(f"{found.meta['dense']} and its copies: {n}", [HEAD[i] for i in kept], rows)


def shown(found: SweepFindings) -> Any:
    """The table and the sentences, for a terminal."""
    from rich.console import Group
    from rich.text import Text

    made = table(found)
    parts: list[Any] = [terminal.Fitted(made.title, made.columns, made.rows, _SPARE), Text()]
    return Group(*parts, *(terminal.sentence(said) for said in sentences(found)))


def payload(found: SweepFindings) -> dict[str, Any]:
    """The data that the page's scripts draw."""
    meta = found.meta
    return {
        "names": {"dense": meta["dense"], "pruned": "how much can go"},
        "chips": [
            f"{meta['choices']} multiple-choice questions",
            f"{meta['questions']} open questions, {meta['examples']} examples each",
            f"{len(found.rows)} copies",
            f"{meta['dtype']} on {meta['device']}",
            f"seed {meta['seed']}",
        ],
        "hierarchy": [],
        "sentences": [{"text": said.text, "warn": said.warn} for said in sentences(found)],
        "tables": [table(found).to_dict()],
        "figures": [figure.to_dict() for figure in figures(found)],
        "questions": [],
        "answers": [],
        "generations": [],
        "texts_lead": "",
        "meta": [[name, value] for name, value in flatten(meta).items()],
    }


def _cell(interval: Interval | None, unit: str = "%", scale: float = 100) -> Value | str:
    return NONE if interval is None else Value.of(interval, unit, scale)


def _difference(row: Row, side: str) -> Value | str:
    change = row.changes.get(side)
    return NONE if change is None else Value.of(change.difference, "", 100)


def _value(ends: Mapping[str, Any]) -> Value:
    return Value(plain(ends["mean"]), plain(ends["low"]), plain(ends["high"]))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
