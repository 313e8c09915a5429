"""What recovery is asked for, and what it reports."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from prunekernels.metrics.head_loss import KINDS

from prunekit.errors import PrunekitError
from prunekit.pruning.descent import check_schedule, check_share

_SHOWN = (
    ("kl_mean", "KL(dense ‖ pruned), nats", "{:.4f}"),
    ("kl_reverse_mean", "KL(pruned ‖ dense), nats", "{:.4f}"),
    ("js_mean", "Jensen–Shannon, nats", "{:.4f}"),
    ("same_top", "same likeliest token", "{:.1%}"),
    ("ppl_ratio", "perplexity over the dense model's", "{:.3f}"),
)


@dataclass(frozen=True)
class Recovery:
    """The settings of recovery.

    Attributes:
        steps: Updates.
        tokens: Tokens per update, at least one batch of sequences.
        lr: Highest learning rate, as a fraction of each tensor's root mean square.
        kind: Loss: "kl" (KL(dense‖pruned)), "reverse_kl" (KL(pruned‖dense)) or "js".
        cross_entropy: Weight of the cross-entropy with the text's own next tokens beside it.
        temperature: Both distributions are taken at.
        held_out: Share of the sequences that gradients never see, in (0, 1).
        checks: How often the held-out loss is measured, and the run recorded.
        patience: Checks without improvement after which it ends.
        seed: Of the order of batches.
    """

    steps: int = 120
    tokens: int = 4096
    lr: float = 0.001
    kind: str = "kl"
    cross_entropy: float = 0.0
    temperature: float = 1.0
    held_out: float = 0.03125
    checks: int = 10
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_schedule(self, "recovery")
        check_share(self.held_out, "recovery")
        if self.kind not in KINDS:
            raise PrunekitError(
                f"recovery kind '{self.kind}' is unknown: use one of {', '.join(KINDS)}"
            )
        if not 0 <= self.cross_entropy < math.inf:
            raise PrunekitError(
                f"recovery cross_entropy {self.cross_entropy} is no weight: use 0 or more"
            )
        if not 0 < self.temperature < math.inf:
            raise PrunekitError(
                f"recovery temperature {self.temperature} is not positive: use for example 1"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class RecoverReport:
    """The report of `recover_`.

    Attributes:
        recovery: The settings as plain data.
        teacher: Name of the dense model.
        sequences: Number of calibration sequences, held-out ones among them.
        tokens: Number of their tokens.
        held: Number of held-out sequences.
        steps: Updates that were made; those after the best check are undone.
        curve: (update, mean held-out loss per token) of every check, the start first.
        before: Statistics of both models' predictions on the held-out sequences at the start, by
            the names of `prunekernels.summarize`, and `js_mean`.
        after: The same at the end.
        zeros: Weights of the model's matrices that were held at zero.
        calibration_dtype: Type of the passes; None: the model's own.
        note: What was unusual, or "".
    """

    recovery: dict[str, Any]
    teacher: str
    sequences: int
    tokens: int
    held: int
    steps: int
    curve: tuple[tuple[int, float], ...]
    before: dict[str, float]
    after: dict[str, float]
    zeros: int
    calibration_dtype: str | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """A plain-text table of the statistics before and after."""
        rows = [(f"on {self.held} held-out sequences", "before", "after")]
        rows += [
            (label, form.format(self.before[name]), form.format(self.after[name]))
            for name, label, form in _SHOWN
            if name in self.before
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        seen = ", ".join(f"{loss:.4f} ({step})" for step, loss in self.curve)
        return "\n".join([*lines, f"Held-out loss (update): {seen}", *filter(None, [self.note])])
