"""Starting from anything: what `init` gives, heads first, the k-NN guard, distillation. Oracles: timm, plain loops."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

import sslvit
from sslvit.config import PretrainConfig, load_config, shipped_config_names
from sslvit.data.loader import Views
from sslvit.data.sources import open_source
from sslvit.encoder.config import EncoderConfig, Preprocessing
from sslvit.encoder.vit import create_encoder, forward_tokens
from sslvit.encoder.weights import init_encoder, load_encoder
from sslvit.errors import InputError
from sslvit.exports import reopen, verify
from sslvit.exports.formats import FORMATS, write_formats
from sslvit.objectives.config import DinoConfig
from sslvit.objectives.cost import cost
from sslvit.objectives.distilled import teacher_as_loaded
from sslvit.objectives.pretraining import frozen_steps
from sslvit.objectives.recipe import DataFacts, resolve
from sslvit.probes.monitor import KnnMonitor
from sslvit.verbs import pretrain as verb
from sslvit.verbs.pretrain import Schedule, build

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "dynamic_img_size": True}
HEADS = {"num_prototypes": 16, "head_hidden_dim": 16, "head_bottleneck_dim": 8}
SMALL = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1}
DATA = "scenes:?n=48&size=32"
RUN = {
    "steps": 4,
    "batch_size": 8,
    "crops": {"num_local": 0},
    "dino": HEADS,
    "knn": {"every": 1, "num_images": 32},
    "checkpoint": {"every": 1, "keep": 9},
    "precision": "fp32",
    "num_workers": 0,
}


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are verified here, not in a fresh process: test_exports.py has that."""
    monkeypatch.setattr(verify, "_run_process", lambda job, python: reopen.main(job))


def write_vit(folder: Path, name: str = "vit_tiny_patch16_224", seed: int = 1, **options: object) -> torch.nn.Module:
    """A timm folder of a ViT whose every weight matters."""
    torch.manual_seed(seed)
    encoder = timm.create_model(name, num_classes=0, **{**TINY, **options}).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    config = {"model_args": {**TINY, **options}, "pretrained_cfg": {"mean": (0.2,) * 3, "std": (0.3,) * 3}}
    timm.models.save_for_hf(encoder, folder, safe_serialization=True, model_config=config)
    return encoder


FACTS = DataFacts(500, 32, 3, "cpu")


def resolved_from(spec: str, **keys: object):
    config = PretrainConfig(data="x", init=spec, steps=20, batch_size=4, dino=DinoConfig(**HEADS), **keys)
    init = load_encoder(spec)
    return resolve(config, FACTS, init.config), init


# ---- what init gives ------------------------------------------------------------------------------------------------

