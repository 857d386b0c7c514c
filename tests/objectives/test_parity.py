"""Parity with the published methods: each restated as plain Python loops, on small fixed vectors.

Every number that stands here was computed by the loops beside it; both the loops and the library must give it, so that
neither can drift. No torch inside the loops.
"""

import math
import random

import numpy as np
import pytest
import torch

from sslvit.config import OptimConfig, PretrainConfig
from sslvit.encoder.vit import Tokens
from sslvit.objectives.config import DinoConfig, IbotConfig, KoleoConfig, MaeConfig
from sslvit.objectives.dino import Centering, Dino, cross_entropy, sinkhorn, warmed_up
from sslvit.objectives.ibot import Ibot, block_mask
from sslvit.objectives.koleo import Koleo, koleo_loss
from sslvit.objectives.mae import Mae
from sslvit.objectives.passes import Draw, Masking, Pass
from sslvit.verbs.pretrain import Schedule

TEACHER = [[0.9, -0.2, 0.1], [0.3, 0.4, -0.5], [-0.6, 0.2, 0.7], [0.1, 0.8, 0.05]]  # 4 samples, 3 prototypes
STUDENT = [[0.5, 0.1, -0.3], [0.2, 0.6, -0.1], [-0.4, 0.3, 0.9], [0.0, 0.7, 0.2]]
CENTER = [0.05, -0.1, 0.2]


def softmax(values):
    largest = max(values)
    weights = [math.exp(v - largest) for v in values]
    return [w / sum(weights) for w in weights]


def close(ours, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(ours, dtype=np.float64), expected, atol=tolerance, rtol=0)


# ---- DINO (arXiv:2104.14294, algorithm 1) ---------------------------------------------------------------------------


def targets_as_loops(logits, center, temperature):
    return [softmax([(value - c) / temperature for value, c in zip(row, center, strict=True)]) for row in logits]


def test_teacher_targets():
    expected = [
        [0.999997, 0.000001, 0.000001],
        [0.027347, 0.972653, 0.000000],
        [0.000000, 0.054313, 0.945687],
        [0.000005, 0.999994, 0.000000],
    ]
    loops = targets_as_loops(TEACHER, CENTER, 0.07)
    close(loops, expected, 1e-6)
    centering = Centering(3, "softmax", 0.9)
    centering.center.copy_(torch.tensor(CENTER))
    close(centering.targets(torch.tensor(TEACHER), 0.07), loops)


def test_loss_of_a_pair():
    total = 0.0
    for target, logits in zip(targets_as_loops(TEACHER, CENTER, 0.07), STUDENT, strict=True):
        probabilities = softmax([value / 0.1 for value in logits])
        total -= sum(t * math.log(p) for t, p in zip(target, probabilities, strict=True)) / len(STUDENT)
    assert total == pytest.approx(0.120736, abs=1e-6)
    targets = torch.tensor(targets_as_loops(TEACHER, CENTER, 0.07))
    ours = cross_entropy([targets], [torch.tensor(STUDENT)], [(0,)], 0.1)
    assert ours.item() == pytest.approx(total, abs=1e-5)


def test_centre_after_five_steps():
    """Equation 4: each step a batch of its own, the teacher's logits shrunk by the step's number."""
    center, centering = list(CENTER), Centering(3, "softmax", 0.9)
    centering.center.copy_(torch.tensor(CENTER))
    for step in range(5):
        batch = [[value / (step + 1) for value in row] for row in TEACHER]
        mean = [sum(row[k] for row in batch) / len(batch) for k in range(3)]
        center = [0.9 * c + 0.1 * m for c, m in zip(center, mean, strict=True)]
        centering.targets(torch.tensor(batch[:3]), 0.04)  # in two micro-batches of unequal size
        centering.targets(torch.tensor(batch[3:]), 0.04)
        centering.after_step()
    close(center, [0.059548, -0.007581, 0.133110], 1e-6)
    close(centering.center, center)


# ---- Sinkhorn-Knopp (arXiv:2006.09882, algorithm 1; three iterations) ------------------------------------------------


def sinkhorn_as_loops(logits, temperature, num_iterations):
    scores = [[math.exp(value / temperature) for value in row] for row in logits]
    rows, columns = len(scores), len(scores[0])
    for _ in range(num_iterations):
        for k in range(columns):
            used = sum(scores[b][k] for b in range(rows))
            for b in range(rows):
                scores[b][k] /= used * columns
        for b in range(rows):
            used = sum(scores[b])
            for k in range(columns):
                scores[b][k] /= used * rows
    return [[value * rows for value in row] for row in scores]


