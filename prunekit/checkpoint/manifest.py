"""`prunekit.json`, which stands beside a saved model: what was done to it, and its checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import prunekit
from prunekit.errors import PrunekitError

MANIFEST = "prunekit.json"
FORMAT_VERSION = 1
_CHUNK = 1 << 20


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts`, the versions at work, and size and SHA-256 of every weight file."""
    manifest = {
        "format_version": FORMAT_VERSION,
        **facts,
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(folder.glob("*.safetensors"))
        },
        "versions": {
            package.__name__: str(package.__version__)
            for package in (prunekit, transformers, torch)
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def verify_manifest(folder: Path) -> None:
    """Compare the weight files in `folder` with its manifest, where there is one.

    Raises:
        PrunekitError: A file is missing, has another size or another checksum; or a newer prunekit
            wrote the manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return
    manifest = read_json(path)
    if manifest.get("format_version", 0) > FORMAT_VERSION:
        raise PrunekitError(f"{path} was written by a newer prunekit: upgrade prunekit")
    for name, recorded in manifest.get("files", {}).items():
        file = folder / name
        if not file.is_file():
            raise PrunekitError(f"{file} is missing: copy it again")
        if file.stat().st_size != recorded["bytes"]:
            raise PrunekitError(
                f"{file} has {file.stat().st_size} bytes instead of {recorded['bytes']}: copy it "
                f"again"
            )
        if _sha256(file) != recorded["sha256"]:
            raise PrunekitError(f"{file} is damaged (its checksum differs): copy it again")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or a PrunekitError that says what is wrong with the file."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PrunekitError(f"{path} is missing: give the folder of a saved model") from None
    except (OSError, ValueError) as error:
        raise PrunekitError(f"{path} can't be read ({error}): copy it again") from error
    if not isinstance(read, dict):
        raise PrunekitError(f"{path} doesn't hold a JSON object: copy it again")
    return read


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