KINDS = {
    "original": ("vit_tiny_patch16_224", {}),
    "layer_scale": ("vit_tiny_patch16_224", {"init_values": 0.5, "reg_tokens": 2}),
    "no_class_token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "no_bias": ("vit_tiny_patch16_224", {"qkv_bias": False, "qk_norm": True}),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
@torch.no_grad()
def test_the_student_begins_as_the_function_that_init_is(kind: str, tmp_path: Path) -> None:
    """Nothing given but init: class token, registers, LayerScale, activation and norms are those of the weights."""
    name, options = KINDS[kind]
    original = write_vit(tmp_path, name, **options)
    (config, reasons), init = resolved_from(str(tmp_path))
    module = build(config, Preprocessing(32), init).eval()
    images = torch.randn(2, 3, 32, 32)
    for encoder in (module.student, module.teacher):
        assert (forward_tokens(encoder, images).all - original.forward_features(images)).abs().max() < 1e-5
    assert reasons["encoder.name"].endswith("as init has it") and config.encoder.depth == 2


def test_values_that_are_given_win_and_the_weights_are_resized(tmp_path: Path) -> None:
    original = write_vit(tmp_path)
    keys = EncoderConfig(patch_size=4, image_size=48, image_width=32, in_chans=5, num_registers=4)
    (config, _), init = resolved_from(str(tmp_path), encoder=keys)
    encoder, report = init_encoder(init, config.encoder)
    assert encoder.patch_embed.img_size == (48, 32) and encoder.patch_embed.grid_size == (12, 8)
    assert encoder.patch_embed.proj.in_channels == 5 and encoder.reg_token.shape[1] == 4
    wanted = timm.layers.resample_abs_pos_embed(original.pos_embed[:, 1:], [12, 8], [4, 4], num_prefix_tokens=0)
    assert torch.allclose(encoder.pos_embed, wanted, atol=1e-6)
    assert report.missing == ["reg_token"] and len(report.reshaped) == 4
    text = str(report)
    assert all(
        word in text for word in ("matched", "missing: reg_token", "reshaped: ", "3 to 5 channels", "patch (8, 8)")
    )


def test_positions_of_a_rectangle_are_resized_from_that_rectangle(tmp_path: Path) -> None:
    original = write_vit(tmp_path, img_size=(16, 64), no_embed_class=True)  # 2x8 patches: as many as 4x4
    (config, _), init = resolved_from(str(tmp_path), encoder=EncoderConfig(image_size=32))
    encoder, report = init_encoder(init, config.encoder)
    wanted = timm.layers.resample_abs_pos_embed(original.pos_embed, [4, 4], [2, 8], num_prefix_tokens=0)
    assert torch.equal(encoder.pos_embed, wanted) and "pos_embed: 2x8 to 4x4" in report.reshaped


def test_another_architecture_is_an_error_and_rope_is_not_trained_further(tmp_path: Path) -> None:
    write_vit(tmp_path)
    keys = EncoderConfig(name="vit_tiny_patch16_224", depth=3)
    (config, _), init = resolved_from(str(tmp_path), encoder=keys)
    with pytest.raises(InputError, match=r"only \d\d\.\d% of the parameters match"):
        init_encoder(init, config.encoder)
    rope = load_encoder("vit_small_patch16_dinov3?pretrained=false&img_size=32&depth=1&embed_dim=64&num_heads=1")
    with pytest.raises(InputError, match="not trained further"):
        init_encoder(rope, config.encoder)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"onnx"}))
def test_every_weight_format_is_a_source_for_init(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    if name == "open_clip":
        pytest.importorskip("open_clip")
    second_form = {"class_token": False, "num_registers": 0} if name == "siglip" else {"class_token": True}
    shape = {"embed_dim": 64, "depth": 2, "num_heads": 1, "in_chans": 3, "num_registers": 4}
    made = create_encoder(EncoderConfig("vit_tiny_patch16_224", 8, 32, **{**shape, **second_form}))
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    spec = f"{tmp_path / 'weights.pth'}?act_layer=gelu_tanh" if name == "siglip" else str(tmp_path / "weights.pth")
    write_formats(load_encoder(spec), {name: tmp_path / name}, {})
    (config, _), init = resolved_from(str(tmp_path / name))
    encoder, report = init_encoder(init, config.encoder)
    assert report.share == 1 and not report.missing and not report.unexpected
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        difference = (forward_tokens(encoder.eval(), images).all - forward_tokens(made.eval(), images).all).abs().max()
    assert difference < 1e-5


# ---- heads first, then a low rate -----------------------------------------------------------------------------------


def test_the_recipe_of_continuing(tmp_path: Path) -> None:
    write_vit(tmp_path)
    (config, reasons), _ = resolved_from(str(tmp_path))
    scratch, _ = resolve(
        PretrainConfig(data="x", steps=20, batch_size=4, dino=DinoConfig()), DataFacts(500, 32, 3, "cpu")
    )
    assert config.optim.lr == pytest.approx(scratch.optim.lr / 10, abs=1e-7)
    assert config.optim.heads_lr == scratch.optim.lr
    assert (config.optim.layer_decay, config.optim.freeze_encoder, config.knn.max_drop) == (0.75, 0.1, 0.02)
    assert (scratch.optim.layer_decay, scratch.optim.freeze_encoder, scratch.knn.max_drop) == (1.0, 0.0, 1.0)
    assert "heads" in reasons["optim.freeze_encoder"]


def test_two_phases_of_the_learning_rate(tmp_path: Path) -> None:
    write_vit(tmp_path)
    (config, _), _ = resolved_from(str(tmp_path))
    config.steps, config.optim.freeze_encoder, config.optim.lr, config.optim.heads_lr = 100, 0.4, 1e-4, 1e-3
    schedule = [Schedule(config)(step)["lr"] for step in range(100)]
    assert frozen_steps(config) == 40
    assert schedule[0] == schedule[40] == 0 and schedule[4:40] == [1e-3] * 36  # each phase warms up from 0
    assert max(schedule[40:]) == pytest.approx(1e-4) and schedule[46] == pytest.approx(1e-4)
    assert schedule[99] < 2e-6


def views(batch: int = 4, side: int = 32) -> Views:
    generator = torch.Generator().manual_seed(1)
    crops = torch.randint(0, 256, (2, batch, 3, side, side), generator=generator, dtype=torch.uint8)
    rows = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]).expand(2, batch, 8)
    ids = torch.arange(batch)
    return Views(crops, crops[:0], rows, rows[:0], ids, ids * 0)


