"""One training step in several hands: ours, the published ones written out, lightly's. Same weights, same batch.

`build(work)` makes them all from one draw of weights; `parity` runs a few fp32 steps of each and compares the losses,
since a step that computes something else cannot be compared in time.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from plain_steps import (
    BETAS,
    CENTER_MOMENTUM,
    CLIP,
    LR,
    MOMENTUM,
    TEACHER_TEMPERATURE,
    WEIGHT_DECAY,
    Batch,
    PlainDino,
    PlainMae,
    autocast,
    plain_adamw,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sslvit.config import PretrainConfig, load_config
from sslvit.data.loader import Views
from sslvit.data.photometry import NUM_PARAMETERS
from sslvit.encoder.config import Preprocessing
from sslvit.objectives.passes import Draw
from sslvit.objectives.pretraining import Pretraining
from sslvit.objectives.recipe import DataFacts, resolve
from sslvit.optim import adamw, clip_grad_norm_, param_groups, step_unless

TOLERANCE = 1e-5  # of losses in fp32
STEP = 0  # every step is this one to our schedules, which are constant
Step = Callable[[Batch, bool], float]  # one training step, in bf16 autocast or not; returns the loss before it


@dataclass(frozen=True)
class StepWork:
    """What is computed. `objectives`: some of dino, mae; sizes in pixels."""

    objectives: tuple[str, ...]
    encoder: str
    patch: int
    image: int
    batch: int
    num_local: int = 0
    local: int = 0
    prototypes: int = 4096
    hidden: int = 2048
    depth: int | None = None
    decoder: tuple[int, int, int] = (256, 4, 8)  # width, depth, heads

    @property
    def num_global(self) -> int:
        """Two for DINO, one for MAE alone."""
        return 2 if "dino" in self.objectives else 1

    def words(self) -> str:
        """For the protocol of a row."""
        crops = f"{self.num_global} x {self.image}" + (f" + {self.num_local} x {self.local}" if self.num_local else "")
        depth = f", {self.depth} blocks" if self.depth else ""
        head = f", {self.prototypes} prototypes" if "dino" in self.objectives else ""
        decoder = ", decoder {} x {}".format(*self.decoder) if "mae" in self.objectives else ""
        name = "+".join(self.objectives)
        return f"{name}, {self.encoder} at patch {self.patch}{depth}, {crops} px, batch {self.batch}{head}{decoder}"


@dataclass
class Built:
    """The variants of a work, by name, and what they read."""

    steps: dict[str, Step]
    batch: Batch
    missing: dict[str, str]  # peers that are not here, and why


def build(work: StepWork, device: str = "cpu") -> Built:
    """All variants from the same weights; peers only for a single objective, lightly only on the CPU."""
    torch.manual_seed(0)
    module = our_module(work)
    batch = make_batch(work).to(device)
    steps: dict[str, Step] = {}
    missing: dict[str, str] = {}
    if len(work.objectives) == 1:
        encoder = module.student
        dino = work.objectives == ("dino",)
        head = module.objectives["dino"].student_head if dino else None
        decoder = module.objectives["mae"] if not dino else None
        plain = PlainDino(encoder, head) if dino else PlainMae(encoder, decoder, decoder.config.mask_ratio)
        steps["official"] = plain.to(device).step
        if device != "cpu":
            missing["lightly"] = "is timed on the CPU"
        elif importlib.util.find_spec("lightly") is None:
            missing["lightly"] = "lightly is not installed; pip install 'sslvit[bench]'"
        else:
            steps["lightly"] = (LightlyDino(encoder, head) if dino else LightlyMae(work, encoder, decoder)).step
    steps["ours"] = OurStep(module.to(device), work).step
    return Built(steps, batch, missing)


def make_batch(work: StepWork) -> Batch:
    """Random normalised crops."""
    generator = torch.Generator().manual_seed(1)

    def crops(count: int, side: int) -> list[Tensor]:
        return [torch.randn(work.batch, 3, side, side, generator=generator) for _ in range(count)]

    draw = Draw(0, STEP, torch.arange(work.batch))
    noise = draw.noise(0, (work.image // work.patch) ** 2)
    return Batch(crops(work.num_global, work.image), crops(work.num_local, work.local), noise)


def parity(built: Built, steps: int) -> dict[str, list[float]]:
    """fp32 losses of each variant over `steps` steps; ValueError when one is further than TOLERANCE from the first."""
    torch.backends.cudnn.allow_tf32 = False  # the one place where a GPU's fp32 is less by default
    losses = {name: [step(built.batch, False) for _ in range(steps)] for name, step in built.steps.items()}
    first, reference = next(iter(losses.items()))
    for name, values in losses.items():
        worst = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(values, reference, strict=True))
        if not worst <= TOLERANCE:
            raise ValueError(f"losses of {name} differ from those of {first} by {worst:.2g}: {values} and {reference}")
    return losses


def flops(built: Built) -> float:
    """Of one step, of the plain restatement where there is one: everything computed, a multiply-add as two."""
    step = next(iter(built.steps.values()))
    with FlopCounterMode(display=False) as counter:
        step(built.batch, False)
    return float(counter.get_total_flops())


# ---- ours -----------------------------------------------------------------------------------------------------------


def our_config(work: StepWork) -> PretrainConfig:
    """Resolved, with constant rates."""
    wide = {"num_prototypes": work.prototypes, "head_hidden_dim": work.hidden, "head_bottleneck_dim": 256}
    dino = {"weight": 1.0, "num_teacher_views": 2, "student_visible_ratio": 1.0, "freeze_last_layer": 0.0}
    dino |= {"teacher_temperature": TEACHER_TEMPERATURE, "teacher_temperature_start": TEACHER_TEMPERATURE}
    dino |= {"center_momentum": CENTER_MOMENTUM, **wide}
    width, depth, heads = work.decoder
    mae = {"decoder_dim": width, "decoder_depth": depth, "decoder_num_heads": heads}
    keys: dict[str, Any] = {
        "data": "tensors in memory",
        "steps": 1000,
        "batch_size": work.batch,
        "encoder": {"name": work.encoder, "image_size": work.image, "patch_size": work.patch, "num_registers": 0},
        "crops": {"num_global": work.num_global, "num_local": work.num_local, "local_size": work.local or work.patch},
        "optim": {"lr": LR, "weight_decay": WEIGHT_DECAY, "momentum": MOMENTUM, "momentum_end": MOMENTUM},
        "compile": False,
    }
    keys |= {"dino": dino} if "dino" in work.objectives else {}
    keys |= {"mae": mae} if "mae" in work.objectives else {}
    return resolve(load_config(PretrainConfig, None, keys), DataFacts(1_000_000, work.image, 3, "cpu"))[0]


def our_module(work: StepWork) -> Pretraining:
    """Our training module around a plain timm ViT: class token with a position, no registers, no LayerScale."""
    options = {} if work.depth is None else {"depth": work.depth}
    encoder = timm.create_model(
        work.encoder, num_classes=0, img_size=work.image, patch_size=work.patch, dynamic_img_size=True, **options
    )
    if "dino" not in work.objectives:
        encoder.pos_embed.requires_grad_(False)  # fixed in MAE
    return Pretraining(our_config(work), Preprocessing(work.image), encoder)


class OurStep:
    """What `sslvit.training.train` does in a step, on crops that are coloured already."""

    def __init__(self, module: Pretraining, work: StepWork) -> None:
        self.module = module.train()
        module._colour = lambda views: {"global": views.global_crops, "local": views.local_crops}  # type: ignore
        groups = param_groups(module, WEIGHT_DECAY, encoder_prefix="student.")
        self.optimizer = adamw(groups, lr=LR, betas=BETAS)
        self.clip = CLIP if "dino" in work.objectives else 0.0

    def step(self, batch: Batch, bf16: bool = False) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(batch, bf16):
            loss, _ = self.module(as_views(batch), STEP)
        loss.backward()
        self.module.before_update(STEP)
        norm = clip_grad_norm_(self.module.parameters(), self.clip)
        step_unless(self.optimizer, (~torch.isfinite(norm)).float())
        self.module.after_step(STEP)
        return loss.item()


def as_views(batch: Batch) -> Views:
    """The batch as the loader would give it, its colour rows unused."""
    size = len(batch.global_crops[0])
    local = torch.stack(batch.local_crops) if batch.local_crops else torch.zeros(0, size, 3, 1, 1)
    rows = torch.zeros(1, size, NUM_PARAMETERS)
    return Views(torch.stack(batch.global_crops), local, rows, rows, torch.arange(size), torch.zeros(size).long())


# ---- lightly --------------------------------------------------------------------------------------------------------


class LightlyDino:
    """lightly's parts, in the loop of its DINO example: one forward pass for each view."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum

        self.student, self.follow = copy.deepcopy(encoder), update_momentum
        linears = [module for module in head.mlp if isinstance(module, nn.Linear)]
        sizes = (linears[0].in_features, linears[0].out_features, linears[-1].out_features, len(head.prototypes))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of its old weight_norm
            self.head = DINOProjectionHead(*sizes, freeze_last_layer=-1)
        with torch.no_grad():
            copied = [module for module in self.head.layers if isinstance(module, nn.Linear)]
            for theirs, module in zip(copied, linears, strict=True):
                theirs.load_state_dict(module.state_dict())
            self.head.last_layer.weight_v.copy_(head.prototypes)
        self.teacher, self.teacher_head = copy.deepcopy(encoder), self._copied_head(sizes)
        deactivate_requires_grad(self.teacher)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(sizes[-1], TEACHER_TEMPERATURE, TEACHER_TEMPERATURE, center_momentum=CENTER_MOMENTUM)
        self.trained = nn.ModuleList([self.student, self.head])
        self.optimizer = plain_adamw(self.trained)

    def _copied_head(self, sizes: tuple[int, ...]) -> nn.Module:
        """As the student's; weight-normed modules cannot be deep-copied once they have run."""
        from lightly.models.modules import DINOProjectionHead

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            made = DINOProjectionHead(*sizes)
        made.load_state_dict(self.head.state_dict())
        return made

    def step(self, batch: Batch, bf16: bool = False) -> float:
        self.follow(self.student, self.teacher, m=MOMENTUM)
        self.follow(self.head, self.teacher_head, m=MOMENTUM)
        with autocast(batch, bf16):
            with torch.no_grad():
                targets = [self.teacher_head(self.teacher(view).flatten(start_dim=1)) for view in batch.global_crops]
            views = [*batch.global_crops, *batch.local_crops]
            logits = [self.head(self.student(view).flatten(start_dim=1)) for view in views]
            loss = self.criterion([t.float() for t in targets], [x.float() for x in logits])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class LightlyMae:
    """lightly's parts, in the loop of its MAE example, with the published targets."""

    def __init__(self, work: StepWork, encoder: nn.Module, ours: nn.Module) -> None:
        from lightly.models import utils
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        self.utils, self.work, self.mask_ratio = utils, work, ours.config.mask_ratio
        vit = copy.deepcopy(encoder)
        self.encoder = MaskedVisionTransformerTIMM(
            vit=vit, weight_initialization="skip", pos_embed_initialization="skip"
        )
        vit.pos_embed.requires_grad_(False)
        self.encoder.mask_token.requires_grad_(False)  # MAE encodes no masked patches
        width, depth, heads = work.decoder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has a successor, without embedding and prediction
            self.decoder = MAEDecoderTIMM(
                num_patches=(work.image // work.patch) ** 2,
                patch_size=work.patch,
                embed_dim=encoder.embed_dim,
                decoder_embed_dim=width,
                decoder_depth=depth,
                decoder_num_heads=heads,
                norm_layer=partial(nn.LayerNorm, eps=ours.norm.eps),
            )
        names = {
            "embed": "decoder_embed",
            "norm": "decoder_norm",
            "predict": "decoder_pred",
            "blocks": "decoder_blocks",
        }
        with torch.no_grad():
            for own, theirs in names.items():
                getattr(self.decoder, theirs).load_state_dict(getattr(ours, own).state_dict())
            self.decoder.mask_token.copy_(ours.mask_token)
            self.decoder.decoder_pos_embed[:, 0] = 0
            self.decoder.decoder_pos_embed[:, 1:] = ours.positions
        self.trained = nn.ModuleList([self.encoder, self.decoder])
        self.optimizer = plain_adamw(self.trained)

    def step(self, batch: Batch, bf16: bool = False) -> float:
        images, utils = batch.global_crops[0], self.utils
        length = batch.noise.shape[1]
        num_visible = int(length * (1 - self.mask_ratio))
        order = batch.noise.argsort(dim=1, stable=True) + 1
        keep = torch.cat([torch.zeros(len(order), 1, dtype=order.dtype), order[:, :num_visible]], dim=1)
        removed = order[:, num_visible:]
        with autocast(batch, bf16):
            embedded = self.decoder.embed(self.encoder.encode(images=images, idx_keep=keep))
            tokens = utils.repeat_token(self.decoder.mask_token, (len(images), length + 1))
            tokens = utils.set_at_index(tokens, keep, embedded.type_as(tokens))
            predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), removed))
            targets = utils.get_at_index(utils.patchify(images, self.work.patch), removed - 1)
            loss = nn.functional.mse_loss(predicted.float(), utils.normalize_mean_var(targets, dim=-1))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def shrunk(work: StepWork) -> StepWork:
    """Two blocks, two images, a small head: for a trial of everything around the measurement."""
    return replace(work, batch=2, depth=2, prototypes=1024, hidden=256)
