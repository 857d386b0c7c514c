"""Segmentation and attentive probes: geometry, independence of heads, and that they learn what is there."""

import numpy as np
import pytest
import timm
import torch

from sslvit.data.loader import clean_batches
from sslvit.data.sources import open_source
from sslvit.encoder.config import Preprocessing
from sslvit.errors import InputError
from sslvit.probes import attentive, segmentation
from sslvit.probes.features import Examples, Extraction

SPEC = "scenes:?n=30&size=32&objects=1-2"


def test_class_maps_are_the_masks():
    source = open_source(SPEC)
    for index in range(5):
        got = segmentation.class_map(source, index, Preprocessing(32)).numpy()
        masks, graph = source.masks(index), source.graph(index)
        assert np.array_equal(got > 0, masks.any(axis=0))
        for mask, one in zip(masks, graph.objects, strict=True):
            assert (got[mask] == 1 + segmentation.SHAPES.index(one.shape)).all()
    assert segmentation.class_map(source, 0, Preprocessing(16, crop_pct=0.5)).shape == (16, 16)


def test_a_set_without_masks_is_refused(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="no masks"):
        segmentation.check_masks(open_source(str(tmp_path)))


def test_shares_are_pixel_counts():
    maps = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (2, 8, 8)))
    shares = segmentation.shares_of(maps, (2, 2))
    for patch, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        counts = np.bincount(maps[1, row : row + 4, column : column + 4].flatten(), minlength=9)
        np.testing.assert_allclose(shares[1, patch], counts / 16, atol=1e-6)


def test_scores_that_are_the_truth_give_back_the_map():
    maps = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (3, 8, 8)))
    scores = torch.nn.functional.one_hot(maps.flatten(1), 9).float()
    assert torch.equal(segmentation.to_pixels(scores, (8, 8), (8, 8)), maps)


def vit(height, width, patch=8):
    torch.manual_seed(0)
    sizes = {"img_size": (height, width), "patch_size": patch, "depth": 1, "embed_dim": 24, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=0, dynamic_img_size=True).eval()


