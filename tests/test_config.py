"""The config loader: layers, types, errors in one line, and files that are data and never programs."""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sslvit.config import (
    AlignConfig,
    EvaluateConfig,
    PretrainConfig,
    as_dict,
    changed_keys,
    check_config,
    load_config,
    shipped_config_names,
    shipped_file,
    to_yaml,
)
from sslvit.errors import InputError


def load(*texts, file=None, default=None):
    return load_config(PretrainConfig, file, list(texts), default=default)


def refusal(*texts, file=None, schema=PretrainConfig):
    with pytest.raises(InputError) as caught:
        load_config(schema, file, list(texts))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_layers_win_in_order(yaml_file):
    file = yaml_file("steps: 5\nseed: 3\noptim: {lr: 1e-3}\ndino: {weight: 2}\n")
    config = load("seed=4", "optim.lr=1e-4", "dino.student_temperature=0.2", file=file)
    assert (config.steps, config.seed, config.optim.lr) == (5, 4, 1e-4)
    assert (config.dino.weight, config.dino.student_temperature) == (2.0, 0.2)
    assert config.optim.weight_decay == PretrainConfig().optim.weight_decay


def test_texts_and_dicts_agree():
    texts = load("data=x", "optim.lr=1e-4", "dino={}", "crops.ratio=1,2", "overwrite=true")
    nested = {"data": "x", "optim": {"lr": 1e-4}, "dino": {}, "crops": {"ratio": [1, 2]}, "overwrite": True}
    dotted = {"data": Path("x"), "optim.lr": 1e-4, "dino": {}, "crops.ratio": (1, 2), "overwrite": True}
    assert texts == load_config(PretrainConfig, None, nested) == load_config(PretrainConfig, None, dotted)


def test_result_is_plain():
    config = load("dino={}")
    assert type(config) is PretrainConfig and type(config.dino).__name__ == "DinoConfig"
    assert type(config.crops.ratio) is list
    config.steps = "anything"  # a plain object: no OmegaConf behind it


def test_python_objects_as_sections():
    assert load_config(PretrainConfig, None, {"optim": load("optim.lr=3").optim}).optim.lr == 3


def test_overrides_are_not_changed():
    given = {"optim": {"lr": "auto"}, "dino": {}}
    before = copy.deepcopy(given)
    load_config(PretrainConfig, None, given)
    assert given == before


@pytest.mark.parametrize("off", ["null", "none", "~"])
def test_sections_switch_on_and_off(off, yaml_file):
    file = yaml_file("dino: {}\n")
    assert load(file=file).dino is not None and load(file=file).mae is None
    assert load(f"dino={off}", "mae.weight=2", file=file).dino is None
    assert load("mae={}", "mae.weight=2").mae.weight == 2


def test_auto_is_none_where_none_is_allowed(yaml_file):
    assert load("optim.lr=auto", "steps=auto", file=yaml_file("optim: {lr: 3}\n")).optim.lr is None
    assert "cannot be auto" in refusal("seed=auto")
    assert "is a section" in refusal("mae=auto")


@pytest.mark.parametrize("spec", ["/a b/c#d", "scenes:?n=5&seed=1", "yes", "1", "2020-01-01", "null.tar", "{x}", "a=b"])
def test_texts_stay_texts(spec):
    assert load(f"data={spec}").data == spec


