"""`sslvit pretrain` end to end on tiny runs: folders, resume after kill -9, shared passes, errors in one line."""

import copy
import dataclasses
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import sslvit
from sslvit.config import PretrainConfig, to_yaml
from sslvit.data.config import DINO_PHOTOMETRY
from sslvit.data.loader import Views
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.vit import forward_tokens
from sslvit.errors import InputError
from sslvit.objectives.config import DinoConfig, IbotConfig, KoleoConfig, MaeConfig
from sslvit.objectives.passes import Draw
from sslvit.objectives.pretraining import Pretraining
from sslvit.objectives.recipe import DataFacts, resolve

TINY = {
    "steps": 6,
    "batch_size": 8,
    "encoder": {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "depth": 2},
    "crops": {"num_local": 1, "local_size": 16},
    "dino": {"num_prototypes": 16, "head_hidden_dim": 16, "head_bottleneck_dim": 8},
    "mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    "checkpoint": {"every": 2, "keep": 20},
    "knn": {"every": 0},
    "precision": "fp32",
    "num_workers": 1,
}
DATA = "scenes:?n=32&size=32"


def digest(run: Path, step: int = 6) -> str:
    folder = run / "checkpoints" / f"step_{step:07d}"
    parts = [folder / name for name in ("model.safetensors", "optimizer.safetensors")]
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One uninterrupted run."""
    return sslvit.pretrain(data=DATA, output_dir=tmp_path_factory.mktemp("pretrain") / "run", **TINY)


def test_the_run_folder_holds_what_is_promised(run):
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "resolved.yaml", "command.txt", "env.json", "metrics.jsonl", "train.log"} <= names
    assert {"checkpoints", "encoder", "encoder_hf", "finished.json"} <= names
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6
    assert {"loss", "dino/loss", "mae/loss", "lr", "grad_norm", "images_per_s", "data_wait"} <= set(lines[-1])
    health = {"dino/target_entropy", "dino/usage_entropy", "dino/kl", "momentum", "skipped"}
    assert health | {"health/token_spread", "health/teacher_student_cosine"} <= set(lines[-1])
    shares = [lines[-1][f"dino/{name}"] for name in ("target_entropy", "kl")]
    assert sum(shares) * math.log(16) == pytest.approx(lines[-1]["dino/loss"], rel=1e-4), "entropy + KL is the loss"
    assert "Adam" not in (run / "resolved.yaml").read_text()


def test_the_exported_encoder_is_the_teacher(run):
    from safetensors.torch import load_file

    checkpoint = load_file(run / "checkpoints" / "step_0000006" / "model.safetensors")
    exported = load_file(run / "encoder" / "model.safetensors")
    assert torch.equal(exported["blocks.1.mlp.fc1.weight"], checkpoint["teacher.blocks.1.mlp.fc1.weight"])
    assert not torch.equal(exported["blocks.1.mlp.fc1.weight"], checkpoint["student.blocks.1.mlp.fc1.weight"])


def test_finished_returns_at_once_and_changes_are_refused(run):
    before = digest(run)
    began = time.monotonic()
    sslvit.pretrain(data=DATA, output_dir=run, **TINY)
    assert time.monotonic() - began < 10
    sslvit.pretrain(data=DATA, output_dir=run, **{**TINY, "num_workers": 0})
    assert digest(run) == before
    with pytest.raises(InputError, match="batch_size"):
        sslvit.pretrain(data=DATA, output_dir=run, **{**TINY, "batch_size": 4})


def test_what_was_auto_keeps_its_value(tmp_path):
    """A folder that grew, or another device, must not change the recipe of a run that goes on."""
    from sslvit.verbs.pretrain import _as_begun

    config = PretrainConfig(data="x", dino=DinoConfig())
    begun, _ = resolve(config, DataFacts(10_000, 64, 3, "cpu"))

    class Folder:
        record = path = tmp_path

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "resolved.yaml").write_text(to_yaml(begun))
    assert resolve(config, DataFacts(400_000, 224, 3, "cuda"))[0] != begun, "the facts alone would change it"
    again, _ = resolve(_as_begun(config, Folder), DataFacts(400_000, 224, 3, "cuda", compiles=True))
    assert again.compile, "what the device decides alone is decided anew"
    assert dataclasses.replace(again, compile=begun.compile) == begun


COMMAND = """
import sys, json, sslvit
sslvit.pretrain(data={data!r}, output_dir=sys.argv[1], **json.loads(sys.argv[2]))
"""


@pytest.mark.parametrize("kill_at_step", [2, 4])
def test_kill_9_and_the_same_command_end_with_the_same_bytes(run, tmp_path, kill_at_step):
    out = tmp_path / "killed"
    slow = TINY | {"num_workers": 0}
    words = [sys.executable, "-c", COMMAND.format(data=DATA), str(out), json.dumps(slow)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted = out / "checkpoints" / f"step_{kill_at_step:07d}"
    deadline = time.monotonic() + 120
    while not wanted.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert wanted.exists()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    assert digest(out) == digest(run)


def test_a_bare_folder_needs_no_configuration(tmp_path):
    """Nothing but data= (and few steps, so that the test is short)."""
    rng = np.random.default_rng(0)
    for index in range(12):
        place = tmp_path / "photos" / f"trip {index % 3}" / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(place)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    out = sslvit.pretrain(data=str(tmp_path / "photos"), output_dir=tmp_path / "run", steps=2, max_bad_rate=0.5)
    assert (out / "encoder" / "model.safetensors").exists()
    assert "broken.jpg" in (out / "bad_files.jsonl").read_text()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data": "/no/such/folder"}, "/no/such/folder"),
        ({"data": DATA, "dino": None, "mae": None}, "no objective"),
        ({"data": DATA, "encoder": {**TINY["encoder"], "image_size": 30}}, "30"),
        ({"data": DATA, "stepz": 3}, "steps"),
        ({}, "data"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, keys, words):
    with pytest.raises(InputError) as caught:
        sslvit.pretrain(output_dir=tmp_path / "run", **{**TINY, **keys})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- the module ----------------------------------------------------------------------------------------------------


def module_and_views(**sections):
    """Colours are DINO's whatever the objectives, so that their losses can be compared."""
    config = PretrainConfig(data="x", steps=10, batch_size=4, photometry=copy.deepcopy(DINO_PHOTOMETRY), **sections)
    config.encoder.name, config.encoder.depth = "vit_tiny_patch16_224", 2
    config.encoder.image_size, config.encoder.patch_size = 32, 8
    config.crops.num_global, config.crops.num_local, config.crops.local_size = 2, 2, 16
    for section in (config.dino, config.ibot):
        if section is not None:
            section.num_prototypes, section.head_hidden_dim, section.head_bottleneck_dim = 16, 16, 8
    resolved, _ = resolve(config, DataFacts(100, 32, 3, "cpu"))
    torch.manual_seed(0)
    module = Pretraining(resolved, Preprocessing(32)).train()
    generator = torch.Generator().manual_seed(1)

    def crops(count, side):
        return torch.randint(0, 256, (count, 4, 3, side, side), generator=generator, dtype=torch.uint8)

    rows = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    ids = torch.arange(4)
    views = Views(crops(2, 32), crops(2, 16), rows.expand(2, 4, 8), rows.expand(2, 4, 8), ids, ids * 0)
    return module, views


