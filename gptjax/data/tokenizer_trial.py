"""Loads and tests the tokenizer.json on standard input; runs in the child process of `tokenizer_check.check`.

Arguments: seconds of processor time, bytes of memory. Prints "ok", or one line that says why the file cannot be used.
Does not import gptjax, which may not be on the path of a child process.
"""

import resource
import sys
from typing import Any

# Runs of one character, with and without a different last one, trigger most backtracking patterns; then some scripts.
_RUNS = [character * 2000 + end for character in "aA0 .,_-\n\té日" for end in ("", "!", "b")]
_SCRIPTS = ["".join(map(chr, range(start, start + 256))) for start in (0, 0x100, 0x300, 0x600, 0x3000, 0xAC00, 0x1F600)]
_TEXTS = ["", "Hello, world! It's 12345.67\r\n\t  <|endoftext|> naïve 日本語 🙂 مرحبا", *_RUNS, *_SCRIPTS]
_MAX_DECODED = 10_000  # ids


def try_tokenizer(content: str) -> str:
    """Encodes and decodes sample texts; returns "ok", or why the tokenizer cannot be used."""
    import tokenizers

    try:
        tokenizer: Any = tokenizers.Tokenizer.from_str(content)
        ids = sorted(tokenizer.get_vocab().values())[:_MAX_DECODED]
    except BaseException as error:
        return f"not a tokenizer.json: {_one_line(error)}"
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in _TEXTS:
        try:
            (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
            tokenizer.decode(encoding.ids, skip_special_tokens=False)
        except Exception:  # the vocabulary cannot express the text: encoding such a text is an error later
            continue
        except BaseException as error:
            return f"the tokenizers library fails on {text[-8:]!r}: {_one_line(error)}"
    try:
        tokenizer.decode(ids, skip_special_tokens=False)
    except BaseException as error:
        return f"the tokenizers library fails to decode: {_one_line(error)}"
    return "ok"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard == resource.RLIM_INFINITY or value < hard:
        resource.setrlimit(kind, (value, hard))


if __name__ == "__main__":
    _limit(resource.RLIMIT_CPU, int(sys.argv[1]))
    _limit(resource.RLIMIT_AS, int(sys.argv[2]))
    _limit(resource.RLIMIT_CORE, 0)
    sys.stdout.buffer.write(try_tokenizer(sys.stdin.buffer.read().decode()).encode(errors="replace"))
