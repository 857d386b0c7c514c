"""Oracles: the modules the weights came from (timm, transformers), timm's own converters, bit equality."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import _convert_dinov2

from sslvit.checkpoint import mark_best, save_checkpoint
from sslvit.encoder import weights
from sslvit.encoder.architecture import Architecture, infer_architecture
from sslvit.encoder.config import EncoderConfig
from sslvit.encoder.layouts import fold_layer_scale, to_hf, to_timm
from sslvit.encoder.strict import adapt_channels, import_weights
from sslvit.encoder.vit import create_encoder, forward_tokens, model_args
from sslvit.encoder.weights import init_encoder, load_encoder, random_like
from sslvit.errors import InputError

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "dynamic_img_size": True}
OURS = EncoderConfig("vit_tiny_patch16_224", 8, 32, True, 4, 3, 64, 2, 1)
TWIN = EncoderConfig("vit_tiny_patch16_224", 8, 32, False, 0, 3, 64, 2, 1)


def filled(encoder: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return encoder.eval()


def plain(**options: object) -> torch.nn.Module:
    return filled(timm.create_model("vit_tiny_patch16_224", num_classes=0, **{**PLAIN, **options}))


def ours(config: EncoderConfig = OURS, seed: int = 1) -> torch.nn.Module:
    return filled(create_encoder(config), seed)


def pictures(size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def difference(loaded: torch.nn.Module, original: torch.nn.Module, size: int = 32) -> float:
    x = pictures(size, original.patch_embed.proj.in_channels)
    return (forward_tokens(loaded, x).all - original.forward_features(x)).abs().max().item()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


# --- checkpoints of the originals -----------------------------------------------------------------------------------


def original_files() -> dict[str, tuple[dict, torch.nn.Module]]:
    """What each original writes, made from a timm module of the same kind."""
    vit, other = plain(), plain(in_chans=3)
    with torch.no_grad():
        other.norm.weight.mul_(3)
    state, student = dict(vit.state_dict()), dict(other.state_dict())
    dinov2 = plain(init_values=1e-5)
    chunked = {}
    for name, tensor in dinov2.state_dict().items():
        parts = name.split(".")
        chunked[".".join(["blocks", "0", *parts[1:]]) if parts[0] == "blocks" else name] = tensor
    head = {"head.mlp.0.weight": torch.zeros(5, 64)}
    return {
        "dino_flat": (state, vit),
        "dino_full": (
            {
                "student": prefixed("module.", prefixed("backbone.", student) | head),
                "teacher": prefixed("backbone.", state) | head,
                "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
                "epoch": 3,
                "args": argparse.Namespace(arch="vit_tiny"),
            },
            vit,
        ),
        "ibot": (
            {
                "student": prefixed("module.backbone.", student | {"masked_embed": torch.zeros(1, 64)}),
                "teacher": prefixed("module.backbone.", state | {"masked_embed": torch.zeros(1, 64)}),
            },
            vit,
        ),
        "mae": (
            {
                "model": state
                | {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 64)}
                | {"decoder_blocks.0.norm1.weight": torch.ones(8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
            },
            vit,
        ),
        "dinov2_flat": (dict(dinov2.state_dict()) | {"mask_token": torch.zeros(1, 64)}, dinov2),
        "dinov2_training": (
            {"model": prefixed("teacher.backbone.", chunked) | prefixed("student.backbone.", student)},
            dinov2,
        ),
        "open_clip": (
            prefixed("visual.trunk.", state)
            | {"text.token_embedding.weight": torch.zeros(7, 4), "logit_scale": torch.ones(())},
            vit,
        ),
        "compiled": ({"state_dict": prefixed("_orig_mod.encoder.", state)}, vit),
    }


@pytest.mark.parametrize("layout", sorted(original_files()))
def test_checkpoints_of_the_originals_open_exactly(layout: str, tmp_path: Path) -> None:
    content, original = original_files()[layout]
    torch.save(content, tmp_path / "checkpoint.pth")
    loaded = load_encoder(str(tmp_path / "checkpoint.pth"))
    assert same(loaded.module, original)
    assert loaded.report.share == 1 and not loaded.report.missing and not loaded.report.unexpected
    assert difference(loaded.module, original) < 1e-5
    assert difference(loaded.module, original, 48) < 1e-5


def test_the_student_can_be_asked_for(tmp_path: Path) -> None:
    content, teacher = original_files()["dino_full"]
    torch.save(content, tmp_path / "checkpoint.pth")
    student = load_encoder(f"{tmp_path / 'checkpoint.pth'}?checkpoint_key=student").module
    assert not same(student, teacher)
    assert torch.equal(student.norm.weight, teacher.norm.weight * 3)


def test_dinov2_registers_as_timm_converts_them(tmp_path: Path) -> None:
    state = dict(plain(init_values=1e-5).state_dict())
    state |= {"register_tokens": torch.randn(1, 4, 64), "mask_token": torch.zeros(1, 64)}
    torch.save(state, tmp_path / "reg4.pth")
    wanted = _convert_dinov2(dict(state), None)
    loaded = load_encoder(str(tmp_path / "reg4.pth")).module
    assert loaded.no_embed_class and loaded.num_reg_tokens == 4
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


def test_swiglu_of_dinov2_giant(tmp_path: Path) -> None:
    encoder = filled(timm.create_model("vit_giant_patch14_dinov2", num_classes=0, mlp_ratio=4, **PLAIN))
    state = {n.replace(".fc1.", ".w12.").replace(".fc2.", ".w3."): t for n, t in encoder.state_dict().items()}
    torch.save(state, tmp_path / "giant.pth")
    loaded = load_encoder(str(tmp_path / "giant.pth")).module
    assert same(loaded, encoder) and difference(loaded, encoder) < 1e-5


# --- Hugging Face folders, written by transformers itself -----------------------------------------------------------

HF = {
    "vit": ("ViTConfig", "ViTModel", {"layer_norm_eps": 1e-6}),
    "vit_default_eps": ("ViTConfig", "ViTModel", {}),
    "dinov2": ("Dinov2Config", "Dinov2Model", {}),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {"num_register_tokens": 3}),
    "siglip_vision_model": ("SiglipVisionConfig", "SiglipVisionModel", {}),
    "swiglu": ("Dinov2Config", "Dinov2Model", {"use_swiglu_ffn": True}),
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="needs sslvit[vlm]")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(HF))
@torch.no_grad()
def test_folders_written_by_transformers(kind: str, tmp_path: Path, transformers) -> None:
    config_name, model_name, options = HF[kind]
    size = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, config_name)(**size, **options)
    config.intermediate_size = 128
    torch.manual_seed(0)
    model = filled(getattr(transformers, model_name)(config))
    model.save_pretrained(tmp_path)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    processor = {"image_mean": mean, "image_std": std, "size": {"height": 32, "width": 32}, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    (tmp_path / "README.md").write_text("---\ntags:\n- vision\nlicense: mit\n---\n# A model\n")
    loaded = load_encoder(str(tmp_path))
    x = pictures()
    assert (forward_tokens(loaded.module, x).all - model(x).last_hidden_state).abs().max() < 1e-5
    assert loaded.preprocessing.mean == tuple(mean) and loaded.preprocessing.std == tuple(std)
    assert (loaded.preprocessing.image_size, loaded.preprocessing.interpolation) == (32, "bilinear")
    assert loaded.license == "mit" and loaded.config.num_heads == 2
    if kind == "dinov2_with_registers":  # the only class that is equal at other sizes too
        y = pictures(48)
        assert (forward_tokens(loaded.module, y).all - model(y).last_hidden_state).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("layout", "encoder"),
    [
        ("dinov2_with_registers", lambda: ours()),
        ("dinov2", lambda: plain(init_values=1e-5)),
        ("vit", lambda: plain()),
        ("siglip", lambda: ours(TWIN)),
    ],
)
def test_names_there_and_back_are_bit_for_bit(layout: str, encoder) -> None:
    state = encoder().state_dict()
    there = to_hf(state, layout)
    back = to_timm(there)
    wanted = fold_layer_scale(state) if layout == "siglip" else state
    assert back.layout == layout and back.tensors.keys() == wanted.keys()
    assert all(torch.equal(back.tensors[name], wanted[name]) for name in wanted)
    again = to_hf(back.tensors, layout)
    assert again.keys() == there.keys() and all(torch.equal(again[name], there[name]) for name in there)


def test_shards_and_towers_inside_larger_models(tmp_path: Path) -> None:
    encoder = ours()
    tensors = prefixed("vision_tower.", to_hf(encoder.state_dict(), "dinov2_with_registers"))
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    vision = {"model_type": "dinov2_with_registers", "num_attention_heads": 1, "image_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": vision}))
    assert same(load_encoder(str(tmp_path)).module, encoder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{}, {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False}]
)
@torch.no_grad()
def test_dinov3_folders_written_by_transformers(options: dict, tmp_path: Path, transformers) -> None:
    size = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.DINOv3ViTConfig(**size, intermediate_size=128, num_register_tokens=3, **options)
    torch.manual_seed(0)
    model = filled(transformers.DINOv3ViTModel(config))
    model.save_pretrained(tmp_path)
    loaded = load_encoder(str(tmp_path))
    assert loaded.report.exact and loaded.config.num_heads == 2 and loaded.config.num_registers == 3
    for side in (32, 48):
        x = pictures(side)
        assert (forward_tokens(loaded.module, x).all - model(x).last_hidden_state).abs().max() < 1e-5
    there = to_hf(loaded.module.state_dict(), "dinov3_vit")
    back = to_timm(there).tensors
    wanted = loaded.module.state_dict()
    assert back.keys() == wanted.keys() and all(torch.equal(back[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("gated", [False, True])
def test_the_original_dinov3_as_timm_converts_it(gated: bool, tmp_path: Path) -> None:
    name = "vit_small_plus_patch16_dinov3_qkvb" if gated else "vit_small_patch16_dinov3_qkvb"
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
    encoder = filled(timm.create_model(name, num_classes=0, **size))
    names = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    names |= {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2"} | ({"mlp.fc2": "mlp.w3"} if gated else {})
    original = {"mask_token": torch.zeros(1, 128), "rope_embed.periods": torch.ones(16)}
    for key, tensor in encoder.state_dict().items():
        if key.endswith("v_bias"):
            continue
        if key.endswith("q_bias"):
            stem = key.removesuffix("q_bias")
            value = encoder.state_dict()[f"{stem}v_bias"]
            key, tensor = f"{stem}qkv.bias", torch.cat([tensor, torch.full_like(tensor, 7.0), value])
            original[f"{stem}qkv.bias_mask"] = torch.ones_like(tensor)
        for ours_, theirs in names.items():
            key = key.replace(ours_, theirs)
        original[key] = tensor
    torch.save({"teacher": prefixed("backbone.", original)}, tmp_path / "dinov3.pth")
    loaded = load_encoder(str(tmp_path / "dinov3.pth"))
    assert same(loaded.module, encoder) and loaded.report.exact
    assert difference(loaded.module, encoder) < 1e-5 and difference(loaded.module, encoder, 48) < 1e-5
    unmasked = {k: t for k, t in original.items() if not k.endswith("bias_mask")}
    assert "blocks.0.attn.qkv.bias" in to_timm(unmasked).tensors, "a bias of the keys that counts is never dropped"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quick_gelu", [False, True])
@torch.no_grad()
def test_open_clips_own_tower(quick_gelu: bool, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="needs sslvit[openclip]")
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    clip = filled(open_clip.CLIP(24, vision, text, quick_gelu=quick_gelu))
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    model = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    loaded = load_encoder(str(tmp_path))
    assert loaded.report.exact and loaded.report.layout == "open_clip"
    ours_ = forward_tokens(loaded.module, pictures()).cls @ clip.visual.proj
    assert (ours_ - clip.encode_image(pictures())).abs().max() < 1e-4
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3) and loaded.preprocessing.std[0] == pytest.approx(0.26862954)
    if not quick_gelu:
        single = load_encoder(f"{tmp_path / 'open_clip_pytorch_model.bin'}?num_heads=2").module
        assert same(single, loaded.module) and single.norm.eps == 1e-5


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_timm_tower_of_open_clip(tmp_path: Path) -> None:
    tower = filled(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64))
    save_file(prefixed("visual.trunk.", tower.state_dict()), tmp_path / "open_clip_model.safetensors")
    vision = {"image_size": 64, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
    loaded = load_encoder(str(tmp_path))
    assert same(loaded.module, tower) and loaded.preprocessing.image_size == 64
    assert loaded.preprocessing.mean[0] == pytest.approx(0.48145466)


# --- runs -----------------------------------------------------------------------------------------------------------


def write_run(path: Path, teacher: bool = True) -> dict[int, tuple[torch.nn.Module, torch.nn.Module]]:
    modules = {}
    meta = {
        "encoder": vars(OURS) | {"num_heads": None, "embed_dim": 64},
        "preprocessing": {
            "image_size": 32,
            "mean": [0.3] * 3,
            "std": [0.2] * 3,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        },
    }
    config = EncoderConfig("vit_tiny_patch16_224", 8, 32, True, 4, 3, 192, 2, None)
    meta["encoder"] = vars(config)
    for step in (10, 20):
        pair = ours(config, step), ours(config, step + 1)
        tensors = prefixed("student.", pair[0].state_dict())
        if teacher:
            tensors |= prefixed("teacher.", pair[1].state_dict())
        tensors["objectives.dino.head.weight"] = torch.zeros(3)
        best = 10 if step == 20 else None
        save_checkpoint(path / "checkpoints", step, {"model": tensors}, meta, keep=3, best=best, background=False)
        modules[step] = pair
    return modules


@pytest.mark.parametrize("teacher", [True, False])
def test_runs_open_at_the_newest_the_best_or_a_named_step(teacher: bool, tmp_path: Path) -> None:
    modules = write_run(tmp_path, teacher)
    for suffix, step in (("", 20), ("@best", 10), ("@step_10", 10), ("@step_0000020", 20)):
        loaded = load_encoder(str(tmp_path) + suffix)
        assert same(loaded.module, modules[step][int(teacher)])
        assert loaded.step == step and loaded.preprocessing.mean == (0.3, 0.3, 0.3)
    assert loaded.config.num_heads == 3 and loaded.config.num_registers == 4
    assert same(load_encoder(str(tmp_path / "checkpoints" / "step_0000010")).module, modules[10][int(teacher)])
    with pytest.raises(InputError, match=r"no checkpoint 'step_5'; it has step_10, step_20"):
        load_encoder(f"{tmp_path}@step_5")


@pytest.mark.parametrize("which", ["", "@best"])
def test_a_run_that_prunes_what_is_being_read_is_looked_at_again(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saves step 20, its best by now, and drops step 10, after that was found and before it is read."""
    modules = write_run(tmp_path)
    root = tmp_path / "checkpoints"
    (root / "step_0000020").rename(tmp_path / "later")
    read, moved = weights.load_checkpoint, []

    def pruned(path: Path, **options: Any) -> Any:
        if not moved:
            moved.append(path)
            (tmp_path / "later").rename(root / "step_0000020")
            mark_best(root, 20)
            shutil.rmtree(root / "step_0000010")
        return read(path, **options)

    monkeypatch.setattr(weights, "load_checkpoint", pruned)
    loaded = load_encoder(f"{tmp_path}{which}")
    assert moved == [root / "step_0000010"] and loaded.step == 20 and same(loaded.module, modules[20][1])
    shutil.rmtree(root / "step_0000020")
    with pytest.raises(InputError):
        load_encoder(f"{tmp_path}{which}")


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    modules = write_run(tmp_path)
    file = tmp_path / "checkpoints" / "step_0000020" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert same(load_encoder(str(tmp_path)).module, modules[10][1])
    assert "damaged" in caplog.text
    with pytest.raises(InputError, match="damaged"):
        load_encoder(f"{tmp_path}@step_20")


