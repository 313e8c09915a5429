"""Options from a YAML file: flags win, and every value is checked."""

from __future__ import annotations

import json

import pytest

from prunekit import cli


def test_config_gives_options_and_flags_win(here, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: dense\nmethod: magnitude\npattern: 2:4\nverbose: true\nquiet: false\n"
        f"batch-size: 3\nsparsity:\nignore: ['*.q_proj', '*.k_proj']\noutput: {tmp_path / 'a'}\n"
    )
    args = cli.parse(["prune", "--config", str(config)])
    assert (args.model, args.method, args.pattern, args.verbose) == (
        "dense",
        "magnitude",
        "2:4",  # which YAML 1.1 reads as the number 124
        True,
    )
    assert args.batch_size == 3 and args.ignore == ["*.q_proj", "*.k_proj"] and not args.quiet
    flags = ["--pattern", "4:8", "--ignore", "*.v_proj", "--batch-size=5"]
    args = cli.parse(["prune", "other", *flags, "--config", str(config)])
    assert (args.model, args.pattern, args.batch_size) == ("other", "4:8", 5)
    assert args.ignore == ["*.v_proj"] and args.method == "magnitude"
    assert (
        cli.main(["prune", "--config", str(config), "--json", "--output", str(tmp_path / "b")]) == 0
    )
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["recipe"]["rules"]["*"]["pattern"] == "2:4" and len(report["left_dense"]) == 6
    assert not (tmp_path / "a").exists()


def test_config_rules(here, tmp_path, capsys):
    config = tmp_path / "rules.yaml"
    config.write_text(
        'rules:\n  "*.mlp.*": {method: magnitude, pattern: 1:4}\n'
        '  "*.o_proj": {method: magnitude, sparsity: 0.25}\n'
    )
    line = f"prune dense --config {config} --json --output {tmp_path / 'out'}"
    assert cli.main(line.split()) == 0
    matrices = json.loads(capsys.readouterr().out)["report"]["matrices"]
    found = {m["name"].rpartition(".")[2]: m["sparsity"] for m in matrices}
    assert found == {"up_proj": 0.75, "gate_proj": 0.75, "down_proj": 0.75, "o_proj": 0.25}


@pytest.mark.parametrize("value", ["count: true", "count: [1, 2]", "count: {a: 1}", "json: 3"])
def test_config_values_are_checked(value, here, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(value)
    line = f"drop dense --config {config} --output {tmp_path / 'out'}"
    if value == "count: [1, 2]":  # repeated like a repeated flag: the last one counts
        assert cli.parse(line.split()).count == 2
        return
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and value.partition(":")[0] in err
