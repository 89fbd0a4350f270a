"""Masked and prefix language models: which positions are selected, what they become, and that it is reproducible."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptjax.data import tokenizers
from gptjax.data.masked_text import MaskedExamples, PrefixExamples, WordStarts
from gptjax.data.pipeline import ExampleArrays, batches
from gptjax.data.special_tokens import MASK, is_concatenative, special_id, with_special_tokens
from gptjax.data.tokenizers import BytesTokenizer

LENGTH, VOCABULARY, END, MASK_TOKEN = 256, 500, 7, 500


class Rows:
    """64 rows of random tokens, each row with documents of 40, 90 and 100 tokens, and padding."""

    def __init__(self, packing: str = "segment"):
        self.packing, self.text = packing, np.random.default_rng(0).integers(10, VOCABULARY, (64, LENGTH + 1))
        self.text[:, [0, 40, 130, 230]] = END
        self.text[:, 231:] = END

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> ExampleArrays:
        row, steps = self.text[index].astype(np.int32), np.arange(LENGTH)
        arrays = {"tokens": row[:-1], "targets": row[1:], "weights": (steps < 230).astype(np.float32)}
        if self.packing == "segment":
            segments = np.where(steps < 40, 1, np.where(steps < 130, 2, np.where(steps < 230, 3, 0)))
            starts = np.array([230, 0, 40, 130])[segments]
            arrays |= {"segments": segments.astype(np.int32), "positions": (steps - starts).astype(np.int32)}
        return arrays


def masked(rows: Rows, seed: int = 0, **changes: object) -> MaskedExamples:
    settings = {"mask_token": MASK_TOKEN, "end_of_text": END, "ordinary_tokens": VOCABULARY, "rate": 0.15}
    return MaskedExamples(rows, seed=seed, **(settings | changes))


def within_binomial_bounds(count: int, trials: int, probability: float) -> bool:
    """Within five standard deviations; the sampling seed is fixed, so that the result is too."""
    return abs(count - trials * probability) < 5 * np.sqrt(trials * probability * (1 - probability))


@pytest.mark.parametrize("packing", ["segment", "concatenate"])
def test_masking_statistics(packing: str) -> None:
    rows = Rows(packing)
    examples = masked(rows)
    original, found = [rows[i] for i in range(64)], [examples[i] for i in range(64)]
    before, tokens, weights = (
        np.stack([a[name] for a in of]) for of, name in ((original, "tokens"), (found, "tokens"), (found, "weights"))
    )
    np.testing.assert_array_equal(np.stack([a["targets"] for a in found]), before)
    selected = weights == 1
    assert set(np.unique(weights)) == {0, 1}
    assert (tokens[~selected] == before[~selected]).all()
    text = (np.arange(LENGTH) < 230) & (before != END)
    assert not (selected & ~text).any()
    count, trials = int(selected.sum()), int(text.sum())
    assert within_binomial_bounds(count, trials, 0.15)
    assert within_binomial_bounds(int((tokens == MASK_TOKEN).sum()), count, 0.8)
    # A random token is the original one in 1 of 499 cases.
    assert within_binomial_bounds(int((selected & (tokens == before)).sum()), count, 0.1 + 0.1 / 499)
    random = tokens[selected & (tokens != MASK_TOKEN) & (tokens != before)]
    assert ((random < VOCABULARY) & (random != END)).all()
    assert random.min() < 40  # the whole vocabulary
    assert random.max() > VOCABULARY - 40
    for original_arrays, arrays in zip(original, found, strict=True):
        if packing == "segment":
            np.testing.assert_array_equal(arrays["segments"], original_arrays["segments"])
            np.testing.assert_array_equal(arrays["positions"], original_arrays["positions"])
        else:
            np.testing.assert_array_equal(arrays["segments"], np.arange(LENGTH) < 230)


def test_end_of_text_is_not_sampled() -> None:
    examples = masked(Rows(), ordinary_tokens=9, end_of_text=END, rate=0.9)
    sampled = np.concatenate([a["tokens"][a["weights"] == 1] for a in map(examples.__getitem__, range(64))])
    sampled = sampled[sampled < 9]
    assert set(sampled.tolist()) == {0, 1, 2, 3, 4, 5, 6, 8}


def test_a_row_has_a_target() -> None:
    examples = masked(Rows(), rate=1e-9)
    assert all(examples[i]["weights"].sum() == 1 for i in range(64))
    everything = masked(Rows(), rate=1e-9, word_starts=lambda tokens: np.zeros(len(tokens), bool))
    assert {int(everything[i]["weights"].sum()) for i in range(64)} <= {39, 89, 99}  # one "word" a document


@pytest.mark.parametrize("wrap", [masked, lambda rows, seed=0: PrefixExamples(rows, seed=seed)])
def test_what_is_sampled_depends_on_the_seed_and_the_number_alone(wrap: Callable) -> None:
    whole = [wrap(Rows())[i] for i in range(24)]
    for start, rows in ((8, range(8)), (16, range(4, 8))):  # a resumed run, and the second of two processes
        (first, *_) = batches(wrap(Rows()), start=start, batch_size=8, rows=rows, prefetch=1)
        for name in whole[0]:
            expected = np.stack([whole[start + row][name] for row in rows])
            np.testing.assert_array_equal(first.arrays[name], expected)
    assert any((wrap(Rows(), seed=1)[i]["weights"] != whole[i]["weights"]).any() for i in range(4))
    assert (whole[0]["weights"] != whole[1]["weights"]).any()


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2() -> tokenizers.Tokenizer:
    cache = Path("~/.cache/gptjax").expanduser()
    return tokenizers.get_tokenizer("gpt2", train_documents=lambda: (), corpus_fingerprint="", cache_dir=cache)


def test_word_starts() -> None:
    text = "Don't  re-read 42 naïve\nwords."
    tokenizer = BytesTokenizer()
    tokens = tokenizer.encode(text)
    starts = np.flatnonzero(WordStarts(tokenizer)(tokens))
    words = [bytes(part.tolist()).decode() for part in np.split(tokens, starts[1:])]
    assert words == ["Don", "'", "t", " ", " ", "re", "-", "read", " ", "42", " ", "naïve", "\n", "words", "."]


def test_word_starts_of_subwords(gpt2: tokenizers.Tokenizer) -> None:
    tokens = gpt2.encode("Antidisestablishmentarianism is unhyphenated, 日本 too")
    starts = np.flatnonzero(WordStarts(gpt2)(tokens))
    words = [gpt2.decode(part) for part in np.split(tokens, starts[1:])]
    assert "".join(words) == "Antidisestablishmentarianism is unhyphenated, 日本 too"
    assert words[:4] == ["Antidisestablishmentarianism", " is", " unhyphenated", ","]
    assert words[-1] == " too"
    assert len(tokens) - len(words) > 1


def test_whole_words_are_selected() -> None:
    rows, tokenizer = Rows(), BytesTokenizer()
    word = b"whole words, and nothing less: "
    rows.text[:, 1:230] = np.resize(np.frombuffer(word, np.uint8), 229)
    rows.text[:, [40, 130]] = END
    starts = WordStarts(tokenizer)
    examples = masked(rows, mask_token=257, end_of_text=END, ordinary_tokens=256, word_starts=starts)
    share = []
    for i in range(64):
        found, tokens = examples[i], rows[i]["tokens"]
        boundaries = np.flatnonzero(starts(tokens) | (tokens == END) | np.append(True, np.diff(found["segments"]) != 0))
        pieces = np.split(found["weights"], boundaries[1:])
        assert all(len(set(piece.tolist())) == 1 for piece in pieces)
        share.append(found["weights"].sum() / 227)
    assert 0.1 < np.mean(share) < 0.2
    kept = [examples[i]["tokens"][examples[i]["weights"] == 1] for i in range(8)]
    assert any(0 < np.mean(part == 257) < 1 for part in kept)  # 80/10/10 is for each token


@pytest.mark.parametrize("spec", ["gpt2", "bytes", "bpe:300"])
def test_special_tokens_are_appended_and_saved(spec: str, gpt2: tokenizers.Tokenizer, tmp_path: Path) -> None:
    base = gpt2
    if spec != "gpt2":
        base = tokenizers.get_tokenizer(
            spec, train_documents=lambda: ["some words " * 9], corpus_fingerprint="words", cache_dir=tmp_path
        )
    extended = with_special_tokens(base, (MASK,))
    assert extended.vocab_size == base.vocab_size + 1
    assert special_id(extended, MASK) == extended.id_of("<|mask|>") == base.vocab_size
    assert with_special_tokens(extended, (MASK,)) is extended
    ids = extended.encode("a <|mask|> b")  # plain text
    assert base.vocab_size not in ids
    assert extended.decode([*ids, base.vocab_size]) == "a <|mask|> b"
    extended.save(tmp_path / "saved")
    loaded = tokenizers.load(tmp_path / "saved")
    assert (loaded.fingerprint, loaded.added, loaded.vocab_size) == (
        extended.fingerprint,
        MASK[:1],
        base.vocab_size + 1,
    )
    assert loaded.with_ends([0]).added == MASK[:1]
    assert extended.fingerprint != base.fingerprint
    assert extended.encoding_fingerprint == base.encoding_fingerprint == base.fingerprint
    assert is_concatenative(extended)


def test_a_name_that_text_encodes_to_is_no_special_token() -> None:
    word = BytesTokenizer()
    word.id_of = lambda name: 97 if name == "<mask>" else None  # type: ignore[method-assign]
    word.encode = lambda text: np.array([97], np.int32)  # type: ignore[method-assign]
    assert special_id(word, MASK) is None


# --- prefixes ---------------------------------------------------------------------------------------------------------


def test_prefixes_are_uniform_and_only_what_follows_them_is_a_target() -> None:
    rows = Rows()
    examples, lengths = PrefixExamples(rows, seed=0), []
    for i in range(64):
        found, original = examples[i], rows[i]
        np.testing.assert_array_equal(np.abs(found["segments"]), original["segments"])
        for name in ("tokens", "targets", "positions"):
            np.testing.assert_array_equal(found[name], original[name])
        for segment, length in ((1, 40), (2, 90), (3, 100)):
            here = original["segments"] == segment
            prefix = int((found["segments"][here] < 0).sum())
            assert 1 <= prefix <= length
            assert (found["segments"][here][:prefix] < 0).all()
            # The last position of the prefix predicts the first token behind it.
            np.testing.assert_array_equal(found["weights"][here], np.arange(length) >= prefix - 1)
            lengths.append(prefix / length)
        assert not found["weights"][230:].any()
    assert abs(np.mean(lengths) - 0.5) < 5 * np.sqrt(1 / 12 / len(lengths))
    assert {int(10 * share) for share in lengths} >= set(range(10))


def test_a_row_of_concatenated_documents_has_one_prefix() -> None:
    found = [PrefixExamples(Rows("concatenate"), seed=0)[i] for i in range(8)]
    for arrays in found:
        assert [int(key) for key, _ in itertools.groupby(arrays["segments"])] in ([-1, 1, 0], [-1, 0])
        assert arrays["weights"].sum() == 231 - (arrays["segments"] < 0).sum()
