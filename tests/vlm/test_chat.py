"""The prompt that is trained on must be the prompt that the chat template renders and the processor tokenizes."""

import jinja2
import pytest
from vlm_fixtures import small_language, small_tokenizer

from sslvit.errors import InputError
from sslvit.vlm.chat import Chat, special_id
from sslvit.vlm.config import LanguageConfig
from sslvit.vlm.language import bundled_chat, bundled_language, kept_tokenizer, train_tokenizer

QUESTION = "How many red circles are there?"


@pytest.fixture(scope="module")
def chat():
    return bundled_chat(small_tokenizer())


def render(chat, messages, add_generation_prompt=True):
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(chat.template())
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def user(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image"}, {"type": "text", "text": QUESTION}],
        [{"type": "text", "text": QUESTION}, {"type": "image", "url": "x.png"}],
        "<image>\n" + QUESTION,
        f"<image> {QUESTION} ",
        [{"type": "text", "text": f"<image>\n{QUESTION}"}],
    ],
)
def test_template_renders_the_training_prompt(chat, content):
    assert render(chat, user(content)) == "<image>" + chat.prompt(QUESTION)


def test_template_without_image_and_with_several(chat):
    assert render(chat, user(QUESTION)) == chat.prompt(QUESTION)
    assert render(chat, user(f"<image><image>{QUESTION}")) == "<image><image>" + chat.prompt(QUESTION)


def test_template_of_a_conversation_ends_answers(chat):
    messages = [*user(QUESTION), {"role": "assistant", "content": "two"}, *user("What?")]
    assert render(chat, messages) == "<|user|>" + QUESTION + "<|assistant|>two<|end|><|user|>What?<|assistant|>"


def test_tokens_of_parts_are_the_tokens_of_the_whole(chat):
    (prompt,), (answer,) = chat.prompts([QUESTION]), chat.answers(["two"])
    whole = chat.tokenizer("<image>" + chat.prompt(QUESTION) + "two<|end|>")["input_ids"]
    assert [chat.image_id, *prompt, *answer, chat.end_id] == whole
    assert chat.before_image() == []


def test_frequent_words_are_single_tokens_wherever_they_stand(chat):
    assert len(chat.prompts([QUESTION])[0]) == 2 + 7
    (answer,) = chat.answers(["red"])
    assert len(answer) == 1
    assert answer[0] in chat.prompts(["a red one"])[0]


@pytest.mark.parametrize("text", ["two", "ein Dreieck, größer!", "日本 🙂", "a  b"])
def test_any_text_survives(chat, text):
    (ids,) = chat.answers([text])
    assert chat.decode([*ids, chat.end_id, 7, 8]) == text


def test_questions_that_hold_the_image_mark_lose_it(chat):
    assert chat.prompt("<image>\nWhat?") == chat.prompt("What?")


def test_tokenizer_is_kept_and_the_same_every_time(tmp_path):
    texts = ["How many? two", "What colour? blue"] * 5
    first = kept_tokenizer(tmp_path / "a" / "tokenizer.json", lambda: texts, 300)
    kept = kept_tokenizer(tmp_path / "a" / "tokenizer.json", lambda: pytest.fail("trained twice"), 300)
    again = train_tokenizer(texts, 300)
    assert first.backend_tokenizer.to_str() == kept.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()


def test_special_tokens_must_be_one_token():
    with pytest.raises(InputError, match="one special token"):
        special_id(small_tokenizer(), "not special at all")


def test_the_language_model_depends_on_the_seed_alone():
    one, same, other = (small_language(seed).lm.state_dict() for seed in (0, 0, 1))
    assert all(one[name].equal(same[name]) for name in one)
    assert not one["lm_head.weight"].equal(other["lm_head.weight"])


def test_widths_that_do_not_fit_are_named():
    with pytest.raises(InputError, match=r"language\.hidden_size 30"):
        bundled_language(small_tokenizer(), LanguageConfig(hidden_size=30, num_heads=4), 0)


def test_given_chat_separates_words_with_plain_marks():
    chat = Chat(small_tokenizer(), "USER: ", "\nASSISTANT:", " ", 2, 1, 0)
    assert render(chat, user([{"type": "image"}, {"type": "text", "text": "Hi?"}])) == "<image>USER: Hi?\nASSISTANT:"
    messages = [*user("Hi?"), {"role": "assistant", "content": "two"}]
    assert render(chat, messages, add_generation_prompt=False) == "USER: Hi?\nASSISTANT: two<|end|>"
