"""Logistic regression against scikit-learn at equal C."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from sslvit.errors import InputError
from sslvit.probes import logreg


def problem(n, dim=16, classes=6, seed=0, noise=1.5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    return (centres[labels] + noise * rng.normal(size=(n, dim))).astype(np.float32), labels * 3


def objective(x, y, weight, bias, strength):
    logits = x.astype(np.float64) @ weight + bias
    likelihood = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    likelihood -= logits.max(1, keepdims=True)
    return (
        np.square(weight).sum() / 2 - strength * likelihood[np.arange(len(y)), np.searchsorted(np.unique(y), y)].sum()
    )


@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dim", [16, 400])
def test_equals_scikit_learn(strength, dim):
    x, y = problem(250, dim)
    val, val_labels = problem(1000, dim, seed=1)
    ours = logreg.fit_one(x, y, strength)
    theirs = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(x.astype(np.float64), y)
    np.testing.assert_allclose(ours.weight, theirs.coef_.T, atol=2e-2 * np.abs(theirs.coef_).max())
    best = objective(x, y, theirs.coef_.T, theirs.intercept_, strength)
    assert objective(x, y, ours.weight, ours.bias, strength) <= best * (1 + 1e-4)
    accuracy = (ours.classes[ours.logits(val).argmax(1)] == val_labels).mean()
    assert abs(accuracy - theirs.score(val, val_labels)) <= 0.001


def test_another_objective_would_be_seen():
    """The guard fails when the penalty is another, or reaches the intercept."""
    x, y = problem(250)
    y = np.where(np.arange(250) % 10, 0, y)  # unbalanced, so that the intercept matters
    theirs = LogisticRegression(C=1e-3, max_iter=5000, tol=1e-8).fit(x.astype(np.float64), y)
    np.testing.assert_allclose(logreg.fit_one(x, y, 1e-3).weight, theirs.coef_.T, atol=1e-4)
    assert not np.allclose(logreg.fit_one(x, y, 2e-3).weight, theirs.coef_.T, atol=1e-4)
    ones = np.ones((250, 1))
    theirs = LogisticRegression(C=1e-3, fit_intercept=False, tol=1e-8).fit(np.concatenate([x, ones], axis=1), y)
    assert not np.allclose(logreg.fit_one(x, y, 1e-3).weight, theirs.coef_.T[:-1], atol=1e-4)


def test_choice_is_good_and_made_without_validation():
    x, y = problem(400, noise=3.0)
    val, val_labels = problem(600, noise=3.0, seed=1)
    accuracy = {c: np.mean(logreg.fit_one(x, y, c).logits(val).argmax(1) * 3 == val_labels) for c in (1e-6, 1e-2, 1e5)}
    chosen = logreg.fit(x, y)
    got = (chosen.classes[chosen.logits(val).argmax(1)] == val_labels).mean()
    assert got > max(accuracy.values()) - 0.05
    assert got > accuracy[1e-6]


@pytest.mark.parametrize("labels", [np.zeros(12, int), np.arange(12), np.array([0] * 11 + [5])])
def test_few_images(labels):
    x = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    model = logreg.fit(x, labels)
    assert np.isfinite(model.logits(x)).all()


def test_nan_is_refused():
    with pytest.raises(InputError, match="NaN"):
        logreg.fit(np.full((4, 2), np.nan, np.float32), np.arange(4))
