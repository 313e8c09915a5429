"""Where a model comes from: a folder or file here, the embedded model, or the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from prunekit.checkpoint.gguf_reader import demo_file
from prunekit.errors import PrunekitError

DEMO = "demo"
_HUB_FILES = (
    "*.json",
    "model*.safetensors",
    "adapter_model.safetensors",
    "tokenizer.model",
    "*.txt",
    "*.jinja",
)
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def located(source: str | Path, gguf_file: str | None = None) -> Path:
    """The folder or GGUF file behind a `source` of `load`, downloaded if it is a Hub id.

    Raises:
        PrunekitError: It is neither here nor on the Hub.
    """
    if not isinstance(source, str | Path):
        raise PrunekitError(
            f"{type(source).__name__} is no source of a model: give a folder, a .gguf file, a Hub "
            f"id or '{DEMO}'"
        )
    path = Path(source).expanduser()
    if source == DEMO:
        path = demo_file()
    elif not path.exists():
        path = _downloaded(str(source), gguf_file)
    return path if gguf_file is None else path / gguf_file


def _downloaded(source: str, gguf_file: str | None) -> Path:
    """Folder in the local Hub cache that holds the files of the Hub repository `source`."""
    if not _HUB_ID.fullmatch(source):
        raise PrunekitError(
            f"{source} doesn't exist: give a folder, a .gguf file, a Hub id or '{DEMO}'"
        )
    # a split file's other parts, too
    parts = [] if gguf_file is None else [re.sub(r"-\d{5}-of-", "-*-of-", gguf_file)]
    wanted = parts or list(_HUB_FILES)
    try:
        # Only the top folder: some repositories keep other formats' copies in folders below.
        folder = snapshot_download(source, allow_patterns=wanted, ignore_patterns=["*/*"])
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise PrunekitError(
            f"{source} is neither a folder here nor reachable on the Hub "
            f"({type(error).__name__}): check the name, the network, and your access to it"
        ) from error
    return Path(folder)