@pytest.mark.parametrize(
    "sections",
    [
        {"dino": DinoConfig()},
        {"mae": MaeConfig()},
        {"dino": DinoConfig(), "mae": MaeConfig()},
        {"dino": DinoConfig(student_visible_ratio=0.25, num_teacher_views=1), "mae": MaeConfig()},
        {"dino": DinoConfig(centering="sinkhorn"), "ibot": IbotConfig(mask_prob=1.0), "koleo": KoleoConfig()},
        {"dino": DinoConfig(), "ibot": IbotConfig(mask_prob=1.0, shared_head=True), "koleo": KoleoConfig()},
        {"dino": DinoConfig(), "ibot": IbotConfig(mask_prob=1.0), "koleo": KoleoConfig(), "mae": MaeConfig()},
    ],
)
def test_every_combination_steps_and_every_parameter_learns(sections):
    module, views = module_and_views(**sections)
    loss, logs = module(views, 5)
    assert torch.isfinite(loss)
    weights = {name: getattr(module.config, name).weight for name in sections}
    expected = sum(weight * logs[f"{name}/loss"] for name, weight in weights.items())
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    silent = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []
    assert all(p.grad is None for p in module.parameters() if not p.requires_grad)


def test_equal_passes_run_once(monkeypatch):
    """With DINO's student masked as MAE's, the student encodes each masked view once."""
    import sslvit.objectives.pretraining as pretraining

    module, views = module_and_views(dino=DinoConfig(student_visible_ratio=0.25, num_teacher_views=1), mae=MaeConfig())
    seen = []

    def counting(encoder, inputs, **options):
        seen.append((encoder is module.student, [tuple(item.images.shape) for item in inputs]))
        return original(encoder, inputs, **options)

    original = pretraining.forward_packed
    monkeypatch.setattr(pretraining, "forward_packed", counting)
    module(views, 0)
    assert seen == [(False, [(4, 3, 32, 32)]), (True, [(4, 3, 32, 32), (8, 3, 16, 16)])]


