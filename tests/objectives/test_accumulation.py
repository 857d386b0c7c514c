"""256 images at once and as 4 x 64 are the same step: gradients, targets, centre, and weights after ten steps."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sslvit import training
from sslvit.config import PretrainConfig
from sslvit.data.loader import Views
from sslvit.encoder.config import Preprocessing
from sslvit.errors import Resumable
from sslvit.metrics import MetricsLog
from sslvit.objectives.accumulation import sinkhorn_columns
from sslvit.objectives.config import DinoConfig, IbotConfig, KoleoConfig, MaeConfig
from sslvit.objectives.dino import Centering, sinkhorn
from sslvit.objectives.pretraining import Pretraining
from sslvit.objectives.recipe import DataFacts, resolve
from sslvit.optim import adamw, param_groups
from sslvit.signals import StopFlag
from sslvit.training import train

BATCH, STEPS, SIDE = 256, 10, 16
PLAIN = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])  # photometry that changes nothing

JOINT = {
    "dino": DinoConfig(),
    "ibot": IbotConfig(),
    "mae": MaeConfig(decoder_dim=16, decoder_depth=1, decoder_num_heads=2),
}
BALANCED = {"dino": DinoConfig(centering="sinkhorn"), "ibot": IbotConfig(centering="sinkhorn")}
SPREAD = {"dino": DinoConfig(), "koleo": KoleoConfig(weight=1.0)}
DINOV2 = {**BALANCED, "koleo": KoleoConfig()}


def make(sections: dict, drop_path: float = 0.0) -> Pretraining:
    config = PretrainConfig(data="x", steps=STEPS, batch_size=BATCH, **sections)
    encoder = config.encoder
    encoder.name, encoder.embed_dim, encoder.depth, encoder.num_heads = (
        "vit_tiny_patch16_224",
        24,
        1 + (drop_path > 0),
        2,
    )
    encoder.image_size, encoder.patch_size, encoder.drop_path_rate = SIDE, 4, drop_path
    # features far apart: between near ties, rounding would choose KoLeo's neighbour
    encoder.init_values, encoder.weight_init = 1.0, "xavier"
    config.crops.num_local, config.crops.local_size = 1, 8
    for section in (config.dino, config.ibot):
        if section is not None:
            section.num_prototypes, section.head_hidden_dim, section.head_bottleneck_dim = 32, 32, 16
    resolved, _ = resolve(config, DataFacts(1000, SIDE, 3, "cpu"))
    torch.manual_seed(0)
    return Pretraining(resolved, Preprocessing(SIDE)).train()


@functools.cache
def crops(number: int, side: int) -> Tensor:
    """(views, samples, 3, side, side) uint8: each sample a colour with noise."""
    generator = torch.Generator().manual_seed(side)
    colours = torch.randint(0, 200, (2 * BATCH, 3, 1, 1), generator=torch.Generator().manual_seed(0))
    noise = torch.randint(0, 56, (number, 2 * BATCH, 3, side, side), generator=generator)
    return (colours + noise).to(torch.uint8)


def views_of(first: int, count: int) -> Views:
    ids, part = torch.arange(first, first + count), slice(first, first + count)
    rows = PLAIN.expand(2, count, 8)
    return Views(crops(2, SIDE)[:, part], crops(1, 8)[:, part], rows, rows[:1], ids, ids * 0)


class Batches:
    def __init__(self, size: int) -> None:
        self.size, self.cursor = size, 0

    def seek(self, cursor: int) -> None:
        self.cursor = cursor

    def __iter__(self) -> Iterator[tuple[Views, int]]:
        while True:
            self.cursor += self.size
            yield views_of((self.cursor - self.size) % (2 * BATCH), self.size), self.cursor


def learn(folder: Path, module: Pretraining, accumulate: int, steps: int = STEPS, stop: StopFlag | None = None) -> None:
    train(
        module,
        Batches(BATCH // accumulate),
        optimizer=adamw(param_groups(module, 0.04), 1e-3),
        schedule=lambda step: {"lr": 5e-4 * step / STEPS, "weight_decay": 0.04},
        steps=steps,
        accumulate=accumulate,
        clip_norm=3.0,
        device=torch.device("cpu"),
        folder=folder,
        checkpoint_every=99,
        metrics=MetricsLog(folder),
        stop=stop or StopFlag(),
        prepare=module.prepare if module.needs_whole_batch else None,
    )


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetricsLog, "_open_board", lambda self, resumed: None)


def one_step(module: Pretraining, accumulate: int, step: int = 3, prepare: bool = True) -> dict[str, Tensor]:
    """Gradients of a step, its targets in the order of samples, and the centres after it."""
    size = BATCH // accumulate
    batches = [views_of(i * size, size) for i in range(accumulate)]
    targets: dict[str, list[Tensor]] = {}
    for name, objective in module.objectives.items():
        if hasattr(objective, "centering"):
            original = objective.centering.targets

            def kept(logits: Tensor, temperature: float, name=name, original=original) -> Tensor:
                made = original(logits, temperature)
                targets.setdefault(name, []).append(made)
                return made

            objective.centering.targets = kept
    if accumulate > 1 and prepare and module.needs_whole_batch:
        module.prepare(batches, step)
    for views in batches:
        loss, _ = module(views, step)
        (loss / accumulate).backward()
    found = {f"grad {name}": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.after_step(step)
    found |= {f"state {name}": value.clone() for name, value in module.state_dict().items() if "center" in name}
    if "dino" in targets:  # (views of a micro-batch, samples): view by view
        found["targets dino"] = torch.cat([t.unflatten(0, (2, size)) for t in targets["dino"]], dim=1)
    if "ibot" in targets:  # masked patches come view by view; as a set, by the sum of each prototype
        found["targets ibot"] = torch.cat(targets["ibot"]).sum(0) / BATCH
    return found


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each entry; of one whose values exceed 1, as a share of the largest."""
    assert a.keys() == b.keys() and a
    return {name: float((a[name] - b[name]).abs().max() / a[name].abs().max().clamp_min(1)) for name in a}