def test_sinkhorn():
    expected = [
        [0.846774, 0.019849, 0.133377],
        [0.410288, 0.525086, 0.064626],
        [0.005350, 0.070601, 0.924049],
        [0.080806, 0.764137, 0.155057],
    ]
    loops = sinkhorn_as_loops(TEACHER, 0.3, 3)
    close(loops, expected, 1e-6)
    ours = sinkhorn(torch.tensor(TEACHER), 0.3)
    close(ours, loops)
    close(ours.sum(1), [1.0] * 4)
    close(ours.sum(0), [sum(row[k] for row in loops) for k in range(3)])
    close(sinkhorn(torch.tensor(TEACHER), 0.3, 100).sum(0), [4 / 3] * 3)


# ---- KoLeo (arXiv:1806.03198, equation 4; DINOv2) --------------------------------------------------------------------


def koleo_as_loops(features):
    unit = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in features]
    total = 0.0
    for i, one in enumerate(unit):
        distances = [math.dist(one, other) for j, other in enumerate(unit) if j != i]
        total -= math.log(min(distances)) / len(unit)
    return total


def test_koleo():
    assert koleo_as_loops(TEACHER) == pytest.approx(-0.081772, abs=1e-6)
    assert koleo_loss(torch.tensor(TEACHER)).item() == pytest.approx(koleo_as_loops(TEACHER), abs=1e-5)


def test_koleo_finds_close_neighbours_under_autocast_too():
    """Directions 1e-3 apart: in bf16 their cosines are all 1, and half-precision features would have no distance."""
    angles = torch.cumsum(torch.linspace(1e-3, 2e-3, 12), 0)
    features = torch.stack([angles.cos(), angles.sin(), torch.ones_like(angles)], dim=1)
    assert len(set((features @ features.T).bfloat16().flatten().tolist())) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert koleo_loss(features).item() == pytest.approx(koleo_as_loops(features.tolist()), rel=1e-3)
    halves = torch.tensor(TEACHER).bfloat16()
    assert koleo_loss(halves).item() == pytest.approx(koleo_as_loops(halves.tolist()), abs=1e-5)


def test_koleo_is_the_mean_over_views_that_never_meet():
    views = {Pass("student", "global", i): as_tokens(rows) for i, rows in enumerate((TEACHER, STUDENT))}
    views[Pass("teacher", "global", 0)] = as_tokens(STUDENT)
    views[Pass("student", "local", 0)] = as_tokens(STUDENT)
    loss, _ = Koleo(KoleoConfig()).loss(views, torch.zeros(()), 0)
    expected = (koleo_as_loops(TEACHER) + koleo_as_loops(STUDENT)) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def as_tokens(rows):
    cls = torch.tensor(rows)[:, None]
    return Tokens(cls, torch.zeros(len(rows), 1, cls.shape[-1]), has_class_token=True, normed=True)


# ---- iBOT (arXiv:2111.07832, equation 2) -----------------------------------------------------------------------------


class Identity(torch.nn.Module):
    """A head that leaves tokens as they are, so that they are logits."""

    def forward(self, tokens):
        return tokens


def ibot_as_loops(student, teacher, masks, center, temperature):
    """Views x images x patches x prototypes; an image's masked patches are averaged first, one without counts 0."""
    total, images = 0.0, 0
    for view_student, view_teacher, view_masks in zip(student, teacher, masks, strict=True):
        for patches, targets, mask in zip(view_student, view_teacher, view_masks, strict=True):
            images += 1
            losses = []
            for patch, target, masked in zip(patches, targets, mask, strict=True):
                if masked:
                    probabilities = softmax([value / 0.1 for value in patch])
                    (goal,) = targets_as_loops([target], center, temperature)
                    losses.append(-sum(g * math.log(p) for g, p in zip(goal, probabilities, strict=True)))
            total += sum(losses) / max(1, len(losses))
    return total / images


