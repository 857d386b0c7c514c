"""Encoder, connector and language model as one network while they are trained.

What is saved and served is transformers' LlavaForConditionalGeneration with the same weights
(exports/llava_folder.py); this module only adds the block layout that makes training cheap. LLaVA-1.5,
arXiv:2310.03744.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslvit.encoder.vit import Encoder, forward_tokens
from sslvit.vlm.blocks import IGNORED, Blocks, attention_mask, positions
from sslvit.vlm.language import body_and_head

UNREAD = ("norm.", "fc_norm.", "attn_pool.", "head.")  # what an encoder does after its blocks: not in `image_tokens`


def image_tokens(encoder: Encoder, images: Tensor) -> Tensor:
    """What the connector reads, (B, P, D): class token, registers and patches before the final norm.

    Before the norm because LLaVA takes `hidden_states[-1]`; images (B, C, H, W) normalised float.
    """
    return forward_tokens(encoder, images, norm=False).all


@dataclass
class Predictions:
    """At every supervised place, S in all: logits (S, V), targets (S,), row (S,) and turn (S,) it belongs to."""

    logits: Tensor
    targets: Tensor
    row: Tensor
    turn: Tensor


class VisionLanguage(nn.Module):
    """`encoder` and `connector` may be None: a language model that sees nothing (the blind control, the text stage)."""

    encoder: Encoder | None
    connector: nn.Module | None
    lm: Any  # a transformers causal model, with or without LoRA adapters

    def __init__(self, encoder: Encoder | None, connector: nn.Module | None, lm: Any, before: list[int]):
        super().__init__()
        self.encoder = encoder
        self.connector = connector
        self.lm = lm
        self.before = list(before)  # token ids in front of the image, e.g. begin-of-text

    def prefix(self, tokens: Tensor | None, rows: int) -> Tensor:
        """Embeddings every turn of a row may see, (rows, P, H): what stands before the image, then the image."""
        embed = body_and_head(self.lm)[0].get_input_embeddings()
        ids = torch.tensor(self.before, dtype=torch.int64, device=embed.weight.device)
        start = embed(ids).expand(rows, len(self.before), -1)
        if tokens is None or self.connector is None:
            return start
        return torch.cat([start, self.connector(tokens).to(start.dtype)], dim=1)

    def predict(self, tokens: Tensor | None, blocks: Blocks) -> Predictions:
        """Logits at the supervised places only. tokens: (B, P, D) of `image_tokens`, or None for no image."""
        body, head = body_and_head(self.lm)
        prefix = self.prefix(tokens, len(blocks.ids))
        length = prefix.shape[1]
        text = body.get_input_embeddings()(blocks.ids)
        hidden = body(
            inputs_embeds=torch.cat([prefix, text], dim=1),
            attention_mask=attention_mask(blocks, length, text.dtype),
            position_ids=positions(blocks, length),
            use_cache=False,
        ).last_hidden_state[:, length:]
        row, column = (blocks.targets != IGNORED).nonzero(as_tuple=True)
        return Predictions(head(hidden[row, column]), blocks.targets[row, column], row, blocks.turn[row, column])


def answer_loss(predictions: Predictions) -> Tensor:
    """Mean negative log likelihood in nats over the supervised tokens, in fp32."""
    return F.cross_entropy(predictions.logits.float(), predictions.targets)
