"""The harness of the benchmarks: it checks results, times contenders in turns, keeps rows.

A benchmark lists *cases* (an op at a shape) and *contenders* (ways to do it). `Session.measure`
checks every contender's result before anything is timed, times those that are right in turns, and
appends one row each to a CSV. A wrong result, a failure and a peer that is not installed are rows
too, without a time. A case whose rows are in the file is not measured again. What breaks a GPU, or
never ends, is written down and ends the process (guard.py); the next one passes it over.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from bench import bounds, guard, timers
from bench.result_rows import COLUMNS, append_rows, device_name, line, provenance
from prunekit.speed import timing

RESULTS = bounds.RESULTS
UNFINISHED = 75  # exit status: time is up, call again to go on


Found = TypeVar("Found")


class Absent(Exception):
    """A peer that cannot run here; the message says why and what would install it."""


def refusable(function: Callable[..., Found]) -> Callable[..., Found]:
    """The function, which is `Absent` where an implementation that was asked for cannot run."""

    @functools.wraps(function)
    def run(*inputs: Any) -> Found:
        try:
            return function(*inputs)
        except ValueError as error:
            raise Absent(str(error)) from error

    return run


class Broken(Exception):
    """The device answers no more; the message says who broke it."""


@dataclass(frozen=True)
class Case:
    """An op at a shape: one comparison.

    Attributes:
        op: Name of the op.
        mode: Variant of the op, such as a pattern or a level.
        dtype: Of the operands, such as "bfloat16".
        sizes: The shape, by the names that the documentation uses.
    """

    op: str
    mode: str
    dtype: str
    sizes: Mapping[str, float]

    @property
    def shape(self) -> str:
        """Sizes as text: "M=1 N=4096"."""
        return " ".join(f"{name}={value:g}" for name, value in self.sizes.items())

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The columns by which a case is found in a result file."""
        return (self.op, self.mode, self.dtype, self.shape)


class Verdict(NamedTuple):
    """Whether a result is right, and how far it is from the truth."""

    right: bool
    note: str = ""


@dataclass(frozen=True)
class Prepared:
    """A contender ready to run.

    Attributes:
        runs: The op on different operands.
        check: Judges the result of the probe.
        cost: What it cannot do without, step by step, for its bound.
        held: Bytes of the operands that this contender keeps for one run (its weight).
        probe: What is checked instead of the first run, for ops that only return a mean.
        sampler: Takes one sample in seconds, instead of timing `runs`; with the timer's name.
        items: What one run handles, for a rate: rows, tokens.
        graph: Whether it may be captured into a CUDA graph.
    """

    runs: Sequence[Callable[[], Any]]
    check: Callable[[Any], Verdict]
    cost: Sequence[bounds.Cost] = ()
    held: int = 0
    probe: Callable[[], Any] | None = None
    sampler: tuple[Callable[[], float], str] | None = None
    items: float = 0.0
    graph: bool = True


@dataclass(frozen=True)
class Contender:
    """One way to do a case's op.

    Attributes:
        provider: Its name in the results.
        prepare: Builds operands; raises Absent where it cannot run.
    """

    provider: str
    prepare: Callable[[], Prepared]


