"""Turns laid out as blocks must compute exactly what each turn computes alone."""

import numpy as np
import pytest
import torch
from vlm_fixtures import small_language, small_model

from sslvit.vlm import blocks as blocks_module
from sslvit.vlm.blocks import IGNORED, TokenTurn, attention_mask, lay_out, positions

P = 5  # image tokens


@pytest.fixture(scope="module")
def model():
    return small_model(vision_dim=12, seed=1)


def random_turns(count, seed, low=3, high=9):
    generator = np.random.default_rng(seed)
    return [
        TokenTurn(
            generator.integers(5, 60, generator.integers(low, high)).tolist(), generator.integers(5, 60, 2).tolist()
        )
        for _ in range(count)
    ]


def logits_of(model, tokens, rows):
    return model.predict(tokens, lay_out(rows, end_id=1, pad_id=0, whole=True))


def test_layout_of_two_turns():
    row = [TokenTurn([7, 8, 9], [4]), TokenTurn([7, 6], [3, 2])]
    blocks = lay_out([row, row[:1]], end_id=1, pad_id=0)
    assert blocks.ids.tolist() == [[7, 8, 9, 4, 7, 6, 3, 2], [7, 8, 9, 4, 0, 0, 0, 0]]
    assert blocks.turn.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, -1, -1, -1, -1]]
    assert blocks.offset.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 0, 0, 0, 0]]
    i = IGNORED
    assert blocks.targets.tolist() == [[i, i, 4, 1, i, 3, 2, 1], [i, i, 4, 1, i, i, i, i]]
    whole = lay_out([row], end_id=1, pad_id=0, whole=True)
    assert whole.targets.tolist() == [[8, 9, 4, 1, 6, 3, 2, 1]]


def test_mask_against_its_definition():
    blocks = lay_out([random_turns(3, 0), random_turns(1, 1)], end_id=1, pad_id=0)
    mask = attention_mask(blocks, P)[:, 0] == 0
    for row in range(2):
        turn = [-2] * P + blocks.turn[row].tolist()
        for i in range(len(turn)):
            for j in range(len(turn)):
                assert mask[row, i, j] == (j <= i and (j < P or turn[i] == turn[j]))
    assert positions(blocks, P)[0, P:].tolist() == [P + o for o in blocks.offset[0].tolist()]


def test_each_turn_is_what_it_is_alone(model):
    turns, tokens = random_turns(6, 3), torch.randn(1, P, 12)
    together = logits_of(model, tokens, [turns])
    for number, turn in enumerate(turns):
        alone = logits_of(model, tokens, [[turn]])
        torch.testing.assert_close(together.logits[together.turn == number], alone.logits, atol=2e-5, rtol=1e-4)


def leak(model, tokens):
    """How far the last turn's logits move when the first turn changes."""
    turns = random_turns(3, 4)
    changed = [TokenTurn([t + 1 for t in turns[0].prompt], turns[0].answer), *turns[1:]]
    with torch.no_grad():
        one, two = logits_of(model, tokens, [turns]), logits_of(model, tokens, [changed])
    return float((one.logits[one.turn == 2] - two.logits[two.turn == 2]).abs().max())


def test_no_turn_sees_another_but_all_see_the_image(model):
    tokens = torch.randn(1, P, 12)
    assert leak(model, tokens) == 0.0
    turns = random_turns(3, 4)
    moved = logits_of(model, tokens + 1.0, [turns]).logits - logits_of(model, tokens, [turns]).logits
    assert float(moved.detach().abs().max()) > 1e-3


def test_a_plain_causal_mask_would_leak(model, monkeypatch):
    def causal(blocks, prefix, dtype=torch.float32):
        length = prefix + blocks.ids.shape[1]
        full = torch.full((length, length), torch.finfo(dtype).min).triu(1)
        return full.expand(len(blocks.ids), 1, length, length)

    monkeypatch.setattr("sslvit.vlm.model.attention_mask", causal)
    assert leak(model, torch.randn(1, P, 12)) > 1e-4


def test_positions_that_count_on_would_differ(model, monkeypatch):
    turns, tokens = random_turns(2, 5), torch.randn(1, P, 12)
    alone = logits_of(model, tokens, [turns[1:]])

    def counting(blocks, prefix):
        return torch.arange(prefix + blocks.ids.shape[1]).expand(len(blocks.ids), -1)

    monkeypatch.setattr("sslvit.vlm.model.positions", counting)
    together = logits_of(model, tokens, [turns])
    assert float((together.logits[together.turn == 1] - alone.logits).detach().abs().max()) > 1e-4


def test_padding_changes_nothing(model):
    turns, tokens = random_turns(1, 6), torch.randn(1, P, 12)
    alone = logits_of(model, tokens, [turns])
    padded = logits_of(model, tokens.expand(2, -1, -1), [turns, random_turns(5, 7)])
    torch.testing.assert_close(padded.logits[padded.row == 0], alone.logits, atol=2e-5, rtol=1e-4)


def test_blocks_move_together():
    blocks = lay_out([random_turns(1, 0)], end_id=1, pad_id=0).to("cpu")
    assert isinstance(blocks, blocks_module.Blocks)


def test_small_language_is_small():
    assert sum(p.numel() for p in small_language().lm.parameters()) < 200_000
