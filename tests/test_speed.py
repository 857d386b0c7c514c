"""The largest gains are still there: two variants take turns in one process, gated by a matrix product. Ratios only."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.nn.functional import scaled_dot_product_attention

from sslvit.distributed import native_bf16
from sslvit.encoder.attention import attend
from sslvit.encoder.vit import forward_tokens
from sslvit.optim import adamw, ema_

pytestmark = pytest.mark.slow
needs_bf16 = pytest.mark.skipif(not native_bf16("cpu"), reason="this CPU only emulates bf16")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    names = ("rounds", "data", "probe_peers", "knn_million", "step_peers", "plain_steps")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def times_faster(bench, slow, fast, seconds=20.0):
    """The better of the two ratios: noise can only hide a gain."""
    rounds = bench("rounds")
    found = rounds.measure({"slow": slow, "fast": fast}, seconds=seconds, wanted=15)
    return max(rounds.ratio(found["slow"], found["fast"]))


def weights(count=150, size=300):
    made = [torch.nn.Parameter(torch.randn(size, size)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def test_the_fused_optimizer(bench):
    named = [(str(i), parameter) for i, parameter in enumerate(weights())]
    fused = adamw([{"params": named, "lr_scale": 1.0, "wd_scale": 1.0}], lr=1e-3)
    plain = torch.optim.AdamW([{"params": weights()}], lr=1e-3)
    assert times_faster(bench, plain.step, fused.step) > 1.3


def test_the_moving_average(bench):
    teacher, student = weights(), weights()

    @torch.no_grad()
    def loop():
        for old, new in zip(teacher, student, strict=True):
            old.mul_(0.99).add_(0.01 * new)

    assert times_faster(bench, loop, lambda: ema_(teacher, student, 0.99)) > 1.1


@needs_bf16
def test_attention_written_out(bench):
    q, k, v = (torch.randn(16, 6, 197, 64).bfloat16().requires_grad_() for _ in range(3))
    fused = lambda: scaled_dot_product_attention(q, k, v).sum().backward()  # noqa: E731
    assert times_faster(bench, fused, lambda: attend(q, k, v).sum().backward()) > 1.2


def test_the_last_block_for_the_class_token_alone(bench):
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, depth=1).eval()
    images = torch.randn(8, 3, 224, 224)
    whole = torch.no_grad()(lambda: forward_tokens(encoder, images))
    alone = torch.no_grad()(lambda: forward_tokens(encoder, images, cls_only=True))
    assert times_faster(bench, whole, alone) > 1.3


@needs_bf16
def test_the_whole_step_beside_the_published_one(bench):
    peers = bench("step_peers")
    work = peers.StepWork(("dino",), "vit_tiny_patch16_224", 8, 64, 8, num_local=4, local=32, depth=4)
    built = peers.build(work)
    official, ours = built.steps["official"], built.steps["ours"]
    assert times_faster(bench, lambda: official(built.batch, False), lambda: ours(built.batch, True), 40) > 1.3


def test_geometry_beside_the_published_pipeline(bench):
    data = bench("data")
    made = data.variants(data.Jpegs(8), data.JPEG_CROPS, 224, 4)
    assert times_faster(bench, made["dino_pillow"], made["geometry"]) > 4


def test_heads_at_once(bench):
    made = bench("probe_peers").LinearHeads(images=2000, steps=10)
    assert times_faster(bench, made.one_by_one, made.together) > 2.5


def test_an_index_of_a_large_folder_reopens_in_no_time(bench, tmp_path, monkeypatch):
    from sslvit.data import folder

    names = np.char.add("f", np.arange(30_000).astype(str))
    for i in range(30):
        (tmp_path / f"{i:02d}").mkdir()
        for name in names[1000 * i : 1000 * (i + 1)]:
            (tmp_path / f"{i:02d}" / f"{name}.jpg").touch()
    monkeypatch.setattr(folder.time, "time_ns", lambda: 2**62)  # nothing looks recent
    scanned = lambda: folder._scan(bytes(tmp_path))  # noqa: E731
    folder.FolderSource(str(tmp_path))
    assert times_faster(bench, scanned, lambda: folder.FolderSource(str(tmp_path)), 5) > 5