def test_lists():
    assert load_config(EvaluateConfig, None, ["controls="]).controls == []
    assert load_config(EvaluateConfig, None, ["controls=[]"]).controls == []
    assert load_config(EvaluateConfig, None, ["protocol=knn, linear"]).protocol == ["knn", "linear"]
    assert load("crops.ratio=[1, 1e0]").crops.ratio == [1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lr=3", ["'lr'", "optim.lr"]),
        ("optim.lrr=3", ["'optim.lrr'", "optim.lr"]),
        ("dino.wieght=3", ["dino.weight"]),
        ("batchsize=3", ["batch_size"]),
        ("encoder.pach_size=3", ["encoder.patch_size"]),
        ("data.x=3", ["data"]),
        ("steps=abc", ["steps", "abc"]),
        ("steps=1.5", ["steps", "1.5"]),
        ("steps=true", ["steps"]),
        ("seed=null", ["seed"]),
        ("overwrite=maybe", ["overwrite", "maybe"]),
        ("crops.ratio=[1, a]", ["crops.ratio"]),
        ("optim.lr={a: 1}", ["optim.lr"]),
        ("optim.lr=[1]", ["optim.lr"]),
        ("dino=3", ["dino", "section"]),
        ("encoder=null", ["encoder", "section"]),
        ("steps", ["key=value"]),
        ("=3", ["key=value"]),
        ("photometry.hue=a: b: c", ["photometry.hue"]),
    ],
)
def test_refusals_name_key_and_nearest(text, parts, yaml_file):
    message = refusal(text)
    assert all(part in message for part in parts), message


def test_refusals_name_the_file(yaml_file):
    file = yaml_file("optim: {lrr: 3}\n")
    message = refusal(file=file)
    assert file in message and "nearest: optim.lr" in message
    assert "no config file" in refusal(file="nowhere.yaml")
    assert "nearest: pretrain/tiny_cpu" in refusal(file="pretrain/tiny_cpo")
    assert "folder" in refusal(file=str(Path(file).parent))


