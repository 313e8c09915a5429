"""Mixes of choices per part: their cost, the best by an additive model, and evolution from there.

A mix names one choice for every part. Two steps find a good one within a limit. The first takes
the damage of a mix for the sum of what each choice does alone, D(x) = Σ dᵢ(xᵢ): for a price λ of
cost every part takes the choice with the least dᵢ + λcᵢ, and λ is as small as the limit allows. The
second corrects that by measuring whole mixes: a (1+λ) evolution whose mutations keep the cost and
whose offspring survive on more and more data, as in EvoPress (arXiv 2410.14649).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Mix = tuple[int, ...]
#: (mixes, stage) -> their losses on the stage's data.
Measure = Callable[[Sequence[Mix], int], list[float]]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """What choices cost.

    Attributes:
        parts: (parts, choices); infinite where a part has no such choice. Choice 0 always exists.
        fixed: What everything else costs.
    """

    parts: Floats
    fixed: float

    def of(self, mix: Mix) -> float:
        """The cost of a mix."""
        return float(self.parts[np.arange(len(mix)), list(mix)].sum()) + self.fixed

    @property
    def least(self) -> float:
        """The cost of the cheapest mix."""
        return float(self.parts.min(axis=1).sum()) + self.fixed


def least_damage(damage: Floats, costs: Costs, limit: float) -> Mix:
    """The mix within the limit whose summed damage is small, by a Lagrange multiplier.

    Exact for the costs that prices reach; what is left of the limit then goes to the changes that
    reduce damage most for their cost.

    Args:
        damage: (parts, choices) of each choice alone.
        costs: Of the choices.
        limit: Largest cost.

    Raises:
        ValueError: Even the cheapest mix costs more.
    """
    if costs.least > limit:
        raise ValueError(f"the cheapest mix costs {costs.least:g}, over the limit of {limit:g}")
    low, high = 0.0, 1.0
    while costs.of(_priced(damage, costs, high)) > limit:
        low, high = high, 4 * high
        if high > 1e300:  # ties at equal damage: the cheapest mix itself
            return _filled(tuple(costs.parts.argmin(axis=1).tolist()), damage, costs, limit)
    for _ in range(100):
        price = (low + high) / 2
        over = costs.of(_priced(damage, costs, price)) > limit
        low, high = (price, high) if over else (low, price)
    return _filled(_priced(damage, costs, high), damage, costs, limit)


def _priced(damage: Floats, costs: Costs, price: float) -> Mix:
    """The choice of each part with the least damage + price · cost; of equals the cheapest."""
    total = np.where(np.isfinite(costs.parts), damage + price * costs.parts, np.inf)
    best = total.min(axis=1, keepdims=True)
    return tuple(np.where(total == best, costs.parts, np.inf).argmin(axis=1).tolist())


def _filled(mix: Mix, damage: Floats, costs: Costs, limit: float) -> Mix:
    """Spend what is left of the limit on the changes with the most gain for their cost."""
    found = list(mix)
    rows = np.arange(len(found))
    while True:
        slack = limit - costs.of(tuple(found))
        more = costs.parts - costs.parts[rows, found][:, None]
        gain = damage[rows, found][:, None] - damage
        fits = (more <= slack) & (gain > 0)
        if not fits.any():
            return tuple(found)
        rate = np.where(fits, gain / np.maximum(more, 1e-12), -np.inf)
        part, choice = np.unravel_index(int(rate.argmax()), rate.shape)
        found[int(part)] = int(choice)


def frontier(damage: Floats, costs: Costs, lowest: float, count: int) -> list[Mix]:
    """Mixes of small damage at `count` limits from `lowest` to the cost of all choices 0."""
    dense = costs.of((0,) * len(damage))
    limits = np.linspace(max(lowest, costs.least), dense, count)
    return list(dict.fromkeys(least_damage(damage, costs, float(limit)) for limit in limits))


@dataclass(frozen=True)
class Stage:
    """One round of selection.

    Attributes:
        number: Which data it measures on: passed to the `Measure`.
        survivors: How many offspring go on.
    """

    number: int
    survivors: int


def evolve(
    start: Mix,
    damage: Floats,
    costs: Costs,
    limit: float,
    measure: Measure,
    stages: Sequence[Stage],
    *,
    generations: Iterable[int],
    offspring: int,
    seed: int = 0,
) -> Mix:
    """The best mix that a (1+λ) evolution finds from `start`; deterministic for a `measure`.

    Args:
        start: A mix within the limit.
        damage: (parts, choices) of each choice alone: which changes are for the better.
        costs: Of the choices.
        limit: Largest cost; every mix that is measured keeps it.
        measure: The losses of mixes on the data of a stage.
        stages: Rounds of selection, the cheapest first; the last one's loss decides.
        generations: Numbers of the generations, each with draws of its own.
        offspring: Mutants per generation.
        seed: Of all draws.
    """
    best = start
    (loss,) = measure([best], stages[-1].number)
    for generation in generations:
        draw = np.random.default_rng([seed, generation])
        pool: list[Mix] = []
        for _ in range(4 * offspring):
            child = mutated(best, damage, costs, limit, draw)
            if child != best and child not in pool:
                pool.append(child)
            if len(pool) == offspring:
                break
        scored: list[tuple[float, Mix]] = []
        for stage in stages:
            scored = sorted(zip(measure(pool, stage.number), pool, strict=True))
            pool = [child for _, child in scored[: stage.survivors]]
        if scored and scored[0][0] < loss:
            loss, best = scored[0]
    return best


def mutated(mix: Mix, damage: Floats, costs: Costs, limit: float, draw: np.random.Generator) -> Mix:
    """A few parts of `mix` with other choices, and others changed back until the limit holds.

    Few changes are likelier than many: the number is the smaller of two draws from 1 to 4.
    """
    found = list(mix)
    parts, choices = costs.parts.shape
    for _ in range(int(draw.integers(1, 5, size=2).min())):
        part = int(draw.integers(parts))
        others = [c for c in range(choices) if c != found[part] and _exists(costs, part, c)]
        if others:
            found[part] = int(draw.choice(others))
    rows = np.arange(parts)
    while costs.of(tuple(found)) > limit:
        cheaper = np.argwhere(costs.parts < costs.parts[rows, found][:, None])
        part, choice = cheaper[draw.integers(len(cheaper))].tolist()
        found[part] = choice
    while True:
        slack = limit - costs.of(tuple(found))
        now = rows, found
        fits = costs.parts - costs.parts[now][:, None] <= slack
        better = np.argwhere(fits & (damage < damage[now][:, None]))
        if not len(better):
            return tuple(found)
        part, choice = better[draw.integers(len(better))].tolist()
        found[part] = choice


def _exists(costs: Costs, part: int, choice: int) -> bool:
    return bool(np.isfinite(costs.parts[part, choice]))


def undominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, loss) that no other beats in both, by rising cost."""
    found: list[int] = []
    least = np.inf
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if points[index][1] < least:
            found.append(index)
            least = points[index][1]
    return found
