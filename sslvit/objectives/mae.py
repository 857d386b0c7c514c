"""Reconstruction of removed patches from the visible ones (MAE, arXiv:2111.06377).

Differences that change no value: patches stay in shuffled order with gathered positions (nothing is unshuffled), and
only the removed patches are predicted.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from sslvit.encoder.vit import Tokens, forward_block, patchify, sincos_positions
from sslvit.objectives.config import MaeConfig
from sslvit.objectives.passes import Draw, Pass, concatenate, num_visible


def normalized(patches: Tensor) -> Tensor:
    """Pixels (..., p*p*C) of a patch with zero mean and unit variance (MAE, section 3, unbiased, eps 1e-6).

    The variance is the squared length of what is left without the mean: on a CPU `var` takes four times as long.
    """
    centred = patches - patches.mean(-1, keepdim=True)
    variance = torch.linalg.vector_norm(centred, dim=-1, keepdim=True).square() / (patches.shape[-1] - 1)
    return centred * (variance + 1e-6).rsqrt()


class Mae(nn.Module):
    """The MAE objective: a light decoder and the loss. The encoder's prefix tokens go through the decoder too."""

    positions: Tensor

    def __init__(
        self, config: MaeConfig, embed_dim: int, patch_size: int, grid: tuple[int, int], channels: int, num_global: int
    ) -> None:
        """`grid` is the number of patches (rows, columns) of a global crop."""
        super().__init__()
        assert config.decoder_dim and config.decoder_depth and config.decoder_num_heads
        self.config = config
        self.patch_size = patch_size
        self.views = list(range(num_global))[-config.num_views :]
        self.compiled = False  # the decoder's blocks; `Pretraining` knows
        dim = config.decoder_dim
        self.embed = nn.Linear(embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_positions(grid, dim), persistent=False)
        self.blocks = nn.ModuleList(
            [Block(dim, config.decoder_num_heads, qkv_bias=True) for _ in range(config.decoder_depth)]
        )
        self.norm = nn.LayerNorm(dim)
        self.predict = nn.Linear(dim, patch_size**2 * channels)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def passes(self, draw: Draw, num_patches: int) -> list[Pass]:
        """The student on the visible patches of the last `num_views` global views."""
        visible = num_visible(num_patches, self.config.mask_ratio)
        return [Pass("student", "global", view, draw.visible(view, num_patches, visible)) for view in self.views]

    def decode(self, tokens: Tokens, keep: Tensor, removed: Tensor) -> Tensor:
        """Predicted pixels of the removed patches: tokens of V visible patches -> (B, M, p*p*C)."""
        visible = self.embed(tokens.patches)
        prefix = self.embed(tokens.prefix)
        hidden = torch.cat(
            [
                prefix,
                visible + self.positions[keep].to(visible.dtype),
                self.mask_token.to(visible.dtype) + self.positions[removed].to(visible.dtype),
            ],
            dim=1,
        )
        for block in self.blocks:
            hidden = forward_block(block, hidden, compiled=self.compiled)
        return self.predict(self.norm(hidden[:, -removed.shape[1] :]))

    def loss(self, tokens: dict[Pass, Tokens], images: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error on removed patches; images (G, B, C, H, W) normalised (MAE, section 3)."""
        passes = list(tokens)
        joined = concatenate([tokens[p] for p in passes])
        keep = torch.cat([_present(p.masking.keep) for p in passes])
        removed = torch.cat([_present(p.masking.removed) for p in passes])
        predicted = self.decode(joined, keep, removed).float()
        wanted = self.targets(torch.cat([images[p.index] for p in passes]), removed)
        return (predicted - wanted).square().mean(), {}

    @torch.no_grad()
    def targets(self, images: Tensor, removed: Tensor) -> Tensor:
        """What is to be predicted for the `removed` (B, M) patches of images (B, C, H, W): (B, M, p*p*C) fp32."""
        patches = patchify(images.float(), self.patch_size)
        wanted = patches.gather(1, removed[..., None].expand(-1, -1, patches.shape[-1]))
        return normalized(wanted) if self.config.norm_pixels else wanted

    def before_update(self, step: int) -> None:
        """Nothing stands still."""

    def after_step(self, step: int) -> None:
        """Nothing follows."""

    def discard(self) -> None:
        """Nothing is kept between steps."""


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
