"""The analytic bounds reproduce the figures that the design was made with."""

from __future__ import annotations

import csv

import pytest
import torch
from prunekernels import bitmap_pack, sparse24_pack
from prunekernels.compilation import compile_case, discover

from bench import bounds, timers
from bench.bounds import MACHINES, Cost, Machine, bound, linear

H200 = MACHINES["H200"]
MEASURED = H200._replace(bandwidth=4.3e12, flops=790e12)


def test_floors_of_the_pair_statistics():
    for itemsize, milliseconds in ((2, 0.290), (4, 0.579)):
        steps = [step._replace(slots=0.0) for step in bounds.pair_stats(2048, 152064, itemsize)]
        found = bound(steps, MEASURED)
        assert found.ms == pytest.approx(milliseconds, abs=5e-4) and found.limit == "memory"


def test_issue_budget_per_pair_of_logits():
    for itemsize, budget in ((2, 31), (4, 62)):
        pairs = MEASURED.bandwidth / (2 * itemsize)
        assert MEASURED.slots / pairs == pytest.approx(budget, abs=0.5)


def test_a_kernel_over_its_budget_is_bound_by_issue():
    fast = bound([Cost(4e9, slots=30e9)], MEASURED)
    slow = bound([Cost(4e9, slots=40e9)], MEASURED)
    assert fast.limit == "memory" and slow.limit == "issue"
    assert slow.ms == pytest.approx(40e9 / (132 * 128 * 1.98e9) * 1000)


@pytest.mark.parametrize(
    ("N", "K", "dense", "sparse"), [(4096, 4096, 7.8, 4.4), (14336, 4096, 27.3, 15.4)]
)
def test_decode_times_of_a_layer(N, K, dense, sparse):
    assert 1000 * bound(linear("dense", 1, N, K), MEASURED).ms == pytest.approx(dense, abs=0.05)
    packed = linear("24 mma", 1, N, K)
    assert 1000 * bound(packed, MEASURED).ms == pytest.approx(sparse, abs=0.05)


def test_bytes_per_weight_of_the_formats():
    size = 4096 * 4096
    assert bounds.packed24_bytes(4096, 4096) / size == 1.125
    for dtype in (torch.bfloat16, torch.float32):
        packed = sparse24_pack(torch.zeros(33, 70, dtype=dtype))
        assert bounds.packed24_bytes(33, 70, dtype.itemsize) == packed.nbytes
    shares = [bounds.bitmap_bytes(4096, 4096, s) / size for s in (0.5, 0.6, 0.7)]
    for share, sparsity in zip(shares, (0.5, 0.6, 0.7), strict=True):
        weight = torch.randn(256, 2048) * (torch.rand(256, 2048) >= sparsity)
        packed = bitmap_pack(weight.bfloat16())
        assert packed.nbytes / weight.numel() == pytest.approx(share, rel=0.005)
    assert [round(2 / share, 2) for share in shares] == [1.77, 2.15, 2.74]


def test_what_binds_the_bitmap_at_which_sparsity():
    for sparsity, limit in ((0.5, "memory"), (0.7, "memory"), (0.8, "shared memory")):
        assert bound(linear("bitmap", 1, 14336, 4096, sparsity), H200).limit == limit
    # a load of a warp takes one pass at least, and as many as lanes meet in a bank
    per_tile = [2048 * bounds.bitmap_passes(s) for s in (0.0, 0.5, 0.9)]
    assert per_tile[0] > per_tile[1] > per_tile[2] > 64 + 4 + 5
    # two values lie in a word: without zeros, run after run, 64 words are two for each bank
    assert per_tile[0] == pytest.approx(64 * 2 + 4 + 5 + 4352 / 128 + 1)
    # more than 32 tokens: the weight is expanded anew
    few, many = (linear("bitmap", tokens, 14336, 4096, 0.8) for tokens in (8, 64))
    assert many[0].passes == 2 * few[0].passes and many[0].slots > 2 * few[0].slots


def test_dense_stays_bound_by_memory_to_about_184_tokens():
    assert bound(linear("dense", 180, 8192, 8192), MEASURED).limit == "memory"
    assert bound(linear("dense", 195, 8192, 8192), MEASURED).limit == "matrix"


def test_weights_per_clock_that_2_of_4_decoding_asks_for():
    for name, low, high in (("H200", 14.0, 15.0), ("A100", 10.0, 12.5), ("RTX 4090", 2.0, 3.0)):
        on = MACHINES[name]
        assert low < on.bandwidth / 1.125 / on.processors / on.clock < high


