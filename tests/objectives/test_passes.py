"""Keyed draws: uniform, independent of batch and rank; masks partition the patches; block masks; KoLeo."""

import math

import numpy as np
import pytest
import torch

from sslvit.objectives.config import IbotConfig
from sslvit.objectives.ibot import Ibot, block_mask
from sslvit.objectives.koleo import koleo_loss
from sslvit.objectives.passes import Draw, keyed_uniform, num_visible


def test_keyed_uniform_is_uniform_and_uncorrelated():
    values = keyed_uniform(torch.arange(400), 3, 5, num=500).double().numpy()
    assert abs(values.mean() - 0.5) < 0.005
    assert abs(values.var() - 1 / 12) < 0.002
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 50  # chi square, 19 degrees of freedom: p < 1e-4
    neighbours = np.corrcoef(values[:-1].reshape(-1), values[1:].reshape(-1))[0, 1]
    assert abs(neighbours) < 0.01
    other = keyed_uniform(torch.arange(400), 4, 5, num=500).double().numpy()
    assert abs(np.corrcoef(values.reshape(-1), other.reshape(-1))[0, 1]) < 0.01


def test_a_sample_draws_the_same_mask_in_any_batch():
    together = Draw(1, 9, torch.tensor([4, 7, 11])).visible(1, 64, 16)
    alone = Draw(1, 9, torch.tensor([7])).visible(1, 64, 16)
    assert torch.equal(together.keep[1:2], alone.keep)
    other_view = Draw(1, 9, torch.tensor([7])).visible(0, 64, 16)
    other_step = Draw(1, 10, torch.tensor([7])).visible(1, 64, 16)
    assert not torch.equal(alone.keep, other_view.keep)
    assert not torch.equal(alone.keep, other_step.keep)


def test_visible_and_removed_partition_the_patches():
    masking = Draw(0, 0, torch.arange(6)).visible(0, 49, num_visible(49, 0.75))
    assert masking.keep.shape == (6, 12)
    everything = torch.cat([masking.keep, masking.removed], 1).sort(1).values
    assert torch.equal(everything, torch.arange(49).expand(6, -1))


def test_masks_are_drawn_with_the_ids_and_moved_to_the_device():
    drawn = Draw(0, 0, torch.arange(6), torch.device("meta"))  # stands for a GPU
    heads = {"num_prototypes": 8, "head_hidden_dim": 8, "head_bottleneck_dim": 4}
    config = IbotConfig(**heads, center_momentum=0.9, teacher_temperature=0.07, teacher_temperature_start=0.04)
    for masking in (drawn.visible(0, 49, 12), Ibot(config, 8, (7, 7), 10, 2).masking(drawn, 0, 49)):
        given = [t for t in (masking.keep, masking.removed, masking.mask) if t is not None]
        assert given and {t.device.type for t in given} == {"meta"}


@pytest.mark.parametrize("num_masked", [0, 1, 7, 40, 98])
def test_block_masks_have_exactly_the_count(num_masked):
    for seed in range(20):
        mask = block_mask(np.random.default_rng(seed), (14, 7), num_masked)
        assert mask.shape == (14, 7)
        assert mask.sum() == num_masked


def test_block_masks_are_blocks():
    """Neighbours of masked patches are masked far more often than under random masks of the same ratio."""
    together = []
    for seed in range(50):
        mask = block_mask(np.random.default_rng(seed), (14, 14), 78)
        together.append((mask[:, 1:] & mask[:, :-1]).sum() / mask[:, :-1].sum())
    assert np.mean(together) > 0.6 > 78 / 196 + 0.1


def test_koleo_is_the_double_loop():
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    unit = features.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    total = 0.0
    for i in range(7):
        total -= math.log(min(np.linalg.norm(unit[i] - unit[j]) for j in range(7) if j != i))
    assert koleo_loss(features).item() == pytest.approx(total / 7, abs=1e-5)


def test_koleo_of_equal_features_is_finite_with_finite_gradient():
    features = torch.ones(4, 5, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()
