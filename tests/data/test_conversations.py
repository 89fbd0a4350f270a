"""Conversations and rankings: all formats give the same result, and errors name the file and line."""

import itertools
import json
import re

import pytest
import tensorflow_datasets as tfds

from gptjax.config import UserError
from gptjax.data import conversations as module
from gptjax.data.conversations import (
    Conversation,
    Message,
    Ranking,
    hold_out,
    random_rankings,
    read_conversations,
    read_prompts,
    read_rankings,
)

HELLO = (Message("system", "Be kind."), Message("user", "Hello"), Message("assistant", "Hi!"))
OPENAI = [{"role": message.role, "content": message.content} for message in HELLO]
SHAREGPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hello"},
    {"from": "gpt", "value": "Hi!"},
]


@pytest.fixture
def jsonl(tmp_path):
    def write(*records) -> str:
        path = tmp_path / "chats.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return f"jsonl:{path}"

    return write


def test_both_forms_are_the_same_conversation(jsonl):
    spec = jsonl({"messages": OPENAI}, {"conversations": SHAREGPT, "id": 7})
    first, second = read_conversations(spec)
    assert first.messages == second.messages == HELLO
    assert (first.place[-2:], second.place[-2:]) == (":1", ":2")


USER, ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}
NAMES = ("System", "User", "bard")
PARTS = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]


@pytest.mark.parametrize(
    "record",
    [
        {"system": "Be kind.", "conversations": SHAREGPT[1:]},
        {"system_prompt": "Be kind.", "messages": [USER, ASSISTANT]},
        {"system": "Be kind.", "conversations": SHAREGPT},
        {"system": "", "messages": OPENAI},
        {"messages": None, "conversations": SHAREGPT},
        {"messages": OPENAI, "conversations": []},
        {"conversations": OPENAI},
        {"conversations": [{"from": name, "value": m.content} for name, m in zip(NAMES, HELLO, strict=True)]},
        {"messages": [{"role": "developer", "content": "Be kind."}, USER, ASSISTANT]},
        {"messages": [OPENAI[0], {"role": "user", "content": PARTS}, ASSISTANT], "id": 3, "prompt": ""},
        {"system": "Be kind.", "instruction": "Hello", "input": "", "output": "Hi!"},
        {"system": "Be kind.", "prompt": "Hello", "completion": "Hi!"},
        {"prompt": OPENAI[:2], "completion": [ASSISTANT]},
    ],
)
def test_common_forms_are_the_same_conversation(jsonl, record):
    (read,) = read_conversations(jsonl(record))
    assert read.messages == HELLO
    (prompt,) = read_prompts(jsonl(record))
    assert (prompt.messages, prompt.reference) == (HELLO[:2], "Hi!")


def test_alpaca_inputs_and_earlier_turns(jsonl):
    record = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hello", "Hi!"]]}
    (read,) = read_conversations(jsonl(record))
    assert [message.content for message in read.messages] == ["Hello", "Hi!", "Add.\n\n1 2", "3"]


def test_an_empty_system_message_is_none(jsonl):
    (read,) = read_conversations(jsonl({"messages": [{"role": "system", "content": " "}, USER, ASSISTANT]}))
    assert read.messages == HELLO[1:]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": OPENAI, "conversations": SHAREGPT}, "has messages and conversations, two forms"),
        ({"messages": OPENAI, "prompt": "Hello", "completion": "Hi!"}, "has messages and prompt, two forms"),
        ({"system": "Be brief.", "messages": OPENAI}, "has system and a different system message"),
        ({"system": 3, "messages": OPENAI[1:]}, "system: the content is not a text"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "is a ranking"),
        ({"messages": OPENAI, "tools": [{"type": "function"}]}, "has tools, but tool calls are not supported"),
    ],
)
def test_records_that_say_two_things_are_refused(jsonl, record, message):
    with pytest.raises(UserError, match=f"chats.jsonl:1.*{message}"):
        read_conversations(jsonl(record))