@pytest.mark.parametrize("sections", [JOINT, BALANCED, SPREAD, DINOV2], ids=["joint", "balanced", "spread", "dinov2"])
def test_a_step_of_four_parts_is_the_step_of_the_whole(sections: dict) -> None:
    apart = differences(one_step(make(sections), 1), one_step(make(sections), 4))
    assert max(apart.values()) < 1e-5, max(apart.items(), key=lambda item: item[1])
    assert any(name.startswith("grad student.") for name in apart) and "targets dino" in apart


@pytest.mark.parametrize("sections", [BALANCED, SPREAD], ids=["sinkhorn", "koleo"])
def test_without_looking_at_the_whole_batch_it_is_another_step(sections: dict) -> None:
    apart = differences(one_step(make(sections), 1), one_step(make(sections), 4, prepare=False))
    assert max(apart.values()) > 1e-4


@pytest.mark.parametrize("sections", [JOINT, DINOV2], ids=["joint", "dinov2"])
def test_after_ten_steps_the_weights_are_the_same(tmp_path: Path, sections: dict) -> None:
    whole, parts = make(sections), make(sections)
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    learn(tmp_path / "whole", whole, 1)
    learn(tmp_path / "parts", parts, 4)
    apart = differences(whole.state_dict(), parts.state_dict())
    assert max(apart.values()) < 1e-4, max(apart.items(), key=lambda item: item[1])
    assert max(differences(whole.state_dict(), start).values()) > 1e-3, "they have moved"


