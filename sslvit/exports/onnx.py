"""The encoder as an ONNX graph, with any batch size and any image size the patch size divides."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.export import Dim

from sslvit.encoder.vit import Encoder, patch_size
from sslvit.encoder.weights import LoadedEncoder
from sslvit.errors import InputError

FILE = "encoder.onnx"
OPSET = 18  # the first with antialiased resizing, which resampled positions need


class _Traced(nn.Module):
    """timm's own forward: images (B, C, H, W) to tokens (B, P + N, D) and the pooled feature (B, D)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.encoder.forward_features(images)
        return tokens, self.encoder.forward_head(tokens, pre_logits=True)


def check_onnx(loaded: LoadedEncoder) -> None:
    """InputError when the graph would not be exact, or the packages that write and run ONNX are not there."""
    if not isinstance(loaded.module, VisionTransformer):
        raise InputError(
            "onnx: rotary positions are traced for one image size and wrong at others; export timm instead"
        )
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise InputError(f"onnx needs {missing[0]}, which is not installed; pip install 'sslvit[onnx]'")


def write_onnx(loaded: LoadedEncoder, folder: Path) -> None:
    """Write `folder/encoder.onnx`: input `images`, outputs `tokens` and `features`, fp32."""
    check_onnx(loaded)
    (height, width), (rows, columns) = loaded.module.patch_embed.grid_size, patch_size(loaded.module)
    example = torch.zeros(2, loaded.preprocessing.channels, (height + 1) * rows, (width + 2) * columns)
    sizes = {0: Dim("batch"), 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            _Traced(loaded.module).eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=(sizes,),
            input_names=["images"],
            output_names=["tokens", "features"],
            opset_version=OPSET,
        )
    assert program is not None
    program.save(str(folder / FILE), external_data=False)
