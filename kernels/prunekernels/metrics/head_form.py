"""How a head's products become logits, and which divergence of them is a loss."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadForm:
    """A divergence of logits cap(scale·h·Wᵀ)/T; see `head_loss`.

    Attributes:
        kind: "kl", "reverse_kl" or "js".
        temperature: T.
        softcap: Cap of the logits, or None.
        scale: Their factor, before the cap.
    """

    kind: str
    temperature: float
    softcap: float | None
    scale: float
