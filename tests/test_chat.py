"""`python -m gptjax.chat`, from a pipe and in a terminal, as a user runs it."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from gptjax.checkpoint.manager import Checkpoints
from gptjax.config import replace, to_json
from gptjax.data.conversations import read_conversations
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.models.gpt import GPT
from tests.commands import run_command
from tests.tiny_chats import config_of, save_sft

LIMIT = 1000  # seconds, in which what hangs is found out


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("chat")
    return save_sft(directory / "sft", directory)


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "gptjax.chat", *flags]


def chat(stdin: str, *flags: str) -> subprocess.CompletedProcess:
    result = run_command("gptjax.chat", *flags, stdin=stdin)
    # On a slow machine compilations are announced.
    result.stderr = "".join(line for line in result.stderr.splitlines(True) if not line.startswith("compiling "))
    return result


def test_a_conversation_from_a_pipe(workdir, tmp_path):
    lines = ["/system s", "q1", "/regen", "q2", f"/save {tmp_path / 'said.jsonl'}", "/reset", "q3", "/quit", "q4"]
    result = chat("\n".join(lines) + "\n", f"--workdir={workdir}", "--temperature=0")
    assert (result.returncode, result.stderr) == (0, "")
    messages = read_conversations(f"jsonl:{tmp_path / 'said.jsonl'}")[0].messages
    assert [message.role for message in messages] == ["system", *["user", "assistant"] * 2]
    assert [message.content for message in messages[:4:2]] == ["s", messages[2].content]
    assert result.stdout.splitlines()[1] == messages[2].content


def test_answers_from_documents_say_where_they_are_from(workdir, tmp_path):
    (tmp_path / "shop.md").write_text("# A\n\nopen\n\n# Bus\n\nline 3\n")
    (tmp_path / "long.txt").write_text("open " * 40)  # has no room
    result = chat("open?\n/regen\nhm\n", f"--workdir={workdir}", f"--documents={tmp_path}", "--temperature=0")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("[")] == ["[1] shop.md:1"] * 2
    assert lines[:2] == lines[2:4]


def test_mistakes_end_it_in_one_line(workdir, pretrained, tmp_path):
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "config.json").write_text(to_json(config_of("reward", tmp_path, pretrained)))
    for stdin, flags, message in (
        ("", [], "error: needs --workdir=DIR"),
        (
            "",
            [f"--workdir={pretrained}"],
            f"error: {pretrained} is a run of stage pretrain, which trains no chat model",
        ),
        (
            "",
            [f"--workdir={tmp_path / 'reward'}"],
            f"error: {tmp_path / 'reward'} is a run of stage reward, which trains no chat model",
        ),
        ("", [f"--workdir={workdir}", "--max_new_tokens=0"], "error: flag --max_new_tokens=0"),
        ("", [f"--workdir={workdir}", "--documents=/none"], "error: there is no folder /none"),
        ("q1\n/save\n", [f"--workdir={workdir}"], "error: /save needs a FILE"),
        ("/sing\n", [f"--workdir={workdir}"], "error: unknown command '/sing': /system"),
    ):
        result = chat(stdin, *flags)
        assert result.returncode == 2
        assert result.stderr.startswith(message)
        assert result.stderr.count("\n") == 1


def test_input_that_is_no_text(workdir):
    result = run_command("gptjax.chat", f"--workdir={workdir}", stdin=b"caf\xe9\n", text=False)
    assert result.returncode == 2
    assert result.stderr.startswith(b"error: standard input:1 is not UTF-8 at byte 3")


class Terminal:
    """The command in a terminal."""

    def __init__(self, *flags: str) -> None:
        self._parent, child = pty.openpty()
        self.process = subprocess.Popen(command(*flags), stdin=child, stdout=child, stderr=child)
        os.close(child)
        self.shown = b""

    def shows(self, text: bytes, seconds: float) -> bool:
        """Whether it is shown in this time, behind what was found before."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            if not select.select([self._parent], [], [], max(0, deadline - time.monotonic()))[0]:
                return False
            self.shown += os.read(self._parent, 4096)
        self.shown = self.shown.partition(text)[2]
        return True

    def wait_for(self, text: bytes) -> None:
        assert self.shows(text, LIMIT), self.shown

    def interrupt(self, answer: bytes) -> None:
        """By Ctrl-C, until the answer to it is shown: one between Python's prompt and its waiting for keys is lost."""
        for _ in range(12):
            self.process.send_signal(signal.SIGINT)
            if self.shows(answer, 10):
                return
        raise AssertionError(self.shown)

    def type(self, keys: bytes) -> None:
        os.write(self._parent, keys)

    def leave(self) -> None:
        """By Ctrl-D."""
        self.type(b"\x04")
        assert self.process.wait(LIMIT) == 0
        os.close(self._parent)


def test_a_terminal_survives_mistakes(workdir):
    terminal = Terminal(f"--workdir={workdir}")
    terminal.wait_for(b"> ")
    terminal.type(b"/sing\n")
    terminal.wait_for(b"error: unknown command '/sing'")
    terminal.wait_for(b"> ")
    terminal.interrupt(b"> ")  # nothing is being said
    terminal.leave()


@pytest.fixture(scope="module")
def talkative(tmp_path_factory) -> Path:
    """The workdir of a model that says "a" and comes to no end."""
    directory = tmp_path_factory.mktemp("talkative")
    config = config_of("sft", directory, None)
    config = replace(config, {"model": {"context_length": 4096}, "batch": {"tokens_per_batch": 4096}})
    (directory / "config.json").write_text(to_json(config))
    BytesTokenizer().save(directory / "tokenizer")
    model = GPT(config.model.with_vocabulary(259))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    # Every hidden state is far in one direction, that of "a", and the tokens that end something in the other.
    params["final_norm"]["bias"] += 5
    table_VD = params["token_embedding"]["embedding"]
    params["token_embedding"]["embedding"] = table_VD.at[ord("a")].set(1).at[256:].set(-1)
    with Checkpoints(directory, config.checkpoint) as checkpoints:
        checkpoints.save_params(params)
    return directory


@pytest.mark.slow
def test_an_answer_can_be_stopped_and_is_then_forgotten(talkative, tmp_path):
    terminal = Terminal(f"--workdir={talkative}", "--max_new_tokens=4000")
    terminal.wait_for(b"> ")
    terminal.type(b"q1\n")
    terminal.wait_for(b"q1\r\n")
    terminal.wait_for(b"aaaa")
    terminal.interrupt(b"(stopped)")
    terminal.wait_for(b"> ")
    terminal.type(b"/save said.jsonl\n")
    terminal.wait_for(b"error: there is nothing to save yet")
    terminal.wait_for(b"> ")
    terminal.leave()


def test_an_interrupt_that_a_callback_would_swallow_is_taken():
    code = """
import gc, signal
from gptjax.chat import shown

gc.callbacks.append(lambda phase, info: signal.raise_signal(signal.SIGINT) if phase == "start" else None)
try:
    with shown() as show:
        gc.collect()
        gc.callbacks.clear()
        show("a piece")
except KeyboardInterrupt:
    print(", stopped", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT)
    assert (result.stdout, result.stderr) == ("a piece, stopped True\n", "")
