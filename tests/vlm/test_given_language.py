"""A given Hugging Face language model instead of the bundled one, with and without LoRA."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_vlm import settings, stage
from vlm_fixtures import small_tokenizer

from sslvit.checkpoint import checkpoint_path, load_checkpoint
from sslvit.errors import InputError
from sslvit.verbs.align import align
from sslvit.verbs.ask import ask
from sslvit.vlm.language import given_language, merged

OLD_NAME_IN_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def write_model(folder, *, tied=False, kind="llama", bos=False):
    """A local Hugging Face folder with random weights and a tokenizer that knows nothing of images."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    tokenizer = Tokenizer.from_str(_without_special_tokens(small_tokenizer().backend_tokenizer.to_str()))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["</s>", "<s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")
    fast.save_pretrained(folder)
    sizes = {"vocab_size": len(fast), "tie_word_embeddings": tied, "eos_token_id": fast.eos_token_id}
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, **sizes))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**common, num_key_value_heads=1, max_position_embeddings=128, **sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=1, max_position_embeddings=128, **sizes))
    model.save_pretrained(folder)
    return folder


def _without_special_tokens(text):
    facts = json.loads(text)
    facts["added_tokens"] = []
    return json.dumps(facts)


def tiny(**changes):
    return settings(
        text=stage(0), connector=stage(2), instruct=stage(3), controls=[], data="scenes:?n=12&size=32", **changes
    )


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"kind": "qwen2", "tied": True}, {"bos": True}])
def test_a_given_model_takes_the_place_of_the_bundled_one(tmp_path, options):
    """align itself compares the written folder with what was trained, so a finished run is an exact folder."""
    from PIL import Image

    folder = write_model(tmp_path / "lm", **options)
    run = align(output_dir=tmp_path / "run", **tiny(lm=str(folder)))
    config = json.loads((run / "vlm" / "config.json").read_text())
    assert config["text_config"]["model_type"] == options.get("kind", "llama")
    assert config["tie_word_embeddings"] == options.get("tied", False)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    assert isinstance(ask(run, image=tmp_path / "a.png", question="How many?"), str)


@OLD_NAME_IN_PEFT
def test_lora_trains_adapters_and_is_merged(tmp_path):
    folder = write_model(tmp_path / "lm")
    run = align(output_dir=tmp_path / "run", **tiny(lm=str(folder), lora={"rank": 2}))
    before, after = load_file(folder / "model.safetensors"), load_file(run / "vlm" / "model.safetensors")
    names = {name.removeprefix("language_model.") for name in after if name.startswith("language_model.")}
    assert names == set(before), "adapters are merged, nothing is renamed"
    saved, _ = load_checkpoint(checkpoint_path(run / "stages" / "instruct" / "checkpoints", 3), stems=["model"])
    assert all("lora_" in name for name in saved["model"] if name.startswith("learning.lm"))
    query = "model.layers.0.self_attn.q_proj.weight"
    moved = after[f"language_model.{query}"] - before[query]
    assert 0 < torch.linalg.matrix_rank(moved) <= 2
    norm = "model.norm.weight"
    assert torch.equal(after[f"language_model.{norm}"], before[norm])


@OLD_NAME_IN_PEFT
def test_merged_adapters_compute_the_same(tmp_path):
    from sslvit.vlm.config import LoraConfig
    from sslvit.vlm.language import body_and_head

    language = given_language(str(write_model(tmp_path / "lm")), LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in language.lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.arange(7, 19)[None]
    language.lm.eval()
    with torch.no_grad():
        apart = body_and_head(language.lm)[0](input_ids=ids).last_hidden_state
        whole = body_and_head(merged(language.lm))[0](input_ids=ids).last_hidden_state
    torch.testing.assert_close(apart, whole, atol=1e-5, rtol=1e-4)


def test_begin_of_text_stands_before_the_image(tmp_path):
    language = given_language(str(write_model(tmp_path / "lm", bos=True)), None, seed=0)
    assert language.chat.before_image() == [language.chat.tokenizer.bos_token_id]
    assert language.chat.prompts(["Hi?"])[0][0] != language.chat.tokenizer.bos_token_id


def test_other_layouts_are_refused(tmp_path):
    with pytest.raises(InputError, match="Llama-layout"):
        given_language(str(write_model(tmp_path / "lm", kind="gpt2")), None, seed=0)
    with pytest.raises(InputError, match="no causal language model"):
        given_language(str(tmp_path), None, seed=0)
