"""Weighted mixtures of sources (Brown et al. 2020, table 2.2): `data.mixture`, and one source as a mixture of one.

A row of T positions is of one source. `interleaving` says which, so that the shares of the sources in the training
tokens are the weights, to within two rows. Each source has its own epochs, each with its own order, and its own
validation split.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

from gptjax.config import DataConfig, UserError
from gptjax.data.interleaving import ScheduledInterleaving
from gptjax.data.pipeline import Corpus, ExampleArrays, ExampleSource, open_corpora
from gptjax.data.tokenizers import Tokenizer

_DATASETS = ("tfds", "hf")  # schemes whose sources name a dataset, not files


@dataclasses.dataclass(frozen=True)
class Part:
    """A source of a mixture.

    Attributes:
      name: short name for metrics, unique in the mixture.
      weight: share of data.mixture's weights, in (0, 1].
      data: the config of the source alone.
    """

    name: str
    weight: float
    data: DataConfig


def parts(data: DataConfig) -> list[Part]:
    """Returns the sources of `data.mixture`, or `data.source` as the only one."""
    pairs = data.mixture or ((data.source, 1.0),)
    specs, total = [source for source, _ in pairs], sum(weight for _, weight in pairs)
    return [
        Part(name, weight / total, dataclasses.replace(data, source=source, mixture=(), mixture_schedule=()))
        for name, (source, weight) in zip(short_names(specs), pairs, strict=True)
    ]


def short_names(specs: Sequence[str]) -> list[str]:
    """Returns a name for each source: of its file without what follows a wildcard or a dot, or of its dataset.

    Where two sources have files of the same name, the names of all sources are those of the folders, and where these
    are equal too, the whole sources.
    """
    paths = [_path(spec) for spec in specs]
    for names in ([path[-1] for path in paths], [path[-2 if len(path) > 1 else -1] for path in paths], list(specs)):
        names = [re.sub(r"[^\w./-]", "_", name) for name in names]  # what TensorBoard allows
        if len(set(names)) == len(names):
            return names
    return [f"{name}_{number}" for number, name in enumerate(names)]


def _path(spec: str) -> list[str]:
    """Returns the parts of a source's path that name something; at least one."""
    scheme, _, argument = spec.partition(":")
    path = re.split("[@#]", argument)[0]
    if scheme in _DATASETS:
        return [path]
    *folders, file = (re.split(r"[*?\[]", part)[0].strip("-_.") for part in path.split("/"))
    return [part for part in (*folders, file.partition(".")[0]) if part] or [scheme]


class MixedExamples:
    """The training rows of a mixture, by number: row i of the run is a row of one of the sources.

    Args:
      sources: the rows of each source.
      interleaving: which of them a row of the run is.
    """

    def __init__(self, sources: Sequence[ExampleSource], interleaving: ScheduledInterleaving):
        self._sources, self._interleaving = sources, interleaving

    def __len__(self) -> int:
        return min(map(len, self._sources))  # about 2**60: the number of epochs is unlimited

    def __getitem__(self, index: int) -> ExampleArrays:
        source, number = self._interleaving.place(index)
        return self._sources[source][number]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The sources of a run, opened.

    Attributes:
      tokenizer: of all sources.
      parts, corpora: the sources, and the corpus of each.
      interleaving: which source a row is of, and its number there.
      train: the training rows.
    """

    tokenizer: Tokenizer
    parts: list[Part]
    corpora: list[Corpus]
    interleaving: ScheduledInterleaving
    train: ExampleSource

    @property
    def num_tokens(self) -> int:
        """Training tokens of all sources, each once."""
        return sum(corpus.train.split.num_tokens for corpus in self.corpora)

    def mean(self, values: Sequence[float]) -> float:
        """Returns the mean of a value of each source by the weights of data.mixture.

        They are those of the whole run, whatever its schedule, so that held-out losses are comparable throughout.
        """
        return math.fsum(part.weight * value for part, value in zip(self.parts, values, strict=True))

    def epochs(self, rows: int) -> dict[str, float]:
        """Returns how many times the first `rows` training rows have read each source."""
        counts = self.interleaving.counts(rows)
        return {
            part.name: count / corpus.train.examples_per_epoch
            for part, corpus, count in zip(self.parts, self.corpora, counts, strict=True)
        }

    def repeated_in(self, start: int, stop: int) -> list[str]:
        """Returns the names of the sources whose second epoch begins in rows [start, stop)."""
        before, after = self.epochs(start), self.epochs(stop)
        return [name for name in before if before[name] <= 1 < after[name]]


def open_mixture(data: DataConfig, *, context_length: int, seed: int, tokenizer: Tokenizer | None = None) -> Mixture:
    """Opens the sources of `data`; tokenises them, and trains the tokenizer on all, unless they are cached.

    Args:
      context_length: T, tokens of a row.
      seed: seed of the order of the rows of each source; the interleaving of the sources does not depend on it.
      tokenizer: used instead of data.tokenizer, for example when a run is resumed.

    Raises:
      UserError: as in `pipeline.open_corpus`; or two sources have the same documents.
    """
    found = parts(data)
    key = "data.mixture" if data.mixture else "data.source"
    configs = [part.data for part in found]
    corpora = open_corpora(configs, key, context_length=context_length, seed=seed, tokenizer=tokenizer)
    for (one, of_one), (other, of_other) in itertools.combinations(zip(configs, corpora, strict=True), 2):
        if of_one.train.split.content == of_other.train.split.content:
            raise UserError(
                f"data.mixture: {one.source!r} and {other.source!r} are the same documents: add up their weights in "
                "one pair"
            )
    weights = [part.weight for part in found]
    # A row has the weights that hold at its first token.
    changes = [(-(-tokens // context_length), later) for tokens, later in data.mixture_schedule]
    interleaving = ScheduledInterleaving([(0, weights), *changes])
    rows = [corpus.train for corpus in corpora]
    train = MixedExamples(rows, interleaving) if data.mixture else rows[0]
    return Mixture(corpora[0].tokenizer, found, corpora, interleaving, train)
