"""Images with their questions as an endless, keyed stream of training batches.

Which images come when is a function of (seed, epoch), which questions of an image are asked of (seed, epoch, image);
the cursor counts images. No augmentation: a turn says where things are. Not the loader of pretraining
(data/loader.py), which cuts views and knows no text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslvit import distributed
from sslvit.data.crops import eval_transform
from sslvit.data.decode import BadFiles, BadImage, decode
from sslvit.data.keyed import rng
from sslvit.data.loader import default_workers
from sslvit.data.pairs import Pairs
from sslvit.data.turns import Turn
from sslvit.data.workers import Workers
from sslvit.encoder.config import Preprocessing
from sslvit.errors import InputError
from sslvit.vlm.blocks import Blocks, TokenTurn, lay_out
from sslvit.vlm.chat import Chat

IN_MEMORY = 3 * 2**29  # bytes of images, or of frozen image tokens, that are kept
ORDER, TURNS = 0, 1  # views of the keyed generator
CAPTION = "caption"
CHUNK = 64  # images the encoder reads at once where it is frozen


class PairImages:
    """Images of pairs as the encoder wants them, (C, H, W) uint8; kept in memory when all of them fit.

    `bad_files` counts each image once, good or bad, however often it comes. num_workers: threads that decode; None
    means as many as in pretraining.
    """

    def __init__(
        self, pairs: Pairs, preprocessing: Preprocessing, bad_files: BadFiles, num_workers: int | None = None
    ) -> None:
        self.pairs = pairs
        self.preprocessing = preprocessing
        self.bad_files = bad_files
        self.num_workers = default_workers() if num_workers is None else num_workers
        self._good: set[int] = set()
        self._bad: dict[int, str] = {}  # the reasons
        size = preprocessing.channels * math.prod(preprocessing.size)
        fits = len(pairs) * size <= IN_MEMORY
        self._kept: dict[int, Tensor] | None = {} if fits else None

    def __len__(self) -> int:
        return len(self.pairs)

    def get(self, index: int) -> Tensor:
        """Image `index`; raises BadImage when it cannot be read, after noting its name."""
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        if index in self._bad:
            raise BadImage(self._bad[index])
        try:
            how = self.preprocessing
            pixels = decode(self.pairs.read(index), channels=how.channels, value_range=how.value_range)
        except (BadImage, OSError) as error:
            self._bad[index] = str(error)
            self.bad_files.add(self.pairs.name(index), str(error))
            raise BadImage(str(error)) from error
        if index not in self._good:
            self._good.add(index)
            self.bad_files.saw()
        image = eval_transform(pixels, self.preprocessing)
        if self._kept is not None:
            self._kept[index] = image
        return image

    def readable_all(self, indices: Sequence[int]) -> list[tuple[int, Tensor]]:
        """`readable` of several at once, in their order; those that are not in memory by `num_workers` threads."""
        missing = [index for index in indices if self._kept is None or index not in self._kept]
        with Workers(min(self.num_workers, len(missing)), self.pairs.name) as workers:
            jobs = {index: workers.submit(self.readable, index) for index in dict.fromkeys(missing)}
            read = {index: workers.wait(job) for index, job in jobs.items()}
        return [read[index] if index in read else self.readable(index) for index in indices]

    def readable(self, index: int, report: Callable[[int], None] | None = None) -> tuple[int, Tensor]:
        """Image `index`, or the next one that can be read, with its number; `report` hears which is being read."""
        for step in range(len(self)):
            number = (index + step) % len(self)
            if report is not None:
                report(number)
            try:
                return number, self.get(number)
            except BadImage:
                continue
        raise InputError(f"{self.pairs.spec}: none of its {len(self)} images can be read; see bad_files.jsonl")


@dataclass
class PairBatch:
    """images (B, C, H, W) uint8, or tokens (B, P, D) of a frozen encoder, or neither; and the turns over them."""

    images: Tensor | None
    tokens: Tensor | None
    blocks: Blocks

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch on another device."""
        images = None if self.images is None else self.images.to(device, non_blocking=True)
        tokens = None if self.tokens is None else self.tokens.to(device, non_blocking=True)
        return PairBatch(images, tokens, self.blocks.to(device))


