"""Open an encoder from anything that holds one: the `E` of the command line.

A run, an encoder folder, a timm name, a Hugging Face folder or hub name, a .safetensors or .pth file. What comes back
is always the same: a timm module in eval mode, the preprocessing it expects, and where it came from. Matching keys is
`strict.py`, their names are `layouts.py`.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from sslvit import distributed
from sslvit.checkpoint import (
    best_step,
    checkpoint_path,
    checkpoint_steps,
    is_chosen,
    latest_checkpoint,
    load_checkpoint,
)
from sslvit.checkpoint import read_weights_file as read_file
from sslvit.encoder.architecture import (
    CLIP_NORM_EPS,
    Architecture,
    config_of,
    heads_of_name,
    infer_architecture,
    infer_dinov3,
)
from sslvit.encoder.config import IMAGENET_MEAN, IMAGENET_STD, EncoderConfig, Preprocessing
from sslvit.encoder.layouts import to_timm
from sslvit.encoder.strict import ImportReport, import_weights
from sslvit.encoder.vit import Encoder, check_encoder, create_encoder, create_pooled, is_vit
from sslvit.errors import InputError

__all__ = ["ImportReport", "LoadedEncoder", "import_weights", "init_encoder", "load_encoder", "random_like"]

_HF_MODELS = ("vit", "vit_mae", "dinov2", "dinov2_with_registers", "siglip", "siglip_vision_model", "dinov3_vit")
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPENAI_MEAN, _OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # open_clip's
_HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
_MOVES = 5  # times that a run may prune a checkpoint while it is read
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, in preprocessor_config.json
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_ONLY_JUDGED = "other models of timm are for evaluate and embed only"
_ALIASES = {"image_size": "img_size", "num_registers": "reg_tokens"}  # our words for timm's
WEIGHTS_FILE, METADATA_KEY = (
    "encoder.safetensors",
    "sslvit",
)  # what `export --formats safetensors` writes, and its header


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder ready for use, and the facts about it.

    `step` is the step of a run's checkpoint; `chosen`: among others, by a number on the run's validation images.
    """

    module: Encoder
    architecture: Architecture
    preprocessing: Preprocessing
    source: str
    license: str | None = None
    step: int | None = None
    report: ImportReport | None = None
    chosen: bool = False

    @property
    def config(self) -> EncoderConfig:
        """The same facts as a config without `auto` values."""
        return config_of(self.module, self.architecture.name)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, types, shapes and bytes of all weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def load_encoder(spec: str, *, device: str | torch.device = "cpu", pooled: bool = False) -> LoadedEncoder:
    """Open `spec`, in eval mode on `device`; InputError in one line when it is no encoder.

    RUN, RUN@best, RUN@step_N: the teacher if there is one, else the student. FOLDER: timm or Hugging Face. FILE.pth or
    .safetensors, with `?num_heads=`, `?checkpoint_key=student`, ... where shapes do not tell. timm's NAME with released
    weights, `NAME?pretrained=false&seed=0&img_size=64&depth=6` without. `hf-hub:ORG/NAME`.
    `pooled`: timm's models that are no plain ViT open too (names and timm folders); `forward_pooled` runs them.
    """
    place, options = _split_options(str(spec))
    if place.startswith("hf-hub:"):
        loaded = _from_folder(_download(place.removeprefix("hf-hub:")), options, spec)
    elif (path := Path(place)).is_file():
        loaded = _from_file(path, options, spec)
    elif path.is_dir():
        loaded = _from_folder(path, options, spec)
    elif "@" in place and Path(place.rpartition("@")[0]).is_dir():
        loaded = _from_run(Path(place.rpartition("@")[0]), place.rpartition("@")[2], spec)
    elif timm.is_model(place.split(".")[0]):
        if not pooled and not is_vit(place.split(".")[0]):
            raise InputError(f"{spec}: no timm VisionTransformer or Eva; choose a vit_* or eva* model ({_ONLY_JUDGED})")
        loaded = _from_name(place, options, spec)
    else:
        raise InputError(f"{spec}: no such run, folder, file or timm model" + _nearest(place))
    if not pooled:
        _refuse_pooled(loaded, spec)
    if loaded.report is not None and not loaded.report.exact and distributed.is_main():
        print(f"{spec}: {loaded.report}")
    loaded.module.to(device).eval()
    return loaded


