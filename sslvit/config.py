"""The configuration of each verb: dataclasses <- YAML <- `key=value`. Imports no torch.

Each room keeps its own dataclasses in its `config.py`; here they are composed, loaded and checked. `None` (in YAML:
`auto`) is resolved from the data before the run starts and printed with the reason.

A configuration file is data, never a program: interpolations, python tags and aliases are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
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
from sslvit.probes.config import EvaluateConfig, KnnMonitorConfig, check_evaluate
from sslvit.vlm.config import LanguageConfig, LoraConfig, StageConfig

__all__ = [
    "AlignConfig",
    "CheckpointConfig",
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
    """When to save, in steps, and how many to keep. Never changes results."""

    every: int | None = None  # auto: ten times a run
    keep: int = 2


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
    layer_decay: float = 1.0
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
    device: str | None = None
    precision: str | None = None  # bf16 | fp32
    num_workers: int | None = None
    max_bad_rate: float = 0.05  # the run stops when more of the images than this cannot be read
    overwrite: bool = False
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


def check_config(config: PretrainConfig | AlignConfig | EvaluateConfig) -> None:
    """What can be said of a verb's config before any data is opened; InputError names the key and the remedy."""
    required = {
        PretrainConfig: ("data",),
        AlignConfig: ("encoder", "data"),
        EvaluateConfig: ("encoder", "train_dataset", "val_dataset"),
    }[type(config)]
    for key in required:
        if not getattr(config, key):
            raise InputError(f"{key} is missing; give {_as_given(config, key)}")
    if config.precision not in (None, "bf16", "fp32"):
        raise InputError(f"precision is {config.precision!r}; it is bf16 or fp32")
    _check_ranges("", config)
    if isinstance(config, PretrainConfig):
        _check_pretrain(config)
    if isinstance(config, EvaluateConfig):
        check_evaluate(config)


def _as_given(config: Any, key: str) -> str:
    value = "E" if key == "encoder" else "SPEC, for example a folder of images"
    return f"--{key.replace('_', '-')} {value}" if isinstance(config, EvaluateConfig) else f"{key}={value}"


def _check_ranges(prefix: str, section: Any) -> None:
    """Names carry units: `*_prob` is 0..1; counts, sizes and batches are positive; rates are not negative."""
    positive = {"batch_size", "accumulate", "patch_size", "image_size", "local_size", "num_global", "depth"}
    not_negative = {"lr", "steps", "every", "keep", "num_local", "num_workers", "num_registers", "weight_decay"}
    for name, value in vars(section).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(value):
            _check_ranges(f"{key}.", value)
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                continue
            if number != number or number in (float("inf"), float("-inf")):
                raise InputError(f"{key} is {number}; it must be a finite number")
            if name.endswith("_prob") and not 0 <= number <= 1:
                raise InputError(f"{key} is {number}; a probability lies between 0 and 1")
            if name in positive and number < 1:
                raise InputError(f"{key} is {number}; it must be at least 1")
            if (name in not_negative or name.endswith("_lr")) and number < 0:
                raise InputError(f"{key} is {number}; it must not be negative")


def _check_pretrain(config: PretrainConfig) -> None:
    sections = {"dino": config.dino, "ibot": config.ibot, "koleo": config.koleo, "mae": config.mae}
    if not any(section is not None and section.weight > 0 for section in sections.values()):
        raise InputError("no objective is switched on; give at least one of dino={} ibot={} mae={}")
    if config.mae is not None and not 0 < config.mae.mask_ratio < 1:
        raise InputError(f"mae.mask_ratio is {config.mae.mask_ratio}; it lies between 0 and 1, e.g. 0.75")
    patch = config.encoder.patch_size
    sizes = {"encoder.image_size": config.encoder.image_size, "crops.local_size": config.crops.local_size}
    for key, size in sizes.items():
        if patch and size and size % patch:
            fit = max(patch, round(size / patch) * patch)
            raise InputError(f"{key}={size} is no multiple of encoder.patch_size={patch}; try {key}={fit}")
    if config.batch_size is not None and config.batch_size % config.accumulate:
        raise InputError(f"batch_size={config.batch_size} is no multiple of accumulate={config.accumulate}")
