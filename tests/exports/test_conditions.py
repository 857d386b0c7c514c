"""What tools that are not installed here ask of our folders: their key names and configs, and an independent forward.

The conditions were read in the sources of nanoVLM (models/vision_transformer.py), LLaVA-NeXT (multimodal_encoder/),
vLLM (models/llava.py, models/siglip.py) and lmms-eval (models/simple/llava_hf.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from formats import encoder, write_untrained_vlm
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from sslvit.exports.formats import write_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that are opened
BLOCK = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")))


def keys_of_a_siglip_loader(depth: int) -> set[str]:
    """Every key nanoVLM copies and LLaVA-NeXT's tower holds, but for the pooling head, which both leave out."""
    stems = ["embeddings.patch_embedding", "post_layernorm"]
    stems += [f"encoder.layers.{i}.{stem}" for i in range(depth) for stem in BLOCK]
    keys = {f"vision_model.{stem}.{suffix}" for stem in stems for suffix in ("weight", "bias")}
    return keys | {"vision_model.embeddings.position_embedding.weight"}


def plain_siglip(tensors: dict[str, Tensor], config: dict, pixels: Tensor) -> Tensor:
    """(B, N, D) after the final norm: a SigLIP tower in plain functions, as nanoVLM's ViT computes it."""
    t = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    eps, heads, width = config["layer_norm_eps"], config["num_attention_heads"], config["hidden_size"]

    def linear(x: Tensor, stem: str) -> Tensor:
        return x @ t[f"{stem}.weight"].T + t[f"{stem}.bias"]

    def norm(x: Tensor, stem: str) -> Tensor:
        return F.layer_norm(x, (width,), t[f"{stem}.weight"], t[f"{stem}.bias"], eps)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    weight, bias = t["embeddings.patch_embedding.weight"], t["embeddings.patch_embedding.bias"]
    x = F.conv2d(pixels, weight, bias, stride=config["patch_size"]).flatten(2).transpose(1, 2)
    x = x + t["embeddings.position_embedding.weight"]
    for i in range(config["num_hidden_layers"]):
        block = f"encoder.layers.{i}"
        y = norm(x, f"{block}.layer_norm1")
        q, k, v = (split(linear(y, f"{block}.self_attn.{name}_proj")) for name in "qkv")
        mixed = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{block}.self_attn.out_proj")
        hidden = F.gelu(linear(norm(x, f"{block}.layer_norm2"), f"{block}.mlp.fc1"), approximate="tanh")
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "post_layernorm")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    write_folder(encoder("twin"), "siglip", folder)
    return folder


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    write_untrained_vlm(encoder("twin"), folder)
    return folder


@torch.no_grad()
def test_the_siglip_folder_has_the_keys_other_loaders_copy_and_computes_the_same(siglip: Path) -> None:
    tensors, config = load_file(siglip / "model.safetensors"), json.loads((siglip / "config.json").read_text())
    assert set(tensors) == keys_of_a_siglip_loader(config["num_hidden_layers"])
    assert config["model_type"] == "siglip_vision_model" and config["hidden_act"] == "gelu_pytorch_tanh"
    for name in ("hidden_size", "intermediate_size", "image_size", "patch_size", "attention_dropout"):
        assert name in config, f"nanoVLM reads {name}"
    images = torch.randn(2, 3, 32, 32)
    difference = plain_siglip(tensors, config, images) - encoder("twin").module.forward_features(images)
    assert difference.abs().max() < 1e-5


def test_vllms_conditions(vlm: Path) -> None:
    pytest.importorskip("transformers", reason="needs sslvit[vlm]")
    from transformers import AutoConfig, AutoProcessor, LlavaConfig, SiglipVisionConfig

    config = AutoConfig.from_pretrained(vlm)
    assert type(config) is LlavaConfig and type(config.vision_config) is SiglipVisionConfig
    assert config.vision_config.vision_use_head is False, "else it looks for a pooling head"
    assert config.text_config.architectures == ["LlamaForCausalLM"], "it finds the language model by this name"
    assert config.vision_feature_select_strategy == "full" and config.vision_feature_layer == -1
    assert config.projector_hidden_act == "gelu" and config.multimodal_projector_bias is True
    side = config.vision_config.image_size
    processor = AutoProcessor.from_pretrained(vlm)
    inputs = processor(images=Image.new("RGB", (100, 41)), text=processor.image_token, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, side, side), "any other size is refused"
    patches = (side // config.vision_config.patch_size) ** 2
    image_id = json.loads((vlm / "config.json").read_text())["image_token_index"]
    assert int((inputs["input_ids"] == image_id).sum()) == patches
    names = set(load_file(vlm / "model.safetensors"))
    prefixes = (
        "vision_tower.vision_model.",
        "multi_modal_projector.linear_",
        "language_model.model.",
        "language_model.lm_head.",
    )
    assert all(name.startswith(prefixes) for name in names)
    assert {f"vision_tower.{key}" for key in keys_of_a_siglip_loader(2)} < names


@torch.no_grad()
def test_lmms_evals_conditions(vlm: Path) -> None:
    """Its `llava_hf` adapter, call by call."""
    pytest.importorskip("transformers", reason="needs sslvit[vlm]")
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

    assert AutoConfig.from_pretrained(vlm).model_type == "llava", "its table of models is by this name"
    model = LlavaForConditionalGeneration.from_pretrained(
        vlm, revision="main", dtype="auto", device_map="cpu", trust_remote_code=False, attn_implementation=None
    )
    processor = AutoProcessor.from_pretrained(vlm, revision="main", trust_remote_code=False)
    tokenizer = processor.tokenizer
    assert tokenizer.chat_template is not None, "else Vicuna's words are used without a warning"
    assert tokenizer.decode(tokenizer.eos_token_id) == "<|end|>"
    messages = [{"role": "user", "content": "<image>\nWhat is there?"}, {"role": "assistant", "content": "a star"}]
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    assert prompt.count("<image>") == 1 and whole.startswith(prompt) and whole.endswith("a star<|end|>")
    pictures = [Image.new("RGB", (50, 40), (200, 10, 10))]
    inputs = processor(images=pictures, text=prompt, return_tensors="pt").to("cpu", model.dtype)
    settings = {"temperature": None, "top_p": None, "num_beams": 1, "max_new_tokens": 4, "use_cache": True}
    end = tokenizer.eos_token_id
    ids = model.generate(**inputs, do_sample=False, **settings, pad_token_id=end, eos_token_id=end)
    text = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[-1] :], skip_special_tokens=True)[0]
    assert isinstance(text, str)
    labels = processor(images=pictures, text=[whole], return_tensors="pt").to("cpu", model.dtype)
    assert model(**labels, labels=labels["input_ids"]).loss.isfinite()
