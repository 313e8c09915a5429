"""The report of a pruning run, matrix by matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class MatrixReport:
    """One pruned matrix.

    Attributes:
        name: Its name in the model.
        layer: Index of its decoder layer.
        shape: (out, in).
        method: The name of its method, such as "wanda".
        pattern: "unstructured" or "N:M".
        kept: Weights that the mask keeps.
        zeros: Weights that are zero now: the pruned ones and those that were zero before.
        relative_error: ‖X(W - W')ᵀ‖ / ‖XWᵀ‖ (Frobenius) on up to 128 sampled calibration
            inputs X that reach the matrix when all earlier layers are pruned; None without
            calibration, or when no token reached it.
        note: What was unusual, or "".
        bits: To how many bits the kept weights were rounded, or "fp8", or None.
    """

    name: str
    layer: int
    shape: tuple[int, int]
    method: str
    pattern: str
    kept: int
    zeros: int
    relative_error: float | None
    note: str = ""
    bits: int | str | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.size

    @property
    def kind(self) -> str:
        """Its name inside a layer, expert numbers left out: `self_attn.q_proj`."""
        _, _, inside = self.name.partition(f".{self.layer}.")
        return ".".join(part for part in inside.split(".") if not part.isdigit())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "shape": list(self.shape), "sparsity": self.sparsity}


@dataclass(frozen=True)
class BlockFit:
    """What reconstruction did to one block.

    Attributes:
        layer: Its index.
        before: Relative error E on held-out tokens, as pruned.
        after: The same of the parameters that were kept.
        steps: Updates that were made; those after the best check are undone.
        note: What was unusual, or "".
    """

    layer: int
    before: float
    after: float
    steps: int
    note: str = ""


@dataclass(frozen=True)
class PruneReport:
    """The report of `prune_`.

    Attributes:
        recipe: The recipe as plain data.
        matrices: One entry per pruned matrix, in the model's order.
        left_dense: Names of the layers' other matrices: ignored, or matched by no rule.
        sequences: Number of calibration sequences, 0 without calibration.
        tokens: Number of calibration tokens.
        calibration_dtype: Type that was asked for the calibration passes, such as "bfloat16";
            None: the model's own, or no calibration.
        reconstruct: Settings of local reconstruction as plain data; None without it.
        blocks: What reconstruction did to each pruned block.
    """

    recipe: dict[str, Any]
    matrices: tuple[MatrixReport, ...]
    left_dense: tuple[str, ...] = ()
    sequences: int = 0
    tokens: int = 0
    calibration_dtype: str | None = None
    reconstruct: dict[str, Any] | None = None
    blocks: tuple[BlockFit, ...] = ()

    @property
    def size(self) -> int:
        """Weights of the pruned matrices."""
        return sum(matrix.size for matrix in self.matrices)

    @property
    def kept(self) -> int:
        """Weights that the masks keep."""
        return sum(matrix.kept for matrix in self.matrices)

    @property
    def zeros(self) -> int:
        """Zeros in the pruned matrices."""
        return sum(matrix.zeros for matrix in self.matrices)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the pruned matrices."""
        return self.zeros / self.size

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "recipe": self.recipe,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "calibration_dtype": self.calibration_dtype,
            "size": self.size,
            "kept": self.kept,
            "zeros": self.zeros,
            "sparsity": self.sparsity,
            "left_dense": list(self.left_dense),
            "matrices": [matrix.to_dict() for matrix in self.matrices],
            "reconstruct": self.reconstruct,
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
        }

    def table(self, *, verbose: bool = False) -> str:
        """A plain-text table: a line per kind of matrix, or per matrix if `verbose`.

        Where layers differ, as a budget lets them, the least and the largest sparsity stand behind.
        """
        header = ("matrix", "count", "shape", "method", "pattern", "sparsity", "relative error")
        rows = [header]
        groups: dict[Any, list[MatrixReport]] = {}
        for matrix in self.matrices:
            kind = matrix.name if verbose else matrix.kind
            held = f"{matrix.bits} bits" if isinstance(matrix.bits, int) else matrix.bits
            pattern = matrix.pattern + ("" if held is None else f", {held}")
            groups.setdefault((kind, matrix.shape, matrix.method, pattern), []).append(matrix)
        for (kind, shape, method, pattern), members in groups.items():
            parts = sorted(m.sparsity for m in members)
            spread = f" ({parts[0]:.2f}–{parts[-1]:.2f})" if parts[-1] - parts[0] > 0.005 else ""
            sparsity = sum(m.zeros for m in members) / sum(m.size for m in members)
            errors = [m.relative_error for m in members if m.relative_error is not None]
            rows.append(
                (
                    kind,
                    str(len(members)),
                    f"{shape[0]}×{shape[1]}",
                    method,
                    pattern,
                    f"{sparsity:.4f}{spread}",
                    f"{sum(errors) / len(errors):.4f}" if errors else "–",
                )
            )
        rows.append(("all", str(len(self.matrices)), "", "", "", f"{self.sparsity:.4f}", ""))
        notes = [f"{m.name}: {m.note}" for m in self.matrices if m.note]
        closing = [*self._reconstructed(), *calibrated_in(self.calibration_dtype)]
        return "\n".join([*align(rows), *notes, *closing])

    def _reconstructed(self) -> list[str]:
        """What reconstruction did, in one line and a line per block that was unusual."""
        if not self.blocks:
            return []
        before, after = (
            sum(getattr(block, name) for block in self.blocks) / len(self.blocks)
            for name in ("before", "after")
        )
        return [
            f"Reconstruction of {len(self.blocks)} blocks: relative error of their outputs on "
            f"held-out tokens {before:.4f} as pruned, {after:.4f} after (means).",
            *(f"block {block.layer}: {block.note}" for block in self.blocks if block.note),
        ]


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """A type without its module: bfloat16 for torch.bfloat16."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def calibrated_in(dtype: str | None) -> list[str]:
    """The line below a table that says what a `calibration_dtype` changed; none without one."""
    if dtype is None:
        return []
    return [
        f"Calibration passes ran in {dtype}, on copies of the weights: activations are of that "
        "type, weights were judged and stored in their own."
    ]


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are padded to equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
