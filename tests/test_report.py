"""`sslvit report` on a real run folder: weights, images and questions become one page; what is missing is said."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from sslvit.checkpoint import checkpoint_path, save_checkpoint
from sslvit.config import PretrainConfig, as_dict, load_config
from sslvit.data.pairs import open_pairs
from sslvit.data.scenes import Scenes
from sslvit.encoder.config import Preprocessing
from sslvit.errors import InputError
from sslvit.metrics import MetricsLog
from sslvit.objectives.pretraining import Pretraining
from sslvit.objectives.recipe import DataFacts, resolve
from sslvit.run_folder import RunFolder
from sslvit.verbs.report import report

SIZES = {
    "encoder": {"name": "vit_tiny_patch16_224", "embed_dim": 24, "depth": 2, "num_heads": 2, "image_size": 32},
    "crops": {"num_local": 3, "local_size": 16},
    "dino": {"num_prototypes": 16, "head_hidden_dim": 16, "head_bottleneck_dim": 8},
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
}
PICTURES = (
    "Crops as the model gets them",
    "Attention of the class token",
    "Patch features as colours",
    "Reconstructions",
    "Nearest neighbours",
    "Near-duplicates",
)


def make_run(path, data, **changes):
    """What `pretrain` leaves after its first checkpoint and two lines, without training."""
    config = load_config(PretrainConfig, None, {"data": str(data), "batch_size": 4, "steps": 6, **SIZES, **changes})
    resolved, reasons = resolve(config, DataFacts(24, 40, 3, "cpu"))
    preprocessing = Preprocessing(32)
    with RunFolder.open(path, "pretrain", config) as folder:
        folder.write_resolved(resolved, reasons)
        metrics = MetricsLog(path)
        metrics.begin(6, None)
        metrics.row(0, {"knn/top1": 0.25, "rankme": 3.0})
        metrics.add({"loss": 2.0, "dino/loss": 1.5, "mae/loss": 0.5})
        metrics.line(1, {"lr": 1e-3, "skipped": 0})
        metrics.end()
        meta = {"encoder": as_dict(resolved.encoder), "preprocessing": as_dict(preprocessing)}
        model = Pretraining(resolved, preprocessing).state_dict()
        save_checkpoint(path / "checkpoints", 1, {"model": model}, meta, keep=2, background=False)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 24 scenes in two class folders, one file broken."""
    root = tmp_path_factory.mktemp("images") / "scenes"
    scenes = Scenes(n=24, size=40)
    for i in range(24):
        place = root / ("left" if i % 2 else "right")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scenes.read(i)).save(place / f"{i}.png")
    (root / "left" / "1.png").write_bytes(b"broken")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory, images):
    return make_run(tmp_path_factory.mktemp("run") / "OUT", images)


def test_page_with_every_picture(run):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    page = report(run)
    assert page == run / "report.html" and page.stat().st_size < 5_000_000
    text = page.read_text(encoding="utf-8")
    for said in PICTURES:
        assert f"<h3>{said}</h3>" in text
    assert "2 global views of 32 px and 3 local views of 16 px" in text
    assert "width 24, 2 blocks" in text and "as of step 1" in text and "1/sqrt(24)" not in text
    assert len(re.findall(r'alt="(?:global|local) view of', text)) == 6 * 5
    assert len(re.findall(r'alt="attention of head', text)) == 6 * 2
    assert text.count('alt="reconstruction of') == 6 and text.count('alt="patch features of') == 8
    assert text.count('alt="neighbour ') == 6 * 5 and "most similar of 23 images" in text
    assert text.count('alt="voter ') in range(0, 31, 5)
    after = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != "report.html"}
    assert after == {name: time for name, time in before.items() if name != "report.html"}, "nothing else is touched"


