"""The language model and its tokenizer: the bundled small one, trained here from nothing, or any given one.

The model is transformers' LlamaForCausalLM and the tokenizer trainer that of `tokenizers`; neither is written here.
The layout is LLaVA-1.5's (arXiv:2310.03744): a causal language model that reads image tokens inline.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslvit import distributed
from sslvit.errors import InputError
from sslvit.run_folder import write_atomically
from sslvit.vlm.chat import IMAGE_TOKEN, Chat, special_id
from sslvit.vlm.config import LanguageConfig, LoraConfig

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"


@dataclass
class Language:
    """A causal language model (`lm.model`, `lm.lm_head`) and how text is written for it."""

    lm: Any
    chat: Chat
    source: str
    license: str | None = None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE (GPT-2's) trained on `texts`, as a transformers fast tokenizer.

    Frequent words become single tokens, any other text falls back to bytes. A space is put before each part between
    special tokens, so that a word is the same token at the start of an answer as inside a question.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = [PAD, END, IMAGE_TOKEN, USER, ASSISTANT]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, 256 + len(specials)),
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _fast_tokenizer(tokenizer)


def kept_tokenizer(file: Path, texts: Callable[[], Iterable[str]], vocab_size: int) -> Any:
    """The tokenizer in `file`; the first time it is trained on `texts()` and put there."""
    from tokenizers import Tokenizer

    if file.is_file():
        return _fast_tokenizer(Tokenizer.from_file(str(file)))
    tokenizer = train_tokenizer(texts(), vocab_size)
    if distributed.is_main():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, tokenizer.backend_tokenizer.to_str(pretty=False))
    return tokenizer


def _fast_tokenizer(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[IMAGE_TOKEN, USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def bundled_language(tokenizer: Any, config: LanguageConfig, seed: int) -> Language:
    """The small Llama-layout model with random weights from `seed`, for a tokenizer of `train_tokenizer`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if config.hidden_size % config.num_heads or (config.hidden_size // config.num_heads) % 2:
        raise InputError(
            f"language.hidden_size {config.hidden_size}: must be num_heads ({config.num_heads}) times an even number"
        )
    chat = bundled_chat(tokenizer)
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=config.max_length,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        attention_bias=False,
        initializer_range=config.hidden_size**-0.5,  # unit gain at any width; Llama's 0.02 is that of width 2,500
        bos_token_id=None,
        eos_token_id=chat.end_id,
        pad_token_id=chat.pad_id,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = LlamaForCausalLM(llama)
    return Language(lm, chat, source="bundled")


def bundled_chat(tokenizer: Any) -> Chat:
    """The chat of a tokenizer made by `train_tokenizer`."""
    return Chat(
        tokenizer,
        user=USER,
        assistant=ASSISTANT,
        answer_prefix="",
        image_id=special_id(tokenizer, IMAGE_TOKEN),
        end_id=special_id(tokenizer, END),
        pad_id=special_id(tokenizer, PAD),
    )


def given_language(path: str, lora: LoraConfig | None, seed: int) -> Language:
    """A causal language model and its tokenizer from a local folder or the hub.

    The vocabulary grows by `<image>` (and a pad token if there is none). Raises InputError when nothing opens there or
    when the model's weights do not have the `model.` / `lm_head.` layout that a LLaVA folder needs.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"lm={path}: no causal language model opens there ({reason})") from error
    foreign = [name for name in lm.state_dict() if not name.startswith(("model.", "lm_head."))]
    if foreign or not getattr(tokenizer, "is_fast", False):
        what = f"its weights are named {foreign[0]}" if foreign else "it has no fast tokenizer"
        raise InputError(f"lm={path}: {what}; a LLaVA folder needs a Llama-layout model (model.*, lm_head.*)")
    chat = _given_chat(tokenizer, path)
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lm.resize_token_embeddings(len(tokenizer))
    return Language(_with_lora(lm, lora, seed) if lora else lm, chat, source=path, license=_license(path))


def _given_chat(tokenizer: Any, path: str) -> Chat:
    """Plain words mark the parts, so that nothing but `<image>` has to be learned from scratch."""
    if tokenizer.eos_token_id is None:
        raise InputError(f"lm={path}: its tokenizer has no end-of-text token; set eos_token in tokenizer_config.json")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return Chat(
        tokenizer,
        user="USER: ",
        assistant="\nASSISTANT:",
        answer_prefix=" ",
        image_id=special_id(tokenizer, IMAGE_TOKEN),
        end_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )


def _with_lora(lm: Any, config: LoraConfig, seed: int) -> Any:
    """Low-rank adapters on every linear layer of the blocks (arXiv:2106.09685), through peft."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        return get_peft_model(lm, settings)


def merged(lm: Any) -> Any:
    """The plain model: LoRA adapters, if any, added into its weights."""
    return lm.merge_and_unload() if hasattr(lm, "merge_and_unload") else lm


def body_and_head(lm: Any) -> tuple[Any, Any]:
    """The blocks (embeddings in, hidden states out) and the output layer of a causal model, LoRA or not."""
    plain = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    return plain.model, plain.lm_head


def language_tensors(lm: Any) -> dict[str, Tensor]:
    """The model's weights under transformers' names; an output layer that is the embedding is not named twice."""
    tensors = dict(lm.state_dict())
    if getattr(lm.config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    return tensors


def _license(path: str) -> str | None:
    """The licence a model card states in its header, if there is a card."""
    card = Path(path) / "README.md"
    if not card.is_file():
        return None
    for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:60]:
        if line.startswith("license:"):
            return line.split(":", 1)[1].strip() or None
    return None
