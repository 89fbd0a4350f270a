"""The baselines fit what words determine, and are deterministic."""

import random

import pytest

from benchmarks.baselines import frequent_tag_baseline, tfidf_baseline

SMILES = {"good": ":)", "bad": ":(", "plain": "."}


def texts_of(labels, seed):
    """Random words in random order; only the mark at the end is informative."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(["one", "two", "three", "four"], k=5)) + SMILES[label] for label in labels]


@pytest.fixture(scope="module")
def labels():
    return random.Random(0).choices(["good", "bad", "plain"], [5, 2, 1], k=300)


def test_tfidf_finds_the_words_that_tell(labels):
    predicted = tfidf_baseline(texts_of(labels, 1), labels, texts_of(labels, 2))
    assert predicted == labels


def test_tfidf_is_deterministic_and_text_by_text(labels):
    noisy = [label if i % 4 else "good" for i, label in enumerate(labels)]
    train, texts = texts_of(labels, 1), texts_of(labels, 2)
    predicted = tfidf_baseline(train, noisy, texts)
    assert tfidf_baseline(train, noisy, texts[::-1])[::-1] == predicted


def test_tfidf_penalty_is_chosen_on_examples_held_out(labels, monkeypatch):
    from sklearn.linear_model import LogisticRegression

    fitted, scored = [], []
    fit, accuracy = LogisticRegression.fit, {0.1: 0.5, 0.3: 0.6, 1.0: 0.7, 3.0: 0.9, 10.0: 0.9}

    def record_fit(self, features, labels):
        fitted.append((self.C, features.shape[0]))
        return fit(self, features, labels)

    def record_score(self, features, labels):
        scored.append(features.shape[0])
        return accuracy[self.C]

    monkeypatch.setattr(LogisticRegression, "fit", record_fit)
    monkeypatch.setattr(LogisticRegression, "score", record_score)
    tfidf_baseline(texts_of(labels, 1), labels, ["one"])
    held_out = sum(labels.count(label) // 10 for label in SMILES)
    assert scored == [held_out] * len(accuracy)
    assert fitted == [*((penalty, len(labels) - held_out) for penalty in accuracy), (3.0, len(labels))]


def test_tfidf_with_too_few_examples_to_hold_any_out():
    assert tfidf_baseline(["a good day", "a bad day", "good", "bad"], ["+", "-", "+", "-"], ["good", "bad"]) == [
        "+",
        "-",
    ]


def test_usual_tags_by_hand():
    sentences = [["the", "run", "ends"], ["they", "run", "a", "run"], ["dogs", "bark"]]
    tags = [["DT", "NN", "VB"], ["PR", "VB", "DT", "NN"], ["NN", "NN"]]
    # "run" is twice NN and once VB; of the six words that occur once two are DT and two NN.
    assert frequent_tag_baseline(sentences, tags, [["run", "the", "new"], []]) == [["NN", "DT", "DT"], []]


def test_usual_tags_where_no_word_occurs_once():
    assert frequent_tag_baseline([["x", "x", "y", "y"]], [["B", "B", "A", "C"]], [["y", "z"]]) == [["A", "B"]]


def test_usual_tags_do_not_depend_on_the_order_of_sentences():
    rng = random.Random(0)
    sentences = [rng.choices("abcdef", k=6) for _ in range(20)]
    tags = [rng.choices("XYZ", k=6) for _ in range(20)]
    unseen = [list("abcdefgh")]
    backwards = frequent_tag_baseline(sentences[::-1], tags[::-1], unseen)
    assert frequent_tag_baseline(sentences, tags, unseen) == backwards
