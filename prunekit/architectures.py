"""How each Hugging Face architecture is laid out: the only place in prunekit that knows.

A decoder layer is read as two residual sublayers,

    x ← x + post_norm(attn(norm(x)))        "attn"
    x ← x + post_norm(mlp(norm(x)))         "mlp"

(in parallel from the same x where the architecture says so). Everything else in prunekit asks an
`Architecture` for layers, sublayer contributions, prunable weights and the output head, and never
names a module of transformers itself. Supporting another architecture means one more row in
`_LAYOUTS`; `tests/prunekit/test_architectures.py` then checks that the parts add up to the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from prunekit.errors import PrunekitError
from prunekit.packed import MergedPart, PackedLinear, own_layer

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


_LAYOUTS: dict[str, Layout] = {
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
SUPPORTED = tuple(sorted(_LAYOUTS))

# Projections of one module that read the same input: one set of statistics serves them all.
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# The class differs between transformers versions.
_SILU = (nn.SiLU, type(ACT2FN["silu"]))


class Absent(nn.Module):
    """Stands where a dropped sublayer was: contributes a 0-dimensional zero to the residual.

    The stock decoder layer's own forward stays in charge, so signatures and residual wiring are
    always the installed transformers version's. Adding a broadcast scalar zero is all that remains.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return a 0-dimensional zero of `hidden_states`' dtype and device."""
        return hidden_states.new_zeros(())


class AbsentAttention(Absent):
    """An `Absent` with an attention's return convention (output, weights).

    When a model has no attention left at all, the first of these keeps the cache's length (one
    number per token), because learned position embeddings are looked up from it.
    """

    def __init__(self, counts_tokens: bool = False) -> None:
        super().__init__()
        self.counts_tokens = counts_tokens

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Return (0-dimensional zero, None)."""
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if self.counts_tokens and cache is not None:
            marker = hidden_states[:, None, :, :1]  # (batch, 1 head, tokens, 1)
            cache.update(marker, marker, 0)
        return super().forward(hidden_states), None


@dataclass(frozen=True)
class WeightRef:
    """One prunable matrix of a model, seen as (out_features, in_features) however it is stored.

    Attributes:
        name: Dotted name from the model, `…experts.gate_up_proj.3` for expert 3 of a fused tensor.
        layer: Index of its decoder layer.
        sublayer: "attn" or "mlp".
        module: The module that holds it: its input is the matrix's input, except for experts.
        parameter: Name of the parameter in `module`.
        expert: Index into a fused (experts, out, in) tensor, or None.
        input_group: Matrices with the same value read the same input.
    """

    name: str
    layer: int
    sublayer: str
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None
    input_group: str = ""

    @property
    def matrix(self) -> Tensor:
        """A view (out_features, in_features) of the stored weight; writes go through to it.

        Raises:
            PrunekitError: The weight is packed.
        """
        if own_layer(self.module) is not None:
            raise PrunekitError(
                f"{self.name} is packed: make the model dense first (unswap_, or prunekit swap "
                "--format dense)"
            )
        stored: Tensor = getattr(self.module, self.parameter).data
        if self.expert is not None:
            return stored[self.expert]
        return stored.t() if isinstance(self.module, Conv1D) else stored

    def read(self) -> Tensor:
        """The values (out_features, in_features), to read only: unpacked if they are packed."""
        packed = own_layer(self.module)
        return self.matrix if packed is None else packed.weight.to_dense()


