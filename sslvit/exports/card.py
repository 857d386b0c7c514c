"""The model card (README.md) of an export, written from facts: nothing in it that was not measured or given."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sslvit.encoder.weights import LoadedEncoder
from sslvit.exports.hf_folder import ANY_SIZE, hf_class
from sslvit.exports.licence import front_matter_lines, licence_paragraph

PLACE = "FOLDER"  # stands for the folder in every snippet

LOADING = {
    "timm": """\
```python
import timm, torch
model = timm.create_model("local-dir:{path}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))
features = model(torch.zeros(1, {channels}, {height}, {width}))  # (1, {dim})
```

```python
from transformers import AutoModel
model = AutoModel.from_pretrained("{path}")
```
""",
    "hf": """\
```python
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained("{path}"{options})
processor = AutoImageProcessor.from_pretrained("{path}")
```
""",
    "open_clip": """\
```python
import open_clip
model = open_clip.create_model("local-dir:{path}", pretrained_image=True)  # our image tower, a new text tower
```

`open_clip_config.json` names the tower by its absolute path: export again after moving the folder.
""",
    "onnx": """\
```python
import numpy, onnxruntime
session = onnxruntime.InferenceSession("{path}/encoder.onnx")
tokens, features = session.run(None, {{"images": numpy.zeros((1, {channels}, {height}, {width}), numpy.float32)}})
```
""",
    "safetensors": """\
```python
from safetensors.torch import load_file
tensors = load_file("{path}/encoder.safetensors")  # timm's key names; the header holds the architecture
```
""",
}
LOADING["siglip"] = LOADING["hf"]
TIMM_IN_OPEN_CLIP = """
```python
from open_clip import CLIP
vision = dict(timm_model_name="local-dir:{path}", timm_model_pretrained=True, timm_proj="none", image_size={size})
text = dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12)
model = CLIP(embed_dim={dim}, vision_cfg=vision | dict(timm_pool="{pool}"), text_cfg=text)  # a new text tower
```
"""


#: The papers behind the objectives of a run.
PAPERS = {
    "dino": "Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021, arXiv:2104.14294",
    "ibot": "Zhou et al., iBOT: Image BERT Pre-Training with Online Tokenizer, 2021, arXiv:2111.07832",
    "koleo": "Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, 2023, arXiv:2304.07193",
    "mae": "He et al., Masked Autoencoders Are Scalable Vision Learners, 2021, arXiv:2111.06377",
}


def model_card(
    loaded: LoadedEncoder,
    name: str,
    facts: Mapping[str, Any],
    reports: Sequence[Mapping[str, Any]],
    path: str = PLACE,
) -> str:
    """The card of `loaded` in format `name`; `facts` as `run_facts` finds them, `reports` as `verify` gave them."""
    parts = [
        _front_matter(loaded, name, facts),
        f"# {loaded.architecture.name}, pretrained with sslvit\n",
        _what(loaded, facts),
        "## Load it\n\n" + _loading(loaded, name, path),
        _ours(path),
        "## Preprocessing\n\n" + _preprocessing(loaded),
        "## Checked\n\n" + _checked(name, reports),
    ]
    if rows := facts.get("results"):
        parts.append("## Numbers\n\n" + numbers_table(rows))
    parts.append("## Limits\n\n" + _limits(loaded, name))
    parts.append("## Licence\n\n" + licence_paragraph(loaded, facts) + "\n")
    parts.append("## Citation\n\n" + _citation(facts))
    if config := facts.get("config"):
        parts.append("## Configuration\n\n```json\n" + json.dumps(config, indent=1) + "\n```\n")
    return "\n".join(parts)


def _front_matter(loaded: LoadedEncoder, name: str, facts: Mapping[str, Any]) -> str:
    library = {"timm": "timm", "hf": "transformers", "siglip": "transformers", "open_clip": "open_clip"}.get(name)
    lines = ["---", *front_matter_lines(loaded, facts)]
    if library:
        lines.append(f"library_name: {library}")
    lines += [
        "pipeline_tag: image-feature-extraction",
        "tags:",
        "- self-supervised",
        "- vision-transformer",
        "- sslvit",
        "---",
        "",
    ]
    return "\n".join(lines)


def _what(loaded: LoadedEncoder, facts: Mapping[str, Any]) -> str:
    config = loaded.config
    tokens = ["a class token"] * bool(config.class_token) + [f"{config.num_registers} registers"] * bool(
        config.num_registers
    )
    prefix = " and ".join(tokens)
    channels = "1 channel" if config.in_chans == 1 else f"{config.in_chans} channels"
    lines = [
        f"A vision transformer: {config.depth} blocks of width {config.embed_dim} with {config.num_heads} heads, "
        f"patches of {config.patch_size} px, {channels}, {prefix or 'no class token, no registers'}.",
        "",
    ]
    known = {
        "Data": facts.get("data"),
        "Started from": facts.get("init") or "random weights" if "config" in facts else loaded.source,
        "Steps": loaded.step if loaded.step is not None else facts.get("steps"),
        "Objectives": ", ".join(_objectives(facts)) or None,
        "Hardware": hardware(facts.get("environment")),
        "Weights (SHA-256)": loaded.fingerprint,
    }
    return "\n".join(lines + [f"- {key}: {value}" for key, value in known.items() if value is not None]) + "\n"


def _objectives(facts: Mapping[str, Any]) -> list[str]:
    return [name for name in PAPERS if (facts.get("config") or {}).get(name)]


def hardware(environment: Any) -> str | None:
    """From env.json: never the host's name."""
    if not isinstance(environment, Mapping):
        return None
    shown = [
        f"{environment['world_size']} process{'es' if environment['world_size'] != 1 else ''}"
        if "world_size" in environment
        else "",
        f"{environment['num_cpus']} CPU cores" if environment.get("num_cpus") else "",
        str(environment.get("gpu") or environment.get("device") or ""),
    ]
    return ", ".join(filter(None, shown)) or None


