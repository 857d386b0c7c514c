"""Colour operations against torchvision's, each alone and in every order."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torchvision.transforms import v2

from sslvit.data import photometry
from sslvit.data.config import DINO_PHOTOMETRY
from sslvit.data.photometry import BLUR, BRIGHTNESS, CONTRAST, GRAYSCALE, HUE, IDENTITY, ORDER, SATURATION, SOLARIZE

NO_STATISTICS = ((0.0,) * 3, (1.0,) * 3)
TORCHVISION = {
    BRIGHTNESS: tv.adjust_brightness,
    CONTRAST: tv.adjust_contrast,
    SATURATION: tv.adjust_saturation,
    HUE: tv.adjust_hue,
}


def row(**values):
    names = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE, "order": ORDER}
    names |= {"grayscale": GRAYSCALE, "blur": BLUR, "solarize": SOLARIZE}
    made = torch.tensor(IDENTITY)
    for name, value in values.items():
        made[names[name]] = value
    return made


def muted(batch=4, height=20, width=24, channels=3, seed=0):
    """Images whose values stay inside 0..255 under the strengths tested, so that clamping does not act."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(90, 150, (batch, channels, height, width), generator=generator, dtype=torch.uint8)


def colour(images, rows):
    return photometry.apply(images, rows, *NO_STATISTICS)


@pytest.mark.parametrize(
    ("name", "operation"),
    [("brightness", tv.adjust_brightness), ("contrast", tv.adjust_contrast), ("saturation", tv.adjust_saturation)],
)
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.37])
def test_each_jitter_operation_is_torchvisions(name, operation, factor):
    images = muted()
    ours = colour(images, row(**{name: factor}).repeat(4, 1))
    torch.testing.assert_close(ours, operation(images.float() / 255, factor), atol=1e-3, rtol=0)


@pytest.mark.parametrize("order", range(24))
def test_jitter_in_every_order_is_torchvisions_sequence(order):
    images = muted(batch=1, seed=order)
    factors = {BRIGHTNESS: 1.25, CONTRAST: 0.7, SATURATION: 1.2, HUE: 1 / 3}
    expected = images.float() / 255
    for operation in photometry.ORDERS[order]:
        expected = TORCHVISION[operation](expected, factors[operation])
    ours = colour(images, row(brightness=1.25, contrast=0.7, saturation=1.2, hue=1 / 3, order=order)[None])
    torch.testing.assert_close(ours, expected, atol=1 / 255, rtol=0)


def test_a_wrong_order_is_noticed():
    images = muted(batch=1)
    brightness_first = colour(images, row(brightness=1.3, hue=1 / 3, contrast=0.6, order=0)[None])
    contrast_first = colour(images, row(brightness=1.3, hue=1 / 3, contrast=0.6, order=6)[None])
    assert photometry.ORDERS[0][:2] == (BRIGHTNESS, CONTRAST) and photometry.ORDERS[6][:2] == (CONTRAST, BRIGHTNESS)
    torch.testing.assert_close(brightness_first, contrast_first)  # these two commute ...
    saturated = [colour(images, row(hue=0.1, saturation=0.3, order=order)[None]) for order in (0, 1)]
    assert photometry.ORDERS[0][2:] == (SATURATION, HUE) and photometry.ORDERS[1][2:] == (HUE, SATURATION)
    assert (saturated[0] - saturated[1]).abs().max() > 1 / 255  # ... these do not


@pytest.mark.parametrize("turns", [-1 / 3, 0.0, 1 / 3])
def test_hue_at_thirds_is_hsvs(turns):
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    ours = colour(images, row(hue=turns).repeat(2, 1))
    torch.testing.assert_close(ours, tv.adjust_hue(images.float() / 255, turns), atol=1e-3, rtol=0)


@pytest.mark.parametrize("turns", [0.05, 0.1, -0.1])
def test_hue_between_thirds_is_nearer_to_hsvs_than_its_rivals(turns):
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(60, 190, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    before = images.float() / 255
    ours, hsv = colour(images, row(hue=turns).repeat(4, 1)), tv.adjust_hue(before, turns)
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    turn = torch.tensor([[1, 0, 0], [0, cos, sin], [0, -sin, cos]], dtype=torch.float32)
    yiq = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(to_yiq) @ turn @ to_yiq, before)
    distance, unchanged, by_yiq = ((x - hsv).abs().mean() for x in (ours, before, yiq))
    assert distance < 0.9 * unchanged and distance < 0.9 * by_yiq
    torch.testing.assert_close(ours.mean(1), before.mean(1), atol=1e-5, rtol=0)  # the mean of R, G, B is kept


