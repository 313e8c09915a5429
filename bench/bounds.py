"""Lower bounds of an op's time, from its bytes, products and instructions.

    python -m bench.bounds [--all]                bounds on H100, H200, A100, L4 and RTX 4090
    python -m bench.bounds --csv FILE             measured times of a result file beside its bounds
    python -m bench.bounds --compile [KERNELS]    count instructions anew (Triton, no GPU needed),
                                                  of all or of those whose names begin so; for
                                                  sm_90, or what --arch says

Four limits act at once, so an op takes at least the longest of: its bytes over the memory's
bandwidth, its products over the matrix units' rate, its instructions over the issue slots
(4 schedulers × 32 lanes per multiprocessor and clock), and, where it is counted, its passes of
shared memory (one per multiprocessor and clock). Bounds are predictions, never results:
every table of this file states that.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

RESULTS = Path(__file__).parent / "results"
SLOTS = RESULTS / "compiled" / "sm_90.csv"

#: Of the data sheet's figures, what large copies and matrix products reach: an H200 copies 4.3 of
#: 4.8 TB/s and multiplies at 790 of 989 TFLOP/s. A benchmark measures its own machine's instead.
BANDWIDTH_REACHED, PRODUCTS_REACHED = 0.896, 0.8
#: Rate of mma.sync against wgmma, on Hopper alone.
MMA_SHARE = {"H100": 0.62, "H200": 0.62}
#: Rate of products of e4m3 values through mma.sync, where the tensor cores have them, against
#: 16-bit ones (float32 sums; the same data sheets). Others multiply them as 16-bit values.
FP8_SHARE = {"L4": 2.0, "RTX 4090": 2.0}


class Machine(NamedTuple):
    """A GPU's limits: bytes/s, dense bf16 FLOP/s (fp32 sums), multiprocessors, Hz."""

    name: str
    bandwidth: float
    flops: float
    processors: int = 0
    clock: float = 0.0

    @property
    def slots(self) -> float:
        """Lane instructions per second; 0 where they are not known (a CPU)."""
        return self.processors * 4 * 32 * self.clock

    @property
    def passes(self) -> float:
        """Passes of shared memory per second: one in a clock of each multiprocessor."""
        return self.processors * self.clock

    @property
    def mma_share(self) -> float:
        """Rate of mma.sync against the fastest matrix instruction."""
        return MMA_SHARE.get(self.name, 1.0)

    @property
    def fp8_share(self) -> float:
        """The same of e4m3 values."""
        return FP8_SHARE.get(self.name, self.mma_share)


def _reached(name: str, gigabytes: float, teraflops: float, processors: int, ghz: float) -> Machine:
    bandwidth, flops = gigabytes * 1e9 * BANDWIDTH_REACHED, teraflops * 1e12 * PRODUCTS_REACHED
    return Machine(name, bandwidth, flops, processors, ghz * 1e9)


#: Sources: NVIDIA's data sheets of H100 (SXM5), H200 (SXM), A100 (80 GB SXM4) and L4, and the Ada
#: architecture white paper (RTX 4090); boost clocks; matrix rates without sparsity.
MACHINES = {
    machine.name: machine
    for machine in (
        _reached("H100", 3350, 989.4, 132, 1.98),
        _reached("H200", 4800, 989.4, 132, 1.98),
        _reached("A100", 2039, 311.9, 108, 1.41),
        _reached("L4", 300, 121.0, 58, 2.04),
        _reached("RTX 4090", 1008, 165.2, 128, 2.52),
    )
}


def machine(device: str, bandwidth: float, flops: float) -> Machine:
    """The machine of a run: its measured roofs, and what is known of a device of that name."""
    known = next((m for m in MACHINES.values() if m.name in device), Machine(device, 0, 0))
    return known._replace(bandwidth=bandwidth, flops=flops)


class Cost(NamedTuple):
    """The bytes, products and instructions that an op cannot do without.

    Attributes:
        bytes: Moved through memory: every operand read once, every result written once.
        flop: Of dense products on the fastest matrix unit.
        mma_flop: Of products through mma.sync, counted as executed (2:4 executes half).
        slots: Instructions times lanes.
        passes: Of shared memory, over all multiprocessors.
        fp8_flop: Of products of e4m3 values through mma.sync, counted as executed.
    """

    bytes: float
    flop: float = 0.0
    mma_flop: float = 0.0
    slots: float = 0.0
    passes: float = 0.0
    fp8_flop: float = 0.0


