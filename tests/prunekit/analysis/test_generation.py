"""Generation: equals a plain greedy loop, and nothing leaks from a checkpoint's settings."""

from __future__ import annotations

import pytest
import torch

from prunekit.errors import PrunekitError
from prunekit.models import generation


def greedy(model, prompt, count, ends=(2,)):
    """Uncached, unbatched greedy decoding."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return tuple(ids[len(prompt) :])


def random_prompts(*lengths):
    draw = torch.Generator().manual_seed(11)
    return [torch.randint(3, 97, (n,), generator=draw).tolist() for n in lengths]


@torch.no_grad()
def test_equals_a_greedy_loop_in_any_batch(architecture, tiny):
    model = tiny(architecture)
    prompts = random_prompts(4, 11, 7)
    expected = [greedy(model, prompt, 8) for prompt in prompts]
    for batch_size in (1, 2, 3):
        found = generation.generate(model, prompts, max_new_tokens=8, batch_size=batch_size)
        assert [rollout.continuation for rollout in found] == expected
        assert [list(rollout.prompt) for rollout in found] == prompts


def test_own_settings_do_not_leak_and_are_restored(tiny):
    model = tiny("llama")
    prompts = random_prompts(5)
    before = generation.generate(model, prompts, max_new_tokens=12)
    own = model.generation_config
    own.repetition_penalty, own.min_length, own.do_sample, own.temperature = 5.0, 40, True, 9.0
    assert generation.generate(model, prompts, max_new_tokens=12) == before
    assert model.generation_config is own and own.repetition_penalty == 5.0


def test_stops_behind_the_end_token(tiny):
    model = tiny("llama")
    prompts = random_prompts(5, 9)
    whole = generation.generate(model, prompts, max_new_tokens=6, ends=[])
    assert [len(rollout.continuation) for rollout in whole] == [6, 6]
    end = whole[0].continuation[2]
    first = whole[0].continuation.index(end)
    stopped = generation.generate(model, prompts, max_new_tokens=6, ends=[end])
    assert stopped[0].continuation == whole[0].continuation[: first + 1]
    model.generation_config.eos_token_id = end
    assert generation.generate(model, prompts, max_new_tokens=6) == stopped


def test_sampling_is_seeded_and_leaves_the_global_generator(tiny):
    model = tiny("llama")
    prompts = random_prompts(5, 6)
    state = torch.get_rng_state()

    def sample(seed):
        options = {"max_new_tokens": 10, "temperature": 2.0, "seed": seed}
        return generation.generate(model, prompts, **options)

    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input(tiny):
    model = tiny("llama")
    with pytest.raises(PrunekitError, match=r"prompt 1 has 60 tokens and 8 more .* context is 64"):
        generation.generate(model, random_prompts(4, 60), max_new_tokens=8)
    with pytest.raises(PrunekitError, match="at least 1"):
        generation.generate(model, random_prompts(4), max_new_tokens=0)
    with pytest.raises(PrunekitError, match="negative"):
        generation.generate(model, random_prompts(4), max_new_tokens=1, temperature=-1)
    with pytest.raises(PrunekitError, match="no tokens"):
        generation.generate(model, [[]], max_new_tokens=1)


def test_chat_template_is_used_where_there_is_one(word_tokenizer):
    plain = generation.encode(word_tokenizer, ["w7 w8"])
    assert plain == [[7, 8]]
    with pytest.raises(PrunekitError, match="no chat template"):
        generation.encode(word_tokenizer, ["w7"], chat="always")
    with pytest.raises(PrunekitError, match="unknown chat 'allways': use one of auto, always"):
        generation.encode(word_tokenizer, ["w7"], chat="allways")
    word_tokenizer.chat_template = (
        "{% for m in messages %}w50 {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w51{% endif %}"
    )
    assert generation.encode(word_tokenizer, ["w7 w8"]) == [[50, 7, 8, 51]]
    assert generation.encode(word_tokenizer, ["w7 w8"], chat="never") == plain
    with pytest.raises(PrunekitError, match="prompt 1 is empty"):
        generation.encode(word_tokenizer, ["w7", "  "])


def test_an_unknown_chat_mode_is_refused(word_tokenizer):
    with pytest.raises(PrunekitError, match="unknown chat 'sometimes': use one of auto, always"):
        generation.encode(word_tokenizer, ["w5 w6"], chat="sometimes")