def test_grayscale_is_torchvisions():
    images = muted()
    ours = colour(images, row(grayscale=1).repeat(4, 1))
    torch.testing.assert_close(ours, tv.rgb_to_grayscale(images.float() / 255, 3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (96, 96), (224, 224), (5, 3)])
def test_blur_is_torchvisions_with_each_images_sigma(size):
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (5, 3, *size), generator=generator, dtype=torch.uint8)
    sigmas = [0.1, 0.0, 2.0, 0.55, 1.3]
    ours = colour(images, torch.stack([row(blur=sigma) for sigma in sigmas]))
    kernel = [photometry.kernel_size(size[1]), photometry.kernel_size(size[0])]  # torchvision wants width, height
    for image, sigma, result in zip(images.float() / 255, sigmas, ours, strict=True):
        expected = tv.gaussian_blur(image, kernel, [sigma, sigma]) if sigma else image
        torch.testing.assert_close(result, expected, atol=2e-4, rtol=0)


def test_the_convolution_that_cuda_uses_is_the_same_blur():
    images = torch.rand(3, 3, 40, 56)
    sigma = torch.tensor([0.3, 1.0, 2.0])
    halves = [photometry.kernel_size(side) // 2 for side in (40, 56)]
    by_convolution = photometry._blur_by_convolution(images, sigma, halves)
    torch.testing.assert_close(photometry._blur_by_shifts(images, sigma, halves), by_convolution, atol=2e-4, rtol=0)


def test_kernel_is_dinos_at_224_and_a_tenth_elsewhere():
    assert [photometry.kernel_size(side) for side in (224, 112, 96, 64, 48, 32, 8)] == [23, 11, 9, 7, 5, 3, 3]


def test_solarize_is_torchvisions():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    ours = colour(images, torch.stack([row(solarize=1), row()]))
    torch.testing.assert_close(
        ours * 255, torch.stack([tv.solarize(images[0], 128), images[1]]).float(), atol=1e-3, rtol=0
    )


def test_normalize_and_the_identity_row_agree():
    images = muted(channels=3)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    expected = tv.normalize(images.float() / 255, mean, std)
    torch.testing.assert_close(photometry.normalize(images, mean, std), expected)
    torch.testing.assert_close(photometry.apply(images, row().repeat(4, 1), mean, std), expected)


def test_a_batch_is_its_images_one_by_one():
    images = torch.randint(0, 256, (12, 3, 24, 24), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    u = np.random.default_rng(0).random((12, photometry.NUM_UNIFORMS))
    config = replace(DINO_PHOTOMETRY, global_blur_prob=[0.5], global_solarize_prob=[0.5])
    rows = torch.from_numpy(photometry.draw(u, config, "global", 0, 3))
    assert 0 < (rows[:, BLUR] > 0).sum() < 12 and 0 < rows[:, SOLARIZE].sum() < 12
    whole = colour(images, rows)
    single = torch.cat([colour(images[i : i + 1], rows[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(whole, single, atol=2e-4, rtol=0)
    assert not torch.equal(whole, colour(images, rows.roll(1, 0)))


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts_get_brightness_contrast_and_blur(channels):
    u = np.random.default_rng(1).random((200, photometry.NUM_UNIFORMS))
    rows = torch.from_numpy(photometry.draw(u, DINO_PHOTOMETRY, "global", 0, channels))
    for column, value in ((SATURATION, 1), (HUE, 0), (GRAYSCALE, 0), (SOLARIZE, 0)):
        assert (rows[:, column] == value).all()
    rgb = photometry.draw(u, DINO_PHOTOMETRY, "global", 0, 3)
    np.testing.assert_array_equal(rows[:, BLUR], rgb[:, BLUR])  # blur is no colour operation
    assert rows[:, CONTRAST].std() > 0.1 and rows[:, BRIGHTNESS].std() > 0.1
    images = muted(batch=2, channels=channels)
    ours = photometry.apply(images, row(brightness=1.2, contrast=0.7).repeat(2, 1), (0,) * channels, (1,) * channels)
    for channel in range(channels):  # each band has its own mean, as if it were alone
        alone = images[:, channel : channel + 1].float() / 255
        expected = tv.adjust_contrast(tv.adjust_brightness(alone, 1.2), 0.7)
        torch.testing.assert_close(ours[:, channel : channel + 1], expected, atol=1e-3, rtol=0)


def test_draw_has_the_configured_ranges_and_frequencies():
    u = np.random.default_rng(2).random((20000, photometry.NUM_UNIFORMS))
    config = DINO_PHOTOMETRY
    first, second, third, local = (
        photometry.draw(u, config, *kind, 3) for kind in (("global", 0), ("global", 1), ("global", 5), ("local", 3))
    )
    jittered = first[:, BRIGHTNESS] != 1
    assert jittered.mean() == pytest.approx(0.8, abs=0.02)
    assert (first[~jittered][:, :ORDER] == IDENTITY[:ORDER]).all()
    for column, (low, high) in {
        BRIGHTNESS: (0.6, 1.4),
        CONTRAST: (0.6, 1.4),
        SATURATION: (0.8, 1.2),
        HUE: (-0.1, 0.1),
    }.items():
        drawn = first[jittered, column]
        assert drawn.min() >= low - 1e-6 and drawn.max() <= high + 1e-6
        assert np.quantile(drawn, 0.25) == pytest.approx(low + (high - low) / 4, abs=0.02 * (high - low))
    assert set(np.unique(first[:, ORDER])) == set(range(24))
    assert first[:, GRAYSCALE].mean() == pytest.approx(0.2, abs=0.02)
    assert [(rows[:, BLUR] > 0).mean() for rows in (first, second, third, local)] == pytest.approx(
        [1.0, 0.1, 0.1, 0.5], abs=0.02
    )
    assert first[:, BLUR].min() >= 0.1 and first[:, BLUR].max() <= 2
    assert [rows[:, SOLARIZE].mean() for rows in (first, second, third, local)] == pytest.approx(
        [0.0, 0.2, 0.2, 0.0], abs=0.02
    )


def test_draws_of_different_operations_are_independent():
    rows = photometry.draw(
        np.random.default_rng(3).random((20000, photometry.NUM_UNIFORMS)), DINO_PHOTOMETRY, "global", 1, 3
    )
    jittered = rows[rows[:, BRIGHTNESS] != 1]
    correlation = np.corrcoef(jittered.T) - np.eye(photometry.NUM_PARAMETERS)
    assert np.abs(correlation).max() < 0.05


def statistics(views):
    """Brightness, contrast, colourfulness and sharpness of each view (B, 3, H, W): (B, 4)."""
    edges = (views[..., 1:] - views[..., :-1]).abs().mean((1, 2, 3))
    return torch.stack([views.mean((1, 2, 3)), views.std((2, 3)).mean(1), views.std(1).mean((1, 2)), edges], 1)


def test_views_are_spread_as_those_of_torchvisions_whole_chain():
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(1200, 3, 6, 6, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, (48, 48), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)
    u = np.random.default_rng(5).random((1200, photometry.NUM_UNIFORMS))
    config = replace(DINO_PHOTOMETRY, global_blur_prob=[0.5], global_solarize_prob=[0.2])
    ours = statistics(colour(pictures, torch.from_numpy(photometry.draw(u, config, "global", 0, 3))))
    torch.manual_seed(5)
    chain = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(photometry.kernel_size(48), (0.1, 2.0))], p=0.5),
            v2.RandomSolarize(128, p=0.2),
        ]
    )
    theirs = statistics(torch.stack([chain(picture) for picture in pictures]).float() / 255)
    for quantile in (0.1, 0.5, 0.9):
        difference = ours.quantile(quantile, 0) - theirs.quantile(quantile, 0)
        assert (difference.abs() < 0.35 * theirs.std(0)).all(), (quantile, difference / theirs.std(0))
    plain = statistics(pictures.float() / 255)  # without colour operations the spread is another
    assert ((plain.quantile(0.1, 0) - theirs.quantile(0.1, 0)).abs() > 0.5 * theirs.std(0)).any()
