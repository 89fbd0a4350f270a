"""Chat sessions with a tiny model: prompts, dropped turns, regeneration and saving."""

import codecs
import json
import stat

import pytest

from gptjax.config import UserError
from gptjax.data.conversations import Message, read_conversations
from gptjax.data.templates import chat_format
from gptjax.inference.chatting import ChatSession
from gptjax.inference.engine import Engine
from gptjax.inference.retrieval import Documents
from gptjax.inference.sampling import Sampling
from gptjax.stages.trained_model import load_model
from tests.tiny_chats import save_sft


@pytest.fixture(scope="module")
def make_session(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chatting")
    trained = load_model(save_sft(directory / "sft", directory))
    engine = Engine(trained.model, trained.params, trained.tokenizer, trained.mesh)
    form = chat_format(trained.config.chat, trained.tokenizer)

    def make(**settings) -> ChatSession:
        return ChatSession(engine, form, Sampling(), **{"max_new_tokens": 8, **settings})

    return make


def test_what_is_said_comes_back_piece_by_piece(make_session):
    session, pieces = make_session(), []
    answer = session.reply("q1", pieces.append)
    assert "".join(pieces) == answer
    assert session.turns == [Message("user", "q1"), Message("assistant", answer)]


def test_the_model_reads_what_was_said_before(make_session, monkeypatch):
    session, read = make_session(system="s"), []
    generate = session._engine.generate
    monkeypatch.setattr(
        session._engine, "generate", lambda p, *a, **k: read.append(p[0].tolist()) or generate(p, *a, **k)
    )
    answer = session.reply("q1")
    session.reply("q2")
    bos, ask, end = 256, 257, 258
    assert read[0] == [bos, *b"sq1", ask]
    assert read[1] == [bos, *b"sq1", ask, *session._format.encode_completion(answer)[:-1], end, *b"q2", ask]
    session.regenerate()
    assert read[2] == read[1]
    for i in range(8):  # the oldest turns give way, the system message stays
        session.reply(f"q{i}")
        assert len(read[-1]) <= 32 - 8
        assert read[-1][:2] == [bos, ord("s")]


def test_passages_come_before_the_last_question_as_many_as_fit(make_session, monkeypatch, tmp_path):
    for name, text in (("a", "why so"), ("b", "why bcdefghijklmnopq"), ("c", "why me"), ("d", "no")):
        (tmp_path / f"{name}.txt").write_text(text)
    documents = Documents(tmp_path)
    assert [passage.place for passage in documents.find("why?")] == ["a.txt:1", "b.txt:1", "c.txt:1"]
    session, read = make_session(documents=documents, max_new_tokens=1), []
    generate = session._engine.generate
    monkeypatch.setattr(
        session._engine, "generate", lambda p, *a, **k: read.append(p[0].tolist()) or generate(p, *a, **k)
    )
    bos, ask, end = 256, 257, 258
    for number in range(2):  # the second time the turns before give way
        session.reply("why?")
        # This fills 30 of 31 positions: b does not fit in addition to a.
        assert read[-1] == [bos, *b"[1] why so\n\n[2] why me\n\nwhy?", ask]
        assert [passage.place for passage in session.sources] == ["a.txt:1", "c.txt:1"]
        assert session.turns[2 * number] == Message("user", "why?")
    answer = session.turns[-1].content
    session.turns = session.turns[-2:]
    session.reply("hm")
    assert read[-1] == [bos, *b"why?", ask, *session._format.encode_completion(answer)[:-1], end, *b"hm", ask]
    assert session.sources == []


def test_regenerating_replaces_the_last_answer_alone(make_session):
    session = make_session()
    session.reply("q1")
    first = session.reply("q2")
    before = session.turns
    others = [session.regenerate() for _ in range(4)]
    assert session.turns[:3] == before[:3]
    assert session.turns[3].content == others[-1]
    assert set(others) != {first}
    session.reset()
    assert session.turns == []
    with pytest.raises(UserError, match="no completion to regenerate"):
        session.regenerate()


def test_an_answer_ends_with_its_turn(make_session):
    session = make_session()
    ended = session._engine.generate([[256, 65]], 4, seeds=0, end_tokens=range(session._format.vocab_size))[0]
    assert (ended.tokens.tolist(), ended.finish_reason) == ([], "end_of_turn")


def test_the_same_seed_says_the_same(make_session):
    said = [[make_session(seed=seed).reply(text) for text in ("q1", "q2")] for seed in (3, 3, 4)]
    assert said[0] == said[1] != said[2]


def test_what_is_saved_can_be_learned_from(make_session, tmp_path):
    session, path = make_session(system="s"), tmp_path / "said.jsonl"
    with pytest.raises(UserError, match="nothing to save"):
        session.save(path)
    session.turns = [Message("user", "q1"), Message("assistant", "é")]
    session.save(path)
    session.reset()
    session.turns = [Message("user", "q2"), Message("assistant", "b")]
    session.save(path)
    said = read_conversations(f"jsonl:{path}")
    assert [conversation.messages[0].content for conversation in said] == ["s", "s"]
    assert [conversation.messages[2].content for conversation in said] == ["é", "b"]
    session.turns[-1] = Message("assistant", " ")
    with pytest.raises(UserError, match="a completion is empty"):
        session.save(path)


def test_a_saved_line_is_a_line_of_its_own_in_the_same_file(make_session, tmp_path):
    session, path, link = make_session(), tmp_path / "said.jsonl", tmp_path / "link"
    session.turns = [Message("user", "q"), Message("assistant", "a")]
    old = json.dumps({"messages": [{"role": turn.role, "content": turn.content} for turn in session.turns]})
    path.write_bytes(codecs.BOM_UTF8 + old.encode())  # without a line end
    path.chmod(0o640)
    link.symlink_to(path)
    session.save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.read_bytes() == codecs.BOM_UTF8 + f"{old}\n{old}\n".encode()
    assert len(read_conversations(f"jsonl:{path}")) == 2


def test_a_line_is_not_appended_to_what_it_would_spoil(make_session, tmp_path):
    session = make_session()
    session.turns = [Message("user", "q"), Message("assistant", "a")]
    for name, raw, message in [
        ("a.jsonl", "a".encode("utf-16"), "which is utf-16-le"),
        ("b.jsonl", b"\xff\n", "is not UTF-8 at byte 0"),
        ("c.jsonl.gz", b"", "which is gzip by its name"),
    ]:
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(UserError, match=message):
            session.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == raw
    with pytest.raises(UserError, match="Is a directory"):
        session.save(tmp_path)


def test_what_cannot_be_said_changes_nothing(make_session):
    session = make_session()
    session.reply("q1")
    before = session.turns
    for text, message in ((" ", "the message is empty"), ("x" * 40, "42 tokens, but 24 fit")):
        with pytest.raises(UserError, match=message):
            session.reply(text)
        assert session.turns == before
    with pytest.raises(UserError, match="leaves no room in a context of 32"):
        make_session(max_new_tokens=32)