def test_ibot_loss():
    grid, center = (1, 4), [0.05, -0.1, 0.2]
    student = [[STUDENT, TEACHER], [TEACHER, STUDENT]]
    teacher = [[TEACHER, STUDENT], [STUDENT, TEACHER]]
    masks = [[[1, 0, 1, 1], [0, 0, 0, 0]], [[0, 1, 0, 0], [1, 1, 0, 0]]]
    config = IbotConfig(
        center_momentum=0.9,
        num_prototypes=3,
        head_hidden_dim=4,
        head_bottleneck_dim=4,
        teacher_temperature=0.07,
        teacher_temperature_start=0.07,
    )
    ibot = Ibot(config, 3, grid, steps=10, num_global=2)
    ibot.student_head, ibot.teacher_head = Identity(), Identity()
    ibot.centering.center.copy_(torch.tensor(center))
    tokens = {}
    for view in range(2):
        masking = Masking.replacing("block", torch.tensor(masks[view], dtype=torch.bool))
        for network, rows, how in (("teacher", teacher, Masking("full")), ("student", student, masking)):
            patches = torch.tensor(rows[view])
            tokens[Pass(network, "global", view, how)] = Tokens(patches[:, :1], patches, True, True)
    loss, _ = ibot.loss(tokens, torch.zeros(()), 5)
    expected = ibot_as_loops(student, teacher, masks, center, 0.07)
    assert expected == pytest.approx(0.126345, abs=1e-6)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    ibot.after_step(5)
    seen = [
        row for view in range(2) for b in range(2) for row, m in zip(teacher[view][b], masks[view][b], strict=True) if m
    ]
    close(ibot.centering.center, [0.9 * c + 0.1 * sum(r[k] for r in seen) / len(seen) for k, c in enumerate(center)])


# ---- block masks (BEiT, arXiv:2106.08254, algorithm 1; 4 patches at least, as DINOv2) --------------------------------


def blocks_as_loops(rng, rows, columns, wanted):
    """The set of masked (row, column). It may hold fewer than wanted."""
    masked = set()
    while len(masked) < wanted:
        grown = False
        for _ in range(10):
            area = rng.uniform(4, wanted - len(masked))
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
            new = {(r, c) for r in range(top, top + height) for c in range(left, left + width)} - masked
            if 0 < len(new) <= wanted - len(masked):
                masked, grown = masked | new, True
                break
        if not grown:
            break
    return masked


def touching(masked):
    """Mean share of a masked patch's four neighbours that are masked."""
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
    return sum((r + dr, c + dc) in masked for r, c in masked for dr, dc in steps) / (4 * len(masked))


@pytest.mark.parametrize("wanted", [20, 58, 98])
def test_block_masks_have_the_published_statistics(wanted):
    rng, generator = random.Random(0), np.random.default_rng(0)
    published, ours, how_often = [], [], np.zeros((2, 14, 14))
    for _ in range(800):
        published.append(blocks_as_loops(rng, 14, 14, wanted))
        mask = block_mask(generator, (14, 14), wanted)
        ours.append({(int(r), int(c)) for r, c in np.argwhere(mask)})
        how_often[1] += mask
        for place in published[-1]:
            how_often[0][place] += 1
    assert {len(mask) for mask in ours} == {wanted}
    assert np.mean([len(mask) for mask in published]) > 0.97 * wanted  # what is left to fill at random is little
    ragged = [np.mean([touching(mask) for mask in masks]) for masks in (published, ours)]
    assert ragged[0] == pytest.approx(ragged[1], abs=0.02)
    middle = [grid[4:10, 4:10].sum() / grid.sum() for grid in how_often]  # blocks prefer it: 36 of 196 would be .18
    assert middle[0] == pytest.approx(middle[1], abs=0.04)


