"""DINO against the paper's double loop, SwAV's Sinkhorn loop, and closed forms."""

import math

import numpy as np
import pytest
import torch

from sslvit.encoder.vit import Tokens
from sslvit.objectives.config import DinoConfig
from sslvit.objectives.dino import Centering, Dino, DinoHead, cross_entropy, sinkhorn, warmed_up
from sslvit.objectives.passes import Draw, Pass

WIDTH, PROTOTYPES, BATCH = 16, 32, 5


def make(num_global=2, num_local=3, **settings):
    torch.manual_seed(0)
    config = DinoConfig(
        num_prototypes=PROTOTYPES,
        head_hidden_dim=24,
        head_bottleneck_dim=8,
        teacher_temperature=0.07,
        teacher_temperature_start=0.04,
        center_momentum=0.9,
        **{"num_teacher_views": 2, "student_visible_ratio": 1.0, **settings},
    )
    return Dino(config, WIDTH, steps=100, num_global=num_global, num_local=num_local)


def fake_tokens(passes):
    generator = torch.Generator().manual_seed(1)
    made = {}
    for p in passes:
        values = torch.randn(BATCH, 1, WIDTH, generator=generator)
        made[p] = Tokens(prefix=values, patches=torch.zeros(BATCH, 4, WIDTH), has_class_token=True, normed=True)
    return made


def head_as_loops(head: DinoHead, features: np.ndarray) -> np.ndarray:
    """The head of DINO's appendix C on one vector, in plain numpy."""
    x = features.astype(np.float64)
    layers = [m for m in head.mlp if isinstance(m, torch.nn.Linear)]
    for number, layer in enumerate(layers):
        x = layer.weight.detach().double().numpy() @ x + layer.bias.detach().double().numpy()
        if number < 2:
            x = np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    x = x / np.linalg.norm(x)
    prototypes = head.prototypes.detach().double().numpy()
    return np.array([w @ x / np.linalg.norm(w) for w in prototypes])


def loss_as_loops(dino: Dino, tokens: dict, center: np.ndarray, temperature: float) -> float:
    """Algorithm 1 of the paper, one image and one pair of views at a time."""
    total, pairs = 0.0, 0
    teacher = [p for p in tokens if p.network == "teacher"]
    student = [p for p in tokens if p.network == "student"]
    for t in teacher:
        for s in student:
            if s.crop == "global" and s.index == t.index:
                continue
            pairs += 1
            for image in range(BATCH):
                z = head_as_loops(dino.teacher_head, tokens[t].cls[image].numpy())
                target = np.exp((z - center) / temperature)
                target /= target.sum()
                y = head_as_loops(dino.student_head, tokens[s].cls[image].numpy()) / 0.1
                log_probability = y - np.log(np.exp(y).sum())
                total -= float((target * log_probability).sum()) / BATCH
    return total / pairs


@pytest.mark.parametrize(("num_global", "num_local"), [(2, 0), (2, 3), (3, 1)])
def test_loss_is_the_papers_double_loop(num_global, num_local):
    dino = make(num_global, num_local)
    center = torch.linspace(-0.1, 0.1, PROTOTYPES)
    dino.centering.center.copy_(center)
    passes = dino.passes(Draw(0, 7, torch.arange(BATCH)), 4)
    tokens = fake_tokens(passes)
    loss, _ = dino.loss(tokens, torch.zeros(()), step=7)
    expected = loss_as_loops(dino, tokens, center.double().numpy(), dino.temperature(7))
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_a_loss_that_pairs_a_view_with_itself_is_caught():
    """The guard of the test above: with the same-view pairs left in, the number differs."""
    dino = make(2, 0)
    tokens = fake_tokens(dino.passes(Draw(0, 0, torch.arange(BATCH)), 4))
    loss, _ = dino.loss(tokens, torch.zeros(()), step=0)
    seen = {net: torch.cat([tokens[Pass(net, "global", v)].cls for v in (0, 1)]) for net in ("teacher", "student")}
    targets = dino.centering.targets(dino.teacher_head(seen["teacher"]), 0.04)
    logits = dino.student_head(seen["student"])
    with_itself = cross_entropy(targets.chunk(2), logits.chunk(2), [(0, 1), (0, 1)], 0.1)
    assert abs(with_itself.item() - loss.item()) > 1e-4


