"""A vision-language folder opened through transformers alone, and asked; the way everybody else uses it.

`ask` and `serve` go through here, so that their answers are those of plain transformers. Writing the folder is
exports/llava_folder.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sslvit.data.photometry import normalize
from sslvit.errors import InputError
from sslvit.vlm.batches import PairImages, draw_turns, tokenize
from sslvit.vlm.blocks import lay_out
from sslvit.vlm.chat import Chat
from sslvit.vlm.model import VisionLanguage
from sslvit.vlm.stages import encoded

ALLOWED_DIFFERENCE = 1e-3  # of log probabilities, fp32, after a whole language model
ALLOWED_BEFORE_LANGUAGE = 1e-5  # of pixels and image tokens, relative to the largest
UNREAD = "vision_tower.pooler."  # `vit` builds a pooler inside LLaVA, which reads patches
TIMEOUT = 900  # seconds for a fresh process to open a folder and answer six questions


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


def inputs_of(vlm: OpenFolder, images: Sequence[Image.Image], questions: Sequence[str]) -> dict[str, Tensor]:
    """Model inputs of a batch, padded on the left."""
    prompts = [prompt_of(vlm, question) for question in questions]
    inputs = vlm.processor(images=list(images), text=prompts, return_tensors="pt", padding=True)
    return {name: tensor.to(vlm.device) for name, tensor in inputs.items()}


def answer(
    vlm: OpenFolder, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int = 64
) -> list[str]:
    """Greedy answers to a batch: exactly transformers' `generate` on the processor's inputs."""
    ids = answer_ids(vlm, images, questions, max_new_tokens)
    return [text.strip() for text in vlm.processor.batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def answer_ids(
    vlm: OpenFolder, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int = 64
) -> Tensor:
    """The generated tokens of a batch (B, T), padded behind each one's end token."""
    inputs = inputs_of(vlm, images, questions)
    ids: Tensor = vlm.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return ids[:, inputs["input_ids"].shape[1] :]


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


def compare_with_folder(
    model: VisionLanguage, chat: Chat, folder: Path, images: PairImages, python: str = sys.executable
) -> dict[str, Any]:
    """What transformers, in a fresh process of `python`, makes of `folder` against the network, on a few turns.

    The report holds the largest differences: of the image tokens, and of log probabilities, of the answers against
    `model` and of a left-padded batch against each question alone. Raises RuntimeError when one is not small, when
    weights are missing or left over, when pictures become other pixels, or when the chat template reads string and list
    contents differently: the folder is wrong then, whatever the cause.
    """
    turns = _some_turns(model, chat, images)
    theirs, facts = _reopened(folder, turns, python)
    where = f"{folder}: transformers {facts['version']}"
    if wrong := [name for name in facts["wrong_keys"] if UNREAD not in name]:
        raise RuntimeError(f"{where} finds weights missing or left over: {', '.join(wrong[:4])}")
    if not facts["same_prompts"]:
        raise RuntimeError(f"{where} makes other prompts of string contents than of list contents")
    found = list(zip(turns, theirs, strict=True))
    for turn, said in found:
        _compare_early("pixels of a picture", turn.pixels, said["pixels"], where)
    differences = {
        "image tokens": max(_compare_early("image tokens", turn.tokens, said["tokens"], where) for turn, said in found),
        "answers": max(float((turn.ours - said["answer"]).abs().max()) for turn, said in found),
        "left-padded batch": float(facts["padded_batch"]),
    }
    for what in ("answers", "left-padded batch"):
        if not differences[what] < ALLOWED_DIFFERENCE:
            raise RuntimeError(f"{where} computes other log probabilities ({what}: difference {differences[what]:.1e})")
    return {"library": "transformers", "version": facts["version"], "max_difference": differences}


def _compare_early(what: str, ours: Tensor, theirs: Tensor, where: str) -> float:
    """The largest difference; RuntimeError where it is not that of rounding: a wrong mean, std or part of a config."""
    if ours.shape != theirs.shape:
        raise RuntimeError(f"{where} makes {what} of shape {tuple(theirs.shape)}, not {tuple(ours.shape)}")
    difference = float((ours - theirs).abs().max())
    if not difference < ALLOWED_BEFORE_LANGUAGE * max(1.0, float(ours.abs().max())):
        raise RuntimeError(f"{where} makes other {what} (difference {difference:.1e})")
    return difference


@dataclass
class ComparedTurn:
    """picture (H, W, C) uint8; `pixels` (C, H, W) as the encoder reads it, and its `tokens` (P, D); the answer's token
    ids (S); `ours`: log probabilities (S + 1, V) of the network.
    """

    picture: Tensor
    pixels: Tensor
    tokens: Tensor
    question: str
    answer: list[int]
    ours: Tensor


@torch.no_grad()
def _some_turns(model: VisionLanguage, chat: Chat, images: PairImages) -> list[ComparedTurn]:
    """Two turns about each of three images, as the network in memory answers them."""
    import numpy as np

    cpu, where, how = torch.device("cpu"), next(model.lm.parameters()).device, images.preprocessing
    model.to(cpu).eval()
    found = []
    for number in range(min(3, len(images))):
        number, pixels = images.readable(number)
        seen = encoded(model, images, [number], cpu)
        turns = draw_turns(images.pairs.turns(number), 2, np.random.default_rng(number))
        for turn, tokens in zip(turns, tokenize(turns, chat), strict=True):
            blocks = lay_out([[tokens]], chat.end_id, chat.pad_id)
            ours = model.predict(seen, blocks).logits.float().log_softmax(-1)
            picture = pixels.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
            read = normalize(pixels[None], how.mean, how.std)[0]
            found.append(ComparedTurn(picture, read, seen[0], turn.question, list(tokens.answer), ours))
    model.to(where)
    return found


def _reopened(
    folder: Path, turns: Sequence[ComparedTurn], python: str
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Pixels, tokens and log probabilities ("answer") of each turn, and facts, from a fresh process without network."""
    with tempfile.TemporaryDirectory() as work:
        save_file({str(i): turn.picture for i, turn in enumerate(turns)}, f"{work}/pictures.safetensors")
        job = {
            "folder": str(folder),
            "pictures": f"{work}/pictures.safetensors",
            "questions": [turn.question for turn in turns],
            "answers": [turn.answer for turn in turns],
            "output": f"{work}/output",
        }
        file = Path(work) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        _run_process(file, python)
        said = load_file(f"{work}/output.safetensors")
        parts = [{what: said[f"{i}.{what}"] for what in ("pixels", "tokens", "answer")} for i in range(len(turns))]
        return parts, json.loads(Path(f"{work}/output.json").read_text())


def _run_process(job: Path, python: str) -> None:
    roots = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(filter(None, roots))}
    command = [python, "-P", "-m", "sslvit.vlm.reopen", str(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise RuntimeError(f"transformers cannot open the folder: {lines[-1].strip()}")
