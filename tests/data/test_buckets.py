"""Length buckets: every example once per epoch, in an order of seed and epoch only, with little padding."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import TaskConfig
from gptjax.data.buckets import Buckets
from gptjax.data.labelled import Row
from gptjax.data.pipeline import Microbatch
from gptjax.data.task_inputs import EncodedRow, encode
from gptjax.data.tokenizers import BytesTokenizer

CONTEXT = 100


def texts_of(lengths: list[int], kind: str = "classification") -> list[EncodedRow]:
    """Examples whose first sequence has `lengths` tokens, the second of its bytes being the example's number."""
    rows = []
    for index, length in enumerate(lengths):
        text = chr(index % 128) * (length - 2)
        fields = {"text": text, "label": "ab"[index % 2]}
        if kind == "multiple_choice":
            fields = {"context": "c", "choices": [text, "x", "yy"], "label": index % 3}
        elif kind == "tagging":
            fields = {"tokens": [text], "tags": ["ab"[index % 2]]}
        elif kind == "regression":
            fields = {"first": text, "label": float(index)}
        elif kind == "question_answering":
            fields = {"context": text, "question": "q", "answers": {"text": [text[:1]], "answer_start": [0]}}
        rows.append(Row(fields, f"rows.csv:{index}"))
    return encode(rows, TaskConfig(kind=kind), ("a", "b"), BytesTokenizer(), CONTEXT)


def random_texts(number: int, kind: str = "classification", shortest: int = 3) -> list[EncodedRow]:
    return texts_of(np.random.default_rng(0).integers(shortest, 90, number).tolist(), kind)


def make(examples: list[EncodedRow], *, batch: int = 8, microbatch: int = 4, seed: int | None = 0) -> Buckets:
    return Buckets(examples, context_length=CONTEXT, batch_size=batch, microbatch_size=microbatch, seed=seed)


def read(buckets: Buckets, number: int | None = None, start: int = 0, rows: range = range(4)) -> list[Microbatch]:
    return list(itertools.islice(buckets.microbatches(start, rows, prefetch=2), number))


def examples_of(microbatches: list[Microbatch]) -> np.ndarray:
    return np.concatenate([microbatch.arrays["examples"] for microbatch in microbatches])


