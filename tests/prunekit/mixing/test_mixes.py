"""Mixes of choices against brute force: limits kept, optima found, draws repeatable."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from prunekit.mixing.mixes import (
    Costs,
    Stage,
    evolve,
    frontier,
    least_damage,
    mutated,
    undominated,
)


def _problem(parts=6, choices=4, seed=0):
    draw = np.random.default_rng(seed)
    costs = np.sort(draw.uniform(1, 10, (parts, choices)), axis=1)[:, ::-1].copy()
    damage = np.sort(draw.exponential(1, (parts, choices)), axis=1)
    damage[:, 0] = 0
    return damage, Costs(costs, 5.0)


def _all(costs):
    parts, choices = costs.parts.shape
    return [m for m in product(range(choices), repeat=parts) if np.isfinite(costs.of(m))]


def _summed(damage, mix):
    return sum(damage[part, choice] for part, choice in enumerate(mix))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_additive_mix_is_within_one_part_of_the_optimum(seed, share):
    damage, costs = _problem(seed=seed)
    dense = costs.of((0,) * 6)
    limit = costs.least + share * (dense - costs.least)
    found = least_damage(damage, costs, limit)
    best = min(_summed(damage, mix) for mix in _all(costs) if costs.of(mix) <= limit)
    assert costs.of(found) <= limit
    # A multiplier misses the optimum by less than the jump of the one part at its breakpoint.
    assert _summed(damage, found) <= best + np.diff(damage, axis=1).max()


def test_a_price_that_reaches_the_limit_gives_the_optimum_itself():
    damage, costs = _problem(seed=3)
    for mix in frontier(damage, costs, 0.0, 40):
        cost = costs.of(mix)
        best = min(_summed(damage, other) for other in _all(costs) if costs.of(other) <= cost)
        slack = _summed(damage, mix) - best
        assert slack <= np.diff(damage, axis=1).max()
    ends = frontier(damage, costs, 0.0, 40)
    assert costs.of(ends[0]) == pytest.approx(costs.least) and ends[-1] == (0,) * 6


def test_a_limit_below_the_cheapest_mix_is_refused():
    damage, costs = _problem()
    with pytest.raises(ValueError, match="over the limit"):
        least_damage(damage, costs, costs.least - 0.01)


def test_choices_that_do_not_exist_are_never_taken():
    damage, costs = _problem(seed=1)
    costs.parts[2, 3] = costs.parts[4, 1:] = np.inf
    draw = np.random.default_rng(0)
    limit = 0.7 * costs.of((0,) * 6)
    mix = least_damage(damage, costs, limit)
    for _ in range(300):
        mix = mutated(mix, damage, costs, limit, draw)
        assert costs.of(mix) <= limit and mix[2] != 3 and mix[4] == 0


@pytest.mark.parametrize("seed", range(4))
def test_evolution_finds_what_the_additive_model_cannot_see(seed):
    """Damage that is only large where two certain neighbours are both compressed."""
    damage, costs = _problem(parts=7, choices=3, seed=seed)
    pairs = np.random.default_rng(seed).uniform(0, 6, 6)

    def loss(mix):
        both = sum(pairs[i] for i in range(6) if mix[i] and mix[i + 1])
        return _summed(damage, mix) + both

    limit = 0.6 * costs.of((0,) * 7)
    start = least_damage(damage, costs, limit)
    measured = []

    def measure(mixes, stage):
        measured.extend(mixes)
        return [loss(mix) for mix in mixes]

    found = evolve(
        start,
        damage,
        costs,
        limit,
        measure,
        [Stage(0, 4), Stage(1, 1)],
        generations=range(60),
        offspring=12,
        seed=seed,
    )
    best = min(loss(mix) for mix in _all(costs) if costs.of(mix) <= limit)
    assert all(costs.of(mix) <= limit for mix in measured)
    assert loss(found) <= loss(start) and loss(found) <= best * 1.05 + 1e-9
    again = evolve(
        start,
        damage,
        costs,
        limit,
        lambda mixes, stage: [loss(mix) for mix in mixes],
        [Stage(0, 4), Stage(1, 1)],
        generations=range(60),
        offspring=12,
        seed=seed,
    )
    assert again == found


def test_the_front_is_what_nothing_beats():
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.5, 2.0), (4.0, 1.0), (2.0, 5.0)]
    assert undominated(points) == [1, 2, 0]
