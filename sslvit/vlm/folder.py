"""A vision-language folder opened through transformers alone, and asked; the way everybody else uses it.

`ask` and `serve` go through here, so that their answers are those of plain transformers. Writing the folder is
exports/llava_folder.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sslvit.errors import InputError
from sslvit.vlm.batches import PairImages, draw_turns, tokenize
from sslvit.vlm.blocks import lay_out
from sslvit.vlm.chat import Chat
from sslvit.vlm.model import VisionLanguage
from sslvit.vlm.stages import encoded

ALLOWED_DIFFERENCE = 1e-3  # of log probabilities, fp32


@dataclass
class OpenFolder:
    """model and processor of a folder, on a device."""

    model: Any
    processor: Any

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return torch.device(self.model.device)


def find_vlm(path: str | Path) -> Path:
    """The LLaVA folder at `path` or, for a run, in its `vlm/`. InputError when there is none."""
    place = Path(path)
    for folder in (place, place / "vlm"):
        config = folder / "config.json"
        if config.is_file():
            kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
            if kind == "llava":
                return folder
            if folder == place:
                raise InputError(f"{path}: a {kind!r} model, not llava; give the vlm/ folder of an align run")
    if not place.exists():
        raise InputError(f"{path}: no such folder; give an align run or its vlm/ folder")
    raise InputError(f"{path}: holds no vision-language model (no vlm/config.json); run sslvit align first")


def open_folder(path: str | Path, device: str | torch.device = "cpu") -> OpenFolder:
    """Opens a folder with transformers' auto classes, in fp32 and ready to answer."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = find_vlm(path)
    try:
        processor = AutoProcessor.from_pretrained(str(folder))
        model = AutoModelForImageTextToText.from_pretrained(str(folder), dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder}: transformers cannot open it ({reason})") from error
    processor.tokenizer.padding_side = "left"
    return OpenFolder(model.to(device).eval(), processor)


def channels_of(vlm: OpenFolder) -> int:
    """How many channels the folder's images have."""
    return len(vlm.processor.image_processor.image_mean)


def prompt_of(vlm: OpenFolder, question: str) -> str:
    """One question about one image as text, through the folder's chat template."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = vlm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return str(text)


def inputs_of(
    vlm: OpenFolder, images: Sequence[Image.Image], questions: Sequence[str], *, resize: bool = True
) -> dict[str, Tensor]:
    """Model inputs of a batch, padded on the left. `resize=False` takes images that have their size already."""
    as_they_are = {} if resize else {"do_resize": False, "do_center_crop": False}
    inputs = vlm.processor(
        images=list(images),
        text=[prompt_of(vlm, question) for question in questions],
        return_tensors="pt",
        padding=True,
        **as_they_are,
    )
    return {name: tensor.to(vlm.device) for name, tensor in inputs.items()}


@torch.no_grad()
def answer(
    vlm: OpenFolder, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int = 64
) -> list[str]:
    """Greedy answers to a batch: exactly transformers' `generate` on the processor's inputs."""
    inputs = inputs_of(vlm, images, questions)
    ids = vlm.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = vlm.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def answer_stream(vlm: OpenFolder, image: Image.Image, question: str, max_new_tokens: int = 64) -> Iterator[str]:
    """Pieces of one greedy answer as they are generated."""
    from threading import Thread

    from transformers import TextIteratorStreamer

    inputs = inputs_of(vlm, [image], [question])
    streamer = TextIteratorStreamer(vlm.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def work() -> None:
        try:
            vlm.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
        finally:
            streamer.end()  # also when generating failed: the reader must not wait for ever

    Thread(target=work, daemon=True).start()
    yield from streamer


@torch.no_grad()
def compare_with_folder(model: VisionLanguage, chat: Chat, folder: Path, images: PairImages) -> float:
    """Largest difference of log probabilities between the trained network and the reopened folder, on a few turns.

    Raises RuntimeError when they do not compute the same: the folder is wrong then, whatever the cause.
    """
    import numpy as np

    vlm = open_folder(folder)
    worst = 0.0
    cpu = torch.device("cpu")
    where = next(model.lm.parameters()).device
    model.to(cpu).eval()
    for number in range(min(3, len(images))):
        number, pixels = images.readable(number)
        turns = draw_turns(images.pairs.turns(number), 2, np.random.default_rng(number))
        for turn, tokens in zip(turns, tokenize(turns, chat), strict=True):
            blocks = lay_out([[tokens]], chat.end_id, chat.pad_id)
            ours = model.predict(encoded(model, images, [number], cpu), blocks).logits.float().log_softmax(-1)
            picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())
            inputs = inputs_of(vlm, [picture], [turn.question], resize=False)
            said = torch.tensor([tokens.answer], dtype=torch.int64)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], said], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            theirs = vlm.model(**inputs).logits[0, -len(tokens.answer) - 1 :].float().log_softmax(-1)
            worst = max(worst, float((ours - theirs).abs().max()))
    model.to(where)
    if not worst < ALLOWED_DIFFERENCE:
        raise RuntimeError(f"{folder}: transformers computes other log probabilities (difference {worst:.1e})")
    return worst
