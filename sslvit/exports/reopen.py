"""Open exported folders with the libraries they are for and run them: the other side of `verify.py`, a process apart.

`python -m sslvit.exports.reopen JOB.json` knows nothing of what should come out: it reads images, writes outputs, and
says which mean and std the library would use. No code of ours takes part in opening or running.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Images = dict[str, Tensor]  # size -> (B, C, H, W)
Outputs = dict[str, Tensor]  # "tokens/64x64" (B, P + N, D), "features/64x64" (B, D), "pixels" (C, H, W)


def with_timm(folder: Path, images: Images, picture: Tensor) -> tuple[Outputs, dict[str, Any]]:
    """`timm.create_model("local-dir:...")` and its own transform."""
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    outputs = _run_timm(model, images)
    config = timm.data.resolve_data_config({}, model=model)
    if (image := _as_image(picture)) is not None:
        outputs["pixels"] = timm.data.create_transform(**config, is_training=False)(image)
    return outputs, _facts("timm", timm.__version__, config["mean"], config["std"])


def with_transformers(folder: Path, images: Images, picture: Tensor) -> tuple[Outputs, dict[str, Any]]:
    """`AutoModel` and `AutoImageProcessor`. Weights the class wants and the folder lacks are named."""
    import transformers

    transformers.logging.set_verbosity_error()
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    options = {"add_pooling_layer": False} if kind == "vit" else {}
    model, loading = transformers.AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    outputs: Outputs = {}
    for size, batch in images.items():
        out = model.eval()(batch)
        outputs[f"tokens/{size}"] = out.last_hidden_state
        if kind is None:  # timm's pooling; what the other classes pool is their own affair
            outputs[f"features/{size}"] = out.pooler_output
    if (image := _as_image(picture)) is not None:
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        outputs["pixels"] = processor(image, return_tensors="pt")["pixel_values"][0]
    facts = _facts("transformers", transformers.__version__, config["image_mean"], config["image_std"])
    wrong = [*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]]
    return outputs, facts | {"wrong_keys": sorted(map(str, wrong))}


def with_open_clip(folder: Path, images: Images, picture: Tensor) -> tuple[Outputs, dict[str, Any]]:
    """The image tower of `open_clip.create_model_and_transforms`, weights included, and its transform."""
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", pretrained_image=True)
    model.eval()
    outputs = _run_timm(model.visual.trunk, images)
    for size, batch in images.items():
        outputs[f"features/{size}"] = model.encode_image(batch)
    outputs["pixels"] = transform(_as_image(picture))
    used = model.visual.preprocess_cfg
    return outputs, _facts("open_clip", open_clip.__version__, used["mean"], used["std"])


def with_onnxruntime(folder: Path, images: Images, picture: Tensor) -> tuple[Outputs, dict[str, Any]]:
    """The graph under onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "encoder.onnx"), providers=["CPUExecutionProvider"])
    config = json.loads((folder / "preprocessor_config.json").read_text())
    outputs: Outputs = {}
    for size, batch in images.items():
        tokens, features = session.run(["tokens", "features"], {"images": batch.numpy()})
        outputs |= {f"tokens/{size}": torch.from_numpy(tokens), f"features/{size}": torch.from_numpy(features)}
    return outputs, _facts("onnxruntime", onnxruntime.__version__, config["image_mean"], config["image_std"])


def with_safetensors(folder: Path, images: Images, picture: Tensor) -> tuple[Outputs, dict[str, Any]]:
    """The bare file: safetensors reads it, timm builds what its header says."""
    import safetensors
    import timm

    file = folder / "encoder.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["sslvit"])
    model = timm.create_model(header["architecture"]["name"], num_classes=0, **header["architecture"]["args"]).eval()
    model.load_state_dict(load_file(file), strict=True)
    facts = header["preprocessing"]
    return _run_timm(model, images), _facts("safetensors", safetensors.__version__, facts["mean"], facts["std"])


LIBRARIES: dict[str, Callable[[Path, Images, Tensor], tuple[Outputs, dict[str, Any]]]] = {
    "timm": with_timm,
    "transformers": with_transformers,
    "open_clip": with_open_clip,
    "onnxruntime": with_onnxruntime,
    "safetensors": with_safetensors,
}


def main(job_file: Path) -> None:
    """Run every check of every job; outputs go to the files it names, one pair per check."""
    for job in json.loads(job_file.read_text()):
        inputs = load_file(job["inputs"])
        picture = inputs.pop("picture")
        for check in job["checks"]:
            outputs, facts = _run(check, {size: inputs[size] for size in check["sizes"]}, picture)
            save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, check["output"] + ".safetensors")
            Path(check["output"] + ".json").write_text(json.dumps(facts))


@torch.no_grad()
def _run(check: dict[str, Any], images: Images, picture: Tensor) -> tuple[Outputs, dict[str, Any]]:
    try:
        return LIBRARIES[check["library"]](Path(check["folder"]), images, picture)
    except Exception as error:  # whatever a library raises is what there is to say about the folder
        return {}, {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}


def _as_image(picture: Tensor) -> Image.Image | None:
    """A picture (H, W, C) as libraries' transforms take it; None where it is neither grey nor RGB."""
    return Image.fromarray(picture.squeeze(-1).numpy()) if picture.shape[-1] in (1, 3) else None


def _run_timm(model: Any, images: Images) -> Outputs:
    outputs: Outputs = {}
    for size, batch in images.items():
        outputs[f"tokens/{size}"] = model.forward_features(batch)
        outputs[f"features/{size}"] = model(batch)
    return outputs


def _facts(library: str, version: str, mean: Any, std: Any) -> dict[str, Any]:
    return {"library": library, "version": version, "mean": list(mean), "std": list(std), "wrong_keys": []}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
