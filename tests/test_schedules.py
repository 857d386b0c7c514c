"""Schedules against the published formulas, at every step."""

import numpy as np
import pytest

from sslvit.schedules import cosine, linear_warmup, momentum_from_half_life


def dino_schedule(
    base: float, final: float, epochs: int, per_epoch: int, warmup_epochs: int, first: float
) -> np.ndarray:
    """The table of DINO (arXiv:2104.14294), written with arrays: linspace up, then half a cosine down."""
    warmup = np.linspace(first, base, warmup_epochs * per_epoch) if warmup_epochs else np.array([])
    rest = np.arange(epochs * per_epoch - len(warmup))
    return np.concatenate((warmup, final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / len(rest)))))


@pytest.mark.parametrize(
    ("base", "final", "warmup_epochs", "first"),
    [
        (5e-4 * 1024 / 256, 1e-6, 10, 0.0),  # learning rate of ViT-S/16
        (0.04, 0.4, 0, 0.0),  # weight decay
        (0.996, 1.0, 0, 0.0),  # momentum of the teacher
        (1e-3, 0.0, 1, 1e-5),
    ],
)
def test_cosine_is_the_published_one_at_every_step(base: float, final: float, warmup_epochs: int, first: float) -> None:
    epochs, per_epoch = 30, 17
    published = dino_schedule(base, final, epochs, per_epoch, warmup_epochs, first)
    ours = [
        cosine(step, epochs * per_epoch, base, final, warmup_epochs * per_epoch, first)
        for step in range(epochs * per_epoch)
    ]
    assert np.allclose(ours, published, rtol=1e-12, atol=0)
    assert cosine(epochs * per_epoch, epochs * per_epoch, base, final, warmup_epochs * per_epoch) == final


@pytest.mark.parametrize("warmup_epochs", [1, 30])
def test_teacher_temperature_is_the_published_one(warmup_epochs: int) -> None:
    published = np.concatenate((np.linspace(0.04, 0.07, warmup_epochs), np.ones(100 - warmup_epochs) * 0.07))
    ours = [linear_warmup(epoch, 0.04, 0.07, warmup_epochs) for epoch in range(100)]
    assert np.allclose(ours, published, rtol=1e-12, atol=0)


def test_edges() -> None:
    assert linear_warmup(0, 1.0, 2.0, 0) == 2.0
    assert cosine(0, 1, 3.0, 1.0) == 3.0
    assert cosine(5, 10, 3.0, 1.0, warmup_steps=10) == pytest.approx(3.0 * 5 / 9)  # warm-up through the whole run


def test_half_life() -> None:
    momentum = momentum_from_half_life(half_life=6400, batch_size=64)
    assert momentum**100 == pytest.approx(0.5)
    assert momentum_from_half_life(6400, 128) == pytest.approx(momentum**2)  # the same per image at any batch size
