"""Control characters of untrusted texts do not reach a terminal, except newline and tab."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import termios

import pytest


def shown_in_a_terminal(*command: str) -> bytes:
    """All that a Python program writes to its terminal."""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (40, 150))
    process = subprocess.Popen([sys.executable, *command], stdin=subprocess.DEVNULL, stdout=child, stderr=child)
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: all have closed it
        while part := os.read(parent, 4096):
            shown += part
    os.close(parent)
    process.wait()
    return shown


EVIL, HARMLESS = "\x1b]0;title\x07\x9b2J\r\x7f\tx", b"\\u001b]0;title\\u0007\\u009b2J\\u000d\\u007f\tx"


@pytest.mark.slow
def test_texts_and_errors_in_a_terminal(pretrained):
    shown = shown_in_a_terminal("-m", "gptjax.generate", f"--workdir={pretrained}", f"--prompt={EVIL}")
    assert HARMLESS in shown
    assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", shown)
    shown = shown_in_a_terminal("-m", "gptjax.generate", f"--workdir={pretrained}{EVIL}", "--prompt=x")
    assert shown.endswith(HARMLESS + b" is not a workdir: it has no config.json\r\n")


WRITES = """
import json, sys
from absl import logging
from tqdm import tqdm
from gptjax import cli

def main():
    print(json.dumps(text, ensure_ascii=False))
    logging.warning(text)
    sys.stderr.writelines([text, "\\n"])
    list(tqdm(range(3), desc=text, mininterval=0))
    raise ValueError(text)

text = sys.argv.pop()  # no flag
cli.run(main)
"""


def test_all_ways_to_write_to_a_terminal():
    """Output, logs, progress bars, tracebacks; JSON keeps its value."""
    shown = shown_in_a_terminal("-c", WRITES, EVIL)
    assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", shown.replace(b"\x1b[A", b""))
    assert "\x9b" not in shown.decode()
    assert json.loads(shown.split(b"\n")[0]) == EVIL
    assert shown.count(HARMLESS) >= 4
    assert b"\r" + HARMLESS + b": 100%" in shown  # a bar still returns to the start of its line
    assert b"ValueError: " + HARMLESS in shown


def test_pipes_get_the_text_as_it_is():
    result = subprocess.run([sys.executable, "-c", WRITES, EVIL], capture_output=True)
    assert json.dumps(EVIL, ensure_ascii=False).encode() in result.stdout
    assert EVIL.encode() in result.stderr