def test_the_joint_loss_is_the_sum_of_the_single_ones():
    """Sharing and packing change nothing: each objective alone, on the same weights, has the same loss."""
    sections = {"dino": DinoConfig(student_visible_ratio=1.0), "mae": MaeConfig()}
    joint, views = module_and_views(**sections)
    _, logs = joint(views, 3)
    for name, section in sections.items():
        alone, _ = module_and_views(**{name: section})
        alone.load_state_dict({k: v for k, v in joint.state_dict().items() if k in alone.state_dict()})
        _, single = alone(views, 3)
        torch.testing.assert_close(single[f"{name}/loss"], logs[f"{name}/loss"], atol=1e-5, rtol=0)


def test_the_teacher_is_the_closed_form_of_its_students():
    module, _ = module_and_views(dino=DinoConfig())
    name = "blocks.0.attn.qkv.weight"
    student = dict(module.student.named_parameters())[name]
    expected = student.detach().clone().double()
    for step in range(3):
        with torch.no_grad():
            student.add_(0.1 * (step + 1))
        module.after_step(step)
        momentum = module.momentum(step)
        expected = momentum * expected + (1 - momentum) * student.detach().double()
    teacher = dict(module.teacher.named_parameters())[name]
    torch.testing.assert_close(teacher.double(), expected, atol=1e-6, rtol=0)
    assert not module.teacher.training
    assert module.train().teacher.training is False


def test_the_teacher_sees_full_views(monkeypatch):
    """What DINO reads of the teacher is timm's own forward of the whole view."""
    module, views = module_and_views(dino=DinoConfig())
    images = module._colour(views)["global"][0]
    ours = forward_tokens(module.teacher, images).cls
    torch.testing.assert_close(ours, module.teacher.forward_features(images)[:, 0], atol=1e-5, rtol=0)


def test_a_skipped_steps_sums_are_dropped():
    module, views = module_and_views(dino=DinoConfig())
    module(views, 0)  # not applied: no after_step follows
    module(views, 1)
    module.after_step(1)
    again, _ = module_and_views(dino=DinoConfig())
    again(views, 1)
    again.after_step(1)
    torch.testing.assert_close(
        module.objectives["dino"].centering.center, again.objectives["dino"].centering.center, atol=1e-7, rtol=0
    )


ALL = {"dino": DinoConfig(), "ibot": IbotConfig(mask_prob=1.0), "koleo": KoleoConfig(), "mae": MaeConfig()}


@pytest.mark.parametrize("masks_go_along", [True, False])
def test_masks_are_where_the_crops_are(masks_go_along, monkeypatch):
    """Torch's fake tensors stand for a GPU: shapes and devices are checked, nothing is computed. iBOT needs values."""
    sections = {name: section for name, section in ALL.items() if name != "ibot"}
    module, views = module_and_views(**sections)
    monkeypatch.setattr(module, "_colour_crops", lambda crops, rows: crops.float())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # fake tensors have no memory to pin
    if not masks_go_along:
        monkeypatch.setattr("sslvit.objectives.pretraining.Draw", lambda seed, step, ids, device: Draw(seed, step, ids))
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.to("cuda")
        if masks_go_along:
            assert module(views.to("cuda"), 0)[0].device.type == "cuda"
        else:
            with pytest.raises(RuntimeError, match="device"):
                module(views.to("cuda"), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_computes_what_the_cpu_computes():
    results = []
    for device in ("cpu", "cuda"):
        module, views = module_and_views(**ALL)
        loss, _ = module.to(device)(views.to(device), 0)
        loss.backward()
        module.after_step(0)
        results.append([loss.detach(), module.student.norm.weight.grad, module.objectives["ibot"].centering.center])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-3, atol=1e-4)
