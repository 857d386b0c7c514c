"""The module that is trained: student, teacher and the objectives that are switched on.

`forward` colours the views, gathers the passes the objectives ask for, runs each distinct one once, packed per encoder,
and sums weight x loss (design: objectives are sections, and share passes).
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sslvit.config import PretrainConfig
from sslvit.data.loader import Views
from sslvit.data.photometry import apply
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.vit import (
    Encoder,
    TokenInput,
    Tokens,
    create_encoder,
    forward_packed,
    patch_grid,
    patch_size,
)
from sslvit.errors import InputError
from sslvit.objectives.accumulation import Prepared, cache_koleo, sinkhorn_columns
from sslvit.objectives.dino import Dino
from sslvit.objectives.ibot import Ibot
from sslvit.objectives.koleo import Koleo
from sslvit.objectives.mae import Mae
from sslvit.objectives.passes import Draw, Objective, Pass, split
from sslvit.objectives.token_health import token_health
from sslvit.optim import ema_
from sslvit.schedules import cosine


class Pretraining(nn.Module):
    """Student, teacher (an exponential moving average, if an objective needs one) and objectives.

    With a frozen `teacher` of its own, that one is distilled as DINOv2 does it (arXiv:2304.07193, section 5): it gives
    the targets, and the moving average is kept aside to be judged and exported.
    """

    def __init__(
        self,
        config: PretrainConfig,
        preprocessing: Preprocessing,
        encoder: VisionTransformer | None = None,
        teacher: Encoder | None = None,
    ) -> None:
        """`config` is resolved; `encoder` is a student to start from, else a new one is made."""
        super().__init__()
        assert config.steps and config.encoder.image_size and config.encoder.patch_size
        self.config = config
        self.preprocessing = preprocessing
        self.student = encoder if encoder is not None else create_encoder(config.encoder)
        self._distilled = [] if teacher is None else [_frozen(teacher, config)]  # in a list: it is in no checkpoint
        if teacher is not None:  # the heads read tokens of the teacher's width
            self.adapter = nn.Linear(self.student.embed_dim, teacher.embed_dim)
        self.objectives = nn.ModuleDict(cast(dict[str, nn.Module], self._build(config, preprocessing.channels)))
        self.teacher: VisionTransformer | None = None
        if "dino" in self.objectives or "ibot" in self.objectives:
            self.teacher = _frozen_copy(self.student)
        self._running_step = -1
        self._prepared: deque[Prepared] = deque()  # of the micro-batches of this step that are still to come
        self.compile_blocks(bool(config.compile))
        if "ibot" in self.objectives:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, self.student.embed_dim))

    def _build(self, config: PretrainConfig, channels: int) -> dict[str, Objective]:
        assert config.steps and config.encoder.image_size and config.encoder.patch_size
        rows, columns = (side // config.encoder.patch_size for side in config.encoder.size)
        num_global, num_local = config.crops.num_global, config.crops.num_local or 0
        assert num_global
        own_width = self.student.embed_dim
        width = self._distilled[0].embed_dim if self._distilled else own_width
        built: dict[str, Objective] = {}
        masking = None
        if config.ibot is not None:
            built["ibot"] = ibot = Ibot(config.ibot, width, (rows, columns), config.steps, num_global)
            masking = ibot.masking
        if config.dino is not None:
            built["dino"] = dino = Dino(config.dino, width, config.steps, num_global, num_local, masking)
            if config.ibot is not None and config.ibot.shared_head:
                ibot.share_heads(dino)
        if config.koleo is not None:
            built["koleo"] = Koleo(config.koleo)
        if config.mae is not None:
            size = config.encoder.patch_size
            built["mae"] = Mae(config.mae, own_width, size, (rows, columns), channels, num_global)
        return built

    @property
    def _active(self) -> dict[str, Objective]:
        return cast(dict[str, Objective], dict(self.objectives.items()))

    @property
    def judged(self) -> VisionTransformer:
        """The encoder that is evaluated and exported: the teacher if there is one."""
        return self.student if self.teacher is None else self.teacher

    def compile_blocks(self, wanted: bool) -> None:
        """Whether the blocks of encoders and decoder run through torch.compile from now on."""
        self.compiled = wanted
        for objective in self._active.values():
            if isinstance(objective, Mae):
                objective.compiled = wanted

    def train(self, mode: bool = True) -> Pretraining:
        """The teacher never leaves evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, views: Views, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """One batch of views to the weighted sum of losses, and every part of it for the log."""
        if step != self._running_step:  # what a skipped step summed up is not part of this one
            self.discard()
            self._running_step = step
        prepared = self._prepared.popleft() if self._prepared else Prepared()
        crops = self._colour(views)
        wanted = prepared.wanted or self._wanted(views, step, crops["global"].device)
        tokens = prepared.tokens | self._run([p for p in _all(wanted) if p not in prepared.tokens], wanted, crops)
        adapted = tokens
        if self._distilled:
            adapted = {p: self._adapted(t) if p.network == "student" else t for p, t in tokens.items()}
        total = torch.zeros((), device=crops["global"].device)
        logs: dict[str, Tensor] = {}
        extra: dict[str, Tensor]
        for name, passes in wanted.items():
            objective = self._active[name]
            read = {p: (adapted if name in ("dino", "ibot") else tokens)[p] for p in passes}
            if isinstance(objective, Koleo) and prepared.koleo is not None:
                loss, extra = prepared.koleo.loss(tokens), {}
            else:
                loss, extra = objective.loss(read, crops["global"], step)
            total = total + objective.config.weight * loss
            logs |= {f"{name}/loss": loss.detach(), **extra}
        own = _distilled(wanted) or list(adapted)
        judged = {p: t for p, t in adapted.items() if p.network == "teacher" or p in own}
        return total, {**logs, **token_health(judged)}

    @property
    def needs_whole_batch(self) -> bool:
        """Whether micro-batches must be shown to `prepare` before the first of them is learned from."""
        return "koleo" in self.objectives or bool(self._balanced)

    @property
    def _balanced(self) -> dict[str, Dino | Ibot]:
        """The objectives whose targets Sinkhorn balances over the batch."""
        distilled = {name: one for name, one in self._active.items() if isinstance(one, Dino | Ibot)}
        return {name: one for name, one in distilled.items() if one.centering.method == "sinkhorn"}

    @torch.no_grad()
    def prepare(self, batches: Sequence[Views], step: int) -> None:
        """All micro-batches of a step, before `forward` gets them one by one in the same order (accumulation.py)."""
        self.discard()
        self._running_step = step
        device = self.student.patch_embed.proj.weight.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # `forward` draws the same paths again
            seen = [self._look(views, step) for views in batches]
        for name, objective in self._balanced.items():
            chunks = partial(_teacher_logits, objective, [(wanted[name], tokens) for wanted, tokens in seen])
            objective.centering.columns = sinkhorn_columns(chunks, objective.temperature(step))
        self._prepared = deque(
            Prepared(wanted, {p: t for p, t in tokens.items() if p.network == "teacher"}) for wanted, tokens in seen
        )
        koleo = self._active.get("koleo")
        if isinstance(koleo, Koleo):
            views = [{p: tokens[p] for p in wanted["koleo"]} for wanted, tokens in seen]
            for prepared, cached in zip(self._prepared, cache_koleo(koleo, views, step), strict=True):
                prepared.koleo = cached

    def _look(self, views: Views, step: int) -> tuple[dict[str, list[Pass]], dict[Pass, Tokens]]:
        """Passes and tokens of what must be known of the whole batch; all student passes where paths are dropped."""
        crops = self._colour(views)
        wanted = self._wanted(views, step, crops["global"].device)
        drawn = bool(self.config.encoder.drop_path_rate) and "koleo" in wanted
        passes = [
            p
            for p in _all(wanted)
            if (self._balanced if p.network == "teacher" else drawn or p in wanted.get("koleo", ()))
        ]
        return wanted, self._run(passes, wanted, crops)

    def _wanted(self, views: Views, step: int, device: torch.device) -> dict[str, list[Pass]]:
        """The passes each objective reads."""
        draw = Draw(self.config.seed, step, views.sample_ids, device)
        num_patches = self.student.patch_embed.num_patches
        wanted = {name: objective.passes(draw, num_patches) for name, objective in self._active.items()}
        if "koleo" in wanted:
            wanted["koleo"] = _distilled(wanted)
        return wanted

    def _colour(self, views: Views) -> dict[str, Tensor]:
        """uint8 crops to normalised float crops: {"global": (G, B, C, H, W), "local": (L, B, C, h, w)}."""
        return {
            "global": self._colour_crops(views.global_crops, views.global_photometry),
            "local": self._colour_crops(views.local_crops, views.local_photometry),
        }

    def _colour_crops(self, crops: Tensor, rows: Tensor) -> Tensor:
        if crops.shape[0] == 0:
            return crops
        with torch.autocast(crops.device.type, enabled=False):
            coloured = apply(crops.flatten(0, 1), rows.flatten(0, 1), self.preprocessing.mean, self.preprocessing.std)
        return coloured.unflatten(0, crops.shape[:2])

    def _run(self, passes: list[Pass], wanted: dict[str, list[Pass]], crops: dict[str, Tensor]) -> dict[Pass, Tokens]:
        """Each pass once; passes of one encoder in one packed stream, equal shapes joined along the batch.

        Where only class tokens are read, the last block computes nothing else.
        """
        patches_read = {p for name in ("ibot", "mae") for p in wanted.get(name, [])}
        tokens: dict[Pass, Tokens] = {}
        for network in ("teacher", "student"):
            groups: dict[tuple[str, str], list[Pass]] = {}
            for p in passes:
                if p.network == network:
                    groups.setdefault((p.crop, p.masking.name), []).append(p)
            if not groups:
                continue
            inputs = [
                self._input(group, crops[group[0].crop], cls_only=patches_read.isdisjoint(group))
                for group in groups.values()
            ]
            if network == "teacher":
                teacher = self._distilled[0] if self._distilled else self.teacher
                assert teacher is not None
                with torch.no_grad():
                    outputs = forward_packed(teacher, inputs, compiled=self.compiled)
            else:
                outputs = forward_packed(self.student, inputs, compiled=self.compiled)
            for group, output in zip(groups.values(), outputs, strict=True):
                tokens |= dict(zip(group, split(output, len(group)), strict=True))
        return tokens

    def _adapted(self, tokens: Tokens) -> Tokens:
        """A student's tokens in the width of the distilled teacher."""
        return replace(tokens, prefix=self.adapter(tokens.prefix), patches=self.adapter(tokens.patches))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Pretraining:
        """What moves the module moves the distilled teacher, which is none of its children."""
        super()._apply(fn, recurse)
        for teacher in self._distilled:
            teacher._apply(fn)
        return self

    def _input(self, group: list[Pass], crops: Tensor, cls_only: bool) -> TokenInput:
        images = torch.cat([crops[p.index] for p in group])
        masking = group[0].masking
        keep = (
            None if masking.keep is None else torch.cat([p.masking.keep for p in group if p.masking.keep is not None])
        )
        mask = (
            None if masking.mask is None else torch.cat([p.masking.mask for p in group if p.masking.mask is not None])
        )
        mask_token = self.mask_token if mask is not None else None
        return TokenInput(images, mask=mask, mask_token=mask_token, keep=keep, cls_only=cls_only)

    def before_update(self, step: int) -> None:
        """After backward, before clipping. While new heads warm up, the encoder stands still."""
        for objective in self._active.values():
            objective.before_update(step)
        if step < frozen_steps(self.config):
            for parameter in self.student.parameters():
                parameter.grad = None

    def after_step(self, step: int) -> None:
        """Centres move, then the teacher follows the student: t <- m t + (1 - m) s (DINO, section 3.1)."""
        for objective in self._active.values():
            objective.after_step(step)
        if self.teacher is None:
            return
        momentum = self.momentum(step)
        ema_(self.teacher.parameters(), self.student.parameters(), momentum)
        for objective in self._active.values():
            if isinstance(objective, Dino | Ibot) and not getattr(objective.config, "shared_head", False):
                ema_(objective.teacher_head.parameters(), objective.student_head.parameters(), momentum)

    def momentum(self, step: int) -> float:
        """The teacher's momentum at a step: cosine to `momentum_end`."""
        optim, steps = self.config.optim, self.config.steps
        assert optim.momentum is not None and steps is not None
        return cosine(step, steps, optim.momentum, optim.momentum_end)

    def discard(self) -> None:
        """Drop what a skipped step left behind."""
        self._prepared.clear()
        for objective in self._active.values():
            objective.discard()


