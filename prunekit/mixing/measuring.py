"""Mixes measured on parts of a text: each alone, in stages, whole, and on what is held out.

Under several processes each measures every so-many-th mix, whole: the KLs are those of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from prunekit.divergence.processes import together
from prunekit.divergence.windows import Windows
from prunekit.mixing.copies import Mixture
from prunekit.mixing.fitness import Fitness, Record
from prunekit.mixing.mixes import Mix, Stage
from prunekit.process import distributed
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

    def _kls(self, mixes: Sequence[Mix], indices: Sequence[int], told: str = "") -> list[float]:
        """KLs of mixes on windows; with a bar if it is `told`."""
        data = ",".join(map(str, indices))
        wanted = [mix for mix in dict.fromkeys(mixes) if any(mix)]
        missing = [mix for mix in wanted if self._record.get(mix, data) is None]
        at_once = distributed.world_size()
        rounds = range(0, len(missing), at_once)
        for start in track(rounds, told, enabled=self._progress and bool(told)):
            now = missing[start : start + at_once]
            mine = together(partial(self._measure, distributed.shard(now), indices))
            for mix, kl in zip(now, distributed.gather(mine), strict=True):
                self._record.add(mix, data, kl)
        return [self._record.get(mix, data) or 0.0 for mix in mixes]

    def _measure(self, mixes: Sequence[Mix], indices: Sequence[int]) -> list[float]:
        """KLs of mixes, measured in this process."""
        if mixes and self._fitness is None:  # a search that is only read again runs no model
            self._mixture.apply_((0,) * len(mixes[0]))
            self._fitness = Fitness(self._model, self._windows, self._batch)
        found = []
        for mix in mixes:
            self._mixture.apply_(mix)
            assert self._fitness is not None
            found.append(self._fitness.kl(indices))
        return found

    def whole(self, mixes: Sequence[Mix]) -> list[float]:
        """On all windows that are searched on."""
        return self._kls(mixes, self.searched, "front")

    def held_out(self, mixes: Sequence[Mix]) -> list[float]:
        """On the windows that are not."""
        return self._kls(mixes, self._held_out, "held out")

    def all_whole(self) -> dict[Mix, float]:
        """Every mix that was measured on all windows that are searched on."""
        dense = {(0,) * len(self._mixture.parts): 0.0}
        return dense | self._record.measured(",".join(map(str, self.searched)))

    def alone(self) -> Any:
        """(parts, choices) KL of each choice in each part alone, on the first stage's windows."""
        costs = self._mixture.costs("bytes").parts
        damage = np.zeros(costs.shape)
        places = [tuple(place) for place in np.argwhere(np.isfinite(costs)).tolist() if place[1]]
        mixes = [
            tuple(choice if number == part else 0 for number in range(len(damage)))
            for part, choice in places
        ]
        found = self._kls(mixes, self._share(STAGES[0][0]), "each part alone")
        for place, kl in zip(places, found, strict=True):
            damage[place] = kl
        return damage

    def stages(self, offspring: int) -> list[Stage]:
        """The rounds of selection."""
        return [
            Stage(number, max(1, round(share * offspring)))
            for number, (_, share) in enumerate(STAGES)
        ]

    def staged(self, mixes: Sequence[Mix], stage: int) -> list[float]:
        """On the windows of a stage."""
        return self._kls(mixes, self._share(STAGES[stage][0]))

    def _share(self, share: float) -> list[int]:
        return self.searched[: max(1, round(share * len(self.searched)))]
