"""Models whose dropped sublayers are really absent, and whose packed weights are never dense.

A `prunekit_<base>` model is its stock transformers class with the sublayers named in its
configuration's `drop_attn_list` and `drop_mlp_list` taken out (LLM-Drop's names). It is registered
with AutoConfig and AutoModelForCausalLM when prunekit is imported. `drop_sublayers_` turns a stock
model into one in place; `drop_blocks_` takes out whole layers, which leaves a stock model.

Cached decoding: the kept attentions are numbered 0, 1, 2, … (`Architecture.renumber_cache_`), so a
cache must hold exactly their entries, with their types (full or sliding attention). transformers
builds caches with one entry per layer; a pre-hook of the decoder reduces each to the kept ones when
it first meets it, whoever built it: the model itself, `generate` or the caller.

`output_attentions` gives None for a dropped attention, so that the tuple has one entry per layer. A
mixture without an expert left has no router loss.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture
from prunekit.models.layouts import (
    MODEL_TYPE_PREFIX,
    SUPPORTED,
    base_model_type,
    moved_pattern,
)
from prunekit.models.weight_refs import fused_experts
from prunekit.packed.described import PACKED_FIELD, QUANT_METHOD, install_skeletons_

DROP_LISTS = {"attn": "drop_attn_list", "mlp": "drop_mlp_list"}


def drop_sublayers_(
    model: PreTrainedModel, *, attn: Iterable[int] = (), mlp: Iterable[int] = ()
) -> None:
    """Take attention and MLP sublayers out of `model`, which becomes a `prunekit_<base>` model.

    The model object stays the same; its class and its configuration (a copy of its own from now on)
    change. Caches filled before keep working: they lose the dropped layers' entries when next used.

    Args:
        model: A stock or already dropped causal language model of a supported architecture.
        attn: Layers, by their index in this model, whose attention goes.
        mlp: Layers whose MLP goes.

    Raises:
        PrunekitError: An index is out of range or already dropped, or the model is of a class of
            its own; the model is unchanged.
    """
    arch = Architecture(model)
    wanted = {"attn": sorted(set(attn)), "mlp": sorted(set(mlp))}
    for sublayer, indices in wanted.items():
        _check_indices(indices, len(arch.layers), sublayer)
        gone = [index for index in indices if arch.is_dropped(index, sublayer)]
        if gone:
            raise PrunekitError(
                f"{sublayer} of layer {gone[0]} is already dropped: leave it out of the list"
            )
    if not any(wanted.values()):
        return
    name = base_model_type(model.config)
    if type(model) not in (stock_class(name), model_class(name)):
        raise PrunekitError(
            f"sublayers can't be dropped from the class {type(model).__name__}: load the model "
            f"as {stock_class(name).__name__}"
        )
    _own_config_(model)
    model.config.__class__ = CONFIG_CLASSES[name]
    model.__class__ = model_class(name)
    for sublayer, indices in wanted.items():
        field = DROP_LISTS[sublayer]
        dropped = sorted([*getattr(model.config, field, []), *indices])
        setattr(model.config, field, dropped)
        for index in indices:
            arch.remove_(index, sublayer)
    _fit_cache_to_(model)


def drop_blocks_(model: PreTrainedModel, indices: Iterable[int]) -> list[str]:
    """Take whole decoder layers out of `model`; the others are renumbered and it stays plain.

    Warns where other programs would read the result wrongly (`layouts.moved_pattern`).

    Args:
        model: A stock or dropped causal language model of a supported architecture.
        indices: Layers, by their index in this model.

    Returns:
        The warnings.

    Raises:
        PrunekitError: An index is out of range, no layer would be left, or the architecture can't
            be renumbered; the model is unchanged.
    """
    arch = Architecture(model)
    gone = sorted(set(indices))
    _check_indices(gone, len(arch.layers), "block")
    if not gone:
        return []
    if len(gone) == len(arch.layers):
        raise PrunekitError(f"all {len(gone)} blocks would be dropped: keep at least one")
    _own_config_(model)
    arch.remove_blocks_(gone)
    if isinstance(model.config, _DroppedConfig):
        _fit_cache_to_(model)
        if not (model.config.drop_attn_list or model.config.drop_mlp_list):
            make_stock_(model)
    note = moved_pattern(model.config)
    if note is None:
        return []
    warnings.warn(note, stacklevel=2)
    return [note]


def _check_indices(indices: list[int], layers: int, unit: str) -> None:
    for index in indices:
        if not 0 <= index < layers:
            raise PrunekitError(f"{unit} index {index} is out of range: use 0 to {layers - 1}")


def _own_config_(model: PreTrainedModel) -> None:
    """Give `model` a configuration of its own, so that changing it reaches no other model."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def make_stock_(model: PreTrainedModel) -> None:
    """Turn a `prunekit_<base>` model that lacks no sublayer any more back into the stock class."""
    name = base_model_type(model.config)
    for field in DROP_LISTS.values():
        delattr(model.config, field)
    model.config.__class__ = CONFIG_MAPPING[name]
    vars(model.config).pop("model_type", None)  # from a file, in front of the class's own
    model.__class__ = stock_class(name)