class Bound(NamedTuple):
    """The least time in milliseconds, and which limit sets it."""

    ms: float
    limit: str


def bound(steps: Sequence[Cost], on: Machine) -> Bound:
    """The time that steps take at least on a machine, one after the other; the longest's limit."""
    found = [_bound(cost, on) for cost in steps]
    return Bound(sum(step.ms for step in found), max(found).limit)


def _bound(cost: Cost, on: Machine) -> Bound:
    products = cost.flop + cost.mma_flop / on.mma_share + cost.fp8_flop / on.fp8_share
    seconds = {
        "memory": cost.bytes / on.bandwidth,
        "matrix": products / on.flops,
        "issue": cost.slots / on.slots if on.slots else 0.0,
        "shared memory": cost.passes / on.passes if on.passes else 0.0,
    }
    limit = max(seconds, key=lambda name: seconds[name])
    return Bound(1000 * seconds[limit], limit)


@cache
def compiled_slots() -> dict[str, float]:
    """Instructions per element of each kernel's hot loop, from its machine code for sm_90."""
    if not SLOTS.is_file():
        return {}
    with SLOTS.open(newline="", encoding="utf-8") as file:
        return {row["kernel"]: float(row["per_element"]) for row in csv.DictReader(file)}


def slots_of(*kernels: str) -> float:
    """Instructions per element of the first of `kernels` that was compiled, or 0."""
    return next((compiled_slots()[name] for name in kernels if name in compiled_slots()), 0.0)


