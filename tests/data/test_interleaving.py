"""The order of a mixture's sources: exact shares at any point, and a pure function of the row."""

import random
from collections import Counter

import pytest

from gptjax.data.interleaving import Interleaving, ScheduledInterleaving

GPT3 = (60, 22, 8, 8, 3)  # Brown et al. 2020, table 2.2, in percent
BOUND = 1.68  # rows
FIBONACCI = (1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89)  # the deepest tree


def some_weights() -> list[tuple[float, ...]]:
    numbers = random.Random(0)
    drawn = [tuple(numbers.random() ** 4 + 1e-6 for _ in range(numbers.randint(2, 12))) for _ in range(20)]
    return [(1.0,), (1, 1), (0.1, 0.2, 0.7), (1e-9, 1.0), (1,) * 50, FIBONACCI, GPT3, *drawn]


@pytest.mark.parametrize("weights", some_weights())
def test_every_source_has_its_share_of_the_first_rows_whatever_their_number(weights: tuple[float, ...]) -> None:
    rows, total = Interleaving(weights), sum(weights)
    for count in [*range(400), 10**5 + 3, 10**9 + 7, 2**60]:
        counts = rows.counts(count)
        assert sum(counts) == count
        exact = [count * weight / total for weight in weights]
        room = BOUND + count * 1e-12  # of the floating-point numbers of this test
        assert all(abs(found - share) < room for found, share in zip(counts, exact, strict=True)), count


@pytest.mark.parametrize("weights", some_weights())
def test_the_rows_of_a_source_are_numbered_through(weights: tuple[float, ...]) -> None:
    rows, tally = Interleaving(weights), Counter[int]()
    for row in range(600):
        source, number = rows.place(row)
        assert number == tally[source] == rows.counts(row)[source]
        tally[source] += 1
    assert rows.counts(600) == [tally[source] for source in range(len(weights))]
    far = 10**15 + 1
    assert rows.place(far)[1] == rows.counts(far)[rows.place(far)[0]]


@pytest.mark.parametrize("context_length", [128, 512, 1024])
def test_the_shares_of_a_million_tokens_are_the_weights_to_a_thousandth(context_length: int) -> None:
    count = 1_000_000 // context_length
    for weight, found in zip(GPT3, Interleaving(GPT3).counts(count), strict=True):
        assert found / count == pytest.approx(weight / sum(GPT3), abs=0.001)


def test_only_the_ratios_of_weights_matter() -> None:
    one, other = Interleaving((3, 1, 4)), Interleaving((0.75, 0.25, 1))
    assert [one.place(row) for row in range(100)] == [other.place(row) for row in range(100)]


def test_scheduled_weights_hold_from_their_row_on_and_sources_continue() -> None:
    before, after = Interleaving((1, 0, 3)), Interleaving((0, 2, 1))
    rows = ScheduledInterleaving([(0, (9, 9, 9)), (0, (1, 0, 3)), (50, (5, 5, 5)), (50, (0, 2, 1))])
    assert [rows.place(row) for row in range(50)] == [before.place(row) for row in range(50)]
    read = before.counts(50)
    for row in range(50, 200):
        source, number = after.place(row - 50)
        assert rows.place(row) == (source, read[source] + number)
    assert rows.counts(50) == read
    assert rows.counts(200) == [a + b for a, b in zip(read, after.counts(150), strict=True)]
    assert rows.counts(200)[0] == read[0]  # a weight of 0
