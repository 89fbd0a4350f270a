"""Baselines for fine-tuned models: logistic regression on TF-IDF features, and the most frequent tag of each word.

python -m benchmarks.baselines --task=classification --source=tweets
python -m benchmarks.baselines --task=tagging --source=brown:DIR

The held-out rows are those that fine-tuning holds out with the same data.validation_fraction.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from gptjax import cli
from gptjax.data.labelled import read_rows, split_rows
from gptjax.metrics.task_reports import classification_report, tagging_report

PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)  # C of logistic regression, the inverse of the regularisation strength
HELD_OUT = 10  # one in HELD_OUT training examples of each label is held out to choose C


def tfidf_baseline(train_texts: Sequence[str], train_labels: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Predicts the labels of `texts` by scikit-learn's multinomial logistic regression on TF-IDF features.

    Features are the words, punctuation marks and bigrams that occur in at least two training texts, in lower case, with
    1 + log(tf). C is the value of PENALTIES with the highest accuracy on a held-out tenth of each label's training
    examples, the smallest of equals; then all training examples are fitted. The result is deterministic.

    Raises:
      ValueError: raised by scikit-learn if there is only one label, or no word occurs in two texts.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    # Punctuation is kept, as "!" and ":(" indicate sentiment.
    vectorizer = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    features, labels_N = vectorizer.fit_transform(train_texts), np.asarray(train_labels)
    held_out_N = _held_out(labels_N)
    penalty = 1.0  # scikit-learn's default, if there are too few examples to hold any out
    if held_out_N.any():
        accuracies = [
            _regression(C, features[~held_out_N], labels_N[~held_out_N]).score(
                features[held_out_N], labels_N[held_out_N]
            )
            for C in PENALTIES
        ]
        penalty = PENALTIES[int(np.argmax(accuracies))]
    predicted = _regression(penalty, features, labels_N).predict(vectorizer.transform(texts))
    return [str(label) for label in predicted]


def frequent_tag_baseline(
    train_sentences: Sequence[Sequence[str]], train_tags: Sequence[Sequence[str]], sentences: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Predicts the tag that each word of `sentences` has most often in training, the alphabetically first of equals.

    A word that is not in the training data gets the most frequent tag of the words that occur once.
    """
    tags_of: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for words, tags in zip(train_sentences, train_tags, strict=True):
        for word, tag in zip(words, tags, strict=True):
            tags_of[word][tag] += 1
    once = Counter(tag for tags in tags_of.values() if tags.total() == 1 for tag in tags)
    unknown = _most_frequent(once or sum(tags_of.values(), Counter()))
    usual = {word: _most_frequent(tags) for word, tags in tags_of.items()}
    return [[usual.get(word, unknown) for word in words] for words in sentences]


def _most_frequent(tags: Counter[str]) -> str:
    return min(tags, key=lambda tag: (-tags[tag], tag))


def _held_out(labels_N: np.ndarray) -> np.ndarray:
    """Returns a mask, bool (N,), of a random tenth of each label's examples, rounded down."""
    rng = np.random.default_rng(0)
    held_out_N = np.zeros(len(labels_N), bool)
    for label in np.unique(labels_N):
        places = rng.permutation(np.flatnonzero(labels_N == label))
        held_out_N[places[: len(places) // HELD_OUT]] = True
    return held_out_N


def _regression(penalty: float, features: Any, labels_N: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=penalty, max_iter=1000).fit(features, labels_N)


def main() -> None:
    rows = read_rows(SOURCE.value, TASK.value)
    train, validation = ([row.fields for row in side] for side in split_rows(rows, FRACTION.value))
    if TASK.value == "tagging":
        train_tags, gold_tags = ([row["tags"] for row in side] for side in (train, validation))
        sentences, train_sentences = ([row["tokens"] for row in side] for side in (validation, train))
        report = tagging_report(gold_tags, frequent_tag_baseline(train_sentences, train_tags, sentences))
    else:
        train_labels, gold = ([row["label"] for row in side] for side in (train, validation))
        texts, train_texts = ([row["text"] for row in side] for side in (validation, train))
        predicted, labels = tfidf_baseline(train_texts, train_labels, texts), sorted({*train_labels, *gold})
        gold_ids, predicted_ids = ([labels.index(label) for label in side] for side in (gold, predicted))
        report = classification_report(gold_ids, predicted_ids, labels)
    print(f"{len(train):,} training examples\n{report.text}", end="")


if __name__ == "__main__":
    TASK = flags.DEFINE_enum("task", "classification", ["classification", "tagging"], "Which baseline.")
    SOURCE = flags.DEFINE_string("source", "tweets", "Labelled rows, as gptjax.data.labelled reads them.")
    FRACTION = flags.DEFINE_float(
        "validation_fraction", 0.1, "As data.validation_fraction.", lower_bound=0.001, upper_bound=0.5
    )
    cli.run(main)