def test_page_is_the_same_again(run):
    first, second = (re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d \w+", "", report(run).read_text()) for _ in range(2))
    assert first == second


def test_images_that_moved_away_leave_a_sentence(run, images, tmp_path, capsys):
    copy = tmp_path / "OUT"
    shutil.copytree(run, copy)
    for name in ("config.yaml", "resolved.yaml"):
        (copy / name).write_text((copy / name).read_text().replace(str(images), "/nowhere/at all"))
    text = report(copy).read_text()
    assert "the images of /nowhere/at all cannot be opened any more" in text and "DINO loss" in text
    assert "cannot be opened any more" in capsys.readouterr().out
    assert not any(f"<h3>{said}</h3>" in text for said in PICTURES)


def test_weights_that_are_gone_leave_a_sentence(run, tmp_path):
    copy = tmp_path / "OUT"
    shutil.copytree(run, copy)
    (checkpoint_path(copy / "checkpoints", 1) / "model.safetensors").write_bytes(b"damaged")
    text = report(copy).read_text()
    assert "No pictures: the encoder cannot be opened" in text and "DINO loss" in text


def test_a_run_that_is_still_writing(run, tmp_path):
    copy = tmp_path / "OUT"
    shutil.copytree(run, copy)
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 1.')
    (copy / "results.json").write_text('[{"name": "knn/to')
    assert "not finished yet" in report(copy).read_text()


def test_without_decoder_or_local_views(tmp_path, images):
    run = make_run(tmp_path / "OUT", images, mae=None, crops={"num_local": 0})
    text = report(run).read_text()
    assert "2 global views of 32 px, with" in text and "<h3>Reconstructions</h3>" not in text
    assert "<h3>Attention of the class token</h3>" in text


def test_without_class_token(tmp_path, images):
    encoder = {**SIZES["encoder"], "class_token": False, "num_registers": 0}
    run = make_run(tmp_path / "OUT", images, encoder=encoder)
    text = report(run).read_text()
    assert "<h3>Attention</h3>" in text and "the mean over all patches" in text and "their mean patches" in text


def test_grey_images(tmp_path):
    root = tmp_path / "grey"
    root.mkdir()
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 36), dtype=np.uint8)).save(root / f"{i}.png")
    encoder = {**SIZES["encoder"], "in_chans": 1}
    config = load_config(
        PretrainConfig, None, {"data": str(root), "batch_size": 4, "steps": 6, **SIZES, "encoder": encoder}
    )
    resolved, reasons = resolve(config, DataFacts(6, 36, 1, "cpu"))
    preprocessing = Preprocessing(32, (0.5,), (0.25,))
    with RunFolder.open(tmp_path / "OUT", "pretrain", config) as folder:
        folder.write_resolved(resolved, reasons)
        meta = {"encoder": as_dict(resolved.encoder), "preprocessing": as_dict(preprocessing)}
        model = {"model": Pretraining(resolved, preprocessing).state_dict()}
        save_checkpoint(folder.path / "checkpoints", 1, model, meta, keep=1, background=False)
    text = report(tmp_path / "OUT").read_text()
    assert all(f"<h3>{said}</h3>" in text for said in PICTURES)


def test_an_evaluate_folder(tmp_path, run, images):
    out = tmp_path / "OUT"
    out.mkdir()
    (out / "env.json").write_text('{"verb": "evaluate", "sslvit": "0"}')
    (out / "config.yaml").write_text(json.dumps({"encoder": str(run), "val_dataset": str(images)}))
    (out / "results.json").write_text('[{"name": "knn/top1", "value": 0.5, "ci95": [0.4, 0.6], "data": "d"}]')
    text = report(str(out)).read_text()
    assert "k-NN 50.0% (40.0 to 60.0)." in text and "<h3>Nearest neighbours</h3>" in text
    assert "<h3>Crops as the model gets them</h3>" not in text


def test_questions_beside_their_images(tmp_path, run):
    spec = "scenes:?n=30&size=40&split=val"
    pairs = open_pairs(spec)
    asked = [(i, next(t for t in pairs.turns(i) if t.family != "caption")) for i in (3, 17)]
    rows = [
        {"image": pairs.name(i), "family": t.family, "question": t.question, "answer": t.answer, "prediction": said}
        for (i, t), said in zip(asked, ("nonsense", asked[1][1].answer), strict=True)
    ]
    out = tmp_path / "OUT"
    out.mkdir()
    (out / "env.json").write_text('{"verb": "align", "sslvit": "0"}')
    (out / "config.yaml").write_text(json.dumps({"encoder": str(run), "data": spec}))
    (out / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report(out).read_text()
    assert all(f'alt="image {row["image"]}"' in text for row in rows) and "nonsense" in text
    (out / "config.yaml").write_text(json.dumps({"encoder": str(run), "data": "/nowhere/pairs"}))
    assert "No images: /nowhere/pairs cannot be opened any more" in report(out).read_text()


def test_what_is_no_run_is_one_line(tmp_path):
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError) as error:
            report(place)
        assert "\n" not in str(error.value) and str(place) in str(error.value)
