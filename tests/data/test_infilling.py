"""Fill in the middle: the parts of a document are its text, character by character, and rows keep their form."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import UserError
from gptjax.data import tokenizers
from gptjax.data.infilling import InfillingExamples, InfillingFormat, Split
from gptjax.data.pipeline import PackedExamples, batches
from gptjax.data.preparation import prepare
from gptjax.data.sources import open_source
from gptjax.data.special_tokens import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, with_special_tokens
from gptjax.data.tokenizers import BytesTokenizer, Tokenizer
from tests.data.test_pipeline import write_jsonl

SENTINELS = (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)
TEXT = "Fill — in the middle: naïve 日本語 🙂 words, and more of them.\n"


def opened(spec: str) -> Tokenizer:
    cache = Path("~/.cache/gptjax").expanduser()
    found = tokenizers.get_tokenizer(spec, train_documents=lambda: (), corpus_fingerprint="", cache_dir=cache)
    return with_special_tokens(found, SENTINELS)


TOKENIZERS = {name: opened(name) for name in ("bytes", "gpt2")}


def parts(form: InfillingFormat, tokens: list[int]) -> tuple[list[int], list[int], list[int]]:
    """(prefix, middle, suffix) tokens of a split document; the prefix of SPM cannot be told from the middle."""
    assert tokens[0] == form.prefix
    assert tokens[-1] == form.end_of_text
    assert sum(token in (form.prefix, form.suffix, form.middle) for token in tokens) == 3
    suffix, middle = tokens.index(form.suffix), tokens.index(form.middle)
    return tokens[1:suffix], tokens[middle + 1 : -1], tokens[suffix + 1 : middle]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60)
@given(
    text=st.text(min_size=1) | st.just(TEXT),
    cuts=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    suffix_first=st.booleans(),
    ends=st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
def test_the_parts_of_a_document_are_its_text(name, text, cuts, suffix_first, ends):
    tokenizer = TOKENIZERS[name]
    form = InfillingFormat(tokenizer)
    tokens = tokenizer.encode(text)
    tokens = tokens[ends[0] : len(tokens) - ends[1]]  # a row may cut a document within a character
    found, middle = form.document(tokens, Split(*cuts, suffix_first))
    before, inside, after = parts(form, found)
    assert tokenizer.decode([*before, *inside, *after]) == tokenizer.decode(tokens)
    assert raw(tokenizer, [*before, *inside, *after]) == raw(tokenizer, tokens)
    if suffix_first:
        assert before == []
        assert middle <= len(inside) + 1
    else:
        assert middle == len(inside) + 1


def raw(tokenizer: Tokenizer, tokens) -> bytes:
    """The bytes of tokens, parts of characters included."""
    if isinstance(tokenizer, tokenizers.TiktokenTokenizer):
        return b"".join(tokenizer.encoding.decode_single_token_bytes(int(token)) for token in tokens)
    return bytes(int(token) for token in tokens)


def test_splits_by_hand():
    form, encode = InfillingFormat(TOKENIZERS["bytes"]), TOKENIZERS["bytes"].encode
    assert (form.prefix, form.suffix, form.middle) == (257, 258, 259)
    text, a, b, c, d, e, accented = encode("abécde"), *b"abcde", list("é".encode())  # cuts at 0 to 6 characters
    assert form.document(text, Split(0.6, 0.3, False)) == ([257, a, b, 258, d, e, 259, *accented, c, 256], 4)
    assert form.document(text, Split(0.3, 0.6, True)) == ([257, 258, d, e, 259, a, b, *accented, c, 256], 4)
    assert form.document(text, Split(0.0, 0.99, False)) == ([257, 258, 259, a, b, *accented, c, d, e, 256], 8)
    assert form.prompt("ab", "é") == [256, 257, a, b, 258, *accented, 259]


def test_cuts_are_uniform_over_the_places_between_characters():
    form, encode = InfillingFormat(TOKENIZERS["bytes"]), TOKENIZERS["bytes"].encode
    lengths = {len(parts(form, form.document(encode("ab"), Split(cut, 0.99, False))[0])[0]) for cut in (0, 0.34, 0.67)}
    assert lengths == {0, 1, 2}


def test_cl100k_has_the_tokens_already():
    tokenizer = opened("cl100k_base")
    assert tokenizer.added == ()
    form = InfillingFormat(tokenizer)
    assert (form.prefix, form.middle, form.suffix) == (100258, 100259, 100260)


def test_tokenizers_that_cannot(tmp_path):
    with pytest.raises(UserError, match="lacks the tokens"):
        InfillingFormat(BytesTokenizer())
    lossy = tokenizers.get_tokenizer(
        "gpt1_bpe:300", train_documents=lambda: [TEXT] * 9, corpus_fingerprint="x", cache_dir=tmp_path
    )
    with pytest.raises(UserError, match=r"fill_in_the_middle.*byte-level"):
        InfillingFormat(with_special_tokens(lossy, SENTINELS))


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("corpus")
    documents = [f"{i}: {TEXT * (1 + i % 4)}" for i in range(40)]
    spec = write_jsonl(directory / "text.jsonl", documents)
    return prepare(open_source(spec), BytesTokenizer(), directory, validation_fraction=0.0)[0]


def rows(split, packing="segment", seed: int | None = 0, length=200, **changes) -> InfillingExamples:
    packed = PackedExamples(split, length, packing=packing, seed=seed)
    form = InfillingFormat(TOKENIZERS["bytes"])
    return InfillingExamples(packed, form, **({"rate": 0.5, "spm_rate": 0.5, "seed": 0} | changes))


@pytest.mark.parametrize("packing", ["segment", "concatenate"])
@pytest.mark.parametrize("seed", [None, 0])
def test_nothing_changes_where_nothing_is_split(split, packing, seed):
    packed, found = PackedExamples(split, 200, packing=packing, seed=seed), rows(split, packing, seed, rate=0.0)
    for i in range(packed.examples_per_epoch):
        expected, arrays = packed[i], found[i]
        assert expected.keys() == arrays.keys()
        for name, array in expected.items():
            assert array.dtype == arrays[name].dtype
            valid = arrays["weights"] > 0 if name in ("tokens", "positions") else slice(None)
            np.testing.assert_array_equal(arrays[name][valid], array[valid], err_msg=name)


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_rows_have_whole_split_documents_in_their_places(split, rate):
    packed, found = PackedExamples(split, 200, packing="segment", seed=0), rows(split, rate=rate)
    form = InfillingFormat(TOKENIZERS["bytes"])
    sentinels, count, spm, documents, kept = {form.prefix, form.suffix, form.middle}, 0, 0, 0, 0
    for i in range(packed.examples_per_epoch):
        arrays, before = found[i], packed[i]
        valid = int(arrays["weights"].sum())
        kept += valid
        assert (arrays["weights"][:valid] == 1).all()
        row = np.append(arrays["tokens"][:1], arrays["targets"][:valid])
        np.testing.assert_array_equal(arrays["tokens"][1:valid], arrays["targets"][: valid - 1])
        texts = []
        for document in np.split(row, np.flatnonzero(row == 256) + 1):
            documents += len(document) > 1
            if sentinels & set(document.tolist()):
                prefix, middle, suffix = parts(form, document.tolist())
                texts.append(bytes([*prefix, *middle, *suffix]))
                count, spm = count + 1, spm + (document[1] == form.suffix and len(suffix) > 0 and prefix == [])
            else:
                texts.append(bytes(document[document != 256].tolist()))
        original = np.append(before["tokens"][:1], before["targets"])
        expected = [
            bytes(part[part != 256].tolist()) for part in np.split(original, np.flatnonzero(original == 256) + 1)
        ]
        # The text of the row in its order; only its last document may be shorter.
        written, wanted = b"\0".join(texts).rstrip(b"\0"), b"\0".join(expected)
        assert wanted.startswith(written)
        assert len(wanted) - len(written) <= 4 * 8 + 3
        ends = np.flatnonzero(arrays["tokens"][:valid] == 256)
        starts = np.unique([0, *ends])
        np.testing.assert_array_equal(np.flatnonzero(arrays["positions"][:valid] == 0), starts)
        assert (np.diff(arrays["segments"][:valid]) >= 0).all()
        assert not arrays["segments"][valid:].any()
    assert kept > 0.95 * packed.examples_per_epoch * 200
    expected_count = rate * documents
    assert abs(count - expected_count) <= 5 * np.sqrt(documents * rate * (1 - rate)) + 8  # tiny ones fall away
    assert 0.2 < spm / count < 0.8


def test_rows_of_short_documents_keep_their_order(tmp_path):
    """Where several documents do not fit any more, none comes after the one that is cut."""
    spec = write_jsonl(tmp_path / "text.jsonl", ["x" * (1 + i % 9) + str(i) for i in range(200)])
    short = prepare(open_source(spec), BytesTokenizer(), tmp_path, validation_fraction=0.0)[0]
    form, packed = InfillingFormat(TOKENIZERS["bytes"]), PackedExamples(short, 40, seed=0)
    cut = 0
    for i in range(packed.examples_per_epoch):
        arrays, before = rows(short, "concatenate", length=40, rate=0.5)[i], packed[i]
        row = np.append(arrays["tokens"][:1], arrays["targets"][: int(arrays["weights"].sum())])
        texts = []
        for document in np.split(row, np.flatnonzero(row == 256) + 1):
            is_split = len(document) > 0 and document[0] == form.prefix
            of = [token for part in parts(form, document.tolist()) for token in part] if is_split else document
            texts.append(bytes(int(token) for token in of if token < 256))
        original = bytes((np.append(before["tokens"][:1], before["targets"]) % 256).tolist())  # end-of-text is 0
        written = b"\0".join(texts).rstrip(b"\0")
        assert original.startswith(written)
        cut += b"\0" in original[len(written) + 1 :]
    assert cut > 0  # rows that lose a whole document


def test_only_the_middles_are_targets(split):
    for i in range(20):
        arrays, whole = rows(split, rate=1.0, only_middle=True)[i], rows(split, rate=1.0)[i]
        np.testing.assert_array_equal(arrays["targets"], whole["targets"])
        targets = arrays["targets"][arrays["weights"] > 0]
        assert (targets < 257).all()
        is_end = (whole["targets"] == 256) & (whole["weights"] > 0)
        assert (arrays["weights"][is_end] == 1).all()  # each middle learns to end
        assert arrays["weights"].sum() < whole["weights"].sum()


def test_rows_depend_on_the_seed_and_their_number_alone(split):
    whole = [rows(split)[i] for i in range(16)]
    first = next(batches(rows(split), start=8, batch_size=8, rows=range(2, 6), prefetch=1))
    for name in whole[0]:
        np.testing.assert_array_equal(first.arrays[name], np.stack([whole[8 + row][name] for row in range(2, 6)]))
    assert any((rows(split, seed=0, rate=1.0)[i]["tokens"] != whole[i]["tokens"]).any() for i in range(8))


def test_a_tiny_context(split):
    for i in range(40):
        arrays = rows(split, length=4, rate=1.0)[i]
        assert all(len(array) == 4 for array in arrays.values())
