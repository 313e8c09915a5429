"""KeepMasks: transformers' Trainer and PEFT's LoRA leave every zero where it is."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pruned_models import prune, refs_of
from transformers import Trainer, TrainingArguments

import prunekit as pk
from prunekit.divergence.recovery import KeepMasks
from prunekit.divergence.recovery.adapters import hold_adapters_
from prunekit.errors import PrunekitError
from prunekit.models.masks import Masks
from prunekit.pruning import Magnitude


@pytest.fixture
def pruned(tiny):
    """A function: a tiny 2:4 model, with one matrix that is dense."""

    def make(name="llama"):
        model = tiny(name)
        rules = {ref.name: Magnitude(pattern="2:4") for ref in refs_of(model)[1:]}
        prune(model, pk.Recipe(rules))
        return model

    return make


def train(model, folder, steps=3, callbacks=None, **options):
    ids = torch.randint(3, 97, (8, 12), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        learning_rate=0.05,
        weight_decay=0.1,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **{"save_strategy": "no", **options},
    )
    callbacks = [KeepMasks()] if callbacks is None else callbacks
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


def zeros(model):
    return [ref.matrix == 0 for ref in refs_of(model)]


def test_a_trainer_keeps_zeros_and_moves_the_rest(pruned, tmp_path, word_tokenizer):
    model = pruned()
    before = copy.deepcopy(model)
    train(model, tmp_path / "kept")
    for ref, other in zip(refs_of(model), refs_of(before), strict=True):
        assert torch.equal(ref.matrix == 0, other.matrix == 0), ref.name
        assert ((ref.matrix != other.matrix) == (other.matrix != 0)).float().mean() > 0.99
    pk.save(model, word_tokenizer, tmp_path / "saved")

    loose = copy.deepcopy(before)
    masks = Masks.of(loose)
    assert len(masks.keep) == len(refs_of(loose)) - 1  # the dense one is free
    masks.remember(loose)
    train(loose, tmp_path / "loose", callbacks=[])
    with pytest.raises(PrunekitError, match=r"layers\.0\.self_attn\.k_proj holds .* was pruned"):
        pk.save(loose, word_tokenizer, tmp_path / "broken")


@pytest.mark.slow
def test_a_run_that_is_resumed_keeps_zeros(pruned, tmp_path):
    model, again = pruned(), pruned()
    train(model, tmp_path, save_strategy="steps", save_steps=2)
    trainer = train(again, tmp_path, steps=1, save_strategy="no")
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    for mask, other in zip(zeros(again), zeros(pruned()), strict=True):
        assert torch.equal(mask, other)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_merged_adapters_keep_zeros(pruned, tmp_path, word_tokenizer, name):
    model = pruned(name)
    before = zeros(model)
    targets = ["c_attn", "c_proj", "c_fc"] if name == "gpt2" else ["q_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        r=4, target_modules=targets, lora_dropout=0.1, fan_in_fan_out=name == "gpt2"
    )
    adapted = get_peft_model(model, config)
    train(adapted, tmp_path / "kept")
    adapted.eval()
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(input_ids=ids).logits, wanted, atol=1e-2)
        adapted.save_pretrained(tmp_path / "adapter")
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(input_ids=ids).logits, wanted, atol=1e-4)
    for ref, mask in zip(refs_of(merged), before, strict=True):
        assert torch.equal(ref.matrix == 0, mask), ref.name
    pk.save(merged, word_tokenizer, tmp_path / "saved")

    # the adapter that was saved, put on the pruned model again
    again = pruned(name)
    masks = Masks.of(again)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    hold_adapters_(loaded, masks)
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, wanted, atol=1e-4)
        loaded.merge_adapter()
        loaded.unmerge_adapter()
        merged = loaded.merge_and_unload(safe_merge=True)
        assert torch.allclose(merged(input_ids=ids).logits, wanted, atol=1e-4)
    masks.check(merged)


def test_adapters_that_fill_zeros_are_refused(pruned, tmp_path, word_tokenizer):
    model = pruned()
    Masks.of(model).remember(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"]))
    train(adapted, tmp_path / "loose", callbacks=[])
    merged = adapted.merge_and_unload()
    with pytest.raises(PrunekitError, match=r"mlp\.up_proj holds"):
        pk.save(merged, word_tokenizer, tmp_path / "broken")
    doubtful = get_peft_model(pruned(), LoraConfig(r=2, target_modules=["up_proj"], use_dora=True))
    with pytest.raises(PrunekitError, match="no plain LoRA"):
        train(doubtful, tmp_path / "dora")


def test_packed_models_are_refused(tiny_24, tmp_path):
    model = tiny_24("llama")
    pk.swap_(model)
    with pytest.raises(PrunekitError, match="packed"):
        Masks.of(model)