def test_a_question_at_the_end_is_left_out(jsonl):
    spec = jsonl({"messages": [*OPENAI, {"role": "user", "content": "And you?"}]})
    assert read_conversations(spec)[0].messages == HELLO


def test_any_order_of_roles_is_read_or_refused(tmp_path):
    path = tmp_path / "chats.jsonl"
    for length in range(6):
        for roles in itertools.product(("system", "user", "assistant"), repeat=length):
            path.write_text(json.dumps({"messages": [{"role": role, "content": role} for role in roles]}))
            letters = "".join(role[0] for role in roles)
            if re.fullmatch("s?(ua)+u?", letters):
                (read,) = read_conversations(f"jsonl:{path}")
                assert [message.role for message in read.messages] == list(roles[: letters.rindex("a") + 1])
            else:
                with pytest.raises(UserError, match=rf"^{re.escape(str(path))}:1"):
                    read_conversations(f"jsonl:{path}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_files_may_be_compressed_and_have_blank_lines(name, write):
    path = write(name, {"messages": OPENAI}, " \n", {"messages": OPENAI})
    assert [c.place for c in read_conversations(f"jsonl:{path}")] == [f"{path}:1", f"{path}:3"]


def test_bytes_that_are_no_text_are_refused_or_replaced(write):
    path = write("a.jsonl", {"messages": OPENAI}, json.dumps({"messages": OPENAI}).encode().replace(b"Hi", b"H\xff"))
    with pytest.raises(UserError, match=r"a\.jsonl:2 is not UTF-8"):
        read_conversations(f"jsonl:{path}")
    assert read_conversations(f"jsonl:{path}", invalid_utf8="replace")[1].messages[2].content == "H\ufffd!"
    path = write("b.jsonl", b'{"prompt": "\xff", "ranking": ["a", "b"]}')
    assert read_rankings(f"jsonl:{path}", invalid_utf8="replace")[0].prompt == (Message("user", "\ufffd"),)
    with pytest.raises(UserError, match=r"b\.jsonl:1 is not UTF-8"):
        read_rankings(f"jsonl:{path}")


def test_half_of_a_character_becomes_a_sign_that_utf8_can_hold(write):
    content = '"\\ud83d\\ude00 \\ud83d"'
    path = write("a.jsonl", f'{{"prompt": {content}, "chosen": "a", "rejected": "b"}}')
    assert read_rankings(f"jsonl:{path}")[0].prompt[0].content == "😀 \ufffd"


class TinyChats(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = {
            "messages": tfds.features.Sequence({"role": text, "content": text}),
            "ranking": tfds.features.Sequence(text),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(OPENAI), "test": self._generate_examples(OPENAI[:2])}

    def _generate_examples(self, messages):
        yield 0, {"messages": messages, "ranking": ["Grüezi!", "No."]}


def test_a_dataset_as_tensorflow_datasets_reads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert read_conversations("tfds:tiny_chats") == [Conversation(HELLO, "example 0 of tfds:tiny_chats")]
    spec = "tfds:tiny_chats@test"
    assert read_rankings(spec) == [Ranking(HELLO[:2], ("Grüezi!", "No."), f"example 0 of {spec}")]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "tool", "content": "x"}], r"chats.jsonl:2: messages\[0\] has the role 'tool', but tool calls"),
        ([{"role": "narrator", "content": "x"}], r"messages\[0\] has the unknown role 'narrator': one of system, "),
        ([OPENAI[1], {"role": "assistant", "content": None}], r"messages\[1\]: the content is null"),
        ([OPENAI[1], {"role": "assistant", "content": None, "tool_calls": [{}]}], r"messages\[1\] has tool_calls"),
        ([OPENAI[1], OPENAI[2] | {"reasoning_content": "hm"}], r"messages\[1\] has reasoning_content"),
        ([OPENAI[1], OPENAI[2] | {"weight": 0}], r"messages\[1\] has weight 0"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"an image is 'None'"),
        ([*OPENAI, OPENAI[2]], r"chats.jsonl:2: message 3 has role assistant after one with role assistant"),
        ([OPENAI[1], OPENAI[1]], r"chats.jsonl:2: message 1 has role user after one with role user"),
        ([OPENAI[1], OPENAI[0]], r"chats.jsonl:2: message 1 has role system"),
        ([OPENAI[2]], r"chats.jsonl:2: message 0 has role assistant at the start"),
        ([OPENAI[1], {"role": "assistant", "content": " \n"}], r"chats.jsonl:2: messages\[1\]: the content is empty"),
        ([OPENAI[1], {"role": "assistant", "content": 3}], r"chats.jsonl:2: messages\[1\]: the content is not a text"),
        ([OPENAI[1]], r"chats.jsonl:2 has no completion"),
        ([], r"chats.jsonl:2 has no completion"),
        (["Hello"], r"chats.jsonl:2: messages\[0\] is not an object"),
        ("Hello", r"chats.jsonl:2: messages is not a list"),
    ],
)
def test_what_is_malformed_is_named(jsonl, messages, message):
    spec = jsonl({"messages": OPENAI}, {"messages": messages})
    with pytest.raises(UserError, match=message) as error:
        read_conversations(spec)
    assert "\n" not in str(error.value)