def _all(wanted: dict[str, list[Pass]]) -> list[Pass]:
    """Each distinct pass once, in the order of the objectives."""
    return list(dict.fromkeys(p for passes in wanted.values() for p in passes))


def _distilled(wanted: dict[str, list[Pass]]) -> list[Pass]:
    """The student's passes over global views that DINO and iBOT read: one of each view, since masks serve both."""
    read = [p for name in ("dino", "ibot") for p in wanted.get(name, ()) if p.network == "student"]
    return list(dict.fromkeys(p for p in read if p.crop == "global"))


def _teacher_logits(objective: Dino | Ibot, seen: list[tuple[list[Pass], dict[Pass, Tokens]]]) -> Iterator[Tensor]:
    """Of each micro-batch in turn, computed when it is asked for."""
    for passes, tokens in seen:
        yield objective.teacher_logits(passes, tokens)


def frozen_steps(config: PretrainConfig) -> int:
    """How many steps at the start train the heads alone."""
    return round((config.optim.freeze_encoder or 0.0) * (config.steps or 0))


def _frozen(teacher: Encoder, config: PretrainConfig) -> Encoder:
    """The encoder to distil, held still; InputError where its patches do not fit the crops."""
    assert config.encoder.patch_size is not None
    sizes = {"encoder.image_size": config.encoder.image_size, "encoder.image_width": config.encoder.image_width}
    for (key, side), patch in zip(sizes.items(), patch_size(teacher), strict=True):
        if side and side % patch:
            near = max(1, side // patch) * patch
            raise InputError(f"{key}={side} is no multiple of the teacher's patches of {patch} px; try {key}={near}")
    if config.ibot is not None and patch_grid(teacher, config.encoder.size) != tuple(
        side // config.encoder.patch_size for side in config.encoder.size
    ):
        raise InputError(
            f"ibot compares patches one by one, and the teacher's are {patch_size(teacher)[0]} px; "
            f"set encoder.patch_size={patch_size(teacher)[0]}, or distil with dino alone"
        )
    if teacher.patch_embed.proj.in_channels != config.encoder.in_chans:
        raise InputError(
            f"the teacher reads {teacher.patch_embed.proj.in_channels} channels; set encoder.in_chans to that "
            f"instead of {config.encoder.in_chans}"
        )
    return teacher.requires_grad_(False).eval()


def _frozen_copy(encoder: VisionTransformer) -> VisionTransformer:
    """A teacher: same weights, no gradient, no drop path."""
    teacher = copy.deepcopy(encoder)
    teacher.requires_grad_(False)
    return teacher.eval()