HOSTILE = {
    "environment": "data: ${oc.env:HOME}",
    "decode": "data: ${oc.decode:1}",
    "interpolation": "steps: ${seed}",
    "in a list": "crops: {ratio: ['${seed}', 1]}",
    "in a key's section": "optim: {lr: '${seed}'}",
    "missing": "data: ???",
    "python object": "data: !!python/object/apply:os.system ['touch CANARY']",
    "python name": "data: !!python/name:os.system",
    "python module": "data: !!python/module:os",
    "own tag": "data: !env HOME",
    "pathlib": "data: !!python/object/apply:pathlib.Path [x]",
    "alias": "val_data: &a x\ndata: *a",
    "merge": "optim: &a {lr: 1}\ndino: {<<: *a}",
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "loop": "data: &a [*a]",
    "deep": "[" * 5000,
    "deep map": "{a: " * 5000,
    "twice": "seed: 1\nseed: 2",
    "twice inside": "optim: {lr: 1, lr: 2}",
    "two documents": "seed: 1\n---\nseed: 2",
    "a list": "- seed",
    "a text": "seed",
    "broken": "seed: [1",
    "control characters": "seed: \x00",
    "date": "data: 2020-01-01",
    "binary": "data: !!binary aGVsbG8=",
    "set": "crops: {ratio: !!set {a, b}}",
    "number as key": "1: 2",
    "large": "#" * 2_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(HOSTILE[name])
    refusal(file="config.yaml")
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize("text", ["data=${oc.env:HOME}", "crops.ratio=['${seed}']", "steps=!!python/name:os.system"])
def test_hostile_overrides_are_refused(text):
    refusal(text)


def test_interpolation_would_work_without_the_guard(monkeypatch):
    """The guard is what refuses: OmegaConf alone resolves the environment."""
    from omegaconf import OmegaConf

    monkeypatch.setenv("SECRET", "canary")
    merged = OmegaConf.merge(OmegaConf.structured(PretrainConfig), {"data": "${oc.env:SECRET}"})
    assert OmegaConf.to_object(merged).data == "canary"


def test_yaml_round_trip(yaml_file):
    config = load("data=é x", "dino={}", "optim.lr=1e-5", "crops.ratio=[0.5,1e-7]", "num_workers=0")
    assert load(file=yaml_file(to_yaml(config))) == config


def test_as_dict_is_plain():
    @dataclass
    class Config:
        pair: tuple[float, float] = (1.0, 2.0)
        inner: PretrainConfig = field(default_factory=PretrainConfig)

    assert as_dict(Config())["pair"] == [1.0, 2.0]
    assert as_dict(Config())["inner"]["optim"]["lr"] is None


def test_changed_keys():
    old, new = as_dict(load("dino={}")), as_dict(load("dino.weight=2", "mae={}", "optim.lr=1", "seed=1"))
    assert changed_keys(old, new) == ["seed", "optim.lr", "dino.weight", "mae"]
    assert changed_keys(old, copy.deepcopy(old)) == []
    assert changed_keys({"a": 1}, {}) == ["a"]


def test_shipped_configs_load():
    names = shipped_config_names()
    assert {"pretrain/auto", "pretrain/tiny_cpu"} <= set(names)
    schemas = {"pretrain": PretrainConfig, "evaluate": EvaluateConfig, "align": AlignConfig}
    for name in names:
        config = load_config(schemas[name.split("/")[0]], name)
        if isinstance(config, PretrainConfig):
            config.data = config.data or "scenes:"
            check_config(config)
    assert load(file="configs/pretrain/auto.yaml") == load(file="pretrain/auto") == load(default="pretrain/auto")


def test_shipped_names_stay_inside():
    assert shipped_file("configs", "../setup") is None
    assert shipped_file("launch", "local").name == shipped_file("launch", "launch/local.yaml").name == "local.yaml"


@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        ([], ["data"]),
        (["data=x"], ["objective", "dino={}"]),
        (["data=x", "koleo.weight=0"], ["objective"]),
        (["data=x", "mae={}", "precision=fp16"], ["precision", "bf16"]),
        (["data=x", "mae={}", "encoder.patch_size=16", "encoder.image_size=100"], ["encoder.image_size", "=96"]),
        (["data=x", "mae={}", "encoder.patch_size=16", "crops.local_size=40"], ["crops.local_size", "32"]),
        (["data=x", "mae.mask_ratio=1"], ["mae.mask_ratio"]),
        (["data=x", "mae={}", "photometry.jitter_prob=1.5"], ["photometry.jitter_prob"]),
        (["data=x", "mae={}", "photometry.global_blur_prob=[0, 2]"], ["photometry.global_blur_prob"]),
        (["data=x", "mae={}", "batch_size=0"], ["batch_size"]),
        (["data=x", "mae={}", "batch_size=10", "accumulate=4"], ["batch_size", "accumulate"]),
        (["data=x", "mae={}", "optim.lr=.nan"], ["optim.lr"]),
        (["data=x", "mae={}", "optim.lr=-1"], ["optim.lr"]),
        (["data=x", "mae={}", "steps=-1"], ["steps"]),
        (["data=x", "mae={}", "steps=0"], ["steps"]),
        (["data=x", "mae={}", "accumulate=0"], ["accumulate"]),
        (["data=x", "mae={}", "checkpoint.every=0"], ["checkpoint.every"]),
        (["data=x", "mae={}", "checkpoint.keep=0"], ["checkpoint.keep"]),
        (["data=x", "mae={}", "seed=-1"], ["seed"]),
        (["data=x", "mae={}", "device=gpu"], ["device", "cuda"]),
        (["data=x", "dino.centering=sinkorn"], ["dino.centering", "softmax", "nearest: sinkhorn"]),
        (["data=x", "ibot.centering=none"], ["ibot.centering", "softmax"]),
        (["data=x", "dino.num_teacher_views=0"], ["dino.num_teacher_views"]),
        (["data=x", "dino.student_visible_ratio=0"], ["dino.student_visible_ratio"]),
        (["data=x", "dino.student_visible_ratio=1.1"], ["dino.student_visible_ratio"]),
        (["data=x", "dino.student_temperature=0"], ["dino.student_temperature"]),
        (["data=x", "dino.freeze_last_layer=2"], ["dino.freeze_last_layer"]),
        (["data=x", "dino.weight=-1", "mae={}"], ["dino.weight"]),
        (["data=x", "ibot.mask_ratio_min=0.6"], ["ibot.mask_ratio_min"]),
        (["data=x", "ibot.mask_prob=2"], ["ibot.mask_prob"]),
        (["data=x", "mae={}", "crops.global_scale=0.4"], ["crops.global_scale", "LOW,HIGH"]),
        (["data=x", "mae={}", "crops.global_scale=0.4,2"], ["crops.global_scale"]),
        (["data=x", "mae={}", "crops.global_scale=1,0.4"], ["crops.global_scale"]),
        (["data=x", "mae={}", "crops.local_scale=0,1"], ["crops.local_scale"]),
        (["data=x", "mae={}", "crops.ratio=1,2,3"], ["crops.ratio"]),
        (["data=x", "mae={}", "crops.ratio=2,1"], ["crops.ratio"]),
        (["data=x", "mae={}", "crops.num_global=0"], ["crops.num_global"]),
        (["data=x", "mae={}", "photometry.global_solarize_prob=[]"], ["photometry.global_solarize_prob", "empty"]),
        (["data=x", "mae={}", "photometry.hue=0.7"], ["photometry.hue"]),
        (["data=x", "mae.decoder_dim=128", "mae.decoder_num_heads=3"], ["mae.decoder_dim=128", "num_heads=3"]),
        (["data=x", "mae.decoder_depth=0"], ["mae.decoder_depth"]),
        (["data=x", "mae.num_views=0"], ["mae.num_views"]),
        (["data=x", "mae={}", "encoder.num_heads=0"], ["encoder.num_heads"]),
        (["data=x", "mae={}", "encoder.depth=0"], ["encoder.depth"]),
        (["data=x", "mae={}", "encoder.num_heads=5", "encoder.embed_dim=192"], ["encoder.num_heads=5"]),
        (["data=x", "mae={}", "encoder.drop_path_rate=1"], ["encoder.drop_path_rate"]),
        (["data=x", "mae={}", "optim.beta2=1"], ["optim.beta2"]),
        (["data=x", "mae={}", "optim.warmup=1.5"], ["optim.warmup"]),
        (["data=x", "mae={}", "max_bad_rate=5"], ["max_bad_rate"]),
    ],
)
def test_check_pretrain(texts, parts):
    with pytest.raises(InputError) as caught:
        check_config(load(*texts))
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("language.num_heads=0", "language.num_heads"),
        ("language.num_heads=5", "language.hidden_size=192"),
        ("language.num_layers=0", "language.num_layers"),
        ("checkpoint.every=0", "checkpoint.every"),
        ("instruct.batch_size=0", "instruct.batch_size"),
        ("text.lm_lr=-1", "text.lm_lr"),
        ("lora.rank=0", "lora.rank"),
    ],
)
def test_check_align(text, part):
    config = load_config(AlignConfig, None, ["encoder=a", "data=b", text])
    with pytest.raises(InputError, match=part):
        check_config(config)


def test_check_accepts_the_edges():
    edges = ["dino.student_visible_ratio=1", "knn.every=0", "crops.num_local=0", "crops.ratio=1,1", "optim.clip_norm=0"]
    edges += [
        "crops.global_scale=1,1",
        "photometry.global_blur_prob=[0.5]",
        "num_workers=0",
        "device=cuda:1",
        "steps=1",
    ]
    check_config(load("data=x", "mae={}", *edges))
    check_config(load_config(AlignConfig, None, ["encoder=a", "data=b", "text.steps=0"]))


def test_check_accepts_and_asks_for_what_is_missing():
    check_config(load("data=x", "mae={}", "encoder.patch_size=16", "encoder.image_size=96"))
    with pytest.raises(InputError, match="encoder=E"):
        check_config(AlignConfig())
    with pytest.raises(InputError, match="--val-dataset"):
        check_config(EvaluateConfig(encoder="a", train_dataset="b"))
