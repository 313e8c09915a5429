"""The table of where each Hugging Face architecture keeps its parts; no other place knows.

A decoder layer is read as two residual sublayers,

    x ← x + post_norm(attn(norm(x)))        "attn"
    x ← x + post_norm(mlp(norm(x)))         "mlp"

(in parallel from the same x where the architecture says so). `LAYOUTS` names their modules and
matrices, one row per architecture; `architectures.py` sees a model through its row, and no other
module of prunekit names one. Supporting another architecture means one more row;
`tests/prunekit/models/test_architectures.py` then checks that the parts add up to the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prunekit.errors import PrunekitError

SUBLAYERS = ("attn", "mlp")
MODEL_TYPE_PREFIX = "prunekit_"


@dataclass(frozen=True)
class Branch:
    """Where one residual sublayer lives in its decoder layer (attribute names).

    Attributes:
        norm: The norm before it.
        modules: What computes it, applied in this order.
        writes: The matrices that write into the residual stream, those of every kind of layer that
            the architecture has; set to zero, they silence the sublayer.
        post_norm: The norm of its output, or None.
    """

    norm: str
    modules: tuple[str, ...]
    writes: tuple[str, ...]
    post_norm: str | None = None


@dataclass(frozen=True)
class GatedMLP:
    """Names inside a module that computes down(activation(gate(x)) · up(x))."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"


@dataclass(frozen=True)
class FusedExperts:
    """Names inside a module that holds all experts in (experts, out, in) parameters.

    It is called as module(hidden (tokens, hidden), top_k_index (tokens, k), top_k_weights) and
    computes down(activation(gate) · up) per routed token; `gate_up` holds both, gate first.
    """

    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"


@dataclass(frozen=True)
class Layout:
    """Where the parts of one architecture live (dotted names from the causal language model).

    Attributes:
        base: The model without its head.
        layers: The list of decoder layers.
        final_norm: The norm before the head.
        attn: The attention sublayer.
        mlp: The MLP sublayer.
        projections: Matrices of the attention that read the same input, in the order in which
            they are called; empty where one matrix does it all.
        gated_mlp: The parts of its gated MLPs, or None where gate and up are one matrix or there
            is no gate.
        experts: The parameters of its experts, or None.
    """

    base: str
    layers: str
    final_norm: str
    attn: Branch
    mlp: Branch
    projections: tuple[str, ...] = ()
    gated_mlp: GatedMLP | None = None
    experts: FusedExperts | None = None

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Groups of matrices, by their names in one module, that read the same input."""
        gated = self.gated_mlp
        groups = (self.projections, () if gated is None else (gated.gate, gated.up))
        return tuple(group for group in groups if group)


_QKV = ("q_proj", "k_proj", "v_proj")


def _llama_like(*, post_norms: bool = False, experts: bool = False, joint: bool = False) -> Layout:
    """The layout of Llama and its relatives.

    Args:
        post_norms: Each sublayer's output has a norm too (Gemma).
        experts: The MLP is a mixture of experts, in some or all layers.
        joint: q, k and v are one matrix, gate and up another (Phi-3).
    """
    of_experts = ("mlp.experts.down_proj", "mlp.shared_expert.down_proj") if experts else ()
    down = (*of_experts, "mlp.down_proj")
    output = ("self_attn.o_proj",)
    if post_norms:
        attn = Branch("input_layernorm", ("self_attn",), output, "post_attention_layernorm")
        mlp = Branch("pre_feedforward_layernorm", ("mlp",), down, "post_feedforward_layernorm")
    else:
        attn = Branch("input_layernorm", ("self_attn",), output)
        mlp = Branch("post_attention_layernorm", ("mlp",), down)
    return Layout(
        "model",
        "model.layers",
        "model.norm",
        attn,
        mlp,
        projections=() if joint else _QKV,
        gated_mlp=None if joint else GatedMLP(),
        experts=FusedExperts() if experts else None,
    )


LAYOUTS: dict[str, Layout] = {
    **{name: _llama_like() for name in ("llama", "mistral", "qwen2", "qwen3")},
    "phi3": _llama_like(joint=True),
    **{name: _llama_like(post_norms=True) for name in ("gemma2", "gemma3_text")},
    **{name: _llama_like(experts=True) for name in ("mixtral", "qwen2_moe", "qwen3_moe")},
    "opt": Layout(
        "model",
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        Branch("self_attn_layer_norm", ("self_attn",), ("self_attn.out_proj",)),
        Branch("final_layer_norm", ("fc1", "activation_fn", "fc2"), ("fc2",)),
        projections=_QKV,
    ),
    "gpt2": Layout(
        "transformer",
        "transformer.h",
        "transformer.ln_f",
        Branch("ln_1", ("attn",), ("attn.c_proj",)),
        Branch("ln_2", ("mlp",), ("mlp.c_proj",)),
    ),
    "gpt_neox": Layout(
        "gpt_neox",
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        Branch("input_layernorm", ("attention",), ("attention.dense",)),
        Branch("post_attention_layernorm", ("mlp",), ("mlp.dense_4h_to_h",)),
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
            f"norms, attention and MLP live); add a row to prunekit/models/layouts.py or use one "
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


def moved_pattern(config: PretrainedConfig) -> str | None:
    """What readers that know an architecture's pattern of attentions by heart would get wrong.

    Args:
        config: A configuration whose `layer_types` was sliced.

    Returns:
        A sentence, or None where the layers have the types that the architecture gives so many.
    """
    held = getattr(config, "layer_types", None)
    if held is None:
        return None
    plain = {name: value for name, value in config.to_dict().items() if name != "layer_types"}
    name = base_model_type(config)
    usual = CONFIG_MAPPING[name].from_dict({**plain, "model_type": name}).layer_types
    if held == usual:
        return None
    short = " ".join(str(kind).partition("_")[0] for kind in held)
    return (
        f"the kept layers' attentions are {short}, which is not {name}'s own pattern: transformers "
        "and vLLM read it from layer_types in config.json, but a reader that has the pattern built "
        "in, such as llama.cpp, computes something else without an error; drop whole periods of "
        "the pattern, or sublayers, to keep it"
    )


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
