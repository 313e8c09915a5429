"""Warming up compiles in other processes what Triton would, and proves and runs the calls."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from prunekernels import runtime, warm_up
from prunekernels.launch import calls as launches
from prunekernels.launch import warming
from prunekernels.runtime import Kernel, Op, Problem, interpreting, triton_installed
from small_kernel import gpu, jit_sees, scaled

pytestmark = pytest.mark.skipif(
    not triton_installed() or interpreting(), reason="compiles kernels with Triton"
)
__all__ = ["gpu"]


@pytest.mark.parametrize("aligned", [True, False])
def test_another_process_compiles_what_triton_would(aligned: bool) -> None:
    call = scaled(torch.ones(17)[0 if aligned else 1 :][:16], torch.ones(32)[::2], wide=7)
    call.options = {"maxnreg": 64}
    mine, seen = warming.compilation_of(call, 90), jit_sees(call)
    assert mine.signature == seen["signature"] and mine.constants == seen["constants"]
    # the cache is looked up by their text
    assert str(mine.attributes) == str(seen["configs"][0])
    options = json.loads(seen["specialization_data"])["options"]
    assert json.loads(json.dumps(mine.options)) == options and options["maxnreg"] == 64


def test_workers_fill_the_cache_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekernels.launch import meta
    from prunekernels.sparse.two_four import portable
    from prunekernels.sparse.two_four.layout import packed_shape

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wanted = []
    for dtype in (torch.bfloat16, torch.float32):
        packed = meta(packed_shape(64, 64, dtype), torch.int32)
        call = portable.expansion(packed, meta((64, 64), dtype))
        wanted.append(warming.compilation_of(call, 90))
    told: list[tuple[int, int]] = []
    warming.compile_apart(wanted, 1, lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    found = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert len(found) == 2
    for compilation in wanted:
        assert compilation.run().asm["cubin"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == found


def test_a_call_is_recorded_compiled_and_run(
    gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(warming, "on", launches.on)
    monkeypatch.setattr(warming, "compile_apart", lambda wanted, *_: sent.extend(wanted))
    x, y = torch.ones(16), torch.ones(16)
    compiled_when_sent = []

    def call() -> None:
        compiled_when_sent.append(gpu.compiled)
        scaled(x, y).run()

    assert warm_up([call, call, lambda: scaled(x.half(), y).run()]) == 2
    assert [each.name for each in sent] == ["scaled_kernel", "scaled_kernel"]
    assert compiled_when_sent == [0, 0, 0, 1] and gpu.compiled == 2
    # all that is needed is there now, even inside a capture
    gpu.capturing = True
    scaled(x, y).run()
    assert warm_up([lambda: scaled(x, y).run()]) == 0


def test_what_is_recorded_is_chosen_untested_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_gpu import fake_gpu

    state = fake_gpu(monkeypatch, runtime.ops()["sparse24_linear"])
    device = torch.device("cuda", 0)
    with launches.record():
        assert state.select(1).name == "mma_sp"
        assert runtime.recording.untested == [(state.op.kernels["mma_sp"], device)]
    assert state.runs == 0 and runtime.recording.untested is None
    state.problem = "wrong"
    with pytest.warns(RuntimeWarning, match="failed its self-test"):
        assert state.select(1).name != "mma_sp"


def test_launches_of_self_tests_are_compiled_too(
    gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, sent = torch.ones(16), torch.ones(16), []
    module = types.SimpleNamespace(
        CAPABILITIES=((9, 0),), self_test=lambda device: scaled(x.half(), y).run()
    )
    op = Op("fake", {"cores": Kernel("nowhere", "run", tensor_cores=True)})
    monkeypatch.setattr(Kernel, "load", lambda self: module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in (("is_available", True), ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: launches.on(x))
    monkeypatch.setattr(warming, "on", launches.on)
    monkeypatch.setattr(warming, "compile_apart", lambda wanted, *_: sent.extend(wanted))

    def call() -> None:
        assert op.select(Problem(torch.device("cuda", 0), torch.bfloat16)).name == "cores"
        scaled(x, y).run()

    assert warm_up([call]) == 2
    assert sorted(each.signature["x_ptr"] for each in sent) == ["*fp16", "*fp32"]
    assert op.tested == {("cores", 0): None}


def test_without_a_gpu_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert warm_up([lambda: pytest.fail("called")]) == 0
