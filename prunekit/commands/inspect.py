"""`prunekit inspect`: what a checkpoint is, and what was done to it."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

from prunekit.commands import options

SUMMARY = "say what a checkpoint is: layers, sparsity, pattern, what was dropped"
DESCRIPTION = """\
Load a model, check it (completeness, checksums if prunekit saved it, finite weights), and say how
large and how sparse it is, which N:M pattern its matrices have, how they are packed, and what was
dropped.
"""
EXAMPLE = "prunekit inspect out/wanda24"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="'demo', folder, .gguf, Hub id")
    options.add_placement(parser.add_argument_group("loading the model"))
    options.add_common(parser)


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    source = options.needed(args.model, "model")
    model, _ = options.load(source, args)

    from prunekit import checkpoint

    checkpoint.check_finite(model)
    found = _facts(source, model)
    options.emit(args, answer, lambda: found, lambda: _shown(found))


def _facts(source: str, model: Any) -> dict[str, Any]:
    from prunekit import packed
    from prunekit.analysis.provenance import absent_sublayers
    from prunekit.checkpoint.manifest import MANIFEST, read_json
    from prunekit.commands import measures
    from prunekit.models.architectures import Architecture
    from prunekit.models.layouts import base_model_type

    arch = Architecture(model)
    cache = measures.cache_size(model)
    matrices = measures.sparsity_by_kind(arch)
    path = Path(source)
    manifest = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else None
    kind = model.config.model_type
    return {
        "model": source,
        "architecture": base_model_type(model.config),
        "format": "embedded GGUF"
        if source == "demo"
        else "GGUF"
        if path.suffix == ".gguf"
        else f"safetensors, {kind}" + (f", {manifest['format']}" if manifest else ""),
        "checksums": "verified" if manifest else "none recorded",
        "layers": len(arch.layers),
        "original_layers": arch.original_layers,
        "dropped": absent_sublayers(arch),
        "hidden_size": arch.head.weight.shape[1],
        "vocabulary": arch.head.weight.shape[0],
        "context_length": arch.context_length,
        "dtype": str(model.dtype).removeprefix("torch."),
        "packed": dict(Counter(layer.format for _, layer in packed.packed_layers(model))),
        "parameters": packed.weight_count(model),
        "parameter_bytes": packed.weight_bytes(model),
        "file_bytes": measures.folder_bytes(path) if path.exists() else None,
        "cache_entries": cache.entries,
        "cache_bytes_per_token": cache.bytes_per_token,
        "matrices": matrices,
        "made_with": manifest["versions"] if manifest else None,
    }


def _shown(found: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.text import Text

    from prunekit.report import terminal

    dropped = [f"{name} {layers}" for name, layers in found["dropped"].items() if layers]
    kept, layers = found["original_layers"], found["layers"]
    if kept != list(range(layers)):
        dropped.append(f"blocks (kept {kept} of the original model)")
    files = "" if found["file_bytes"] is None else f", {terminal.size(found['file_bytes'])} on disk"
    packed = [f"{count} layers as {name}" for name, count in found["packed"].items()]
    rows = [
        ("Architecture", found["architecture"]),
        ("Format", f"{found['format']} (checksums: {found['checksums']})"),
        (
            "Size",
            f"{found['parameters']:,} parameters, {found['dtype']}, "
            f"{terminal.size(found['parameter_bytes'])} in memory{files}",
        ),
        ("Layers", f"{layers}, hidden size {found['hidden_size']}"),
        ("Vocabulary", f"{found['vocabulary']:,}, context {found['context_length']:,} tokens"),
        ("Dropped", "; ".join(dropped) or "nothing"),
        ("Packed", ", ".join(packed) or "nothing"),
        (
            "KV cache",
            f"{found['cache_entries']} entries, {found['cache_bytes_per_token']:,} bytes per token",
        ),
    ]
    matrices = [
        {
            "Matrix": row["kind"],
            "Count": row["count"],
            "Shape": "×".join(map(str, row["shape"])),
            "Zeros": f"{100 * row['sparsity']:.2f} %",
            "Pattern": row["pattern"] or "–",
        }
        for row in found["matrices"]
    ]
    return Group(
        terminal.facts(found["model"], rows),
        Text(),
        terminal.records("Matrices of the layers", matrices),
    )
