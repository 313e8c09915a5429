"""Scores for dropping and the comparison of generations, against the research code.

    python -m bench.bench_research --research PATH

Without --research ours is measured alone and the research code is a row that says absent. Sizes
are for minutes on a CPU; results go to results/<device>/research.csv. The layerwise analysis has
its own benchmark (bench_layerwise), pruning too (bench_prune), the function that compares
one step is in bench_metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import itertools
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import research
from bench.harness import Case, Contender, Prepared, Session, Verdict, add_options
from prunekit import checkpoint
from prunekit.analysis.decoding import decode
from prunekit.data.calibration import batches
from prunekit.models.architectures import Architecture
from prunekit.pruning import Magnitude, prune_
from prunekit.pruning.cosines import mean_cosines
from prunekit.speed import decoding as speed

#: The one prompt that is written into the research script.
PROMPT = (
    "John has twice as many books as Mary. Together they have 18 books. "
    "How many books does John have?"
)
SUBLAYERS = ("attn", "mlp")


@torch.no_grad()
def exact_scores(model: Any, tokens: Tensor) -> Tensor:
    """(2, layers) mean cosines of a residual stream before and after each sublayer, by hooks."""
    states: list[Tensor] = []  # in turn: before attention, before the MLP
    handles = [
        norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].double()))
        for layer in model.model.layers
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    handles.append(
        model.model.norm.register_forward_pre_hook(lambda _, i: states.append(i[0].double()))
    )
    sums = torch.zeros(2 * len(model.model.layers), dtype=torch.float64)
    for row in tokens:
        states.clear()
        model(input_ids=row[None], use_cache=False)
        pairs = itertools.pairwise(states)
        sums += torch.stack([F.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]).cpu()
    for handle in handles:
        handle.remove()
    return (sums / len(tokens)).view(-1, 2).t()


def our_scores(model: Any, tokens: Tensor) -> Tensor:
    """Both sublayers' scores in one pass."""
    arch = Architecture(model)
    found = mean_cosines(arch, batches(tokens, 8, tokens.device), SUBLAYERS, progress=False)
    layers = range(len(arch.layers))
    return torch.tensor([[found[name, layer] for layer in layers] for name in SUBLAYERS])


def research_scores(model: Any, tokens: Tensor, checkout: Path | None) -> Tensor:
    """The same from the research code: a pass per kind of sublayer, one sequence at a time."""
    file = research.find(checkout, "layer_drop.py")
    layer_drop = research.module(file, "llmtuner.compression.prune")
    from accelerate import Accelerator

    cached = model.config.use_cache
    loader = [{"input_ids": row[None].to(model.device)} for row in tokens]
    with contextlib.ExitStack() as quiet:
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))  # its progress bars
        quiet.enter_context(research.older_layers(model))
        rows = [
            layer_drop.get_layer_similarities(
                model, loader, Accelerator(cpu=model.device.type == "cpu"), len(loader), True, name
            )
            for name in SUBLAYERS
        ]
    model.config.use_cache = cached
    return torch.stack(rows)


def scores(model: Any, case: Case, checkout: Path | None) -> list[Contender]:
    """Scores of every attention and MLP."""
    sequences, length = int(case.sizes["sequences"]), int(case.sizes["length"])
    tokens = speed.random_prompts(model, sequences, length)
    exact = exact_scores(model, tokens)

    def check(found: Tensor) -> Verdict:
        error = float((found.double().cpu() - exact).abs().max())
        return Verdict(error < 1e-4, f"largest error {error:.1e}")

    def prepare(run: Any) -> Prepared:
        return Prepared([run], check, items=sequences * length, graph=False)

    ours = functools.partial(our_scores, model, tokens)
    theirs = functools.partial(research_scores, model, tokens, checkout)
    return [
        Contender("prunekit", functools.partial(prepare, ours)),
        Contender("research code", functools.partial(prepare, theirs)),
    ]


def generations(model: Any, tokenizer: Any, case: Case, checkout: Path | None) -> list[Contender]:
    """Two models' greedy texts from one prompt, compared at every step."""
    length = int(case.sizes["length"])
    steps = length - len(tokenizer(PROMPT)["input_ids"])
    pruned = copy.deepcopy(model)
    prune_(pruned, Magnitude(pattern="2:4"))
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]], device=model.device)
    with torch.no_grad():
        log_p, log_q = (m(ids).logits[0, -1].double().log_softmax(-1) for m in (model, pruned))
    first = float((log_p.exp() * (log_p - log_q)).sum())

    def check(found: float) -> Verdict:
        error = abs(found - first) / first
        return Verdict(error < 1e-3, f"KL of the first step {found:.6f}, float64 {first:.6f}")

    def ours() -> float:
        done = decode(
            model, pruned, tokenizer, [PROMPT], max_new_tokens=steps, level="core", chat="never"
        )
        return float(done.teacher_forced["kl_dense_pruned"][0, 0])

    def prepare_ours() -> Prepared:
        return Prepared([ours], check, items=steps, graph=False)

    def prepare_theirs() -> Prepared:
        script = research.find(checkout, "compare_generation_metrics.py")
        folder = tempfile.TemporaryDirectory()  # lives as long as the sampler below
        dense, other = Path(folder.name) / "dense", Path(folder.name) / "pruned"
        checkpoint.save(model, tokenizer, dense)
        checkpoint.save(pruned, tokenizer, other)
        words = ["--analysis_mode", "pruned", "--model_name", str(dense)]
        words += ["--pruned_model_name", str(other), "--max_length", str(length)]
        words += ["--temperature", "0.0"]
        seen: list[tuple[float, str]] = []

        def sample() -> float:
            assert folder.name
            seen.append(research.run_script(script, words, "log_pruned_drop8-final.txt"))
            return seen[-1][0]

        def probe() -> float:
            sample()
            found = re.search(r"kl_divergence_flat: \[([^,\]]+)", seen[-1][1])
            return float(found[1]) if found else float("nan")

        return Prepared([sample], check, probe=probe, sampler=(sample, "subprocess"), items=steps)

    return [
        Contender("prunekit", prepare_ours),
        Contender("research code", prepare_theirs),
    ]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--model", default="demo", help="what prunekit.load takes (Llama-like)")
    options = parser.parse_args()
    session = Session.begin(options, "research.csv")
    session.rounds = options.rounds or (1 if session.quick else 3)
    model, tokenizer = checkpoint.load(options.model, device=options.device)
    # texts of a set length: neither side may stop early
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    dtype = str(model.dtype).removeprefix("torch.")
    sizes = {"sequences": 2 if session.quick else 8, "length": 64 if session.quick else 256}
    drop = Case("drop_scores", "attn+mlp", dtype, sizes)
    pair = Case("generation", "pruned", dtype, {"length": 34 if session.quick else 60})
    return session.run(
        [
            (drop, functools.partial(scores, model, drop, options.research)),
            (pair, functools.partial(generations, model, tokenizer, pair, options.research)),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