def _refuse_pooled(loaded: LoadedEncoder, spec: str) -> None:
    try:
        check_encoder(loaded.module)
    except InputError as error:
        raise InputError(f"{spec}: {error} ({_ONLY_JUDGED})") from None


def random_like(loaded: LoadedEncoder, seed: int) -> LoadedEncoder:
    """The control: the same architecture and preprocessing with fresh weights that depend on `seed` alone."""
    module = loaded.architecture.build(seed).to(next(loaded.module.parameters()).device).eval()
    source = f"{loaded.architecture.name}?pretrained=false&seed={seed}"
    return replace(loaded, module=module, source=source, license=None, step=None, report=None, chosen=False)


def init_encoder(loaded: LoadedEncoder, config: EncoderConfig) -> tuple[VisionTransformer, ImportReport]:
    """An encoder built from a resolved `config` with the weights of `loaded`, resized where needed.

    What a config cannot say (a norm before the blocks, linear maps without bias, ...) it has from `loaded` as long as
    both have the same name.
    """
    if not isinstance(loaded.module, VisionTransformer):
        raise InputError(
            f"{loaded.source}: RoPE encoders (timm Eva, DINOv3) are evaluated, embedded and aligned, but not trained "
            "further; start from a plain ViT such as vit_small_patch14_dinov2, or distil this one with teacher="
        )
    encoder = create_encoder(config, loaded.architecture.args if config.name == loaded.architecture.name else {})
    try:
        return encoder, import_weights(encoder, loaded.module.state_dict(), grid=loaded.module.patch_embed.grid_size)
    except InputError as error:
        raise InputError(f"{loaded.source}: {error}") from None


def _split_options(spec: str) -> tuple[str, dict[str, Any]]:
    """`PLACE?key=value&key=value` to the place and its options; values as Python or JSON would read them."""
    place, _, query = spec.partition("?")
    options = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InputError(f"{spec}: {item!r} is no key=value")
        options[_ALIASES.get(key, key)] = _value(value)
    return place, options


def _value(text: str) -> Any:
    if re.fullmatch(r"\d+x\d+", text):
        return [int(part) for part in text.split("x")]
    try:
        return {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), text)


def _from_name(name: str, options: dict[str, Any], spec: str) -> LoadedEncoder:
    """A timm model, with its released weights unless `pretrained=false`."""
    pretrained, seed = options.pop("pretrained", True), options.pop("seed", 0)
    if not isinstance(pretrained, bool) or not isinstance(seed, int):
        raise InputError(f"{spec}: pretrained is true or false, seed a whole number")
    architecture = _architecture(name.split(".")[0], options)
    module = _pretrained(name, architecture, spec) if pretrained else architecture.build(seed)
    cfg = module.pretrained_cfg if pretrained else {}  # random weights expect nothing in particular
    preprocessing = _preprocessing_of_timm(cfg, module, architecture)
    return LoadedEncoder(module, architecture, preprocessing, spec, cfg.get("license"))


def _architecture(name: str, args: Mapping[str, Any]) -> Architecture:
    return Architecture(name, {"dynamic_img_size": True, **args} if is_vit(name) else dict(args))


def _pretrained(name: str, architecture: Architecture, spec: str) -> Encoder:
    try:
        module = cast(Encoder, create_pooled(name, architecture.args, pretrained=True))
    except InputError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise InputError(f"{spec}: no released weights to be had ({reason}); try ?pretrained=false&seed=0") from error
    return module


def _from_file(path: Path, options: dict[str, Any], spec: str) -> LoadedEncoder:
    """A bare weights file: what its own header says (ours), or what its shapes and the options say."""
    tensors, facts = read_file(path), _metadata(path)
    if facts is not None:
        architecture = Architecture(**facts["architecture"])
        return _assemble(architecture, tensors, _preprocessing(facts["preprocessing"]), spec, license=facts["license"])
    return _from_tensors(tensors, options, spec)


