"""Compressed copies of the embedded model, for `prunekit kld` to rank.

    python -m bench.kld_copies out/copies                     # all of them
    python -m bench.kld_copies out/copies --only Q4_0 int4    # some

GGUF copies requantise the embedded file's matrices; int4, int6 and int8 are torchao's weights, in
groups of 32; wanda24 and drop4 are prunekit's own, and wanda24-int8 and its like are wanda24 with
its layers packed 2:4 in 8 or 4 bits, rounded to nearest. From wanda24 on no package but prunekit's
is needed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import gguf
import torch

import prunekit as pk
from prunekit.checkpoint.gguf_reader import demo_file

GGUF_TYPES = ("Q8_0", "Q5_0", "Q4_0")
INTEGERS = (8, 6, 4)
PACKED = ("int8", "fp8", "int4")


def requantised(source: Path, target: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Write a copy of a GGUF file whose matrices are all of one type.

    Args:
        source: The file.
        target: The copy.
        kind: A type that the gguf package can write: Q8_0, Q5_0, Q5_1, Q4_0, Q4_1, BF16, F16.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        held = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, held), raw_dtype=held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def integers(source: str, target: Path, bits: int) -> None:
    """Save a copy whose linear layers have torchao's integer weights, a scale per 32 of a row.

    Args:
        source: A folder that transformers loads.
        target: Folder of the copy.
        bits: 2 to 8.
    """
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

    weights = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(32))
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=TorchAoConfig(weights)
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def pruned(target: Path) -> None:
    """Save the model at 2:4 by Wanda, calibrated on the text that it writes itself."""
    model, tokenizer = pk.load("demo")
    pk.prune_(model, pk.Wanda(pattern="2:4"), pk.Calibration())
    pk.save(model, tokenizer, target)


def packed(source: Path, target: Path, format_: str) -> None:
    """Save a 2:4 copy with its layers packed in a format that rounds their values to nearest.

    Args:
        source: The folder of the pruned model.
        target: Folder of the copy.
        format_: "2:4-int8", "2:4-fp8" or "2:4-int4".
    """
    model, tokenizer = pk.load(source)
    report = pk.swap_(model, formats=[format_])
    wide = 2 * sum(math.prod(layer.shape) for layer in report.swapped)
    print(f"{format_}: {report.bytes / wide:.4f} of the packed layers' 16-bit bytes")
    pk.save(model, tokenizer, target)


def dropped(target: Path) -> None:
    """Save the model without four of its attentions."""
    model, tokenizer = pk.load("demo")
    pk.drop_(model, pk.Drop(unit="attn", count=4), pk.Calibration(samples=4, length=128))
    pk.save(model, tokenizer, target)


def makers(folder: Path) -> dict[str, tuple[Path, Callable[[Path], None]]]:
    """Per name of a copy: where it goes, and what makes it."""

    def as_gguf(name: str) -> Callable[[Path], None]:
        return lambda path: requantised(demo_file(), path, gguf.GGMLQuantizationType[name])

    def as_integers(bits: int) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            dense = folder / "dense"
            if not dense.is_dir():
                model, tokenizer = pk.load("demo")
                pk.save(model, tokenizer, dense)
            integers(str(dense), path, bits)

        return make

    found = {name: (folder / f"{name}.gguf", as_gguf(name)) for name in GGUF_TYPES}
    found |= {f"int{bits}": (folder / f"int{bits}", as_integers(bits)) for bits in INTEGERS}

    def as_packed(name: str) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            source = folder / "wanda24"
            if not source.is_dir():
                pruned(source)
            packed(source, path, f"2:4-{name}")

        return make

    found |= {"wanda24": (folder / "wanda24", pruned), "drop4": (folder / "drop4", dropped)}
    return found | {
        f"wanda24-{name}": (folder / f"wanda24-{name}", as_packed(name)) for name in PACKED
    }


def make(folder: Path, names: list[str]) -> list[Path]:
    """Make the copies `names` that are not there yet; where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    known = makers(folder)
    for name in names:
        path, write = known[name]
        if not path.exists():
            write(path)
    return [known[name][0] for name in names]


def main() -> None:
    """Make copies and say where they are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(makers(Path())), help="some of them")
    options = parser.parse_args()
    for path in make(options.folder, options.only or list(makers(Path()))):
        print(path)


if __name__ == "__main__":
    main()
