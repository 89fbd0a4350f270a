"""Task files, the exact text of prompts, and metrics of correct choices."""

import json
import math

import pytest

from gptjax.config import UserError
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.evaluation.scoring import ScoringResult
from gptjax.evaluation.tasks import (
    Examples,
    TaskExample,
    as_blank,
    both_contexts,
    choices,
    example_task,
    last_word,
    read_examples,
)


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def asked_texts(task):
    """(context, continuation) of each request, as the model reads them."""
    decode = BytesTokenizer().decode
    return [(decode(tokens[:-scored]), decode(tokens[-scored:])) for tokens, scored in task.requests]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_task_file_is_read_as_any_text(tmp_path, encoding):
    path = tmp_path / "task.jsonl"
    path.write_bytes('{"context": "a", "continuation": "b\u2028c"}\r\n\r\n'.encode(encoding))
    assert read_examples(path).asked[0].options == (("a", " b\u2028c"),)
    path.write_bytes(b'{"text": "a b"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"task\.jsonl:2 is not UTF-8 at byte 29: convert it$"):
        read_examples(path)
    path.write_text('{"text": "a b", "score": NaN}\n')
    with pytest.raises(UserError, match=r"task\.jsonl:1 is not JSON: NaN is not a JSON value"):
        read_examples(path)


def test_the_forms_of_a_task_file(tmp_path):
    path = write(
        tmp_path / "task.jsonl",
        {"text": "Alice went to visit her friend Bob\n"},
        {"context": "2 + 2 =", "continuation": "4"},
        {"context": "The sky is", "choices": ["green", " blue"], "answer": 1},
        "",
        {"context": "A. B.", "question": "Then XXXXX ran.", "choices": ["he", "it"], "answer": "it"},
        {"choices": ["yes", "no"], "answer": 0},
    )
    examples = read_examples(path)
    assert [example.options for example in examples.asked] == [
        (("Alice went to visit her friend", " Bob"),),
        (("2 + 2 =", " 4"),),
        (("The sky is", " green"), ("The sky is", " blue")),
        (("A. B. Then ", "he ran."), ("A. B. Then ", "it ran.")),
        (("", "yes"), ("", "no")),
    ]
    assert [example.answer for example in examples.asked] == [0, 0, 1, 1, 0]
    assert [example.by_answer_prompt for example in examples.asked] == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "Expecting property name"),
        ("[1]", "not a JSON object"),
        ('{"contxt": "a"}', 'none of the fields "text", "continuation", "choices" and "prompt"'),
        ('{"text": "alone"}', "at least two words"),
        ('{"text": 3}', '"text" must be a string'),
        ('{"context": "a", "continuation": " "}', '"continuation" must be a string that is not empty'),
        ('{"choices": ["a"], "answer": 0}', "at least two strings"),
        ('{"choices": ["a", ""], "answer": 0}', "at least two strings"),
        ('{"choices": ["a", "b"]}', '"answer" must be one of the choices or its index, 0 to 1, not None'),
        ('{"choices": ["a", "b"], "answer": 2}', "0 to 1, not 2"),
        ('{"choices": ["a", "b"], "answer": true}', "not True"),
        ('{"question": "who?", "choices": ["a", "b"], "answer": 0}', "must contain XXXXX exactly once"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = write(tmp_path / "task.jsonl", {"text": "fine so far"}, line)
    with pytest.raises(UserError) as error:
        read_examples(path)
    assert str(error.value).startswith(f"{path}:2")
    assert message in str(error.value)


def test_lines_to_show_are_not_asked(tmp_path):
    shown = {"text": "only shown", "split": "fewshot"}
    examples = read_examples(write(tmp_path / "task.jsonl", {"text": "one two"}, shown, {"text": "three four"}))
    assert [example.shown for example in examples.asked] == ["one two", "three four"]
    assert [example.shown for example in examples.shots] == ["only shown"]
    without = read_examples(write(tmp_path / "task.jsonl", {"text": "one two"}, {"text": "three four"}))
    assert without.shots is without.asked


def test_a_file_with_nothing_to_ask(tmp_path):
    with pytest.raises(UserError, match="no example to evaluate"):
        read_examples(write(tmp_path / "task.jsonl", {"text": "only shown", "split": "fewshot"}))
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl: No such file"):
        read_examples(tmp_path / "none.jsonl")


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_few_shot_prompts_to_the_letter():
    shots = [choices("Q: 1 + 1?\nA:", ["2", "3"], 0)]
    asked = [choices("Q: 2 + 1?\nA:", ["2", "3"], 1)]
    task = example_task(Examples(asked, shots), BytesTokenizer(), num_fewshot=1)
    assert asked_texts(task) == [
        ("Q: 1 + 1?\nA: 2\n\nQ: 2 + 1?\nA:", " 2"),
        ("Q: 1 + 1?\nA: 2\n\nQ: 2 + 1?\nA:", " 3"),
        ("Answer:", " 2"),
        ("Answer:", " 3"),
    ]


def test_lambada_is_a_cloze_when_examples_are_shown():
    """Brown et al. 2020, section 3.1.2."""
    asked = [last_word("Alice was friends with Bob. Alice went to visit her friend Bob")]
    shots = [last_word("George bought some baseball equipment, a ball, a glove, and a bat")]
    task = example_task(Examples(asked, shots), BytesTokenizer(), num_fewshot=1, few_shot_form=as_blank)
    assert asked_texts(task) == [
        (
            "George bought some baseball equipment, a ball, a glove, and a ____. -> bat\n\n"
            "Alice was friends with Bob. Alice went to visit her friend ____. ->",
            " Bob",
        )
    ]
    zero = example_task(Examples(asked, shots), BytesTokenizer(), few_shot_form=as_blank)
    assert asked_texts(zero) == [("Alice was friends with Bob. Alice went to visit her friend", " Bob")]


def test_winograd_schemas_score_what_follows_the_choice():
    example = both_contexts("She traded her sweater since the _ was dowdy.", ["sweater", "jacket"], 0, blank="_")
    assert asked_texts(example_task(Examples([example], []), BytesTokenizer())) == [
        ("She traded her sweater since the sweater", " was dowdy."),
        ("She traded her sweater since the jacket", " was dowdy."),
    ]
    assert example.shown == "She traded her sweater since the sweater was dowdy."


def numbered(n, word="example"):
    return [TaskExample(((f"{word} {i} is", f" {i}"),)) for i in range(n)]


def test_examples_shown_are_drawn_by_seed_and_place_and_never_the_one_asked():
    own = numbered(6)
    task = example_task(Examples(own, own), BytesTokenizer(), num_fewshot=5)
    for i, (context, _) in enumerate(asked_texts(task)):
        shown = context.split("\n\n")[:-1]
        assert sorted(shown) == sorted(e.shown for j, e in enumerate(own) if j != i)

    def contexts(**settings):
        return asked_texts(example_task(Examples(own, numbered(50, "shot")), BytesTokenizer(), **settings))

    assert contexts(num_fewshot=3) == contexts(num_fewshot=3)
    assert contexts(num_fewshot=3) != contexts(num_fewshot=3, seed=1)
    assert contexts(num_fewshot=3, limit=2) == contexts(num_fewshot=3)[:2]
    assert len({context.rpartition("\n\n")[0] for context, _ in contexts(num_fewshot=3)}) == 6


def test_too_few_examples_to_show():
    own = numbered(6)
    with pytest.raises(UserError, match="--num_fewshot=6, but there are only 5 examples to show"):
        example_task(Examples(own, own), BytesTokenizer(), num_fewshot=6)
    example_task(Examples(own, numbered(6)), BytesTokenizer(), num_fewshot=6)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_each_normalisation_can_choose_differently():
    example = choices("Q", ["aa", "bbbbbbbb", "cc", "dddd"], 0)
    task = example_task(Examples([example], []), BytesTokenizer())
    asked = [
        ScoringResult(-4.0, 2, False),
        ScoringResult(-5.0, 5, False),
        ScoringResult(-3.0, 1, False),
        ScoringResult(-4.5, 3, False),
    ]
    alone = [
        ScoringResult(-5.0, 2, False),
        ScoringResult(-5.5, 5, False),
        ScoringResult(-3.5, 1, False),
        ScoringResult(-8.0, 3, False),
    ]

    def right(answer):
        moved = example_task(Examples([TaskExample(example.options, answer, True)], []), BytesTokenizer())
        return {name: measured.value for name, measured in moved.metrics(asked + alone).items()}

    names = ("accuracy", "accuracy_per_token", "accuracy_per_character", "accuracy_by_answer_prompt")
    assert set(task.metrics(asked + alone)) == set(names)
    assert [name for name in names if right(2)[name]] == ["accuracy"]  # -3 of all
    assert [name for name in names if right(1)[name]] == ["accuracy_per_token", "accuracy_per_character"]  # -1, -5/8
    assert [name for name in names if right(3)[name]] == ["accuracy_by_answer_prompt"]  # 3.5
    assert right(0) == dict.fromkeys(names, 0.0)


def test_last_words_have_accuracy_and_perplexity_per_word():
    examples = numbered(4)
    task = example_task(Examples(examples, examples), BytesTokenizer())
    scores = [
        ScoringResult(-1.0, 2, True),
        ScoringResult(-2.0, 2, False),
        ScoringResult(-3.0, 2, True),
        ScoringResult(-4.0, 2, True),
    ]
    metrics = task.metrics(scores)
    assert metrics["accuracy"].value == 0.75
    assert metrics["accuracy"].stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert metrics["perplexity"].value == pytest.approx(math.exp(2.5))
    assert metrics["perplexity"].stderr == pytest.approx(math.exp(2.5) * math.sqrt(5 / 3 / 4))


def test_one_example_has_no_standard_error():
    task = example_task(Examples(numbered(1), numbered(1)), BytesTokenizer())
    assert task.metrics([ScoringResult(-1.0, 2, True)])["accuracy"][:3] == (1.0, None, 1)
