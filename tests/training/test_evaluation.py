"""Figures of merit against scikit-learn, scipy and hand-made cases."""

import numpy as np
import scipy.special
import scipy.stats
import sklearn.metrics

from dlcourse.training import evaluation, intervals


class Rows:
    """A split whose images are logits already."""

    def __init__(self, logits, labels):
        self.logits, self.labels = logits, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, indices):
        return {"image": self.logits[indices], "label": self.labels[indices]}


def random_predictions(n=500, k=4):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((n, k)).astype(np.float32) * 2
    label = rng.integers(0, k, n).astype(np.int32)
    # 64 does not divide 500: the last batch is padded and masked.
    return logits, label, evaluation.predictions(lambda images: images, Rows(logits, label), batch_size=64)


def test_predictions_cover_every_example_once_in_order():
    logits, label, found = random_predictions()
    np.testing.assert_array_equal(found.index, np.arange(500))
    np.testing.assert_array_equal(found.label, label)
    np.testing.assert_array_equal(found.predicted, logits.argmax(1))


def test_summary_agrees_with_scikit_learn():
    logits, label, found = random_predictions()
    p = scipy.special.softmax(logits.astype(np.float64), 1)
    got = dict(evaluation.summarise(found))
    np.testing.assert_allclose(got["accuracy"], sklearn.metrics.accuracy_score(label, logits.argmax(1)))
    np.testing.assert_allclose(got["nll"], sklearn.metrics.log_loss(label, p), rtol=1e-5)
    assert got["n"] == 500
    np.testing.assert_array_equal(
        evaluation.confusion(found, 4), sklearn.metrics.confusion_matrix(label, logits.argmax(1))
    )
    precision, recall, f1, n = sklearn.metrics.precision_recall_fscore_support(label, logits.argmax(1))
    rows = evaluation.per_class(found, 4)
    for name, column in {"precision": precision, "recall": recall, "f1": f1, "n": n}.items():
        np.testing.assert_allclose([row[name] for row in rows], column)


def test_wilson_agrees_with_scipy():
    for hits, n in [(0, 10), (5, 10), (10, 10), (980, 1000)]:
        expected = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
        np.testing.assert_allclose(intervals.wilson(hits, n), (expected.low, expected.high), atol=1e-12)


def test_calibration_error_of_planted_confidence():
    n = 1000
    correct = np.arange(n) % 10 < 7  # right in 70 % of cases, said with 90 %
    found = evaluation.Predictions(
        np.arange(n), np.zeros(n, int), np.where(correct, 0, 1), np.full(n, 0.9), np.zeros(n)
    )
    np.testing.assert_allclose(evaluation.calibration_error(found), 0.2, atol=1e-9)


def test_a_network_that_diverged_has_neither_nll_nor_calibration():
    logits, label = np.full((20, 4), np.nan, np.float32), np.zeros(20, np.int32)
    got = dict(evaluation.classification(lambda images: images, Rows(logits, label)))
    assert np.isnan(got["nll"]) and np.isnan(got["ece"]) and got["accuracy"] == 0


def test_paired_interval_covers_the_truth_and_has_width_when_all_agree():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        both = rng.random(300)
        one, other = both < 0.9, (both < 0.85) ^ (rng.random(300) < 0.05)
        truth = 0.9 - (0.85 * 0.95 + 0.15 * 0.05)
        low, high = intervals.paired_difference(one, other)[1]
        covered += low <= truth <= high
    assert 0.92 <= covered / 400 <= 0.98
    low, high = intervals.paired_difference(np.ones(50, bool), np.ones(50, bool))[1]
    assert low < 0 < high


def test_the_interval_over_random_splits_is_wider_than_that_of_independent_repeats():
    scores = np.random.default_rng(0).normal(0.9, 0.02, 20)
    low, high = intervals.resampled_interval(scores, 120, 80)
    naive = scipy.stats.t.interval(0.95, 19, scores.mean(), scipy.stats.sem(scores))
    np.testing.assert_allclose((low + high) / 2, scores.mean())
    np.testing.assert_allclose((high - low) / (naive[1] - naive[0]), np.sqrt(1 + 20 * 80 / 120), rtol=1e-9)
    assert intervals.resampled_interval(scores[:1], 120, 80) == (-np.inf, np.inf)


def test_mirrored_judges_an_image_as_its_mirror_image():
    images = np.random.default_rng(0).random((3, 4, 5, 1)).astype(np.float32)

    def predict(images):
        return images[:, 0, :2, 0]

    judged = evaluation.mirrored(predict)
    np.testing.assert_allclose(judged(images), judged(images[:, :, ::-1]))
    np.testing.assert_allclose(judged(images)[:, 0], (images[:, 0, 0, 0] + images[:, 0, -1, 0]) / 2)
