"""The benchmark harness: nothing wrong is timed, everything is reported, results survive."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from prunekernels import nm_mask, sparsegpt_update

from bench import (
    bench_select,
    bench_sparse,
    guard,
    harness,
    metric_peers,
    peers,
    result_rows,
    timers,
)
from bench.bounds import Cost
from bench.harness import Absent, Case, Contender, Prepared, Session, Verdict
from prunekit.speed import timing

CPU = torch.device("cpu")
BENCH = Path(harness.__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCH.parent), *sys.path])}
CASE = Case("sum", "plain", "float32", {"M": 2, "N": 8})
X = torch.ones(2, 8)


def right(found: torch.Tensor) -> Verdict:
    error = float((found - 16).abs())
    return Verdict(error < 1e-3, f"error {error:.1g}")


def contender(name: str, result: float = 16.0) -> Contender:
    run = lambda: torch.tensor(result)  # noqa: E731
    return Contender(name, lambda: Prepared([run], right, [Cost(64, 16)], held=32))


def absent() -> Prepared:
    raise Absent("pip install peer")


def broken() -> Prepared:
    raise RuntimeError("no such kernel\nand more")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    roofs = {torch.float32: (1e10, 1e12)}
    return Session(tmp_path / "cpu" / "sum.csv", CPU, 3, True, _roofs=roofs)


def rows(session: Session) -> list[dict[str, str]]:
    with session.path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_row_has_every_column_and_a_bound_from_the_runs_own_roofs(session):
    session.measure(CASE, [contender("one")])
    (row,) = rows(session)
    assert list(row) == result_rows.COLUMNS
    assert row["op"] == "sum" and row["shape"] == "M=2 N=8" and row["status"] == "ok"
    assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
    assert float(row["bound_ms"]) == pytest.approx(64 / 1e10 * 1000)  # memory, not products
    assert row["limit"] == "memory" and row["rounds"] == "3" and row["timer"] == "host"
    share = 100 * float(row["bound_ms"]) / float(row["p50_ms"])
    assert float(row["roof_pct"]) == pytest.approx(share, abs=0.06)
    assert row["torch"] == torch.__version__ and row["device"] == "cpu" and row["commit"]


def test_wrong_absent_and_failing_contenders_are_rows_without_a_time(session):
    others = [contender("wrong", 15.0), Contender("peer", absent), Contender("odd", broken)]
    session.measure(CASE, [contender("one"), *others])
    found = {row["provider"]: row for row in rows(session)}
    assert {name: row["status"] for name, row in found.items()} == {
        "one": "ok",
        "wrong": "wrong",
        "peer": "absent",
        "odd": "failed",
    }
    assert found["wrong"]["note"] == "error 1"
    assert found["peer"]["note"] == "pip install peer"
    assert found["odd"]["note"] == "RuntimeError: no such kernel"
    assert all(not found[name]["p50_ms"] for name in ("wrong", "peer", "odd"))
    assert found["one"]["p50_ms"]


def test_a_result_of_nan_is_wrong(session):
    session.measure(CASE, [contender("nan", float("nan"))])
    assert rows(session)[0]["status"] == "wrong"


def test_what_a_probe_returns_is_judged_instead_of_the_run(session):
    good, bad = (lambda: torch.tensor(16.0)), (lambda: torch.tensor(3.0))
    session.measure(
        CASE,
        [
            Contender("a", lambda: Prepared([bad], right, probe=good)),
            Contender("b", lambda: Prepared([good], right, probe=bad)),
        ],
    )
    assert [row["status"] for row in rows(session)] == ["ok", "wrong"]


def test_measured_cases_are_skipped_and_time_ends_a_run_between_cases(session):
    made: list[str] = []

    def make(name: str) -> list[Contender]:
        made.append(name)
        return [contender("one")]

    cases = [Case("sum", name, "float32", {"M": 2}) for name in "abc"]
    work = [(case, lambda case=case: make(case.mode)) for case in cases]
    assert session.run(work[:1]) == 0 and made == ["a"]
    session.seconds = -1.0
    assert session.run(work) == harness.UNFINISHED and made == ["a"]
    session.seconds = None
    assert session.run(work) == 0 and made == ["a", "b", "c"]
    assert [row["mode"] for row in rows(session)] == ["a", "b", "c"]


def test_a_case_is_announced_and_each_absence_said_once(session, capsys):
    cases = [Case("sum", name, "float32", {"M": 2}) for name in "ab"]
    work = [(case, lambda: [contender("one"), Contender("peer", absent)]) for case in cases]
    session.run(work)
    said = capsys.readouterr().err.splitlines()
    heads = [text for text in said if text.startswith("[")]
    assert len(heads) == 2 and heads[1].startswith("[2/2 00:0") and "sum b float32 M=2" in heads[1]
    assert all(text.endswith(": 1 ok, 1 absent") for text in heads)
    assert sum("pip install peer" in text for text in said) == 1 and len(said) == 5
    session.brief = True
    session.run([(Case("sum", "c", "float32", {"M": 2}), lambda: [contender("one", 15.0)])])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "one" in said[1] and "wrong: error 1" in said[1]


def test_what_breaks_the_device_is_written_down_and_passed_over_next_time(session, monkeypatch):
    sound: list[bool] = []
    monkeypatch.setattr(guard, "works", lambda device: not sound)

    def breaks() -> Prepared:
        sound.append(False)
        raise RuntimeError("an illegal memory access")

    everybody = [contender("one"), Contender("bad", breaks), contender("last")]
    work = [(Case("sum", name, "float32", {"M": 2}), lambda: everybody) for name in "abc"]
    assert session.run(work) == guard.BROKEN == 76
    assert [(r["provider"], r["status"]) for r in rows(session)] == [("bad", "broken")]
    assert "illegal memory access" in rows(session)[0]["note"]
    sound.clear()  # another process: the case is finished without it, the next one breaks again
    assert session.run(work) == guard.BROKEN
    found = {(r["mode"], r["provider"]): r for r in rows(session) if r["status"] != "broken"}
    assert found["a", "bad"]["status"] == "failed" and "passed over" in found["a", "bad"]["note"]
    assert found["a", "one"]["p50_ms"] and found["a", "last"]["p50_ms"]
    sound.clear()  # twice is enough: it is not tried in other cases of the op
    assert session.run(work) == 0 and not sound
    statuses = {r["mode"]: r["status"] for r in rows(session) if r["provider"] == "bad"}
    assert statuses == {"a": "failed", "b": "failed", "c": "failed"}


def test_who_fails_between_others_samples_is_left_out(session):
    calls: list[int] = []

    def once() -> float:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("no more")
        return 1e-3

    odd = lambda: Prepared([lambda: torch.tensor(16.0)], right, sampler=(once, "x"))  # noqa: E731
    session.measure(CASE, [contender("one"), Contender("odd", odd), contender("two")])
    found = {row["provider"]: row for row in rows(session)}
    assert found["odd"]["status"] == "failed" and "no more" in found["odd"]["note"]
    assert found["one"]["p50_ms"] and found["two"]["p50_ms"] and not found["odd"]["p50_ms"]


def test_operands_that_cannot_be_had_are_a_row(session):
    def no_memory() -> list[Contender]:
        raise MemoryError("too large")

    assert session.run([(CASE, no_memory)]) == 0
    (row,) = rows(session)
    assert (row["provider"], row["status"]) == ("operands", "failed")
    assert row["note"] == "MemoryError: too large"


def test_a_step_without_end_is_written_down_by_name_and_ends_the_process():
    told: list[object] = []
    done = threading.Event()

    def leave(status: int) -> None:
        told.append(status)
        done.set()

    with guard.Watchdog(told.append, 0.05, leave) as watchdog:
        watchdog.step("quick")
        watchdog.step("endless")
        assert done.wait(10)
    assert told == ["endless", guard.BROKEN]


def test_steps_in_time_are_left_alone():
    told: list[object] = []
    with guard.Watchdog(told.append, 30.0, told.append) as watchdog:
        watchdog.step("quick")
    assert told == [] and watchdog.current == "quick"


def test_a_process_that_hangs_leaves_a_row_and_the_status_to_start_again(tmp_path):
    code = f"""