def draw_turns(
    turns: Sequence[Turn], num_turns: int, generator: np.random.Generator, num_captions: int = 1
) -> list[Turn]:
    """At most `num_turns` of an image's turns: `num_captions` captions, then one of each other family in rounds.

    So rare families are asked about as often as common ones. Where one kind runs out, the other fills up.
    """
    families: dict[str, list[Turn]] = {}
    for i in generator.permutation(len(turns)):
        families.setdefault(turns[i].family, []).append(turns[i])
    captions = families.pop(CAPTION, [])
    rounds = itertools.zip_longest(*families.values())
    questions = [turn for taken in rounds for turn in taken if turn is not None]
    drawn = [*captions[:num_captions], *questions, *captions[num_captions:]]
    return drawn[:num_turns]


def tokenize(turns: Sequence[Turn], chat: Chat) -> list[TokenTurn]:
    """Turns as tokens."""
    prompts = chat.prompts([turn.question for turn in turns])
    answers = chat.answers([turn.answer for turn in turns])
    return [TokenTurn(p, a) for p, a in zip(prompts, answers, strict=True)]


class PairBatches:
    """`train`'s stream: (PairBatch, cursor after it), forever, in an order that only the seed and the cursor decide.

    `see="images"` gives pixels, `see="tokens"` what the frozen `encode` made of them (once for each image, in fixed
    chunks, so that a resumed run computes the same numbers), `see="nothing"` text alone. `whole=True` makes every
    token a target.
    """

    def __init__(
        self,
        images: PairImages,
        chat: Chat,
        *,
        batch_size: int,
        num_turns: int,
        num_captions: int = 1,
        max_tokens: int,
        seed: int,
        see: str,
        whole: bool = False,
        encode: Callable[[Tensor], Tensor] | None = None,
    ):
        assert see in ("images", "tokens", "nothing") and (see == "tokens") == (encode is not None)
        world = distributed.world_size()
        if batch_size % world:
            raise InputError(f"batch_size={batch_size} is not divisible by the {world} processes; change either")
        self.images, self.chat, self.encode, self.see, self.whole = images, chat, encode, see, whole
        self.batch_size, self.num_turns, self.num_captions = batch_size, num_turns, num_captions
        self.max_tokens, self.seed = max_tokens, seed
        self.cursor = 0
        self._tokens: Tensor | None = None
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def seek(self, cursor: int) -> None:
        """Go on after `cursor` images."""
        self.cursor = cursor

    def __iter__(self) -> Iterator[tuple[PairBatch, int]]:
        """One batch is made ahead, in a thread, while the last one is computed with."""
        with ThreadPoolExecutor(1) as ahead:
            after = self.cursor + self.batch_size
            coming = ahead.submit(self._batch, range(self.cursor, after))
            while True:
                batch, cursor = coming.result(), after
                after += self.batch_size
                coming = ahead.submit(self._batch, range(cursor, after))
                yield batch, cursor

    def _batch(self, places: range) -> PairBatch:
        share = self.batch_size // distributed.world_size()
        mine = places[distributed.rank() * share : (distributed.rank() + 1) * share]
        epochs, indices = zip(*(divmod(place, len(self.images)) for place in mine), strict=True)
        numbers = [int(self._permutation(epoch)[index]) for epoch, index in zip(epochs, indices, strict=True)]
        pixels: list[Tensor] = []
        if self.see != "nothing":
            read = self.images.readable_all(numbers)
            numbers, pixels = [number for number, _ in read], [image for _, image in read]
        rows = [self._turns(epoch, number) for epoch, number in zip(epochs, numbers, strict=True)]
        blocks = lay_out(rows, self.chat.end_id, self.chat.pad_id, whole=self.whole)
        if self.see == "tokens":
            return PairBatch(None, self._frozen_tokens()[numbers].float(), blocks)
        return PairBatch(torch.stack(pixels) if pixels else None, None, blocks)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, rng(self.seed, epoch, 0, ORDER).permutation(len(self.images)))
        return self._order[1]

    def _turns(self, epoch: int, number: int) -> list[TokenTurn]:
        """The turns of one image in one epoch, without those that are too long for the language model."""
        generator = rng(self.seed, epoch, number, TURNS)
        turns = draw_turns(self.images.pairs.turns(number), self.num_turns, generator, self.num_captions)
        return [t for t in tokenize(turns, self.chat) if len(t.prompt) + len(t.answer) <= self.max_tokens]

    def _frozen_tokens(self) -> Tensor:
        """(n, P, D) of all images, made when first needed."""
        if self._tokens is None:
            assert self.encode is not None
            chunks = []
            for start in range(0, len(self.images), CHUNK):
                read = self.images.readable_all(range(start, min(start + CHUNK, len(self.images))))
                chunks.append(self.encode(torch.stack([image for _, image in read])).cpu())
            self._tokens = torch.cat(chunks)
        return self._tokens