def test_the_encoder_stands_still_while_the_heads_warm_up(tmp_path: Path) -> None:
    write_vit(tmp_path)
    (config, _), init = resolved_from(
        str(tmp_path), crops=load_config(PretrainConfig, None, {"crops": {"num_local": 0}}).crops
    )
    config.optim.freeze_encoder = 0.1  # 2 of 20 steps
    module = build(config, Preprocessing(32), init).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for step in range(3):
        optimizer.zero_grad()
        module(views(), step)[0].backward()
        module.before_update(step)
        optimizer.step()
        module.after_step(step)
        moved = {
            name.split(".")[0] for name, value in module.state_dict().items() if not torch.equal(value, before[name])
        }
        assert ("student" in moved) is ("teacher" in moved) is (step == 2)
        assert "objectives" in moved


# ---- the k-NN guard -------------------------------------------------------------------------------------------------


def continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[float], **keys: object) -> Path:
    """A run of four steps whose k-NN is `values` at steps 0 to 4."""
    write_vit(tmp_path / "init")
    monkeypatch.setattr(
        "sslvit.probes.monitor.KnnMonitor.__call__",
        lambda self, encoder, step: {"knn/top1": values[step], "rankme": 1.0},
    )
    return sslvit.pretrain(
        data=DATA,
        val_data=f"{DATA}&split=val",
        init=str(tmp_path / "init"),
        output_dir=tmp_path / "run",
        **{**RUN, **keys},
    )


def kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("values", "newest", "evaluated"),
    [
        ([0.5, 0.6, 0.47, 0.9, 0.9], "step_0000001", 3),  # 3 points below the start: stops, back to the best
        ([0.5, 0.49, 0.485, 0.49, 0.499], "step_0000000", 5),  # never 2 points, but it ends below its start
        ([0.5, 0.49, 0.6, 0.55, 0.51], "step_0000004", 5),  # ends above its start: as it is
    ],
)
def test_a_run_that_forgets_stops_and_goes_back(values, newest, evaluated, tmp_path, monkeypatch, capsys) -> None:
    run = continued(tmp_path, monkeypatch, values)
    assert kept(run)[-1] == newest
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("knn/top1" in row for row in rows) == evaluated
    exported, chosen = load_encoder(str(run / "encoder")), load_encoder(str(run))
    assert exported.fingerprint == chosen.fingerprint and chosen.step == int(newest[-7:])
    assert exported.chosen is chosen.chosen is (newest != "step_0000004"), "only where it went back to it"
    assert ("knn/top1 fell from 0.5000" in (run / "train.log").read_text()) is (newest != "step_0000004")
    assert sslvit.pretrain(
        data=DATA, val_data=f"{DATA}&split=val", init=str(tmp_path / "init"), output_dir=run, **RUN
    ), "finished: returns at once"
    assert kept(run)[-1] == newest


def test_without_the_guard_it_goes_on(tmp_path, monkeypatch) -> None:
    run = continued(tmp_path, monkeypatch, [0.5, 0.6, 0.2, 0.1, 0.1], knn={**RUN["knn"], "max_drop": 1.0})
    assert kept(run)[-1] == "step_0000004"