import pathlib, time, torch
from bench import harness
path = pathlib.Path({str(tmp_path / "x.csv")!r})
session = harness.Session(path, torch.device("cpu"), 3, True, patience=0.2)
session._roofs[torch.float32] = (1e10, 1e12)
case = harness.Case("sum", "a", "float32", {{"M": 2}})
session.run([(case, lambda: [harness.Contender("endless", lambda: time.sleep(60))])])
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=False, timeout=120)
    assert done.returncode == guard.BROKEN
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["provider"], row["status"]) == ("endless", "broken") and "no answer" in row["note"]


def test_an_interrupted_case_leaves_the_earlier_rows_alone(session, monkeypatch):
    session.measure(CASE, [contender("one")])
    before = session.path.read_bytes()

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "interleaved", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.measure(Case("sum", "b", "float32", {"M": 2}), [contender("one")])
    assert session.path.read_bytes() == before


def test_a_file_with_other_columns_is_not_mixed(session):
    session.path.parent.mkdir(parents=True)
    session.path.write_text("op,ms\nsum,1\n")
    with pytest.raises(SystemExit, match="other columns"):
        session.done()


def test_fresh_forgets_and_a_device_has_its_own_folder(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "x.csv").write_text("old")
    parser = argparse.ArgumentParser()
    harness.add_options(parser)
    given = ["--device", "cpu", "--output", str(tmp_path), "--fresh", "--minutes", "2"]
    session = Session.begin(parser.parse_args(given), "x.csv")
    assert session.path == tmp_path / "cpu" / "x.csv" and not session.path.exists()
    assert session.seconds == 120


