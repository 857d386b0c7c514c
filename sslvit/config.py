"""The configuration of each verb: dataclasses <- YAML <- `key=value`. Imports no torch.

Each room keeps its own dataclasses in its `config.py`; here they are composed, loaded and checked. `None` (in YAML:
`auto`) is resolved from the data before the run starts and printed with the reason.

A configuration file is data, never a program: interpolations, python tags and aliases are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sslvit.data.config import CropsConfig, PhotometryConfig
from sslvit.encoder.config import EncoderConfig
from sslvit.errors import InputError
from sslvit.objectives.config import DinoConfig, IbotConfig, KoleoConfig, MaeConfig
from sslvit.probes.config import EmbedConfig, EvaluateConfig, KnnMonitorConfig, check_evaluate
from sslvit.vlm.config import LanguageConfig, LoraConfig, StageConfig

__all__ = [
    "AlignConfig",
    "CheckpointConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "OptimConfig",
    "PretrainConfig",
    "as_dict",
    "changed_keys",
    "check_config",
    "load_config",
    "parse_overrides",
    "shipped_config_names",
    "shipped_file",
    "to_yaml",
]

T = TypeVar("T")
Nested = dict[str, Any]

MAX_CONFIG_BYTES = 100_000
MAX_CONFIG_DEPTH = 10


@dataclass
class CheckpointConfig:
    """When to save, in steps, and how many to keep. Changes no result, but for where a roll-back lands (`every`)."""

    every: int | None = None  # auto: ten times a run
    keep: int = 2  # the newest, beside the best
    milestone_every: int = 0  # steps; a checkpoint of every multiple is kept for good; 0: none


@dataclass
class OptimConfig:
    """AdamW with cosine schedules. No weight decay on biases, norms, tokens and positions."""

    lr: float | None = None  # peak; auto: the published rule from the global batch size
    min_lr: float = 1e-6
    warmup: float = 0.1  # share of the run
    weight_decay: float = 0.04
    weight_decay_end: float | None = None  # cosine from weight_decay; None: constant
    beta1: float = 0.9
    beta2: float | None = None  # auto: .95 for MAE alone, else .999
    clip_norm: float = 3.0  # global norm; 0: off
    layer_decay: float | None = None  # each layer's rate over that of the one above it; auto: 1, .75 with init
    freeze_encoder: float | None = None  # share of the run that trains new heads alone; auto: 0, .1 with init
    heads_lr: float | None = None  # peak while the encoder stands still; auto: the published rule
    momentum: float | None = None  # the teacher's at the start; auto: from the half-life in images
    momentum_end: float = 1.0


@dataclass
class PretrainConfig:
    """`sslvit pretrain`: images to encoder."""

    data: str | None = None
    val_data: str | None = None
    steps: int | None = None
    batch_size: int | None = None  # global
    accumulate: int = 1  # micro-batches per step
    seed: int = 0
    init: str | None = None  # an encoder E to start from; None: random
    teacher: str | None = None  # an encoder E that is distilled, frozen; None: the student's own moving average
    device: str | None = None
    precision: str | None = None  # bf16 | fp32
    compile: bool | None = None  # each block through torch.compile; auto: on CUDA. Changes rounding, nothing else
    num_workers: int | None = None
    max_bad_rate: float = 0.05  # the run stops when more of the images than this cannot be read
    overwrite: bool = False
    sharded: bool = False  # share weights and moments out over the processes (FSDP2), for encoders beyond ViT-L
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    photometry: PhotometryConfig = field(default_factory=PhotometryConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    dino: DinoConfig | None = None
    ibot: IbotConfig | None = None
    koleo: KoleoConfig | None = None
    mae: MaeConfig | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    knn: KnnMonitorConfig = field(default_factory=KnnMonitorConfig)


@dataclass
class AlignConfig:
    """`sslvit align`: an encoder and pairs to a vision-language model, in the stages text, connector, instruct."""

    encoder: str | None = None
    data: str | None = None
    val_data: str | None = None
    val_fraction: float = 0.1  # by image, when val_data is not given
    lm: str | None = None  # a local or hub HF causal model; None: the bundled one
    language: LanguageConfig = field(default_factory=LanguageConfig)
    lora: LoraConfig | None = None
    text: StageConfig = field(default_factory=lambda: StageConfig(lm_lr=2e-3))
    connector: StageConfig = field(default_factory=lambda: StageConfig(connector_lr=1e-3))
    instruct: StageConfig = field(default_factory=lambda: StageConfig(connector_lr=1e-3, lm_lr=1e-3))
    controls: list[str] = field(default_factory=lambda: ["blind", "shuffled", "random_encoder"])
    num_val_images: int = 1000  # at most this many are asked about
    steps: int | None = None  # sets every stage
    seed: int = 0
    device: str | None = None
    precision: str | None = None
    num_workers: int | None = None
    max_bad_rate: float = 0.05  # as in pretraining
    overwrite: bool = False
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


# ---- loading --------------------------------------------------------------------------------------------------------


def load_config(
    schema: type[T],
    config_file: str | Path | None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    default: str | None = None,
) -> T:
    """A `schema` object: its defaults, then the file, then the overrides; a plain dataclass afterwards.

    `config_file` is a path or a shipped name (`pretrain/tiny_cpu`); without it, `default` (a shipped name) serves.
    `overrides` are nested dicts (`{"optim": {"lr": 1e-4}}`) or texts (`["optim.lr=1e-4"]`). A section that may be None
    is switched on by any key of it (`dino={}`, `dino.weight=2`) and off by `dino=null`. Raises InputError, one line
    that names the file, the key and the nearest known key.
    """
    layers: list[tuple[str, Nested]] = []
    name = config_file if config_file is not None else default
    if name is not None:
        path = _find_config(str(name))
        layers.append((f" in {path}", _read_yaml_file(path)))
    nested = dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(schema, overrides)
    layers.append(("", nested))
    return _merge(schema, layers)


def parse_overrides(schema: type, texts: Sequence[str]) -> Nested:
    """`["optim.lr=1e-4", "dino={}"]` -> `{"optim": {"lr": 1e-4}, "dino": {}}`, read by the type of each key.

    A text key takes the value as it stands (`data=/a b#c`), a list takes `a,b` or `[a, b]`, everything else is YAML.
    """
    nested: Nested = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"{text!r} is not of the form key=value")
        _put(nested, key, _parse_value(key, value, _type_at(schema, key)))
    return nested


def _merge(schema: type[T], layers: Sequence[tuple[str, Nested]]) -> T:
    """OmegaConf's typed merge over `schema`, with errors in one line."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.structured(schema)
    for where, nested in layers:
        clean = _checked(schema, nested, where)
        try:
            config = OmegaConf.merge(config, clean)
        except (OmegaConfBaseException, ValueError, OverflowError) as error:
            key = getattr(error, "full_key", None)
            named = f"key '{key}'{where}: " if key else f"config{where}: "
            raise InputError(named + _first_line(error)) from None
    result = OmegaConf.to_object(config)
    assert isinstance(result, schema)
    return result


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ---- reading YAML as data -------------------------------------------------------------------------------------------