def test_records_of_another_kind_and_unknown_sources_are_refused(jsonl):
    with pytest.raises(UserError, match=r"neither messages nor conversations, .*: it has text"):
        read_conversations(jsonl({"text": "Hello"}))
    with pytest.raises(UserError, match=r"chats.jsonl:1 is not JSON"):
        read_conversations(jsonl("{"))
    with pytest.raises(UserError, match="unknown source 'sotu' of conversations"):
        read_conversations("sotu")
    with pytest.raises(UserError, match=r"there is no language 'klingon': one of .*english"):
        read_conversations("chatterbot:english+klingon")
    with pytest.raises(UserError, match=r"set chat\.random_answers"):
        read_rankings("chatterbot")


def test_all_forms_of_a_ranking_are_the_same(jsonl):
    question = [{"role": "user", "content": "Hello"}]

    def answered(text: str) -> list[dict]:
        return [*question, {"role": "assistant", "content": text}]

    spec = jsonl(
        {"messages": question, "ranking": ["Hi!", "Go away."]},
        {"messages": question, "chosen": "Hi!", "rejected": "Go away."},
        {"prompt": "Hello", "chosen": "Hi!", "rejected": "Go away."},
        {"prompt": question, "chosen": "Hi!", "rejected": "Go away."},
        {"chosen": answered("Hi!"), "rejected": answered("Go away.")},
        {"prompt": question, "chosen": answered("Hi!")[1:], "rejected": answered("Go away.")[1:]},
        {"prompt": "Hello", "chosen": answered("Hi!"), "rejected": answered("Go away."), "score_chosen": 8.0},
        {"prompt": "Hello", "messages": answered("Hi!"), "ranking": [answered("Hi!"), answered("Go away.")]},
        {"chosen": "\n\nHuman: Hello\n\nAssistant: Hi!", "rejected": "\n\nHuman: Hello\n\nAssistant: Go away."},
        {"system": "", "prompt": "Hello", "chosen": "Hi!", "rejected": "Go away."},
    )
    found = read_rankings(spec)
    assert {(ranking.prompt, ranking.completions) for ranking in found} == {
        ((Message("user", "Hello"),), ("Hi!", "Go away."))
    }
    assert len(found) == 10
    assert {prompt.messages for prompt in read_prompts(spec)} == {(Message("user", "Hello"),)}


