"""The oracle is timm: its forward_features, its blocks, its autograd. In float64, so that equal means equal."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from sslvit.encoder import vit
from sslvit.encoder.config import EncoderConfig
from sslvit.encoder.vit import (
    TokenInput,
    check_encoder,
    class_attention_maps,
    create_encoder,
    create_timm,
    forward_layers,
    forward_packed,
    forward_tokens,
    num_patches,
    patchify,
    sincos_positions,
    unpatchify,
)
from sslvit.errors import InputError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "dynamic_img_size": True}
ROPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "dynamic_img_size": True}
OPTIONS = {
    "ours": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
    "class": {},
    "class_registers": {"reg_tokens": 4},
    "no_embed_class": {"no_embed_class": True},
    "siglip_twin": {"class_token": False, "global_pool": "avg", "fc_norm": False, "act_layer": "gelu_tanh"},
    "registers_only": {"class_token": False, "global_pool": "avg", "reg_tokens": 4},
    "qk_norm": {"qk_norm": True},
    "pre_norm": {"pre_norm": True},
    "scale_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no_bias": {"qkv_bias": False, "proj_bias": False},
    "no_positions": {"pos_embed": "none"},
    "non_square": {"img_size": (32, 48)},
    "non_square_patch": {"patch_size": (8, 16)},
    "five_channels": {"in_chans": 5},
    "differential": {"attn_layer": "diff"},
}
ROPE_NAMES = ["vit_small_patch16_rope_224", "vit_small_patch16_rope_mixed_ape_224", "vit_small_patch16_dinov3"]
EXACT = 1e-9
SIZES = [(32, 32), (16, 32), (64, 48), (96, 96)]


def tiny(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, **{**TINY, **options})
    return randomise(encoder)


def rope(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=0, **ROPE))


def randomise(encoder: torch.nn.Module) -> torch.nn.Module:
    """Weights far enough from their initial values for every one of them to be felt."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return encoder.eval().double()


