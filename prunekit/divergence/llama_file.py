"""The file of llama.cpp's `--kl-divergence-base`: 16-bit log-probabilities of a whole text.

Little-endian, without alignment:

    8 bytes            "_logits_"
    int32              n_ctx, tokens per chunk
    int32              n_vocab
    int32              n_chunk
    int32 × n_chunk·n_ctx            the text's tokens
    per chunk and scored position (n_ctx − 1 − ⌊n_ctx/2⌋ of them):
        float32        scale
        float32        smallest log-probability
        uint16 × n_vocab, and one more where n_vocab is odd

log p = scale · u + smallest. The writer cuts logits 16 below the largest one: log p is never below
max − 16, with steps of at most 16/65535 = 2.4e-4, so that what is read back is off by half of that
where nothing was cut. Scored positions are ⌊n_ctx/2⌋ … n_ctx − 2 of each chunk; the first token of
a chunk is stored as it is in the text, and read as the beginning-of-text token where the model's
tokenizer adds one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunekit.divergence.rows import Rows
from prunekit.divergence.windows import Windows, planned
from prunekit.errors import PrunekitError
from prunekit.files.atomic import replaced_file

MAGIC = b"_logits_"
_HEADER = struct.Struct("<8siii")
FLOOR = 16.0  # logits further below the largest are cut


def is_llama_file(path: Path) -> bool:
    """Whether `path` is a file that starts like one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class LlamaFile:
    """A file that is read: memory-mapped, some windows at a time.

    Args:
        path: The file.

    Raises:
        PrunekitError: It is no such file, or shorter than its header says.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.name = self.path.stem
        with self.path.open("rb") as file:
            head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(MAGIC):
            raise PrunekitError(f"{path} is no file of llama.cpp's --kl-divergence-base")
        _, self.context, self.vocabulary, self.chunks = _HEADER.unpack(head)
        if self.context < 4 or self.vocabulary < 1 or self.chunks < 1:
            raise PrunekitError(
                f"{path} says {self.chunks} chunks of {self.context} tokens with {self.vocabulary} "
                "logits each: make it again"
            )
        self.scored = self.context - 1 - self.context // 2
        tokens = _HEADER.size + 4 * self.chunks * self.context
        per_chunk = 2 * self.scored * _stored(self.vocabulary)
        size, expected = self.path.stat().st_size, tokens + self.chunks * per_chunk
        if size < expected:
            whole = max(0, size - tokens) // per_chunk
            raise PrunekitError(
                f"{path} is cut off: {size} of {expected} bytes, {whole} of {self.chunks} chunks; "
                "make it again (llama.cpp doesn't say when a disk is full)"
            )
        self.ids: NDArray[np.int32] = np.fromfile(
            self.path, "<i4", self.chunks * self.context, offset=_HEADER.size
        ).reshape(self.chunks, self.context)
        shape = (self.chunks, self.scored, _stored(self.vocabulary))
        self._rows = np.memmap(self.path, "<u2", "r", tokens, shape)

    def windows(self, begin: int | None = None, limit: int | None = None) -> Windows:
        """The plan that the file was written of; `begin` replaces each chunk's first token."""
        ids = self.ids.reshape(-1).tolist()
        return planned("llama.cpp", [ids], context=self.context, begin=begin, limit=limit)

    def check(self, windows: Windows) -> None:
        """See that it holds the scored positions of a plan.

        Raises:
            PrunekitError: The plan is of other windows, of more, or of other tokens.
        """
        if windows.kind != "llama.cpp" or windows.context != self.context:
            raise PrunekitError(
                f"{self.path} has llama.cpp windows of {self.context} tokens, the comparison has "
                f"{windows.kind} windows of {windows.context}: use --context {self.context}"
            )
        if len(windows) > self.chunks:
            raise PrunekitError(
                f"{self.path} has {self.chunks} chunks, the comparison {len(windows)}: use --limit "
                f"{self.chunks}"
            )
        for index, (ids, start) in enumerate(zip(windows.ids, windows.starts, strict=True)):
            ours = np.array((start, *ids[1:]))
            differs = np.flatnonzero(ours != self.ids[index])
            if len(differs):
                at = int(differs[0])
                raise PrunekitError(
                    f"{self.path} was made of another text or tokenizer: token {at} of chunk "
                    f"{index} is {self.ids[index, at]} there and {ours[at]} here"
                )

    def rows(self, group: range) -> Rows:
        """Log-probabilities (positions, n_vocab) float32 of the windows `group`."""
        return Rows(torch.cat([self._decoded(index) for index in group]))

    def _decoded(self, index: int) -> Tensor:
        stored = np.ascontiguousarray(self._rows[index])
        scale, least = np.ascontiguousarray(stored[:, :4]).view("<f4").T
        values = stored[:, 4 : 4 + self.vocabulary].astype(np.float32)
        values *= scale[:, None]
        values += least[:, None]
        return torch.from_numpy(values)


def write(path: Path, windows: Windows, logits: Callable[[int], Tensor], vocabulary: int) -> None:
    """Write a file that llama.cpp's `--kl-divergence` reads.

    Args:
        path: The file.
        windows: A plan of kind `llama.cpp`.
        logits: Gives the logits (scored positions, vocabulary) of a window.
        vocabulary: Number of logits.

    Raises:
        PrunekitError: The plan is of another kind, or there is too little space.
    """
    if windows.kind != "llama.cpp":
        raise PrunekitError(
            f"llama.cpp's file has windows of its own, these are {windows.kind}: use llama.cpp"
        )
    scored = windows.scored[0]
    size = _HEADER.size + len(windows) * (4 * windows.context + 2 * scored * _stored(vocabulary))
    room = os.statvfs(path.parent)
    if size > room.f_bavail * room.f_frsize:
        free = room.f_bavail * room.f_frsize
        raise PrunekitError(f"{path} needs {size} bytes, {free} are free: choose another place")
    with replaced_file(path) as written, written.open("wb") as file:
        file.write(_HEADER.pack(MAGIC, windows.context, vocabulary, len(windows)))
        for ids, start in zip(windows.ids, windows.starts, strict=True):
            file.write(np.array((start, *ids[1:]), "<i4").tobytes())
        for index in range(len(windows)):
            file.write(encoded(logits(index)[:, :vocabulary]).tobytes())


def encoded(logits: Tensor) -> NDArray[np.uint16]:
    """Rows (n, stored) uint16 of logits (n, vocabulary), as llama.cpp rounds them."""
    values = logits.float().cpu().numpy()
    high = values.max(1)
    low = np.maximum(values.min(1), high - np.float32(FLOOR))
    log_sum = np.log(np.exp(values - high[:, None]).sum(1, dtype=np.float64)).astype(np.float32)
    scale = (high - low) / np.float32(65535)
    rows = np.zeros((len(values), _stored(values.shape[1])), "<u2")
    rows[:, :4] = np.stack([scale, low - high - log_sum], 1).astype("<f4").view("<u2")
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.rint((values - low[:, None]) / scale[:, None])
    kept = (values > low[:, None]) & (scale > 0)[:, None]
    rows[:, 4 : 4 + values.shape[1]] = np.where(kept, steps, 0).astype("<u2")
    return rows


def _stored(vocabulary: int) -> int:
    """uint16 per row: two float32, the logits, and one more where their number is odd."""
    return 2 * ((vocabulary + 1) // 2) + 4