def _from_tensors(tensors: Mapping[str, Tensor], options: dict[str, Any], spec: str) -> LoadedEncoder:
    prefer = str(options.pop("checkpoint_key", "teacher"))
    names = ("name", "num_heads", "img_size", "act_layer", "norm_eps", "rope_theta")
    known = {key: options.pop(key) for key in names if key in options}
    if options:
        raise InputError(
            f"{spec}: {next(iter(options))!r} is no option of a weights file; known: num_heads, img_size, act_layer, "
            "norm_eps, checkpoint_key"
        )
    if "img_size" in known:
        known["img_size"] = _pair(known["img_size"])
    try:
        found = to_timm(tensors, prefer)
        if found.layout in ("dinov3", "dinov3_vit"):
            rope = {k: v for k, v in known.items() if k in ("num_heads", "img_size", "rope_theta", "norm_eps")}
            architecture = infer_dinov3(found.tensors, **rope)
        else:
            if found.layout == "open_clip":
                known = {"norm_eps": CLIP_NORM_EPS} | known
            architecture = infer_architecture(found.tensors, **{k: v for k, v in known.items() if k != "rope_theta"})
    except InputError as error:
        raise InputError(f"{spec}: {error}") from None
    preprocessing = _default_preprocessing(architecture)
    return _assemble(architecture, tensors, preprocessing, spec, prefer=prefer)


def _from_folder(path: Path, options: dict[str, Any], spec: str) -> LoadedEncoder:
    """A folder: a run, one checkpoint of it, timm's, Hugging Face's, or what holds one of them."""
    if (path / "checkpoints").is_dir() and checkpoint_steps(path / "checkpoints"):
        return _from_run(path, None, spec)
    if (path / "manifest.json").is_file() and (path / "meta.json").is_file():
        return _from_checkpoint(path, spec)
    config = _read_json(path / "config.json") if (path / "config.json").is_file() else None
    if config is not None and "architecture" in config:  # a tower on the hub is often both
        return _from_timm_folder(path, config, spec)
    if (path / _OPEN_CLIP_CONFIG).is_file():
        return _from_open_clip_folder(path, options, spec)
    if config is not None:
        return _from_hf_folder(path, config, options, spec)
    if (path / WEIGHTS_FILE).is_file():
        return _from_file(path / WEIGHTS_FILE, options, spec)
    for inner in ("encoder", "timm", "hf", "tower", "vlm"):
        if (path / inner / "config.json").is_file():
            return _from_folder(path / inner, options, spec)
    raise InputError(f"{spec}: the folder is no encoder (neither checkpoints/ nor config.json is in it)")


def _from_run(path: Path, which: str | None, spec: str) -> LoadedEncoder:
    """The newest checkpoint of a run, or the one named: `best`, `step_500`; again where the run has moved on."""
    root = path / "checkpoints"
    for _ in range(_MOVES):
        steps = checkpoint_steps(root)
        try:
            return _from_named(root, which, spec)
        except (FileNotFoundError, InputError):
            if checkpoint_steps(root) == steps:
                raise
    raise InputError(f"{spec}: the run prunes its checkpoints faster than this reads them; give it checkpoint.keep=5")


def _from_named(root: Path, which: str | None, spec: str) -> LoadedEncoder:
    steps = checkpoint_steps(root)
    if which is None or which == "latest":
        checkpoint = latest_checkpoint(root)
        if checkpoint is None:
            raise InputError(f"{spec}: no checkpoint of the run can be read")
        return replace(_from_checkpoint(checkpoint, spec, verify=False), chosen=is_chosen(checkpoint, newest=True))
    if which == "best":
        step = best_step(root)
    else:
        step = int(which.removeprefix("step_")) if re.fullmatch(r"(step_)?\d+", which) else None
    if step not in steps:
        have = ", ".join(f"step_{s}" for s in steps) or "none"
        raise InputError(f"{spec}: the run has no checkpoint {which!r}; it has {have}")
    return _from_checkpoint(checkpoint_path(root, step), spec)