def pictures(*size: int, channels: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item() if a.numel() else 0.0


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_all_tokens_equal_forward_features(options: str, size: tuple[int, int]) -> None:
    encoder = tiny(**OPTIONS[options])
    images = pictures(*size, channels=encoder.in_chans)
    tokens = forward_tokens(encoder, images)
    assert difference(tokens.all, encoder.forward_features(images)) < EXACT
    assert tokens.prefix.shape[1] == encoder.num_prefix_tokens
    assert tokens.patches.shape[1] == num_patches(encoder, size)
    assert difference(tokens.cls, forward_tokens(encoder, images, cls_only=True).cls) < EXACT


@pytest.mark.parametrize("size", [(32, 32), (64, 48)], ids=str)
@pytest.mark.parametrize("name", ROPE_NAMES)
@torch.no_grad()
def test_rope_encoders_equal_forward_features(name: str, size: tuple[int, int]) -> None:
    encoder, images = rope(name), pictures(*size)
    assert difference(forward_tokens(encoder, images).all, encoder.forward_features(images)) < EXACT
    layers = forward_layers(encoder, images, 2)
    theirs = encoder.forward_intermediates(images, 2, norm=True, output_fmt="NLC", intermediates_only=True)
    assert max(difference(a.patches, b) for a, b in zip(layers, theirs, strict=True)) < EXACT


@pytest.mark.parametrize("name", ["ours", "class_registers", "siglip_twin", *ROPE_NAMES])
@torch.no_grad()
def test_keeping_every_patch_in_another_order_only_permutes(name: str) -> None:
    encoder = rope(name) if name in ROPE_NAMES else tiny(**OPTIONS[name])
    images = pictures(32, 48)
    order = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    full, kept = forward_tokens(encoder, images), forward_tokens(encoder, images, keep=order)
    expected = full.patches.gather(1, order.unsqueeze(-1).expand_as(full.patches))
    assert difference(kept.patches, expected) < EXACT
    assert difference(kept.prefix, full.prefix) < EXACT


@pytest.mark.parametrize("options", ["ours", "class", "siglip_twin"])
@torch.no_grad()
def test_visible_subset_equals_gathering_after_pos_embed(options: str) -> None:
    encoder, images = tiny(**OPTIONS[options]), pictures(32, 32)
    keep = torch.tensor([[3, 0, 9], [15, 2, 1]])
    x = encoder._pos_embed(encoder.patch_embed(images))
    prefix = encoder.num_prefix_tokens
    visible = x[:, prefix:].gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    x = encoder.norm(encoder.blocks(encoder.norm_pre(torch.cat([x[:, :prefix], visible], 1))))
    assert difference(forward_tokens(encoder, images, keep=keep).all, x) < EXACT


@torch.no_grad()
def test_gradients_of_positions_are_the_same_every_time_with_several_threads() -> None:
    """Exact resume needs it; `positions[keep]` in place of a lookup fails here."""
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY)
    images, keep = torch.randn(256, 3, 32, 32), torch.rand(256, 16).argsort(1)[:, :8]
    threads, sums = torch.get_num_threads(), set()
    torch.set_num_threads(2)
    try:
        for _ in range(6):
            encoder.zero_grad()
            with torch.enable_grad():
                forward_tokens(encoder, images, keep=keep).patches.square().sum().backward()
            sums.add(encoder.pos_embed.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(sums) == 1


def test_mask_token_replaces_masked_patches_before_positions() -> None:
    encoder, images, token = tiny(**OPTIONS["ours"]), pictures(32, 32), torch.randn(1, 1, 48, dtype=torch.float64)
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    embedded = encoder.patch_embed(images)
    embedded[mask.view(2, 4, 4)] = token[0, 0]
    x = encoder.norm(encoder.blocks(encoder.norm_pre(encoder._pos_embed(embedded))))
    masked = forward_tokens(encoder, images, mask=mask, mask_token=token)
    assert difference(masked.all, x) < EXACT
    assert difference(masked.all, forward_tokens(encoder, images).all) > 1e-2


@pytest.mark.parametrize("name", ["ours", "siglip_twin", "differential", ROPE_NAMES[0]])
@torch.no_grad()
def test_packed_equals_separate(name: str) -> None:
    encoder = rope(name) if name in ROPE_NAMES else tiny(**OPTIONS[name])
    token = torch.randn(1, 1, 48, dtype=torch.float64)
    mask = torch.arange(16).repeat(2, 1) % 3 == 0
    inputs = [
        TokenInput(pictures(32, 32), mask=mask, mask_token=token),
        TokenInput(pictures(16, 16, batch=5), cls_only=True),
        TokenInput(pictures(32, 32), keep=torch.tensor([[0, 5], [7, 2]])),
        TokenInput(pictures(48, 16, batch=3)),
    ]
    for norm in (True, False):
        for item, packed in zip(inputs, forward_packed(encoder, inputs, norm=norm), strict=True):
            alone = forward_tokens(
                encoder, item.images, mask=item.mask, mask_token=item.mask_token, keep=item.keep, norm=norm
            )
            assert difference(packed.cls, alone.cls) < EXACT
            if not item.cls_only:
                assert difference(packed.all, alone.all) < EXACT
            assert packed.normed == norm


def test_changing_one_image_of_a_pack_changes_no_other() -> None:
    encoder = tiny(**OPTIONS["ours"])
    first, second = pictures(32, 32), pictures(16, 16, batch=3)
    with torch.no_grad():
        before = forward_packed(encoder, [TokenInput(first), TokenInput(second)])
        second[1] += 1
        after = forward_packed(encoder, [TokenInput(first), TokenInput(second)])
    assert difference(before[0].all, after[0].all) == 0
    changed = (before[1].all - after[1].all).abs().amax((1, 2)) > 0
    assert changed.tolist() == [False, True, False]


def gradients(encoder: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    encoder.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_timm(checkpointing: bool) -> None:
    encoder, images = tiny(**OPTIONS["ours"]), pictures(48, 48)
    theirs = gradients(encoder, encoder.forward_features(images)[:, 0].square().sum())
    encoder.set_grad_checkpointing(checkpointing)
    for cls_only in (False, True):
        ours = gradients(encoder, forward_tokens(encoder, images, cls_only=cls_only).cls.square().sum())
        assert ours.keys() == theirs.keys()
        assert all(difference(ours[n], theirs[n]) < EXACT * (1 + theirs[n].abs().max()) for n in theirs)


def test_checkpointing_recomputes_the_blocks() -> None:
    encoder, images = tiny(), pictures(32, 32)
    calls = []
    encoder.blocks[1].norm2.register_forward_hook(lambda *_: calls.append(1))
    for enabled, expected in ((False, 1), (True, 2)):
        calls.clear()
        encoder.set_grad_checkpointing(enabled)
        forward_tokens(encoder, images).cls.sum().backward()
        assert len(calls) == expected


def test_drop_path_draws_as_timm_does() -> None:
    encoder, images = tiny(drop_path_rate=0.5).train(), pictures(32, 32, batch=8)
    torch.manual_seed(5)
    theirs = encoder.forward_features(images)
    torch.manual_seed(5)
    ours = forward_tokens(encoder, images).all
    assert difference(ours, theirs) < EXACT
    torch.manual_seed(6)
    assert difference(forward_tokens(encoder, images).all, theirs) > 1e-2
    torch.manual_seed(5)
    assert difference(forward_tokens(encoder, images, cls_only=True).cls, theirs[:, 0]) < EXACT


def test_drop_path_treats_all_tokens_of_a_sequence_alike() -> None:
    encoder = tiny(drop_path_rate=0.9).train()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(("attn.proj.bias", "mlp.fc2.bias")):
                parameter.add_(10)  # each branch, when kept, moves every token
    images = pictures(32, 32, batch=6)
    packed = forward_packed(encoder, [TokenInput(images), TokenInput(images[..., :16, :16])], norm=False)
    encoder.eval()
    for item, tokens in zip((images, images[..., :16, :16]), packed, strict=True):
        moved = (tokens.all - encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(item)))).abs().amax(-1) > 5
        assert (moved.all(1) | ~moved.any(1)).all()