def _find_config(name: str) -> Path:
    """A file as given, else a shipped one, by `pretrain/tiny_cpu` or `configs/pretrain/tiny_cpu.yaml`."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_file("configs", name)
    if shipped is not None:
        return shipped
    if path.is_dir():
        raise InputError(f"config {name} is a folder; give a YAML file or one of: {', '.join(shipped_config_names())}")
    raise InputError(f"no config file {name}{_nearest(name, shipped_config_names())}")


def shipped_file(folder: str, name: str) -> Path | None:
    """The file `FOLDER/NAME[.yaml]` that comes with sslvit (`configs`, `launch`), or None."""
    name = name.removeprefix(f"{folder}/").removesuffix(".yaml")
    for root in _shipped_roots(folder):
        path = root / f"{name}.yaml"
        if path.is_file() and path.resolve().is_relative_to(root.resolve()):
            return path
    return None


def shipped_config_names() -> list[str]:
    """`["align/small", "pretrain/auto", ...]`."""
    files = {p.relative_to(root) for root in _shipped_roots("configs") for p in root.rglob("*.yaml")}
    return sorted(p.with_suffix("").as_posix() for p in files)


def _shipped_roots(folder: str) -> list[Path]:
    """In a wheel `configs/` and `launch/` lie inside the package; in a checkout, beside it."""
    package = Path(__file__).resolve().parent
    beside = package.parent / folder
    is_checkout = (package.parent / "setup.cfg").is_file()
    return [root for root in (package / folder, beside if is_checkout else None) if root is not None and root.is_dir()]


def _read_yaml_file(path: Path) -> Nested:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read config {path}: {error.strerror}") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise InputError(f"config {path} is larger than {MAX_CONFIG_BYTES} bytes; is it a config?")
    try:
        content = _read_yaml(data.decode("utf-8"))
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: {_first_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"config {path} holds a {type(content).__name__}, not keys with values")
    return content


def _read_yaml(text: str) -> Any:
    """Plain values of one YAML document. Tags beyond YAML's own and aliases raise InputError."""
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise InputError(f"{_at(event.start_mark)}aliases (*{event.anchor}) are not allowed")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_CONFIG_DEPTH:  # before the parser's time grows with the square of it
                raise InputError(f"{_at(event.start_mark)}nested more than {MAX_CONFIG_DEPTH} deep")
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        raise InputError(_at(error.problem_mark) + (error.problem or "not valid YAML")) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"not valid YAML: {_first_line(error)}") from None