def _from_checkpoint(path: Path, spec: str, verify: bool = True) -> LoadedEncoder:
    """One checkpoint directory: `teacher.*` or `student.*`, and what its meta.json says about them."""
    tensors, meta = load_checkpoint(path, stems=["model"], verify=verify)
    if "encoder" not in meta or "preprocessing" not in meta:
        raise InputError(
            f"{spec}: {path.name} is no checkpoint of an encoder; for a vision-language run take its vlm/ folder"
        )
    config = EncoderConfig(**meta["encoder"])
    preprocessing = _preprocessing(meta["preprocessing"])
    found = to_timm(tensors["model"])
    second_form = not (config.class_token or config.num_registers)
    architecture = infer_architecture(
        found.tensors,
        name=config.name,
        num_heads=config.num_heads or heads_of_name(str(config.name)),
        img_size=config.size,
        act_layer=config.act_layer or ("gelu_tanh" if second_form else None),
        init_values=1e-5 if config.init_values is None else config.init_values,
    )
    loaded = _assemble(architecture, found.tensors, preprocessing, spec, step=meta["step"], license=meta.get("license"))
    return replace(loaded, chosen=is_chosen(path))


def _from_timm_folder(path: Path, config: dict[str, Any], spec: str) -> LoadedEncoder:
    """A timm `local-dir:` folder, ours or anybody's."""
    args = {k: v for k, v in config.get("model_args", {}).items() if k not in ("num_classes", "pretrained")}
    architecture = _architecture(config["architecture"], args)
    tensors = _folder_tensors(path, spec)
    loaded = (_assemble if is_vit(architecture.name) else _assemble_pooled)(
        architecture, tensors, Preprocessing(0), spec
    )
    cfg = config.get("pretrained_cfg", {})
    preprocessing = _preprocessing_of_timm(cfg, loaded.module, architecture)
    if (path / "preprocessor_config.json").is_file():
        values = _value_range(_read_json(path / "preprocessor_config.json"))
        preprocessing = replace(preprocessing, value_range=values)
    newest = checkpoint_steps(path.parent / "checkpoints")[-1:]  # a run's own encoder/ is made of its newest step
    chosen = any(is_chosen(checkpoint_path(path.parent / "checkpoints", step), newest=True) for step in newest)
    return replace(loaded, preprocessing=preprocessing, license=cfg.get("license") or _license(path), chosen=chosen)


def _from_open_clip_folder(path: Path, options: dict[str, Any], spec: str) -> LoadedEncoder:
    """The image tower of an open_clip folder: ours (a timm folder inside), one of timm, or open_clip's own."""
    config = _read_json(path / _OPEN_CLIP_CONFIG)
    model = config.get("model_cfg", {})
    vision, stated = model.get("vision_cfg", {}), config.get("preprocess_cfg", {})
    name = str(vision.get("timm_model_name") or "")
    if name.startswith("local-dir:"):
        inside = path / "tower"
        return _from_folder(inside if inside.is_dir() else Path(name.removeprefix("local-dir:")), options, spec)
    tensors = _folder_tensors(path, spec, (*_OPEN_CLIP_WEIGHTS, *_WEIGHTS))
    if name:
        args = {"dynamic_img_size": True, "img_size": vision.get("image_size", 224)}
        loaded = _assemble(Architecture(name.split(".")[0], args | options), tensors, Preprocessing(0), spec)
    elif isinstance(vision.get("layers"), int):
        facts: dict[str, Any] = {
            "num_heads": vision.get("width", 768) // vision.get("head_width", 64),
            "img_size": vision.get("image_size", 224),
            "act_layer": "quick_gelu" if model.get("quick_gelu") else "gelu",
            "norm_eps": (vision.get("norm_kwargs") or {}).get("eps", CLIP_NORM_EPS),
        }
        loaded = _from_tensors(tensors, facts | options, spec)
    else:
        raise InputError(f"{spec}: the image tower of {_OPEN_CLIP_CONFIG} is no ViT")
    size = vision.get("image_size", 224)
    mean, std = stated.get("mean", _OPENAI_MEAN), stated.get("std", _OPENAI_STD)
    preprocessing = Preprocessing(_pair(size)[0], tuple(mean), tuple(std), stated.get("interpolation", "bicubic"))
    return replace(loaded, preprocessing=preprocessing, license=_license(path))