@torch.no_grad()
def test_layers_are_those_of_timm_normed() -> None:
    encoder, images = tiny(**OPTIONS["ours"]), pictures(32, 48)
    theirs = encoder.get_intermediate_layers(images, 3, norm=True, return_prefix_tokens=True)
    for ours, (patches, prefix) in zip(forward_layers(encoder, images, 3), theirs, strict=True):
        assert difference(ours.patches, patches) < EXACT
        assert difference(ours.prefix, prefix) < EXACT
    with pytest.raises(InputError, match="3 blocks"):
        forward_layers(encoder, images, 4)


@torch.no_grad()
def test_un_normed_tokens_go_through_norm_to_the_normed_ones() -> None:
    encoder, images = tiny(**OPTIONS["ours"]), pictures(32, 32)
    raw, normed = forward_tokens(encoder, images, norm=False), forward_tokens(encoder, images)
    assert difference(encoder.norm(raw.all), normed.all) < EXACT
    assert difference(raw.all, normed.all) > 1e-2


@torch.no_grad()
def test_pooled_feature_is_what_timm_pools() -> None:
    images = pictures(32, 32)
    for class_token in (True, False):
        config = EncoderConfig("vit_tiny_patch16_224", 8, 32, class_token, 4 if class_token else 0, 3, 48, 2, 3)
        encoder = randomise(create_encoder(config))
        assert difference(forward_tokens(encoder, images).cls, encoder(images)) < EXACT


@torch.no_grad()
def test_attention_maps_are_those_of_a_loop() -> None:
    encoder, images = tiny(**OPTIONS["ours"]), pictures(32, 48)
    block = encoder.blocks[-1]
    x = encoder.blocks[:-1](encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images))))
    q, k, _ = block.attn.qkv(block.norm1(x)).reshape(2, -1, 3, 3, 16).unbind(2)
    maps = class_attention_maps(encoder, images)
    for b in range(2):
        for head in range(3):
            row = (k[b, :, head] @ q[b, 0, head] / 4).softmax(0)[5:].view(4, 6)
            assert difference(maps[b, head], row.float()) < 1e-6