def assert_equal(left: list[Microbatch], right: list[Microbatch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.num_tokens == other.num_tokens
        assert set(one.arrays) == set(other.arrays)
        for name, array in one.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[name])


# --- order ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(number=st.integers(1, 70), parts=st.integers(1, 3), microbatch=st.integers(1, 5), seed=st.none() | st.integers())
def test_every_example_once_an_epoch(number: int, parts: int, microbatch: int, seed: int | None) -> None:
    examples = random_texts(number)
    buckets = make(examples, batch=parts * microbatch, microbatch=microbatch, seed=seed)
    assert buckets.examples_per_epoch % (parts * microbatch) == 0
    per_epoch = buckets.examples_per_epoch // microbatch
    read_ = read(buckets, None if seed is None else 2 * per_epoch, rows=range(microbatch))
    assert len(read_) == per_epoch * (1 if seed is None else 2)
    for first in range(0, len(read_), per_epoch):
        epoch = read_[first : first + per_epoch]
        seen = examples_of(epoch)
        assert len(seen) == buckets.examples_per_epoch
        assert sorted(seen[seen >= 0].tolist()) == list(range(number))
        assert sum(m.num_tokens for m in epoch) == buckets.tokens_per_epoch == sum(e.num_tokens for e in examples)
        assert sum(m.arrays["weights"].sum() for m in epoch) == number


def test_order_is_a_function_of_seed_and_epoch() -> None:
    examples = random_texts(50)
    per_epoch = make(examples).examples_per_epoch // 4
    first, again, other = (examples_of(read(make(examples, seed=seed), 2 * per_epoch)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    half = len(first) // 2
    assert not np.array_equal(first[:half], first[half:])
    assert not np.array_equal(first[:half], other[:half])


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("start", [8, 24, 29, 56, 120])
def test_a_jump_is_a_walk(seed: int | None, start: int) -> None:
    examples = random_texts(50)
    walked = read(make(examples, seed=seed), 40)
    assert_equal(read(make(examples, seed=seed), 40 - start // 8 * 2, start=start), walked[start // 8 * 2 :])


def test_a_far_jump_takes_no_walk() -> None:
    buckets = make(random_texts(50))
    far = 10**12 * buckets.examples_per_epoch
    np.testing.assert_array_equal(examples_of(read(buckets, 2, start=far)), buckets.indices(far // 8))


def test_without_a_seed_the_order_is_that_of_length() -> None:
    examples = random_texts(50)
    buckets = make(examples, seed=None)
    seen = examples_of(read(buckets))
    lengths = [examples[index].num_tokens for index in seen[seen >= 0]]
    assert lengths == sorted(lengths)
    assert (seen[50:] == -1).all()
    assert read(buckets, start=buckets.examples_per_epoch) == []


def test_batches_have_like_lengths_and_their_order_does_not_tell_them() -> None:
    examples = random_texts(50 * 8)
    buckets = make(examples)
    lengths = np.array([e.num_tokens for e in examples])[np.stack([buckets.indices(b) for b in range(50)])]
    assert (lengths.max(axis=1) - lengths.min(axis=1)).max() < 10  # of all 87
    means = lengths.mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(50))[0, 1]) < 0.5


def test_pools_mix_differently_each_epoch() -> None:
    buckets = make(random_texts(120 * 8))
    together = [{frozenset(buckets.indices(b).tolist()) for b in range(e * 120, (e + 1) * 120)} for e in (0, 1)]
    assert len(together[0] & together[1]) < 6


# --- arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "multiple_choice", "regression", "tagging", "question_answering"])
def test_rows_are_their_examples_and_padding(kind: str) -> None:
    examples = random_texts(21, kind, shortest=6)
    for arrays, _ in read(make(examples, seed=None)):
        width = arrays["tokens"].shape[-1]
        for row, index in enumerate(arrays["examples"].tolist()):
            values = {name: array[row] for name, array in arrays.items()}
            if index < 0:
                labels = values.pop("labels") if kind == "tagging" else np.array(-1)
                assert (labels == -1).all()
                assert not any(value.any() for name, value in values.items() if name != "examples")
                continue
            example = examples[index]
            assert values["weights"] == 1
            tokens_CT = values["tokens"].reshape(-1, width)
            assert len(tokens_CT) == len(example.sequences)
            for tokens_T, end, sequence in zip(tokens_CT, values["ends"].ravel(), example.sequences, strict=True):
                np.testing.assert_array_equal(tokens_T, np.pad(sequence, (0, width - len(sequence))))
                assert end == len(sequence) - 1
            for name, target in example.targets.items():
                padded = np.pad(target, (0, width - len(target)), constant_values=-1) if target.ndim else target
                np.testing.assert_array_equal(values[name], padded)


def test_shapes_and_types() -> None:
    choices = read(make(random_texts(8, "multiple_choice")), 1)[0].arrays
    width = choices["tokens"].shape[-1]
    assert {name: (array.shape, array.dtype.name) for name, array in choices.items()} == {
        "tokens": ((4, 3, width), "int32"),
        "ends": ((4, 3), "int32"),
        "weights": ((4,), "float32"),
        "examples": ((4,), "int32"),
        "labels": ((4,), "int32"),
    }
    assert read(make(random_texts(8, "regression")), 1)[0].arrays["labels"].dtype == np.float32
    answers = read(make(random_texts(8, "question_answering", shortest=6)), 1)[0].arrays
    assert answers["starts"].shape == answers["stops"].shape == (4,)


@pytest.mark.parametrize(
    ("length", "bucket"), [(3, 32), (32, 32), (33, 64), (64, 64), (65, CONTEXT), (CONTEXT, CONTEXT)]
)
def test_the_bucket_is_the_smallest_that_holds_the_longest_of_the_batch(length: int, bucket: int) -> None:
    microbatches = read(make(texts_of([5, 3, 4, length, 3, 3, 3, 3]), seed=None))
    assert [m.arrays["tokens"].shape for m in microbatches] == [(4, bucket)] * 2


def test_a_short_context_is_the_only_bucket() -> None:
    rows = [Row({"text": "abc"}, "a.csv:2")]
    examples = encode(rows, TaskConfig(), (), BytesTokenizer(), 16)
    buckets = Buckets(examples, context_length=16, batch_size=2, microbatch_size=2, seed=None)
    (microbatch,) = read(buckets, rows=range(2))
    assert microbatch.arrays["tokens"].shape == (2, 16)
    assert "labels" not in microbatch.arrays


def test_a_process_reads_its_rows_in_the_shape_of_all() -> None:
    examples = random_texts(50)
    whole, parts = read(make(examples), 30), [read(make(examples), 30, rows=rows) for rows in (range(3), [3])]
    for all_rows, *of_rows in zip(whole, *parts, strict=True):
        assert {m.num_tokens for m in of_rows} == {all_rows.num_tokens}
        for name, array in all_rows.arrays.items():
            np.testing.assert_array_equal(array, np.concatenate([m.arrays[name] for m in of_rows]))


def test_another_number_of_microbatches_is_the_same_batch() -> None:
    examples = random_texts(50)
    pairs = read(make(examples, microbatch=4), 20)
    whole = read(make(examples, microbatch=8), 10, rows=range(8))
    for number, batch in enumerate(whole):
        one, other = pairs[2 * number : 2 * number + 2]
        assert one.num_tokens + other.num_tokens == batch.num_tokens
        for name, array in batch.arrays.items():
            np.testing.assert_array_equal(np.concatenate([one.arrays[name], other.arrays[name]]), array)


def test_predictions_can_be_put_back_in_order() -> None:
    examples = random_texts(21)
    found = np.full(len(examples), -1)
    for microbatch in read(make(examples, seed=None)):
        real = microbatch.arrays["examples"] >= 0
        found[microbatch.arrays["examples"][real]] = microbatch.arrays["tokens"][real, 1]
    assert found.tolist() == list(range(21))
