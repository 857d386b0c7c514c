"""MAE against the paper's steps written as loops."""

import math

import numpy as np
import pytest
import torch

from sslvit.encoder.vit import Tokens, patchify, sincos_positions
from sslvit.objectives.config import MaeConfig
from sslvit.objectives.mae import Mae, normalized
from sslvit.objectives.passes import Draw


def make(**settings):
    torch.manual_seed(0)
    config = MaeConfig(decoder_dim=16, decoder_depth=1, decoder_num_heads=2, **settings)
    return Mae(config, embed_dim=12, patch_size=4, grid=(3, 4), channels=3, num_global=2)


def test_normalized_patches_are_the_papers():
    images = torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    ours = normalized(patchify(images, 4))
    for image in range(2):
        for row in range(3):
            for column in range(4):
                block = images[image, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
                values = block.permute(1, 2, 0).reshape(-1).double().numpy()
                expected = (values - values.mean()) / math.sqrt(values.var(ddof=1) + 1e-6)
                np.testing.assert_allclose(ours[image, row * 4 + column].numpy(), expected, atol=1e-5)


def test_positions_are_the_sine_cosine_table():
    table = sincos_positions((3, 4), 8)
    for row in range(3):
        for column in range(4):
            expected = []
            for position in (column, row):
                angles = [position / 10000 ** (i / 2) for i in range(2)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            np.testing.assert_allclose(table[row * 4 + column].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_loss_counts_removed_patches_only(norm_pixels):
    mae = make(norm_pixels=norm_pixels)
    images = torch.rand(2, 5, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    passes = mae.passes(Draw(0, 3, torch.arange(5)), 12)
    (p,) = passes
    assert p.index == 1
    assert p.masking.keep.shape == (5, 3)
    tokens = Tokens(torch.randn(5, 1, 12), torch.randn(5, 3, 12), has_class_token=True, normed=True)
    loss, _ = mae.loss({p: tokens}, images, 3)
    predicted = mae.decode(tokens, p.masking.keep, p.masking.removed).detach().double().numpy()
    patches = patchify(images[1], 4).double().numpy()
    total, count = 0.0, 0
    for image in range(5):
        for place, patch in enumerate(p.masking.removed[image].tolist()):
            target = patches[image, patch]
            if norm_pixels:
                target = (target - target.mean()) / math.sqrt(target.var(ddof=1) + 1e-6)
            total += float(((predicted[image, place] - target) ** 2).mean())
            count += 1
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_decoding_in_shuffled_order_changes_nothing():
    """The decoder knows a patch by its position, not by its place in the sequence."""
    mae = make().eval()
    draw = Draw(0, 0, torch.arange(4)).visible(0, 12, 3)
    tokens = Tokens(torch.randn(4, 1, 12), torch.randn(4, 3, 12), has_class_token=True, normed=True)
    plain = mae.decode(tokens, draw.keep, draw.removed)
    order = torch.randperm(9)
    shuffled = mae.decode(tokens, draw.keep, draw.removed[:, order])
    torch.testing.assert_close(plain[:, order], shuffled, atol=1e-5, rtol=0)
    wrong = mae.decode(tokens, draw.keep.flip(1), draw.removed)
    assert (wrong - plain).abs().max() > 1e-3
