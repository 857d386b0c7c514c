"""The vision-language model as a folder that transformers opens: `LlavaForConditionalGeneration` with its processor.

Written as JSON and safetensors under the key names transformers 4.57 and 5.x both load, without importing either. Our
encoder stands in it bit for bit (as `dinov2_with_registers` or its SigLIP twin). Not for connectors that class cannot
express. LLaVA-1.5, arXiv:2310.03744.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sslvit.encoder.config import Preprocessing
from sslvit.encoder.weights import LoadedEncoder
from sslvit.errors import InputError
from sslvit.exports.files import write_json, write_tensors
from sslvit.exports.hf_folder import hf_class
from sslvit.exports.processor import image_processor_config
from sslvit.exports.verify import VerificationError

WEIGHTS = "model.safetensors"
_NOT_THE_MODEL = frozenset(  # keys of every transformers config that say nothing about this language model
    {"transformers_version", "dtype", "torch_dtype", "attn_implementation", "output_hidden_states"}
    | {"output_attentions", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "problem_type"}
    | {"id2label", "label2id", "pretraining_tp"}
)


@dataclass(frozen=True)
class Writing:
    """How text is written: the tokenizer, its chat template, and the ids of its marks."""

    tokenizer: Any
    template: str
    image_id: int
    end_id: int
    pad_id: int


def check_llava(loaded: LoadedEncoder) -> None:
    """InputError with the reason when no LLaVA folder can hold the encoder exactly; asked before training."""
    try:
        hf_class(loaded.module)
    except InputError as error:
        raise InputError(f"{loaded.source}: a vision-language folder cannot hold it; {error}") from None
    channels = loaded.preprocessing.channels
    if channels not in (1, 3):
        raise InputError(
            f"{loaded.source}: it expects {channels} channels, and transformers' image processors read grey or RGB; "
            "align an encoder of 1 or 3 channels"
        )


def write_llava_folder(
    folder: Path,
    *,
    vision: tuple[Mapping[str, Any], Mapping[str, Tensor]],
    connector: Mapping[str, Tensor],
    language: tuple[Mapping[str, Any], Mapping[str, Tensor]],
    writing: Writing,
    preprocessing: Preprocessing,
) -> None:
    """Fills `folder` (existing, empty) with the model, tokenizer, processor and chat template; the card comes later.

    `vision` and `language` are (config, tensors) as transformers names them; `connector` holds `linear_1.*` and
    `linear_2.*`. Tensors are written as they are.
    """
    (vision_config, vision_tensors), (text_config, language_tensors) = vision, language
    tensors = llava_tensors(vision_tensors, connector, language_tensors)
    write_tensors(folder / WEIGHTS, tensors)
    compare_weights(folder, tensors)
    write_json(folder / "config.json", llava_config(vision_config, text_config, writing, preprocessing))
    write_json(folder / "generation_config.json", _generation_config(writing))
    _write_processor(folder, vision_config, preprocessing)
    _write_tokenizer(folder, writing)
    (folder / "chat_template.jinja").write_text(writing.template, encoding="utf-8")


def llava_tensors(
    vision: Mapping[str, Tensor], connector: Mapping[str, Tensor], language: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of the folder under the names transformers gives them there."""
    parts = {"vision_tower": vision, "multi_modal_projector": connector, "language_model": language}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def compare_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """VerificationError unless the folder, read back, holds exactly these tensors, each bit for bit in fp32."""
    written = load_file(folder / WEIGHTS)
    if strange := sorted(written.keys() ^ tensors.keys()):
        raise VerificationError(f"{folder.name}: weights missing or left over: {', '.join(strange[:4])}")
    for name, tensor in tensors.items():
        if not torch.equal(written[name], tensor.detach().cpu().float()):
            raise VerificationError(f"{folder.name}: {name} is not bit for bit what was trained")


def llava_config(
    vision_config: Mapping[str, Any], text_config: Mapping[str, Any], writing: Writing, preprocessing: Preprocessing
) -> dict[str, Any]:
    """config.json. `full` keeps class token and registers; layer -1 is the last block before the final norm."""
    text = portable_text_config(text_config)
    grid = (preprocessing.image_size // int(vision_config["patch_size"])) ** 2
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": writing.image_id,
        "image_seq_length": grid + additional_tokens(vision_config),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "pad_token_id": writing.pad_id,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "vision_config": dict(vision_config),
        "text_config": text,
        "torch_dtype": "float32",
    }


def additional_tokens(vision_config: Mapping[str, Any]) -> int:
    """Image tokens that are no patches: class token and registers."""
    if "siglip" in vision_config["model_type"]:
        return 0
    return 1 + int(vision_config.get("num_register_tokens", 0))


def portable_text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's config without facts of this machine, with rotary settings under their old names too."""
    text = {name: value for name, value in config.items() if name not in _NOT_THE_MODEL and not name.startswith("_")}
    if not text.get("architectures"):
        text.pop("architectures", None)
        if config.get("model_type") == "llama":
            text["architectures"] = ["LlamaForCausalLM"]  # vLLM looks the class up by this name
    rope = text.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        text["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            text["rope_scaling"] = dict(rope)
    return text


def _generation_config(writing: Writing) -> dict[str, Any]:
    return {"do_sample": False, "eos_token_id": writing.end_id, "pad_token_id": writing.pad_id, "max_new_tokens": 64}


def _write_processor(folder: Path, vision_config: Mapping[str, Any], preprocessing: Preprocessing) -> None:
    """What turns an image into pixels and `<image>` into as many tokens as the encoder gives."""
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": int(vision_config["patch_size"]),
        "num_additional_image_tokens": additional_tokens(vision_config),
        "vision_feature_select_strategy": "full",
    }
    images = {**image_processor_config(preprocessing), "processor_class": "LlavaProcessor"}
    write_json(folder / "preprocessor_config.json", images)
    write_json(folder / "processor_config.json", processor)


def _write_tokenizer(folder: Path, writing: Writing) -> None:
    """tokenizer.json as it is; tokenizer_config.json with the class name and special tokens both versions read."""
    writing.tokenizer.save_pretrained(str(folder))
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") in (None, "TokenizersBackend", "PreTrainedTokenizer"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.pop("extra_special_tokens", None) or []
    if isinstance(extra, list):
        config["additional_special_tokens"] = list(
            dict.fromkeys([*config.get("additional_special_tokens", []), *extra])
        )
    config["padding_side"] = "left"
    config["model_input_names"] = ["input_ids", "attention_mask"]  # 4.57 adds token_type_ids, which LLaVA refuses
    config["processor_class"] = "LlavaProcessor"
    splits = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    if "add_prefix_space" in splits:  # 4.57 overrides it, with false unless this file says otherwise
        config["add_prefix_space"] = splits["add_prefix_space"]
    for name in ("name_or_path", "backend", "is_local", "local_files_only", "chat_template"):
        config.pop(name, None)
    write_json(file, config)
