"""How a question and its answer are written for a language model: the prompt, its tokens and the chat template.

Not a tokenizer (transformers and tokenizers are) and not a conversation: every question is asked on its own. The
template is kept short because each token costs a forward pass: image tokens, then `<|user|>question<|assistant|>`,
after which the model writes the answer and its end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sslvit.errors import InputError

IMAGE_TOKEN = "<image>"

TEMPLATE = """\
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set text = message.content -%}
{%- set listed = 0 -%}
{%- else -%}
{%- set text = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') -%}
{%- set listed = message.content | selectattr('type', 'in', ['image', 'image_url']) | list | length -%}
{%- endif -%}
{{- '<image>' * (listed + (text.split('<image>') | length) - 1) -}}
{%- set text = text.replace('<image>', '') | trim -%}
{%- if message.role == 'assistant' -%}
{{- ASSISTANT + PREFIX + text + END -}}
{%- else -%}
{{- USER + text -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- ASSISTANT -}}
{%- endif -%}
"""


@dataclass
class Chat:
    """A tokenizer and the words around questions and answers.

    `user` and `assistant` open their parts; `answer_prefix` stands before an answer when the assistant's mark does not
    already separate words. `end_id` closes an answer; `image_id` marks where image tokens go.
    """

    tokenizer: Any
    user: str
    assistant: str
    answer_prefix: str
    image_id: int
    end_id: int
    pad_id: int
    _prompts: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict, repr=False)
    _answers: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def prompt(self, question: str) -> str:
        """The text of one question, without its image: what the chat template renders for it."""
        return f"{self.user}{question.replace(IMAGE_TOKEN, '').strip()}{self.assistant}"

    def before_image(self) -> list[int]:
        """Tokens the tokenizer puts before everything (a begin-of-text token), usually none."""
        ids = self.tokenizer(IMAGE_TOKEN)["input_ids"]
        return list(ids[: ids.index(self.image_id)])

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """Token ids of each question's prompt after its image tokens."""
        self._fill(self._prompts, questions, lambda q: IMAGE_TOKEN + self.prompt(q), self._after_image)
        return [self._prompts[q] for q in questions]  # type: ignore[misc]

    def answers(self, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of each answer, without the end token."""
        self._fill(self._answers, answers, lambda a: self.answer_prefix + a.strip(), list, special=False)
        return [self._answers[a] for a in answers]

    def _after_image(self, ids: list[int]) -> list[int]:
        return list(ids[ids.index(self.image_id) + 1 :])

    def _fill(self, cache: dict, texts: Sequence[str], write: Any, cut: Any, special: bool = True) -> None:
        """Tokenizes what is not yet known, in one call; questions repeat, so this saves most of the work."""
        new = [text for text in dict.fromkeys(texts) if text not in cache]
        if not new:
            return
        if len(cache) > 200_000:
            cache.clear()
            new = list(dict.fromkeys(texts))
        encoded = self.tokenizer([write(text) for text in new], add_special_tokens=special)["input_ids"]
        for text, ids in zip(new, encoded, strict=True):
            cache[text] = cut(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated token ids, up to the end token."""
        ids = list(ids)
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def template(self) -> str:
        """The Jinja chat template; takes string and list contents, and puts images before their text."""
        end = self.tokenizer.convert_ids_to_tokens(self.end_id)
        words = {"USER": self.user, "ASSISTANT": self.assistant, "PREFIX": self.answer_prefix, "END": end}
        head = "".join(f"{{%- set {name} = {_quote(text)} -%}}\n" for name, text in words.items())
        return head + TEMPLATE


def _quote(text: str) -> str:
    """A Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def special_id(tokenizer: Any, token: str) -> int:
    """The id of a special token; InputError when the tokenizer does not know it as one token."""
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise InputError(f"{token}: the tokenizer splits this token into {len(ids)}; it must be one special token")
    return int(ids[0])
