"""The order in which a run reads the sources of a mixture: a pure function of the number of a row.

All arithmetic is exact (integers and fractions), so the order is the same on every machine, and a run can be resumed at
any row without reading the rows before it.
"""

import bisect
import heapq
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeAlias


class _Split(NamedTuple):
    """An inner node of the tree: divides its rows among two nodes."""

    share: Fraction  # of the rows that go to `left`, in [1/2, 1)
    left: "_Node"
    right: "_Node"

    def rows_of_left(self, rows: int) -> int:
        """Returns how many of the first `rows` rows of this node go to `left`: its share, rounded to the nearest."""
        return (2 * rows * self.share.numerator + self.share.denominator) // (2 * self.share.denominator)


_Node: TypeAlias = _Split | int  # a leaf is the number of a source


class Interleaving:
    """Divides an endless sequence of rows among sources in proportion to their weights, as evenly as possible.

    The sources are the leaves of a Huffman tree (Huffman 1952) of the weights. Each inner node divides its rows among
    two nodes such that at any point both have their share to within half a row. From a leaf to the root, the weights
    grow at least as fast as the Fibonacci numbers. So at any point a source has its share of all rows to within 1.68
    rows, half the sum of the reciprocal Fibonacci numbers, whatever the number of sources.

    Args:
      weights: not negative, at least one of them positive; only their ratios matter.
    """

    def __init__(self, weights: Sequence[float]):
        self._num_sources = len(weights)
        # The second item makes the order of equal weights, and so the tree, unique.
        nodes: list[tuple[Fraction, int, _Node]] = [(Fraction(w), k, k) for k, w in enumerate(weights) if w > 0]
        heapq.heapify(nodes)
        made = len(weights)
        while len(nodes) > 1:
            light, _, right = heapq.heappop(nodes)
            heavy, _, left = heapq.heappop(nodes)
            heapq.heappush(nodes, (light + heavy, made, _Split(heavy / (light + heavy), left, right)))
            made += 1
        self._root = nodes[0][2]

    def place(self, row: int) -> tuple[int, int]:
        """Returns (source, number of the row among those of the source, from 0) of a row."""
        node = self._root
        while isinstance(node, _Split):
            before = node.rows_of_left(row)
            if node.rows_of_left(row + 1) > before:
                node, row = node.left, before
            else:
                node, row = node.right, row - before
        return node, row

    def counts(self, rows: int) -> list[int]:
        """Returns how many of the first `rows` rows each source has."""
        found = [0] * self._num_sources
        for source, count in self._leaves(self._root, rows):
            found[source] = count
        return found

    def _leaves(self, node: _Node, rows: int) -> Iterator[tuple[int, int]]:
        if isinstance(node, int):
            yield node, rows
            return
        left = node.rows_of_left(rows)
        yield from self._leaves(node.left, left)
        yield from self._leaves(node.right, rows - left)


class ScheduledInterleaving:
    """Interleavings one after another: weights that change at given rows. A source continues where it was.

    Args:
      phases: (first row, weights of each source from there on), by ascending row; the first one begins at row 0.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[float]]]):
        assert phases[0][0] == 0, phases
        self._starts = [start for start, _ in phases]
        self._interleavings = [Interleaving(weights) for _, weights in phases]
        self._counts = [[0] * len(phases[0][1])]  # rows of each source before each phase
        for phase, start in enumerate(self._starts[1:]):
            self._counts.append(self._counts_in(phase, start))

    def place(self, row: int) -> tuple[int, int]:
        """Returns (source, number of the row among those of the source, from 0) of a row."""
        phase = bisect.bisect_right(self._starts, row) - 1
        source, number = self._interleavings[phase].place(row - self._starts[phase])
        return source, self._counts[phase][source] + number

    def counts(self, rows: int) -> list[int]:
        """Returns how many of the first `rows` rows each source has."""
        return self._counts_in(bisect.bisect_right(self._starts, rows) - 1, rows)

    def _counts_in(self, phase: int, rows: int) -> list[int]:
        within = self._interleavings[phase].counts(rows - self._starts[phase])
        return [before + count for before, count in zip(self._counts[phase], within, strict=True)]