@dataclass(frozen=True)
class Head:
    """The map from a final hidden state to logits: softcap(scale · (h Wᵀ + bias)).

    Attributes:
        weight: (vocabulary, hidden).
        bias: (vocabulary,) or None.
        softcap: c in c·tanh(logit / c), or None.
        logit_scale: Factor on the logits, or None.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (…, vocabulary) of normed hidden states (…, hidden), in their dtype."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def base_model_type(config: PretrainedConfig) -> str:
    """The stock `model_type` behind `config`: "llama" for both llama and prunekit_llama."""
    return str(config.model_type).removeprefix(MODEL_TYPE_PREFIX)


class Architecture:
    """A causal language model seen through its layout.

    Args:
        model: A transformers causal language model of a supported architecture, dense or dropped.

    Raises:
        PrunekitError: The architecture, or this variant of it, is not supported; the message
            lists what is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_supported(model.config)
        self.model = model
        self.layout = _LAYOUTS[base_model_type(model.config)]

    def _part(self, dotted: str) -> nn.Module:
        return self.model.get_submodule(dotted)

    @property
    def base(self) -> nn.Module:
        """The model without its head: token ids to final normed hidden states."""
        return self._part(self.layout.base)

    @property
    def decoder(self) -> nn.Module:
        """The module that runs the decoder layers and makes their cache (mostly `base` itself)."""
        return self._part(self.layout.layers.rpartition(".")[0])

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        layers = self._part(self.layout.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def original_layers(self) -> list[int]:
        """Each layer's index in the model before blocks were dropped from it."""
        kept = getattr(self.model.config, "prunekit_kept_blocks", None)
        return list(range(len(self.layers))) if kept is None else list(kept)

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a layer both read the layer's input (GPT-NeoX)."""
        return bool(getattr(self.model.config, "use_parallel_residual", False))

    @property
    def context_length(self) -> int:
        """Longest sequence the configuration admits, in tokens."""
        return int(self.model.config.max_position_embeddings)

    @property
    def head(self) -> Head:
        """The output head."""
        module = self.model.get_output_embeddings()
        config = self.model.config
        return Head(
            module.weight.detach(),
            None if getattr(module, "bias", None) is None else module.bias.detach(),
            getattr(config, "final_logit_softcapping", None),
            getattr(config, "logit_scale", None),
        )

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The model's own norm before its head, on hidden states (…, hidden)."""
        normed: Tensor = self._part(self.layout.final_norm)(hidden)
        return normed

    def branch(self, sublayer: str) -> Branch:
        """Attribute names of the "attn" or "mlp" sublayer."""
        return self.layout.attn if sublayer == "attn" else self.layout.mlp

    def attentions(self) -> list[nn.Module | None]:
        """Each layer's attention module, None where it was dropped."""
        name = self.layout.attn.modules[0]
        found = [getattr(layer, name) for layer in self.layers]
        return [None if isinstance(module, Absent) else module for module in found]

    def is_dropped(self, index: int, sublayer: str) -> bool:
        """Whether that sublayer of layer `index` is absent."""
        first = getattr(self.layers[index], self.branch(sublayer).modules[0])
        return isinstance(first, Absent)

    def contribution(
        self, index: int, sublayer: str, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """What a sublayer adds to the residual stream, post-norm included.

        Args:
            index: Layer.
            sublayer: "attn" or "mlp".
            hidden: (batch, tokens, hidden): what enters the sublayer, before its norm.
            kwargs: The keyword arguments its layer was called with (masks, position embeddings).

        Returns:
            (batch, tokens, hidden), exactly zero for a dropped sublayer.
        """
        layer, branch = self.layers[index], self.branch(sublayer)
        if self.is_dropped(index, sublayer):
            return torch.zeros_like(hidden)
        out = getattr(layer, branch.norm)(hidden)
        if sublayer == "attn":
            out = getattr(layer, branch.modules[0])(out, **kwargs)[0]
        else:
            for name in branch.modules:
                out = getattr(layer, name)(out)
        if branch.post_norm is not None:
            out = getattr(layer, branch.post_norm)(out)
        contribution: Tensor = out
        return contribution

    def weights(self, index: int) -> Iterator[WeightRef]:
        """The prunable matrices of layer `index`: its linear layers, Conv1Ds and experts."""
        layer, prefix = self.layers[index], f"{self.layout.layers}.{index}"
        for sublayer in SUBLAYERS:
            for name in self.branch(sublayer).modules:
                root = getattr(layer, name)
                for path, module in root.named_modules(prefix=f"{prefix}.{name}"):
                    yield from _module_weights(path, module, index, sublayer)

    def shared_projections(self, index: int) -> Iterator[list[str]]:
        """Names of the attention projections of layer `index` that read one input, as called."""
        yield from self._holders(index, self.layout.attn, _SHARED_INPUTS[0])

    def silu_mlps(self, index: int) -> Iterator[str]:
        """Names of the modules of layer `index` that compute down(SiLU(gate(x))·up(x))."""
        parts = (*_SHARED_INPUTS[1], "down_proj", "act_fn")
        for gate, *_ in self._holders(index, self.layout.mlp, parts):
            path = gate.rpartition(".")[0]
            if isinstance(self._part(f"{path}.act_fn"), _SILU):
                yield path

    def _holders(self, index: int, branch: Branch, names: Sequence[str]) -> Iterator[list[str]]:
        """For each module of a sublayer that has all submodules `names`: their dotted names."""
        layer = f"{self.layout.layers}.{index}"
        for root in branch.modules:
            for path, module in self._part(f"{layer}.{root}").named_modules(
                prefix=f"{layer}.{root}"
            ):
                if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
                    yield [f"{path}.{name}" for name in names]

    def last_projection(self, index: int, sublayer: str) -> list[Tensor]:
        """The parameters that, set to zero, silence a sublayer: its last matrix and bias."""
        path = self.layout.last_projections[SUBLAYERS.index(sublayer)]
        layer = self.layers[index]
        if path.startswith("mlp.experts") and not hasattr(layer.mlp, "experts"):
            path = "mlp.down_proj"  # Qwen-MoE keeps some layers dense
        owner_path, _, last = path.rpartition(".")
        owner = layer.get_submodule(owner_path)
        found = getattr(owner, last)
        silenced = [found] if isinstance(found, nn.Parameter) else list(found.parameters())
        if path.startswith("mlp.experts") and hasattr(layer.mlp, "shared_expert"):
            silenced += list(layer.get_submodule("mlp.shared_expert.down_proj").parameters())
        return [parameter.data for parameter in silenced]

    def remove_(self, index: int, sublayer: str) -> None:
        """Take a sublayer out of the model: its modules, norms and parameters are gone."""
        layer, branch = self.layers[index], self.branch(sublayer)
        setattr(layer, branch.norm, nn.Identity())
        if branch.post_norm is not None:
            setattr(layer, branch.post_norm, nn.Identity())
        first, *rest = branch.modules
        setattr(layer, first, AbsentAttention() if sublayer == "attn" else Absent())
        for name in rest:
            setattr(layer, name, nn.Identity())

    def renumber_cache_(self) -> None:
        """Number the kept attentions 0, 1, 2, …: cache entries are then compact.

        transformers reads the cached length from entry 0, so a hole there breaks decoding.
        """
        kept = [module for module in self.attentions() if module is not None]
        for cache_index, module in enumerate(kept):
            module.layer_idx = cache_index  # type: ignore[assignment]
        name = self.layout.attn.modules[0]
        for index, layer in enumerate(self.layers):
            if hasattr(layer, "layer_idx"):
                layer.layer_idx = index  # type: ignore[assignment]
            absent = getattr(layer, name)
            if isinstance(absent, AbsentAttention):
                absent.counts_tokens = not kept and index == 0

    def remove_blocks_(self, indices: Iterable[int]) -> None:
        """Take whole decoder layers out and slice the configuration, so that it stays plain.

        Raises:
            PrunekitError: A layer's computation depends on its index in a way that the stock
                configuration can't express after renumbering.
        """
        if getattr(self.model.config, "scale_attn_by_inverse_layer_idx", False):
            raise PrunekitError(
                "blocks can't be dropped from a GPT-2 with scale_attn_by_inverse_layer_idx (their "
                "renumbering changes its attention); drop attn or mlp sublayers instead"
            )
        gone = set(indices)
        kept = [index for index in range(len(self.layers)) if index not in gone]
        originals = self.original_layers
        slice_config_(self.model.config, kept)
        self.model.config.prunekit_kept_blocks = [originals[index] for index in kept]
        layers = self.layers
        for index in sorted(gone, reverse=True):
            del layers[index]
        self.renumber_cache_()


def _module_weights(path: str, module: nn.Module, layer: int, sublayer: str) -> Iterator[WeightRef]:
    """The prunable matrices that `module` itself holds."""
    if isinstance(module, nn.Linear | Conv1D | PackedLinear | MergedPart):
        parent, _, leaf = path.rpartition(".")
        shared = next((names for names in _SHARED_INPUTS if leaf in names), None)
        group = f"{parent}.{'+'.join(shared)}" if shared else path
        yield WeightRef(path, layer, sublayer, module, input_group=group)
    elif is_fused_experts(module):
        for parameter in ("gate_up_proj", "down_proj"):
            for expert in range(getattr(module, parameter).shape[0]):
                name = f"{path}.{parameter}.{expert}"
                yield WeightRef(name, layer, sublayer, module, parameter, expert, name)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` holds all experts in (experts, out, in) tensors, as transformers 5 does.

    It is called as module(hidden (tokens, hidden), top_k_index (tokens, k), top_k_weights) and
    computes down(act(gate) · up) per routed token.
    """
    tensors = (getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None))
    return all(isinstance(tensor, nn.Parameter) and tensor.ndim == 3 for tensor in tensors)


def check_supported(config: PretrainedConfig) -> None:
    """Raise a PrunekitError unless `config` is of a supported architecture and variant."""
    name = base_model_type(config)
    if name not in _LAYOUTS:
        raise PrunekitError(
            f"architecture '{name}' is not supported: prunekit lacks its layout (where layers, "
            f"norms, attention and MLP live); add a row to prunekit/architectures.py or use one "
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
