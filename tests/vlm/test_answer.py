"""Our batched greedy answers against transformers' own generate, one question at a time."""

import pytest
import torch
from vlm_fixtures import small_model

from sslvit.vlm.answer import greedy

PAD, P = 0, 4


def one_by_one(model, tokens, prompt, end_id, max_new_tokens):
    """transformers' greedy search from the embeddings of one prompt."""
    lm = model.lm
    text = lm.get_input_embeddings()(torch.tensor([prompt]))
    embeds = torch.cat([model.prefix(tokens, 1), text], dim=1)
    out = lm.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end_id,
        pad_token_id=PAD,
    )[0].tolist()
    return out[: out.index(end_id)] if end_id in out else out


@pytest.mark.parametrize("before", [(), (3,)])
def test_equal_to_generate_one_by_one(before):
    model = small_model(seed=3, before=before)
    tokens = torch.randn(3, P, 12, generator=torch.Generator().manual_seed(0))
    prompts = [[[7, 8, 9], [20, 21]], [[30]], [[9, 9, 9, 9, 9, 9], [40, 41, 42], [50]]]
    endless = greedy(model, tokens, prompts, end_id=-1, pad_id=PAD, max_new_tokens=12)
    end_id = endless[0][0][4]  # so that one answer ends early
    ours = greedy(model, tokens, prompts, end_id=end_id, pad_id=PAD, max_new_tokens=12)
    with torch.no_grad():
        expected = [
            [one_by_one(model, tokens[b : b + 1], prompt, end_id, 12) for prompt in asked]
            for b, asked in enumerate(prompts)
        ]
    assert ours == expected
    lengths = {len(answer) for asked in ours for answer in asked}
    assert len(lengths) > 1, "the test should see answers that end early"


def test_without_image():
    model = small_model(seed=5)
    ours = greedy(model, None, [[[7, 8, 9]], [[20]]], end_id=1, pad_id=PAD, max_new_tokens=5)
    with torch.no_grad():
        assert ours == [[one_by_one(model, None, [7, 8, 9], 1, 5)], [one_by_one(model, None, [20], 1, 5)]]