def _loading(loaded: LoadedEncoder, name: str, path: str) -> str:
    is_vit = name == "hf" and hf_class(loaded.module) == "vit"
    channels, (height, width) = loaded.preprocessing.channels, loaded.preprocessing.size
    return (LOADING[name] + TIMM_IN_OPEN_CLIP * (name == "timm" and channels == 3)).format(
        path=path,
        channels=channels,
        height=height,
        width=width,
        size=height if height == width else (height, width),
        dim=loaded.module.num_features,
        pool=loaded.module.global_pool,
        options=", add_pooling_layer=False" if is_vit else "",
    )


def _ours(path: str) -> str:
    return f"""```bash
sslvit embed --encoder {path} --data /my/images --output-file features.npz
```
"""


def _preprocessing(loaded: LoadedEncoder) -> str:
    p = loaded.preprocessing
    height, width = p.size
    resize = f"Shorter side to {math.floor(height / p.crop_pct)} px ({p.interpolation}), centre crop of {height} px"
    if height != width:
        resize = f"In proportion until it covers {height}x{width} px ({p.interpolation}), centre crop"
    deep = f" (of files deeper than 8 bits, {p.value_range} per channel become 0 and 1)" if p.value_range else ""
    return f"{resize}, values 0..1{deep}, then per channel minus mean {list(p.mean)}, over std {list(p.std)}.\n"


def _checked(name: str, reports: Sequence[Mapping[str, Any]]) -> str:
    lines = ["Reopened in a fresh process and compared with the encoder it was made from.", ""]
    lines += ["| library | image size | maximum difference |", "|---|---|---|"]
    for report in reports:
        if "skipped" in report:
            lines.append(f"| {report['library']} | | not checked: {report['skipped']} |")
        for size, difference in report.get("max_difference", {}).items():
            lines.append(f"| {report['library']} {report['version']} | {size} | {difference:.2g} |")
    return "\n".join(lines) + "\n"


def numbers_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a results.json as a Markdown table."""
    lines = ["| what | value | 95% interval | protocol | data | seed |", "|---|---|---|---|---|---|"]
    for row in rows:
        bounds = [_number(bound) for bound in row.get("ci95") or ()]
        interval = " to ".join(bounds) if len(bounds) == 2 and all(bounds) else ""
        cells = [
            row.get("name"),
            _number(row.get("value")),
            interval,
            row.get("protocol"),
            row.get("data"),
            row.get("seed"),
        ]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    """Four digits; nothing for a value that was not finite, which results.json holds as null."""
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _limits(loaded: LoadedEncoder, name: str) -> str:
    lines = [
        "It knows what its training images show, without labels or words; judge it on your data before relying on it."
    ]
    if name in ("hf", "siglip") and hf_class(loaded.module) not in ANY_SIZE:
        lines.append(
            "transformers resizes the positions of this class without antialiasing: the differences above hold at the "
            "native size only. At other sizes use the timm folder."
        )
    if (count := loaded.preprocessing.channels) == 1:
        lines.append('It expects grey images, one channel: `image.convert("L")`.')
    elif count != 3:
        lines.append(f"It expects {count} channels; image processors of other libraries read RGB.")
    return "\n\n".join(lines) + "\n"


def _citation(facts: Mapping[str, Any]) -> str:
    """The library, and the papers of the objectives this encoder was trained with."""
    entry = "@software{sslvit, author = {The sslvit developers}, title = {sslvit}, license = {Apache-2.0}}"
    papers = "\n".join(f"- {PAPERS[name]}" for name in _objectives(facts))
    return f"```bibtex\n{entry}\n```\n" + (f"\nThe objectives it was trained with:\n\n{papers}\n" if papers else "")