# ---- MAE (arXiv:2111.06377, section 3) -------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm_pixels", "number"), [(True, 1.679067), (False, 0.743125)])
def test_mae_loss_under_a_given_mask(norm_pixels, number):
    """One image of 4 x 4 pixels in four patches; two are removed; the decoder predicts what is written here."""
    image = [[0.1, 0.5, -0.3, 0.2], [0.4, -0.1, 0.6, 0.0], [0.9, 0.8, -0.7, 0.3], [0.2, -0.2, 0.1, 0.5]]
    removed, predicted = [3, 0], [[0.5, -0.5, 1.0, -1.0], [0.0, 0.25, 0.5, 0.75]]
    total = 0.0
    for patch, guess in zip(removed, predicted, strict=True):
        top, left = 2 * (patch // 2), 2 * (patch % 2)
        pixels = [image[top + r][left + c] for r in range(2) for c in range(2)]
        if norm_pixels:
            mean = sum(pixels) / 4
            variance = sum((p - mean) ** 2 for p in pixels) / 3
            pixels = [(p - mean) / math.sqrt(variance + 1e-6) for p in pixels]
        total += sum((g - p) ** 2 for g, p in zip(guess, pixels, strict=True)) / 4 / len(removed)
    assert total == pytest.approx(number, abs=1e-6)
    config = MaeConfig(decoder_dim=8, decoder_depth=1, decoder_num_heads=1, norm_pixels=norm_pixels)
    mae = Mae(config, embed_dim=8, patch_size=2, grid=(2, 2), channels=1, num_global=1)
    mae.decode = lambda tokens, keep, gone: torch.tensor([predicted])
    masking = Masking("given", keep=torch.tensor([[1, 2]]), removed=torch.tensor([removed]))
    tokens = {Pass("student", "global", 0, masking): Tokens(torch.zeros(1, 1, 8), torch.zeros(1, 2, 8), True, True)}
    loss, _ = mae.loss(tokens, torch.tensor(image)[None, None, None], 0)
    assert loss.item() == pytest.approx(total, abs=1e-5)


# ---- masked student (MSN, arXiv:2204.07141) and MAE read one pass ----------------------------------------------------


def test_dino_and_mae_ask_for_the_very_same_pass():
    heads = {"num_prototypes": 4, "head_hidden_dim": 4, "head_bottleneck_dim": 4}
    temperatures = {"teacher_temperature": 0.04, "teacher_temperature_start": 0.04, "center_momentum": 0.9}
    for ratio in (0.5, 0.6, 0.7, 0.75, 0.9):
        config = DinoConfig(**heads, **temperatures, num_teacher_views=1, student_visible_ratio=round(1 - ratio, 6))
        dino = Dino(config, 8, steps=10, num_global=2, num_local=0)
        decoder = {"decoder_dim": 8, "decoder_depth": 1, "decoder_num_heads": 1}
        mae = Mae(MaeConfig(mask_ratio=ratio, **decoder), 8, 4, (8, 8), 3, num_global=2)
        draw = Draw(0, 3, torch.arange(5))
        (shared,) = [p for p in dino.passes(draw, 64) if p.network == "student"]
        assert mae.passes(draw, 64) == [shared]
        assert torch.equal(mae.passes(draw, 64)[0].masking.keep, shared.masking.keep)


# ---- schedules, at every step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "per_epoch"), [(100, 5), (30, 17)])
def test_schedules_of_a_run_are_dinos_at_every_step(epochs, per_epoch):
    steps, warm = epochs * per_epoch, epochs // 10 * per_epoch
    config = PretrainConfig(steps=steps, optim=OptimConfig(lr=1e-3, weight_decay_end=0.4))
    for step in range(steps):
        if step < warm:
            rate = 1e-3 * step / (warm - 1)
        else:
            rate = 1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        decay = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * step / steps))
        values = Schedule(config)(step)
        assert values["lr"] == pytest.approx(rate, rel=1e-9)
        assert values["weight_decay"] == pytest.approx(decay, rel=1e-9)
        hot = round(0.3 * steps)
        temperature = 0.04 + 0.03 * step / (hot - 1) if step < hot else 0.07
        assert warmed_up(step, steps, 0.04, 0.07, 0.3) == pytest.approx(temperature, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.9, 1.0])
def test_no_warm_up_is_longer_than_the_run(steps, share):
    optim = OptimConfig(lr=1e-3, warmup=share)
    rates = [Schedule(PretrainConfig(steps=steps, optim=optim))(step)["lr"] for step in range(steps)]
    assert max(rates) == pytest.approx(1e-3)
    assert warmed_up(steps, steps, 0.04, 0.07, share) == 0.07
    assert all(0.04 <= warmed_up(step, steps, 0.04, 0.07, share) <= 0.07 for step in range(steps))


def test_koleo_looks_for_neighbours_on_all_ranks(monkeypatch):
    """Two ranks with half of the batch each: their mean is the loss of the whole batch."""
    whole = torch.tensor([*TEACHER, *STUDENT])
    unit = torch.nn.functional.normalize(whole, dim=-1)
    monkeypatch.setattr("sslvit.distributed.world_size", lambda: 2)
    monkeypatch.setattr("sslvit.distributed.all_gather_cat", lambda mine: unit)
    losses = []
    for rank in range(2):
        monkeypatch.setattr("sslvit.distributed.rank", lambda rank=rank: rank)
        losses.append(koleo_loss(whole[4 * rank : 4 * rank + 4]).item())
    assert sum(losses) / 2 == pytest.approx(koleo_as_loops(whole.tolist()), abs=1e-5)
    assert sum(losses) / 2 > (koleo_as_loops(TEACHER) + koleo_as_loops(STUDENT)) / 2 + 0.1  # not rank by rank
