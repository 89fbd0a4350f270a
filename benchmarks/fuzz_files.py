"""Reads damaged and malicious files: `python -m benchmarks.fuzz_files --kind=tokenizers --seconds=120`.

Kinds:
  tokenizers   tokenizer.json with its spec.json, tokenizer_config.json, vocab.json and merges.txt, of which one is
               changed; what loads must encode and decode some texts
  checkpoints  a file of a workdir is changed: config, tokenizer, manifest, or one of Orbax's and TensorStore's; the
               workdir is read as generation reads it, then resumed from

Only a UserError of one line is allowed: no other exception, no end of the process, no case longer than 60 s, no file
outside the workdir. A reader must leave all files as they are.
"""

import copy
import faulthandler
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.fuzz_rollouts import SECONDS, SEED, damaged
from gptjax.config import UserError

KIND = flags.DEFINE_enum("kind", None, ["tokenizers", "checkpoints"], "Kind of files.", required=True)

LIMIT = 60  # seconds of a case
TEXTS = ("", "Some text, 日本 aab 12345 don't", "a" * 300, "🙂\r\n\t\x00\u2028<|endoftext|></s>")
REGEXES = ("(a|a)+$", "(a*)*b", "(", "[", "\\p{L}+", "(?=a)", "", "(.+)+\\1", "\\b", "(?<n>a)")
SCALARS = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**32 - 1, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf")),
    *("", "a", "../x", "/etc/passwd", "\ud800", "\x1b[2J", "<|endoftext|>", "a" * 300, *REGEXES),
)


# --- changes ----------------------------------------------------------------------------------------------------------


