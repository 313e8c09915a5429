"""Two processes (gloo, CPU) prune and drop exactly as one does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from prunekit.data.calibration import Calibration, tokens
from prunekit.divergence.recovery import Recovery, recover_
from prunekit.process import distributed
from prunekit.pruning import (
    Drop,
    Magnitude,
    Reconstruction,
    SparseGPT,
    Wanda,
    drop_,
    prune_,
)

PRUNED = {
    "wanda": ("llama", Wanda(), 1),
    "variant": ("gpt2", Wanda(variant=True, sparsity=0.3), 1),
    "sparsegpt": ("llama", SparseGPT(pattern="2:4"), 1),
    "experts": ("mixtral", Wanda(), 1),
    "magnitude": ("llama", Magnitude(), 1),
    "fewer batches than processes": ("llama", Wanda(), 8),
}
DROPPED = {
    "attn": ("llama", Drop("attn", 2)),
    "all iterative": ("gpt_neox", Drop("all", 3, "iterative")),
    "block": ("gemma2", Drop("block", 2, "consecutive")),
}


def work(make_tiny) -> dict[str, object]:
    """Everything that is compared: what this process ends up with."""
    ids = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(7))
    found: dict[str, object] = {}
    for name, (architecture, method, batch_size) in PRUNED.items():
        model = make_tiny(architecture)
        report = prune_(model, method, ids, batch_size=batch_size, progress=False)
        found[name] = (model.state_dict(), report.to_dict())
    for name, (architecture, drop) in DROPPED.items():
        report = drop_(make_tiny(architecture), drop, ids, batch_size=1, progress=False)
        found[name] = report.to_dict()
    # updates of all sequences that are not held out, so that shares of them sum to the same
    seven = torch.randint(3, 97, (7, 12), generator=torch.Generator().manual_seed(8))
    whole = {"steps": 2, "tokens": 72, "held_out": 0.14, "checks": 1}
    options = {"batch_size": 1, "progress": False}
    fitted = make_tiny("llama", num_hidden_layers=2)
    report = prune_(fitted, Wanda(), seven, reconstruct=Reconstruction(**whole), **options)
    found["reconstructed"] = (fitted.state_dict(), report.to_dict()["blocks"])
    dense = make_tiny("llama", num_hidden_layers=2)
    told = recover_(fitted, dense, seven, recovery=Recovery(**whole), **options).to_dict()
    found["recovered"] = (fitted.state_dict(), told)
    found["sampled"] = tokens(Calibration(samples=3, length=9), make_tiny("llama"), progress=False)
    found["shares"] = distributed.gather(distributed.shard(range(7)))
    return found


def tiny_maker():
    """`make_tiny` of the conftest beside this file, in a process without pytest."""
    path = Path(__file__).with_name("conftest.py")
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_tiny


def run_two_processes(folder: Path) -> list[dict[str, object]]:
    """What each of two processes makes of `work`."""
    import processes  # not on the path of the processes that run this file

    def command(rank: int) -> list[str]:
        return [sys.executable, __file__, str(folder / f"{rank}.pt")]

    assert processes.run(command, 2) == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_processes_do_what_one_does(tmp_path):
    # one test, so that the processes start once however pytest distributes its work
    alone = work(tiny_maker())
    first, second = run_two_processes(tmp_path)
    for name in PRUNED:
        check_pruned(alone[name], first[name], second[name])
    for name in DROPPED:
        check_dropped(alone[name], first[name], second[name])
    for name in ("reconstructed", "recovered"):
        check_trained(alone[name][0], first[name], second[name])
    assert torch.equal(alone["sampled"], first["sampled"])
    assert torch.equal(alone["sampled"], second["sampled"])
    assert alone["shares"] == first["shares"] == second["shares"] == list(range(7))


def check_pruned(alone, first, second):
    (expected, report), (state, other) = alone, first
    for key, value in expected.items():
        assert torch.equal(state[key] == 0, value == 0), key  # the same masks
        # SparseGPT's Hessian is summed in float32, in another order
        assert (state[key] - value).norm() <= 1e-5 * value.norm(), key
        assert torch.equal(state[key], second[0][key]), key  # bitwise the same model everywhere
    assert other == second[1]
    assert (other["sequences"], other["tokens"]) == (3, 36)
    for mine, theirs in zip(report["matrices"], other["matrices"], strict=True):
        error, wanted = theirs.pop("relative_error"), mine.pop("relative_error")
        assert mine == theirs
        assert (error is None) == (wanted is None)
        assert error is None or error == pytest.approx(wanted, rel=1e-4)


def check_trained(expected, first, second):
    (state, report), (other, told) = first, second
    assert report == told
    for key, value in expected.items():
        assert torch.equal(state[key], other[key]), key
        assert torch.equal(state[key] == 0, value == 0), key
        # Adam's first updates take signs of gradients, which rounding may turn where they are 0
        assert (state[key] - value).norm() <= 1e-3 * value.norm(), key


def check_dropped(alone, first, second):
    assert first == second
    for part in ("dropped_attn", "dropped_mlp", "dropped_blocks"):
        assert first[part] == alone[part]
    for unit, scores in alone["scores"].items():
        assert first["scores"][unit] == pytest.approx(scores, rel=1e-6)


if __name__ == "__main__":
    outcome = work(tiny_maker())
    torch.save(outcome, sys.argv[1])
