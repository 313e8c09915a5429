"""One sample of an op's time, on a CPU or a GPU, with operands that no cache still holds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from prunekit.speed.timing import stopwatch, synchronize

Run = Callable[[], object]


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache: a GPU's L2; a generous guess for a CPU's last level."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 64 << 20


def copies_needed(operand_bytes: int, device: torch.device, most: int = 64) -> int:
    """Sets of operands to rotate among, so that one is evicted before its turn comes again.

    Twice the cache between two uses of a set; 1 where a set is that large by itself.
    """
    wanted = 2 * cache_bytes(device)
    if operand_bytes >= wanted:
        return 1
    return min(most, 1 + -(-wanted // max(1, operand_bytes)))


def sampler(
    runs: Sequence[Run], device: torch.device, *, graph: bool = True, least: float = 2e-3
) -> tuple[Callable[[], float], str]:
    """A function that times `runs` in turn and returns seconds per run.

    Args:
        runs: The same op on different sets of operands.
        device: Where they run.
        graph: On a GPU, capture them into one CUDA graph, so that launching costs nothing.
        least: Seconds that a sample lasts at least: short runs are repeated.

    Returns:
        The sampler, and how it times: "graph", "events" or "host", with the reason where a graph
        was wanted and could not be captured.
    """
    for run in runs:  # compile, load, allocate
        run()
    once = max(stopwatch(lambda: [run() for run in runs], device) / len(runs), 1e-7)
    count = max(1, round(least / once))
    turns = itertools.cycle(runs)  # goes on where the last sample stopped

    def some() -> None:
        for run in itertools.islice(turns, count):
            run()

    if device.type != "cuda":
        return lambda: stopwatch(some, device) / count, "host"
    how = "events"
    if graph:
        rounds = max(1, count // len(runs))
        try:
            replay = _captured(lambda: [run() for run in list(runs) * rounds])
        except Exception as error:  # the op synchronises, or allocates what a graph cannot
            synchronize(device)
            how = f"events (no graph: {first_line(error)})"
        else:
            return lambda: _events(replay) / (rounds * len(runs)), "graph"
    return lambda: _events(some) / count, how


def _captured(run: Run) -> Run:
    """`run` as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    captured.replay()
    return captured.replay


def _events(run: Run) -> float:
    """Seconds between two events around `run`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Bytes that one run allocates at most beside its operands; None on a CPU, where none asks."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def roofs(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> tuple[float, float]:
    """Copy bandwidth in bytes/s (read + written) and FLOP/s of products of `dtype`, measured now.

    Random operands: zeros draw less power and run faster.
    """
    on_gpu = device.type == "cuda"
    size = (1 << 31 if on_gpu else 1 << 28) >> (2 if quick else 0)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    side = (8192 if on_gpu else 1024) >> (1 if quick else 0)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    samples = 3 if quick else 10
    copy, _ = sampler([lambda: target.copy_(source)], device, graph=False)
    product, _ = sampler([lambda: torch.mm(a, b, out=out)], device, graph=False)
    # medians, as of everything else: a roof is what is reached, not the luckiest moment
    copying = sorted(copy() for _ in range(samples))[samples // 2]
    multiplying = sorted(product() for _ in range(samples))[samples // 2]
    return 2 * size / copying, 2 * side**3 / multiplying


def first_line(error: BaseException) -> str:
    """The first line of an error with its type, short enough for a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:160]
