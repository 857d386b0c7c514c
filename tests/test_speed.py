"""The largest gains are still there: two variants take turns in one process, gated by a matrix product. Ratios only.

On one thread, timed by the processor's clock: that others work beside it changes little. Limits lie well below what
the gains are, for the works are small and the machine is not ours alone.
"""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.nn.functional import scaled_dot_product_attention

from sslvit import memory
from sslvit.distributed import native_bf16
from sslvit.encoder.attention import attend
from sslvit.encoder.vit import forward_tokens
from sslvit.optim import adamw, ema_

pytestmark = pytest.mark.slow
needs_bf16 = pytest.mark.skipif(not native_bf16("cpu"), reason="this CPU only emulates bf16")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    names = ("rounds", "data", "probe_peers", "knn_million", "stored", "step_peers", "plain_steps")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in names:
        sys.modules.pop(name, None)


def times_faster(bench, slow, fast, seconds=20.0, wanted=15, clock=None, before=None):
    """The better of the two ratios: noise can only hide a gain."""
    rounds = bench("rounds")
    clock = clock or rounds.own_clock()
    variants, probe = {"slow": slow, "fast": fast}, rounds.Probe(512, rounds.own_clock())
    found = rounds.measure(variants, seconds=seconds, wanted=wanted, probe=probe, clock=clock, before=before)
    ratios = rounds.ratio(found["slow"], found["fast"])
    print(ratios, *(timing.words() for timing in found.values()), sep="; ")  # seen when a limit is missed
    return max(ratios)


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


def test_mae_encodes_visible_patches_alone(bench):
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, depth=2)
    images = torch.randn(8, 3, 224, 224)
    keep = torch.rand(8, 196).argsort(1)[:, :49]

    def every():
        forward_tokens(encoder, images).patches.gather(1, keep[..., None].expand(-1, -1, 192)).sum().backward()

    assert times_faster(bench, every, lambda: forward_tokens(encoder, images, keep=keep).patches.sum().backward()) > 2.5


@needs_bf16
def test_the_whole_step_beside_the_published_one(bench):
    peers = bench("step_peers")
    work = peers.StepWork(("dino",), "vit_tiny_patch16_224", 8, 64, 8, num_local=4, local=32, depth=4)
    built = peers.build(work)
    official, ours = built.steps["official"], built.steps["ours"]
    assert times_faster(bench, lambda: official(built.batch, False), lambda: ours(built.batch, True), 40) > 2


def test_one_masked_pass_for_both_beside_dino_and_mae(bench):
    """The joint step of a small budget, in the sizes of its two halves alone."""
    peers = bench("step_peers")
    work = peers.StepWork(("dino", "mae"), "vit_tiny_patch16_224", 8, 64, 8, prototypes=1024, hidden=512, depth=4)

    def step(objectives, **changes):
        alone = dataclasses.replace(work, objectives=objectives)
        config = peers.our_config(alone)
        config.dino = config.dino and dataclasses.replace(config.dino, **changes)
        peers.our_config = lambda work: config
        return peers.OurStep(peers.our_module(alone), alone).step

    ways = [step(("dino",)), step(("mae",))]
    joint = step(("dino", "mae"), num_teacher_views=1, student_visible_ratio=0.25)
    batch = peers.make_batch(work)
    assert times_faster(bench, lambda: [way(batch) for way in ways], lambda: joint(batch)) > 3


@pytest.mark.parametrize(("views", "limit"), [("geometry", 4), ("full", 2.5)])
def test_views_beside_the_published_pipeline(bench, views, limit):
    data = bench("data")
    made = data.variants(data.Jpegs(8), data.JPEG_CROPS, 224, 4)
    assert times_faster(bench, made["dino_pillow"], made[views]) > limit


def test_heads_at_once(bench):
    """Of ten classes: with a hundred, a single thread is busy with the same products either way."""
    made = bench("probe_peers").LinearHeads(images=2000, steps=10, classes=10)
    assert times_faster(bench, made.one_by_one, made.together) > 2.5


def test_neighbours_beside_the_published_loop(bench):
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        ways = bench("probe_peers").knn_ways(20_000, 1000)
        assert times_faster(bench, ways["official"], ways["ours"]) > 1.4
    finally:
        faiss.omp_set_num_threads(threads)


def test_help_beside_importing_torch(bench):
    def run(*words):
        subprocess.run([sys.executable, *words], check=True, capture_output=True)

    clock = bench("rounds").children_clock
    torch_alone, ours = ("-c", "import torch"), ("-m", "sslvit", "--help")
    assert times_faster(bench, lambda: run(*torch_alone), lambda: run(*ours), 20, 5, clock) > 8


KEPT = """
import contextlib, torch
from rounds import Probe, measure, own_clock, ratio
from sslvit import memory

torch.set_num_threads(1)
x, held = torch.randn(5000, 2000), contextlib.ExitStack()

def work():
    for _ in range(5):
        x.add(1).mul_(2)

def settle(variant):
    held.enter_context(memory.kept()) if variant == "fast" else held.close()
    work()

clock = own_clock()
probe, variants = Probe(512, clock), {"slow": work, "fast": work}
found = measure(variants, seconds=20, wanted=15, probe=probe, clock=clock, before=settle)
print(max(ratio(found["slow"], found["fast"])))
"""


@pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc")
def test_freed_memory_that_is_kept(bench):
    """In a process of its own: where large blocks lie about, glibc has nothing to give back."""
    place = str(Path(__file__).parents[1] / "benchmarks")
    child = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {place!r}){KEPT}"], capture_output=True
    )
    assert float(child.stdout) > 1.5, child.stderr


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
