"""Mixes measured on parts of a text: each alone, in stages, whole, and on what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from prunekit.divergence.windows import Windows
from prunekit.mixing.copies import Mixture
from prunekit.mixing.fitness import Fitness, Record
from prunekit.mixing.mixes import Mix, Stage
from prunekit.process.progress import track

_CPU_TOKENS, _GPU_TOKENS = 1024, 8192  # per forward pass
HELD_OUT = 4  # one of so many windows is kept for the end
#: Shares of the searched windows that a stage measures on, and of the offspring that survive it.
STAGES = ((1 / 8, 1 / 4), (1 / 2, 1 / 16), (1.0, 0.0))


class Measured:
    """KLs of mixes, each measured once and for all.

    Args:
        mixture: Makes the model a mix.
        windows: The text; every `HELD_OUT`-th window is not searched on.
        record: What is known already.
        model: The mixture's model.
        progress: Show bars.

    Attributes:
        searched: Indices of the windows that are searched on.
    """

    def __init__(
        self,
        mixture: Mixture,
        windows: Windows,
        record: Record,
        model: PreTrainedModel,
        progress: bool,
    ) -> None:
        self._mixture, self._record, self._progress = mixture, record, progress
        self._batch = _CPU_TOKENS if model.device.type == "cpu" else _GPU_TOKENS
        self._windows, self._model = windows, model
        self._fitness: Fitness | None = None
        everything = range(len(windows))
        self._held_out = [i for i in everything if i % HELD_OUT == HELD_OUT - 1]
        self.searched = [i for i in everything if i not in self._held_out]

    def _kl(self, mix: Mix, indices: Sequence[int]) -> float:
        data = ",".join(map(str, indices))
        known = 0.0 if not any(mix) else self._record.get(mix, data)
        if known is None:
            if self._fitness is None:  # a search that is only read again runs no model
                self._mixture.apply_((0,) * len(mix))
                self._fitness = Fitness(self._model, self._windows, self._batch)
            self._mixture.apply_(mix)
            known = self._fitness.kl(indices)
            self._record.add(mix, data, known)
        return known

    def whole(self, mix: Mix) -> float:
        """On all windows that are searched on."""
        return self._kl(mix, self.searched)

    def held_out(self, mix: Mix) -> float:
        """On the windows that are not."""
        return self._kl(mix, self._held_out)

    def all_whole(self) -> dict[Mix, float]:
        """Every mix that was measured on all windows that are searched on."""
        dense = {(0,) * len(self._mixture.parts): 0.0}
        return dense | self._record.measured(",".join(map(str, self.searched)))

    def alone(self) -> Any:
        """(parts, choices) KL of each choice in each part alone, on the first stage's windows."""
        costs = self._mixture.costs("bytes").parts
        damage = np.zeros(costs.shape)
        places = [tuple(place) for place in np.argwhere(np.isfinite(costs)).tolist() if place[1]]
        for part, choice in track(places, "each part alone", enabled=self._progress):
            mix = [0] * len(damage)
            mix[part] = choice
            damage[part, choice] = self._kl(tuple(mix), self._share(STAGES[0][0]))
        return damage

    def stages(self, offspring: int) -> list[Stage]:
        """The rounds of selection."""
        return [
            Stage(number, max(1, round(share * offspring)))
            for number, (_, share) in enumerate(STAGES)
        ]

    def staged(self, mix: Mix, stage: int) -> float:
        """On the windows of a stage."""
        return self._kl(mix, self._share(STAGES[stage][0]))

    def _share(self, share: float) -> list[int]:
        return self.searched[: max(1, round(share * len(self.searched)))]
