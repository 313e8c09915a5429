"""Facts of a model that the commands report: sizes, sparsity, cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from prunekit.models.architectures import Architecture

_GROUPS = (2, 4, 8, 16)


@dataclass(frozen=True)
class CacheSize:
    """The size of a key-value cache per token.

    Attributes:
        entries: Number of layers with an attention.
        bytes_per_token: Keys and values of all of them, in the model's dtype.
    """

    entries: int
    bytes_per_token: int


def cache_size(model: PreTrainedModel) -> CacheSize:
    """Size of the key-value cache that decoding with `model` needs."""
    entries = sum(module is not None for module in Architecture(model).attentions())
    config = model.config
    heads = config.num_attention_heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return CacheSize(entries, entries * 2 * kept * width * model.dtype.itemsize)


def folder_bytes(folder: str | Path) -> int:
    """Bytes of the files in `folder`, or of the file."""
    path = Path(folder)
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def detect_pattern(matrix: Tensor) -> str:
    """The finest "N:M" (N kept of M, in a row) that a matrix satisfies, or "" if there is none.

    Args:
        matrix: (out, in).
    """
    nonzero = matrix != 0
    for of in _GROUPS:
        if matrix.shape[1] % of:
            break
        most = int(nonzero.reshape(-1, of).sum(1).max())
        if most < of:
            return f"{most}:{of}"
    return ""


def sparsity_by_kind(arch: Architecture) -> list[dict[str, Any]]:
    """Per kind of matrix (its name without the layer): count, shape, zeros, pattern; JSON-able."""
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[int, int, str]]] = {}
    for index in range(len(arch.layers)):
        for ref in arch.weights(index):
            inside = ref.name.partition(f".{index}.")[2]
            kind = ".".join(part for part in inside.split(".") if not part.isdigit())
            matrix = ref.read()
            zeros = matrix.numel() - int(matrix.count_nonzero())
            pattern = detect_pattern(matrix) if zeros else ""
            groups.setdefault((kind, tuple(matrix.shape)), []).append(
                (matrix.numel(), zeros, pattern)
            )
    return [
        {
            "kind": kind,
            "count": len(found),
            "shape": list(shape),
            "sparsity": sum(zeros for _, zeros, _ in found) / sum(size for size, _, _ in found),
            "pattern": _common([pattern for _, _, pattern in found]),
        }
        for (kind, shape), found in groups.items()
    ]


def _common(patterns: Sequence[str]) -> str:
    """The pattern of all matrices of a kind, "mixed", or "" if none has any."""
    different = set(patterns)
    if len(different) == 1:
        return next(iter(different))
    return "mixed"
