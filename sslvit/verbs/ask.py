"""`sslvit ask`: questions about images, answered by a vision-language folder through plain transformers.

One image and one question, or a jsonl of them. What is answered here is what `generate` answers for anybody who opens
the folder; nothing of training is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sslvit.data.decode import BadImage, decode
from sslvit.errors import InputError
from sslvit.run_folder import write_atomically
from sslvit.vlm.folder import OpenFolder, answer, channels_of, open_folder

BATCH_SIZE = 16

Row = dict[str, Any]


def ask(
    vlm: str | Path,
    *,
    image: str | Path | None = None,
    question: str | None = None,
    jsonl: str | Path | None = None,
    output_file: str | Path | None = None,
) -> str | Path:
    """The answer to `question` about `image`, or the file with every row of `jsonl` and its `prediction`.

    Rows hold `image` (a path, relative to the jsonl) and `question`; whatever else is in them is kept. Raises
    InputError for a folder that is no VLM, an image that cannot be read, a row that is no question.
    """
    one, many = (image, question), (jsonl, output_file)
    if all(part is not None for part in one) and not any(many):
        return _ask_one(vlm, Path(str(image)), str(question))
    if all(part is not None for part in many) and not any(one):
        return _ask_many(vlm, Path(str(jsonl)), Path(str(output_file)))
    raise InputError("give image and question, or jsonl and output_file")


def _ask_one(vlm: str | Path, image: Path, question: str) -> str:
    folder = _open(vlm)
    try:
        picture = open_image(image, folder)
    except BadImage as error:
        raise InputError(f"{image}: {error}") from error
    return answer(folder, [picture], [question])[0]


def _ask_many(vlm: str | Path, jsonl: Path, output_file: Path) -> Path:
    """Answers in batches; a row whose image cannot be read gets `prediction` null and the reason in `error`."""
    rows = read_rows(jsonl)
    folder = _open(vlm)
    for start in range(0, len(rows), BATCH_SIZE):
        readable, pictures = [], []
        for row in rows[start : start + BATCH_SIZE]:
            try:
                pictures.append(open_image(jsonl.parent / str(row["image"]), folder))
                readable.append(row)
            except BadImage as error:
                row |= {"prediction": None, "error": str(error)}
        if readable:
            texts = answer(folder, pictures, [str(row["question"]) for row in readable])
            for row, text in zip(readable, texts, strict=True):
                row["prediction"] = text
    unread = sum("error" in row and row["prediction"] is None for row in rows)
    if unread == len(rows):
        raise InputError(f"{jsonl}: none of its {len(rows)} images can be read ({rows[0]['error']})")
    output_file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output_file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{output_file}: {len(rows) - unread} answers" + (f", {unread} images could not be read" if unread else ""))
    return output_file


def read_rows(jsonl: Path) -> list[Row]:
    """The rows of a jsonl of questions; InputError names the line that is none."""
    if not jsonl.is_file():
        raise InputError(f"{jsonl}: no such file")
    rows = list(_parse(jsonl))
    if not rows:
        raise InputError(f"{jsonl}: no rows; each line is an object with image and question")
    return rows


def _parse(jsonl: Path) -> Iterator[Row]:
    with jsonl.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{jsonl}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict) or not row.get("image") or not isinstance(row.get("question"), str):
                raise InputError(f"{jsonl}, line {number}: needs image (a path) and question (a text)")
            yield row


def open_image(path: Path, folder: OpenFolder) -> Image.Image:
    """An image as the folder's processor takes it: EXIF turned, as many channels as it was trained on."""
    if not path.is_file():
        raise BadImage("no such file")
    pixels = decode(path.read_bytes(), channels=channels_of(folder))
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels)


def _open(vlm: str | Path) -> OpenFolder:
    return open_folder(vlm, "cuda" if torch.cuda.is_available() else "cpu")
