"""Whole models, end to end: prefill and decode with a real KV cache, dense and pruned.

    python -m bench.bench_model            the embedded model; on a GPU the shapes of Llama-3-8B
                                           and of SmolLM2-135M instead
    python -m bench.bench_model --quick    one small case each

Random weights in real shapes take as long as trained ones. "dynamic" grows the cache, "static"
has one of fixed size, "graph" replays each decoding step as one CUDA graph. Every variant's
cached logits are compared with uncached ones before it is timed. Results go to
results/<device>/model.csv; `items_s` is tokens per second, `held_mb` the weights as saved.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bench import bounds
from bench.harness import Absent, Case, Contender, Prepared, Session, Verdict, add_options
from prunekit import checkpoint
from prunekit.commands.measures import cache_size
from prunekit.errors import PrunekitError
from prunekit.packed.sizes import weight_bytes
from prunekit.speed import decoding as speed
from prunekit.speed.variants import USUAL, VARIANTS, Variant, build

#: Shapes of well-known models: what decides their speed.
SHAPES = {
    "Llama-3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "Llama-3.2-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "SmolLM2-135M": {  # the embedded model's
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


def load(name: str, device: torch.device, dtype: torch.dtype, **changes: int) -> PreTrainedModel:
    """A model by name: one of `SHAPES` with random weights, or what `prunekit.load` takes.

    Args:
        name: Of the model.
        device: Where to.
        dtype: Of the weights.
        changes: Sizes of a shape to replace, such as its number of layers.
    """
    if name not in SHAPES:
        return checkpoint.load(name, dtype=dtype, device=device)[0]
    config = LlamaConfig(max_position_embeddings=8192, **SHAPES[name] | changes)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class Models:
    """The variants of one model at a time, built when first asked for."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._name = ""
        self._built: dict[str, Variant | PrunekitError] = {}

    def variant(self, model: str, name: str) -> Variant:
        """A variant of a model; raises Absent where it cannot be had."""
        if self._name != model:
            self._built.clear()
            self._name = model
        if name not in self._built:
            try:
                if "dense" not in self._built:
                    self._built["dense"] = build(load(model, self.device, self.dtype), "dense")
                dense = self._built["dense"]
                if isinstance(dense, Variant):
                    self._built[name] = build(dense.model, name)
            except PrunekitError as error:
                self._built[name] = error
        found = self._built.get(name, self._built["dense"])
        if isinstance(found, PrunekitError):
            raise Absent(str(found))
        return found


def prepare(models: Models, case: Case, name: str) -> Prepared:
    """One variant, reading or writing."""
    model_name, cache = case.mode.split()
    batch, prompt, new = (int(case.sizes[size]) for size in ("batch", "prompt", "new"))
    if cache == "graph" and models.device.type != "cuda":
        raise Absent("a CUDA graph needs an NVIDIA GPU")
    variant = models.variant(model_name, name)
    model = variant.model
    ids = speed.random_prompts(model, batch, prompt)
    continuation = speed.Continuation(model, ids, new, cache)
    held = weight_bytes(model)
    parameters = sum(p.numel() for p in model.parameters())
    cached = cache_size(model).bytes_per_token * batch * prompt

    def check(cached: float) -> Verdict:
        worst = max(cached, variant.difference)
        text = f"{variant.what}; cached logits off by {cached:.1e} sd"
        if variant.difference:
            text += f", packed by {variant.difference:.1e} sd"
        return Verdict(worst < speed.TOLERANCE, text)

    if case.op == "prefill":
        sampler, items = continuation.prefill, batch * prompt
        cost = [bounds.Cost(held + cached, 2.0 * parameters * items)]
    else:
        sampler, items = continuation.decode, batch
        cost = bounds.decode_step(held, cached, parameters, batch)
    return Prepared(
        [sampler],
        check,
        cost,
        held,
        probe=lambda: speed.check_cached(model, ids[: min(batch, 2), :32], cache),
        sampler=(sampler, "host"),
        items=items,
    )


def plan(session: Session, options: argparse.Namespace) -> list[Case]:
    """Every model, cache and batch; reading once per batch, with the cache that grows."""
    on_gpu = session.device.type == "cuda"
    names = options.model or (["Llama-3-8B", "SmolLM2-135M"] if on_gpu else ["demo"])
    batches = options.batch or ((1, 4, 16, 64) if on_gpu else (1,))
    prompt, new = (512, 32) if on_gpu else (64, 4)  # packed weights crawl on a CPU
    if session.quick:
        names = options.model or ["tiny"]
        batches, prompt, new = batches[:2], 64, 8
    dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    cases = []
    for name in names:
        for batch in batches:
            sizes = {"batch": batch, "prompt": prompt, "new": new}
            cases.append(Case("prefill", f"{name} dynamic", dtype, sizes))
            for cache in speed.CACHES if on_gpu else ("dynamic",):
                cases.append(Case("decode", f"{name} {cache}", dtype, sizes))
    return cases


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--model", nargs="*", help=f"{', '.join(SHAPES)}, demo, a folder, a Hub id")
    parser.add_argument("--batch", nargs="*", type=int)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=USUAL)
    parser.add_argument("--dtype", help="bfloat16 on a GPU, float32 on a CPU")
    options = parser.parse_args()
    session = Session.begin(options, "model.csv")
    if options.rounds is None:
        session.rounds = 5 if session.device.type == "cuda" and not session.quick else 3
    torch.manual_seed(0)
    cases = plan(session, options)
    models = Models(session.device, getattr(torch, cases[0].dtype))

    def make(case: Case) -> list[Contender]:
        return [
            Contender(name, functools.partial(prepare, models, case, name))
            for name in options.variants
        ]

    work: list[tuple[Case, Callable[[], list[Contender]]]] = [
        (case, functools.partial(make, case)) for case in cases
    ]
    return session.run(work)


if __name__ == "__main__":
    sys.exit(main())
