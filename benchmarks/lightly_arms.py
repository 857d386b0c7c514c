"""lightly's DINO and MAE modules on a timm ViT, in the plain training loop of its examples. Used by equal_minutes.py.

Settings, from what lightly publishes: the CIFAR-10 benchmark of its docs (batch 128; DINO on two 32-pixel crops, no
local crops, no blur), its examples (DINO head 512-64-2048, momentum .996 to 1) and its ViT benchmark (AdamW; DINO
5e-4 B/256, weight decay .04 to .4, teacher temperature .04, 10 of 100 epochs warm-up; MAE 1.5e-4 B/256, weight decay
.05, betas .9 and .95); MAE's decoder 512 x 1 block and pixels as targets from its Imagenette benchmark. Epochs of those
recipes count as shares of the run, as ours do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sslvit.data.decode import decode
from sslvit.data.sources import open_source
from sslvit.encoder.architecture import Architecture
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.weights import LoadedEncoder
from sslvit.exports.timm_folder import write_timm_folder

SIDE, PATCH = 32, 4
ARCHITECTURE = Architecture("vit_tiny_patch16_224", {"img_size": SIDE, "patch_size": PATCH})
WIDTH = 192


def decoded(spec: str) -> np.ndarray:
    """All images of a set: (N, 32, 32, 3) uint8."""
    source = open_source(spec)
    images = [decode(source.read(index), channels=3) for index in range(len(source))]
    return np.stack([np.asarray(Image.fromarray(image).resize((SIDE, SIDE))) for image in images])


class _Views(torch.utils.data.Dataset):
    """Images through one of lightly's transforms, which ask for PIL images and give lists of views."""

    def __init__(self, images: np.ndarray, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(Image.fromarray(self.images[index]))


class Dino(nn.Module):
    """DINO from lightly's parts; `judged` is the teacher's encoder."""

    lr, betas, weight_decay, weight_decay_end, warmup = 5e-4, (0.9, 0.999), 0.04, 0.4, 0.1

    def __init__(self, seed: int) -> None:
        super().__init__()
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
        from lightly.models.utils import deactivate_requires_grad, update_momentum
        from lightly.transforms import DINOTransform

        self.transform = DINOTransform(global_crop_size=SIDE, n_local_views=0, gaussian_blur=(0, 0, 0))
        self.student = MaskedVisionTransformerTIMM(vit=ARCHITECTURE.build(seed))
        self.teacher = MaskedVisionTransformerTIMM(vit=ARCHITECTURE.build(seed))
        self.head = DINOProjectionHead(WIDTH, 512, 64, 2048, freeze_last_layer=1)
        self.teacher_head = DINOProjectionHead(WIDTH, 512, 64, 2048)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher_head.load_state_dict(self.head.state_dict())
        deactivate_requires_grad(self.teacher)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(output_dim=2048, warmup_teacher_temp=0.04, teacher_temp=0.04)
        self._follow = update_momentum

    @property
    def judged(self) -> nn.Module:
        return self.teacher.vit

    def trained(self) -> list[nn.Module]:
        return [self.student, self.head]

    def loss(self, views: list[Tensor], progress: float) -> Tensor:
        """Teacher follows student, then the loss, in the order of lightly's benchmark."""
        momentum = 1 - (1 - 0.996) * (np.cos(np.pi * progress) + 1) / 2
        self._follow(self.student, self.teacher, m=momentum)
        self._follow(self.head, self.teacher_head, m=momentum)
        images = torch.cat(views)
        with torch.no_grad():
            targets = self.teacher_head(self.teacher(images))
        logits = self.head(self.student(images))
        return self.criterion(list(targets.float().chunk(2)), list(logits.float().chunk(len(views))))

    def before_update(self, progress: float) -> None:
        self.head.cancel_last_layer_gradients(current_epoch=int(100 * progress))


class Mae(nn.Module):
    """MAE from lightly's parts, pixels as targets."""

    lr, betas, weight_decay, weight_decay_end, warmup = 1.5e-4, (0.9, 0.95), 0.05, 0.05, 0.05

    def __init__(self, seed: int) -> None:
        super().__init__()
        from lightly.models import utils
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from lightly.transforms import MAETransform

        self.transform = MAETransform(input_size=SIDE)
        self.encoder = MaskedVisionTransformerTIMM(vit=ARCHITECTURE.build(seed))
        self.decoder = MAEDecoderTIMM(
            num_patches=(SIDE // PATCH) ** 2,
            patch_size=PATCH,
            embed_dim=WIDTH,
            decoder_embed_dim=512,
            decoder_depth=1,
            decoder_num_heads=16,
        )
        self.criterion = nn.MSELoss()
        self.utils = utils

    @property
    def judged(self) -> nn.Module:
        return self.encoder.vit

    def trained(self) -> list[nn.Module]:
        return [self.encoder, self.decoder]

    def loss(self, views: list[Tensor], progress: float) -> Tensor:
        """Mean squared error of the removed patches (MAE example of lightly)."""
        images, utils = views[0], self.utils
        size = (len(images), self.encoder.sequence_length)
        keep, removed = utils.random_token_mask(size=size, mask_ratio=0.75)
        embedded = self.decoder.embed(self.encoder.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, size)
        tokens = utils.set_at_index(tokens, keep, embedded.type_as(tokens))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), removed))
        targets = utils.get_at_index(utils.patchify(images, PATCH), removed - 1)
        return self.criterion(predicted, targets)

    def before_update(self, progress: float) -> None:
        """Nothing stands still."""