@pytest.mark.parametrize(("height", "width"), [(16, 32), (16, 64), (32, 16)])
def test_grids_are_those_of_the_image_and_not_squares(height, width):
    """2 x 4 patches have no square, and 2 x 8 are no 4 x 4: what fills a patch comes back in its place."""
    source = open_source("scenes:?n=4&size=64&objects=2-3")
    one = Examples(source, vit(height, width), Preprocessing(height, image_width=width), Extraction(num_workers=0))
    rows, columns = one.grid
    assert (rows, columns) == (height // 8, width // 8)
    map_of_one = segmentation.class_map(source, 1, one.preprocessing)
    images = next(clean_batches(source, one.preprocessing, 4, 0))[0]
    assert map_of_one.shape == images.shape[2:] == (height, width)
    patches = segmentation.training_patches(one, source, np.arange(4))
    shares = patches.shares.reshape(4, rows, columns, 9)[1]
    for row in range(rows):
        for column in range(columns):
            tile = map_of_one[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            np.testing.assert_allclose(shares[row, column], np.bincount(tile.flatten(), minlength=9) / 64, atol=1e-6)
    back = segmentation.to_pixels(torch.from_numpy(shares).reshape(1, -1, 9), (rows, columns), (height, width))
    centres = shares.argmax(axis=2)
    assert np.array_equal(back[0, 4::8, 4::8].numpy(), centres)


def test_segmentation_of_an_oblong_encoder_from_end_to_end():
    from sslvit.probes.config import EvaluateConfig
    from sslvit.probes.measure import measure

    sets = [
        Examples(open_source(spec), vit(16, 32), Preprocessing(16, image_width=32), Extraction(num_workers=0))
        for spec in (SPEC, SPEC + "&split=val")
    ]
    scores = measure("segmentation", *sets, EvaluateConfig())
    assert [one.metric for one in scores] == ["linear/miou", "knn/miou"] and all(0 <= s.value <= 1 for s in scores)
    sets[0].preprocessing = sets[1].preprocessing = Preprocessing(20)
    with pytest.raises(InputError, match="not a multiple of the patch size"):
        measure("segmentation", *sets, EvaluateConfig())


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_patches_that_tell_their_class_are_segmented(method):
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 9, 400)
    tokens = (3 * np.eye(9, 12)[classes] + 0.3 * rng.normal(size=(400, 12))).astype(np.float32)
    patches = segmentation.Patches(tokens, np.eye(9, dtype=np.float32)[classes])
    fitted = segmentation.LinearHead(patches, 40) if method == "linear" else segmentation.NearestPatches(patches)
    said = fitted(torch.from_numpy(tokens[:64]).view(4, 16, 12)).argmax(dim=2).flatten()
    assert (said.numpy() == classes[:64]).mean() > 0.95


def test_pixel_patches_beat_chance_on_scenes():
    from sslvit.probes.config import EvaluateConfig
    from sslvit.probes.protocols import fit_segmentation
    from sslvit.probes.scores import score

    train = Examples(open_source(SPEC), None, Preprocessing(32), Extraction(num_workers=0))
    val = Examples(open_source(SPEC + "&split=val"), None, Preprocessing(32), Extraction(num_workers=0))
    answers = fit_segmentation(train, EvaluateConfig())(val.take(np.arange(30), labels=False))
    truth = np.stack([segmentation.class_map(val.source, i, Preprocessing(32)) for i in range(30)])
    scores = {s.metric: s for s in score(answers, truth, 0)}
    background_only = 1 / 9 * (truth == 0).mean()
    assert scores["linear/miou"].value >= background_only
    assert scores["knn/miou"].value > background_only


def test_attentive_heads_do_not_depend_on_their_company():
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.normal(size=(60, 5, 8)).astype(np.float16))
    labels = rng.integers(0, 3, 60)
    settings = {"seed": 0, "steps": 15, "batch_size": 16, "device": torch.device("cpu")}
    together, _, _ = attentive.fit(tokens, labels, learning_rates=[1e-3, 1e-2], **settings)
    alone, _, _ = attentive.fit(tokens, labels, learning_rates=[1e-2], **settings)
    for name, values in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name][1:], values, atol=1e-5, rtol=1e-4)


def test_attentive_step_is_adam():
    tokens = torch.randn(20, 5, 8, generator=torch.Generator().manual_seed(0)).half()
    labels = np.arange(20) % 2
    heads, _, _ = attentive.fit(
        tokens, labels, seed=0, steps=1, batch_size=18, device=torch.device("cpu"), learning_rates=[0.01]
    )
    fresh = attentive.AttentiveHeads(1, 8, 2, 0)
    optimizer = torch.optim.Adam(fresh.parameters(), lr=0.01)
    fitting, _ = attentive.choice_split(labels, 0)
    index = fitting[next(iter(attentive.batches(len(fitting), 18, 1, 0)))]
    torch.nn.functional.cross_entropy(fresh(tokens[index].float())[0], torch.from_numpy(labels[index])).backward()
    optimizer.step()
    for one, other in zip(heads.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_attentive_finds_what_one_patch_says():
    """The class is written in one patch at a random place: the mean of all patches hides it, attention finds it."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    tokens = rng.normal(size=(400, 16, 8))
    place = rng.integers(0, 16, 400)
    tokens[np.arange(400), place] = 0
    tokens[np.arange(400), place, 0] = 6
    tokens[np.arange(400), place, 1] = np.where(labels, 6, -6)
    tokens = torch.from_numpy(tokens).half()
    heads, chosen, classes = attentive.fit(
        tokens[:300], labels[:300], seed=0, steps=150, batch_size=64, device=torch.device("cpu")
    )
    said = classes[attentive.predict(heads, tokens[300:], torch.device("cpu"))[chosen].argmax(dim=1)]
    assert (said == labels[300:]).mean() > 0.9
