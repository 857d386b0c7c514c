"""Oracles: torch's fused kernel in float64, timm's Attention, a loop over images."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch.nn.functional import scaled_dot_product_attention

from sslvit.encoder import attention
from sslvit.errors import InputError

SHAPES = [(2, 7), (3, 5)]


def module(**options: object) -> Attention:
    torch.manual_seed(0)
    return Attention(24, num_heads=3, qkv_bias=True, norm_layer=torch.nn.LayerNorm, **options).double().eval()


def stream(shapes: list[tuple[int, int]] = SHAPES) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(sum(b * n for b, n in shapes), 24, dtype=torch.float64)


def heads(*shape: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def test_explicit_equals_fused_with_gradients() -> None:
    query, key, value = heads(2, 3, 9, 8)
    results = []
    for function in (attention.explicit_attention, scaled_dot_product_attention):
        out = function(query, key, value)
        results.append([out, *torch.autograd.grad(out.square().sum(), (query, key, value))])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*results, strict=True))


def test_explicit_in_bfloat16_stays_near_the_exact_gradients() -> None:
    exact = heads(2, 3, 40, 16)
    rough = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    wanted = torch.autograd.grad(scaled_dot_product_attention(*exact).square().sum(), exact)
    got = torch.autograd.grad(attention.attend(*rough).square().sum(), rough)
    for a, b in zip(got, wanted, strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize(
    ("dtype", "length", "grad", "amx", "explicit"),
    [
        (torch.bfloat16, 197, True, True, True),
        (torch.bfloat16, 801, True, False, False),
        (torch.bfloat16, 197, False, True, False),
        (torch.bfloat16, 197, False, False, True),
        (torch.bfloat16, 801, False, False, False),
        (torch.float32, 197, True, False, False),
        (torch.float32, 197, False, False, False),
    ],
)
def test_which_kernel_runs_where(
    dtype: torch.dtype, length: int, grad: bool, amx: bool, explicit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_has_amx", lambda: amx)
    query, key, _ = heads(1, 1, length, 4, dtype=dtype)
    with torch.set_grad_enabled(grad):
        assert attention.prefers_explicit(query, key) is explicit


def test_many_scores_at_once_are_left_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_has_amx", lambda: False)
    monkeypatch.setattr(attention, "EXPLICIT_MAX_SCORES", 2 * 3 * 9 * 9)
    with torch.no_grad():
        for batch, explicit in ((2, True), (3, False)):
            query, key, _ = heads(batch, 3, 9, 4, dtype=torch.bfloat16)
            assert attention.prefers_explicit(query, key) is explicit


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"scale_norm": True}], ids=str)
def test_stream_equals_timm_on_each_group(options: dict[str, bool]) -> None:
    x, layer = stream(), module(**options)
    out = attention.self_attention(layer, x, SHAPES)
    first = attention.class_attention(layer, x, SHAPES)
    wanted = [layer(x[:14].view(2, 7, 24)), layer(x[14:].view(3, 5, 24))]
    assert torch.allclose(out, torch.cat([w.flatten(0, 1) for w in wanted]), atol=1e-12)
    assert torch.allclose(first, torch.cat([w[:, 0] for w in wanted]), atol=1e-12)


def test_no_token_reads_another_sequence() -> None:
    x, layer = stream(), module()
    changed = x.clone()
    changed[7:14] += 1  # the second sequence of the first group
    moved = (attention.self_attention(layer, changed, SHAPES) - attention.self_attention(layer, x, SHAPES)).abs().sum(
        1
    ) > 0
    assert moved.tolist() == [False] * 7 + [True] * 7 + [False] * 15


def test_class_attention_through_a_wrapped_projection() -> None:
    class Wrapped(torch.nn.Module):  # what peft's LoRA makes of a Linear
        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + 0.5 * x.sum(-1, keepdim=True)

    x, layer = stream(), module()
    layer.qkv = Wrapped(layer.qkv)
    wanted = torch.cat([layer(x[:14].view(2, 7, 24))[:, 0], layer(x[14:].view(3, 5, 24))[:, 0]])
    assert torch.allclose(attention.class_attention(layer, x, SHAPES), wanted, atol=1e-12)


def test_attention_dropout_is_drawn_in_training_only() -> None:
    x, layer = stream(), module(attn_drop=0.5)
    still = attention.self_attention(layer, x, SHAPES)
    assert torch.equal(still, attention.self_attention(layer, x, SHAPES))
    layer.train()
    assert not torch.equal(still, attention.self_attention(layer, x, SHAPES))


def test_weights_sum_to_one_and_mix_the_values() -> None:
    layer, x = module(), stream([(2, 7)]).view(2, 7, 24)
    weights = attention.attention_weights(layer, x)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 7), atol=1e-6)
    value = layer.qkv(x).view(2, 7, 3, 3, 8)[:, :, 2].transpose(1, 2).float()
    mixed = layer.proj((weights @ value).transpose(1, 2).reshape(2, 7, 24).double())
    assert torch.allclose(mixed, layer(x), atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "words"), [("flash", "choose auto"), ("varlen", "needs a CUDA"), ("xformers", "needs a CUDA")]
)
def test_backends_that_cannot_run_say_so(backend: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        attention.check_backend(backend, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["varlen", "xformers"])
def test_packed_kernels_equal_grouped(backend: str) -> None:
    layer, x = module().cuda().bfloat16(), stream().cuda().bfloat16()
    grouped = attention.self_attention(layer, x, SHAPES)
    packed = attention.self_attention(layer, x, SHAPES, backend)
    assert torch.allclose(grouped.float(), packed.float(), atol=2e-2)
