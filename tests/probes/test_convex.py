"""The shared minimiser: slopes against autograd, soft targets against scikit-learn, the choice against every C."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from sslvit.errors import Resumable
from sslvit.probes import convex, segmentation
from sslvit.probes.unfinished import Unfinished
from sslvit.signals import StopFlag


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TARGETS = {
    "class": (convex.class_slopes, torch.arange(40) % 5, cross_entropy),
    "share": (convex.share_slopes, drawn(40, 5, seed=1).softmax(dim=1), cross_entropy),
    "presence": (
        convex.presence_slopes,
        (drawn(40, 5, seed=2) > 0).double(),
        lambda scores, y: binary_cross_entropy_with_logits(scores, y, reduction="sum") / len(y),
    ),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("limit", [2**24, 7 * 5])
def test_slopes_are_autograds_in_blocks_of_any_size(kind, limit, monkeypatch):
    monkeypatch.setattr(convex, "MAX_SCORES", limit)
    slopes, y, loss_of = TARGETS[kind]
    x, solution = drawn(40, 6), drawn(7, 5, seed=3).requires_grad_()
    expected = loss_of(x @ solution[:-1] + solution[-1], y)
    expected.backward()
    loss, gradient = convex.loss_and_gradient(x, y, solution.detach(), slopes)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, solution.grad)


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_shares_equal_scikit_learn_with_weights(strength):
    """A row with shares of three classes is three rows of one class each, weighted by the shares."""
    x, shares = drawn(60, 4), drawn(60, 3, seed=1).mul(2).softmax(dim=1)
    rows, classes = np.repeat(np.arange(60), 3), np.tile(np.arange(3), 60)
    theirs = LogisticRegression(C=strength, max_iter=5000, tol=1e-10)
    theirs.fit(x.numpy()[rows], classes, sample_weight=shares.numpy().ravel())
    ours = convex.minimise(x, shares, convex.share_slopes, strength)
    np.testing.assert_allclose(ours[:-1], theirs.coef_.T, atol=1e-4)
    np.testing.assert_allclose(ours[-1] - ours[-1].mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)


def test_segmentation_head_equals_scikit_learn():
    rng = np.random.default_rng(0)
    tokens = (rng.normal(size=(300, 5)) * [1, 2, 3, 4, 5] + 2).astype(np.float32)
    classes = np.clip((tokens[:, 0] + 0.3 * tokens[:, 1] + rng.normal(size=300)).astype(int), 0, 8)
    head = segmentation.LinearHead(segmentation.Patches(tokens, np.eye(9, dtype=np.float32)[classes]), 30)
    standard = (tokens - tokens.mean(0)) / (tokens.std(0) + 1e-6)
    theirs = LogisticRegression(C=head.strength, max_iter=5000, tol=1e-8).fit(standard.astype(np.float64), classes)
    said = head(torch.from_numpy(tokens)[None])[0].argmax(dim=1).numpy()
    assert (said == theirs.predict(standard)).mean() > 0.99


def test_the_chosen_strength_is_the_best_on_the_choosing_rows():
    x = drawn(120, 6)
    y = (x @ drawn(6, 4, seed=4) + 4 * drawn(120, 4, seed=5)).argmax(dim=1)
    fitting, choosing = (x[:90], y[:90]), (x[90:], y[90:])
    grid, merit = [1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e3], convex.minus_loss(convex.class_slopes)
    chosen = convex.best_strength(fitting, choosing, convex.class_slopes, grid, merit, convex.zeros(x, 4))
    merits = [
        merit(*choosing, convex.minimise(*fitting, convex.class_slopes, c, convex.zeros(x, 4), tolerance=1e-9))
        for c in grid
    ]
    assert chosen == grid[int(np.argmax(merits))]
    assert chosen not in (grid[0], grid[-1])


def test_a_search_goes_on_at_the_value_it_was_stopped_at(tmp_path, monkeypatch):
    """Values of C that were done are not fitted again; the best of them and the wait since then are not forgotten."""
    grid = tuple(10.0 ** np.arange(-3, 9))
    merits = {0.1: 2.0, 1.0: 9.0}
    tried = []
    monkeypatch.setattr(convex, "minimise", lambda x, y, slopes, strength, start, **_: tried.append(strength) or start)
    stop = StopFlag()

    class EveryThird(Unfinished):
        def offer(self, *arguments):
            stop.received = "SIGTERM" if len(tried) % 3 == 0 else None
            super().offer(*arguments)

    def search(unfinished=None):
        slopes, start = convex.class_slopes, torch.zeros(4, 2)
        merit = lambda *_: (merits.get(tried[-1], 1.0),)  # noqa: E731
        return convex.best_strength((start, start), (start, start), slopes, grid, merit, start, unfinished=unfinished)

    assert search() == 1.0
    whole = list(tried)
    assert whole == list(grid[:10]), "six after the best, and no more"
    tried.clear()
    for _ in range(3):
        with pytest.raises(Resumable):
            search(EveryThird(tmp_path, stop))
    assert search(EveryThird(tmp_path, stop)) == 1.0 and tried == whole