def test_a_run_without_labels_says_that_nobody_watches(tmp_path, capsys) -> None:
    write_vit(tmp_path / "init")
    run = sslvit.pretrain(
        data=DATA, init=str(tmp_path / "init"), output_dir=tmp_path / "run", **{**RUN, "steps": 1, "knn": {"every": 1}}
    )
    out = capsys.readouterr().out
    assert (
        "no labels to watch" in out
        and "labels for 200 images" in out
        and "init=" in out
        and "tensors matched (100.0% of the parameters)" in out
    )
    stated = json.loads((run / "encoder" / "preprocessor_config.json").read_text())
    assert stated["image_mean"] == [0.2] * 3, "the statistics that the weights expect"


def test_without_val_data_a_part_of_the_labelled_images_guards(tmp_path, monkeypatch, capsys) -> None:
    """Held out of the neighbours: no image stands on both sides, and a fall stops the run."""
    write_vit(tmp_path / "init")
    monitors, values = [], [0.5, 0.6, 0.47, 0.9, 0.9]

    def measured(self: KnnMonitor, encoder: torch.nn.Module, step: int) -> dict[str, float]:
        monitors.append(self)
        return {"knn/top1": values[step], "rankme": 1.0}

    monkeypatch.setattr(KnnMonitor, "__call__", measured)
    data = "scenes:?n=220&size=32&objects=1&label=shape"
    keys = {**RUN, "knn": {"every": 1, "num_images": 110}}
    run = sslvit.pretrain(data=data, init=str(tmp_path / "init"), output_dir=tmp_path / "run", **keys)
    train, val = ({image.numpy().tobytes() for image in part} for part in (monitors[0].train, monitors[0].val))
    assert len(monitors[0].train) == len(monitors[0].val) == 110 and not train & val
    assert [len(labels) for labels in monitors[0].labels["shape"]] == [110, 110]
    assert kept(run)[-1] == "step_0000001" and "no labels to watch" not in capsys.readouterr().out
    scratch = sslvit.pretrain(data=data, output_dir=tmp_path / "scratch", **{**keys, "steps": 1, "encoder": SMALL})
    assert not monitors[-1].labels and kept(scratch)[-1] == "step_0000001", "no guard, nothing held out"


@pytest.mark.parametrize("side", [32, 48])
def test_a_resized_encoder_is_measured_as_it_was_too(side: int, tmp_path: Path) -> None:
    """Step 0 comes after resizing, so it alone would let a run end below its source."""
    write_vit(tmp_path / "init")
    sets = {
        "data": "scenes:?n=120&size=64&objects=1&label=shape",
        "val_data": "scenes:?n=60&size=64&objects=1&split=val",
    }
    keys = {**RUN, "steps": 1, "knn": {"every": 1, "num_images": 100}, "encoder": {"image_size": side}}
    run = sslvit.pretrain(**sets, init=str(tmp_path / "init"), output_dir=tmp_path / "run", **keys)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [row.get("knn/init/top1") for row in rows if "knn/top1" in row]
    if side == 32:
        assert found == [None, None], "step 0 is the encoder as it was"
        return
    sources = [open_source(spec) for spec in sets.values()]
    preprocessing = Preprocessing(32, (0.2,) * 3, (0.3,) * 3)
    original = load_encoder(str(tmp_path / "init")).module
    expected = KnnMonitor(*sources, preprocessing, 100, num_workers=0)(original, 0)["knn/top1"]
    assert found == [expected, None]


# ---- distillation ---------------------------------------------------------------------------------------------------


def distilled(tmp_path: Path, name: str = "vit_tiny_patch16_224", **sections: object):
    """A student of width 192 in front of a frozen teacher of width 64, and the teacher as timm made it."""
    original = write_vit(tmp_path / "teacher", name)
    teacher = load_encoder(str(tmp_path / "teacher"))
    keys = {"encoder": {"name": "vit_tiny_patch16_224", "depth": 1, "image_size": 32, "patch_size": 8}}
    keys |= {"crops": {"num_local": 0}, "teacher": "given", "data": "x", "steps": 10, "batch_size": 4}
    config, _ = resolve(load_config(PretrainConfig, None, {**keys, **sections}), FACTS)
    return build(config, Preprocessing(32), None, teacher).train(), original


