"""Weights of 8 and 4 bits that keep every value: torch's, torchao's, our kernel without sparsity.

They answer whether 2:4 with quantised values gains anything over quantisation alone. Each row says
in its note which library did it, and how. Weights are rounded to nearest; a product is judged by
the weight that its own codes stand for.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from prunekernels.sparse.two_four.quantized.layout import KINDS
from prunekernels.sparse.two_four.quantized.packing import round_to_nearest
from torch import Tensor

from bench import bounds
from bench.harness import Absent
from bench.peers import PATTERNS, Layer, LinearPeer, compiled, need_gpu, package, product, size

#: Layouts of torchao's 4-bit weights, and the device that each is for.
TORCHAO_LAYOUTS = {
    "opaque": "cpu",
    "tile_packed_to_4d": "cuda",
    "plain": "cuda",
    "preshuffled": "cuda",
}
_GROUP = 128


def on_cpu(weight: Tensor) -> bool:
    """Whether a layer is for a CPU."""
    return weight.device.type == "cpu"


def _torch(what: str) -> str:
    return f"torch {torch.__version__} {what}"


def _codes8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and a float32 scale for each row."""
    scale = weight.float().abs().amax(1).clamp_min(1e-8) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def _dequantised(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, values.to(x.dtype)) * scale


def _int8(weight: Tensor, tokens: int) -> Layer:
    """torch.compile of the product with codes, as torchao's and gpt-fast's int8 layers are used."""
    need_gpu(weight, "compiled for an NVIDIA GPU only")
    values, scale = _codes8(weight)
    scale = scale.to(weight.dtype)
    return Layer(
        lambda x: compiled(_dequantised)(x, values, scale),
        size(values, scale),
        values.double() * scale.double()[:, None],
        note=_torch("compile"),
    )


def _int8_pack(weight: Tensor, tokens: int) -> Layer:
    """torch's own operation; on a GPU it is one thread for each output."""
    key = "CPU" if on_cpu(weight) else "CUDA"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_weight_int8pack_mm", key):
        raise Absent(
            f"torch {torch.__version__} has no {key} kernel of _weight_int8pack_mm: 2.9 has"
        )
    values, scale = _codes8(weight)
    scale = scale.to(weight.dtype)
    return Layer(
        lambda x: torch._weight_int8pack_mm(x, values, scale),
        size(values, scale),
        values.double() * scale.double()[:, None],
        note=_torch("_weight_int8pack_mm"),
    )


def _int4(group: int, inner_tiles: int, weight: Tensor, tokens: int) -> Layer:
    """torch's own operation (TinyGEMM on a GPU), whose layout there is in tiles of 16 columns."""
    rows, columns = weight.shape
    tall, wide = (16, group) if on_cpu(weight) else (8, max(group, 16 * inner_tiles))
    if on_cpu(weight) and inner_tiles != 8:
        raise Absent("_weight_int4pack_mm: inner tiles are of its layout on a GPU")
    if weight.dtype != torch.bfloat16 or rows % tall or columns % wide:
        raise Absent(
            f"_weight_int4pack_mm in groups of {group}: takes bfloat16 and multiples of {tall} × "
            f"{wide}, not {weight.dtype} {rows} × {columns}"
        )
    grouped = weight.float().view(rows, -1, group)
    scale = (grouped.abs().amax(2) / 7).clamp_min(1e-8).to(weight.dtype)
    codes = (grouped / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int32) + 8
    exact = ((codes - 8).double() * scale.double()[..., None]).view(rows, columns)
    # (groups, N, 2): scale and the value of code 8
    pairs = torch.stack((scale, torch.zeros_like(scale)), 2).transpose(0, 1).contiguous()
    codes = codes.view(rows, columns)
    if on_cpu(weight):
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        multiply = torch._weight_int4pack_mm_for_cpu
        how = _torch(f"_weight_int4pack_mm_for_cpu, groups of {group}")
    else:
        bytes_ = (codes[:, ::2] << 4 | codes[:, 1::2]).byte()
        packed = torch._convert_weight_to_int4pack(bytes_, inner_tiles)
        multiply = torch._weight_int4pack_mm
        how = _torch(f"_weight_int4pack_mm, groups of {group}, {inner_tiles} inner tiles")
    return Layer(lambda x: multiply(x, packed, group, pairs), size(packed, pairs), exact, note=how)


def _quantised(weight: Tensor, config: Any, torchao: Any) -> Tensor:
    """The weight of a linear layer that torchao quantised in place."""
    rows, columns = weight.shape
    module = torch.nn.Linear(columns, rows, bias=False, device="meta", dtype=weight.dtype)
    module.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    torchao.quantize_(module, config)
    if type(module.weight.data) is Tensor:
        raise Absent(f"torchao left a weight of {rows} × {columns} as it was")
    return module.weight.data


def _inner(weight: Any) -> int:
    """Bytes of a torchao weight's own tensors."""
    return size(*(getattr(weight, name) for name in weight.tensor_data_names))


