"""What is read in a step: one pass of each view for KoLeo and health, and block masks that are drawn once."""

from __future__ import annotations

import functools

import pytest
import torch

from sslvit.config import PretrainConfig
from sslvit.data.loader import Views
from sslvit.encoder.config import Preprocessing
from sslvit.objectives import ibot
from sslvit.objectives.config import DinoConfig, IbotConfig, KoleoConfig, MaeConfig
from sslvit.objectives.koleo import koleo_loss
from sslvit.objectives.passes import Draw
from sslvit.objectives.pretraining import Pretraining
from sslvit.objectives.recipe import DataFacts, resolve
from sslvit.objectives.token_health import token_health

BATCH, SIDE = 6, 16
HEAD = {"num_prototypes": 16, "head_hidden_dim": 16, "head_bottleneck_dim": 8}
PLAIN = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])  # photometry that changes nothing


def make(**sections: object) -> Pretraining:
    config = PretrainConfig(data="x", steps=10, batch_size=BATCH, precision="fp32", **sections)
    encoder = config.encoder
    encoder.name, encoder.embed_dim, encoder.depth, encoder.num_heads = "vit_tiny_patch16_224", 24, 1, 2
    encoder.image_size, encoder.patch_size, encoder.init_values, encoder.weight_init = SIDE, 4, 1.0, "xavier"
    config.crops.num_local = 0
    resolved, _ = resolve(config, DataFacts(1000, SIDE, 3, "cpu"))
    torch.manual_seed(0)
    return Pretraining(resolved, Preprocessing(SIDE)).train()


@functools.cache
def views(first: int = 0) -> Views:
    ids = torch.arange(first, first + BATCH)
    generator = torch.Generator().manual_seed(first)
    crops = torch.randint(0, 256, (2, BATCH, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    rows = PLAIN.expand(2, BATCH, 8)
    return Views(crops, crops[:0], rows, rows[:0], ids, ids * 0)


def seen(module: Pretraining, monkeypatch: pytest.MonkeyPatch) -> tuple[dict, dict]:
    """The tokens of a step by (network, view, masking), and what it logs."""
    run, kept = module._run, {}

    def keeping(*arguments):
        kept.update(run(*arguments))
        return kept

    monkeypatch.setattr(module, "_run", keeping)
    _, logs = module(views(), 0)
    return {(p.network, p.index, p.masking.name): tokens for p, tokens in kept.items()}, logs


DINO = functools.partial(DinoConfig, **HEAD)
MAE = MaeConfig(decoder_dim=16, decoder_depth=1, decoder_num_heads=2)


@pytest.mark.parametrize(
    ("sections", "read"),
    [
        ({"dino": DINO(student_visible_ratio=1.0, num_teacher_views=2), "mae": MAE}, [(0, "full"), (1, "full")]),
        ({"dino": DINO(student_visible_ratio=1.0, num_teacher_views=1), "mae": MAE}, [(1, "full")]),
        ({"dino": DINO(), "mae": MAE}, [(1, "visible:4")]),
        ({"ibot": IbotConfig(**HEAD), "mae": MAE}, [(0, "block"), (1, "block")]),
        ({"dino": DINO(), "ibot": IbotConfig(**HEAD), "mae": MAE}, [(0, "block"), (1, "block")]),
    ],
    ids=["dino", "one teacher view", "masked student", "ibot", "dino and ibot"],
)
def test_koleo_and_health_read_each_view_once_as_it_is_distilled(sections, read, monkeypatch):
    """docs/objectives.md: the mean over global views; MAE's pass is another reading of a view, not another view."""
    module = make(koleo=KoleoConfig(), **sections)
    tokens, logs = seen(module, monkeypatch)
    student = {view: tokens["student", view, masking].cls for view, masking in read}
    expected = torch.stack([koleo_loss(cls) for cls in student.values()]).mean()
    torch.testing.assert_close(logs["koleo/loss"], expected.detach())
    teacher = {view: t.cls for (network, view, _), t in tokens.items() if network == "teacher"}
    cosines = [
        torch.nn.functional.cosine_similarity(cls, teacher.get(view, teacher[0])).mean()
        for view, cls in student.items()
    ]
    torch.testing.assert_close(logs["health/teacher_student_cosine"], torch.stack(cosines).mean().detach())


def test_without_distillation_health_reads_what_mae_reads(monkeypatch):
    tokens, logs = seen(make(mae=MAE), monkeypatch)
    (only,) = tokens.values()
    unit = torch.nn.functional.normalize(only.cls.detach(), dim=-1)
    torch.testing.assert_close(logs["health/token_spread"], unit.std(0, correction=0).mean() * 24**0.5)
    assert "health/teacher_student_cosine" not in logs and token_health({}) == {}


BALANCED = {"dino": DINO(centering="sinkhorn"), "ibot": IbotConfig(**HEAD, centering="sinkhorn")}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_block_masks_are_drawn_once_in_a_step_and_view(accumulate, monkeypatch):
    """DINO's student reads iBOT's masks, and the look at a whole batch is followed by learning from the same."""
    drawn, block_mask = [], ibot.block_mask
    monkeypatch.setattr(ibot, "block_mask", lambda *arguments: drawn.append(1) or block_mask(*arguments))
    module = make(koleo=KoleoConfig(), **BALANCED)
    batches = [views(BATCH * i) for i in range(accumulate)]
    for step in range(2):
        if accumulate > 1:
            module.prepare(batches, step)
        for batch in batches:
            module(batch, step)
        assert len(drawn) == (step + 1) * accumulate * 2 * BATCH


def test_masks_are_those_of_their_step_sample_and_view():
    """However they are kept, they are what a draw of its own gives."""
    module = make(koleo=KoleoConfig(), **BALANCED)
    batches, steps = [views(0), views(BATCH)], (0, 1)
    masking = module.objectives["ibot"].masking
    for step in steps:
        module.prepare(batches, step)
        for prepared, batch in zip(list(module._prepared), batches, strict=True):
            for name in ("dino", "ibot"):
                for p in [p for p in prepared.wanted[name] if p.network == "student"]:
                    alone = masking(Draw(module.config.seed, step, batch.sample_ids), p.index, 16).mask
                    assert torch.equal(p.masking.mask, alone)
