"""A sweep on disk: which run it is, its calibration and rankings, and each point as it is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prunekit.divergence.capture import recorded_tensors
from prunekit.divergence.processes import by_main, together
from prunekit.errors import PrunekitError
from prunekit.files.atomic import replaced_file
from prunekit.pruning import Drop, DropReport
from prunekit.pruning.dropping import Dropped

FORMAT = 1
RUN = "run.json"
_TOKENS = "calibration.safetensors"
# What differs, by the name of a fact, with the options that decide it.
_OTHER = {
    "choices": "other multiple-choice questions (--choices, --limit)",
    "questions": "other open questions (--generate, --examples, --limit)",
    "asking": "other examples or answers (--examples, --answer-tokens)",
    "text": "another text of the KL divergence (--text, --no-kl)",
    "speed": "the other choice of --no-speed",
    "calibration_dtype": "another --calibration-dtype",
}


class Record:
    """The folder of a sweep; only the main process writes, and all of them read.

    Args:
        folder: Where it is, or will be.
        facts: What makes the run what it is, as plain data; a folder with other facts is refused.

    Raises:
        PrunekitError: The folder belongs to another sweep, or can't be read or written.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        wanted = json.loads(json.dumps({"format": FORMAT, **facts}))
        by_main(lambda: (folder / "points").mkdir(parents=True, exist_ok=True))
        path = folder / RUN
        if not _there(path):
            self._write(path, wanted)
        found = self._read(path)
        for name, value in wanted.items():
            if found.get(name) != value:
                raise PrunekitError(
                    f"{folder} holds a sweep with {_OTHER.get(name, f'another {name}')}: choose "
                    "another output or allow overwriting (--overwrite)"
                )

    def point(
        self, key: str, identity: Mapping[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """A point's numbers: as recorded, or measured now and recorded."""
        path = self.folder / "points" / f"{key}.json"
        wanted = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        if _there(path):
            found = self._read(path)
            if found.get("identity") == wanted:
                return dict(found["numbers"])
        self._write(path, {"identity": wanted, "numbers": measure()})
        return dict(self._read(path)["numbers"])

    def tokens(self, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The calibration sequences: as recorded, or computed now and recorded."""
        return recorded_tensors(self.folder / _TOKENS, compute)

    def ranking(self, drop: Drop, compute: Callable[[], DropReport]) -> DropReport:
        """The report of a drop: as recorded (a discrete one of any count), or made now."""
        path = self.folder / f"ranking-{drop.unit}-{drop.strategy}.json"
        if _there(path):
            held = self._read(path)
            if drop.strategy == "discrete" or held["count"] >= drop.count:
                return _report(held)
        self._write(path, compute().to_dict())
        return _report(self._read(path))

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise PrunekitError(f"{path} can't be read ({error}): delete it") from error

    def _write(self, path: Path, data: Mapping[str, Any]) -> None:
        text = json.dumps(data, ensure_ascii=False)

        def write() -> None:
            try:
                with replaced_file(path) as written:
                    written.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
            except OSError as error:
                raise PrunekitError(
                    f"{path} can't be written ({error.strerror}): free some space"
                ) from error

        by_main(write)


def _there(path: Path) -> bool:
    """Whether a file is there: asked by all processes before any goes on to write it."""
    return together(path.is_file)


def _report(data: Mapping[str, Any]) -> DropReport:
    """Undo `DropReport.to_dict`."""
    return DropReport(
        unit=data["unit"],
        count=data["count"],
        strategy=data["strategy"],
        scores=data["scores"],
        dropped=tuple(Dropped(**part) for part in data["dropped"]),
        parameters_before=data["parameters_before"],
        parameters_after=data["parameters_after"],
        sequences=data["sequences"],
        tokens=data["tokens"],
        calibration_dtype=data["calibration_dtype"],
        notes=tuple(data["notes"]),
    )
