"""A chat in the harmony format, with scripted completions: what is shown, kept as history, called and saved."""

import itertools
from types import SimpleNamespace

import pytest

from gptjax.config import ChatConfig, UserError
from gptjax.data.conversations import Message, RequestOptions, read_conversations
from gptjax.data.harmony import HarmonyFormat
from gptjax.data.templates import chat_format
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.inference.chatting import ChatSession
from gptjax.inference.harmony_chat import DIM, RESET
from gptjax.inference.sampling import Sampling

FORM = chat_format(ChatConfig(template="harmony"), BytesTokenizer())
TOOLS = '[{"name": "clock", "description": "", "parameters": null}]'
NEVER = 5  # sampled after the token that ends a completion


class ScriptedEngine:
    """Samples given completions, and remembers prompts."""

    def __init__(self, *completions: str) -> None:
        self.tokenizer = BytesTokenizer()
        self.model = SimpleNamespace(config=SimpleNamespace(context_length=4096))
        self.prompts: list[list[int]] = []
        self._completions = iter(completions)

    def stream(self, prompts, max_new_tokens, sampling, *, seeds, ends, at_once):
        self.prompts += [prompt.tolist() for prompt in prompts]
        assert {FORM.end_tokens[0], FORM.end_tokens[1], BytesTokenizer.end_of_text} == set(ends)
        for token in [*tokens_of(next(self._completions)), *[NEVER] * 8][:max_new_tokens]:
            yield [token], [0.0]


def tokens_of(text: str) -> list[int]:
    assert isinstance(FORM, HarmonyFormat)
    pieces, names = [text], FORM.special_tokens
    for name in names:
        pieces = [*itertools.chain(*(_split(piece, name) for piece in pieces))]
    return [token for piece in pieces for token in ([names[piece]] if piece in names else [*piece.encode()])]


def _split(text: str, name: str) -> list[str]:
    first, *others = text.split(name)
    return [text] if text == name else [first, *(part for other in others for part in (name, other))]


def session_of(*completions: str, **settings) -> tuple[ChatSession, ScriptedEngine]:
    engine = ScriptedEngine(*completions)
    return ChatSession(engine, FORM, Sampling(), **{"max_new_tokens": 200, **settings}), engine  # type: ignore[arg-type]


THINKS = "<|channel|>analysis<|message|>Hm é.<|end|><|start|>assistant"
ANSWERS = "<|channel|>final<|message|>Four é.<|return|>"
CALLS = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.clock<|channel|>commentary"
CALLS += " <|constrain|>json<|message|>{}<|call|>"
ASK, THOUGHT = Message("user", "2 + 2?"), Message("assistant", "Hm é.", "analysis")
FOUR, CALL = (
    Message("assistant", "Four é.", "final"),
    Message("assistant", "{}", "commentary", "functions.clock", "<|constrain|>json"),
)
LOOK = Message("assistant", "I look.", "commentary")


@pytest.mark.parametrize(
    ("analysis", "shown"),
    [
        ("hide", "Four é."),
        ("show", "analysis: Hm é.\nFour é."),
        ("dim", f"{DIM}analysis: Hm é.{RESET}\nFour é."),
    ],
)
def test_channels_are_shown_as_asked(analysis, shown):
    session, _ = session_of(THINKS + ANSWERS, analysis=analysis)
    pieces: list[str] = []
    assert session.reply("2 + 2?", pieces.append) == "Four é."
    assert "".join(pieces) == shown
    assert session.turns == [ASK, THOUGHT, FOUR]
    assert session.call is None


def test_history_has_the_final_message_without_its_analysis():
    session, engine = session_of(THINKS + ANSWERS, THINKS + ANSWERS, THINKS + ANSWERS, system="Be kind.")
    session.reply("2 + 2?")
    session.reply("Sure?")
    rules = Message("system", "Be kind.")
    assert engine.prompts[0] == FORM.encode_prompt([rules, ASK]).tolist()
    assert engine.prompts[1] == FORM.encode_prompt([rules, ASK, FOUR, Message("user", "Sure?")]).tolist()
    end, stop = FORM.special_tokens["<|end|>"], FORM.special_tokens["<|return|>"]
    assert stop not in engine.prompts[1]
    assert engine.prompts[1].count(end) == engine.prompts[0].count(end) + 2
    session.regenerate()
    assert engine.prompts[2] == engine.prompts[1]
    assert len(session.turns) == 6


def test_a_call_gets_its_result_and_the_loop_keeps_its_analysis():
    session, engine = session_of(THINKS + CALLS, THINKS + ANSWERS, ANSWERS, options=RequestOptions(tools=TOOLS))
    pieces: list[str] = []
    assert session.reply("2 + 2?", pieces.append) == ""
    assert "".join(pieces) == "I look.\nfunctions.clock {}\n"
    assert session.call == CALL
    with pytest.raises(UserError, match="does not call a tool"):
        session_of()[0].answer_call("x")
    assert session.answer_call("10:02") == "Four é."
    result = Message("tool", "10:02", "commentary", "assistant", name="functions.clock")
    assert session.turns == [ASK, THOUGHT, LOOK, CALL, result, THOUGHT, FOUR]
    system = Message("system", "", options=RequestOptions(tools=TOOLS))
    assert engine.prompts[1] == FORM.encode_prompt([system, *session.turns[:5]]).tolist()
    session.reply("Sure?")
    kept = [ASK, LOOK, CALL, result, FOUR, Message("user", "Sure?")]
    assert engine.prompts[2] == FORM.encode_prompt([system, *kept]).tolist()


def test_what_is_saved_can_be_trained_on(tmp_path):
    path = tmp_path / "said.jsonl"
    session, _ = session_of(THINKS + CALLS, ANSWERS, system="Be kind.", options=RequestOptions(TOOLS, "", "high"))
    session.reply("2 + 2?")
    session.answer_call("10:02")
    session.save(path)
    (read,) = read_conversations(f"jsonl:{path}", harmony=True)
    assert list(read.messages) == session._all(session.turns)
    assert read.messages[0] == Message("system", "Be kind.", options=RequestOptions(TOOLS, "", "high"))


@pytest.mark.parametrize("written", [THINKS, "<|channel|>analysis<|message|>Hm", "garbage", "", "<|return|>"])
def test_an_unfinished_completion_is_kept_but_not_saved(written, tmp_path):
    session, engine = session_of(written + "<|return|>", ANSWERS)
    pieces: list[str] = []
    assert session.reply("2 + 2?", pieces.append) == "".join(pieces) == ("garbage" if written == "garbage" else "")
    session.reply("Go on.")
    assert engine.prompts[1][-len(b"assistant") :] == [*b"assistant"]
    if written != "garbage":  # which counts as a final message
        with pytest.raises(UserError, match=r"the conversation: message \d of the harmony format, the user's, comes"):
            session.save(tmp_path / "said.jsonl")


def test_tools_need_the_format():
    form = chat_format(ChatConfig(), BytesTokenizer())
    with pytest.raises(UserError, match=r"tools and reasoning effort need a model of chat\.template=harmony"):
        ChatSession(ScriptedEngine(), form, Sampling(), options=RequestOptions(TOOLS))  # type: ignore[arg-type]
