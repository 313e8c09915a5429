"""Answer options: every number against a plain float64 evaluation of the models' logits."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from prunekit.analysis.subspace import option_tokens, question_ids, rank_agreement, subspace
from prunekit.errors import PrunekitError
from prunekit.evaluation.items import Choice

CHOICES = [
    Choice("a", "w5 w6 w7", ("w10", "w11", "w12", "w13"), 2),
    Choice("b", "w8", ("w20", "w21 w22", "w23", "w24"), 0),
    Choice("c", "w30 w31 w32 w33", ("w40", "w41"), 1),
    Choice("d", "w9 w14", ("w10", "w60", "w12", "w13"), 3),
]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_equals_plain_evaluation(tiny, word_tokenizer, perturbed, name):
    model = tiny(name)
    pruned = perturbed(model)
    found = subspace(model, pruned, word_tokenizer, CHOICES, temperature=0.8, batch_size=2)
    assert found.tokens == ("A", "B", "C", "D") and found.token_ids == (93, 94, 95, 96)
    assert [item.id for item in found.items] == ["a", "b", "c", "d"]
    assert found.grid.labels["prompt"] == [0, 1, 2, 3]
    for index, (choice, item) in enumerate(zip(CHOICES, found.items, strict=True)):
        ids = torch.tensor(question_ids(word_tokenizer, [choice]))
        z = [m(ids).logits[0, -1].double() / 0.8 for m in (model, pruned)]
        options = list(found.token_ids[: len(choice.options)])
        p, q = (row.softmax(-1) for row in z)
        ps, qs = (row[options].softmax(-1) for row in z)
        expected = {
            "kl_dense_pruned": (p * (p / q).log()).sum(),
            "p_cosine": torch.cosine_similarity(p, q, dim=-1),
            "subset_kl_dense_pruned": (ps * (ps / qs).log()).sum(),
            "subset_kl_pruned_dense": (qs * (qs / ps).log()).sum(),
            "subset_p_cosine": torch.cosine_similarity(ps, qs, dim=-1),
            "subset_p_one_minus_cosine": 1 - torch.cosine_similarity(ps, qs, dim=-1),
            "subset_z_cosine": torch.cosine_similarity(z[0][options], z[1][options], dim=-1),
            "outside_dense": 1 - p[options].sum(),
            "outside_pruned": 1 - q[options].sum(),
            "correct_dense": float(ps.argmax() == choice.answer),
            "correct_pruned": float(qs.argmax() == choice.answer),
            "agreement": float(ps.argmax() == qs.argmax()),
            "nll_dense": -p[options[choice.answer]].log(),
        }
        for metric, value in expected.items():
            ours = found.grid[metric][index]
            assert ours == pytest.approx(float(value), rel=1e-3, abs=2e-6), (metric, index)
        assert item.logprobs_dense == pytest.approx(p[options].log().tolist(), rel=1e-4)
        assert item.logprobs_pruned == pytest.approx(q[options].log().tolist(), rel=1e-4)
        assert [token.id for token in item.top_pruned] == q.topk(5).indices.tolist()


def test_questions_are_asked_where_the_model_answers(word_tokenizer):
    asked = f"{CHOICES[2].question}\nA. w40\nB. w41"
    plain = word_tokenizer(f"{asked}\nAnswer:")["input_ids"]
    assert question_ids(word_tokenizer, CHOICES[2:3]) == [plain]
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m['content'] }} w2{% endfor %}"
        "{% if add_generation_prompt %} w3 {% endif %}"
    )
    turn = f"w1 {asked}\nAnswer with the letter of the right option. w2 w3 Answer:"
    wanted = tokenizer(turn, add_special_tokens=False)["input_ids"]
    assert question_ids(tokenizer, CHOICES[2:3]) == [wanted] and wanted != plain
    assert question_ids(tokenizer, CHOICES[2:3], chat="never") == [plain]


def test_rank_agreement_by_hand():
    a = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 3]])
    b = np.array([[1.0, 2, 3, 4], [4, 3, 2, 1], [2, 1, 3, 4], [1, 2, 3, 4]])
    kendall, spearman = rank_agreement(a, b)
    # One swapped neighbour: five of six pairs agree; d = (1, 1, 0, 0). A tie counts for neither.
    np.testing.assert_allclose(kendall, [1, -1, 4 / 6, 5 / 6])
    np.testing.assert_allclose(spearman, [1, -1, 1 - 6 * 2 / 60, 4.5 / np.sqrt(4.5 * 5)])


def test_option_tokens(word_tokenizer):
    assert option_tokens(word_tokenizer, 3) == (93, 94, 95)
    assert option_tokens(word_tokenizer, 2, ["w7", "w9", "w8"]) == (7, 9)
    assert option_tokens(word_tokenizer, 2, [12, 4]) == (12, 4)
    with pytest.raises(PrunekitError, match="'w7 w8' is not a single token"):
        option_tokens(word_tokenizer, 2, ["w7 w8", "w9"])
    with pytest.raises(PrunekitError, match="2 different option tokens for questions of 3"):
        option_tokens(word_tokenizer, 3, [4, 5])
    with pytest.raises(PrunekitError, match="2 different option tokens"):
        option_tokens(word_tokenizer, 3, [4, 5, 5])
    with pytest.raises(PrunekitError, match="at most 26"):
        option_tokens(word_tokenizer, 27)


def test_no_questions_and_too_long_ones(tiny, word_tokenizer):
    model = tiny("llama")
    with pytest.raises(PrunekitError, match="no multiple-choice questions"):
        subspace(model, model, word_tokenizer, [])
    long = Choice("long", "w5 " * 70, ("w6", "w7"), 0)
    with pytest.raises(PrunekitError, match="context is 64"):
        subspace(model, model, word_tokenizer, [long])
