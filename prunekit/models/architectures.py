"""A causal language model seen through its layout, the same way for every architecture.

Everything else in prunekit asks an `Architecture` for layers, sublayer contributions, prunable
weights and the output head, and never names a module of transformers itself; `layouts.py` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from prunekit.errors import PrunekitError
from prunekit.models.absent import Absent, AbsentAttention
from prunekit.models.causal import check_causal
from prunekit.models.layouts import (
    LAYOUTS,
    SUBLAYERS,
    Branch,
    GatedMLP,
    base_model_type,
    check_supported,
    slice_config_,
)
from prunekit.models.weight_refs import WeightRef, module_weights

# The class differs between transformers versions.
_SILU = (nn.SiLU, type(ACT2FN["silu"]))


def input_device(model: PreTrainedModel) -> torch.device:
    """The device on which the model expects token ids.

    Raises:
        PrunekitError: Its embedding is offloaded.
    """
    return _on_a_device(model.get_input_embeddings().weight, "embedding").device


def _on_a_device(weight: Tensor, name: str) -> Tensor:
    """`weight` itself, unless accelerate keeps it elsewhere until its module runs."""
    if weight.is_meta:
        raise PrunekitError(
            f"the model's {name} is offloaded, and is read outside of its forward: load the model "
            "with a device_map that keeps embedding, final norm and head on a device"
        )
    return weight


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


class Architecture:
    """A causal language model seen through its layout.

    Args:
        model: A transformers causal language model of a supported architecture, dense or dropped.

    Raises:
        PrunekitError: The object is no transformers model, or wraps one, or lacks its decoder
            layers or head where they are looked for; or the architecture, or this variant of it,
            is not supported. The message says what to pass instead.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_causal(model)
        check_supported(model.config)
        self.model = model
        self.layout = LAYOUTS[base_model_type(model.config)]
        try:
            model.get_submodule(self.layout.layers)
        except AttributeError:
            raise PrunekitError(
                f"{type(model).__name__} is a model without its head: load it whole, with "
                "prunekit.load or AutoModelForCausalLM"
            ) from None

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
        """The output head.

        Raises:
            PrunekitError: It is offloaded, or there is none.
        """
        module = self.model.get_output_embeddings()
        if module is None:
            raise PrunekitError(
                f"{type(self.model).__name__} has no output head, so it gives no probabilities of "
                "tokens: load it with prunekit.load or AutoModelForCausalLM"
            )
        config = self.model.config
        return Head(
            _on_a_device(module.weight, "head").detach(),
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
        """The sum that a sublayer adds to the residual stream, post-norm included.

        The layer's own forward is not called, but its accelerate hook (which moves inputs, or
        brings offloaded weights in) does its work around the sublayer all the same.

        Args:
            index: Layer.
            sublayer: "attn" or "mlp".
            hidden: (batch, tokens, hidden): what enters the sublayer, before its norm.
            kwargs: The keyword arguments its layer was called with (masks, position embeddings).

        Returns:
            (batch, tokens, hidden) on the layer's device, exactly zero for a dropped sublayer.
        """
        layer, branch = self.layers[index], self.branch(sublayer)
        if self.is_dropped(index, sublayer):
            return torch.zeros_like(hidden)
        hook = getattr(layer, "_hf_hook", None)
        if hook is not None:
            (hidden,), kwargs = hook.pre_forward(layer, hidden, **kwargs)
        out = getattr(layer, branch.norm)(hidden)
        if sublayer == "attn":
            out = getattr(layer, branch.modules[0])(out, **kwargs)[0]
        else:
            for name in branch.modules:
                out = getattr(layer, name)(out)
        if branch.post_norm is not None:
            out = getattr(layer, branch.post_norm)(out)
        if hook is not None:
            out = hook.post_forward(layer, out)
        contribution: Tensor = out
        return contribution

    def weights(self, index: int) -> Iterator[WeightRef]:
        """The prunable matrices of layer `index`: its linear layers, Conv1Ds and experts."""
        layer, prefix = self.layers[index], f"{self.layout.layers}.{index}"
        for sublayer in SUBLAYERS:
            for name in self.branch(sublayer).modules:
                root = getattr(layer, name)
                for path, module in root.named_modules(prefix=f"{prefix}.{name}"):
                    yield from module_weights(
                        path, module, index, sublayer, self.layout.shared_inputs
                    )

    def parameters(self, index: int) -> dict[str, Tensor]:
        """Every parameter of layer `index` by its name in the model; writes go through."""
        prefix = f"{self.layout.layers}.{index}"
        return {name: held.data for name, held in self.layers[index].named_parameters(prefix)}

    def shared_projections(self, index: int) -> Iterator[list[str]]:
        """Names of the attention projections of layer `index` that read one input, as called."""
        if self.layout.projections:
            yield from self._holders(index, self.layout.attn, self.layout.projections)

    def silu_mlps(self, index: int) -> Iterator[tuple[str, GatedMLP]]:
        """The modules of layer `index` that compute down(SiLU(gate(x))·up(x)), and their parts."""
        for path, names in self.gated_mlps(index):
            if isinstance(self._part(f"{path}.{names.activation}"), _SILU):
                yield path, names

    def gated_mlps(self, index: int) -> Iterator[tuple[str, GatedMLP]]:
        """The modules of layer `index` that compute down(activation(gate(x))·up(x)), and parts."""
        names = self.layout.gated_mlp
        if names is None:
            return
        parts = (names.gate, names.up, names.down, names.activation)
        for *_, activation in self._holders(index, self.layout.mlp, parts):
            yield activation.rpartition(".")[0], names

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
        silenced: list[nn.Parameter] = []
        for path in self.branch(sublayer).writes:
            found: Any = self.layers[index]
            for name in path.split("."):
                found = getattr(found, name, None)
            if isinstance(found, nn.Parameter):
                silenced.append(found)
            elif found is not None:
                silenced += found.parameters()
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