def value(draw: random.Random, depth: int = 2) -> Any:
    """A random JSON value."""
    kind = draw.randrange(8)
    if kind == 0 and depth:
        return [value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == 1 and depth:
        return {str(value(draw, 0)): value(draw, depth - 1) for _ in range(draw.randrange(3))}
    return draw.choice(SCALARS)


def change(tree: Any, draw: random.Random) -> Any:
    """A copy of a JSON value in which one part is replaced, removed, duplicated or swapped with another."""
    if not isinstance(tree, (dict, list)) or not tree or draw.randrange(12) == 0:
        return value(draw)
    tree = copy.copy(tree)
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = draw.choice(keys)
    match draw.randrange(10):
        case 0:
            del tree[key]
        case 1 if isinstance(tree, dict):
            tree[str(value(draw, 0))] = tree[key]
        case 1:
            tree.append(tree[key])
        case 2:
            other = draw.choice(keys)
            tree[key], tree[other] = tree[other], tree[key]
        case _:
            tree[key] = change(tree[key], draw)
    return tree


def changed(content: bytes, draw: random.Random) -> bytes:
    """A file with one to three changes of its JSON, or damaged bytes."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return damaged(content, draw)
    if draw.randrange(6) == 0:
        return damaged(content, draw)
    if draw.randrange(40) == 0:
        return draw.choice([b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"null", b"1e999"])
    for _ in range(draw.randint(1, 3)):
        tree = change(tree, draw)
    return json.dumps(tree, ensure_ascii=draw.random() < 0.9).encode(errors="surrogatepass")


# --- tokenizers -------------------------------------------------------------------------------------------------------


def tokenizer(draw: random.Random) -> dict[str, Any]:
    """A tokenizer.json with random parts, most of which fit together."""
    alphabet = {character: i for i, character in enumerate("abcdefghij ▁_Ġ#")}
    words = alphabet | {"ab": 15, "##b": 16, "<unk>": 17, "</s>": 18}
    regex = draw.choice([" ?\\w+", "a+", *REGEXES])
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    models = (
        {"type": "BPE", "vocab": words, "merges": [["a", "b"]], "unk_token": "<unk>", "byte_fallback": True},
        {"type": "BPE", "vocab": words, "merges": ["a b"], "dropout": None, "continuing_subword_prefix": "##"},
        {"type": "Unigram", "unk_id": 0, "vocab": [[word, -float(i)] for word, i in words.items()]},
        {"type": "WordPiece", "vocab": words, "unk_token": "<unk>", "max_input_chars_per_word": 100},
        {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    )
    normalizers = (
        *(None, {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "▁"}),
        {"type": "Precompiled", "precompiled_charsmap": "CAAAAAAAAAD/////AAA="},
        {"type": "Replace", "pattern": {"Regex": regex}, "content": "ab"},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
        {"type": "Strip", "strip_left": True, "strip_right": True},
    )
    splits = (
        *(None, {"type": "Whitespace"}, {"type": "Digits", "individual_digits": True}, {"type": "BertPreTokenizer"}),
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    )
    decoders = (
        *(None, {"type": "ByteLevel"}, {"type": "ByteFallback"}, {"type": "Fuse"}),
        {"type": "Strip", "content": "_", "start": 1, "stop": 0},
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True},
    )
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    ends = {"</s>": {"id": "</s>", "ids": [18], "tokens": ["</s>"]}}
    posts = (None, {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": ends})

    def of(parts: tuple[Any, ...], name: str) -> Any:
        part = draw.choice(parts)
        return part if draw.randrange(4) else {"type": "Sequence", name: [p for p in (part, draw.choice(parts)) if p]}

    return {
        "version": "1.0",
        "truncation": draw.choice([None, {"direction": "Right", "max_length": 4, "strategy": "LongestFirst"}]),
        "padding": None,
        "added_tokens": [{"id": 18, "content": "</s>", **special}],
        "normalizer": of(normalizers, "normalizers"),
        "pre_tokenizer": of(splits, "pretokenizers"),
        "post_processor": draw.choice(posts),
        "decoder": of(decoders, "decoders"),
        "model": draw.choice(models),
    }


def write_tokenizer(workdir: Path, draw: random.Random) -> None:
    """Writes the files of a tokenizer, one of them changed."""
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir()
    made: dict[str, Any] = {
        "tokenizer.json": tokenizer(draw),
        "spec.json": draw.choice([{"kind": "bytes", "ends": [3]}, {"kind": "huggingface", "hash": "x", "ends": [18]}]),
        "tokenizer_config.json": {"eos_token": draw.choice(["</s>", {"content": "</s>"}, "x"]), "model_max_length": 9},
        "generation_config.json": {"eos_token_id": draw.choice([18, [18, 3], 50256])},
        "vocab.json": {character: i for i, character in enumerate("abcdefghij")} | {"ab": 10, "a</w>": 11},
    }
    contents = {name: json.dumps(content).encode() for name, content in made.items()}
    contents["merges.txt"] = b"#version: 0.2\na b\na b</w>\n"
    name = draw.choice([*contents, *("tokenizer.json",) * 6])
    contents[name] = changed(contents[name], draw)
    if draw.randrange(4) == 0:
        del contents["tokenizer.json"]
    for name, content in contents.items():
        (workdir / name).write_bytes(content)


def tokenizer_readers() -> dict[str, Callable[[Path], None]]:
    """The ways in which the files of a tokenizer are read."""
    from gptjax.data import tokenizers
    from gptjax.interop import tokenizer_files

    def use(found: tokenizers.Tokenizer | None) -> None:
        if found is not None:
            for text in TEXTS:
                found.decode(found.encode(text))

    def imported(workdir: Path) -> None:
        found = tokenizer_files.read_tokenizer(workdir)
        use(None if found is None else found.with_ends(tokenizer_files.ends_of(workdir, found)))

    return {
        "workdir": lambda workdir: use(tokenizers.load(workdir)),
        "json:PATH": lambda workdir: use(tokenizers.read_json(workdir / "tokenizer.json")),
        "import": imported,
    }


# --- checkpoints ------------------------------------------------------------------------------------------------------


def make_run(workdir: Path) -> None:
    """Trains a small run with two checkpoints."""
    from gptjax.config import replace
    from gptjax.run import run
    from tests.tiny_runs import tiny_config

    changes = {"model": {"vocab_size": 257}, "checkpoint": {"keep_last": 2}, "evaluation": {"sample_tokens": 0}}
    run(replace(tiny_config(workdir.parent), changes), workdir)


def write_run(original: Path, workdir: Path, draw: random.Random) -> None:
    """Copies a run, with a change of a file of its newest checkpoint, its config or its tokenizer."""
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(original, workdir)
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    files = [path for path in newest.rglob("*") if path.is_file()]
    metadata = [path for path in files if path.read_bytes()[:1] == b"{"]
    path = draw.choice([workdir / "config.json", workdir / "tokenizer" / "spec.json", *files, *metadata * 3])
    path.write_bytes(changed(path.read_bytes(), draw))


def checkpoint_readers(original: Path) -> dict[str, Callable[[Path], None]]:
    """The ways in which a workdir is read."""
    import jax

    from gptjax.checkpoint.manager import Checkpoints
    from gptjax.checkpoint.restore import resumed_state
    from gptjax.config import read_config
    from gptjax.data import tokenizers
    from gptjax.parallel.mesh import make_mesh
    from gptjax.stages import registry
    from gptjax.stages.trained_model import load_model

    config = read_config(original)
    parameters = registry.parameters(config.completed(tokenizers.load(original / "tokenizer").vocab_size))

    def generate(workdir: Path) -> None:
        before = contents(workdir)
        try:
            load_model(workdir)
        finally:
            assert contents(workdir) == before, "a reader changed files"

    def resume(workdir: Path) -> None:
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh), Checkpoints(workdir, config.checkpoint) as checkpoints:
            resumed_state(parameters, mesh, checkpoints)

    return {"generate": generate, "resume": resume}


def contents(directory: Path) -> dict[str, bytes]:
    """The files below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def main(_: list[str]) -> None:
    draw, results = random.Random(SEED.value), Counter[str]()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory(prefix="fuzz_files_") as name:
        place, workdir, original = Path(name), Path(name) / "workdir", Path(name) / "original"
        os.chdir(place)
        os.environ["HOME"] = name
        if KIND.value == "checkpoints":
            make_run(original)
        readers = tokenizer_readers() if KIND.value == "tokenizers" else checkpoint_readers(original)
        outside = {path.name for path in place.iterdir()} | {"workdir"}
        until, cases = time.monotonic() + SECONDS.value, 0
        while time.monotonic() < until:
            if KIND.value == "tokenizers":
                write_tokenizer(workdir, draw)
            else:
                write_run(original, workdir, draw)
            for way, read in readers.items():
                results[f"{way}: {outcome(read, workdir)}"] += 1
            cases += 1
            assert {path.name for path in place.iterdir()} <= outside, "a file outside the workdir"
    print(f"{cases:,} cases, none hung and none had a traceback: {dict(sorted(results.items()))}")


def outcome(read: Callable[[Path], None], workdir: Path) -> str:
    """Reads files: "read", or "refused" by a UserError of one line; a copy is kept when anything else happens."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    try:
        read(workdir)
    except UserError as error:
        if str(error) and "\n" not in str(error):
            return "refused"
        raise
    except BaseException:
        kept = Path(tempfile.mkdtemp(prefix="fuzz_files_failed_")) / "workdir"
        print(f"failed: {shutil.copytree(workdir, kept)}", flush=True)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    return "read"


if __name__ == "__main__":
    app.run(main)