def _fit_cache_to_(model: PreTrainedModel) -> None:
    """Renumber the kept attentions and have the decoder accept any cache."""
    arch = Architecture(model)
    arch.renumber_cache_()
    decoder = arch.decoder
    if not hasattr(decoder, "kept_cache_entries"):
        decoder.register_forward_pre_hook(_fit_cache, with_kwargs=True)
    kept = [index for index, attention in enumerate(arch.attentions()) if attention is not None]
    # With no attention left, one entry counts tokens (absent.AbsentAttention).
    decoder.kept_cache_entries = tuple(kept or [0])  # type: ignore[assignment]


def _fit_cache(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of a decoder: see that its cache has one entry per kept attention."""
    position = _cache_position(decoder) if len(args) > 1 else 1
    positional = position < len(args)
    cache = args[position] if positional else kwargs.get("past_key_values")
    if cache is None:
        if not _makes_cache(decoder, kwargs):
            return args, kwargs
        cache = DynamicCache(config=decoder.config)
        if positional:
            args = (*args[:position], cache, *args[position + 1 :])
        else:
            kwargs = {**kwargs, "past_key_values": cache}
    _keep_entries_(cache, decoder.kept_cache_entries, decoder.config.num_hidden_layers)
    return args, kwargs


def _cache_position(decoder: Any) -> int:
    """Index of `past_key_values` among the positional arguments of a decoder."""
    parameters = inspect.signature(type(decoder).forward).parameters
    return list(parameters).index("past_key_values") - 1  # not counting self


def _makes_cache(decoder: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the stock forward would create a cache."""
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        return False
    asked = kwargs.get("use_cache")
    return bool(decoder.config.use_cache if asked is None else asked)


def _keep_entries_(cache: Cache, entries: tuple[int, ...], layers: int) -> None:
    """Reduce a cache made for every layer to `entries`; one that grows on demand fits anyway."""
    held = len(cache.layers)
    if held <= len(entries):
        return
    if held != layers:
        raise PrunekitError(
            f"this KV cache has {held} entries, the model has {layers} layers and keeps "
            f"{len(entries)} attentions: pass an empty cache"
        )
    cache.layers = [cache.layers[index] for index in entries]


class _DroppedConfig:
    """Adds the lists of dropped sublayers to a stock configuration.

    Both hold layer indices, ascending. One flag per layer, as LLM-Drop writes too, is read as well.
    """

    drop_attn_list: list[int]
    drop_mlp_list: list[int]

    def __post_init__(
        self,
        drop_attn_list: list[int] | list[bool] | None = None,
        drop_mlp_list: list[int] | list[bool] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.drop_attn_list = normalize_drop_list(drop_attn_list)
        self.drop_mlp_list = normalize_drop_list(drop_mlp_list)
        if getattr(self, PACKED_FIELD, None) is not None:  # written before there was a quantizer
            self.quantization_config = {"quant_method": QUANT_METHOD}
        # AutoModelForCausalLM looks a class up after it has made the configuration. Registering it
        # no sooner keeps `import prunekit` from importing every architecture's modeling module.
        model_class(base_model_type(self))

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written into config.json: whatever class opens it, `quantizer.py` is asked."""
        written: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        return {**written, "quantization_config": {"quant_method": QUANT_METHOD}}


def normalize_drop_list(listed: list[int] | list[bool] | None) -> list[int]:
    """Ascending layer indices from a list of indices or of one flag per layer.

    Raises:
        PrunekitError: The list holds something else.
    """
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(isinstance(item, int) for item in listed):
        raise PrunekitError(
            f"dropped sublayers must be listed as layer indices, not {listed!r}: correct "
            f"drop_attn_list and drop_mlp_list in config.json"
        )
    flags = all(isinstance(item, bool) for item in listed)
    return sorted({i if flags else int(item) for i, item in enumerate(listed) if item or not flags})


class _DroppedModel:
    """Takes the sublayers that the configuration lists out of a freshly built stock model.

    Layers that it lists as packed become packed ones, to be filled.
    """

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        arch = Architecture(self)
        for sublayer, field in DROP_LISTS.items():
            indices = getattr(config, field)
            _check_indices(indices, len(arch.layers), field)
            for index in indices:
                arch.remove_(index, sublayer)
        if any(getattr(config, field) for field in DROP_LISTS.values()):
            _fit_cache_to_(self)
        model: Any = self
        install_skeletons_(model, getattr(config, PACKED_FIELD, None))


def _forward_of(stock: type[PreTrainedModel]) -> Callable[..., Any]:
    """A forward that says of every layer what the stock one says of those that are there."""

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("output_router_logits")
        if wanted is None:
            wanted = getattr(self.config, "output_router_logits", False)
        if wanted and all(fused_experts(module) is None for module in self.modules()):
            warnings.warn("no expert is left, so there is no router loss", stacklevel=2)
            kwargs["output_router_logits"] = False
        out = stock.forward(self, *args, **kwargs)
        attentions = getattr(out, "attentions", None)
        if attentions:
            found = iter(attentions)
            held = Architecture(self).attentions()
            if len(attentions) < len(held):
                out.attentions = tuple(None if a is None else next(found) for a in held)
        return out

    return forward


def stock_class(name: str) -> type[PreTrainedModel]:
    """The transformers class of base model type `name`."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]


@functools.cache
def model_class(name: str) -> type[PreTrainedModel]:
    """The `prunekit_<name>` class of base model type `name`, registered with transformers."""
    stock, config_class = stock_class(name), CONFIG_CLASSES[name]
    made = type(
        f"Prunekit{stock.__name__}",
        (_DroppedModel, stock),
        {
            "__module__": __name__,
            "__doc__": stock.__doc__,
            "config_class": config_class,
            "forward": _forward_of(stock),
        },
    )
    globals()[made.__name__] = made
    AutoModelForCausalLM.register(config_class, made, exist_ok=True)
    # Mixture-of-experts checkpoints store experts one by one; models hold them fused.
    conversions = get_checkpoint_conversion_mapping(name)
    if conversions is not None:
        register_checkpoint_conversion_mapping(
            MODEL_TYPE_PREFIX + name, conversions, overwrite=True
        )
    return made


def _config_class(name: str) -> type[PretrainedConfig]:
    stock = CONFIG_MAPPING[name]
    made = type(
        f"Prunekit{stock.__name__}",
        (_DroppedConfig, stock),
        {
            "__module__": __name__,
            "__doc__": stock.__doc__,
            "model_type": MODEL_TYPE_PREFIX + name,
        },
    )
    globals()[made.__name__] = made
    AutoConfig.register(MODEL_TYPE_PREFIX + name, made, exist_ok=True)
    return made


CONFIG_CLASSES = {name: _config_class(name) for name in SUPPORTED}


def __getattr__(attribute: str) -> Any:
    """Make a model class on demand, so that a pickled model finds its class in a new process."""
    for name in SUPPORTED if attribute.startswith("Prunekit") else ():
        if model_class(name).__name__ == attribute:
            return model_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