def test_the_second_form_keeps_its_activation(tmp_path: Path) -> None:
    encoder = ours(TWIN)
    meta = {"encoder": vars(TWIN), "preprocessing": {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}}
    tensors = {"model": prefixed("student.", encoder.state_dict())}
    save_checkpoint(tmp_path / "checkpoints", 1, tensors, meta, keep=1, background=False)
    assert difference(load_encoder(str(tmp_path)).module, encoder) < 1e-5


# --- names ----------------------------------------------------------------------------------------------------------


def test_random_names_depend_on_their_seed_alone() -> None:
    spec = "vit_tiny_patch16_224?pretrained=false&seed={}&img_size=64&patch_size=8&depth=2"
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, other = (load_encoder(spec.format(seed)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert same(first.module, second.module) and first.fingerprint == second.fingerprint
    assert not same(first.module, other.module) and first.fingerprint != other.fingerprint
    config = first.config
    assert (config.image_size, config.patch_size, config.depth, config.embed_dim) == (64, 8, 2, 192)
    assert first.preprocessing.image_size == 64 and not first.module.training
    control = random_like(first, 1)
    assert same(control.module, other.module) and control.preprocessing == first.preprocessing


def test_our_words_work_in_names() -> None:
    loaded = load_encoder(
        "vit_tiny_patch16_224?pretrained=false&image_size=32&patch_size=8&depth=1&num_registers=2&in_chans=1"
    )
    assert loaded.config.num_registers == 2 and loaded.preprocessing.channels == 1


def test_rope_encoders_open_by_name() -> None:
    loaded = load_encoder("vit_small_patch16_dinov3?pretrained=false&img_size=32&depth=1")
    assert difference(loaded.module, loaded.module, 48) < 1e-5


def test_timm_folders_written_by_timm(tmp_path: Path) -> None:
    encoder = filled(timm.create_model("vit_tiny_patch16_224", num_classes=5, **PLAIN))
    timm.models.save_for_hf(
        encoder, tmp_path, safe_serialization=True, model_config={"pretrained_cfg": {"license": "mit"}}
    )
    loaded = load_encoder(str(tmp_path))
    assert difference(loaded.module, encoder) < 1e-5 and loaded.license == "mit"
    assert loaded.report.ignored == ["head.bias", "head.weight"]


# --- resizing -------------------------------------------------------------------------------------------------------


def test_import_resizes_positions_patches_and_channels_as_timm_does() -> None:
    source = plain()
    target = plain(img_size=48, patch_size=4, in_chans=1)
    report = import_weights(target, source.state_dict())
    positions = resample_abs_pos_embed(source.pos_embed, [12, 12], [4, 4], num_prefix_tokens=1)
    weight = timm.models.adapt_input_conv(1, source.patch_embed.proj.weight)
    assert torch.equal(target.pos_embed, positions)
    assert torch.allclose(target.patch_embed.proj.weight, resample_patch_embed(weight, [4, 4]), atol=1e-6)
    assert torch.equal(target.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert len(report.reshaped) == 3 and report.share == 1


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_channels_as_timm_adapts_them(channels: int) -> None:
    weight = torch.randn(8, 3, 4, 4)
    assert torch.allclose(adapt_channels(weight, channels), timm.models.adapt_input_conv(channels, weight), atol=1e-6)
    grey = torch.full((1, 3, 4, 4), 0.7)  # an image of equal channels gives the same embedding
    wanted = torch.nn.functional.conv2d(grey, weight.mean(1, keepdim=True).expand_as(weight))
    adapted = adapt_channels(weight, 6)
    assert torch.allclose(torch.nn.functional.conv2d(grey.repeat(1, 2, 1, 1), adapted), wanted, atol=1e-4)


def test_the_form_of_ours_takes_original_weights_without_changing_the_function() -> None:
    source = plain()  # class position, no LayerScale
    target = create_encoder(EncoderConfig("vit_tiny_patch16_224", 8, 32, True, 0, 3, 64, 2, 1)).eval()
    report = import_weights(target, source.state_dict())
    assert difference(target, source) < 1e-5 and report.share == 1
    back = plain()
    import_weights(back, target.state_dict())  # and back: zeros for the class position
    assert difference(back, source) < 1e-5
    scaled = plain(init_values=0.5)
    folded = plain()
    import_weights(folded, scaled.state_dict())  # LayerScale multiplied in
    assert difference(folded, scaled) < 1e-5


def test_what_did_not_fit_is_printed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = dict(plain().state_dict())
    torch.save(state, tmp_path / "whole.pth")
    del state["norm.bias"]
    torch.save(state, tmp_path / "part.pth")
    load_encoder(str(tmp_path / "whole.pth"))
    assert capsys.readouterr().out == ""
    load_encoder(str(tmp_path / "part.pth"))
    told = capsys.readouterr().out
    assert "part.pth" in told and "1 missing" in told and "missing: norm.bias" in told
    monkeypatch.setattr("sslvit.encoder.weights.distributed.is_main", lambda: False)
    load_encoder(str(tmp_path / "part.pth"))
    assert capsys.readouterr().out == ""


def test_init_encoder_builds_the_config_and_fills_it(tmp_path: Path) -> None:
    torch.save(dict(plain().state_dict()), tmp_path / "dino.pth")
    config = EncoderConfig("vit_tiny_patch16_224", 8, 64, True, 4, 1, 64, 2, 1)
    encoder, report = init_encoder(load_encoder(str(tmp_path / "dino.pth")), config)
    assert encoder.pos_embed.shape == (1, 64, 64) and report.missing == ["reg_token"]
    assert "missing: reg_token" in str(report)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {n: t for n, t in s.items() if ".mlp.fc1." not in n},
        lambda s: {n: t for n, t in s.items() if not n.startswith("blocks.1.")},
        lambda s: s | {n.replace("blocks.1.", "blocks.2."): t for n, t in s.items() if n.startswith("blocks.1.")},
        lambda s: {n: t.repeat_interleave(2, 0) if n.endswith("fc1.weight") else t for n, t in s.items()},
    ],
    ids=["no fc1", "shallower", "deeper", "wider"],
)
def test_a_poor_match_is_an_error(change) -> None:
    state = change(dict(ours().state_dict()))
    with pytest.raises(InputError, match=r"only \d+\.\d% of the parameters match; missing: .*unexpected: ") as caught:
        import_weights(ours(), state)
    assert "\n" not in str(caught.value)


def test_the_guard_counts_parameters_not_names() -> None:
    state = dict(ours().state_dict())
    del state["norm.bias"], state["blocks.0.norm1.bias"]
    report = import_weights(ours(), state)
    assert report.missing == ["blocks.0.norm1.bias", "norm.bias"] and 0.99 < report.share < 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("vit_tinny_patch16_224", "did you mean 'vit_tiny_patch16_224'"),
        ("/nowhere/at/all", "no such run, folder, file or timm model"),
        ("resnet18?pretrained=false", "no timm VisionTransformer"),
        ("vit_tiny_patch16_224?pretrained=false&colour=blue", "timm cannot build"),
        ("vit_tiny_patch16_224?pretrained=perhaps", "pretrained is true or false"),
        ("vit_tiny_patch16_224?pretrained", "is no key=value"),
    ],
)
def test_what_is_no_encoder_is_said_in_one_line(spec: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_encoder(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "neither checkpoints/ nor config.json"),
        ({"config.json": "{}"}, "model_type '' is not one of"),
        ({"config.json": "{"}, "not readable as JSON"),
        ({"config.json": '{"model_type": "dinov3_convnext"}'}, "'dinov3_convnext' is not one of"),
        ({"open_clip_config.json": '{"model_cfg": {}}', "model.safetensors": ""}, "safely|cannot be read|no readable"),
        ({"config.json": '{"model_type": "vit"}'}, "no model.safetensors"),
        ({"config.json": '{"model_type": "vit"}', "model.safetensors": "nonsense"}, "safely"),
        ({"config.json": '{"model_type": "vit", "hidden_act": "swish"}'}, "hidden_act 'swish'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_folders_that_are_no_encoder(files: dict[str, str], words: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        load_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_encoder(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "linear.safetensors")
    with pytest.raises(InputError, match="no ViT in the checkpoint"):
        load_encoder(str(tmp_path / "linear.safetensors"))
    state = {n: t for n, t in plain(embed_dim=72, num_heads=3).state_dict().items()}
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=r"heads of a ViT of width 72 .*\?num_heads=N"):
        load_encoder(str(tmp_path / "odd.safetensors"))
    assert load_encoder(f"{tmp_path / 'odd.safetensors'}?num_heads=3").config.num_heads == 3
    with pytest.raises(InputError, match="'depth' is no option of a weights file"):
        load_encoder(f"{tmp_path / 'odd.safetensors'}?depth=3")


def test_inference_names_what_it_sees() -> None:
    for options in (
        {},
        {"qk_norm": True},
        {"pre_norm": True},
        {"qkv_bias": False},
        {"reg_tokens": 4},
        {"img_size": (32, 48)},
    ):
        encoder = plain(**options)
        found = infer_architecture(dict(encoder.state_dict()), img_size=options.get("img_size"))
        assert same(found.build(), Architecture(found.name, found.args).build())
        rebuilt = found.build()
        rebuilt.load_state_dict(encoder.state_dict(), strict=True)
        assert difference(rebuilt.eval(), encoder) < 1e-5
    args = model_args(OURS)
    assert json.loads(json.dumps(args)) == args
