"""Probes as `evaluate` fits them, each against its published recipe as plain loops."""

import math

import numpy as np
import pytest
import torch

from sslvit.encoder.config import Preprocessing
from sslvit.probes import attentive, cluster, fewshot, logreg, protocols, segmentation
from sslvit.probes.config import EvaluateConfig
from sslvit.probes.features import Examples, Extraction, Features


def examples(features):
    """Examples that are their features."""
    one = Examples(type("Made", (), {"labels": {}})(), torch.nn.Identity(), Preprocessing(32), Extraction())
    one.features = Features([features], features, True, np.arange(len(features)))
    return one


def clouds(labels, seed, dim=6, noise=1.0, offset=0.0):
    centres = np.random.default_rng(7).normal(size=(labels.max() + 1, dim))
    rows = centres[labels] + noise * np.random.default_rng(seed).normal(size=(len(labels), dim)) + offset
    return rows.astype(np.float32)


def test_few_shot_is_simpleshot():
    """CL2N (1911.04623, section 3.2): minus the mean of the training features, unit length, nearest class mean."""
    rng = np.random.default_rng(0)
    labels, val_labels = rng.integers(0, 4, 60), rng.integers(0, 4, 50)
    scale = rng.uniform(0.2, 5, (60, 1)).astype(np.float32)  # lengths that would mislead, and a mean far from 0
    train, val = clouds(labels, 1, offset=3) * scale, clouds(val_labels, 2, offset=3)
    answers = protocols.fit_fewshot(examples(train), labels, EvaluateConfig(seed=5))(examples(val))
    middle = train.astype(np.float64).mean(axis=0)

    def prepared(row):
        centred = row.astype(np.float64) - middle
        return centred / math.sqrt(float(centred @ centred))

    for answer, shots in zip(answers, (1, 5, 10), strict=False):
        assert answer.variant == f"{shots}shot/"
        for draw in range(5):
            index = fewshot.draw_shots(labels, shots, 5, draw)
            means = {c: np.mean([prepared(train[i]) for i in index if labels[i] == c], axis=0) for c in range(4)}
            for row, said in zip(val, answer.said.labels[:, draw], strict=True):
                distances = [float(np.square(prepared(row) - means[c]).sum()) for c in range(4)]
                assert said == int(np.argmin(distances))


