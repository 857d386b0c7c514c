"""Many questions over one image in one pass: turns laid out as blocks that do not see each other.

A row is [image tokens][turn][turn]...[padding]. Each turn attends to the image and to itself, and its positions begin
where the image ends, so that every turn computes what it would compute alone: training on eight turns at once is
training on eight prompts, for one encoder pass and one image prefix. Not packing of several images into one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


@dataclass
class Blocks:
    """Turns of B images, T tokens a row.

    ids (B, T) int64 token ids; turn (B, T) int64 number of the turn in its row, -1 for padding; offset (B, T) int64
    position inside the turn; targets (B, T) int64 the token to predict *after* this one, `IGNORED` where none.
    """

    ids: Tensor
    turn: Tensor
    offset: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> Blocks:
        """The same blocks on another device."""
        return Blocks(*(t.to(device) for t in (self.ids, self.turn, self.offset, self.targets)))


@dataclass
class TokenTurn:
    """One turn as tokens: the prompt after the image, the answer, without the end token."""

    prompt: list[int]
    answer: list[int]


def lay_out(rows: Sequence[Sequence[TokenTurn]], end_id: int, pad_id: int, *, whole: bool = False) -> Blocks:
    """Blocks of `rows` (one list of turns per image).

    Targets are the answer and its end token; with `whole=True` every token of the turn is a target as well (language
    modelling). The end token is only ever predicted, so it takes no place in the row.
    """
    columns: list[list[list[int]]] = [[], [], [], []]
    for row in rows:
        ids, turn, offset, targets = [], [], [], []  # type: ignore[var-annotated]
        for number, tokens in enumerate(row):
            text = [*tokens.prompt, *tokens.answer]
            hidden = 0 if whole else len(tokens.prompt) - 1
            ids += text
            turn += [number] * len(text)
            offset += range(len(text))
            targets += [IGNORED] * hidden + [*text, end_id][hidden + 1 :]
        for column, values in zip(columns, (ids, turn, offset, targets), strict=True):
            column.append(values)
    fills = (pad_id, -1, 0, IGNORED)
    return Blocks(*(_padded(column, fill) for column, fill in zip(columns, fills, strict=True)))


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    """(B, T) int64, each row filled up to the longest."""
    length = max(1, max(len(row) for row in rows))
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.int64)


def positions(blocks: Blocks, prefix: int) -> Tensor:
    """Position ids (B, prefix + T): the image counts up, every turn goes on from there."""
    image = torch.arange(prefix, device=blocks.ids.device).expand(len(blocks.ids), prefix)
    return torch.cat([image, blocks.offset + prefix], dim=1)


def attention_mask(blocks: Blocks, prefix: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Additive mask (B, 1, L, L), L = prefix + T: causal, and between turns only through the image."""
    rows, length = len(blocks.ids), prefix + blocks.ids.shape[1]
    image = blocks.turn.new_full((rows, prefix), -2)
    turn = torch.cat([image, blocks.turn], dim=1)
    order = torch.arange(length, device=turn.device)
    causal = order[:, None] >= order[None, :]
    seen = (turn[:, :, None] == turn[:, None, :]) | (turn == -2)[:, None, :]
    mask = torch.zeros(rows, 1, length, length, dtype=dtype, device=turn.device)
    return mask.masked_fill_(~(seen & causal)[:, None], torch.finfo(dtype).min)