@dataclass
class Session:
    """One run of a benchmark: its result file, its machine, its time.

    Attributes:
        path: The CSV.
        device: Where the ops run.
        rounds: Samples of each contender.
        quick: Small and rough: for trying things out.
        seconds: Stop before another case begins once this long has passed; None for no limit.
        brief: Print a line per case instead of one per contender.
        patience: Seconds that a contender may take for one step.
        share: (index, of) of the cases to compile ahead, timing nothing; None measures.
    """

    path: Path
    device: torch.device
    rounds: int = 20
    quick: bool = False
    seconds: float | None = None
    brief: bool = False
    patience: float = float("inf")
    share: tuple[int, int] | None = None
    started: float = field(default_factory=time.monotonic)
    _roofs: dict[torch.dtype, tuple[float, float]] = field(default_factory=dict)
    _said: set[tuple[str, str]] = field(default_factory=set)  # whose absence was explained

    @classmethod
    def begin(cls, options: argparse.Namespace, name: str) -> Session:
        """The session that a command line (`add_options`) asks for, in <output>/<device>/<name>."""
        device = torch.device(options.device)
        path = options.output / device_name(device).replace(" ", "_") / name
        if options.fresh:
            path.unlink(missing_ok=True)
        seconds = None if options.minutes is None else 60 * options.minutes
        rounds = options.rounds or (20 if device.type == "cuda" and not options.quick else 5)
        # a CPU may take all its time: there nothing hangs that could be stopped
        patience = guard.PATIENCE if device.type == "cuda" else float("inf")
        rest = (options.quick, seconds, options.brief, patience, options.compile)
        return cls(path, device, rounds, *rest)

    def roofs(self, dtype: str) -> tuple[float, float]:
        """Copy bytes/s and matrix FLOP/s of this run, measured when first asked for.

        Products are of bfloat16 on a GPU, where nothing here multiplies anything wider, and of
        the case's own type on a CPU.
        """
        kind = torch.bfloat16 if self.device.type == "cuda" else getattr(torch, dtype)
        if kind not in self._roofs:
            self._roofs[kind] = timers.roofs(self.device, kind, quick=self.quick)
        return self._roofs[kind]

    def done(self) -> set[tuple[str, str, str, str]]:
        """Keys of the cases that the file holds; one that broke the device is not finished."""
        return {_key(row) for row in self._rows() if row["status"] != "broken"}

    def _rows(self) -> list[dict[str, str]]:
        """The rows of the file."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != COLUMNS:
                sys.exit(f"{self.path} has other columns: move it away, or give --fresh")
            return list(reader)

    def _passed_over(self, case: Case) -> dict[str, str]:
        """Contenders that broke the device in this case, or twice in others of its op, and how."""
        broken = [r for r in self._rows() if r["status"] == "broken" and r["op"] == case.op]
        often = Counter(row["provider"] for row in broken)
        return {
            row["provider"]: f"passed over: {row['note']} at {row['shape']}"
            for row in broken
            if _key(row) == case.key or often[row["provider"]] > 1
        }

    def copies(self, operand_bytes: float) -> int:
        """Sets of operands to rotate among: two to try things out, few on a CPU.

        A CPU's last cache may hold a small model whole, and packing many copies takes it long.
        """
        most = 2 if self.quick else 64 if self.device.type == "cuda" else 4
        return timers.copies_needed(int(operand_bytes), self.device, most)

    def out_of_time(self) -> bool:
        """Whether no further case may begin."""
        return self.seconds is not None and time.monotonic() - self.started > self.seconds

    def run(self, cases: Sequence[tuple[Case, Callable[[], Sequence[Contender]]]]) -> int:
        """Measure every case that the file lacks; returns the process's exit status."""
        done = self.done()
        missing = [(case, make) for case, make in cases if case.key not in done]
        if self.share is not None:
            return self._compile(missing)
        if len(missing) < len(cases):
            say(f"{len(cases) - len(missing)} of {len(cases)} cases are already in {self.path}")
        for index, (case, make) in enumerate(missing):
            if self.out_of_time():
                say(f"time is up: {len(missing) - index} cases left")
                return UNFINISHED
            passed = time.strftime("%M:%S", time.gmtime(time.monotonic() - self.started))
            place = f"[{index + 1}/{len(missing)} {passed}]"
            say(f"{place} {case.op} {case.mode} {case.dtype} {case.shape}", end="")
            try:
                rows = self.measure(case, self._made(make))
            except Broken as broken:
                say(f"\n    {broken}: starting again is needed")
                return guard.BROKEN
            self._report(rows)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return 0

    @torch.no_grad()
    def _compile(self, cases: Sequence[tuple[Case, Callable[[], Sequence[Contender]]]]) -> int:
        """Run every contender of this process's share once, so that its kernels are compiled.

        Several processes compile side by side into the compilers' own caches on disk; what fails
        here is reported when it is measured.
        """
        assert self.share is not None
        index, of = self.share
        for _, make in cases[index::of]:
            if self.out_of_time():
                return UNFINISHED
            for contender in self._made(make):
                with contextlib.suppress(Exception):
                    contender.prepare().runs[0]()
                    timing.synchronize(self.device)
        return 0

    @staticmethod
    def _made(make: Callable[[], Sequence[Contender]]) -> Sequence[Contender]:
        """The contenders; where not even their operands can be had, one that says why."""
        try:
            return make()
        except Exception as error:
            return [Contender("operands", functools.partial(_raise, error))]

    def _report(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Finish a case's line, then print its rows; each absent peer is named once a run."""
        found = Counter(row["status"] for row in rows)
        say(": " + ", ".join(f"{count} {status}" for status, count in found.items()))
        news: dict[str, list[str]] = {}  # names by reason
        for row in rows:
            absence = (row["provider"], row["note"])
            if row["status"] != "absent":
                if row["status"] != "ok" or not self.brief:
                    say(line(row))
            elif absence not in self._said:
                self._said.add(absence)
                news.setdefault(row["note"], []).append(row["provider"])
        for reason, names in news.items():
            if not self.brief:
                say(f"    absent: {', '.join(names)}: {reason}")

    @torch.no_grad()
    def measure(self, case: Case, contenders: Sequence[Contender]) -> list[dict[str, Any]]:
        """Check, then time in turns, then append the rows; returns them.

        Raises:
            Broken: A contender left the device unusable; its row is written, the others' are not.
        """
        rows = {c.provider: self._row(case, c) for c in contenders}
        ready: dict[str, Prepared] = {}
        passed_over = self._passed_over(case)
        with self._watched(rows) as watchdog:
            for contender in contenders:
                name, row = contender.provider, rows[contender.provider]
                watchdog.step(name)
                if name in passed_over:
                    row |= {"status": "failed", "note": passed_over[name]}
                    continue
                try:
                    prepared = contender.prepare()
                    verdict = prepared.check((prepared.probe or prepared.runs[0])())
                    timing.synchronize(self.device)
                except Absent as absent:
                    row |= {"status": "absent", "note": str(absent)}
                except Exception as error:  # a peer's failure must not end the run
                    self._failed(row, error)
                else:
                    row |= {"status": "ok" if verdict.right else "wrong", "note": verdict.note}
                    if verdict.right:
                        ready[name] = prepared
            self._time(case, ready, rows, watchdog)
        append_rows(self.path, list(rows.values()))
        return list(rows.values())

    def _failed(self, row: dict[str, Any], error: Exception) -> None:
        """Note a failure; raise Broken where nothing else can run after it."""
        row |= {"status": "failed", "note": timers.first_line(error)}
        if not guard.works(self.device):
            self._broken(row)
            raise Broken(f"{row['provider']} broke the device ({row['note']})") from error

    def _broken(self, row: dict[str, Any]) -> None:
        append_rows(self.path, [row | {"status": "broken"}])

    def _watched(self, rows: Mapping[str, dict[str, Any]]) -> guard.Watchdog:
        """Writes down who never came back from the device."""

        def expired(provider: str) -> None:
            note = f"no answer within {self.patience:g} s"
            say(f"\n    {provider}: {note}")
            self._broken(rows[provider] | {"note": note})

        return guard.Watchdog(expired, self.patience)

    def _time(
        self,
        case: Case,
        ready: Mapping[str, Prepared],
        rows: Mapping[str, dict[str, Any]],
        watchdog: guard.Watchdog,
    ) -> None:
        """Take turns, and fill in the rows' figures."""
        samplers = {}
        least = 5e-4 if self.quick else 2e-3
        for provider, prepared in ready.items():
            row = rows[provider]
            watchdog.step(provider)
            try:
                peak = timers.peak_bytes(prepared.runs[0], self.device)
                sample, row["timer"] = prepared.sampler or timers.sampler(
                    prepared.runs, self.device, graph=prepared.graph, least=least
                )
                if self.device.type == "cuda":
                    sample()  # what cannot be replayed fails here, and alone
            except Exception as error:
                self._failed(row, error)
                continue
            samplers[provider] = self._announced(watchdog, provider, sample)
            row["held_mb"] = f"{prepared.held / 1e6:.3f}"
            row["peak_mb"] = "" if peak is None else f"{peak / 1e6:.3f}"
        for provider, times in self._in_turns(samplers, rows, watchdog).items():
            row = rows[provider]
            row |= {name: f"{value:.6g}" for name, value in times.milliseconds().items()}
            row["rounds"] = self.rounds
            if ready[provider].items:
                row["items_s"] = f"{ready[provider].items / times.median:.6g}"
            row |= self._against_roofs(case, ready[provider].cost, times.median)

    def _in_turns(
        self,
        samplers: dict[str, Callable[[], float]],
        rows: Mapping[str, dict[str, Any]],
        watchdog: guard.Watchdog,
    ) -> dict[str, timing.Times]:
        """Rounds of samples; who fails in them is left out, and they begin again."""
        while True:
            try:
                return timing.interleaved(samplers, self.rounds)
            except Exception as error:
                self._failed(rows[watchdog.current], error)
                del samplers[watchdog.current]

    @staticmethod
    def _announced(
        watchdog: guard.Watchdog, provider: str, sample: Callable[[], float]
    ) -> Callable[[], float]:
        """`sample`, with the watchdog knowing whose turn it is."""

        def announced() -> float:
            watchdog.step(provider)
            return sample()

        return announced

    def _against_roofs(
        self, case: Case, cost: Sequence[bounds.Cost], seconds: float
    ) -> dict[str, str]:
        """Rates, the bound that this run's roofs set, and how near the time comes to it."""
        if not cost:
            return {}
        bound = bounds.bound(
            cost, bounds.machine(device_name(self.device), *self.roofs(case.dtype))
        )
        moved = sum(step.bytes for step in cost)
        products = sum(step.flop + step.mma_flop for step in cost)
        return {
            "bound_ms": f"{bound.ms:.6g}",
            "limit": bound.limit,
            "roof_pct": f"{100 * bound.ms / (1000 * seconds):.1f}",
            "gb_s": f"{moved / seconds / 1e9:.6g}",
            "tflop_s": f"{products / seconds / 1e12:.6g}" if products else "",
        }

    def _row(self, case: Case, contender: Contender) -> dict[str, Any]:
        bandwidth, flops = self.roofs(case.dtype)
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= dict(zip(("op", "mode", "dtype", "shape"), case.key, strict=True))
        row["provider"] = contender.provider
        row |= {"roof_gb_s": f"{bandwidth / 1e9:.1f}", "roof_tflop_s": f"{flops / 1e12:.3f}"}
        return row | {k: v for k, v in provenance(self.device).items() if k in row}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every op benchmark has."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of result folders")
    parser.add_argument("--quick", action="store_true", help="few small cases, few samples")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--rounds", type=int, help="samples of each contender")
    parser.add_argument("--minutes", type=float, help="begin no further case after this long")
    parser.add_argument("--brief", action="store_true", help="a line per case, not per contender")
    parser.add_argument("--research", type=Path, help="the research code's checkout, to compare")
    parser.add_argument(
        "--compile",
        type=_share,
        metavar="I/N",
        help="measure nothing: compile what every Nth case needs, beginning with case I",
    )


def _share(text: str) -> tuple[int, int]:
    index, _, of = text.partition("/")
    if not (index.isdigit() and of.isdigit() and int(index) < int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I < N: give 0/13, say")
    return int(index), int(of)


def say(text: str, end: str = "\n") -> None:
    """A line of progress: tables are for files and for summary.py."""
    print(text, end=end, file=sys.stderr, flush=True)


def _raise(error: Exception) -> Prepared:
    raise error


def _key(row: Mapping[str, str]) -> tuple[str, str, str, str]:
    return (row["op"], row["mode"], row["dtype"], row["shape"])
