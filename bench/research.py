"""Run the research code as it is, from a checkout given by a path; nothing of it is copied here.

Its scripts run in their own process. Its functions are imported from the checkout; where they
expect an older transformers, the model is made to look like one around the call.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.harness import Absent

# Runs a script in its own process and reports its time without the loading of models.
WRAPPER = """
import json, runpy, sys, time
import torch, transformers
loading = 0.0
for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
    def timed(*args, own=kind.from_pretrained, **kwargs):
        global loading
        start = time.perf_counter()
        found = own(*args, **kwargs)
        loading += time.perf_counter() - start
        return found
    kind.from_pretrained = timed
torch.manual_seed(0)
script, report, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
start = time.perf_counter()
runpy.run_path(script, run_name="__main__")
total = time.perf_counter() - start
with open(report, "w") as file:
    json.dump({"seconds": total - loading, "loading": loading}, file)
"""


def find(checkout: Path | None, name: str) -> Path:
    """A file of the checkout by its name or relative path; raises Absent without it."""
    if checkout is None:
        raise Absent("research code: give its checkout with --research PATH")
    found = sorted(checkout.expanduser().resolve().rglob(name))
    if not found:
        raise Absent(f"research code: no {name} below {checkout}")
    return found[0]


def run_script(script: Path, arguments: Sequence[str], log: str) -> tuple[float, str]:
    """Run a script and return its seconds without loading, and the log that it wrote.

    Args:
        script: The script.
        arguments: Its command line.
        log: Name of the log file to return, wherever the script puts it.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "seconds.json"
        subprocess.run(
            [sys.executable, "-c", WRAPPER, str(script), str(report), *arguments],
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        text = next(Path(folder).rglob(log)).read_text(encoding="utf-8")
        return json.loads(report.read_text())["seconds"], text


def module(file: Path, package: str) -> ModuleType:
    """A module of a package, imported without running the package's own `__init__`s.

    Those import everything else that the package can do, and what that needs.
    """
    folder = file.parent
    for name in reversed(_parents(package)):
        stub = ModuleType(name)
        stub.__path__ = [str(folder)]
        sys.modules.setdefault(name, stub)
        folder = folder.parent
    return importlib.import_module(f"{package}.{file.stem}")


def _parents(package: str) -> list[str]:
    parts = package.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


@contextlib.contextmanager
def older_layers(model: Any) -> Iterator[None]:
    """Decoder layers that find their rotary embeddings themselves and return a tuple.

    That is how transformers worked when the research code was written.
    """
    base = model.model
    own = [layer.forward for layer in base.layers]

    def older(forward: Any) -> Any:
        def call(hidden: Any, *, position_ids: Any, **rest: Any) -> tuple[Any]:
            rest["position_embeddings"] = base.rotary_emb(hidden, position_ids)
            return (forward(hidden, position_ids=position_ids, **rest),)

        return call

    try:
        for layer, forward in zip(base.layers, own, strict=True):
            layer.forward = older(forward)
        yield
    finally:
        for layer in base.layers:
            del layer.forward  # the class's own again


def _on(device: torch.device) -> None:
    """Let the research code's `torch.cuda.synchronize()` pass where there is no GPU."""
    if device.type == "cpu":
        torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]


def sparsegpt_class(checkout: Path | None, device: torch.device) -> Any:
    """Its class that prunes one linear layer, given that layer's Hessian."""
    _on(device)
    return module(find(checkout, "lib/sparsegpt.py"), "lib").SparseGPT


def pruning_functions(
    model: Any, tokens: Tensor, checkout: Path | None
) -> dict[str, Callable[[], None]]:
    """Its pruning loops, given what they expect of older transformers.

    Args:
        model: A Llama-like model; pruned in place.
        tokens: (samples, length), what they calibrate on.
        checkout: The research code.
    """
    file = find(checkout, "lib/prune.py")
    _on(tokens.device)
    # imported for its own text, not used here
    if "datasets" not in sys.modules and importlib.util.find_spec("datasets") is None:
        sys.modules["datasets"] = ModuleType("datasets")
        sys.modules["datasets"].load_dataset = None  # type: ignore[attr-defined]
    prune = module(file, "lib")
    samples = [(sample[None], None) for sample in tokens]
    prune.get_loaders = lambda *_, **__: (samples, None)
    model.hf_device_map = {}
    settings = SimpleNamespace(nsamples=len(samples), seed=0, sparsity_ratio=0.5, use_variant=False)
    # its layer calls leave the position embeddings out, which layers no longer compute
    position = torch.arange(tokens.shape[1], device=tokens.device)[None]
    dtype = next(iter(model.parameters())).dtype
    like = torch.zeros(1, 1, dtype=dtype, device=tokens.device)
    embeddings = model.model.rotary_emb(like, position)

    def call(function: Any, n: int, m: int) -> None:
        with contextlib.ExitStack() as stack:
            for layer in model.model.layers:
                handle = layer.register_forward_pre_hook(
                    lambda _, args, kwargs: (args, {"position_embeddings": embeddings, **kwargs}),
                    with_kwargs=True,
                )
                stack.callback(handle.remove)
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(torch.no_grad())
            function(
                *(settings, model, None, tokens.device),
                prune_n=n,
                prune_m=m,
                seqlen=tokens.shape[1],
            )

    return {
        "wanda": lambda: call(prune.prune_wanda, 0, 0),
        "wanda 2:4": lambda: call(prune.prune_wanda, 2, 4),
        "sparsegpt": lambda: call(prune.prune_sparsegpt, 0, 0),
        "sparsegpt 2:4": lambda: call(prune.prune_sparsegpt, 2, 4),
    }
