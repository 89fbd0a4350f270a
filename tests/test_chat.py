"""`python -m gptjax.chat`, from a pipe and in a terminal, as a user runs it."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptjax.data.conversations import read_conversations
from gptjax.training.run import run
from tests.tiny_chats import config_of


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, pretrained) -> Path:
    directory = tmp_path_factory.mktemp("chat")
    run(config_of("sft", directory, pretrained), directory / "sft")
    return directory / "sft"


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "gptjax.chat", *flags]


def chat(stdin: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*flags), input=stdin, capture_output=True, text=True, timeout=120)


def test_a_conversation_from_a_pipe(workdir, tmp_path):
    lines = ["/system s", "q1", "/regen", "q2", f"/save {tmp_path / 'said.jsonl'}", "/reset", "q3", "/quit", "q4"]
    result = chat("\n".join(lines) + "\n", f"--workdir={workdir}", "--temperature=0")
    assert (result.returncode, result.stderr) == (0, "")
    messages = read_conversations(f"jsonl:{tmp_path / 'said.jsonl'}")[0].messages
    assert [message.role for message in messages] == ["system", *["user", "assistant"] * 2]
    assert [message.content for message in messages[:4:2]] == ["s", messages[2].content]
    assert result.stdout.splitlines()[1] == messages[2].content


def test_mistakes_end_it_in_one_line(workdir, pretrained):
    for stdin, flags, message in (
        ("", [], "error: needs --workdir=DIR"),
        ("", [f"--workdir={pretrained}"], f"error: {pretrained} is of stage pretrain, which does not answer"),
        ("/sing\n", [f"--workdir={workdir}"], "error: unknown command '/sing': /system"),
    ):
        result = chat(stdin, *flags)
        assert result.returncode == 2
        assert result.stderr.startswith(message)
        assert result.stderr.count("\n") == 1


def test_a_terminal_survives_mistakes(workdir):
    parent, child = pty.openpty()
    process = subprocess.Popen(command(f"--workdir={workdir}"), stdin=child, stdout=child, stderr=child)
    os.close(child)
    shown = b""

    def wait_for(text: bytes, after: int = 0) -> None:
        nonlocal shown
        deadline = time.monotonic() + 120
        while text not in shown[after:]:
            assert time.monotonic() < deadline, shown
            shown += os.read(parent, 4096)

    wait_for(b"> ")
    os.write(parent, b"/sing\n")
    wait_for(b"error: unknown command '/sing'")
    seen = len(shown)
    wait_for(b"> ", seen)
    os.write(parent, b"\x04")
    assert process.wait(60) == 0
    os.close(parent)
