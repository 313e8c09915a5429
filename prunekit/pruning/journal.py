"""A pruning run on disk, block by block, so that a killed run goes on where it was.

A journal is a folder: `run.json` says which run it belongs to, `calibration.safetensors` holds its
tokens, `block-0007.safetensors` the pruned matrices of block 7 and, as metadata, their reports.
Every file appears whole or not at all. Resuming puts the finished blocks' matrices into the dense
model and runs the calibration data through them, which gives the same hidden states and hence,
on the same machine with the same versions, the same bytes as a run that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prunekit.data.calibration import CalibrationInput, facts
from prunekit.errors import PrunekitError
from prunekit.files.atomic import replaced_file
from prunekit.process import distributed
from prunekit.pruning.report import BlockFit, MatrixReport

FORMAT = 1
_RUN, _TOKENS = "run.json", "calibration.safetensors"


def beside(output: Path | str) -> Path:
    """The journal of the run that will write `output`."""
    output = Path(output)
    return output.with_name(f"{output.name}.journal")


def finished_blocks(folder: Path | str) -> int:
    """How many blocks a journal holds; 0 if there is none."""
    return len(list(Path(folder).glob("block-*.safetensors")))


def remove(folder: Path | str) -> None:
    """Delete a journal, once its run's result is saved elsewhere."""
    if distributed.is_main() and (Path(folder) / _RUN).is_file():
        shutil.rmtree(folder)


def fingerprint(model: nn.Module) -> str:
    """A checksum of every parameter and buffer: name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
        facts = (name, str(tensor.dtype), tuple(tensor.shape), zlib.crc32(data.numpy()))
        digest.update(repr(facts).encode())
    return digest.hexdigest()


def run_facts(
    model: nn.Module, calibration: CalibrationInput | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The facts that must be equal for a journal to belong to this run."""
    return {
        "model": fingerprint(model),
        "calibration": None if calibration is None else facts(calibration),
        **settings,
        "processes": distributed.world_size(),
        "torch": torch.__version__,
    }


class Journal:
    """One run's journal; only the main process writes.

    Args:
        folder: Where it is, or will be once the first block is done.
        facts: What makes the run what it is, as plain data; a folder with other facts is refused.

    Raises:
        PrunekitError: The folder belongs to another run, or can't be read.
    """

    def __init__(self, folder: Path | str, facts: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self._facts = {"format": FORMAT, **facts}
        self.started = (self.folder / _RUN).is_file()
        if not self.started:
            return
        try:
            found = json.loads((self.folder / _RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._unusable(f"can't be read ({error})") from error
        found = found if isinstance(found, dict) else {}
        for name, value in json.loads(json.dumps(self._facts)).items():
            if found.get(name) != value:
                raise self._unusable(f"belongs to a run with another {name}")

    def _unusable(self, why: str) -> PrunekitError:
        return PrunekitError(f"journal {self.folder} {why}: delete it to start anew")

    def tokens(self, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The run's calibration sequences: as recorded, or computed now and recorded."""
        path = self.folder / _TOKENS
        if self.started:
            recorded, _ = self._load(path)
            return [recorded[name] for name in sorted(recorded)]
        found = compute()
        if distributed.is_main():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _save(path, {f"{index:06d}": tokens for index, tokens in enumerate(found)}, {})
            except OSError as error:
                raise self._unwritable(error) from error
        return found

    def start(self) -> None:
        """Record which run this is, once its calibration is recorded."""
        if self.started or not distributed.is_main():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaced_file(self.folder / _RUN) as written:
                written.write_text(json.dumps(self._facts, indent=2), encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def write(
        self,
        block: int,
        tensors: Mapping[str, Tensor],
        reports: Sequence[MatrixReport],
        fit: BlockFit | None = None,
    ) -> None:
        """Record what a block's pruning changed, and its reports."""
        if not distributed.is_main():
            return
        plain = {"reports": json.dumps([dataclasses.asdict(report) for report in reports])}
        plain |= {} if fit is None else {"fit": json.dumps(dataclasses.asdict(fit))}
        try:
            _save(self._block(block), dict(tensors), plain)
        except OSError as error:
            raise self._unwritable(error) from error

    def restore(
        self, block: int, tensors: Mapping[str, Tensor]
    ) -> tuple[list[MatrixReport], BlockFit | None] | None:
        """Copy a recorded block into the model's `tensors`; None if it isn't recorded.

        Raises:
            PrunekitError: The record can't be read or doesn't fit.
        """
        if not self.started or not self._block(block).is_file():
            return None
        recorded, metadata = self._load(self._block(block))
        if list(recorded) != sorted(tensors):
            raise self._unusable(f"holds other matrices for block {block}")
        for name, tensor in tensors.items():
            tensor.copy_(recorded[name])
        plain = json.loads(metadata["reports"])
        reports = [MatrixReport(**{**facts, "shape": tuple(facts["shape"])}) for facts in plain]
        return reports, BlockFit(**json.loads(metadata["fit"])) if "fit" in metadata else None

    def _block(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"

    def _load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
                return tensors, dict(file.metadata() or {})
        except (OSError, SafetensorError) as error:
            raise self._unusable(f"is damaged: {path.name} can't be read ({error})") from error

    def _unwritable(self, error: OSError) -> PrunekitError:
        return PrunekitError(
            f"journal {self.folder} can't be written ({error.strerror or error}): free some space, "
            "or run without a journal"
        )


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with replaced_file(path) as written:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, written, metadata)