ARMS: dict[str, type[Dino] | type[Mae]] = {"lightly_dino": Dino, "lightly_mae": Mae}


def train(
    arm: str, images: np.ndarray, steps: int, batch_size: int, precision: str, seed: int, lr: float | None
) -> tuple[nn.Module, list[float]]:
    """Train from scratch; returns the judged encoder and the seconds at which each step was done.

    lr: the peak; None is the published rule.
    """
    from lightly.models.utils import get_weight_decay_parameters
    from lightly.utils.scheduler import CosineWarmupScheduler

    torch.manual_seed(seed)
    module = ARMS[arm](seed)
    decayed, free = get_weight_decay_parameters(module.trained())
    groups = [{"params": [p for p in decayed if p.requires_grad]}, {"params": [p for p in free if p.requires_grad]}]
    groups[1]["weight_decay"] = 0.0
    peak = module.lr * batch_size / 256 if lr is None else lr
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=module.betas, weight_decay=module.weight_decay)
    scheduler = CosineWarmupScheduler(optimizer, warmup_epochs=int(module.warmup * steps), max_epochs=steps)
    began, done = time.monotonic(), []
    for step, views in zip(range(steps), _batches(_Views(images, module.transform), batch_size), strict=False):
        progress = step / steps
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = module.loss(views, progress)
        optimizer.zero_grad()
        loss.backward()
        module.before_update(progress)
        half_wave = (1 + np.cos(np.pi * progress)) / 2
        spread = module.weight_decay - module.weight_decay_end
        optimizer.param_groups[0]["weight_decay"] = module.weight_decay_end + spread * half_wave
        optimizer.step()
        scheduler.step()
        done.append(time.monotonic() - began)
    return module.judged, done


def _batches(views: _Views, batch_size: int) -> Iterator[Any]:
    """Epoch after epoch, with as many workers as there are processors."""
    workers = min(2, torch.get_num_threads())
    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        views, batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    while True:
        yield from loader


def save(encoder: nn.Module, folder: Path) -> None:
    """As a timm folder, which `sslvit evaluate` opens."""
    folder.mkdir(parents=True)
    loaded = LoadedEncoder(encoder.eval(), ARCHITECTURE, Preprocessing(SIDE), "lightly")  # type: ignore[arg-type]
    write_timm_folder(loaded, folder)
