"""Questions and their answers in the layouts of public files, asked and scored."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prunekit.errors import PrunekitError
from prunekit.evaluation import answering
from prunekit.evaluation.answering import Asking, Reply, answered, answered_after
from prunekit.evaluation.questions import Question, load_questions, split_examples
from prunekit.models import generation


def written(folder, *records, name="items.jsonl"):
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(list(records)))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("record", "question", "answer"),
    [
        ({"question": "How many?", "answer": "2+3=<<2+3=5>>5\n#### 5"}, "How many?", "5"),
        ({"question": "How many?", "answer": 8.0}, "How many?", "8"),
        ({"iIndex": 1, "sQuestion": "How many?", "lSolutions": [4.0]}, "How many?", "4"),
        ({"ID": "chal-1", "Body": "Two.", "Question": "More?", "Answer": 6.5}, "Two. More?", "6.5"),
        ({"instruction": "How many?", "output": "so 7", "answer": "7"}, "How many?", "7"),
        ({"problem": "Find x.", "solution": r"$x=\boxed{9}$"}, "Find x.", "9"),
    ],
)
@pytest.mark.parametrize("name", ["items.jsonl", "items.json"])
def test_layouts_are_known_by_their_fields(tmp_path, record, question, answer, name):
    (found,) = load_questions(written(tmp_path, record, name=name))
    assert (found.question, found.answer) == (question, answer)
    assert "<<" not in found.worked and found.answer in found.worked


def test_fields_of_other_names(tmp_path):
    path = written(tmp_path, {"ask": "How many?", "gold": 3})
    with pytest.raises(PrunekitError, match=r"fields ask, gold; name them with --question-field"):
        load_questions(path)
    assert load_questions(path, question_field="ask", answer_field="gold")[0].answer == "3"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Why?", "answer": ""}, r"line 2: 'answer' holds no answer"),
        ({"question": "Why?"}, r"line 2: 'answer' holds no answer \(fields: question\)"),
        ({"question": "Why?", "answer": True}, r"line 2: 'answer' holds no answer"),
        ({"question": "Why?", "answer": "one\ntwo"}, r"marks no answer; end it with .*#### 5"),
        ({"question": " ", "answer": "1"}, r"line 2: 'question' is missing or empty"),
    ],
)
def test_an_item_that_can_not_be_scored_is_refused(tmp_path, record, message):
    with pytest.raises(PrunekitError, match=message):
        load_questions(written(tmp_path, {"question": "How?", "answer": "4"}, record))


def test_the_builtin_questions():
    found = load_questions()
    assert len(found) > 100 and len({one.question for one in found}) == len(found)
    examples, asked = split_examples(found, 8)
    assert not {one.id for one in examples} & {one.id for one in asked}
    assert len({one.topic for one in examples}) == 8
    with pytest.raises(PrunekitError, match="leave none to ask"):
        split_examples(found, len(found))


QUESTIONS = [Question(str(n), f"w{n} w{n + 1} w9", f"w{n}", f"w{n}") for n in (11, 20, 30, 41, 52)]


def test_answers_do_not_depend_on_their_batch(tiny, word_tokenizer):
    model = tiny("llama")
    alone, together = (
        answered(model, word_tokenizer, QUESTIONS, Asking(max_new_tokens=6, batch_size=size))
        for size in (1, 3)
    )
    assert alone == together
    encoded = answering.encode(word_tokenizer, QUESTIONS, Asking())
    rollouts = generation.generate(model, encoded, max_new_tokens=6)
    assert [reply.ids for reply in alone] == [one.continuation for one in rollouts]
    for reply, question in zip(alone, QUESTIONS, strict=True):
        first = reply.text.splitlines()[0]
        assert reply.given == first and reply.right == (first == question.answer)


def test_examples_stand_before_each_question_and_answers_end_at_a_break():
    asking = Asking(examples=(Question("1", "One?", "5", "It is 2 + 3 = 5"),))
    assert asking.prompts([Question("2", "Two?", "6", "6")]) == [
        "Question: One?\nAnswer: It is 2 + 3 = 5\n\nQuestion: Two?\nAnswer:"
    ]
    assert answering._end("It is 5\n\nQuestion: more") == 7
    assert answering._end("It is 5\nQuestion: more") == 7
    assert answering._end("It is 5\nor 6") is None


def test_no_questions(tiny, word_tokenizer):
    with pytest.raises(PrunekitError, match="no questions"):
        answered(tiny("llama"), word_tokenizer, [], Asking())


@pytest.mark.slow
def test_the_embedded_model_answers_what_it_is_asked():
    import prunekit as pk

    model, tokenizer = pk.load("demo")
    examples, asked = split_examples(load_questions(), 8)
    asking = Asking(tuple(examples), max_new_tokens=12, batch_size=16)
    found = answered(model, tokenizer, asked[:32], asking)
    assert sum(reply.right for reply in found) > 16
    assert all("\n\n" not in reply.text and "Question" not in reply.text for reply in found)
    # the shared prefix, read once, changes no answer
    encoded = answering.encode(tokenizer, asked[:4], asking)
    with torch.inference_mode():
        for ids, reply in zip(encoded, found, strict=False):
            logits = model(torch.tensor([[*ids, *reply.ids]])).logits[0, len(ids) - 1 : -1]
            assert logits.argmax(-1).tolist() == list(reply.ids)


@pytest.fixture(scope="module")
def letters():
    """Every sign is one token."""
    signs = [*" .\nABCPQapr:isuoe0123456789", "<end>"]
    raw = Tokenizer(models.WordLevel({sign: n for n, sign in enumerate(signs)}, unk_token="A"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


@pytest.mark.parametrize(
    ("until", "after", "right", "few"),
    [
        (" 72 ", "apples", "5", False),
        (" 72 ", "apples\n\n", "5", True),
        (" 72\n", "\n", "5", True),
        (" 72", "", "5", True),  # cut off: the next token may be another digit
        (" Paris\n", "\n", "Rome", True),
        ("\n\n 7", "", "5", True),  # empty: the break comes first
        (" Paris\n", "Question: B", "Rome", True),
    ],
)
def test_after_how_many_tokens_an_answer_is_complete(letters, until, after, right, few):
    question = Question("q", "A", right, right)
    asking = Asking((question,) if few else ())
    ids = letters.encode(until + after)
    assert len(ids) == len(until + after)
    reply = Reply((*ids, letters.eos_token_id), "", None, True)
    expected = len(until) if after else len(reply.ids)
    assert answered_after(letters, reply, question, asking) == expected
