"""The ways to multiply with a pruned weight: ours, torch's, and other people's packages.

An adapter builds a layer from a dense (N, K) weight that holds the zeros. What is not installed,
or cannot run on this machine, raises Absent with what would help; that becomes a row.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import prunekernels
import torch
import torch.nn.functional as F
from prunekernels import runtime
from torch import Tensor

from bench.harness import Absent, refusable

PATTERNS = ("2:4", "unstructured")


class Layer(NamedTuple):
    """A weight in some format.

    Attributes:
        apply: (M, K) activations to (M, N) outputs.
        held: Bytes that the format keeps.
        exact: The weight it really multiplies with, where it rounds values (int8).
        kind: Its cost at given activations, where that depends on them (else its peer's).
        takes: Type of its activations, where it takes one alone.
        rounds: What it rounds activations to, float64, where it does.
        note: What the results should say about it, such as a library's version.
    """

    apply: Callable[[Tensor], Tensor]
    held: int
    exact: Tensor | None = None
    kind: Callable[[Tensor], str] | None = None
    takes: torch.dtype | None = None
    rounds: Callable[[Tensor], Tensor] | None = None
    note: str = ""


@dataclass(frozen=True)
class LinearPeer:
    """One way to run a pruned linear layer.

    Attributes:
        name: Provider name in the results.
        kind: Its cost, by the names of `model.linear`.
        build: From the dense weight with zeros and the largest M; raises Absent.
        patterns: Which sparsity patterns it is for.
        most_tokens: Largest M it is measured at.
        few: Measured at a few M and shapes only, because each takes long to compile.
        graph: Whether a CUDA graph can hold it.
    """

    name: str
    kind: str
    build: Callable[[Tensor, int], Layer]
    patterns: tuple[str, ...] = PATTERNS
    most_tokens: int = 1 << 30
    few: bool = False
    graph: bool = True


def package(name: str, install: str) -> Any:
    """An importable module; raises Absent with what installs it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        what = "not installed" if error.name == top else f"needs {error.name}"
        raise Absent(f"{top}: {what}; {install}") from error
    except Exception as error:  # half-installed packages fail in every way
        raise Absent(f"{name}: {error!r:.120}; {install}") from error


def need_gpu(weight: Tensor, why: str = "runs on an NVIDIA GPU") -> None:
    """Raise Absent unless the weight is on one."""
    if weight.device.type != "cuda":
        raise Absent(why)


def size(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _dense(weight: Tensor, tokens: int) -> Layer:
    return Layer(lambda x: F.linear(x, weight), size(weight))


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by torch.compile with its tuning, once per shape whatever the operands.

    Whole, because then dynamo raises where it would otherwise run eager code in silence: at what it
    cannot compile, and at the ninth shape since `torch._dynamo.reset()`.
    """
    # the harness captures graphs itself; one inside another cannot be
    mode = "max-autotune-no-cudagraphs"
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x·Wᵀ, to be compiled."""
    return F.linear(x, weight)


def _compiled(weight: Tensor, tokens: int) -> Layer:
    need_gpu(weight, "measured on an NVIDIA GPU only")
    return Layer(lambda x: compiled(product)(x, weight), size(weight))


def _packed(form: str, impl: str, weight: Tensor, tokens: int) -> Layer:
    """One of our formats, by one of its implementations."""
    pack, linear, op, kinds = PACKED_FORMATS[form]

    def chosen(m: int) -> str:
        problem = runtime.Problem(weight.device, weight.dtype, (m, *weight.shape))
        return runtime.ops()[op].select(problem, impl).name

    refusable(chosen)(min(tokens, 8))
    packed = pack(weight)

    def kind(x: Tensor) -> str:
        return kinds.get(chosen(x.shape[0]), kinds["else"])

    # a format that rounds is judged by the weight that it then has
    exact = None if packed.exact else packed.to(dtype=torch.float32).to_dense()
    return Layer(lambda x: linear(x, packed, impl=impl), packed.nbytes, exact, kind=kind)


#: Our formats: packing, product, the op's name, and what an implementation costs.
PACKED_FORMATS: dict[str, Any] = {
    "2:4": (
        prunekernels.sparse24_pack,
        prunekernels.sparse24_linear,
        "sparse24_linear",
        {
            "eager": "24 expand",
            "triton": "24 triton",
            "wgmma_sp": "24 wgmma",
            "wgmma_tma": "24 wgmma",
            "else": "24 mma",
        },
    ),
    "bitmap": (
        prunekernels.bitmap_pack,
        prunekernels.bitmap_linear,
        "bitmap_linear",
        {"eager": "bitmap expand", "triton": "bitmap triton", "else": "bitmap"},
    ),
    **{
        name: (
            functools.partial(prunekernels.quantized24_round, kind=name),
            prunekernels.quantized24_linear,
            "quantized24_linear",
            {"eager": f"24 {name[4:]} expand", "else": f"24 {name[4:]}"},
        )
        for name in ("2:4-int8", "2:4-fp8", "2:4-int4")
    },
    "2:4-fp8 x fp8": (
        functools.partial(prunekernels.quantized24_round, kind="2:4-fp8"),
        prunekernels.quantized24_fp8_linear,
        "quantized24_fp8_linear",
        {"else": "24 fp8 x fp8"},
    ),
}


def rounded_tokens(x: Tensor) -> Tensor:
    """What activations are as e4m3 values with a scale for each token, float64."""
    codes, scales = prunekernels.quantize_tokens(x)
    return codes.double() * scales.double()[..., None]


def _fp8_tokens(weight: Tensor, tokens: int) -> Layer:
    """Weights and activations in e4m3; judged by the activations that it then has."""
    return _packed("2:4-fp8 x fp8", "mma_sp", weight, tokens)._replace(rounds=rounded_tokens)


def _semi_structured(backend: str, weight: Tensor, tokens: int) -> Layer:
    """torch's 2:4 subclass with its cuSPARSELt or CUTLASS backend, as its tutorial uses it."""
    need_gpu(weight)
    from torch.sparse import semi_structured as semi

    if backend == "cusparselt" and not torch.backends.cusparselt.is_available():
        raise Absent("cuSPARSELt: this torch was built without it; install a CUDA wheel of torch")
    kinds = {
        "cusparselt": semi.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": semi.SparseSemiStructuredTensorCUTLASS,
    }
    packed = kinds[backend].from_dense(weight)
    inner = [t for t in (packed.packed, packed.meta) if t is not None]
    note = _cusparselt_version() if backend == "cusparselt" else ""
    return Layer(lambda x: F.linear(x, packed), size(*inner), note=note)


def _cusparselt_version() -> str:
    """The library that torch loaded: its wheel's, or what LD_LIBRARY_PATH names first."""
    return f"cuSPARSELt {torch.backends.cusparselt.version()}"


#: What cuSPARSELt's search chose for a shape (N, K, M, dtype): searching takes long.
_searched: dict[tuple[int, int, int, torch.dtype], tuple[int, ...]] = {}


def _search(packed: Tensor, x: Tensor) -> tuple[int, ...]:
    """The fastest algorithm for (M, K) activations; with it, where torch tells, how it splits K."""
    library = getattr(torch._C, "_cusparselt", None)
    if hasattr(library, "mm_search"):
        found = library.mm_search(packed, x.t(), None, None, None, True)
        return tuple(int(value) for value in found[:3])
    return (torch._cslt_sparse_mm_search(packed, x.t(), transpose_result=True),)


def _cusparselt_best(weight: Tensor, tokens: int) -> Layer:
    """cuSPARSELt with the fastest algorithm for each M, its transpose fused."""
    need_gpu(weight)
    if not torch.backends.cusparselt.is_available():
        raise Absent("cuSPARSELt: this torch was built without it; install a CUDA wheel of torch")
    packed = torch._cslt_compress(weight)
    rows, columns = weight.shape

    def apply(x: Tensor) -> Tensor:
        # the library wants multiples of 8 tokens (16-bit values)
        padded = max(16, -(-x.shape[0] // 8) * 8)
        wide = F.pad(x, (0, 0, 0, padded - x.shape[0])) if x.shape[0] < padded else x
        key = (rows, columns, padded, x.dtype)
        if key not in _searched:
            _searched[key] = _search(packed, wide)
        # bias, alpha, type of the result, its transposition, then what was found
        out = torch._cslt_sparse_mm(packed, wide.t(), None, None, None, True, *_searched[key])
        return out[: x.shape[0]]

    return Layer(apply, size(packed), note=_cusparselt_version())


def _tilelang(weight: Tensor, tokens: int) -> Layer:
    """TileLang's own sparse tensor-core product."""
    need_gpu(weight)
    from bench.tilelang_peer import Product

    product = Product(package("tilelang", "pip install tilelang"), weight)
    return Layer(product, product.held)


def _csr(weight: Tensor, tokens: int) -> Layer:
    need_16_bit_sparse(weight)
    sparse = weight.to_sparse_csr()
    held = size(sparse.values(), sparse.crow_indices(), sparse.col_indices())
    return Layer(lambda x: (sparse @ x.t()).t(), held)


def _bsr(weight: Tensor, tokens: int) -> Layer:
    """Blocks of 16×16: zeros inside a block stay, so only block sparsity gains."""
    need_16_bit_sparse(weight)
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        raise Absent("BSR: 16×16 blocks need a shape of multiples of 16")
    sparse = weight.to_sparse_bsr((16, 16))
    held = size(sparse.values(), sparse.crow_indices(), sparse.col_indices())
    return Layer(lambda x: F.linear(x, sparse), held)


def need_16_bit_sparse(weight: Tensor) -> None:
    """Raise Absent on a CPU: torch has no product of 16-bit CSR or BSR there."""
    if weight.device.type == "cpu" and weight.dtype != torch.float32:
        raise Absent(f"torch multiplies no {weight.dtype} CSR or BSR weight on a CPU")


def _macko(weight: Tensor, tokens: int) -> Layer:
    """MACKO's sparse matrix × vector in float16, the one type it has.

    Written against its published interface: `compress` of a contiguous matrix, `multiply` with a
    contiguous vector. It has never run here.
    """
    need_gpu(weight)
    from torch.utils import cpp_extension

    # importing it compiles it, and fails unless it is told where
    os.environ.setdefault("MACKO_SPMV_BUILD_DIRECTORY", cpp_extension.get_default_build_root())
    macko = package("macko_spmv", "build it from its authors' repository (vlejd/macko_spmv)")
    exact = weight.half().contiguous()
    packed = macko.compress(exact)
    held = size(*(part for part in packed if isinstance(part, Tensor)))
    return Layer(lambda x: macko.multiply(packed, x[0])[None], held, exact, takes=torch.float16)


def _two_four(weight: Tensor, tokens: int) -> Layer:
    """The layer pruned 2:4 instead, whatever its sparsity; judged by the weight it then has."""
    pruned = weight * prunekernels.nm_mask(weight.abs(), 2, 4)
    return _packed("2:4", "auto", pruned, tokens)._replace(exact=pruned)


def _spinfer(weight: Tensor, tokens: int) -> Layer:
    raise Absent(
        "SpInfer: a CUDA program without Python bindings; build it from its authors' repository "
        "and run its own benchmark at these shapes"
    )


def _ours(form: str, impls: Sequence[str], patterns: tuple[str, ...]) -> Iterator[LinearPeer]:
    """A peer per implementation of a format; the kernels are for few tokens."""
    for impl in impls:
        name = f"{form} {'expand' if impl == 'eager' else impl}"
        few_tokens = 1 << 30 if impl in ("auto", "eager", "wgmma_sp", "wgmma_tma") else 256
        build = functools.partial(_packed, form, impl)
        yield LinearPeer(name, "dense", build, patterns, few_tokens)


def _semi(backend: str) -> Callable[[Tensor, int], Layer]:
    return functools.partial(_semi_structured, backend)


#: Every way that is measured, dense first; those that quantise alone are `quantized_peers`.
LINEAR = (
    LinearPeer("dense", "dense", _dense),
    LinearPeer("torch.compile", "dense", _compiled, ("2:4",), few=True),
    *_ours("2:4", runtime.ops()["sparse24_linear"].impls, ("2:4",)),
    *(
        peer
        for name in ("2:4-int8", "2:4-fp8", "2:4-int4")
        for peer in _ours(name, ("auto", "mma_sp"), ("2:4",))
    ),
    LinearPeer("2:4-fp8 x fp8 mma_sp", "24 fp8 x fp8", _fp8_tokens, ("2:4",)),
    *_ours("bitmap", runtime.ops()["bitmap_linear"].impls, PATTERNS),
    LinearPeer("cuSPARSELt", "24 wgmma", _semi("cusparselt"), ("2:4",)),
    LinearPeer("cuSPARSELt best", "24 wgmma", _cusparselt_best, ("2:4",)),
    LinearPeer("CUTLASS 2:4", "24 wgmma", _semi("cutlass"), ("2:4",)),
    LinearPeer("TileLang gemm_sp", "24 wgmma", _tilelang, ("2:4",), few=True),
    LinearPeer("torch CSR", "csr", _csr, most_tokens=256),
    LinearPeer("torch BSR", "dense", _bsr, most_tokens=256),
    LinearPeer("2:4 instead", "dense", _two_four, ("unstructured",)),
    LinearPeer("MACKO", "bitmap", _macko, ("unstructured",), 1),
    LinearPeer("SpInfer", "bitmap", _spinfer, ("unstructured",), 64),
)