def test_mma_sync_is_slower_on_hopper_alone():
    costs = linear("24 mma", 4096, 4096, 4096)
    steps = [step._replace(slots=0.0) for step in costs]
    dense = bound(linear("dense", 4096, 4096, 4096), H200).ms
    assert bound(steps, H200).ms == pytest.approx(dense / 2 / 0.62, rel=1e-6)
    a100 = MACHINES["A100"]
    dense = bound(linear("dense", 4096, 4096, 4096), a100).ms
    assert bound(steps, a100).ms == pytest.approx(dense / 2, rel=1e-6)


def test_products_of_e4m3_values_are_faster_where_tensor_cores_have_them():
    costs = (linear(kind, 4096, 14336, 4096) for kind in ("24 fp8", bounds.FP8_TOKENS))
    wide, narrow = ([step._replace(slots=0.0) for step in steps] for steps in costs)
    assert sum(step.bytes for step in narrow) == wide[0].bytes + 2 * 4096 * 4096
    for name, gain in (("H200", 1.0), ("L4", 2.0), ("RTX 4090", 2.0)):
        last = bound(narrow[1:], MACHINES[name])
        assert last.limit == "matrix"
        assert bound(wide, MACHINES[name]).ms == pytest.approx(gain * last.ms)


def test_expanding_comes_before_multiplying():
    first, second = linear("24 expand", 4096, 4096, 4096)
    whole = bound([first, second], H200)
    assert whole.ms == pytest.approx(bound([first], H200).ms + bound([second], H200).ms)


def test_a_measured_machine_keeps_what_is_known_of_its_name():
    found = bounds.machine("NVIDIA H200", 4.2e12, 7e14)
    assert (found.bandwidth, found.flops, found.processors) == (4.2e12, 7e14, 132)
    assert bounds.machine("cpu", 1e10, 1e11) == Machine("cpu", 1e10, 1e11)
    assert bounds.machine("cpu", 1e10, 1e11).slots == 0


def test_the_table_says_that_it_predicts():
    lines: list[str] = []
    bounds.print_predictions(lines.append, every=True)
    assert lines[0].startswith("PREDICTED") and "nothing here" in lines[0]
    assert len(lines) == 3 + len(bounds.predictions())
    assert all(name in lines[2] for name in ("H100", "H200", "A100", "L4", "RTX 4090"))
    short: list[str] = []
    bounds.print_predictions(short.append)
    assert len(short) < 25 and set(short[:-1]) < set(lines) and "--all" in short[-1]
    for op in ("linear", "pair_stats", "head_pair_stats"):
        assert any(line.startswith(op) for line in short)


def test_measured_rows_stand_beside_their_bound(tmp_path):
    path = tmp_path / "x.csv"
    rows = [
        {"op": "linear", "shape": "M=1", "provider": "dense", "status": "ok", "bound_ms": "0.5",
         "p50_ms": "1.0", "roof_pct": "50.0"},
        {"op": "linear", "shape": "M=1", "provider": "peer", "status": "absent", "bound_ms": "",
         "p50_ms": "", "roof_pct": ""},
    ]  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines: list[str] = []
    bounds.print_measured(path, lines.append)
    assert "0.5000     1.0000     50 %" in lines[1] and lines[2].endswith("absent")


def test_counted_instructions_are_those_of_todays_kernels():
    """One kernel of the committed file is compiled again.

    `python -m bench.bounds --compile` renews the file.
    """
    name = "vector_stats/bf16"
    case = next(case for case in discover() if case.name == name)
    counted = compile_case(case, 90).instructions_per_element
    assert bounds.compiled_slots()[name] == pytest.approx(counted, rel=0.1)


def test_roofs_are_rates_of_this_machine():
    bandwidth, flops = timers.roofs(torch.device("cpu"), torch.float32, quick=True)
    assert 1e8 < bandwidth < 1e13 and 1e8 < flops < 1e15


def test_the_tables_of_packed_layers_know_the_same_gpus() -> None:
    """Where products bound a dense layer, within what each counts large copies to reach."""
    from prunekernels.sparse.tuning import machine

    for name, known in MACHINES.items():
        ridge = machine(f"NVIDIA {name}", (7, 5)).ridge
        assert ridge == pytest.approx(known.flops / known.bandwidth, rel=0.15), name
