"""What a MAE run makes of images it sees a quarter of: original, what was visible, and the decoder's guess.

Uses the student and the decoder of a run's newest checkpoint. Where the loss is on normalised pixels, each guessed
patch is given back the mean and contrast of the true one (as MAE, arXiv:2111.06377, figure 2, is drawn): its structure
is guessed, its average colour is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from sslvit.checkpoint import load_checkpoint
from sslvit.config import PretrainConfig
from sslvit.data.photometry import normalize
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.vit import create_encoder, forward_tokens, patchify, unpatchify
from sslvit.objectives.mae import Mae
from sslvit.objectives.passes import Draw, num_visible

DECODER, STUDENT = "objectives.mae.", "student."
GREY = 128  # what hides a patch


def open_mae(checkpoint: Path, config: PretrainConfig) -> tuple[VisionTransformer, Mae] | None:
    """Student and decoder of a checkpoint of a run with a resolved config; None when it has no decoder."""
    if config.mae is None:
        return None
    tensors = load_checkpoint(checkpoint, stems=["model"], verify=False)[0]["model"]
    decoder, student = _part(tensors, DECODER), _part(tensors, STUDENT)
    encoder = create_encoder(config.encoder)
    if not decoder or _shapes(student) != _shapes(encoder.state_dict()):  # another architecture, from `init`
        return None
    encoder.load_state_dict(student)
    patch, channels = config.encoder.patch_size, config.encoder.in_chans
    assert patch and channels
    rows, columns = (side // patch for side in config.encoder.size)
    mae = Mae(config.mae, encoder.embed_dim, patch, (rows, columns), channels, config.crops.num_global or 1)
    mae.load_state_dict(decoder)
    return encoder.eval(), mae.eval()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def reconstruct(
    encoder: VisionTransformer, mae: Mae, images: Tensor, preprocessing: Preprocessing, seed: int
) -> tuple[Tensor, Tensor]:
    """uint8 images (B, C, H, W) to what was visible and to the guess pasted around it, both uint8 (B, C, H, W)."""
    patch, size, channels = mae.patch_size, (images.shape[2], images.shape[3]), images.shape[1]
    normal = normalize(images, preprocessing.mean, preprocessing.std)
    pixels = patchify(images, patch)  # (B, N, p*p*C)
    count = pixels.shape[1]
    draw = Draw(seed, 0, torch.arange(len(images)))
    masking = draw.visible(0, count, num_visible(count, mae.config.mask_ratio))
    assert masking.keep is not None and masking.removed is not None
    tokens = forward_tokens(encoder, normal, keep=masking.keep)
    guess = mae.decode(tokens, masking.keep, masking.removed).float()
    if mae.config.norm_pixels:
        guess = with_statistics_of(guess, _at(patchify(normal, patch), masking.removed))
    guess = to_pixels(guess, preprocessing)
    return (
        unpatchify(paste(pixels, masking.removed, torch.full_like(guess, GREY)), patch, size, channels),
        unpatchify(paste(pixels, masking.removed, guess), patch, size, channels),
    )


def paste(patches: Tensor, removed: Tensor, guess: Tensor) -> Tensor:
    """Patches (B, N, P) with those at `removed` (B, M) replaced by `guess` (B, M, P); the others stay bit for bit."""
    return patches.scatter(1, removed[..., None].expand(-1, -1, patches.shape[-1]), guess.to(patches.dtype))


def with_statistics_of(guess: Tensor, patches: Tensor) -> Tensor:
    """The inverse of MAE's normalisation: each guessed patch (B, M, P) with mean and spread of the true one."""
    return guess * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)


def to_pixels(patches: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalised patches (B, M, p*p*C), channels last, to uint8."""
    channels = preprocessing.channels
    values = patches.unflatten(-1, (-1, channels))
    values = values * torch.tensor(preprocessing.std) + torch.tensor(preprocessing.mean)
    return values.mul(255).round().clamp(0, 255).to(torch.uint8).flatten(-2)


def _at(patches: Tensor, places: Tensor) -> Tensor:
    return patches.gather(1, places[..., None].expand(-1, -1, patches.shape[-1]))
