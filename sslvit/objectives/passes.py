"""What an objective may ask of the encoders: passes, and the keyed draws of masks they share.

A pass is one encoder over one crop under one masking. Objectives that name the same pass share it: `Pretraining` runs
each distinct pass once and packs all passes of one encoder into one stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sslvit.distributed import copied_to
from sslvit.encoder.vit import Tokens

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _signed(value: int) -> int:
    """A Python integer wrapped to signed 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's >> on int64 keeps the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014): neighbouring inputs give unrelated outputs."""
    values = (values ^ _shift_right(values, 30)) * _MIX_1
    values = (values ^ _shift_right(values, 27)) * _MIX_2
    return values ^ _shift_right(values, 31)


def keyed_uniform(keys: Tensor, *salts: int, num: int) -> Tensor:
    """Uniform numbers in [0, 1) that depend on nothing but the keys (B,) int64 and the salts: (B, num) float32.

    The same sample draws the same numbers on any rank, in any batch, on any device.
    """
    state = keys.to(torch.int64)
    for salt in salts:
        state = _mix(state + _signed((salt + 1) * _GOLDEN))
    counter = torch.arange(1, num + 1, device=keys.device, dtype=torch.int64) * _GOLDEN
    return _shift_right(_mix(state[:, None] + counter[None]), 40).to(torch.float32) * 2.0**-24


@dataclass(frozen=True)
class Masking:
    """Which patches of one crop a pass sees. `name` identifies it: equal names mean equal tensors."""

    name: str
    keep: Tensor | None = field(default=None, compare=False, hash=False)  # (B, V) indices of visible patches
    removed: Tensor | None = field(default=None, compare=False, hash=False)  # (B, M) the others
    mask: Tensor | None = field(default=None, compare=False, hash=False)  # (B, N) True = replaced by the mask token
    places: tuple[Tensor, Tensor] | None = field(default=None, compare=False, hash=False)  # images, patches: (M,) each

    @classmethod
    def replacing(cls, name: str, mask: Tensor, device: torch.device | str = "cpu") -> Masking:
        """Mask tokens where `mask` (B, N), on the CPU, is True. Found there, its places need no look at a GPU."""
        images, patches = mask.nonzero(as_tuple=True)
        return cls(name, mask=copied_to(mask, device), places=(copied_to(images, device), copied_to(patches, device)))


FULL = Masking("full")


@dataclass(frozen=True)
class Pass:
    """One encoder ("student" or "teacher") over one crop ("global" or "local", index) under one masking."""

    network: str
    crop: str
    index: int
    masking: Masking = FULL


class Objective(Protocol):
    """What `Pretraining` asks of an objective, an nn.Module whose `config` has a `weight`.

    KoLeo alone has no passes of its own: it reads the student's global passes of DINO and iBOT.
    """

    config: Any

    def passes(self, draw: Draw, num_patches: int) -> list[Pass]:
        """What it wants to read this step."""
        ...

    def loss(self, tokens: dict[Pass, Tokens], images: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () and values to log, from its passes and the normalised global crops (G, B, C, H, W)."""
        ...

    def before_update(self, step: int) -> None:
        """After backward: may set gradients to None."""
        ...

    def after_step(self, step: int) -> None:
        """After an update that was applied."""
        ...

    def discard(self) -> None:
        """Drop what a skipped step left behind."""
        ...


@dataclass(frozen=True)
class Draw:
    """The keyed draws of one step: masks depend on (seed, step, sample id, view) alone.

    They are drawn where the sample ids are (the CPU) and moved to `device`, where the crops are.
    """

    seed: int
    step: int
    sample_ids: Tensor  # (B,) int64
    device: torch.device | str = "cpu"
    drawn: dict[tuple[str, int], Masking] = field(default_factory=dict, repr=False, compare=False)  # kept by `once`

    def noise(self, view: int, num: int, purpose: int = 0) -> Tensor:
        """Uniform (B, num)."""
        return keyed_uniform(self.sample_ids, self.seed, self.step, view, purpose, num=num)

    def once(self, name: str, view: int, draw: Callable[[], Masking]) -> Masking:
        """`draw()`, a masking called `name`, the first time it is asked for of a view; after that the same again."""
        if (name, view) not in self.drawn:
            self.drawn[name, view] = draw()
        return self.drawn[name, view]

    def visible(self, view: int, num_patches: int, num_visible: int) -> Masking:
        """A random subset of the patches (MAE, section 3): argsort of noise, split in kept and removed."""
        order = copied_to(self.noise(view, num_patches).argsort(dim=1, stable=True), self.device)
        return Masking(f"visible:{num_visible}", keep=order[:, :num_visible], removed=order[:, num_visible:])


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """How many patches stay visible, V = int(N * (1 - mask_ratio)), at least one (MAE's rounding)."""
    return max(1, int(num_patches * (1 - mask_ratio)))


def concatenate(tokens: list[Tokens]) -> Tokens:
    """Tokens of several passes with equal token counts, joined along the batch."""
    prefix, patches = torch.cat([t.prefix for t in tokens]), torch.cat([t.patches for t in tokens])
    return replace(tokens[0], prefix=prefix, patches=patches)


def split(tokens: Tokens, count: int) -> list[Tokens]:
    """The inverse of `concatenate` for `count` equal parts."""
    parts = zip(tokens.prefix.chunk(count), tokens.patches.chunk(count), strict=True)
    return [replace(tokens, prefix=prefix, patches=patches) for prefix, patches in parts]