class PerMicroBatch(Pretraining):
    """The mistake of others: the teacher follows after every micro-batch."""

    def forward(self, views: Views, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        result = super().forward(views, step)
        if self._forwards % 4:
            self.after_step(step)
        self._forwards += 1
        return result

    _forwards = 1


def test_a_teacher_that_follows_every_micro_batch_is_noticed(tmp_path: Path) -> None:
    sections = {"dino": DinoConfig()}
    whole, parts = make(sections), make(sections)
    parts.__class__ = PerMicroBatch
    learn(tmp_path / "whole", whole, 1)
    learn(tmp_path / "parts", parts, 4)
    apart = differences(whole.state_dict(), parts.state_dict())
    assert max(apart.values()) > 2e-4


def test_the_cached_look_draws_the_same_paths() -> None:
    """With drop path the features KoLeo's gradient was taken in are those that carry it."""
    module = make(SPREAD, drop_path=0.3)
    batches = [views_of(i * 64, 64) for i in range(4)]
    seen: list[list[Tensor]] = []
    run = module._run

    def kept(passes, wanted, crops):
        tokens = run(passes, wanted, crops)
        seen.append([t.cls.detach() for p, t in tokens.items() if p.network == "student" and p.crop == "global"])
        return tokens

    module._run = kept  # type: ignore[method-assign]
    torch.manual_seed(7)
    module.prepare(batches, 0)
    value = module._prepared[0].koleo.value
    for views in batches:
        assert module(views, 0)[1]["koleo/loss"] == value
    first, second = seen[:4], seen[4:]
    for looked, learned in zip(first, second, strict=True):
        for a, b in zip(looked, learned, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert not torch.allclose(seen[0][0], one_look(module, batches[0]), atol=1e-3), "paths are dropped"


def one_look(module: Pretraining, views: Views) -> Tensor:
    torch.manual_seed(8)
    return next(iter(module._look(views, 0)[1].values())).cls


def test_the_cache_is_there_only_while_it_is_needed() -> None:
    assert not make(JOINT).needs_whole_batch
    assert make(SPREAD).needs_whole_batch and make(BALANCED).needs_whole_batch
    module = make(BALANCED)
    batches = [views_of(0, 64), views_of(64, 64)]
    module.prepare(batches, 0)
    student = [p for prepared in module._prepared for p in prepared.tokens if p.network == "student"]
    assert student == [] and all(prepared.koleo is None for prepared in module._prepared)
    module(batches[0], 1)  # the step it was made for was skipped
    assert not module._prepared and module.objectives["dino"].centering.columns is None


def test_columns_are_sinkhorns() -> None:
    logits = torch.rand(40, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    centering = Centering(12, "sinkhorn", 0.9)
    centering.columns = sinkhorn_columns(lambda: logits.split([7, 0, 33]), 0.05)
    torch.testing.assert_close(centering.targets(logits, 0.05), sinkhorn(logits, 0.05), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(sinkhorn(logits[:7], 0.05), sinkhorn(logits, 0.05)[:7], atol=1e-3)


def test_stopped_after_any_step_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = make(DINOV2, drop_path=0.3)
    learn(tmp_path / "whole", whole, 4, steps=3)
    for at in (0, 1):
        cut, stop = make(DINOV2, drop_path=0.3), StopFlag()
        after_step = cut.after_step

        def stopping(step: int, stop=stop, at=at, after_step=after_step) -> None:
            after_step(step)
            stop.received = "SIGTERM" if step == at else stop.received

        cut.after_step = stopping  # type: ignore[method-assign]
        with pytest.raises(Resumable):
            learn(tmp_path / f"{at}", cut, 4, steps=3, stop=stop)
        again = make(DINOV2, drop_path=0.3)
        learn(tmp_path / f"{at}", again, 4, steps=3)
        for name, value in whole.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), (at, name)


def test_a_bad_micro_batch_is_skipped_with_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a skipped step's preparation reaches the next one."""
    module, calls = make(DINOV2), []
    forward = module.forward

    def poisoned(views: Views, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = forward(views, step)
        calls.append(step)
        bad = step == 1 and calls.count(1) == 2
        return (loss * float("nan") if bad else loss), logs

    module.forward = poisoned  # type: ignore[method-assign]
    learn(tmp_path, module, 4, steps=3)
    assert calls == [0] * 4 + [1] * 4 + [2] * 4
    assert all(bool(torch.isfinite(value).all()) for value in module.state_dict().values())
    assert "step 2" in (tmp_path / "train.log").read_text() and training.BAD_STEPS == 3
