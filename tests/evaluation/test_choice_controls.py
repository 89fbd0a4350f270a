"""Baselines of multiple choice, and options without their question."""

import pytest

from gptjax.config import UserError
from gptjax.evaluation import tasks
from gptjax.evaluation.choice_controls import choice_baselines, choices_only
from gptjax.evaluation.tasks import Examples


def test_baselines():
    yes_no = [tasks.choices(f"{i}?", ["no", "yes"] if i % 2 else ["yes", "no"], i % 2) for i in range(4)]
    assert choice_baselines(yes_no) == {"random": 0.5, "majority": 1.0}  # always "yes"
    other = [tasks.choices("q", [f"{i}a", f"{i}b"], int(i > 2)) for i in range(4)]
    assert choice_baselines(other) == {"random": 0.5, "majority": 0.75}  # always the first
    mixed = [tasks.choices("q", list("abcd"), 3), tasks.choices("q", list("ab"), 0)]
    assert choice_baselines(mixed) == {"random": (1 / 4 + 1 / 2) / 2, "majority": 0.5}
    assert choice_baselines([*mixed, tasks.last_word("a b")]) == {}


def test_the_question_is_gone():
    question = tasks.choices("Question: of Rome?\nAnswer:", ["yes it is", "no it is"], 1)
    schema = tasks.both_contexts("It left the tree as the _ fell.", ["tree", "trophy"], 1, "_")
    cloze = tasks.blank_filled("A story.", "Then the XXXXX sat on a mat.", ["cat", "rat"], 0)
    found = choices_only(Examples([question, schema, cloze], [question]), "task")
    assert found.asked[0].options == (("Answer:", " yes it is"), ("Answer:", " no it is"))
    assert found.asked[1].options == (("Answer: tree", " fell."), ("Answer: trophy", " fell."))
    assert found.asked[2].options == (("Answer:", " cat"), ("Answer:", " rat"))
    assert [example.answer for example in found.asked] == [1, 1, 0]
    assert found.shots == [found.asked[0]]
    same = choices_only(Examples(asked := [question, schema], asked), "task")
    assert same.shots is same.asked
    with pytest.raises(UserError, match="some of task have none"):
        choices_only(Examples([question], [tasks.last_word("a b")]), "task")