def test_a_system_field_belongs_to_the_prompt_of_a_ranking(jsonl):
    for answers in (("Hi!", "No."), ([USER, ASSISTANT], [USER, {"role": "assistant", "content": "No."}])):
        record = {"system": "Be kind.", "prompt": "Hello", "chosen": answers[0], "rejected": answers[1]}
        assert read_rankings(jsonl(record))[0].prompt == HELLO[:2]


def test_answers_of_a_later_turn(jsonl):
    begin, ask = [USER, ASSISTANT], {"role": "user", "content": "And?"}
    yes, no = ({"role": "assistant", "content": text} for text in ("yes", "no"))
    record = {"prompt": "Hello", "chosen": [*begin, ask, yes], "rejected": [*begin, ask, no]}
    assert [message.content for message in read_rankings(jsonl(record))[0].prompt] == ["Hello", "Hi!", "And?"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Hello", "chosen": "Hi!"}, "neither a ranking nor both chosen and rejected"),
        ({"prompt": "Hello", "ranking": ["Hi!"]}, "two completions or more, the best first"),
        ({"prompt": "Hello", "ranking": ["Hi!", "Hi!"]}, "two completions or more, the best first"),
        (
            {"prompt": "Hello", "ranking": ["Hi!", "Hi! "]},
            "two completions or more, the best first, that differ in more than",
        ),
        ({"chosen": "Hi!", "rejected": "No."}, "has no prompt for its completions: it has chosen, rejected"),
        ({"prompt": "Bye", "chosen": OPENAI, "rejected": OPENAI}, "the prompt is 'Bye', which chosen does"),
        ({"messages": OPENAI[:2], "prompt": "Bye", "ranking": ["a", "b"]}, "has a prompt that is not in its messages"),
        ({"prompt": "Hello", "chosen": "a", "rejected": "b", "ranking": ["a", "b"]}, "both a ranking and chosen"),
        (
            {"prompt": "Hello", "chosen": "a", "rejected": OPENAI},
            "some completions that are texts and some that are messages",
        ),
        ({"prompt": "Hello", "chosen": "a", "rejected": "b", "tools": [{}]}, "has tools, but tool calls"),
        ({"messages": OPENAI, "ranking": ["Hi!", "No."]}, "does not end in a user's message"),
        ({"chosen": OPENAI, "rejected": OPENAI[1:]}, "differ only in the last completion"),
        ({"prompt": "Hello", "ranking": "Hi!"}, "ranking is not a list"),
    ],
)
def test_malformed_rankings_are_named(jsonl, record, message):
    with pytest.raises(UserError, match=f"chats.jsonl:1.*{message}"):
        read_rankings(jsonl(record))


def test_the_packaged_dialogues_are_texts_of_two_who_take_turns():
    english = read_conversations("chatterbot")
    assert len(english) > 800
    assert len({conversation.messages for conversation in english}) == len(english), "each is there once"
    assert any(
        "三" in m.content or "的" in m.content for c in read_conversations("chatterbot:chinese") for m in c.messages
    )
    for conversation in english:
        assert [message.role for message in conversation.messages] == ["user", "assistant"] * (
            len(conversation.messages) // 2
        )
        assert all(message.content.strip() for message in conversation.messages)
    both = read_conversations("chatterbot:english+german")
    assert both[: len(english)] == english
    assert len(both) > len(english)