def test_clusters_go_by_direction():
    """Spherical k-means at rest: each image is nearest to the mean direction of its cluster, however long it is."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 6)) * 10 ** rng.uniform(-2, 2, (400, 1))
    found = cluster.kmeans(rows.astype(np.float32), 4, seed=0)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    means = np.stack([unit[found == c].mean(axis=0) for c in range(4)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert ((unit @ means.T).argmax(axis=1) == found).mean() > 0.97


def test_the_chosen_regression_is_refitted_on_all_of_train():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    train = clouds(labels, 1, noise=2.0)
    grid = (1e-6, 1e-4, 1e-2, 1.0, 100.0)
    model = logreg.fit(train, labels, seed=0, grid=grid)
    whole = logreg.fit_one(train, labels, model.strength)
    np.testing.assert_allclose(model.weight, whole.weight, atol=1e-9)
    fitting, choosing = logreg.choice_split(labels, 0)
    merits = {}
    for strength in grid:
        part = logreg.fit_one(train[fitting], labels[fitting], strength)
        logits = torch.from_numpy(part.logits(train[choosing]))
        targets = torch.from_numpy(labels[choosing])
        right = float((logits.argmax(dim=1) == targets).float().mean())
        merits[strength] = (right, -float(torch.nn.functional.cross_entropy(logits, targets)))
    assert merits[model.strength][0] == max(merits.values())[0] > min(merits.values())[0]


# ---- attentive ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attentive_heads_are_efficient_probing_written_out():
    """2506.10178: each query attends to the patches by themselves, without keys, and pools its slice of the values."""
    heads = attentive.AttentiveHeads(2, 8, 3, seed=1)
    for parameter in heads.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    tokens = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    logits = heads(tokens)
    for h in range(2):
        for image in range(4):
            pooled = []
            for m in range(8):
                likeness = [float(tokens[image, n] @ heads.queries[h, m]) / math.sqrt(8) for n in range(5)]
                weights = [math.exp(s) / sum(math.exp(t) for t in likeness) for s in likeness]
                mixed = sum(w * tokens[image, n] for n, w in enumerate(weights))
                pooled.append(mixed @ heads.values[h, m])
            expected = torch.cat(pooled) @ heads.weight[h] + heads.bias[h, 0]
            torch.testing.assert_close(logits[h, image], expected, atol=1e-4, rtol=1e-4)


def test_attentive_equals_separate_runs_on_90_percent_and_chooses_on_10():
    """Each head is a run of torch's Adam with warm-up and cosine; the one best on the split is chosen."""
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(80) % 4
    tokens = torch.randn(80, 4, 8, generator=generator)
    tokens[:, 1, :4] += 2 * torch.eye(4)[labels]
    tokens, rates, steps = tokens.half(), [1e-4, 1e-2, 0.05], 20
    heads, chosen, _ = attentive.fit(
        tokens, labels, seed=3, steps=steps, batch_size=16, device=torch.device("cpu"), learning_rates=rates
    )
    fitting, choosing = attentive.choice_split(labels, 3)
    accuracies = []
    for i, rate in enumerate(rates):
        alone = attentive.AttentiveHeads(1, 8, 4, 3)
        optimizer = torch.optim.Adam(alone.parameters(), lr=rate)
        for step, order in enumerate(attentive.batches(len(fitting), 16, steps, 3)):
            warm = min(1.0, (step + 1) / max(1, steps // 20))
            optimizer.param_groups[0]["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            index = fitting[order]
            logits = alone(tokens[index].float())[0]
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[index])).backward()
            optimizer.step()
        for name, values in alone.state_dict().items():
            torch.testing.assert_close(heads.state_dict()[name][i : i + 1], values, atol=1e-3, rtol=1e-2)
        said = attentive.predict(alone, tokens[choosing], torch.device("cpu"))[0].argmax(dim=1).numpy()
        accuracies.append((said == labels[choosing]).mean())
    assert accuracies[chosen] == max(accuracies) > min(accuracies)


# ---- segmentation ---------------------------------------------------------------------------------------------------


def test_patches_vote_as_their_30_nearest_say():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(70, 6)).astype(np.float32)
    shares = rng.dirichlet(np.ones(segmentation.NUM_CLASSES), 70).astype(np.float32)
    queries = rng.normal(size=(2, 4, 6)).astype(np.float32)
    said = segmentation.NearestPatches(segmentation.Patches(tokens, shares))(torch.from_numpy(queries)).numpy()

    def cosine(a, b):
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    for image in range(2):
        for patch in range(4):
            similar = [cosine(row.astype(np.float64), queries[image, patch].astype(np.float64)) for row in tokens]
            nearest = sorted(range(70), key=lambda i: -similar[i])[:30]
            weights = np.array([math.exp(similar[i] / 0.07) for i in nearest])
            expected = (weights[:, None] * shares[nearest]).sum(axis=0) / weights.sum()
            np.testing.assert_allclose(said[image, patch], expected, atol=1e-4)


def test_patch_scores_are_enlarged_bilinearly():
    """Pixel centres, edges held: the weights written out."""
    scores = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    grid = scores[0].view(2, 2, 3)
    said = segmentation.to_pixels(scores, (2, 2), (6, 6))[0]
    for y in range(6):
        for x in range(6):
            down, across = (min(max((p + 0.5) / 3 - 0.5, 0), 1) for p in (y, x))
            corners = [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across]
            mixed = sum(w * grid[i // 2, i % 2] for i, w in enumerate(corners))
            assert int(said[y, x]) == int(mixed.argmax())


def test_iou_by_loops():
    """Classes that neither truth nor answer holds are left out of the mean."""
    rng = np.random.default_rng(0)
    truth, said = rng.integers(0, 3, (2, 5, 5)), rng.integers(0, 4, (2, 5, 5))
    table = segmentation.confusion(torch.from_numpy(truth), torch.from_numpy(said))
    ious = []
    for c in range(segmentation.NUM_CLASSES):
        both, either = ((truth == c) & (said == c)).sum(), ((truth == c) | (said == c)).sum()
        if either:
            ious.append(both / either)
    assert len(ious) == 4
    assert segmentation.mean_iou(table.astype(float)) == pytest.approx(np.mean(ious))