def test_one_teacher_view_leaves_that_view_out_of_the_student():
    dino = make(2, 1, num_teacher_views=1)
    names = {(p.network, p.crop, p.index) for p in dino.passes(Draw(0, 0, torch.arange(BATCH)), 4)}
    assert names == {("teacher", "global", 0), ("student", "global", 1), ("student", "local", 0)}


def test_a_uniform_student_has_loss_ln_k():
    logits = torch.zeros(4, PROTOTYPES)
    targets = torch.softmax(torch.randn(4, PROTOTYPES), -1)
    assert cross_entropy([targets], [logits], [(0,)], 0.1).item() == pytest.approx(math.log(PROTOTYPES), abs=1e-6)


def test_center_after_k_steps_is_the_closed_form():
    centering = Centering(3, "softmax", 0.9)
    batches = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(0))
    expected = np.zeros(3)
    for batch in batches:
        for part in batch.chunk(2):  # two micro-batches of one optimizer step
            centering.targets(part, 0.04)
        centering.after_step()
        expected = 0.9 * expected + 0.1 * batch.double().numpy().mean(0)
    np.testing.assert_allclose(centering.center.numpy(), expected, atol=1e-6)


def test_a_skipped_step_leaves_the_center_alone():
    centering = Centering(3, "softmax", 0.9)
    centering.targets(torch.ones(2, 3), 0.04)
    centering.discard()
    centering.after_step()
    assert not centering.center.any()


def sinkhorn_as_loops(logits: np.ndarray, temperature: float, iterations: int = 3) -> np.ndarray:
    """SwAV's algorithm 1 with explicit sums."""
    q = np.exp(logits.astype(np.float64) / temperature).T
    q /= q.sum()
    prototypes, samples = q.shape
    for _ in range(iterations):
        for k in range(prototypes):
            q[k] /= q[k].sum() * prototypes
        for b in range(samples):
            q[:, b] /= q[:, b].sum() * samples
    return (q * samples).T


def test_sinkhorn_is_swavs_and_balances():
    logits = torch.rand(12, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = sinkhorn(logits, 0.05)
    np.testing.assert_allclose(ours.numpy(), sinkhorn_as_loops(logits.numpy(), 0.05), atol=1e-5)
    many = sinkhorn(logits, 0.05, num_iterations=200)
    np.testing.assert_allclose(many.sum(1), np.ones(12), atol=1e-5)
    np.testing.assert_allclose(many.sum(0), np.full(6, 2.0), atol=1e-2)


def test_teacher_temperature_warms_up_within_the_run():
    assert warmed_up(0, 100, 0.04, 0.07, 0.3) == 0.04
    assert warmed_up(15, 100, 0.04, 0.07, 0.3) == pytest.approx(0.04 + 0.03 * 15 / 29)
    assert warmed_up(99, 100, 0.04, 0.07, 0.3) == 0.07
    assert warmed_up(1, 1, 0.04, 0.07, 0.3) == 0.07


def test_gradient_reaches_the_student_alone_and_prototypes_rest_at_first():
    dino = make()
    tokens = fake_tokens(dino.passes(Draw(0, 0, torch.arange(BATCH)), 4))
    dino.loss(tokens, torch.zeros(()), step=0)[0].backward()
    assert all(p.grad is None for p in dino.teacher_head.parameters())
    assert dino.student_head.prototypes.grad is not None
    dino.before_update(0)
    assert dino.student_head.prototypes.grad is None
    assert dino.student_head.mlp[0].weight.grad is not None


def test_a_step_without_a_masked_patch_leaves_the_centre_where_it_is():
    centering = Centering(4, "softmax", 0.9)
    centering.center.copy_(torch.arange(4.0))
    assert centering.targets(torch.zeros(0, 4), 0.04).shape == (0, 4)
    centering.after_step()
    assert torch.equal(centering.center, torch.arange(4.0))
    centering.targets(torch.ones(2, 4), 0.04)
    centering.after_step()
    torch.testing.assert_close(centering.center, 0.9 * torch.arange(4.0) + 0.1)
    assert sinkhorn(torch.zeros(0, 4), 0.04).shape == (0, 4)
