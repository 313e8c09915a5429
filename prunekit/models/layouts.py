"""Where each Hugging Face architecture keeps its parts: the only place in prunekit that knows.

A decoder layer is read as two residual sublayers,

    x ← x + post_norm(attn(norm(x)))        "attn"
    x ← x + post_norm(mlp(norm(x)))         "mlp"

(in parallel from the same x where the architecture says so). `LAYOUTS` names their modules, one row
per architecture; `architectures.py` sees a model through its row. Supporting another architecture
means one more row; `tests/prunekit/test_architectures.py` then checks that the parts add up to the
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from prunekit.errors import PrunekitError

SUBLAYERS = ("attn", "mlp")
MODEL_TYPE_PREFIX = "prunekit_"


@dataclass(frozen=True)
class Branch:
    """Where one residual sublayer lives in its decoder layer (attribute names)."""

    norm: str
    modules: tuple[str, ...]  # applied in this order
    post_norm: str | None = None


@dataclass(frozen=True)
class Layout:
    """Where the parts of one architecture live (dotted names from the causal language model)."""

    base: str
    layers: str
    final_norm: str
    attn: Branch
    mlp: Branch
    last_projections: tuple[str, str]  # the matrices that write attn and mlp into the residual


def _llama_like(post_norms: bool = False, moe: bool = False) -> Layout:
    if post_norms:
        attn = Branch("input_layernorm", ("self_attn",), "post_attention_layernorm")
        mlp = Branch("pre_feedforward_layernorm", ("mlp",), "post_feedforward_layernorm")
    else:
        attn = Branch("input_layernorm", ("self_attn",))
        mlp = Branch("post_attention_layernorm", ("mlp",))
    down = "mlp.experts.down_proj" if moe else "mlp.down_proj"
    return Layout("model", "model.layers", "model.norm", attn, mlp, ("self_attn.o_proj", down))


LAYOUTS: dict[str, Layout] = {
    **{name: _llama_like() for name in ("llama", "mistral", "qwen2", "qwen3", "phi3")},
    **{name: _llama_like(post_norms=True) for name in ("gemma2", "gemma3_text")},
    **{name: _llama_like(moe=True) for name in ("mixtral", "qwen2_moe", "qwen3_moe")},
    "opt": Layout(
        "model",
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        Branch("self_attn_layer_norm", ("self_attn",)),
        Branch("final_layer_norm", ("fc1", "activation_fn", "fc2")),
        ("self_attn.out_proj", "fc2"),
    ),
    "gpt2": Layout(
        "transformer",
        "transformer.h",
        "transformer.ln_f",
        Branch("ln_1", ("attn",)),
        Branch("ln_2", ("mlp",)),
        ("attn.c_proj", "mlp.c_proj"),
    ),
    "gpt_neox": Layout(
        "gpt_neox",
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        Branch("input_layernorm", ("attention",)),
        Branch("post_attention_layernorm", ("mlp",)),
        ("attention.dense", "mlp.dense_4h_to_h"),
    ),
}
SUPPORTED = tuple(sorted(LAYOUTS))


def base_model_type(config: PretrainedConfig) -> str:
    """The stock `model_type` behind `config`: "llama" for both llama and prunekit_llama."""
    return str(config.model_type).removeprefix(MODEL_TYPE_PREFIX)


def check_supported(config: PretrainedConfig) -> None:
    """Raise a PrunekitError unless `config` is of a supported architecture and variant."""
    name = base_model_type(config)
    if name not in LAYOUTS:
        raise PrunekitError(
            f"architecture '{name}' is not supported: prunekit lacks its layout (where layers, "
            f"norms, attention and MLP live); add a row to prunekit/layouts.py or use one "
            f"of {', '.join(SUPPORTED)}"
        )
    if name == "opt" and (
        not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size
    ):
        raise PrunekitError(
            "this OPT variant (post-norm, as facebook/opt-350m) is not supported: its sublayers do "
            "not add to a residual stream; use another OPT size"
        )
    if getattr(config, "add_cross_attention", False):
        raise PrunekitError("models with cross-attention are not supported: use a decoder-only one")


def slice_config_(config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Rewrite per-layer settings of `config` for the layers `kept` (old indices, ascending)."""
    total = config.num_hidden_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    if hasattr(config, "mlp_only_layers"):  # Qwen-MoE: which layers have a dense MLP
        step, listed = config.decoder_sparse_step, set(config.mlp_only_layers or [])
        dense = {i for i in range(total) if i in listed or (i + 1) % step or not config.num_experts}
        config.mlp_only_layers = [new for new, old in enumerate(kept) if old in dense]
        config.decoder_sparse_step = 1
    if hasattr(config, "max_window_layers"):  # Qwen: superseded by the explicit layer_types
        config.max_window_layers = min(config.max_window_layers, len(kept))
    for field in ("drop_attn_list", "drop_mlp_list"):
        if hasattr(config, field):
            dropped = set(getattr(config, field))
            setattr(config, field, [new for new, old in enumerate(kept) if old in dropped])
    config.num_hidden_layers = len(kept)
