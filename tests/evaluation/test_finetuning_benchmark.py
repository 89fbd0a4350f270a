"""The choice of rows by the fine-tuning benchmark."""

import pytest

from benchmarks.finetuning import every


@pytest.mark.parametrize("count", [1, 3, 7, 10])
def test_rows_are_spread_over_all_that_there_are(count):
    """Rows often come label by label: what is left out at the end would be a label that no score knows of."""
    chosen = every(list(range(10)), count)
    assert len(chosen) == len(set(chosen)) == count
    gaps = [after - before for before, after in zip(chosen, [*chosen[1:], 10], strict=True)]
    assert chosen[0] == 0
    assert max(gaps) - min(gaps) <= 1


def test_all_rows_where_there_are_fewer():
    assert every([1, 2, 3], 5) == [1, 2, 3]
