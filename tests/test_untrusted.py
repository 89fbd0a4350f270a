"""Workdirs, imported directories and data may be untrusted: their content is data, or refused in one line.

Many tests read files that hypothesis generates, or changes in one place; the only exception may be a UserError.
"""

import contextlib
import copy
import dataclasses
import functools
import gzip
import json
import os
import shutil
import string
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax import config as c
from gptjax import files
from gptjax.checkpoint import lock
from gptjax.config import UserError
from gptjax.data import compression, preparation, tokenizers
from gptjax.data.sources import open_source
from gptjax.files import is_plain_name
from gptjax.interop import families, peft_files, safetensors_files
from gptjax.stages.trained_model import load_model
from gptjax.training.debug_bundles import load_bundle
from gptjax.training.metrics_file import read_metrics

FIXTURES = Path(__file__).parent / "fixtures" / "huggingface"

fuzz = settings(
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],  # which a busy machine is
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
scalars |= st.sampled_from(["../x", "/etc/passwd", 10**400, -1, 0, 1e999, "\ud800", "a" * 300])
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3))
deep = st.just(b"[" * 100_000)


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all parts of a JSON value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at, *(place for key, part in items for place in places(part, (*at, key)))]


def changed(draw: Any, tree: Any) -> bytes:
    """A JSON document like `tree`, with one part replaced or left out; or bytes that are none."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=50) | deep)
    place = draw(st.sampled_from(places(tree)))
    tree, value = copy.deepcopy(tree), draw(values)
    if not place:
        return json.dumps(value).encode()
    part = tree
    for key in place[:-1]:
        part = part[key]
    if draw(st.booleans()):
        part[place[-1]] = value
    else:
        del part[place[-1]]
    return json.dumps(tree).encode()


# --- configs and their arguments --------------------------------------------------------------------------------------


@fuzz
@given(st.data())
def test_configs_of_workdirs(tmp_path, data):
    config = c.Config(batch=c.BatchConfig(epochs=1.0, tokens_per_batch=1024))
    (tmp_path / "config.json").write_bytes(changed(data.draw, json.loads(c.to_json(config))))
    with contextlib.suppress(UserError):
        assert isinstance(c.read_config(tmp_path), c.Config)


@fuzz
@given(st.text(alphabet=string.printable, max_size=40) | st.text(max_size=20), st.data())
def test_config_arguments(text, data):
    defaults = {"size": "124m", "layers": 3, "rate": 0.1, "runlocal": False}
    parts = st.sampled_from([*defaults, "=", ",", "true", "1e9", "nan", "3", ""])
    for argument in (text, "".join(data.draw(st.lists(parts, max_size=8)))):
        with contextlib.suppress(UserError):
            found = c.parse_arg(argument, **defaults)
            assert {name: type(value) for name, value in found.items()} == {k: type(v) for k, v in defaults.items()}
        with contextlib.suppress(UserError):
            c.check_key(argument)
        with contextlib.suppress(UserError):
            tokenizers.check_spec(argument)
        with contextlib.suppress(UserError):
            open_source(argument.replace("tfds", ""))


@pytest.mark.parametrize("number", [10**400, -(10**400)])
def test_numbers_beyond_a_float(tmp_path, number):
    tree = json.loads(c.to_json(c.Config()))
    tree["optimizer"]["eps"] = number
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"optimizer\.eps is too large a number"):
        c.read_config(tmp_path)


# --- text -------------------------------------------------------------------------------------------------------------

line = st.sampled_from([b'{"text": "a"}', b'{"text": "\\ud800"}', b'{"text": 1}', b"{}", b"[]", b"\xff", b"", b"\0"])
lines = st.lists(line | st.binary(max_size=20) | deep, max_size=5).map(b"\n".join)


@fuzz
@given(content=lines, suffix=st.sampled_from(["", ".gz", ".zst"]), cut=st.integers(0, 60), whole=st.booleans())
def test_text_and_jsonl(tmp_path, content, suffix, cut, whole):
    packed = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](content)
    (tmp_path / f"a{suffix}").write_bytes(packed if whole else packed[:cut] + packed[cut + 1 :])
    for kind in ("text", "jsonl"):
        for policy in ("error", "skip"):
            for utf8 in ("error", "replace"):
                with contextlib.suppress(UserError):
                    source = open_source(f"{kind}:{tmp_path}/a{suffix}", invalid_utf8=utf8, on_corrupt=policy)
                    for document in source.documents():
                        document.encode()
                    source.fingerprint()


# --- a workdir's other files ------------------------------------------------------------------------------------------


MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "</s>": 3}, "merges": [["a", "b"]], "unk_token": None}
END = {"id": 3, "content": "</s>", "special": True, "normalized": False, "single_word": False}
TOKENIZERS = [
    {
        "version": "1.0",
        "added_tokens": [END | {"lstrip": False, "rstrip": False}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, *normalizers]},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Strip", "content": "_", "start": 1, "stop": 0},
        "model": model,
    }
    for normalizers, pattern, model in (
        ([{"type": "Precompiled", "precompiled_charsmap": "CAAAAAAAAAD/////AAA="}], "a+", MODEL),
        ([{"type": "Prepend", "prepend": "_"}], "a+", {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]]}),
        ([], "(a|a)+$", MODEL),
        ([], " ?\\w+", MODEL | {"byte_fallback": True, "ignore_merges": False}),
    )
]


@settings(fuzz, max_examples=25)  # each starts a process
@given(st.data())
def test_tokenizers_of_workdirs(tmp_path, data):
    specs = [{"kind": "bytes"}, {"kind": "huggingface", "name": "x"}, {"kind": "tiktoken", "name": "none"}]
    (tmp_path / "spec.json").write_bytes(changed(data.draw, data.draw(st.sampled_from(specs))))
    (tmp_path / "tokenizer.json").write_bytes(changed(data.draw, data.draw(st.sampled_from(TOKENIZERS))))
    with contextlib.suppress(UserError):
        tokenizers.load(tmp_path)
    with contextlib.suppress(UserError):
        tokenizer = tokenizers.read_json(tmp_path / "tokenizer.json")
        tokenizer.decode(tokenizer.encode("Some text, 日本 aab"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pretrained: Path) -> Path:
    return Path(shutil.copytree(pretrained, tmp_path_factory.mktemp("trained") / "run"))


@settings(fuzz, max_examples=10)  # each opens a checkpoint
@given(st.data())
def test_metadata_of_checkpoints(trained, data):
    """The JSON files of a run and of its checkpoint."""
    paths = sorted(path for path in trained.rglob("*") if path.is_file() and path.read_bytes()[:1] == b"{")
    path = data.draw(st.sampled_from(paths))
    original = path.read_bytes()
    try:
        path.write_bytes(changed(data.draw, json.loads(original)))
        before = checkpoint_files(trained)
        with contextlib.suppress(UserError):
            load_model(trained)
        assert checkpoint_files(trained) == before
    finally:
        path.write_bytes(original)


def checkpoint_files(workdir: Path) -> dict[Path, bytes | None]:
    """The contents of the files under checkpoints/; None for directories."""
    return {path: path.read_bytes() if path.is_file() else None for path in (workdir / "checkpoints").rglob("*")}


@fuzz
@given(st.data())
def test_metrics(tmp_path, data):
    records = [{"run": {"parameters": 1, "devices": "cpu"}}, {"step": 1, "tokens": 2, "split": "train", "loss": 3.0}]
    content = b"\n".join(changed(data.draw, record) for record in records) + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with contextlib.suppress(UserError):
        for record in read_metrics(tmp_path)[1]:
            assert type(record["step"]) is type(record["tokens"]) is int


@fuzz
@given(st.data())
def test_locks(tmp_path, data):
    (tmp_path / "run.lock").write_bytes(changed(data.draw, lock._describe()))
    owner, beat = lock._lock_of(tmp_path).read()
    assert isinstance(owner, dict)
    assert beat is not None


@fuzz
@given(st.binary(max_size=80), st.integers(0, 400))
def test_debug_bundles(tmp_path, content, cut):
    (directory := tmp_path / "step_00000001").mkdir(exist_ok=True)
    np.savez(directory / "batch.npz", tokens=np.zeros((1, 2, 3), np.int32))
    good = (directory / "batch.npz").read_bytes()
    for damaged in (content, good[:cut] + content + good[cut + len(content) :]):
        (directory / "batch.npz").write_bytes(damaged)
        with contextlib.suppress(UserError):
            load_bundle(directory)


def test_arrays_that_are_pickles_are_refused(tmp_path):
    (tmp_path / "step_00000001").mkdir()
    np.savez(tmp_path / "step_00000001" / "batch.npz", tokens=np.array([{"any": "code"}], dtype=object))
    with pytest.raises(UserError, match="allow_pickle=False"):
        load_bundle(tmp_path / "step_00000001")


@pytest.mark.parametrize("content", [b"[]", b'{"init_timestamp_nsecs": []}', b"[" * 100_000, b"{"])
def test_the_metadata_that_orbax_reads_first(trained, content):
    (path := trained / "checkpoints" / "0" / "_CHECKPOINT_METADATA").write_bytes(content)
    if content != b"{":  # which orbax takes for a file that is missing
        with pytest.raises(UserError, match=r"a _CHECKPOINT_METADATA in .* is damaged .*: remove that file"):
            load_model(trained)
        path.unlink()
    load_model(trained)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_arrays_that_would_fill_the_memory_are_not_decompressed(tmp_path, monkeypatch):
    (tmp_path / "step_00000001").mkdir()
    np.savez_compressed(tmp_path / "step_00000001" / "batch.npz", tokens=np.zeros(2**20, np.int32))
    monkeypatch.setattr(files.read_arrays, "__defaults__", (2**20,))
    with pytest.raises(UserError, match=r"its arrays have 4,194,\d+ bytes, more than 1,048,576"):
        load_bundle(tmp_path / "step_00000001")


def test_json_files_have_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100)
    for name in ("config.json", "model.safetensors.index.json", "adapter_config.json"):
        (tmp_path / name).write_text(json.dumps({"a": "b" * 100}))
    read_adapter = functools.partial(peft_files.load_lora, model=c.GPTConfig())
    for read in (c.read_config, families.read_config, safetensors_files.read_headers, read_adapter):
        with pytest.raises(UserError, match="it has 109 bytes, more than 100"):
            read(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")  # which nobody writes: opening it would wait for ever
    with pytest.raises(UserError, match="is not a regular file"):
        c.read_config(tmp_path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("content", [b"a" * 2**26, b"a\n" * 2**25])
def test_what_is_read_whole_has_a_largest_size(tmp_path, monkeypatch, suffix, content):
    """A file of a few kB that decompresses to 64 MiB: `jsonl:` reads it by lines, `text:` as a whole."""
    monkeypatch.setattr(compression, "MAX_BYTES", 2**20)
    packed = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](content)
    (tmp_path / f"a{suffix}").write_bytes(packed)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"it has more than 1,048,576 bytes, but is read as a whole"):
            list(open_source(f"text:{tmp_path}/a{suffix}").documents())
        message = "a:1 is not JSON" if b"\n" in content else "it has a line of more than 1,048,576 bytes"
        with pytest.raises(UserError, match=message.replace("a:1", f"a{suffix}:1")):
            list(open_source(f"jsonl:{tmp_path}/a{suffix}").documents())
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**24
    finally:
        tracemalloc.stop()


# --- prepared corpora -------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("a text " * 100)
    source = open_source(f"text:{tmp_path}/a.txt")
    preparation.prepare(source, tokenizers.BytesTokenizer(), tmp_path, validation_fraction=0.5)
    (metadata,) = tmp_path.glob("corpora/*/metadata.json")
    return metadata.parent


@fuzz
@given(data=st.data())
def test_prepared_corpora(corpus, data):
    original = (corpus / "metadata.json").read_bytes()
    (corpus / "metadata.json").write_bytes(changed(data.draw, json.loads(original)))
    try:
        for split in preparation._open(corpus) or ():
            with contextlib.suppress(UserError):
                assert split.read(0, 0, 5).shape == (5,)
    finally:
        (corpus / "metadata.json").write_bytes(original)


@pytest.mark.parametrize("name", ["../a.txt", "/etc/hostname", "..", "x/../../a.txt"])
def test_a_corpus_names_no_file_elsewhere(corpus, name):
    metadata = json.loads((corpus / "metadata.json").read_text())
    path = corpus / name
    metadata["splits"]["train"]["files"][name] = path.stat().st_size if path.exists() else 0
    (corpus / "metadata.json").write_text(json.dumps(metadata))
    assert preparation._open(corpus) is None


# --- imported directories ---------------------------------------------------------------------------------------------


def header(tree: bytes) -> bytes:
    return len(tree).to_bytes(8, "little") + tree + bytes(64)


TENSORS = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


@fuzz
@given(st.data())
def test_safetensors(tmp_path, data):
    content = header(changed(data.draw, TENSORS))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    (tmp_path / "model.safetensors").write_bytes(content)
    with contextlib.suppress(UserError):
        for tensor in safetensors_files.read_headers(tmp_path).values():
            assert tensor.start + tensor.num_bytes <= len(content)
            if tensor.dtype in safetensors_files.DTYPES:
                assert safetensors_files.read(tensor).nbytes == tensor.num_bytes


@fuzz
@given(st.data())
def test_safetensors_indices(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(header(json.dumps(TENSORS).encode()))
    index = {"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_bytes(changed(data.draw, index))
    with contextlib.suppress(UserError):
        for tensor in safetensors_files.read_headers(tmp_path).values():
            assert tensor.file.parent == tmp_path


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..\\x.safetensors", "\0.x"])
def test_an_index_names_no_file_elsewhere(tmp_path, name):
    assert not is_plain_name(name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="not the name of a file next to it"):
        safetensors_files.read_headers(tmp_path)


@fuzz
@given(st.sampled_from(sorted(path.name for path in FIXTURES.iterdir())), st.data())
def test_configs_of_imported_models(tmp_path, name, data):
    theirs = json.loads((FIXTURES / name / "config.json").read_text())
    (tmp_path / "config.json").write_bytes(changed(data.draw, theirs))
    with contextlib.suppress(UserError):
        assert dataclasses.is_dataclass(families.read_config(tmp_path)[1])
