"""Load any causal language model that transformers can, for measuring only: quantised ones too.

`prunekit.checkpoint.load` reads what prunekit can prune and save again. A candidate only has to
run: folders of any architecture and quantisation, PEFT adapters, GGUF files and prunekit's own.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prunekit import checkpoint
from prunekit.checkpoint.former_layouts import layout_of
from prunekit.checkpoint.integrity import weight_files
from prunekit.checkpoint.manifest import read_json
from prunekit.checkpoint.sources import located
from prunekit.errors import PrunekitError, one_line
from prunekit.files.content import add_content
from prunekit.models.dropped import DROP_LISTS
from prunekit.models.layouts import MODEL_TYPE_PREFIX, SUPPORTED
from prunekit.packed.described import PACKED_FIELD
from prunekit.packed.sizes import plain_parts
from prunekit.process.progress import quiet_transformers

ADAPTER = "adapter_config.json"
# quant_method of config.json -> (module, what to install)
PACKAGES = {
    "aqlm": ("aqlm", "aqlm"),
    "auto-round": ("auto_round", "auto-round"),
    "awq": ("gptqmodel", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "fbgemm_fp8": ("fbgemm_gpu", "fbgemm-gpu-genai"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "higgs": ("flute", "flute-kernel"),
    "hqq": ("hqq", "hqq"),
    "mxfp4": ("kernels", "kernels"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "quark": ("quark", "amd-quark"),
    "spqr": ("spqr_quant", "spqr_quant"),
    "torchao": ("torchao", "torchao"),
    "vptq": ("vptq", "vptq"),
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, ready to be measured.

    Attributes:
        model: In eval mode, without gradients.
        tokenizer: Its tokenizer, None where it came without one.
        bytes_on_disk: Size of its weight files; None where there are none.
        notes: What a reader of results should know about the loading.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    bytes_on_disk: int | None
    notes: tuple[str, ...] = ()


def load_any(
    source: str, *, dtype: str | None = None, device: str | None = None, base: str | None = None
) -> LoadedModel:
    """Load whatever `source` names.

    Args:
        source: "demo", a folder, a .gguf file or a Hub id; a folder may hold a PEFT adapter.
        dtype: Type of the weights that are not quantised; None keeps the checkpoint's.
        device: Where the model goes; "auto" spreads it; None: the CPU.
        base: Source of the model that an adapter goes on; None: the one that the adapter names.

    Raises:
        PrunekitError: It can't be loaded; the message names a package that is missing.
    """
    path = located(source)
    files = disk_files(path)
    size = sum(file.stat().st_size for file in files)
    if path.is_dir() and (path / ADAPTER).is_file():
        return _adapted(path, size, dtype, device, base)
    if not path.is_dir() or _is_ours(path):
        model, tokenizer = checkpoint.load(source, dtype=dtype, device=device)
        return LoadedModel(model, tokenizer, size)
    model, notes = _through_transformers(path, dtype, device)
    tokenizer_here = any((path / name).is_file() for name in _TOKENIZER_FILES)
    tokenizer = AutoTokenizer.from_pretrained(path) if tokenizer_here else None
    model.config.name_or_path = source
    return LoadedModel(model.eval().requires_grad_(False), tokenizer, size, notes)


def disk_files(path: Path) -> list[Path]:
    """The weight files behind a located source."""
    if not path.is_dir():
        return [path]
    if (path / ADAPTER).is_file():
        found = sorted(path.glob("adapter_model*.safetensors"))
        if not found:
            raise PrunekitError(f"{path} holds no adapter_model.safetensors: save the adapter so")
        return found
    return weight_files(path)


def fingerprint(source: str) -> str:
    """Digest of a model's configuration and of the contents of its weight files."""
    path = located(source)
    digest = hashlib.sha256()
    configurations = [path / "config.json", path / ADAPTER] if path.is_dir() else []
    for file in [*(file for file in configurations if file.is_file()), *disk_files(path)]:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                add_content(digest, np.frombuffer(chunk, np.uint8))
    return digest.hexdigest()