def test_the_packaged_dialogues_are_texts_as_they_are_written(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "english"
    folder.mkdir(parents=True)
    content = (
        "conversations:\n- - Is it?\n  - Yes\n- lost\n- - Is it?\n  - Yes\n- - When?\n  - 1_984\n  - Oh.\n- - Alone.\n"
    )
    (folder / "a.yml").write_text(content)
    monkeypatch.setattr(module, "require_package", lambda *_: str(tmp_path))
    read = read_conversations("chatterbot")
    assert [[message.content for message in c.messages] for c in read] == [["Is it?", "Yes"], ["When?", "1_984"]]
    assert [c.place[-14:] for c in read] == ["conversation 0", "conversation 3"]


def test_no_question_is_on_both_sides():
    conversations = read_conversations("chatterbot")
    train, validation = hold_out(conversations, 0.1)
    assert len(train) + len(validation) == len(conversations)
    assert 0.05 < len(validation) / len(conversations) < 0.2
    assert not {item.prompt for item in train} & {item.prompt for item in validation}
    with pytest.raises(UserError, match="all data begin with the first user message"):
        hold_out([Conversation(HELLO, "a"), Conversation(HELLO[1:], "b")], 0.5)


def test_whatever_begins_with_a_question_is_on_its_side():
    system, ask, say = HELLO
    other = Message("user", "Bye")
    asked = [(ask,), (system, other), (system, ask), (ask, say, other), (other, say, ask), (other,)]
    rankings = [Ranking(prompt, ("a", "b"), str(i)) for i, prompt in enumerate(asked)]
    train, validation = hold_out(rankings, 0.5)
    assert train == [rankings[i] for i in (0, 2, 3)]
    assert validation == [rankings[i] for i in (1, 4, 5)]


def test_random_answers_are_never_true_ones():
    asked = [("q", "a"), ("q", "b"), ("r", "c"), ("s", "a"), ("t", "d")]
    conversations = [
        Conversation((Message("user", question), Message("assistant", answer)), f"line {i}")
        for i, (question, answer) in enumerate(asked)
    ]
    rankings = random_rankings(conversations, 2, seed=0)
    assert [ranking.completions[0] for ranking in rankings] == [answer for _, answer in asked]
    for ranking in rankings:
        true = {answer for question, answer in asked if question == ranking.prompt[-1].content}
        assert len(set(ranking.completions)) == 3
        assert not true & set(ranking.completions[1:])
    assert rankings == random_rankings(conversations, 2, seed=0)
    assert rankings != random_rankings(conversations, 2, seed=1)
    with pytest.raises(UserError, match=r"line 0: the other conversations have fewer than chat\.random_answers=3"):
        random_rankings(conversations, 3, seed=0)
    assert {ranking.ranks for ranking in rankings} == {(1, 2, 2)}, "of random answers none is better than another"


def test_each_draw_has_all_answers_and_other_random_ones():
    conversations = [
        Conversation((Message("user", f"q{i}"), Message("assistant", f"a{i}")), f"line {i}") for i in range(30)
    ]
    once, often = (random_rankings(conversations, 2, 0, draws) for draws in (1, 3))
    assert often[:30] == once
    assert [(r.prompt, r.completions[0]) for r in often] == 3 * [(r.prompt, r.completions[0]) for r in once]
    others = [[ranking.completions[1:] for ranking in often[first : first + 30]] for first in (0, 30, 60)]
    pairs = itertools.combinations(others, 2)
    assert sum(a == b for first, second in pairs for a, b in zip(first, second, strict=True)) < 5


def test_random_answers_are_of_other_conversations():
    def conversation(*texts: str) -> Conversation:
        return Conversation(tuple(Message(("user", "assistant")[i % 2], t) for i, t in enumerate(texts)), texts[0])

    conversations = [
        conversation("q", "a", "r", "b", "s", "c"),
        conversation("t", "d"),
        conversation("u", "e", "v", "a"),
    ]
    for seed in range(20):
        for ranking in random_rankings(conversations, 2, seed):
            if ranking.place == "q":
                assert sorted(ranking.completions[1:]) in (["d", "e"], ["a", "d"], ["a", "e"])
    drawn = {ranking.completions for seed in range(20) for ranking in random_rankings(conversations, 2, seed)}
    assert len(drawn) > 20, "each is drawn anew"
    with pytest.raises(UserError, match=r"^q: the other conversations have fewer than chat\.random_answers=3"):
        random_rankings(conversations, 3, seed=0)
