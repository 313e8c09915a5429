"""The tokens on which pruning and dropping are calibrated.

By default the dense model writes them itself (seeded sampling), so that nothing has to be
downloaded; a local file, a Hub dataset id or token tensors serve as well. Wherever prunekit takes
a calibration, it takes a `Calibration` or the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.data import text_files
from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture
from prunekit.models.token_ids import check_ids, check_special, tokenize
from prunekit.process import distributed
from prunekit.process.progress import track

SELF = "self"
_GENERATED_TOGETHER = 32  # sequences sampled in one batch
_TOKENIZED_TOGETHER = 32  # texts tokenised in one call
_TOGETHER = 8  # sequences that run together on an accelerator
_CPU_TOKENS = 1024  # tokens that run together on a CPU: the results of more leave its caches
_POOL = 4  # windows are drawn from up to this many times the tokens that are needed


@dataclass(frozen=True)
class Calibration:
    """The source of calibration tokens, and their number.

    The defaults suit a model of about 100 M parameters on a CPU. The literature uses
    `samples=128, length=2048` on text from C4; give a file and these numbers on a GPU.

    Attributes:
        source: "self" (sampled from the model), the path of a .txt, .jsonl, .json or .parquet
            file, or a Hub dataset id (owner/name or owner/name:configuration).
        samples: Number of sequences.
        length: Tokens per sequence.
        seed: Seed of sampling and of choosing windows.
        text_field: Field or column that holds the text, for files of rows.

    Raises:
        PrunekitError: samples or length out of range.
    """

    source: str | Path = SELF
    samples: int = 16
    length: int = 256
    seed: int = 0
    text_field: str = "text"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise PrunekitError(
                f"{self.samples} samples of {self.length} tokens can't calibrate: "
                "use samples >= 1 and length >= 2"
            )


CalibrationInput: TypeAlias = Calibration | Tensor | Sequence[Tensor]


def facts(calibration: CalibrationInput) -> Any:
    """What a run that is recorded was calibrated on, as plain data."""
    if isinstance(calibration, Calibration):
        return {**asdict(calibration), "source": str(calibration.source)}
    return [torch.as_tensor(one).tolist() for one in calibration]


def tokens(
    calibration: Calibration,
    model: PreTrainedModel,
    tokenizer: Any = None,
    *,
    progress: bool = True,
) -> Tensor:
    """The token ids that `calibration` describes.

    Files: texts in seeded random order are joined with end-of-sequence tokens between them, and
    random windows that don't overlap are taken.

    Args:
        calibration: The description.
        model: The dense model: it bounds the length, and writes the text if the source is "self".
        tokenizer: Its tokenizer; not needed for "self".
        progress: Show a progress bar on a terminal.

    Returns:
        (samples, length), int64, on the CPU; the same on every process.

    Raises:
        PrunekitError: The source can't be read or holds too few tokens, the length exceeds the
            model's context, the tokenizer is missing, or it makes ids that the model's embedding
            lacks.
    """
    context = Architecture(model).context_length
    if calibration.length > context:
        raise PrunekitError(
            f"calibration length {calibration.length} exceeds the model's context of {context} "
            f"tokens: use length <= {context}"
        )
    if calibration.source == SELF:
        return _sampled(model, calibration, progress)
    if tokenizer is None:
        raise PrunekitError(
            f"calibration from '{calibration.source}' needs the tokenizer: pass tokenizer=…, or "
            "token tensors"
        )
    found = _windows(calibration, tokenizer)
    check_ids(model, found, f"calibration from '{calibration.source}'")
    return found


def sequences(
    calibration: CalibrationInput,
    model: PreTrainedModel,
    tokenizer: Any = None,
    *,
    progress: bool = True,
) -> list[Tensor]:
    """Checked calibration sequences, whatever form they were given in.

    Args:
        calibration: A description, a (samples, length) tensor, or 1-D tensors of any lengths.
        model: The model they are for.
        tokenizer: See `tokens`.
        progress: See `tokens`.

    Returns:
        1-D int64 tensors on the CPU.

    Raises:
        PrunekitError: See `tokens`; or tensors that aren't token sequences of this model.
    """
    if isinstance(calibration, Calibration):
        return list(tokens(calibration, model, tokenizer, progress=progress))
    if isinstance(calibration, str | Path) or not all(isinstance(t, Tensor) for t in calibration):
        raise PrunekitError(
            "calibration holds no token tensors: give them, or Calibration(source) for a file"
        )
    found = list(calibration)
    if isinstance(calibration, Tensor) and calibration.ndim != 2:
        raise PrunekitError(
            f"calibration tokens have shape {tuple(calibration.shape)}: give (samples, length)"
        )
    if not found:
        raise PrunekitError("calibration has no sequences: give at least one")
    context = Architecture(model).context_length
    for index, sequence in enumerate(found):
        name = f"calibration sequence {index}"
        if sequence.ndim != 1 or sequence.is_floating_point() or sequence.dtype == torch.bool:
            raise PrunekitError(
                f"{name} is {sequence.dtype} of shape {tuple(sequence.shape)}: give 1-D token ids"
            )
        if not 1 <= len(sequence) <= context:
            raise PrunekitError(
                f"{name} has {len(sequence)} tokens: give 1 to {context}, the model's context"
            )
        check_ids(model, sequence, name)
    return [sequence.to("cpu", torch.int64) for sequence in found]


def batches(
    sequences: Sequence[Tensor] | Tensor, batch_size: int | None, device: torch.device
) -> list[Tensor]:
    """Stack sequences of equal length, so that no batch needs padding.

    Args:
        sequences: 1-D tensors, or one (samples, length) tensor.
        batch_size: Most sequences per batch. None: 8 on an accelerator, and on a CPU as many as
            make 1024 tokens, which are as fast as more and hold less memory.
        device: Where they will run.

    Returns:
        (up to batch_size, length) tensors; lengths in order of first appearance.
    """
    if batch_size is not None and batch_size < 1:
        raise PrunekitError(f"batch_size {batch_size} is too small: use at least 1")
    by_length: dict[int, list[Tensor]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence), []).append(sequence)
    found = []
    for length, same in by_length.items():
        usual = max(1, _CPU_TOKENS // length) if device.type == "cpu" else _TOGETHER
        step = batch_size or usual
        found += [torch.stack(same[i : i + step]) for i in range(0, len(same), step)]
    return found


def _sampled(model: PreTrainedModel, calibration: Calibration, progress: bool) -> Tensor:
    """Text that the model writes itself at temperature 1; process 0 writes, all get it."""
    device = model.get_input_embeddings().weight.device
    shape = (calibration.samples, calibration.length)
    written = torch.zeros(shape, dtype=torch.int64, device=device)
    if distributed.is_main():
        generator = torch.Generator().manual_seed(calibration.seed)
        starts = range(0, calibration.samples, _GENERATED_TOGETHER)
        steps = [(start, position) for start in starts for position in range(1, calibration.length)]
        logits_after = _Decoder(model)
        for start, position in track(steps, "sampling calibration text", enabled=progress):
            part = written[start : start + _GENERATED_TOGETHER]
            if position == 1:
                part[:, 0] = _first_tokens(model, len(part), generator)
            logits = logits_after(part[:, :position])
            part[:, position] = _sample(logits, generator)
    return distributed.all_reduce_(written).cpu()


class _Decoder:
    """Next-token logits of growing sequences, through the model's KV cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache: Any = None

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (batch, vocabulary) after `ids`; one token starts a new batch of sequences."""
        if ids.shape[1] == 1:
            self.cache = None
        out = self.model(input_ids=ids[:, -1:], past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits


def _first_tokens(model: PreTrainedModel, count: int, generator: torch.Generator) -> Tensor:
    """The tokens that documents start after: beginning- or end-of-sequence, else random ones."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(model.config, name, None)
        if token is not None:
            first = token[0] if isinstance(token, list) else token
            check_special(model, name, [first])
            return torch.full((count,), first)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (count,), generator=generator)


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row of `logits` (batch, vocabulary), by inverting the distribution function.

    One uniform number per row from a CPU generator: the draw is the same on every device, up to
    the rounding of the logits.
    """
    cumulative = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator)
    threshold = uniform.to(logits.device) * cumulative[:, -1:]
    # right=True skips leading tokens of probability 0 when the draw is exactly 0
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return drawn.clamp_(max=logits.shape[-1] - 1)


def _windows(calibration: Calibration, tokenizer: Any) -> Tensor:
    """Random non-overlapping windows of a source's text."""
    samples, length = calibration.samples, calibration.length
    documents = text_files.read(
        str(calibration.source), text_field=calibration.text_field, seed=calibration.seed
    )
    pool: list[int] = []
    pending: list[str] = []
    for text in documents:
        pending.append(text)
        if len(pending) == _TOKENIZED_TOGETHER:
            pool += _tokenize(pending, tokenizer)
            pending = []
            if len(pool) >= _POOL * samples * length:
                break
    if pending:
        pool += _tokenize(pending, tokenizer)
    available = len(pool) // length
    if available < samples:
        fixes = [f"samples <= {available}"] if available else []
        fixes += [f"length <= {len(pool) // samples}"] if len(pool) >= 2 * samples else []
        raise PrunekitError(
            f"'{calibration.source}' holds {len(pool)} tokens, and {samples} samples of {length} "
            f"need {samples * length}: use {', or '.join([*fixes, 'more text'])}"
        )
    generator = torch.Generator().manual_seed(calibration.seed)
    slack = len(pool) - available * length
    offset = int(torch.randint(slack + 1, (), generator=generator))
    chosen = torch.randperm(available, generator=generator)[:samples]
    aligned = torch.tensor(pool[offset : offset + available * length]).view(available, length)
    return aligned[chosen]


def _tokenize(documents: Sequence[str], tokenizer: Any) -> list[int]:
    """Token ids of the texts, each followed by the end-of-sequence token if there is one."""
    options = {"add_special_tokens": False, "verbose": False}
    encoded = tokenize(tokenizer, documents, **options)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [token for ids in encoded for token in [*ids, *end]]
