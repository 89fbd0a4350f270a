"""Conversations and rankings: all forms give the same, and what is malformed is named with its file and line."""

import json

import pytest

from gptjax.config import UserError
from gptjax.data.conversations import (
    Conversation,
    Message,
    hold_out,
    random_rankings,
    read_conversations,
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


def test_a_question_at_the_end_is_left_out(jsonl):
    spec = jsonl({"messages": [*OPENAI, {"role": "user", "content": "And you?"}]})
    assert read_conversations(spec)[0].messages == HELLO


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "tool", "content": "x"}], r"chats.jsonl:2: messages\[0\] has the unknown role 'tool'"),
        ([*OPENAI, OPENAI[2]], r"chats.jsonl:2: message 3 is of role assistant behind one of role assistant"),
        ([OPENAI[1], OPENAI[1]], r"chats.jsonl:2: message 1 is of role user behind one of role user"),
        ([OPENAI[1], OPENAI[0]], r"chats.jsonl:2: message 1 is of role system"),
        ([OPENAI[2]], r"chats.jsonl:2: message 0 is of role assistant at the start"),
        ([OPENAI[1], {"role": "assistant", "content": " \n"}], r"chats.jsonl:2: messages\[1\]: the content is empty"),
        ([OPENAI[1], {"role": "assistant", "content": 3}], r"chats.jsonl:2: messages\[1\]: the content is not a text"),
        ([OPENAI[1]], r"chats.jsonl:2 has no answer"),
        ([], r"chats.jsonl:2 has no answer"),
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
    with pytest.raises(UserError, match="neither messages nor conversations: it has text"):
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
    )
    found = read_rankings(spec)
    assert {(ranking.prompt, ranking.answers) for ranking in found} == {
        ((Message("user", "Hello"),), ("Hi!", "Go away."))
    }
    assert len(found) == 5


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Hello", "chosen": "Hi!"}, "neither a ranking nor both chosen and rejected"),
        ({"prompt": "Hello", "ranking": ["Hi!"]}, "two answers or more, all different"),
        ({"prompt": "Hello", "ranking": ["Hi!", "Hi!"]}, "two answers or more, all different"),
        ({"messages": OPENAI, "ranking": ["Hi!", "No."]}, "does not end in a user's message"),
        ({"chosen": OPENAI, "rejected": OPENAI[1:]}, "differ in the last answer alone"),
        ({"prompt": "Hello", "ranking": "Hi!"}, "ranking is not a list"),
    ],
)
def test_malformed_rankings_are_named(jsonl, record, message):
    with pytest.raises(UserError, match=f"chats.jsonl:1.*{message}"):
        read_rankings(jsonl(record))


def test_the_packaged_dialogues_are_texts_of_two_who_take_turns():
    english = read_conversations("chatterbot")
    assert len(english) > 2000
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


def test_no_prompt_is_on_both_sides():
    conversations = read_conversations("chatterbot")
    train, validation = hold_out(conversations, 0.1)
    assert len(train) + len(validation) == len(conversations)
    assert 0.05 < len(validation) / len(conversations) < 0.2
    assert not {item.prompt for item in train} & {item.prompt for item in validation}
    with pytest.raises(UserError, match="the only prompt"):
        hold_out([Conversation(HELLO, "a"), Conversation(HELLO, "b")], 0.5)


def test_random_answers_are_never_true_ones():
    asked = [("q", "a"), ("q", "b"), ("r", "c"), ("s", "a"), ("t", "d")]
    conversations = [
        Conversation((Message("user", question), Message("assistant", answer)), f"line {i}")
        for i, (question, answer) in enumerate(asked)
    ]
    rankings = random_rankings(conversations, 2, seed=0)
    assert [ranking.answers[0] for ranking in rankings] == [answer for _, answer in asked]
    for ranking in rankings:
        true = {answer for question, answer in asked if question == ranking.prompt[-1].content}
        assert len(set(ranking.answers)) == 3
        assert not true & set(ranking.answers[1:])
    assert rankings == random_rankings(conversations, 2, seed=0)
    assert rankings != random_rankings(conversations, 2, seed=1)
    with pytest.raises(UserError, match=r"line 0 has fewer than chat\.random_answers=3"):
        random_rankings(conversations, 3, seed=0)
