"""Bootstrap intervals and paired tests, against exact distributions, scipy, and sacrebleu."""

import math

import numpy as np
import pytest
from scipy import stats

from gptjax.metrics.measurement import exponential, mean, ratio, scaled, weighted_mean
from gptjax.metrics.resampling import Sample, bootstrap_interval, holm, paired_test, ratio_sample
from gptjax.metrics.text import bleu_terms, corpus_bleu


def test_interval_of_an_accuracy_is_that_of_the_binomial_distribution():
    values = [1.0] * 30 + [0.0] * 70
    low, high = bootstrap_interval(mean(values).sample)
    assert (low, high) == pytest.approx(np.array(stats.binom(100, 0.3).interval(0.95)) / 100, abs=0.011)
    assert bootstrap_interval(mean(values[::-1]).sample) == (low, high)


def test_interval_covers_the_true_value_in_95_of_100_samples():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        low, high = bootstrap_interval(mean(rng.normal(2, 1, 30).tolist()).sample)
        covered += low <= 2 <= high
    assert 0.88 <= covered / 100 <= 0.99


def test_a_score_without_spread():
    low, high = bootstrap_interval(mean([1.0] * 20).sample)
    exact = stats.binomtest(20, 20).proportion_ci(0.95)
    assert (low, high) == (pytest.approx(exact.low), 1.0)
    assert bootstrap_interval(mean([0.0] * 20).sample) == (0.0, pytest.approx(1 - exact.low))
    assert bootstrap_interval(mean([0.5] * 20).sample) is None
    assert bootstrap_interval(mean([0.5]).sample) is None


def test_every_measurement_follows_from_its_sample():
    rng = np.random.default_rng(0)
    nats, tokens = rng.uniform(1, 9, 40), rng.integers(1, 9, 40)
    for measured in (
        mean(nats.tolist()),
        ratio(nats, tokens),
        scaled(ratio(nats, tokens), 3.0),
        exponential(ratio(nats, tokens)),
        exponential(weighted_mean([ratio(nats, tokens), ratio(nats[:9], tokens[:9])], [0.25, 0.75])),
    ):
        assert measured.sample.value == pytest.approx(measured.value)
        low, high = bootstrap_interval(measured.sample)
        assert low < measured.value < high
        # To first order the interval is the normal one.
        assert high - low == pytest.approx(2 * 1.96 * measured.stderr, rel=0.25)


def test_bleu_of_sums_is_that_of_the_corpus():
    texts = ["the cat sat on the rug", "a dog", "it is so", "the cat sat on the mat today"]
    references = ["the cat sat on the mat", "the dog ran away", "it is not so", "the cat sat on the mat"]
    sample = Sample((bleu_terms(texts, references),), form="bleu")
    assert sample.value == pytest.approx(corpus_bleu(texts, references)[0])
    low, high = bootstrap_interval(sample)
    assert 0 <= low < sample.value < high <= 1


def test_mcnemar_is_exact():
    ours = [1.0] * 9 + [0.0] * 2 + [1.0] * 50
    theirs = [0.0] * 9 + [1.0] * 2 + [1.0] * 50
    found = paired_test(mean(ours).sample, mean(theirs).sample)
    assert found.value == pytest.approx(7 / 61)
    assert (found.test, found.p_value) == ("McNemar", pytest.approx(2 * stats.binom(11, 0.5).cdf(2)))
    assert found.interval[0] < 7 / 61 < found.interval[1]
    same = paired_test(mean(ours).sample, mean(ours).sample)
    assert (same.value, same.interval, same.p_value) == (0, (0, 0), 1)


def test_randomization_is_a_paired_test():
    rng = np.random.default_rng(3)
    hard = rng.uniform(1, 9, 30)  # the difficulty of an example, which both models share
    better = ratio_sample(hard - 0.1 + rng.normal(0, 0.1, 30), np.ones(30))
    found = paired_test(better, ratio_sample(hard, np.ones(30)))
    differences = better.strata[0][:, 0] - hard
    assert found.test == "randomization"
    assert found.p_value == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.002)
    assert found.interval[1] < 0
    assert found.interval[1] - found.interval[0] < 0.2  # of the differences, not of the examples
    reverse = paired_test(ratio_sample(hard, np.ones(30)), better)
    assert reverse.value == pytest.approx(-found.value)


def test_p_values_are_uniform_where_the_models_are_equal():
    rng = np.random.default_rng(4)
    found = [
        paired_test(*(exponential(ratio(rng.normal(5, 1, 25), np.ones(25))).sample for _ in range(2))).p_value
        for _ in range(100)
    ]
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_unequal_samples_are_refused():
    with pytest.raises(ValueError, match="differ in their form or their number"):
        paired_test(mean([1.0, 0.0]).sample, mean([1.0]).sample)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []
    assert not math.isnan(holm([0.9, 0.8])[0])
