"""Any image, one code path: channels, bit depths, shapes and patch sizes from the file to the exported encoder."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiff_writer import write_tiff

import sslvit
from sslvit.data import crops
from sslvit.data.config import DINO_PHOTOMETRY, CropsConfig
from sslvit.data.decode import decode
from sslvit.data.sources import open_source
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.weights import load_encoder
from sslvit.exports import reopen, verify

TINY = {
    "steps": 1,
    "batch_size": 4,
    "encoder": {"name": "vit_tiny_patch16_224", "image_size": 20, "image_width": 30, "patch_size": 5, "depth": 1},
    "crops": {"num_local": 1, "local_size": 10},
    "dino": {"num_prototypes": 16, "head_hidden_dim": 16, "head_bottleneck_dim": 8},
    "ibot": {"num_prototypes": 16, "head_hidden_dim": 16, "head_bottleneck_dim": 8, "mask_prob": 1.0},
    "mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    "knn": {"every": 1, "num_images": 8},
    "precision": "fp32",
    "num_workers": 0,
}


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are verified here, not in a fresh process: test_exports.py has that."""
    monkeypatch.setattr(verify, "_run_process", lambda job, python: reopen.main(job))


def saved(image: Image.Image, form: str) -> bytes:
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def kinds(index: int) -> dict[str, bytes]:
    """One picture as each kind of file; its values differ from picture to picture and from band to band."""
    random = np.random.default_rng(index)
    smooth = np.linspace(0, 1, 40)[:, None, None] * np.linspace(0.2, 1, 60)[None, :, None] * random.random(13)
    return {
        "grey16": saved(Image.fromarray((smooth[:, :, 0] * 65535).astype(np.uint16)), "PNG"),
        "float_tiff": saved(Image.fromarray(smooth[:, :, 0].astype(np.float32)), "TIFF"),
        "rgba": saved(Image.fromarray((smooth[:, :, :4] * 255).astype(np.uint8), "RGBA"), "PNG"),
        "rgb16_tiff": write_tiff((smooth[:, :, :3] * 65535).astype(np.uint16)),
        "bands13": write_tiff((smooth * 3000 + 500).astype(np.uint16)),  # as satellites fill 16 bits
    }


CHANNELS = {"grey16": 1, "float_tiff": 1, "rgba": 4, "rgb16_tiff": 3, "bands13": 13}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(CHANNELS))
def test_pretrained_on_measured_exported_and_judged(kind: str, tmp_path: Path) -> None:
    data, channels = tmp_path / "data", CHANNELS[kind]
    data.mkdir()
    for index in range(6):
        (data / f"{index}.{'tif' if kind.startswith(('bands', 'rgb16', 'float')) else 'png'}").write_bytes(
            kinds(index)[kind]
        )
    encoder = TINY["encoder"] | ({"in_chans": 4} if kind == "rgba" else {})  # transparency is asked for by name
    run = sslvit.pretrain(data=str(data), output_dir=tmp_path / "run", **{**TINY, "encoder": encoder})

    stored = json.loads(next(run.rglob("statistics.json")).read_text())
    assert (stored["value_range"] is not None) is (kind != "rgba")
    source, values = open_source(str(data)), stored["value_range"]
    pixels = np.stack([decode(source.read(i), channels=channels, value_range=values) for i in range(6)]) / 255
    if values is not None:
        assert pixels.min() == 0 and pixels.max() == 1, "the measured range fills the eight bits"
    np.testing.assert_allclose(stored["mean"], pixels.mean((0, 1, 2)), atol=2e-3)
    np.testing.assert_allclose(stored["std"], np.maximum(pixels.std((0, 1, 2)), 1e-3), atol=2e-3)

    loaded = load_encoder(str(run))
    assert loaded.preprocessing.mean == tuple(stored["mean"]) and loaded.preprocessing.size == (20, 30)
    assert loaded.config.size == (20, 30) and loaded.module.patch_embed.proj.in_channels == channels
    assert json.loads(json.dumps(loaded.preprocessing.value_range)) == values
    assert load_encoder(str(run / "encoder")).preprocessing == loaded.preprocessing
    sslvit.embed(encoder=str(run), data=str(data), output_file=str(tmp_path / "features.npz"), num_workers=0)
    assert np.isfinite(np.load(tmp_path / "features.npz")["features"]).all()


def test_a_box_for_a_rectangle_has_its_shape() -> None:
    """Drawn ratios are relative to the view: a 1:3 view of a large image is cut by boxes of about 1:3."""
    config = CropsConfig(num_global=1, global_scale=[0.1, 0.3], num_local=1, local_size=8, local_width=24)
    sizes = np.full((500, 2), 400)
    plans = crops.plan_views(
        sizes, ((32, 96), (8, 24)), config, DINO_PHOTOMETRY, 3, 0, np.zeros(500, int), np.arange(500)
    )
    for plan in plans:
        aspects = plan.boxes[..., 3] / plan.boxes[..., 2]
        assert (aspects > 3 * 0.7).all() and (aspects < 3 * 1.4).all() and aspects.std() > 0.3


@pytest.mark.parametrize("shape", [(50, 50), (40, 90), (90, 30)])
def test_evaluation_covers_a_rectangle_without_stretching(shape: tuple[int, int]) -> None:
    """A disk stays a disk in the middle."""
    rows, columns = np.indices(shape)
    radius = 0.3 * min(shape)
    disk = (np.hypot(rows - (shape[0] - 1) / 2, columns - (shape[1] - 1) / 2) < radius) * np.uint8(255)
    view = crops.eval_transform(disk[:, :, None], Preprocessing(24, (0.5,), (0.5,), image_width=36))[0]
    assert view.shape == (24, 36)
    inside = view > 127
    height, width = (torch.nonzero(inside.any(axis)).flatten() for axis in (1, 0))
    scale = max(24 / shape[0], 36 / shape[1])
    expected = [min(2 * radius * scale, side) for side in (24, 36)]
    assert abs(len(height) - expected[0]) <= 1.5 and abs(len(width) - expected[1]) <= 1.5
