"""Killed runs resume to the same bytes; other runs' journals are refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prunekit import cli
from prunekit.data.calibration import Calibration
from prunekit.errors import PrunekitError
from prunekit.models import blocks
from prunekit.pruning import Magnitude, Recipe, SparseGPT, Wanda, journal, prune_

RECIPE = Recipe({"*.mlp.*": SparseGPT(pattern="2:4"), "*": Wanda()})
CALIBRATION = Calibration(samples=4, length=10)
LAYERS = 6
FORK = multiprocessing.get_context("fork")

needs_fork = pytest.mark.skipif(os.name == "nt", reason="no fork and no SIGKILL")


def whole_run(make, folder, result, pause):
    """In a process of its own: prune, write the model's bytes and the report."""
    torch.set_num_threads(1)
    original = blocks.run_layer

    def slowly(*args):
        time.sleep(pause)
        return original(*args)

    blocks.run_layer = slowly
    model = make("llama", num_hidden_layers=LAYERS)
    report = prune_(
        model, RECIPE, CALIBRATION, batch_size=2, journal=folder / "journal", progress=False
    )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "new")
    (folder / "report.json").write_text(json.dumps(report.to_dict()))
    (folder / "new").rename(folder / result)  # when it is there, it is whole


def start(make, folder, result, pause=0.0):
    process = FORK.Process(target=whole_run, args=(make, folder, result, pause))
    process.start()
    return process


def killed_and_resumed(make, folder, seed):
    """Kill a run at a random time once, maybe in the middle of writing, then let one finish."""
    chance = random.Random(seed)
    record = folder / "journal"
    process = start(make, folder, "killed", pause=0.01)
    wanted = chance.randrange(LAYERS)
    while journal.finished_blocks(record) < wanted:
        assert process.is_alive()
        time.sleep(0.001)
    time.sleep(chance.random() * 0.06)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it had finished before it was killed"
    done = journal.finished_blocks(record)
    resumed = start(make, folder, "resumed")
    resumed.join()
    assert resumed.exitcode == 0
    assert journal.finished_blocks(record) == LAYERS
    return done, (folder / "resumed").read_bytes(), (folder / "report.json").read_text()


def check_kills(make, tmp_path, seeds):
    whole = tmp_path / "whole"
    whole.mkdir()
    uninterrupted = start(make, whole, "model")
    uninterrupted.join()
    assert uninterrupted.exitcode == 0
    found = []
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        done, model, report = killed_and_resumed(make, folder, seed)
        assert model == (whole / "model").read_bytes()
        assert report == (whole / "report.json").read_text()
        found.append(done)
    return found


@needs_fork
def test_killed_runs_resume_to_the_same_bytes(tiny, tmp_path):
    done = check_kills(tiny, tmp_path, [0, 1])
    assert any(0 < count < LAYERS for count in done), done


@needs_fork
@pytest.mark.slow
def test_ten_random_kills(tiny, tmp_path):
    done = check_kills(tiny, tmp_path, range(10, 20))
    assert len(set(done)) > 2, done


@needs_fork
@pytest.mark.slow
def test_one_run_killed_ten_times(tiny, tmp_path):
    whole, folder, chance = tmp_path / "whole", tmp_path / "killed", random.Random(7)
    for place in (whole, folder):
        place.mkdir()
    start(tiny, whole, "model").join()
    done = [0]
    for _ in range(10):
        process = start(tiny, folder, "model", pause=0.02)
        time.sleep(0.05 + chance.random() * 0.3)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it had finished before it was killed"
        done.append(journal.finished_blocks(folder / "journal"))
    assert done == sorted(done), "a finished layer was lost"
    start(tiny, folder, "model").join()
    assert (folder / "model").read_bytes() == (whole / "model").read_bytes()
    assert (folder / "report.json").read_text() == (whole / "report.json").read_text()


def test_resuming_prunes_only_what_is_left(tiny, token_ids, tmp_path, monkeypatch):
    record, original = tmp_path / "journal", blocks.run_layer

    def stop(arch, index, *args):
        if index == 2:
            raise KeyboardInterrupt
        return original(arch, index, *args)

    monkeypatch.setattr(blocks, "run_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        prune_(tiny("llama"), RECIPE, token_ids, journal=record, progress=False)
    assert journal.finished_blocks(record) == 2
    passes = []
    monkeypatch.setattr(
        blocks, "run_layer", lambda *args: (passes.append(args[1]), original(*args))[1]
    )
    model, twin = tiny("llama"), tiny("llama")
    report = prune_(model, RECIPE, token_ids, journal=record, progress=False)
    assert passes == [0, 1, 2, 2, 3]  # the first two only propagate
    assert report == prune_(twin, RECIPE, token_ids, progress=False)
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)
    journal.remove(record)
    assert not record.exists()


def test_without_calibration_and_with_layers_that_stay_dense(tiny, tmp_path):
    recipe = Recipe({"*.1.*": Magnitude(), "*.3.mlp.*": Magnitude(0.25)})
    model, twin = tiny("mixtral"), tiny("mixtral")
    first = prune_(model, recipe, journal=tmp_path / "j", progress=False)
    assert journal.finished_blocks(tmp_path / "j") == 2
    assert prune_(twin, recipe, journal=tmp_path / "j", progress=False) == first
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


def test_journals_of_other_runs_are_refused(tiny, token_ids, tmp_path):
    def run(method=None, tokens=token_ids, seed=0, **settings):
        model = tiny("llama")
        model.model.layers[3].mlp.up_proj.weight.data[0, 0] += seed
        settings = {"batch_size": 8, **settings}
        prune_(model, method or Wanda(), tokens, journal=tmp_path / "j", progress=False, **settings)

    run()
    for what, call in {
        "recipe": lambda: run(Wanda(0.4)),
        "calibration": lambda: run(tokens=token_ids.flip(0)),
        "model": lambda: run(seed=1),
        "batch_size": lambda: run(batch_size=1),
        "calibration_dtype": lambda: run(calibration_dtype=torch.bfloat16),
    }.items():
        with pytest.raises(PrunekitError, match=f"run with another {what}: delete it"):
            call()
    run()
    facts = tmp_path / "j" / "run.json"
    recorded = facts.read_text()
    facts.write_text(recorded.replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(PrunekitError, match="run with another device: delete it"):
        run()
    facts.write_text(recorded)
    damaged = tmp_path / "j" / "block-0002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(PrunekitError, match=r"damaged: block-0002.*delete it to start anew"):
        run()


def test_the_command_resumes_says_so_and_cleans_up(tiny, tmp_path, monkeypatch, capfd):
    from prunekit import checkpoint

    output = tmp_path / "out"
    monkeypatch.setattr(checkpoint, "load", lambda *args, **kwargs: (tiny("llama"), None))
    monkeypatch.setattr(checkpoint, "save", lambda *args, **kwargs: output.mkdir())
    original = blocks.run_layer

    def stop(arch, index, *args):
        if index == 3:
            raise KeyboardInterrupt
        return original(arch, index, *args)

    command = ["prune", "x", "--samples=2", "--length=8", "--seed=3", f"--output={output}"]
    monkeypatch.setattr(blocks, "run_layer", stop)
    assert cli.main(command) != 0
    record = Path(f"{output}.journal")
    assert journal.finished_blocks(record) == 3
    monkeypatch.setattr(blocks, "run_layer", original)
    capfd.readouterr()
    assert cli.main(command) == 0
    assert "Going on after 3 finished layers" in capfd.readouterr().err
    assert output.is_dir() and not record.exists()