def test_rounds_are_interleaved_and_everybody_begins_in_turn():
    order: list[str] = []

    def sampler(name: str, seconds: float):
        return lambda: (order.append(name), seconds)[1]

    found = timing.interleaved({n: sampler(n, i + 1.0) for i, n in enumerate("abc")}, 4)
    assert "".join(order) == "abcbcacababc"
    assert found["b"].seconds == [2.0] * 4 and found["b"].median == 2.0


def test_times_are_percentiles():
    times = timing.Times([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert times.milliseconds() == pytest.approx({"p20_ms": 2000, "p50_ms": 3500, "p80_ms": 5000})


class Clock:
    """Time that passes only when a run says so: real clocks stall on busy machines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timers, "stopwatch", self.stopwatch)

    def stopwatch(self, run, device):
        start = self.now
        run()
        return self.now - start

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_samples_go_round_the_sets_of_operands_and_are_times_per_run(monkeypatch):
    clock, seen = Clock(monkeypatch), []
    runs = [lambda i=i: (seen.append(i), clock.pass_(1e-3)) for i in range(3)]
    sample, how = timers.sampler(runs, CPU, least=2e-3)
    seen.clear()
    assert sample() == pytest.approx(1e-3) and how == "host"
    sample()  # goes on where the first stopped
    assert seen == [0, 1, 2, 0]


def test_short_runs_are_repeated_until_the_clock_can_see_them(monkeypatch):
    clock, seen = Clock(monkeypatch), []
    sample, _ = timers.sampler([lambda: (seen.append(0), clock.pass_(1e-6))], CPU, least=1e-3)
    seen.clear()
    assert sample() == pytest.approx(1e-6) and len(seen) == 1000


def test_operands_rotate_through_twice_the_cache():
    cache = timers.cache_bytes(CPU)
    assert timers.copies_needed(2 * cache, CPU) == 1
    assert (timers.copies_needed(cache // 4, CPU) - 1) * (cache // 4) >= 2 * cache
    assert timers.copies_needed(1, CPU, most=16) == 16


def test_every_linear_peer_is_right_or_says_why_it_is_absent(session):
    sizes = {"M": 3, "N": 64, "K": 128, "sparsity": 0.5}
    session._roofs[torch.bfloat16] = (1e10, 1e12)
    for pattern in peers.PATTERNS:
        case = Case("linear", pattern, "bfloat16", sizes)
        weights = bench_sparse.Weights(case, torch.bfloat16, CPU, lambda held: 1)
        session.measure(case, bench_sparse.contenders(weights, case, torch.bfloat16))
    found = rows(session)
    assert {"ok", "absent"} <= {row["status"] for row in found}
    assert not [row for row in found if row["status"] in ("wrong", "failed")]
    assert all(row["note"] for row in found if row["status"] == "absent")
    fine = {(row["mode"], row["provider"]) for row in found if row["status"] == "ok"}
    assert {("2:4", "dense"), ("2:4", "2:4 auto"), ("unstructured", "bitmap auto")} <= fine


def test_a_small_layer_has_more_copies_than_a_large_one():
    case = Case("linear", "2:4", "bfloat16", {"M": 1, "N": 64, "K": 128, "sparsity": 0.5})
    weights = bench_sparse.Weights(case, torch.bfloat16, CPU, lambda held: -(-20000 // held))
    named = {peer.name: peer for peer in peers.LINEAR}
    dense = weights.layers(named["dense"], 1)
    packed = weights.layers(named["2:4-int4 auto"], 1)
    assert len(dense) == 2 < len(packed) == -(-20000 // packed[0].held)
    # each copy is another weight
    x = torch.eye(128).bfloat16()
    assert not torch.equal(packed[0].apply(x), packed[1].apply(x))
    assert packed[1].exact is None


def test_a_linear_layer_with_one_wrong_weight_is_wrong():
    weight = torch.randn(32, 64)
    weight = (weight * nm_mask(weight.abs(), 2, 4)).bfloat16()
    x = torch.randn(5, 64).bfloat16()
    judge = bench_sparse.check(peers.Layer(lambda x: x, 0), weight, x)
    assert judge(x @ weight.t()).right
    broken = weight.clone()
    broken[3, int(weight[3].abs().argmax())] = 0.0
    assert not judge(x @ broken.t()).right
    assert not judge((x @ weight.t()).fill_(float("nan"))).right
    assert not judge((x @ weight.t())[:, :16]).right


def test_metric_peers_are_judged_by_float64():
    inputs = metric_peers.Inputs(torch.randn(4, 50), torch.randn(4, 50), torch.arange(4))
    elsewhere = ("TRL jsd", "research code")  # not ours to install
    tried = [p for p in metric_peers.logit_peers(None) if p.on_cpu and p.name not in elsewhere]
    for peer in tried:
        if peer.returns:
            assert metric_peers.judge(peer, inputs, peer.run(inputs)).right, peer.name
    ours = tried[0]
    values = list(ours.run(inputs))
    values[1] = values[0]  # the other direction
    verdict = metric_peers.judge(ours, inputs, tuple(values))
    assert not verdict.right and "reverse_kl" in verdict.note


def test_a_mask_that_differs_from_the_definition_is_wrong(session, monkeypatch):
    case = Case("rowwise_mask", "0.5", "float32", {"N": 8, "K": 32})
    session.measure(case, bench_select.contenders(case, session))
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.ones(size))  # ties everywhere
    session.measure(case, bench_select.contenders(case, session))
    found = [(row["provider"], row["status"]) for row in rows(session)]
    assert found[:3] == [(name, "ok") for name in bench_select.ways(case)]
    assert [status for _, status in found[3:]] == ["ok", "ok", "wrong"]


@pytest.mark.parametrize("mode", ["mask", "2:4"])
def test_an_update_that_differs_from_the_column_loop_is_wrong(session, monkeypatch, mode):
    case = Case("sparsegpt_update", mode, "float32", {"R": 40, "C": 32})
    session.measure(case, bench_select.contenders(case, session))
    assert [row["status"] for row in rows(session)] == ["ok", "ok", "absent"]

    def careless(weight, upper, mask, *, keep, of, impl="auto"):
        found = sparsegpt_update(weight, upper, mask, keep=keep, of=of, impl=impl)
        # the error of the last pruned column is forgotten
        return found._replace(errors=found.errors.where(torch.arange(32) < 30, 0.0))

    monkeypatch.setattr(bench_select, "sparsegpt_update", careless)
    session.measure(case, bench_select.contenders(case, session))
    assert [row["status"] for row in rows(session)[3:]] == ["wrong", "ok", "absent"]


def test_a_missing_package_is_absent_with_what_installs_it():
    with pytest.raises(Absent, match="no_such_package: not installed; pip install it"):
        peers.package("no_such_package.inner", "pip install it")


def test_rows_are_added_behind_a_header_that_is_written_once(tmp_path):
    path = tmp_path / "a.csv"
    result_rows.append_rows(path, [{"a": 1, "b": "x, y"}])
    result_rows.append_rows(path, [{"a": 2, "b": "–"}])
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": "–"}]