def packed24_bytes(rows: int, columns: int, itemsize: int = 2) -> float:
    """Bytes of a packed 2:4 weight: half of the values and a bit per weight, padded to 16 × 64."""
    padded = -(-rows // 16) * 16 * (-(-columns // 64) * 64)
    return padded * (itemsize / 2 + 1 / 8)


def quantized24_bytes(rows: int, columns: int, bits: int, group: int = 0) -> float:
    """Bytes of a packed 2:4 weight with values of so many bits and float32 scales, padded."""
    height, width = -(-rows // 16) * 16, -(-columns // 64) * 64
    groups = -(-columns // group) if group else 1
    return height * (width * (bits / 16 + 1 / 8) + 4 * groups)


def dense_quantized_bytes(
    rows: int, columns: int, bits: int, group: int = 0, *, zeros: bool = False
) -> float:
    """Bytes of a weight of which every value has so many bits, padded to 16 × 32; float32 scales,
    and zero points of a byte."""
    height, width = -(-rows // 16) * 16, -(-columns // 32) * 32
    groups = -(-columns // group) if group else 1
    return height * (width * bits / 8 + (4 + zeros) * groups)


def bitmap_bytes(rows: int, columns: int, sparsity: float) -> float:
    """Bytes of a bitmap weight with 16-bit values: a bit per weight, the non-zeros, half of the
    filling of each tile of 2048, and its start."""
    return rows * columns * (1 / 8 + 2 * (1 - sparsity) + (7 * (sparsity < 1) + 4) / 2048)


@cache
def bitmap_passes(sparsity: float) -> float:
    """Passes that shared memory takes for a weight of the bitmap's tensor-core kernel at one token.

    Of a tile of 2048: the lanes' loads of values, of which the most that meet in a bank take one
    pass each (simulated for random zeros), those of the words, the record's copy with half a line
    more at each end, and four 16-byte loads of x, which is the same for all rows.
    """
    random = np.random.default_rng(0)
    loads = size = 0.0
    tiles = 64
    for _ in range(tiles):
        used = random.random((16, 32, 4)) >= sparsity  # block, step and u; lane; h and c
        word = (used.reshape(-1).cumsum() - 1).reshape(used.shape) * 2 // 4
        size += 256 + -(-int(used.sum()) // 8) * 16
        for run in range(16):
            for element in range(4):
                words = np.unique(word[run, used[run, :, element], element])
                loads += np.bincount(words % 32, minlength=1).max() if len(words) else 1
    words, x = 4, 5
    return float(loads / tiles + words + size / tiles / 128 + 1 + x) / 2048


#: 2:4 with quantised values: the name of the compiled kernel, bits, columns of a group.
QUANTISED = {
    "24 int8": ("quantized24/mma_sp/int8", 8, 0),
    "24 fp8": ("quantized24/mma_sp/fp8", 8, 0),
    "24 int4": ("quantized24/mma_sp/int4g128", 4, 128),
}
#: The same kernel without sparsity (dense_quantized.py).
UNPRUNED = {
    "int8 mma": ("dense_quantized/mma/int8", 8, 0),
    "int4 mma": ("dense_quantized/mma/int4g128", 4, 128),
    "int4 mma g64": ("dense_quantized/mma/int4g64", 4, 64),
    "int4 mma zeros": ("dense_quantized/mma/int4g128z", 4, 128),
}
#: Columns of a group of torch's 4-bit weights.
INT4_GROUPS = {"int4": 128, "int4 g64": 64, "int4 g256": 256}
#: `2:4-fp8` weights and activations rounded to e4m3; instructions as counted on Hopper.
FP8_TOKENS = "24 fp8 x fp8"


def _counted_name(name: str, tokens: int) -> str:
    return f"{name}/bf16/t{tokens}/split"


def _tile_of(name: str, tokens: int) -> int:
    """Tokens of the smallest compiled program that takes so many at once, or of the largest."""
    counted = [t for t in (8, 16, 32, 64) if _counted_name(name, t) in compiled_slots()]
    return next((t for t in counted if t >= tokens), counted[-1] if counted else 64)


def linear(
    kind: str, M: int, N: int, K: int, sparsity: float = 0.5, itemsize: int = 2
) -> list[Cost]:
    """Steps of M tokens times a pruned (N, K) weight.

    Args:
        kind: How the weight is kept: "dense", "int8", "24 mma" (sparse tensor cores), "24
            triton" (expanded in registers), "24 expand" (expanded in memory, then dense), "24
            wgmma" (a library's kernel), "bitmap" (tensor cores), "bitmap triton" (the portable
            kernel), "bitmap expand", "csr"; of quantised values "int8" and "int4" (groups of 128;
            " g64" and " g256": of so many) for every weight, "24 int8", "24 fp8" and "24 int4"
            (groups of 128) for a 2:4 one, each of them with " expand", and what `UNPRUNED` names;
            "24 fp8 x fp8" rounds activations first.
        M: Tokens.
        N: Rows of the weight, outputs.
        K: Columns of the weight, inputs.
        sparsity: Share of zeros.
        itemsize: Bytes of a value.
    """
    ends = itemsize * (M * K + M * N)
    dense = itemsize * N * K
    products = 2.0 * M * N * K
    padded = 2.0 * (-(-M // 8) * 8) * N * K
    tokens = next((t for t in (8, 16, 32) if t >= M), 64)
    if kind == "24 mma":
        slots = slots_of(f"sparse24/mma_sp/bf16/t{tokens}/split") * N * K * -(-M // tokens)
        return [Cost(packed24_bytes(N, K, itemsize) + ends, mma_flop=padded / 2, slots=slots)]
    if kind in QUANTISED or kind in UNPRUNED:
        name, bits, group = QUANTISED.get(kind) or UNPRUNED[kind]
        # more tokens than a program has take the weight's instructions anew
        tile = _tile_of(name, M)
        slots = slots_of(_counted_name(name, tile)) * N * K * -(-M // tile)
        if kind in QUANTISED:
            held = quantized24_bytes(N, K, bits, group)
            return [Cost(held + ends, mma_flop=padded / 2, slots=slots)]
        held = dense_quantized_bytes(N, K, bits, group, zeros="zeros" in kind)
        return [Cost(held + ends, mma_flop=padded, slots=slots)]
    if kind == FP8_TOKENS:
        counted = "quantized24/fp8/f16"
        tile = _tile_of(counted, M)
        slots = slots_of(_counted_name(counted, tile)) * N * K * -(-M // tile)
        # x is read, its codes are written and read
        size = quantized24_bytes(N, K, 8) + M * K + itemsize * M * N
        rounding = Cost((itemsize + 1.0) * M * K)
        return [rounding, Cost(size, fp8_flop=padded / 2, slots=slots)]
    if kind.removesuffix(" expand") in QUANTISED:
        _, bits, group = QUANTISED[kind.removesuffix(" expand")]
        held = quantized24_bytes(N, K, bits, group)
        return [Cost(held + dense), Cost(dense + ends, products)]
    if kind == "24 triton":
        name = "m16" if M <= 16 else "m64"
        slots = slots_of(f"sparse24/portable/bf16/{name}") * N * K * -(-M // 64)
        return [Cost(packed24_bytes(N, K, itemsize) + ends, flop=padded, slots=slots)]
    if kind == "24 expand":
        return [Cost(packed24_bytes(N, K, itemsize) + dense), Cost(dense + ends, products)]
    if kind == "24 wgmma":
        return [Cost(packed24_bytes(N, K, itemsize) + ends, products / 2)]
    if kind == "bitmap triton":
        tile = next((t for t in (16, 32) if t >= M), 64)
        name = f"bitmap/portable/bf16/m{tile}"
        slots = slots_of(f"{name}/split", name, "bitmap/portable/bf16/m16") * N * K * -(-M // 64)
        return [Cost(bitmap_bytes(N, K, sparsity) + ends, mma_flop=padded, slots=slots)]
    if kind == "bitmap":
        # beyond 32 tokens the weight is expanded once for each 32
        tile = min(tokens, 32)
        blocks = -(-M // tile)
        slots = slots_of(f"bitmap/mma/bf16/t{tile}") * N * K * blocks
        passes = bitmap_passes(sparsity) * N * K * blocks
        size = bitmap_bytes(N, K, sparsity) + ends
        return [Cost(size, mma_flop=padded, slots=slots, passes=passes)]
    if kind == "bitmap expand":
        return [Cost(bitmap_bytes(N, K, sparsity) + dense), Cost(dense + ends, products)]
    weight = {
        "dense": dense,
        "int8": N * K,
        # two 16-bit numbers for each group: scale and zero point
        **{name: N * K * (1 / 2 + 4 / group) for name, group in INT4_GROUPS.items()},
        "csr": (itemsize + 4) * (1 - sparsity) * N * K,
    }[kind]
    return [Cost(weight + ends, products)]


def pair_stats(N: int, V: int, itemsize: int = 2, level: str = "core") -> list[Cost]:
    """Cost of comparing N pairs of rows of V logits; "full" reads them twice, "KL" sums less."""
    kind = "bf16" if itemsize == 2 else "fp32"
    sums = {"core": "core", "KL": "kl"}.get(level, "precise")
    slots = slots_of(f"pair_stats/{sums}/{kind}/base", f"pair_stats/{sums}/bf16/base")
    pairs = Cost(2.0 * N * V * itemsize, slots=slots * N * V)
    again = pairs._replace(
        slots=slots_of(f"pair_stats/second_pass/{kind}", "pair_stats/second_pass/bf16") * N * V
    )
    return [pairs, again] if level == "full" else [pairs]


def head_pair_stats(N: int, D: int, V: int, itemsize: int = 2) -> list[Cost]:
    """Cost of the same from (N, D) hidden states, the head read once: its products, at least."""
    return [Cost(itemsize * (V * D + 2.0 * N * D), flop=4.0 * N * D * V)]


def head_pair_loss(N: int, D: int, V: int, itemsize: int = 2) -> list[Cost]:
    """Cost of a loss of (N, D) states with both gradients: two products forward, two back."""
    return [Cost(itemsize * (2.0 * V * D + 3.0 * N * D), flop=8.0 * N * D * V)]


def vector_stats(N: int, D: int, itemsize: int = 2) -> list[Cost]:
    """Cost of comparing N pairs of vectors of D."""
    kind = "bf16" if itemsize == 2 else "fp32"
    slots = slots_of(f"vector_stats/{kind}") * N * D
    return [Cost(2.0 * N * D * itemsize, slots=slots)]


def decode_step(
    weight_bytes: float, cache_bytes: float, parameters: float, batch: int
) -> list[Cost]:
    """Cost of one token for each of `batch` sequences: every weight and the KV cache once."""
    return [Cost(weight_bytes + cache_bytes, 2.0 * parameters * batch)]


#: What the table shows: op, shape and the ways to do it.
LAYERS = {
    "8B q/o": (4096, 4096),
    "8B gate/up": (14336, 4096),
    "8B down": (4096, 14336),
    "70B gate/up": (28672, 8192),
}
KINDS = (
    *("dense", "int8", "int4", *UNPRUNED),
    *("24 mma", "24 triton", "24 expand", *QUANTISED, FP8_TOKENS, "24 int4 expand"),
    *("bitmap", "bitmap triton"),
)
SHORT_KINDS = ("dense", "24 mma", "24 int8", "24 int4", "bitmap")
Row = tuple[str, str, str, list[Cost]]


def predictions() -> list[Row]:
    """(op, shape, how, steps) of everything that the table predicts."""
    rows: list[Row] = []
    for name, (N, K) in LAYERS.items():
        for M in (1, 16, 64, 1024):
            for kind in KINDS:
                rows.append((f"linear {name}", f"M={M} N={N} K={K}", kind, linear(kind, M, N, K)))
    for itemsize, dtype in ((2, "bf16"), (4, "fp32")):
        for level in ("KL", "core", "precise", "full"):
            cost = pair_stats(2048, 152064, itemsize, level)
            rows.append(("pair_stats", "N=2048 V=152064", f"{dtype} {level}", cost))
    for N in (64, 2048):
        shape = f"N={N} D=4096 V=152064"
        rows.append(("head_pair_stats", shape, "bf16", head_pair_stats(N, 4096, 152064)))
    return rows


def telling(row: Row) -> bool:
    """Whether a row belongs to the short table: one layer's shape, bfloat16, our main kernels."""
    op, shape, how, _ = row
    if op.startswith("linear"):
        shapes = ("M=1 ", "M=64 ", "M=1024 ")
        return op == "linear 8B gate/up" and shape.startswith(shapes) and how in SHORT_KINDS
    return how in ("bf16 core", "bf16 full", "bf16")


def print_predictions(write: Callable[[str], object] = print, *, every: bool = False) -> None:
    """The table of bounds, in microseconds, with what sets each; `every` row of it or the main."""
    write("PREDICTED lower bounds in µs, from byte, product and instruction counts; nothing here")
    write("was measured. m: memory, x: matrix units, i: instruction issue sets the bound.")
    head = f"{'op':18} {'shape':24} {'how':14}"
    write(head + "".join(f"{name:>13}" for name in MACHINES))
    shown = [row for row in predictions() if every or telling(row)]
    for op, shape, how, cost in shown:
        cells = ""
        for on in MACHINES.values():
            found = bound(cost, on)
            cells += f"{1000 * found.ms:11.1f} {'x' if found.limit == 'matrix' else found.limit[0]}"
        write(f"{op:18} {shape:24} {how:14}{cells}")
    if not every:
        write(f"({len(shown)} of {len(predictions())} rows; all: python -m bench.bounds --all)")


def print_measured(path: Path, write: Callable[[str], object] = print) -> None:
    """A result file's medians beside the bounds that its own roofs set."""
    write(f"{'op':16} {'shape':30} {'provider':24} {'bound ms':>10} {'median ms':>10}  of bound")
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row.get("status", "ok") != "ok":
                write(f"{row['op']:16} {row['shape']:30} {row['provider']:24} {row['status']}")
            elif row.get("bound_ms"):
                cells = f"{float(row['bound_ms']):10.4f} {float(row['p50_ms']):10.4f}"
                share = f"{float(row['roof_pct']):5.0f} %"
                write(f"{row['op']:16} {row['shape']:30} {row['provider']:24} {cells}  {share}")


def count_instructions(begins: str, arch: int = 90) -> None:
    """Compile kernels whose names begin so, and write their instructions per element."""
    from prunekernels.compilation import compile_case, discover

    from bench import dense_quantized

    rows = []
    path = SLOTS.with_name(f"sm_{arch}.csv")
    if begins and path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [tuple(row.values()) for row in csv.DictReader(file)]
        rows = [row for row in kept if not row[0].startswith(begins)]
    for case in (*discover(), *dense_quantized.compile_cases()):
        if arch in case.archs and case.elements_per_iteration and case.name.startswith(begins):
            report = compile_case(case, arch)
            each = f"{report.instructions_per_element:.3f}"
            rows.append((case.name, each, str(report.registers)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("kernel", "per_element", "registers"), *rows])
    print(f"written: {path}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, help="a result file: measured beside the bound")
    parser.add_argument(
        "--compile", nargs="?", const="", metavar="KERNELS", help="count instructions anew"
    )
    parser.add_argument("--arch", type=int, default=90, help="what --compile compiles for")
    parser.add_argument("--all", action="store_true", help="every row, not the main ones alone")
    options = parser.parse_args()
    if options.compile is not None:
        count_instructions(options.compile, options.arch)
    if options.csv is not None:
        print_measured(options.csv)
    else:
        print_predictions(every=options.all)


if __name__ == "__main__":
    main()
