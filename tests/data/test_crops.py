"""Crops against torchvision's rule and resize."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from sslvit.data import crops
from sslvit.data.config import DINO_PHOTOMETRY, CropsConfig
from sslvit.data.keyed import uniforms
from sslvit.encoder.config import Preprocessing

CROPS = CropsConfig(num_global=2, global_scale=[0.4, 1.0], num_local=3, local_size=16)
SIDES = ((32, 32), (16, 16))


def picture(height=70, width=50, channels=3, seed=0):
    """Smooth colours with a few hard edges, (H, W, C) uint8."""
    random = np.random.default_rng(seed)
    waves = np.sin(np.arange(height)[:, None, None] / 9 + random.random(channels) * 6)
    waves = waves + np.cos(np.arange(width)[None, :, None] / 7 + random.random(channels) * 6)
    image = (waves * 60 + 128).astype(np.uint8)
    image[height // 3 : height // 2, width // 4 : width // 2] = random.integers(0, 256, channels)
    return image


def torchvisions_rule(u, height, width, scale, ratio):
    """`RandomResizedCrop.get_params`, its draws given: the oracle."""
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[attempt])
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * u[10 + attempt])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w]
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        w, h = round(height * max(ratio)), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize("size", [(32, 32), (50, 75), (400, 30), (9, 200), (1, 1), (1, 40)])
@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.4, 1.0)])
def test_boxes_follow_torchvisions_rule(size, scale):
    u = uniforms(0, 0, np.arange(300), 0, 22)
    height, width = (np.full(300, side) for side in size)
    boxes = crops.crop_boxes(u, height, width, scale, (0.75, 4 / 3))
    expected = [torchvisions_rule(row, *size, scale, (0.75, 4 / 3)) for row in u]
    np.testing.assert_array_equal(boxes, expected)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= size[0]).all() and (boxes[:, 1] + boxes[:, 3] <= size[1]).all()


def test_boxes_are_spread_as_torchvisions():
    torch.manual_seed(0)
    image = torch.empty(3, 60, 80)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.1, 0.7], [0.75, 4 / 3]) for _ in range(3000)])
    u = uniforms(5, 0, np.arange(3000), 0, 22)
    ours = crops.crop_boxes(u, np.full(3000, 60), np.full(3000, 80), (0.1, 0.7), (0.75, 4 / 3))
    for column in range(4):
        ranks = np.sort(np.concatenate([ours[:, column], theirs[:, column]]))
        gap = np.abs(
            np.searchsorted(np.sort(ours[:, column]), ranks, "right")
            - np.searchsorted(np.sort(theirs[:, column]), ranks, "right")
        ).max()
        assert gap / 3000 < 1.95 * math.sqrt(2 / 3000)  # Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(24, 24), (17, 40), (96, 64)])
def test_cut_views_is_torchvisions_resized_crop(channels, size):
    image = picture(channels=channels)
    boxes = np.array([[3, 5, 40, 30], [0, 0, 70, 50], [60, 40, 7, 9], [10, 11, 1, 1]])
    flips = np.array([False, True, False, True])
    out = torch.empty(4, channels, *size, dtype=torch.uint8)
    crops.cut_views(image, boxes, flips, list(out))
    chw = torch.from_numpy(image).permute(2, 0, 1)
    for view, box, flip in zip(out, boxes.tolist(), flips.tolist(), strict=True):
        expected = tv.resized_crop(chw, *box, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
        expected = tv.horizontal_flip(expected) if flip else expected
        assert (view.int() - expected.int()).abs().max() <= 1


def test_cut_views_is_pillows_crop_and_resize():
    image = picture()
    out = torch.empty(1, 3, 24, 24, dtype=torch.uint8)
    crops.cut_views(image, np.array([[3, 5, 40, 30]]), np.array([False]), list(out))
    pillow = Image.fromarray(image[3:43, 5:35]).resize((24, 24), Image.Resampling.BICUBIC)
    assert np.abs(out[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(pillow).astype(int)).max() <= 1


def test_read_only_images_are_fine():
    image = picture()
    image.flags.writeable = False
    crops.make_views(image, CROPS, 32, DINO_PHOTOMETRY, 0, 0, 0)


def test_make_views_shapes_and_key():
    image = picture()
    views = crops.make_views(image, CROPS, (32, 48), DINO_PHOTOMETRY, 0, 0, 7)
    assert views.global_crops.shape == (2, 3, 32, 48) and views.local_crops.shape == (3, 3, 16, 16)
    assert views.global_photometry.shape == (2, 8) and views.local_photometry.shape == (3, 8)
    again = crops.make_views(image, CROPS, (32, 48), DINO_PHOTOMETRY, 0, 0, 7)
    assert torch.equal(views.global_crops, again.global_crops)
    assert torch.equal(views.local_photometry, again.local_photometry)
    for other in ((1, 0, 7), (0, 1, 7), (0, 0, 8)):
        different = crops.make_views(image, CROPS, (32, 48), DINO_PHOTOMETRY, *other)
        assert not torch.equal(views.global_crops, different.global_crops)
    assert not torch.equal(views.global_crops[0], views.global_crops[1])
    assert not torch.equal(views.local_crops[0], views.local_crops[1])


def test_adding_local_views_leaves_the_global_ones_alone():
    few = CropsConfig(num_global=2, global_scale=[0.4, 1.0], num_local=0, local_size=16)
    views = [crops.make_views(picture(), config, 32, DINO_PHOTOMETRY, 0, 0, 7) for config in (few, CROPS)]
    assert torch.equal(views[0].global_crops, views[1].global_crops)
    assert views[0].local_crops.shape[0] == 0


def test_half_of_the_views_are_flipped():
    sizes = np.full((2000, 2), 40)
    plan, _ = crops.plan_views(sizes, SIDES, CROPS, DINO_PHOTOMETRY, 3, 0, np.zeros(2000, int), np.arange(2000))
    assert plan.flips.mean() == pytest.approx(0.5, abs=0.03)
    never = CropsConfig(num_global=2, global_scale=[0.4, 1.0], num_local=0, horizontal_flip_prob=0.0)
    assert not crops.plan_views(sizes, SIDES, never, DINO_PHOTOMETRY, 3, 0, np.zeros(2000, int), np.arange(2000))[
        0
    ].flips.any()


@pytest.mark.parametrize("shape", [(1.0, 1.0), (1.0, 1.7), (2.5, 1.0)])
def test_min_side_keeps_every_crop_at_least_as_large_as_its_output(shape):
    side = crops.min_side(CROPS, 32)
    height, width = (int(side * factor) for factor in shape)
    sizes = np.broadcast_to([height, width], (3000, 2))
    plans = crops.plan_views(sizes, SIDES, CROPS, DINO_PHOTOMETRY, 3, 0, np.zeros(3000, int), np.arange(3000))
    for plan, output in zip(plans, (32, 16), strict=True):
        assert plan.boxes[..., 2:].min() >= output
    smaller = np.broadcast_to([int(side * 0.6)] * 2, (3000, 2))
    plans = crops.plan_views(smaller, SIDES, CROPS, DINO_PHOTOMETRY, 3, 0, np.zeros(3000, int), np.arange(3000))
    assert min(plan.boxes[..., 2:].min() - output for plan, output in zip(plans, (32, 16), strict=True)) < 0


@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("size", [(70, 50), (33, 90), (64, 64), (20, 20)])
def test_eval_transform_is_timms(size, crop_pct):
    image = picture(*size)
    ours = crops.eval_transform(image, Preprocessing(image_size=48, crop_pct=crop_pct))
    theirs = create_transform((3, 48, 48), interpolation="bicubic", crop_pct=crop_pct, mean=(0,) * 3, std=(1,) * 3)
    expected = theirs(Image.fromarray(image)) * 255
    assert ours.shape == (3, 48, 48) and ours.is_contiguous()
    difference = (ours.float() - expected).abs()  # Pillow keeps its weights in more bits
    assert difference.max() < 2.5 and difference.mean() < 0.15


def test_eval_transform_of_an_image_of_the_right_size_is_the_image():
    image = picture(48, 48, channels=1)
    ours = crops.eval_transform(image, Preprocessing(image_size=48, mean=(0.5,), std=(0.5,)))
    assert torch.equal(ours, torch.from_numpy(image).permute(2, 0, 1))
