"""A folder of hidden states or logits at the scored positions of a plan: what is kept of a model.

The reference's cache has this format, and other engines may write it (`CaptureWriter`), so that
whatever they run can be a candidate, or the reference:

    capture.json                        what it is (see `Capture.facts`)
    windows.safetensors                 the plan: ids, lengths, firsts
    head.safetensors                    weight (V, D) [and bias (V,)]; kind "states" only
    rows-000000-000008.safetensors …    rows (positions of windows 0 to 7, D or V)

States are those after the final norm; their dtype is the file's. Files appear whole or not at all,
so that a writer that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunekit.divergence.processes import by_main, together
from prunekit.divergence.rows import Readout, Rows
from prunekit.divergence.windows import Windows
from prunekit.errors import PrunekitError, one_line
from prunekit.files.atomic import replaced_file

FORMAT, VERSION = "prunekit-capture", 1
FACTS = "capture.json"
HEAD = "head.safetensors"
KINDS = ("states", "logits")
_ROWS = re.compile(r"rows-(\d{6,})-(\d{6,})\.safetensors")


def is_capture(path: Path) -> bool:
    """Whether `path` is a folder in this format."""
    return (path / FACTS).is_file()


class CaptureWriter:
    """Writes a capture, or goes on with one.

    Args:
        folder: Where; created if it is missing.
        windows: The plan whose scored positions are captured.
        kind: "states" (final normed hidden states, with a head) or "logits".
        facts: More to record: `name`, `bytes_on_disk`, `bytes_in_memory`, `parameters`, `dtype`,
            and whatever tells this model from another. A folder with other facts is refused.
        head: Of states: (V, D) matrix.
        bias: Of states: (V,), or None.
        softcap: c in c·tanh(z/c), or None.
        scale: Factor of the logits, or None.

    Raises:
        PrunekitError: The kind is unknown, a head is missing, or `folder` holds another capture.
    """

    def __init__(
        self,
        folder: Path | str,
        windows: Windows,
        kind: str,
        *,
        facts: Mapping[str, Any] | None = None,
        head: Tensor | None = None,
        bias: Tensor | None = None,
        softcap: float | None = None,
        scale: float | None = None,
    ) -> None:
        if kind not in KINDS:
            raise PrunekitError(f"unknown kind of capture '{kind}': use {' or '.join(KINDS)}")
        if (kind == "states") != (head is not None):
            raise PrunekitError(
                f"a capture of {kind} {'needs a' if head is None else 'has no'} head"
            )
        self.folder, self.windows = Path(folder), windows
        self.folder.mkdir(parents=True, exist_ok=True)
        told: dict[str, Any] = {"format": FORMAT, "version": VERSION, "kind": kind}
        told |= {"softcap": softcap, "scale": scale, "plan": windows.facts(), **(facts or {})}
        told = json.loads(json.dumps(told))
        if is_capture(self.folder):
            check_same(self.folder, read_facts(self.folder), told)
            return
        if head is not None:
            tensors = {"weight": head} if bias is None else {"weight": head, "bias": bias}
            save_tensors(self.folder / HEAD, tensors)
        save_tensors(self.folder / "windows.safetensors", _plan_tensors(windows))
        with replaced_file(self.folder / FACTS) as written:
            written.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    def missing(self, group: range) -> bool:
        """Whether the rows of the windows `group` are still to be written."""
        return not _whole(self.folder / _rows_name(group))

    def add(self, group: range | int, rows: Tensor) -> None:
        """Write the rows of one window, or of a run of them.

        Args:
            group: Index of the window, or a run of them.
            rows: (scored positions, D or V), floating-point.

        Raises:
            PrunekitError: There are more or fewer rows than scored positions.
        """
        group = range(group, group + 1) if isinstance(group, int) else group
        expected = sum(self.windows.scored[index] for index in group)
        if rows.ndim != 2 or rows.shape[0] != expected:
            raise PrunekitError(
                f"windows {group.start} to {group.stop - 1} score {expected} positions, the rows "
                f"have shape {tuple(rows.shape)}: give one row per scored position"
            )
        save_tensors(self.folder / _rows_name(group), {"rows": rows})


class Capture:
    """A capture that is read: memory-mapped, some windows at a time.

    Args:
        folder: What `CaptureWriter` wrote.

    Raises:
        PrunekitError: It is damaged, incomplete, or of a newer version.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.facts = read_facts(self.folder)
        self.kind: str = self.facts["kind"]
        self.name = str(self.facts.get("name", self.folder.name))
        plan = _load(self.folder / "windows.safetensors")
        lengths = plan["lengths"].tolist()
        self.ids = [part.tolist() for part in torch.split(plan["ids"], lengths)]
        self.firsts: list[int] = plan["firsts"].tolist()
        self.readout: Readout | None = None
        if self.kind == "states":
            head = _load(self.folder / HEAD)
            weight = head["weight"]
            self.readout = Readout(
                weight,
                head.get("bias"),
                self.facts["softcap"],
                self.facts["scale"],
                weight.shape[0],
            )
        self._files: dict[int, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("rows-*.safetensors")):
            match = _ROWS.fullmatch(path.name)
            if match:
                for index in range(int(match[1]), int(match[2])):
                    self._files[index] = path, int(match[1])
        absent = [index for index in range(len(self.ids)) if index not in self._files]
        if absent:
            raise PrunekitError(
                f"{self.folder} lacks the rows of {len(absent)} of {len(self.ids)} windows, first "
                f"of window {absent[0]}: let its writer finish"
            )

    def has_head(self, weight: Tensor) -> bool:
        """Whether its head is this matrix, looked at some rows at a time, which do not stay mapped.

        The map of `readout` would be resident, once it is read, beside the matrix's own model.
        """
        step = max(1, (2 << 20) // (weight.itemsize * weight.shape[1]))
        for start in range(0, weight.shape[0], step):
            with _opened(self.folder / HEAD) as tensors:
                held = tensors.get_slice("weight")
                if tuple(held.get_shape()) != tuple(weight.shape):
                    return False
                rows = held[start : start + step]
            if rows.dtype != weight.dtype or not torch.equal(
                rows.to(weight.device), weight[start : start + step]
            ):
                return False
        return True

    def check(self, windows: Windows) -> None:
        """See that it was captured of exactly this plan.

        Raises:
            PrunekitError: Of another one.
        """
        plan = self.facts["plan"]
        if plan["sha256"] != windows.digest():
            check_same(self.folder, {"plan": plan}, {"plan": windows.facts()})

    def rows(self, group: range) -> Rows:
        """The rows of the windows `group`, in order."""
        parts = []
        for index in group:
            path, start = self._files[index]
            skipped = sum(len(self.ids[i]) - self.firsts[i] for i in range(start, index))
            count = len(self.ids[index]) - self.firsts[index]
            with _opened(path) as tensors:
                parts.append(tensors.get_slice("rows")[skipped : skipped + count])
        return Rows(torch.cat(parts), self.readout)


def read_facts(folder: Path) -> dict[str, Any]:
    """What `capture.json` in `folder` says.

    Raises:
        PrunekitError: It can't be read, or is of another version.
    """
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version = facts["version"], facts["format"], facts["kind"], facts["plan"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PrunekitError(f"{path} can't be read ({one_line(error)}): write it again") from error
    if version[0] != VERSION or version[1] != FORMAT:
        raise PrunekitError(
            f"{folder} is version {version[0]} of {version[1]}, this prunekit reads version "
            f"{VERSION} of {FORMAT}: delete it, or use another folder"
        )
    return dict(facts)


def check_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """See that a folder's facts are those of the work at hand.

    Raises:
        PrunekitError: They differ; the first that does is named with both values.
    """
    found, wanted = _flat(found), _flat(wanted)
    order = ["version", "plan.windows", "plan.context", "plan.stride", "plan.count", "plan.sha256"]
    names = [*order, *(name for name in wanted if name not in order)]
    said = {"plan.sha256": "text (or tokenizer)", "model": "model", "tokenizer": "tokenizer"}
    for name in names:
        mine, other = wanted.get(name), found.get(name)
        if mine != other and name in wanted:
            what = said.get(name, name.removeprefix("plan."))
            raise PrunekitError(
                f"{folder} was made with another {what} ({_short(other)}, now {_short(mine)}): use "
                "another folder, or delete it"
            )


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in facts.items() if name != "plan"}
    return flat | {f"plan.{name}": value for name, value in facts.get("plan", {}).items()}


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def _rows_name(group: range) -> str:
    return f"rows-{group.start:06d}-{group.stop:06d}.safetensors"


def _plan_tensors(windows: Windows) -> dict[str, Tensor]:
    ids = [token for window in windows.ids for token in window]
    return {
        "ids": torch.tensor(ids, dtype=torch.int32),
        "lengths": torch.tensor([len(window) for window in windows.ids], dtype=torch.int64),
        "firsts": torch.tensor(windows.firsts, dtype=torch.int64),
    }


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, whole or not at all.

    Raises:
        PrunekitError: It can't be written; what was there before stays.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replaced_file(path) as written:
        try:
            save_file(held, written, metadata)
        except (SafetensorError, OSError) as error:  # such as a full disk
            raise PrunekitError(
                f"{path} couldn't be written ({one_line(error)}): free some space or use another "
                "folder, and run again to go on"
            ) from error


def recorded_tensors(path: Path, compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """Tensors from a file, in order; where it is not there they are computed and written.

    Under several processes all compute, and the main one writes.
    """
    if not together(path.is_file):  # asked by all before one writes
        found = {f"{index:06d}": tensor for index, tensor in enumerate(compute())}
        by_main(lambda: save_tensors(path, found))
    recorded = load_file(path)
    return [recorded[name] for name in sorted(recorded)]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise PrunekitError(
            f"{path} is missing or damaged ({one_line(error)}): delete it and run again"
        ) from error


def _load(path: Path) -> dict[str, Tensor]:
    with _opened(path) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def _whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as tensors:
            return "rows" in tensors.keys()  # noqa: SIM118
    except (SafetensorError, OSError):
        return False
