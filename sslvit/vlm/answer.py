"""Greedy answers to many questions about many images, each image read once.

The image prefix goes through the language model once; its keys and values are then shared by all questions of the
image, and finished answers leave the batch. Gives what `generate(do_sample=False)` gives for each question alone;
`sslvit ask` uses transformers itself. Not sampling and not beam search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslvit.vlm.language import body_and_head
from sslvit.vlm.model import VisionLanguage


@torch.no_grad()
def greedy(
    model: VisionLanguage,
    tokens: Tensor | None,
    prompts: Sequence[Sequence[list[int]]],
    *,
    end_id: int,
    pad_id: int,
    max_new_tokens: int,
) -> list[list[list[int]]]:
    """Generated token ids, without the end token, for every prompt of every image.

    tokens: (B, P, D) image tokens or None; prompts[b]: the prompts asked about image b, as token ids.
    """
    image_of = [b for b, asked in enumerate(prompts) for _ in asked]
    flat = [prompt for asked in prompts for prompt in asked]
    answers = _decode(model, model.prefix(tokens, len(prompts)), flat, image_of, end_id, pad_id, max_new_tokens)
    given = iter(answers)
    return [[next(given) for _ in asked] for asked in prompts]


def _decode(
    model: VisionLanguage,
    prefix: Tensor,
    prompts: list[list[int]],
    image_of: list[int],
    end_id: int,
    pad_id: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """The generation loop over rows = questions, left-padded behind their image's keys and values."""
    body, head = body_and_head(model.lm)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # questions still being answered
    device = prefix.device
    cache = _prefix_cache(body, prefix, torch.tensor(image_of, device=device))
    length = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (length - len(p)) + p for p in prompts], device=device)
    written = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    seen = torch.cat([written.new_ones(len(prompts), prefix.shape[1]), written], dim=1)
    place = prefix.shape[1] + (written.cumsum(1) - 1).clamp_min(0)
    for _ in range(max_new_tokens):
        output = body(input_ids=ids, attention_mask=seen, position_ids=place, past_key_values=cache, use_cache=True)
        chosen = head(output.last_hidden_state[:, -1]).argmax(-1)
        going = [k for k, token in enumerate(chosen.tolist()) if token != end_id]
        for k in going:
            answers[rows[k]].append(int(chosen[k]))
        if not going:
            break
        cache, rows = output.past_key_values, [rows[k] for k in going]
        keep = torch.tensor(going, device=device)
        if len(going) < len(chosen):
            cache.batch_select_indices(keep)
        ids, place = chosen[keep][:, None], place[keep, -1:] + 1
        seen = torch.cat([seen[keep], seen.new_ones(len(going), 1)], dim=1)
    return answers


def _prefix_cache(body: Any, prefix: Tensor, image_of: Tensor) -> Any:
    """Keys and values of each question's image, (questions, heads, P, d) in every layer."""
    from transformers import DynamicCache

    if prefix.shape[1] == 0:
        return DynamicCache()
    cache = body(inputs_embeds=prefix, use_cache=True).past_key_values
    cache.batch_select_indices(image_of)
    return cache
