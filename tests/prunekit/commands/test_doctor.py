"""prunekit doctor: which implementation runs, and kernels as compiled."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from prunekit import cli


def test_doctor(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert {"op", "impl", "reason"} <= set(found["ops"][0])
    ops = {row["op"] for row in found["ops"]}
    assert {"head_pair_stats", "pair_stats", "vector_stats", "nm_mask", "rowwise_mask"} <= ops
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "head_pair_stats" in shown and "datasets" in shown


def test_doctor_compiles_kernels(monkeypatch, capsys):
    pytest.importorskip("triton")
    from prunekernels import compilation
    from prunekernels.metrics import vector_triton

    cases = vector_triton.compile_cases()
    monkeypatch.setattr(compilation, "discover", lambda: cases)
    assert cli.main(["doctor", "--kernels", "--arch", "80,sm_90", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["versions"]) == {"torch", "triton"}
    rows = {(row["name"], row["arch"]): row for row in found["kernels"]}
    assert set(rows) == {(case.name, arch) for case in cases for arch in (80, 90)}
    row = rows["vector_stats/bf16", 90]
    assert row["dtype"] == "bf16" and row["spills"] == 0 and row["fault"] is None
    assert 16 < row["registers"] <= 255 and 1 < row["instructions_per_element"] < 30
    assert row["tensor_core"] == {}
    broken = [replace(cases[0], opcodes=("HMMA",))]
    monkeypatch.setattr(compilation, "discover", lambda: broken)
    assert cli.main(["doctor", "--kernels", "--arch", "90"]) == 0
    assert "no HMMA" in capsys.readouterr().out
    assert cli.main(["doctor", "--kernels", "--arch", "70"]) == 2
    assert "choose from 80, 89, 90, gfx942" in capsys.readouterr().err
    monkeypatch.setattr("prunekernels.runtime.triton_installed", lambda: False)
    assert cli.main(["doctor", "--kernels"]) == 2
    assert "Triton is not installed" in capsys.readouterr().err
