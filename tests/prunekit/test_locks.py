"""One writer per output, and no output that would take more with it than an earlier result."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import prunekit as pk
from prunekit import cli
from prunekit.errors import PrunekitError
from prunekit.files import atomic
from prunekit.files.locks import locked

HOLD = """
import sys
sys.argv[0] = "prunekit"  # which spares the import of torch
from prunekit.files.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def held(tmp_path):
    """An output that another process holds, and that process."""
    output = tmp_path / "deep" / "out"
    words = [sys.executable, "-c", HOLD, str(output)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(words, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield output, process
        process.kill()


def test_a_second_run_is_told_who_holds_the_output(held, tiny, word_tokenizer, capsys):
    output, process = held
    said = rf"another run is writing {output} \(process {process.pid} on .* since 20.*: prunekit "
    with pytest.raises(PrunekitError, match=said):
        pk.save(tiny("llama"), word_tokenizer, output)
    with pytest.raises(PrunekitError, match=said), atomic.replaced_folder(output):
        pass
    for words in (
        ["prune", "demo", "--method", "magnitude"],
        ["drop", "demo", "--count", "1"],
        ["swap", "demo"],
        ["compare", "demo", "demo"],
        ["demo"],
        ["bench", "demo"],
    ):
        assert cli.main([*words, "--output", str(output)]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert f"process {process.pid}" in line and "choose another output" in line
    assert [path.name for path in output.parent.iterdir()] == [".out.lock"]


def test_a_journal_in_use_is_refused(held, tiny, token_ids):
    output, _ = held
    with pytest.raises(PrunekitError, match="another run is writing"):
        pk.prune_(tiny("llama"), pk.Wanda(0.5), token_ids, journal=output, progress=False)
    assert not output.exists()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_lock_goes_with_its_process(held, end):
    output, process = held
    if end is None:
        process.communicate("\n")
        assert not output.parent.exists()  # made for the lock alone
    else:
        os.kill(process.pid, end)
        process.wait()
    with locked(output), atomic.replaced_folder(output) as new:
        (new / "file").write_text("x")
    assert (output / "file").read_text() == "x"
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_thread_may_nest_a_lock_and_another_may_not_have_it(tmp_path):
    errors = []

    def other():
        try:
            with locked(tmp_path / "out"):
                pass
        except PrunekitError as error:
            errors.append(str(error))

    with locked(tmp_path / "out"), locked(tmp_path / "out"):
        for _ in range(2):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    assert len(errors) == 2 and "another thread of this process" in errors[0]
    other()
    assert len(errors) == 2 and not list(tmp_path.iterdir())


def _add_one(path, times):
    for _ in range(times):
        while True:
            try:
                with locked(path):
                    path.write_text(str(int(path.read_text()) + 1))
                break
            except PrunekitError:
                continue


def test_locks_exclude_each_other_while_they_come_and_go(tmp_path):
    path = tmp_path / "count"
    path.write_text("0")
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=_add_one, args=(path, 200)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert path.read_text() == "600"
    assert [file.name for file in tmp_path.iterdir()] == ["count"]


def test_folders_that_hold_more_than_a_result_are_refused(
    tiny, word_tokenizer, tmp_path, monkeypatch, capsys
):
    home, work = tmp_path / "home", tmp_path / "work" / "here"
    home.mkdir()
    work.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    model = tiny("llama")
    for output, said in (
        ("/", "is the root of the file system"),
        ("//", "is the root of the file system"),
        (".", "is the current folder"),
        ("..", "holds the current folder"),
        (str(tmp_path), "holds"),
        ("~", "is your home folder"),
        ("../here/.", "is the current folder"),
    ):
        with pytest.raises(PrunekitError, match=said):
            pk.save(model, word_tokenizer, output, overwrite=True)
        words = ["prune", "demo", "--method", "magnitude", "--overwrite", "--output", output]
        assert cli.main(words) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert said in line and "choose a folder inside it" in line
    assert pk.save(model, word_tokenizer, "new") == Path("new")
    assert torch.equal(pk.load("new")[0].lm_head.weight.detach(), model.lm_head.weight.detach())
