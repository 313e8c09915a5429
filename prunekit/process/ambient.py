"""Torch's process-wide settings, set aside while prunekit works.

`torch.set_default_dtype`, `torch.set_default_device`, `with torch.device(…)`, `torch.autocast` and
`torch.inference_mode` change what every line of torch means, in code that was never written for
them: sums in bfloat16, tensors on the wrong device, weights that can't be trained. Every entry
point of prunekit therefore runs under the usual settings, and gives the same numbers whatever the
caller's are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_CPU = torch.device("cpu")


@contextlib.contextmanager
def usual_torch() -> Iterator[None]:
    """Run a block, or as a decorator a function, under torch's usual settings.

    Default type float32, default device CPU, no autocast, no inference mode; the caller's settings
    are back afterwards. A function that wants inference mode enters it inside.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        if torch.get_default_device() != _CPU:
            stack.enter_context(_CPU)
        for device in _autocasting():
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        yield


def _autocasting() -> list[str]:
    """Types of the devices on which autocast is on."""
    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return [device for device in devices if torch.is_autocast_enabled(device)]