def fingerprint_of(model: PreTrainedModel) -> str:
    """Digest of the tensors of a model that is in memory."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        for part in plain_parts(tensor):
            digest.update(f"{name}{part.dtype}{tuple(part.shape)}".encode())
            add_content(digest, part.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def bytes_in_memory(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters and buffers, what is shared counted once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in plain_parts(tensor):
            storages[part.device, part.untyped_storage().data_ptr()] = part.untyped_storage()
    return sum(storage.nbytes() for storage in storages.values())


def _is_ours(folder: Path) -> bool:
    """Whether `checkpoint.load` reads the folder: supported, and not quantised by others."""
    raw = read_json(folder / "config.json")
    name = str(raw.get("model_type", ""))
    quantisation = raw.get("quantization_config")
    own = name.startswith(MODEL_TYPE_PREFIX) or PACKED_FIELD in raw
    own = own or any(raw.get(field) for field in DROP_LISTS.values())
    if quantisation:
        return own or layout_of(quantisation) is not None
    has_tokenizer = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    return own or (name in SUPPORTED and has_tokenizer)


def _through_transformers(
    folder: Path, dtype: str | None, device: str | None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    raw = read_json(folder / "config.json")
    method = str((raw.get("quantization_config") or {}).get("quant_method", ""))
    _check_package(folder, method)
    try:
        with quiet_transformers():
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype or "auto",
                device_map=device if device not in (None, "cpu") else None,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except ImportError as error:
        raise PrunekitError(
            f"{folder} is quantised by {method or 'a package'} that is not here: {one_line(error)}"
        ) from error
    except Exception as error:  # each quantiser fails in its own way
        raise PrunekitError(f"{folder} couldn't be loaded: {one_line(error)}") from error
    for name in sorted(found["missing_keys"]):
        raise PrunekitError(f"{folder}: {name} is missing from the weights: copy them again")
    for name, *_ in sorted(found["mismatched_keys"]):
        raise PrunekitError(f"{folder}: {name} doesn't fit config.json: copy the weights again")
    if dtype is not None:
        _stand_for_(model, getattr(torch, dtype))
    left = sorted(found["unexpected_keys"])
    notes = [f"{len(left)} tensors of the files were not used, first {left[0]}"] if left else []
    return model, (*([f"quantised by {method}"] if method else []), *notes)


def _stand_for_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let weights of a quantised tensor class stand for values of `dtype`.

    Transformers leaves them the type that they were saved with, and torchao's products refuse
    activations of another one. Their integers stay; their scales are rounded to `dtype`.
    """
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            quantised = hasattr(weight, "__tensor_flatten__")
            if quantised and weight.is_floating_point() and weight.dtype != dtype:
                module.register_parameter(name, nn.Parameter(weight.detach().to(dtype), False))


def _check_package(folder: Path, method: str) -> None:
    """See that the package which a quantisation needs is installed."""
    module, package = PACKAGES.get(method, ("", ""))
    if not module:
        return
    try:
        there = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around a submodule
        there = False
    if not there:
        raise PrunekitError(f"{folder} is quantised by {method}: run `pip install {package}`")


def _adapted(
    folder: Path, size: int, dtype: str | None, device: str | None, base: str | None
) -> LoadedModel:
    """A PEFT adapter on its base model, not merged."""
    if importlib.util.find_spec("peft") is None:
        raise PrunekitError(f"{folder} is a PEFT adapter: run `pip install peft`")
    from peft import PeftModel

    named = base or read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not named:
        raise PrunekitError(f"{folder} names no base model: compare it with a model as reference")
    under = load_any(str(named), dtype=dtype, device=device)
    try:
        with quiet_transformers():
            adapted = PeftModel.from_pretrained(under.model, str(folder))
    except Exception as error:  # what an adapter of another model does
        raise PrunekitError(f"{folder} doesn't fit {named}: {one_line(error)}") from error
    model: PreTrainedModel = adapted.get_base_model()
    total = None if under.bytes_on_disk is None else under.bytes_on_disk + size
    notes = (f"adapter of {size} bytes on {named}", *under.notes)
    return LoadedModel(model.eval().requires_grad_(False), under.tokenizer, total, notes)
