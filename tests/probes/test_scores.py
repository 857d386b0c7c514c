"""Scores of answers against scikit-learn and plain loops."""

import tracemalloc

import numpy as np
import pytest
from sklearn import metrics

from sslvit.errors import InputError
from sslvit.probes import cluster
from sslvit.probes.scores import (
    Answer,
    Clusters,
    Draws,
    Estimates,
    Maps,
    Neighbours,
    Presence,
    Ranking,
    average_precision,
    mean_score,
    score,
)


def only(scores):
    assert len(scores) == 1
    return scores[0]


def test_ranking_gives_top1_and_top5():
    rng = np.random.default_rng(0)
    ranking = np.stack([rng.permutation(9)[:5] for _ in range(50)])
    labels = rng.integers(0, 9, 50)
    top1, top5 = score([Answer(Ranking(ranking, 9), "p")], labels, 0)
    assert (top1.metric, top5.metric) == ("top1", "top5")
    assert top1.value == np.mean([r[0] == y for r, y in zip(ranking, labels, strict=True)])
    assert top5.value == np.mean([y in r for r, y in zip(ranking, labels, strict=True)])
    assert top1.ci95[0] <= top1.value <= top1.ci95[1]
    assert only(score([Answer(Ranking(ranking[:, :3], 3), "p")], labels, 0)).metric == "top1"


def test_draws_average_per_image():
    one = only(score([Answer(Draws(np.array([[1, 2], [1, 1]])), "p", "5shot/")], np.array([1, 1]), 0))
    assert (one.metric, one.value) == ("5shot/top1", 0.75)


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_equals_scikit_learn(ties):
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 8, 200).astype(float) if ties else rng.normal(size=200)
    present = rng.random(200) < 0.2
    expected = metrics.average_precision_score(present, scores)
    assert average_precision(scores, present) == pytest.approx(expected, abs=1e-12)


def test_presence_is_scored_by_map_over_classes_that_occur():
    rng = np.random.default_rng(2)
    labels, scores = (rng.random((80, 4)) < 0.3).astype(int), rng.normal(size=(80, 4))
    labels[:, 3] = 0
    one = only(score([Answer(Presence(scores), "p")], labels, 0))
    expected = np.mean([metrics.average_precision_score(labels[:, c], scores[:, c]) for c in range(3)])
    assert (one.metric, one.value) == ("map", pytest.approx(expected))
    assert one.ci95[0] < one.value < one.ci95[1]
    with pytest.raises(InputError, match="no class is present"):
        score([Answer(Presence(scores), "p")], np.zeros((80, 4), int), 0)


def test_estimates_are_scored_by_r2():
    rng = np.random.default_rng(3)
    truth = rng.normal(size=60)
    said = truth + 0.5 * rng.normal(size=60)
    one = only(score([Answer(Estimates(said), "p")], truth, 0))
    assert (one.metric, one.value) == ("r2", pytest.approx(metrics.r2_score(truth, said)))
    with pytest.raises(InputError, match="same number"):
        score([Answer(Estimates(said), "p")], np.ones(60), 0)


@pytest.mark.parametrize(("classes", "clusters"), [(4, 4), (1, 3), (5, 1), (1, 1), (10, 7)])
def test_nmi_and_ari_equal_scikit_learn(classes, clusters):
    rng = np.random.default_rng(4)
    labels = rng.integers(0, classes, 150) * 4 - 1
    assigned = (labels + rng.integers(0, 2, 150)) % clusters
    cells = cluster.contingency(labels, assigned)
    table = np.zeros((cells.classes.max() + 1, cells.clusters.max() + 1), int)
    table[cells.classes, cells.clusters] = cells.counts
    assert np.array_equal(table, metrics.cluster.contingency_matrix(labels, assigned))
    nmi, ari = score([Answer(Clusters(assigned), "p")], labels, 0)
    assert nmi.value == pytest.approx(metrics.normalized_mutual_info_score(labels, assigned), abs=1e-9)
    assert ari.value == pytest.approx(metrics.adjusted_rand_score(labels, assigned), abs=1e-9)


def test_resampled_clusters_are_drawn_images():
    """An interval from draws of cells is one from draws of images."""
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 5, 200)
    assigned = np.where(rng.random(200) < 0.6, labels, rng.integers(0, 5, 200))
    draws = [rng.integers(0, 200, 200) for _ in range(500)]
    for one, measure in zip(
        score([Answer(Clusters(assigned), "p")], labels, 0),
        (metrics.normalized_mutual_info_score, metrics.adjusted_rand_score),
        strict=True,
    ):
        spread = 1.96 * np.std([measure(labels[rows], assigned[rows]) for rows in draws])
        assert one.ci95[1] - one.value == pytest.approx(spread, rel=0.15)


def test_clusters_of_many_classes_take_memory_by_images():
    """2,000 classes in 2,000 clusters: 500 tables of them would be 16 GB."""
    labels = np.arange(4000) % 2000
    assigned = np.random.default_rng(9).permutation(labels)
    tracemalloc.start()
    nmi, ari = score([Answer(Clusters(assigned), "p")], labels, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6 and nmi.ci95[0] < nmi.value and ari.value == pytest.approx(0, abs=0.01)


def test_neighbours_are_scored_by_loops_definition():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 6, 40)
    labels[0] = 17  # alone in its class: no query
    indices = np.array([[j for j in rng.permutation(40) if j != i] for i in range(40)])
    scores = {s.metric: s for s in score([Answer(Neighbours(indices), "p")], labels, 0)}
    recall, average = [], []
    for i in range(1, 40):
        relevant = [labels[j] == labels[i] for j in indices[i]]
        r = sum(relevant)
        recall.append(any(relevant[:5]))
        average.append(sum(sum(relevant[: n + 1]) / (n + 1) for n in range(r) if relevant[n]) / r)
    assert scores["r5"].value == pytest.approx(np.mean(recall))
    assert scores["map_at_r"].value == pytest.approx(np.mean(average))
    assert scores["r1"].num_images == 39
    with pytest.raises(InputError, match="two validation images"):
        score([Answer(Neighbours(indices), "p")], np.arange(40), 0)


def test_maps_are_scored_by_miou():
    rng = np.random.default_rng(6)
    truth = rng.integers(0, 4, (5, 6, 6))
    said = np.where(rng.random((5, 6, 6)) < 0.7, truth, rng.integers(0, 5, (5, 6, 6))).astype(np.uint8)
    one = only(score([Answer(Maps(said), "p", "knn/")], truth, 0))
    ious = []
    for c in range(9):
        union = ((truth == c) | (said == c)).sum()
        if union:
            ious.append(((truth == c) & (said == c)).sum() / union)
    assert (one.metric, one.value) == ("knn/miou", pytest.approx(np.mean(ious)))
    assert one.ci95[0] < one.value < one.ci95[1]


def test_mean_over_labels_is_paired_by_image():
    def scored(hits):
        return score([Answer(Ranking(np.array(hits)[:, None], 2), "p")], np.ones(4, int), 0)[0]

    mean = mean_score([scored([1, 1, 0, 0]), scored([1, 0, 1, 0])], 0)
    assert mean.value == 0.5
    assert mean.per_image.tolist() == [1.0, 0.5, 0.5, 0.0]
    assert mean.chosen == ""