def test_patchify_round_trip_and_order() -> None:
    images = pictures(16, 24, channels=5)
    patches = patchify(images, 8)
    assert torch.equal(unpatchify(patches, 8, (16, 24), 5), images)
    for row in range(2):
        for column in range(3):
            tile = images[1, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            assert torch.equal(patches[1, row * 3 + column], tile.permute(1, 2, 0).flatten())


def test_config_reaches_timm() -> None:
    encoder = create_encoder(EncoderConfig("vit_small_patch16_224", 4, 32, True, 4, 3, drop_path_rate=0.1, depth=2))
    assert encoder.pos_embed.shape == (1, 64, 384) and encoder.reg_token.shape == (1, 4, 384)
    assert encoder.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    assert encoder.blocks[0].ls1.gamma.eq(1e-5).all() and encoder.norm.eps == 1e-6
    twin = create_encoder(EncoderConfig("vit_tiny_patch16_224", 4, 32, False, 0, 1, depth=1))
    assert twin.num_prefix_tokens == 0 and type(twin.blocks[0].mlp.act).__name__ == "GELUTanh"
    assert isinstance(twin.fc_norm, torch.nn.Identity) and isinstance(twin.norm, torch.nn.LayerNorm)


def test_weight_init_reaches_every_linear_map() -> None:
    """Xavier (Glorot and Bengio 2010, eq. 16): uniform within sqrt(6 / (fan_in + fan_out)), so of that variance / 3."""
    config = EncoderConfig("vit_tiny_patch16_224", 8, 32, True, 4, 3, depth=2, weight_init="xavier")
    encoder, narrow = create_encoder(config), create_encoder(replace(config, weight_init="trunc_normal"))
    for name, weight in encoder.named_parameters():
        if name.endswith(".weight") and weight.ndim > 1:
            matrix = weight.flatten(1)
            bound = math.sqrt(6 / sum(matrix.shape))
            assert matrix.abs().max() <= bound and matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        if name.endswith(".bias"):
            assert not weight.any(), name
    assert torch.equal(encoder.pos_embed[0], sincos_positions((4, 4), 192))
    assert narrow.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize("init_values", [1e-5, 1.0])
def test_a_new_class_token_leaves_the_final_norm_at_unit_scale(init_values: float) -> None:
    torch.manual_seed(0)
    encoder = create_encoder(EncoderConfig("vit_tiny_patch16_224", 8, 32, True, 4, 3, depth=3, init_values=init_values))
    images = pictures(32, 32).float()
    cls = forward_tokens(encoder, images).cls
    (cls - cls.roll(1, 0).detach()).square().mean().backward()
    assert 0.5 < cls.square().mean().sqrt() < 2 and encoder.cls_token.grad.norm() < 10
    torch.nn.init.normal_(encoder.cls_token, std=1e-6)  # as timm starts it
    if init_values == 1e-5:
        assert forward_tokens(encoder, images).cls.square().mean().sqrt() < 0.1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (EncoderConfig("vit_tinny_patch16_224", 8, 32, True, 4, 3), "did you mean 'vit_tiny_patch16_224'"),
        (EncoderConfig("resnet18", 8, 32, True, 4, 3), "resnet18"),
        (EncoderConfig("vit_tiny_patch16_224", 7, 32, True, 4, 3), "multiple of encoder.patch_size=7; take 28"),
        (EncoderConfig("vit_tiny_patch16_224", 8, 32, True, 4, 3, embed_dim=50, num_heads=3), "num_heads=3"),
        (EncoderConfig("vit_small_patch16_dinov3", 16, 32, True, 4, 3), "vit_small_patch16_dinov3"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(config: EncoderConfig, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        create_encoder(config)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_run_exactly_is_refused() -> None:
    with pytest.raises(InputError, match="distillation token"):
        create_timm("deit_tiny_distilled_patch16_224", {})
    with pytest.raises(InputError, match="no timm VisionTransformer"):
        check_encoder(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="33x32 is not a multiple"):
        forward_tokens(tiny(), pictures(33, 32))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own look at the stream's gradient
@pytest.mark.parametrize("kind", ["packed", "class token alone", "drop path"])
def test_compiled_blocks_equal_eager_ones_and_share_one_graph(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    graphs = []

    def trace(graph: torch.fx.GraphModule, inputs: list) -> object:  # a compiler that runs what was traced
        graphs.append(graph)
        return graph.forward

    compiled = functools.cache(lambda function: torch.compile(function, dynamic=False, fullgraph=True, backend=trace))
    monkeypatch.setattr(vit, "_compiled", compiled)
    torch.compiler.reset()
    encoder = randomise(tiny(depth=4, drop_path_rate=0.5 if kind == "drop path" else 0.0)).train()
    only = kind == "class token alone"
    inputs = [TokenInput(pictures(32, 32), cls_only=only), TokenInput(pictures(16, 16, batch=3), cls_only=only)]
    results = []
    for flag in (False, True):
        torch.manual_seed(7)
        outputs = forward_packed(encoder, inputs, compiled=flag)
        loss = sum(tokens.cls.square().sum() for tokens in outputs)
        results.append([loss, *gradients(encoder, loss).values()])
    assert all(difference(a, b) < 1e-12 for a, b in zip(*results, strict=True))
    expected = {"packed": 1, "class token alone": 2, "drop path": 2}  # the first block drops nothing
    assert len(graphs) == expected[kind], "blocks whose weights or drop rates differ share a graph"