def _from_hf_folder(path: Path, config: dict[str, Any], options: dict[str, Any], spec: str) -> LoadedEncoder:
    """A Hugging Face vision model, or the vision tower inside a larger one."""
    vision = config.get("vision_config", config)
    kind = vision.get("model_type", "")
    if kind == "timm_wrapper":
        raise InputError(f"{spec}: a timm_wrapper folder without timm's keys; export it with timm")
    if kind not in _HF_MODELS:
        raise InputError(f"{spec}: model_type {kind!r} is not one of {', '.join(_HF_MODELS)}")
    facts = _dinov3_facts(vision, spec) if kind == "dinov3_vit" else _vit_facts(vision, kind, spec)
    loaded = _from_tensors(_folder_tensors(path, spec), facts | options, spec)
    preprocessing = _preprocessing_of_hf(path, loaded.preprocessing)
    return replace(loaded, preprocessing=preprocessing, license=_license(path))


def _vit_facts(vision: Mapping[str, Any], kind: str, spec: str) -> dict[str, Any]:
    """What shapes do not tell of a Hugging Face ViT; what its config leaves out has that class's default."""
    name = vision.get("hidden_act", "gelu_pytorch_tanh" if "siglip" in kind else "gelu")
    if (activation := _HF_ACTIVATIONS.get(name)) is None:
        raise InputError(f"{spec}: hidden_act {name!r} is not supported")
    return {
        "num_heads": vision.get("num_attention_heads", 12),
        "img_size": vision.get("image_size", 224),
        "act_layer": activation,
        "norm_eps": vision.get("layer_norm_eps", 1e-12 if kind in ("vit", "vit_mae") else 1e-6),
    }


def _dinov3_facts(vision: Mapping[str, Any], spec: str) -> dict[str, Any]:
    name, exact = vision.get("hidden_act", "gelu"), "silu" if vision.get("use_gated_mlp") else "gelu"
    if name != exact:
        raise InputError(f"{spec}: hidden_act {name!r} is not supported here; DINOv3's is {exact}")
    return {
        "num_heads": vision.get("num_attention_heads", 6),
        "img_size": vision.get("image_size", 224),
        "norm_eps": vision.get("layer_norm_eps", 1e-5),
        "rope_theta": (vision.get("rope_parameters") or vision).get("rope_theta", 100.0),
    }


def _assemble(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    preprocessing: Preprocessing,
    spec: str,
    *,
    prefer: str = "teacher",
    step: int | None = None,
    license: str | None = None,
) -> LoadedEncoder:
    module = architecture.build()
    try:
        report = import_weights(module, tensors, prefer=prefer)
    except InputError as error:
        raise InputError(f"{spec}: {error}") from None
    return LoadedEncoder(module, architecture, preprocessing, spec, license, step, report)


def _assemble_pooled(
    architecture: Architecture, tensors: Mapping[str, Tensor], preprocessing: Preprocessing, spec: str
) -> LoadedEncoder:
    """A model of timm that is no plain ViT, with exactly its weights; those of a classifier are left out."""
    module = architecture.build()
    wanted = module.state_dict()
    missing = sorted(name for name in wanted if name not in tensors or tensors[name].shape != wanted[name].shape)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{spec}: the weights do not fit {architecture.name}: {missing[0]}{more}")
    module.load_state_dict({name: tensors[name] for name in wanted})
    return LoadedEncoder(module, architecture, preprocessing, spec)


def _folder_tensors(path: Path, spec: str, names: Sequence[str] = _WEIGHTS) -> dict[str, Tensor]:
    """The weights of a folder, one file or several with an index."""
    for name in names:
        if (path / name).is_file():
            return read_file(path / name)
        if (index := path / f"{name}.index.json").is_file():
            files = sorted(set(_read_json(index)["weight_map"].values()))
            return {k: v for file in files for k, v in read_file(path / Path(file).name).items()}
    raise InputError(f"{spec}: a config is there, but no {' or '.join(names)}")