def test_the_frozen_teacher_gives_the_targets(tmp_path: Path) -> None:
    """DINO's loss as plain loops: teacher's head on timm's own forward, student's head on the adapted class token."""
    module, original = distilled(tmp_path, dino=HEADS)
    loss, _ = module(views(), 5)
    dino, images = module.objectives["dino"], module._colour(views())["global"]
    with torch.no_grad():
        targets = [dino.teacher_head(original.forward_features(x)[:, 0]) / dino.temperature(5) for x in images]
        logits = [dino.student_head(module.adapter(module.student.forward_features(x)[:, 0])) / 0.1 for x in images]
        pairs = [-(targets[t].softmax(-1) * logits[s].log_softmax(-1)).sum(-1).mean() for t, s in ((0, 1), (1, 0))]
    torch.testing.assert_close(loss.detach(), torch.stack(pairs).mean(), atol=1e-5, rtol=0)


def test_the_distilled_teacher_never_moves_and_is_in_no_checkpoint(tmp_path: Path) -> None:
    sections = {"dino": HEADS, "ibot": {**HEADS, "mask_prob": 1.0}, "koleo": {}, "mae": {}}
    module, original = distilled(tmp_path, **sections)
    names = set(module.state_dict())
    assert not any("_distilled" in name for name in names) and "adapter.weight" in names
    loss, _ = module(views(), 0)
    loss.backward()
    silent = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert torch.isfinite(loss) and silent == []
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter.add_(0.1)
    module.after_step(0)
    frozen = module._distilled[0]
    assert all(torch.equal(a, b) for a, b in zip(frozen.parameters(), original.parameters(), strict=True))
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert module.judged is module.teacher and module.judged.embed_dim == 192  # the student's average is exported
    assert next(module.to(torch.float64)._distilled[0].parameters()).dtype == torch.float64  # it moves along


def test_utilisation_counts_the_distilled_teacher(tmp_path: Path, monkeypatch) -> None:
    module, _ = distilled(tmp_path, dino=HEADS)
    told, teacher = {}, teacher_as_loaded(module._distilled[0])
    monkeypatch.setattr(verb, "MetricsLog", lambda path, **facts: told.update(facts))
    folder, loader = SimpleNamespace(path=tmp_path), SimpleNamespace(advice=None)
    verb._metrics(module.config, folder, loader, module, teacher)
    alone = cost(dataclasses.replace(module.config, teacher=None)).flops_per_image
    assert told["flops_per_image"] == cost(module.config, teacher).flops_per_image != alone


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"encoder": {"image_size": 36, "patch_size": 4}, "dino": HEADS},
            "no multiple of the teacher's patches of 8 px",
        ),
        ({"encoder": {"image_size": 32, "patch_size": 4}, "ibot": HEADS}, "set encoder.patch_size=8"),
        ({"encoder": {"image_size": 32, "patch_size": 8, "in_chans": 1}, "dino": HEADS}, "reads 3 channels"),
        ({"encoder": {"image_size": 32}, "mae": {}, "dino": None}, "teacher is read by dino and ibot"),
    ],
)
def test_a_teacher_that_cannot_serve_is_one_line(keys, words, tmp_path) -> None:
    write_vit(tmp_path / "teacher")
    with pytest.raises(InputError, match=words) as caught:
        sslvit.pretrain(
            config_file=None,
            data=DATA,
            teacher=str(tmp_path / "teacher"),
            output_dir=tmp_path / "run",
            **{"steps": 1, "batch_size": 4, "knn": {"every": 0}, "mae": None, "dino": None, **keys},
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pretrain/distill", "pretrain/high_resolution"])
def test_stages_are_configs_of_the_one_loop(name: str, tmp_path: Path) -> None:
    write_vit(tmp_path / "large")
    assert name in shipped_config_names()
    source = {"teacher" if "distill" in name else "init": str(tmp_path / "large")}
    config = load_config(PretrainConfig, name)
    shrunk = {"steps": 2, "batch_size": 4, "encoder": {"image_size": 48, "depth": 2}, "dino": HEADS, "num_workers": 0}
    run = sslvit.pretrain(
        config_file=name, data="scenes:?n=16&size=48", output_dir=tmp_path / "run", knn={"every": 0}, **source, **shrunk
    )
    assert load_encoder(str(run)).config.image_size == 48
    assert config.dino is not None
