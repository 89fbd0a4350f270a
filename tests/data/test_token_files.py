"""Files of token ids: documents, the prepared corpus, and user errors."""

from pathlib import Path

import numpy as np
import pytest

from gptjax.config import DataConfig, UserError
from gptjax.data import token_files
from gptjax.data.pipeline import held_out_documents, open_corpus
from gptjax.data.sources import open_source
from gptjax.data.tokenizers import BytesTokenizer

TOKENIZER = BytesTokenizer()
END = TOKENIZER.end_of_text


def read(spec: str, **options) -> list[list[int]]:
    return [ids.tolist() for ids in open_source(spec, **options).documents_for(TOKENIZER)]


def write(path: Path, *ids: int, dtype: str = "<u2", header: tuple[int, ...] = ()) -> Path:
    head = np.zeros(256 if header else 0, "<i4")
    head[: len(header)] = header
    path.write_bytes(head.tobytes() + np.array(ids, dtype).tobytes())
    return path


def test_documents_end_or_begin_with_end_of_text(tmp_path: Path) -> None:
    write(tmp_path / "after.bin", 1, 2, END, 3, END)
    write(tmp_path / "before.bin", END, 1, 2, END, 3)
    assert read(f"tokens:{tmp_path}/after.bin@uint16") == [[1, 2], [3]]
    assert read(f"tokens:{tmp_path}/before.bin@uint16") == [[1, 2], [3]]


def test_a_document_continues_in_the_next_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "_CHUNK_BYTES", 4)
    write(tmp_path / "0.bin", END, 1, 2, 3, 4, 5, header=(20240520, 1, 6))
    write(tmp_path / "1.bin", 6, END, 7, 8, 9, header=(20240520, 1, 5))
    assert read(f"tokens:{tmp_path}/*.bin@uint16") == [[1, 2, 3, 4, 5, 6], [7, 8, 9]]


def test_the_corpus_is_that_of_the_text(tmp_path: Path) -> None:
    texts = [f"document {i}, and naïve " * 3 for i in range(30)]
    ids = [token for text in texts for token in [*TOKENIZER.encode(text).tolist(), END]]
    write(tmp_path / "a.bin", *ids, dtype="<u4")
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02}.txt").write_text(text)
    data = DataConfig(tokenizer="bytes", cache_dir=str(tmp_path / "cache"), validation_fraction=0.2)
    corpora, held_out = [], []
    for source in (f"text:{tmp_path}/*.txt", f"tokens:{tmp_path}/a.bin@uint32"):
        named = DataConfig(**{**data.__dict__, "source": source})
        corpora.append(open_corpus(named, context_length=16, seed=3))
        held_out.append(list(held_out_documents(named, TOKENIZER)))
    assert held_out[0] == held_out[1] == texts[4::5]
    first, second = corpora
    for split in ("train", "validation"):
        one, other = getattr(first, split), getattr(second, split)
        assert one.split.text_bytes == other.split.text_bytes
        for i in range(one.examples_per_epoch):
            np.testing.assert_array_equal(one[i]["tokens"], other[i]["tokens"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a.bin", r"malformed source 'tokens:.*a\.bin': write tokens:GLOB@DTYPE"),
        ("a.bin@int8", "unknown dtype 'int8', choose one of uint8, uint16, uint32, int32, int64"),
        ("odd.bin@uint16", r"odd\.bin does not have a whole number of tokens of uint16, 2 bytes each: it is truncated"),
        ("a.bin@uint32", r"a\.bin: token 0 is 131073, but the tokenizer has only 257 ids: set data\.tokenizer"),
        ("large.bin@uint16", r"large\.bin: token 2 is 257, but the tokenizer has only 257 ids"),
        ("llm.bin@uint32", r"llm\.bin declares tokens of uint16, not uint32: write @uint16"),
        ("llm.bin@uint16", r"llm\.bin has 2 tokens, but its header declares 3: copy it again"),
        (
            "long.bin@uint16",
            r"long\.bin has more than 100 tokens without the end-of-text token 256: is data\.tokenizer",
        ),
        ("ends.bin@uint16", "has no text: all its documents are empty"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    monkeypatch.setattr(token_files, "MAX_TOKENS", 100)
    write(tmp_path / "a.bin", 1, 2, END, 0)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    write(tmp_path / "large.bin", 1, 2, 257)
    write(tmp_path / "llm.bin", 1, 2, header=(20240520, 1, 3))
    write(tmp_path / "long.bin", *[1] * 101)
    write(tmp_path / "ends.bin", END, END)
    with pytest.raises(UserError, match=message) as error:
        read(f"tokens:{tmp_path}/{spec}")
    assert "\n" not in str(error.value)


def test_damaged_files_can_be_skipped(tmp_path: Path) -> None:
    write(tmp_path / "0.bin", 1, END, 2, 999)
    write(tmp_path / "1.bin", 3, END)
    source = open_source(f"tokens:{tmp_path}/*.bin@uint16", on_corrupt="skip")
    assert [ids.tolist() for ids in source.documents_for(TOKENIZER)] == [[3]]
    assert source.skipped == 1


def test_token_ids_are_not_text(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", 1, END)
    with pytest.raises(
        UserError, match=r"has token ids, not text: set data\.tokenizer to the tokenizer that made them"
    ):
        list(open_source(f"tokens:{tmp_path}/a.bin@uint16").documents())