def _metadata(path: Path) -> dict[str, Any] | None:
    """What our safetensors export wrote into the header."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    return None if text is None else json.loads(text)


def _preprocessing(facts: Mapping[str, Any]) -> Preprocessing:
    statistics = {"mean": tuple(facts["mean"]), "std": tuple(facts["std"])}
    return Preprocessing(**{**facts, **statistics, "value_range": _value_range(facts)})


def _value_range(facts: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """What we store of it: `value_range`, lows and highs."""
    stored = facts.get("value_range")
    return None if stored is None else (tuple(map(float, stored[0])), tuple(map(float, stored[1])))


def _default_preprocessing(architecture: Architecture) -> Preprocessing:
    size, channels = _pair(architecture.args["img_size"]), architecture.args["in_chans"]
    mean, std = _statistics(IMAGENET_MEAN, IMAGENET_STD, channels)
    return Preprocessing(size[0], mean, std, image_width=_width(size))


def _preprocessing_of_timm(cfg: Mapping[str, Any], module: Encoder, architecture: Architecture) -> Preprocessing:
    if is_vit(architecture.name):
        channels, size = module.patch_embed.proj.in_channels, module.patch_embed.img_size
    else:
        named = cfg.get("input_size") or module.pretrained_cfg["input_size"]
        channels, size = architecture.args.get("in_chans", 3), _pair(architecture.args.get("img_size", named[1:]))
    mean, std = _statistics(cfg.get("mean", IMAGENET_MEAN), cfg.get("std", IMAGENET_STD), channels)
    stated = tuple(cfg.get("input_size", (0, 0, 0)))[1:]
    width = _width(stated if stated[0] == size[0] else size)
    interpolation, crop_pct = cfg.get("interpolation", "bicubic"), float(cfg.get("crop_pct") or 1.0)
    return Preprocessing(size[0], mean, std, interpolation, crop_pct, width)


def _preprocessing_of_hf(path: Path, default: Preprocessing) -> Preprocessing:
    """From preprocessor_config.json; `default` where it is silent."""
    file = path / "preprocessor_config.json"
    if not file.is_file():
        return default
    config = _read_json(file)
    config = config.get("image_processor", config)
    size, crop = config.get("size") or {}, config.get("crop_size") or {}
    size = {"shortest_edge": size} if isinstance(size, int) else size
    resized = size.get("shortest_edge") or size.get("height") or default.image_size
    cropped = (crop if isinstance(crop, int) else crop.get("height")) if config.get("do_center_crop") else None
    mean, std = config.get("image_mean", default.mean), config.get("image_std", default.std)
    return Preprocessing(
        image_size=int(cropped or resized),
        mean=tuple(mean),
        std=tuple(std),
        interpolation=_RESAMPLING.get(config.get("resample", 3), "bicubic"),
        crop_pct=float(config.get("crop_pct") or (cropped / resized if cropped else 1.0)),
        image_width=_width((crop.get("height"), crop.get("width"))) if cropped and isinstance(crop, dict) else None,
        value_range=_value_range(config),
    )


def _width(size: Sequence[Any]) -> int | None:
    """The width where it is not the height."""
    return None if size[1] == size[0] else int(size[1])


def _statistics(mean: Any, std: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel numbers for `channels` channels; RGB's average where the weights were adapted to another count."""
    if len(mean) == channels:
        return tuple(mean), tuple(std)
    return (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels


def _license(path: Path) -> str | None:
    """The `license:` line at the top of a model card."""
    card = path / "README.md"
    if not card.is_file():
        return None
    match = re.match(r"---\n(?:.*\n)*?license:\s*(\S+)", card.read_text(errors="replace"))
    return match.group(1) if match else None


def _download(name: str) -> Path:
    """A hub repository's configs and weights, in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin", "README.md"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise InputError(f"hf-hub:{name}: cannot be downloaded ({reason}); give a local folder instead") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object")
    return content


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, timm.list_models(["vit_*", "eva*"]), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