def _torchao_int8(weight: Tensor, tokens: int) -> Layer:
    """A scale for each row; compiled on a GPU, as its documentation says."""
    torchao = package("torchao.quantization", "pip install torchao")
    held: Any = _quantised(weight, torchao.Int8WeightOnlyConfig(set_inductor_config=False), torchao)
    run = product if on_cpu(weight) else compiled(product)
    how = "eager" if on_cpu(weight) else "torch.compile"
    return Layer(
        lambda x: run(x, held),
        _inner(held),
        held.qdata.double() * held.scale.double(),
        note=f"torchao {_version()} Int8WeightOnlyConfig, {how}",
    )


def _torchao_int4(layout: str, weight: Tensor, tokens: int) -> Layer:
    """Groups of 128 in one of its layouts, two of which other kernels than torch's multiply."""
    torchao = package("torchao.quantization", "pip install torchao")
    if (TORCHAO_LAYOUTS[layout] == "cpu") != on_cpu(weight):
        raise Absent(f"torchao int4: its layout '{layout}' is for {TORCHAO_LAYOUTS[layout]}")
    if weight.dtype != torch.bfloat16 or weight.shape[1] % _GROUP:
        raise Absent(
            f"torchao int4: takes bfloat16 and multiples of {_GROUP} columns, not {weight.dtype} "
            f"and {weight.shape[1]}"
        )
    try:
        if layout == "opaque":
            made = package("torchao.prototype.quantization.int4", "pip install torchao")
            config = made.PrototypeInt4WeightOnlyConfig(_GROUP, set_inductor_config=False)
        else:
            config = torchao.Int4WeightOnlyConfig(
                _GROUP, set_inductor_config=False, int4_packing_format=layout
            )
        held: Any = _quantised(weight, config, torchao)
    except ImportError as error:
        raise Absent(f"torchao int4 {layout}: {error}; pip install mslk-cuda") from error

    def apply(x: Tensor) -> Tensor:
        return F.linear(x, held)

    return Layer(
        apply,
        _inner(held),
        seen(apply, weight),
        note=f"torchao {_version()} Int4WeightOnlyConfig, {layout}, groups of {_GROUP}",
    )


def _version() -> str:
    return str(package("torchao", "pip install torchao").__version__)


def seen(apply: Any, weight: Tensor) -> Tensor:
    """The (N, K) weight that a product multiplies with, from its products with unit vectors.

    Raises:
        ValueError: It is further from `weight` than 4 bits in groups of 128 can be.
    """
    columns = weight.shape[1]
    units = torch.eye(columns, dtype=weight.dtype, device=weight.device).split(256)
    found = torch.cat([apply(some) for some in units]).t().contiguous()
    # 15 steps from the smallest to the largest of a group; half of one, and 16-bit roundings
    grouped = weight.float().view(len(weight), -1, _GROUP)
    largest = grouped.abs().amax(2, keepdim=True)
    error = (found.float().view_as(grouped) - grouped).abs()
    if bool((error > largest * (2 / 15)).any()):
        raise ValueError(f"its weight is {float(error.max()):.2g} off: not this one in 4 bits")
    return found


def _without_sparsity(kind: str, group: int, zeros: bool, weight: Tensor, tokens: int) -> Layer:
    """Our quantised 2:4 kernel with its sparsity taken out."""
    need_gpu(weight)
    # imports Triton, which a machine without a GPU may lack
    from bench import dense_quantized

    reason = dense_quantized.unfit(weight)
    if reason:
        raise Absent(f"our kernel without sparsity: {reason}")
    given = round_to_nearest(weight, group, not zeros, KINDS[kind])
    held = dense_quantized.pack(given, kind)
    return Layer(
        lambda x: dense_quantized.linear(x, held),
        held.nbytes,
        dense_quantized.exact(given),
        note=f"our {kind} kernel without sparsity",
    )


def _ours(name: str) -> LinearPeer:
    """A peer of `bounds.UNPRUNED`, by the name of its cost."""
    bits, group = bounds.UNPRUNED[name][1:]
    build = functools.partial(_without_sparsity, f"2:4-int{bits}", group, "zeros" in name)
    return LinearPeer(name.replace(" mma", " mma_sync"), name, build, ("2:4",), most_tokens=256)


#: Every way that is measured.
WEIGHT_ONLY = (
    LinearPeer("int8 weight-only", "int8", _int8, PATTERNS, few=True),
    LinearPeer("int8 weight-only pack", "int8", _int8_pack, PATTERNS, most_tokens=64),
    LinearPeer(
        "int4 weight-only", "int4", functools.partial(_int4, 128, 8), PATTERNS, most_tokens=256
    ),
    *(
        LinearPeer(
            f"int4 weight-only g{group}",
            f"int4 g{group}",
            functools.partial(_int4, group, 8),
            ("2:4",),
            most_tokens=256,
        )
        for group in (64, 256)
    ),
    *(
        LinearPeer(
            f"int4 weight-only tiles={tiles}",
            "int4",
            functools.partial(_int4, 128, tiles),
            ("2:4",),
            most_tokens=256,
        )
        for tiles in (2, 4)
    ),
    LinearPeer("torchao int8", "int8", _torchao_int8, ("2:4",), few=True),
    *(
        LinearPeer(
            f"torchao int4 {layout}",
            "int4",
            functools.partial(_torchao_int4, layout),
            ("2:4",),
            most_tokens=256,
        )
        for layout in TORCHAO_LAYOUTS
    ),
    *map(_ours, bounds.UNPRUNED),
)
