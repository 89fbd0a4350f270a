"""The quality filter of GPT-3 (Brown et al. 2020, appendix A).

A logistic regression on hashed word counts separates documents of a reference of high quality from those of the source.
A document is kept if numpy.random.pareto(9) > 1 - score, so most documents that score high are kept, and a few of
those that do not.
"""

import functools
import heapq
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.corpus.document_keys import content_keys, uniform
from gptjax.corpus.workspace import Workspace, committed, load, read_part

PARETO_SHAPE = 9.0  # alpha
FEATURES = 2**18  # as of Spark's HashingTF, which the paper used
SAMPLE_DOCUMENTS = 10_000  # of each class
SAMPLE_PARTS = 64  # from which those of the source are taken
MIN_DOCUMENTS = 2


def train_classifier(workspace: Workspace, item: int) -> None:
    """Step `classifier`: fits the weights to equally many documents of the reference and of the source.

    Raises:
      UserError: the reference cannot be read or is too small.
    """
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    recipe = workspace.recipe
    assert recipe.quality_reference is not None
    try:
        good = _sample(recipe.open_source(recipe.quality_reference).documents(), recipe.seed, SAMPLE_DOCUMENTS)
    except UserError as error:
        raise UserError(f"--quality_reference: {error}") from None
    if len(good) < MIN_DOCUMENTS:
        raise UserError(
            f"--quality_reference={recipe.quality_reference} has {len(good)} document, and a classifier needs many"
        )
    order = np.random.default_rng(recipe.seed).permutation(len(workspace.parts))[:SAMPLE_PARTS].tolist()
    each = math.ceil(SAMPLE_DOCUMENTS / len(order))
    unfiltered = [row for index in order for row in _sample(read_part(workspace.parts[index]), recipe.seed, each)]
    classes = np.repeat([1, 0], [len(good), len(unfiltered)])
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    with threadpool_limits(1):  # sums in one order: the weights do not depend on the number of cores
        model.fit(sparse.vstack([*good, *unfiltered]).tocsr(), classes)
    with committed(workspace.result("classifier", item)) as directory:
        np.savez(
            directory / "weights.npz",
            weights=model.coef_[0],
            bias=model.intercept_[0],
            documents=np.array([len(good), len(unfiltered)]),
        )


class QualityFilter:
    """The trained filter."""

    def __init__(self, workspace: Workspace) -> None:
        arrays = load(workspace.result("classifier", 0) / "weights.npz")
        self._weights, self._bias, self._seed = arrays["weights"], float(arrays["bias"]), workspace.recipe.seed

    def score(self, text: str) -> float:
        """Returns the probability that a document is one of the reference, in (0, 1)."""
        row = features(text)
        logit = float(np.dot(row.data, self._weights[row.indices])) + self._bias
        return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0

    def keeps(self, key: int, score: float) -> bool:
        """Whether to keep a document with a content key; its random number depends on the key and the seed only."""
        return pareto(uniform(key, self._seed)) > 1 - score


def pareto(uniform_number: float) -> float:
    """Transforms a number of U[0, 1) to the distribution of numpy.random.pareto(9), by its inverse CDF."""
    return math.expm1(-math.log1p(-uniform_number) / PARETO_SHAPE)


def features(text: str) -> Any:
    """Returns the L2-normalised counts of hashed lower-case words delimited by white space, CSR (1, FEATURES).

    The paper's features are not normalised, but then scores of long documents are all close to 0 or 1.
    """
    return _vectorizer().transform([text])


@functools.cache
def _vectorizer() -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(n_features=FEATURES, token_pattern=r"\S+", alternate_sign=False)


def _sample(documents: Iterable[str], seed: int, size: int) -> list[Any]:
    """Returns the features of the `size` documents with the smallest random numbers, in the order of those."""
    heap: list[tuple[float, int, Any]] = []  # the largest number first
    for index, text in enumerate(documents):
        number = uniform(int(content_keys(text)[0]), seed + 1)  # not that of the filter
        if len(heap) < size:
            heapq.heappush(heap, (-number, -index, features(text)))
        elif -number > heap[0][0]:
            heapq.heapreplace(heap, (-number, -index, features(text)))
    return [row for *_, row in sorted(heap, key=lambda entry: entry[:2], reverse=True)]