def _at(mark: Any) -> str:
    """`line 3: ` of a YAML mark, which may be missing."""
    return "" if mark is None else f"line {mark.line + 1}: "


def _refuse_repeated_keys(node: Any) -> None:
    """YAML keeps the last of two equal keys in silence; we do not."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if str(key.value) in seen:
                raise InputError(f"{_at(key.start_mark)}key {key.value!r} is given twice")
            seen.add(str(key.value))
            _refuse_repeated_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeated_keys(value)


# ---- keys and values ------------------------------------------------------------------------------------------------


def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); `X` -> (X, False)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        assert len(inner) == 1, hint
        return inner[0], True
    return hint, False


def _all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema, sections included."""
    for name, hint in _hints(schema).items():
        yield prefix + name
        inner, _ = _unwrap(hint)
        if dataclasses.is_dataclass(inner):
            yield from _all_keys(inner, f"{prefix}{name}.")  # type: ignore[arg-type]


def _nearest(name: str, known: Sequence[str]) -> str:
    """`; nearest: 'optim.lr'`, or nothing. A key's last part counts too, so `lr` finds `optim.lr`."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    leaves = {k.rpartition(".")[2]: k for k in reversed(known)}
    leaf = name.rpartition(".")[2]
    if not close and leaf in leaves:
        close = [leaves[leaf]]
    if not close:
        close = [leaves[k] for k in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)]
    return f"; nearest: {close[0]}" if close else ""


def _type_at(schema: type, key: str) -> Any:
    """The type of a dotted key; InputError names the nearest when there is none."""
    hint: Any = schema
    for part in key.split("."):
        inner, _ = _unwrap(hint)
        if not dataclasses.is_dataclass(inner) or part not in _hints(inner):  # type: ignore[arg-type]
            raise InputError(f"unknown key '{key}'{_nearest(key, list(_all_keys(schema)))}")
        hint = _hints(inner)[part]  # type: ignore[arg-type]
    return hint


def _parse_value(key: str, text: str, hint: Any) -> Any:
    inner, optional = _unwrap(hint)
    if optional and text in ("null", "none", "None", "~", "auto"):
        return None if text != "auto" else "auto"
    if inner is str:
        return text
    if typing.get_origin(inner) is list and not text.lstrip().startswith("["):
        (item,) = typing.get_args(inner)
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return [_parse_value(key, part, item) for part in parts]
    try:
        value = _read_yaml(text)
    except InputError as error:
        raise InputError(f"key '{key}': {error}") from None
    with contextlib.suppress(ValueError):
        return float(value) if inner is float and isinstance(value, str) else value  # YAML reads 1e-4 as a text
    return value


def _put(nested: Nested, key: str, value: Any) -> None:
    """Set a dotted key; a later key wins over an earlier one, sections are joined."""
    *sections, leaf = key.split(".")
    for section in sections:
        if not isinstance(nested.get(section), dict):
            nested[section] = {}
        nested = nested[section]
    if isinstance(value, dict) and isinstance(nested.get(leaf), dict):
        for name, item in value.items():
            _put(nested[leaf], str(name), item)
    else:
        nested[leaf] = value


def _checked(schema: type, nested: Mapping[Any, Any], where: str, prefix: str = "", root: type | None = None) -> Nested:
    """The same mapping with `auto` as None and dotted keys opened, after every key was found in the schema."""
    root = root or schema
    opened: Nested = {}
    for name, value in nested.items():
        _put(opened, str(name), dict(value) if isinstance(value, Mapping) else value)
    hints, clean = _hints(schema), {}
    for name, value in opened.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise InputError(f"unknown key '{key}'{where}{_nearest(key, list(_all_keys(root)))}")
        inner, optional = _unwrap(hints[name])
        if dataclasses.is_dataclass(inner):
            clean[name] = _checked_section(inner, value, optional, key, where, root)  # type: ignore[arg-type]
        else:
            clean[name] = _plain(key, where, value, optional)
    return clean


def _checked_section(section: type, value: Any, optional: bool, key: str, where: str, root: type) -> Nested | None:
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if not isinstance(value, Mapping):
        off = f" or {key}=null to switch it off" if optional else ""
        raise InputError(f"key '{key}'{where} is a section, not {value!r}; give {key}.NAME=value{off}")
    return _checked(section, value, where, key + ".", root)


def _plain(key: str, where: str, value: Any, optional: bool) -> Any:
    """A value without anything OmegaConf would read as a program."""
    if value == "auto":
        if not optional:
            raise InputError(f"key '{key}'{where} cannot be auto")
        return None
    if value is None and not optional:
        raise InputError(f"key '{key}'{where} needs a value")
    if isinstance(value, Mapping):
        raise InputError(f"key '{key}'{where} takes a value, not a section")
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    for item in items:
        if isinstance(item, str) and ("${" in item or item == "???"):
            raise InputError(f"key '{key}'{where}: {item!r} looks like an interpolation; write the value itself")
        if not isinstance(item, (str, int, float, Path, type(None))):
            raise InputError(f"key '{key}'{where}: {item!r} is a {type(item).__name__}, not a plain value")
    items = [str(item) if isinstance(item, Path) else item for item in items]
    return items if isinstance(value, (list, tuple)) else items[0]


# ---- writing and comparing ------------------------------------------------------------------------------------------


def as_dict(config: Any) -> Nested:
    """A config as nested dicts of plain values (tuples become lists), ready for YAML and JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """A config as YAML that `load_config` reads back; keys in the order of the dataclass."""
    import yaml

    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, in the order of `new`; a section that is only in one counts as one key."""
    changed: list[str] = []
    for name in [*new, *(k for k in old if k not in new)]:
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed += changed_keys(a, b, f"{prefix}{name}.")
        elif a != b:
            changed.append(f"{prefix}{name}")
    return changed


# ---- checking what types cannot say ---------------------------------------------------------------------------------

#: Counts and sizes of every section. What may be 0 is in `_NOT_NEGATIVE` instead.
_AT_LEAST_1 = frozenset(
    (
        *("batch_size", "accumulate", "keep", "num_images", "patch_size", "image_size", "local_size", "in_chans"),
        *("image_width", "local_width"),
        *("num_global", "embed_dim", "depth", "num_heads", "num_prototypes", "head_hidden_dim", "head_bottleneck_dim"),
        *("num_teacher_views", "num_views", "decoder_dim", "decoder_depth", "decoder_num_heads"),
        *("vocab_size", "hidden_size", "num_layers", "intermediate_size", "max_length", "rank"),
    )
)
_NOT_NEGATIVE = frozenset(
    (
        *("seed", "steps", "every", "num_local", "num_workers", "num_registers", "weight", "lr", "min_lr"),
        *("weight_decay", "weight_decay_end", "clip_norm", "init_values", "brightness", "contrast", "saturation"),
    )
)
_SHARES = frozenset(
    (
        *("warmup", "teacher_temperature_warmup", "freeze_last_layer", "center_momentum", "momentum", "momentum_end"),
        *("max_bad_rate", "mask_ratio_min", "mask_ratio_max", "layer_decay", "dropout", "freeze_encoder", "max_drop"),
    )
)
_DEVICES = r"(cpu|cuda|mps|xpu)(:\d+)?"
_CENTERINGS = ("softmax", "sinkhorn")
_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")


def check_config(config: PretrainConfig | AlignConfig | EvaluateConfig | EmbedConfig) -> None:
    """What can be said of a verb's config before any data is opened; InputError names the key and the remedy.

    Holds for a config as given and for a resolved one: what is None is not looked at.
    """
    required = {
        PretrainConfig: ("data",),
        AlignConfig: ("encoder", "data"),
        EvaluateConfig: ("encoder", "train_dataset", "val_dataset"),
        EmbedConfig: ("encoder", "data", "output_file"),
    }[type(config)]
    for key in required:
        if not getattr(config, key):
            raise InputError(f"{key} is missing; give {_as_given(config, key)}")
    if config.precision not in (None, "bf16", "fp32"):
        raise InputError(f"precision is {config.precision!r}; it is bf16 or fp32")
    if config.device is not None and not re.fullmatch(_DEVICES, config.device):
        raise InputError(f"device is {config.device!r}; it is cpu or cuda, or one of several as cuda:1")
    _check_ranges("", config)
    if isinstance(config, PretrainConfig | AlignConfig):
        _check_at_least("checkpoint.every", config.checkpoint.every, 1)
        _check_at_least("checkpoint.milestone_every", config.checkpoint.milestone_every, 0)
    if isinstance(config, PretrainConfig):
        _check_pretrain(config)
    if isinstance(config, AlignConfig):
        _check_heads(
            "language.num_heads", config.language.num_heads, "language.hidden_size", config.language.hidden_size
        )
    if isinstance(config, EvaluateConfig):
        check_evaluate(config)


def _as_given(config: Any, key: str) -> str:
    value = {"encoder": "E", "output_file": "F.npz"}.get(key, "SPEC, for example a folder of images")
    is_option = isinstance(config, EvaluateConfig | EmbedConfig)
    return f"--{key.replace('_', '-')} {value}" if is_option else f"{key}={value}"


def _check_ranges(prefix: str, section: Any) -> None:
    """By the last word of each key: counts and sizes are positive, rates not negative, shares between 0 and 1."""
    for name, value in vars(section).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(value):
            _check_ranges(f"{key}.", value)
        if name.endswith("_prob") and value == []:
            raise InputError(f"{key} is empty; give a probability per global crop, the last one serves all further")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                _check_number(key, name, number)


def _check_number(key: str, name: str, number: float) -> None:
    if number != number or number in (float("inf"), float("-inf")):
        raise InputError(f"{key} is {number}; it must be a finite number")
    if name.endswith("_prob") and not 0 <= number <= 1:
        raise InputError(f"{key} is {number}; a probability lies between 0 and 1")
    if name in _SHARES and not 0 <= number <= 1:
        raise InputError(f"{key} is {number}; it lies between 0 and 1")
    if name in ("drop_path_rate", "beta1", "beta2") and not 0 <= number < 1:
        raise InputError(f"{key} is {number}; it is at least 0 and below 1")
    if ("temperature" in name) and not name.endswith("_warmup") and number <= 0:
        raise InputError(f"{key} is {number}; a temperature is above 0")
    if name == "hue" and not 0 <= number <= 0.5:
        raise InputError(f"{key} is {number}; it is a share of the colour circle between 0 and 0.5")
    if name in _AT_LEAST_1:
        _check_at_least(key, number, 1)
    if name in _NOT_NEGATIVE or name.endswith("_lr"):
        _check_at_least(key, number, 0)


def _check_at_least(key: str, number: float | None, least: int) -> None:
    if number is not None and number < least:
        must = f"be at least {least}" if least else "not be negative"
        raise InputError(f"{key} is {number}; it must {must}")


def _check_pretrain(config: PretrainConfig) -> None:
    _check_at_least("steps", config.steps, 1)
    sections = {"dino": config.dino, "ibot": config.ibot, "koleo": config.koleo, "mae": config.mae}
    if not any(section is not None and (section.weight is None or section.weight > 0) for section in sections.values()):
        raise InputError("no objective is switched on; give at least one of dino={} ibot={} mae={}")
    _check_crops(config.crops)
    _check_objectives(config)
    patch = config.encoder.patch_size
    sizes = {
        "encoder.image_size": config.encoder.image_size,
        "encoder.image_width": config.encoder.image_width,
        "crops.local_size": config.crops.local_size,
        "crops.local_width": config.crops.local_width,
    }
    for key, size in sizes.items():
        if patch and size and size % patch:
            fit = max(patch, round(size / patch) * patch)
            raise InputError(f"{key}={size} is no multiple of encoder.patch_size={patch}; try {key}={fit}")
    _check_heads("encoder.num_heads", config.encoder.num_heads, "encoder.embed_dim", config.encoder.embed_dim)
    if config.encoder.act_layer not in (None, *_ACTIVATIONS):
        near = _nearest(str(config.encoder.act_layer), _ACTIVATIONS)
        raise InputError(f"encoder.act_layer is {config.encoder.act_layer!r}; it is {', '.join(_ACTIVATIONS)}{near}")
    if config.teacher and config.dino is None and config.ibot is None:
        raise InputError("teacher is read by dino and ibot, and neither is switched on; give dino={}")
    if config.batch_size is not None and config.batch_size % config.accumulate:
        raise InputError(f"batch_size={config.batch_size} is no multiple of accumulate={config.accumulate}")


def _check_crops(crops: CropsConfig) -> None:
    for key, pair, most in (
        ("crops.global_scale", crops.global_scale, 1.0),
        ("crops.local_scale", crops.local_scale, 1.0),
        ("crops.ratio", crops.ratio, None),
    ):
        if pair is not None and not (len(pair) == 2 and 0 < pair[0] <= pair[1] <= (most or pair[1])):
            bounds, example = ("0 < LOW <= HIGH <= 1", "0.4,1") if most else ("0 < LOW <= HIGH", "0.75,1.33")
            raise InputError(f"{key} is {pair}; it is a pair LOW,HIGH with {bounds}, for example {key}={example}")


def _check_objectives(config: PretrainConfig) -> None:
    for name, section in (("dino", config.dino), ("ibot", config.ibot)):
        if section is not None and section.centering not in _CENTERINGS:
            near = _nearest(section.centering, _CENTERINGS)
            raise InputError(f"{name}.centering is {section.centering!r}; it is {' or '.join(_CENTERINGS)}{near}")
    dino, ibot, mae = config.dino, config.ibot, config.mae
    visible = None if dino is None else dino.student_visible_ratio
    if visible is not None and not 0 < visible <= 1:
        raise InputError(f"dino.student_visible_ratio is {visible}; it is above 0 and at most 1, 1 shows all")
    if ibot is not None and ibot.mask_ratio_min > ibot.mask_ratio_max:
        raise InputError(
            f"ibot.mask_ratio_min is {ibot.mask_ratio_min}, above ibot.mask_ratio_max={ibot.mask_ratio_max}"
        )
    if mae is not None and not 0 < mae.mask_ratio < 1:
        raise InputError(f"mae.mask_ratio is {mae.mask_ratio}; it lies between 0 and 1, e.g. 0.75")
    if mae is not None:
        _check_heads("mae.decoder_num_heads", mae.decoder_num_heads, "mae.decoder_dim", mae.decoder_dim)


def _check_heads(heads_key: str, heads: int | None, width_key: str, width: int | None) -> None:
    if heads is not None and width is not None and width % heads:
        raise InputError(
            f"{width_key}={width} is no multiple of {heads_key}={heads}; it is split evenly over the heads"
        )
