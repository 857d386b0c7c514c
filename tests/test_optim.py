"""Parameter groups on a real ViT, AdamW and the moving average against plain loops, and updates that are left out."""

import math

import pytest
import timm
import torch
from torch import nn

from sslvit.optim import adamw, apply_schedule, clip_grad_norm_, ema_, param_groups, step_unless


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        depth=3,
        embed_dim=48,
        reg_tokens=4,
        init_values=1e-5,
        num_classes=0,
        no_embed_class=True,
    )


def placed(groups: list[dict]) -> dict[str, tuple[float, float]]:
    return {name: (group["lr_scale"], group["wd_scale"]) for group in groups for name, _ in group["params"]}


def test_every_trainable_parameter_once_and_decay_only_where_it_belongs(vit: nn.Module) -> None:
    groups = param_groups(vit, 0.04)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in vit.named_parameters())
    decayed = {name for name, (_, decay) in placed(groups).items() if decay == 1}
    linear = {f"{name}.weight" for name, module in vit.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert decayed == linear
    assert {"cls_token", "reg_token", "pos_embed", "blocks.0.ls1.gamma", "norm.weight"} <= placed(
        groups
    ).keys() - decayed
    assert {group["weight_decay"] for group in groups} == {0.0, 0.04}
    assert {group["lr_scale"] for group in groups} == {1.0}


def dinov2_rate(name: str, decay: float, depth: int) -> float:
    """Layers counted as in DINOv2: 0 before the blocks, i + 1 for block i, depth + 1 after them."""
    layer = depth + 1
    if any(part in name for part in ("pos_embed", "patch_embed", "cls_token", "reg_token", "mask_token")):
        layer = 0
    elif "blocks." in name:
        layer = int(name[name.find("blocks.") :].split(".")[1]) + 1
    return decay ** (depth + 1 - layer)


def test_layer_decay_counts_as_published(vit: nn.Module) -> None:
    whole = nn.ModuleDict({"student": vit, "decoder": nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)])})})
    scales = placed(param_groups(whole, 0.04, layer_decay=0.8, encoder_prefix="student."))
    for name, (scale, _) in scales.items():
        if name.startswith("decoder."):
            assert scale == 1.0
        else:
            assert math.isclose(scale, dinov2_rate(name, 0.8, 3)), name


def test_frozen_parameters_are_left_out(vit: nn.Module) -> None:
    whole = nn.ModuleDict({"student": nn.Linear(2, 2), "teacher": nn.Linear(2, 2).requires_grad_(False)})
    assert placed(param_groups(whole, 0.1)).keys() == {"student.weight", "student.bias"}


def test_schedule_reaches_every_group() -> None:
    weight, bias, frozen = (torch.ones(2, requires_grad=True) for _ in range(3))
    optimizer = adamw(
        [
            {"params": [weight], "lr_scale": 0.5, "wd_scale": 1.0},
            {"params": [bias], "lr_scale": 1.0, "wd_scale": 0.0},
            {"params": [frozen], "lr_scale": 0.0, "wd_scale": 1.0},
        ],
        lr=1.0,
    )
    apply_schedule(optimizer, {"lr": 0.2, "weight_decay": 0.4})
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.1, 0.4),
        (0.2, 0.0),
        (0.0, 0.4),
    ]
    for parameter in (weight, bias, frozen):
        parameter.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(2))  # a learning rate of 0 holds it, decay included
    assert not torch.equal(weight, torch.ones(2))


def test_adamw_is_the_published_update() -> None:
    """Loshchilov and Hutter (arXiv:1711.05101), algorithm 2, one number at a time."""
    start, gradients = [0.5, -2.0, 3.0], [[0.1, -0.3, 0.0], [0.2, 0.5, 1e-9], [-4.0, 0.1, 2.0]]
    lr, decay, beta1, beta2 = 0.01, 0.1, 0.9, 0.95
    parameter = torch.tensor(start, requires_grad=True)
    optimizer = adamw([{"params": [("w", parameter)], "weight_decay": decay}], lr=lr, betas=(beta1, beta2))
    expected, first, second = list(start), [0.0] * 3, [0.0] * 3
    for t, gradient in enumerate(gradients, start=1):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        for i, g in enumerate(gradient):
            first[i] = beta1 * first[i] + (1 - beta1) * g
            second[i] = beta2 * second[i] + (1 - beta2) * g * g
            update = (first[i] / (1 - beta1**t)) / (math.sqrt(second[i] / (1 - beta2**t)) + 1e-8)
            expected[i] = expected[i] * (1 - lr * decay) - lr * update
    assert torch.allclose(parameter, torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_clipping_agrees_with_torch(max_norm: float) -> None:
    ours = [
        torch.randn(4, 3, requires_grad=True),
        torch.randn(5, requires_grad=True),
        torch.randn(2, requires_grad=True),
    ]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    for a, b in zip(ours[:2], theirs[:2], strict=True):  # the third has no gradient
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = clip_grad_norm_(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm or math.inf)
    assert torch.allclose(norm, expected)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad)
    assert float(clip_grad_norm_([], 1.0)) == 0.0


def test_moving_average_is_the_closed_form() -> None:
    teacher, students = [torch.tensor([1.0, 2.0])], [torch.tensor([float(s), -s]) for s in range(5)]
    for student in students:
        ema_(teacher, [student.to(torch.bfloat16)], 0.9)  # a bf16 student, a float32 average
    expected = 0.9**5 * torch.tensor([1.0, 2.0]) + sum(0.1 * 0.9 ** (4 - i) * s for i, s in enumerate(students))
    assert torch.allclose(teacher[0], expected, atol=1e-6)
    ema_(teacher, [torch.tensor([7.0, 7.0])], 0.0)
    assert torch.equal(teacher[0], torch.tensor([7.0, 7.0]))
    with pytest.raises(AssertionError, match="float32"):
        ema_([torch.zeros(1, dtype=torch.bfloat16)], [torch.zeros(1)], 0.9)


def test_a_bad_step_is_left_out_bit_for_bit() -> None:
    parameter, other = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = adamw([{"params": [parameter, other]}], lr=0.1)

    def step(value: float, bad: float) -> list[torch.Tensor]:
        parameter.grad, other.grad = torch.full((3,), value), torch.full((2,), 0.1)
        step_unless(optimizer, torch.tensor(bad))
        state = [value for p in (parameter, other) for value in optimizer.state[p].values()]
        return [tensor.detach().clone() for tensor in (parameter, other, *state)]

    before = step(0.3, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, step(math.nan, 1.0), strict=True))
    after = step(0.3, 0.0)  # and the next good step is applied
    assert not torch.equal(after[0], before[0])
    assert torch.isnan(step(math.nan, 0.0)[0]).all()  # without the mark the NaN would reach the weights
