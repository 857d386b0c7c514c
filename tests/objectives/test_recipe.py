"""The auto recipe: every number gets a value and a reason, nothing the user gave is changed, nonsense is refused."""

import dataclasses
import math

import pytest

from sslvit.config import PretrainConfig
from sslvit.data.config import DINO_PHOTOMETRY, NO_PHOTOMETRY
from sslvit.encoder.config import EncoderConfig
from sslvit.errors import InputError
from sslvit.objectives.config import DinoConfig, IbotConfig, KoleoConfig, MaeConfig
from sslvit.objectives.recipe import DataFacts, resolve

FREE = {"init", "device", "num_workers", "val_data", "data", "embed_dim", "depth", "num_heads"}
FREE |= {"weight_decay_end", "train", "val"}
FREE |= {"teacher", "image_width", "local_width", "act_layer", "heads_lr"}  # None is their value, too


def missing(node, prefix=""):
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from missing(value, f"{prefix}{field.name}.")
        elif value is None and field.name not in FREE | {"dino", "ibot", "koleo", "mae"}:
            yield prefix + field.name


@pytest.mark.parametrize("num_images", [3, 200, 5_000, 300_000, 2_000_000])
@pytest.mark.parametrize("side", [28, 32, 64, 128, 500])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_everything_is_filled_with_a_reason(num_images, side, device):
    config = PretrainConfig(data="x", dino=DinoConfig(), ibot=IbotConfig(), koleo=KoleoConfig(), mae=MaeConfig())
    resolved, reasons = resolve(config, DataFacts(num_images, side, 3, device))
    assert list(missing(resolved)) == []
    assert set(missing(config)) == set(reasons)
    assert resolved.encoder.image_size % resolved.encoder.patch_size == 0
    assert resolved.crops.local_size % resolved.encoder.patch_size == 0
    assert resolved.crops.local_size < resolved.encoder.image_size
    assert 0 < resolved.optim.momentum < 1


def test_the_users_values_stand():
    config = PretrainConfig(data="x", steps=7, batch_size=12, mae=MaeConfig(decoder_dim=48))
    config.optim.lr = 0.5
    resolved, reasons = resolve(config, DataFacts(100, 64, 1, "cpu"))
    assert (resolved.steps, resolved.batch_size, resolved.optim.lr, resolved.mae.decoder_dim) == (7, 12, 0.5, 48)
    assert not {"steps", "batch_size", "optim.lr", "mae.decoder_dim"} & set(reasons)
    assert config.encoder.name is None, "the config given is not changed"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "no objective"),
        ({"koleo": KoleoConfig()}, "no objective"),
        ({"mae": MaeConfig(), "encoder.image_size": 50, "encoder.patch_size": 16}, "take 48"),
        ({"dino": DinoConfig(), "crops.local_size": 30, "encoder.patch_size": 8}, "crops.local_size=30"),
        ({"dino": DinoConfig(), "encoder.image_width": 96, "crops.local_width": 30}, "crops.local_width=30"),
        ({"dino": DinoConfig(), "crops.num_global": 1}, "two global crops"),
        ({"mae": MaeConfig(), "koleo": KoleoConfig()}, "koleo"),
        ({"mae": MaeConfig(), "accumulate": 3, "batch_size": 64}, "accumulate=3"),
        ({"mae": MaeConfig(), "encoder.class_token": False, "encoder.num_registers": 4}, "num_registers=4"),
    ],
)
def test_nonsense_is_refused_in_one_line(changes, words):
    config = PretrainConfig(data="x")
    for key, value in changes.items():
        *sections, name = key.split(".")
        node = config
        for section in sections:
            node = getattr(node, section)
        setattr(node, name, value)
    with pytest.raises(InputError) as caught:
        resolve(config, DataFacts(1000, 64, 3, "cpu"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("patch", "side", "device", "size"),
    [
        (14, 500, "cpu", 56),
        (14, 500, "cuda", 224),
        (14, 30, "cuda", 42),
        (32, 500, "cpu", 64),
        (8, 40, "cpu", 32),
        (None, 40, "cpu", 32),
    ],
)
def test_the_size_is_a_multiple_of_a_given_patch_size(patch, side, device, size):
    config = PretrainConfig(data="x", dino=DinoConfig(), encoder=EncoderConfig(patch_size=patch))
    resolved, _ = resolve(config, DataFacts(5_000, side, 3, device))
    assert resolved.encoder.image_size == size
    assert resolved.crops.local_size % resolved.encoder.patch_size == 0


def test_fp32_where_bf16_is_emulated():
    config = PretrainConfig(data="x", mae=MaeConfig())
    assert resolve(config, DataFacts(100, 64, 3, "cpu"))[0].precision == "bf16"
    resolved, reasons = resolve(config, DataFacts(100, 64, 3, "cpu", native_bf16=False))
    assert resolved.precision == "fp32" and "emulates" in reasons["precision"]


# ---- views by objective ----------------------------------------------------------------------------------------------


def views_of(**keys):
    given = {key: keys.pop(key) for key in list(keys) if "." in key}
    config = PretrainConfig(data="x", **keys)
    for key, value in given.items():
        section, _, name = key.partition(".")
        setattr(getattr(config, section), name, value)
    return resolve(config, DataFacts(50_000, 64, 3, "cpu"))


def test_mae_alone_has_its_papers_views_crops_and_flips_without_colour():
    resolved, reasons = views_of(mae=MaeConfig())
    assert resolved.photometry == NO_PHOTOMETRY
    assert (resolved.crops.num_global, resolved.crops.num_local, resolved.crops.global_scale) == (1, 0, [0.2, 1.0])
    assert resolved.crops.horizontal_flip_prob == 0.5
    for key in ("photometry.jitter_prob", "photometry.global_solarize_prob", "crops.num_global"):
        assert "MAE alone" in reasons[key]
    assert views_of(mae=MaeConfig(num_views=3))[0].crops.num_global == 3


@pytest.mark.parametrize("other", [{"dino": DinoConfig()}, {"ibot": IbotConfig()}])
@pytest.mark.parametrize("mae", [{}, {"mae": MaeConfig()}])
def test_views_that_are_compared_have_dinos_colours(other, mae):
    resolved, reasons = views_of(**other, **mae)
    assert resolved.photometry == DINO_PHOTOMETRY and resolved.crops.num_global == 2
    assert "compared" in reasons["photometry.jitter_prob"]
    assert views_of(ibot=IbotConfig())[0].crops.global_scale == [0.25, 1.0], "iBOT's own"


@pytest.mark.parametrize(
    ("given", "jitter", "brightness", "hue"),
    [
        ({"photometry.brightness": 0.3}, 0.8, 0.3, 0.0),
        ({"photometry.jitter_prob": 0.5}, 0.5, 0.4, 0.1),
        ({"photometry.jitter_prob": 0.5, "photometry.hue": 0.2}, 0.5, 0.0, 0.2),
        ({"photometry.jitter_prob": 0.0}, 0.0, 0.0, 0.0),
        ({"photometry.hue": 0.0}, 0.0, 0.0, 0.0),
    ],
)
def test_colours_asked_for_with_mae_alone_stand_and_take_effect(given, jitter, brightness, hue):
    resolved, reasons = views_of(mae=MaeConfig(), **given)
    colours = resolved.photometry
    assert (colours.jitter_prob, colours.brightness, colours.hue) == (jitter, brightness, hue)
    assert not set(given) & set(reasons)
    blurred, _ = views_of(mae=MaeConfig(), **{"photometry.global_blur_prob": [0.7], "crops.num_global": 4})
    assert blurred.photometry.global_blur_prob == [0.7] and blurred.crops.num_global == 4


def test_no_two_configs_share_a_list():
    first, second = (views_of(dino=DinoConfig())[0].photometry for _ in range(2))
    assert first.global_blur_prob is not second.global_blur_prob
    assert first.global_blur_prob is not DINO_PHOTOMETRY.global_blur_prob


# ---- the teacher's pace and temperature ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "batch", "half_life"),
    [
        (60, 32, 69),
        (300, 16, 69),
        (5_000, 64, 250),
        (300_000, 512, 173),
        (300_000, 1024, 173),
        (100_000, 2048, 87),
        (100_000, 4096, 69),
        (1_000, 4096, 69),
    ],
)
def test_the_teacher_never_follows_within_a_few_steps(steps, batch, half_life):
    """Its half-life in steps, never below 69, as the reason says."""
    resolved, reasons = resolve(PretrainConfig(data="x", steps=steps, batch_size=batch, dino=DinoConfig()), FACTS)
    found = -1 / math.log2(resolved.optim.momentum)
    assert found == pytest.approx(half_life, abs=1) and found > 68.9
    assert f"{half_life} steps: " in reasons["optim.momentum"] and "at least 69 steps" in reasons["optim.momentum"]


@pytest.mark.parametrize(("steps", "momentum"), [(30, 0.0992), (300, 0.7937), (660, 0.9), (100_000, 0.9)])
def test_the_centre_is_there_early_in_the_run(steps, momentum):
    sections = {"dino": DinoConfig(), "ibot": IbotConfig()}
    resolved, _ = resolve(PretrainConfig(data="x", steps=steps, **sections), FACTS)
    assert resolved.dino.center_momentum == resolved.ibot.center_momentum == momentum
    reach = 1 - momentum ** max(1, steps // 25)
    assert reach > 0.9, "in 4% of the run it is nine tenths of the way"


@pytest.mark.parametrize(
    ("num_images", "start", "end"),
    [(100, 0.02, 0.02), (20_000, 0.02, 0.02), (650_583, 0.03, 0.045), (1_281_167, 0.04, 0.07), (10**8, 0.04, 0.07)],
)
def test_the_teachers_temperature_grows_with_the_images(num_images, start, end):
    sections = {"dino": DinoConfig(), "ibot": IbotConfig()}
    resolved, _ = resolve(PretrainConfig(data="x", **sections), DataFacts(num_images, 64, 3, "cpu"))
    for section in (resolved.dino, resolved.ibot):
        assert (section.teacher_temperature_start, section.teacher_temperature) == (start, end)
    sharp = PretrainConfig(data="x", dino=DinoConfig(teacher_temperature=0.01))
    assert resolve(sharp, FACTS)[0].dino.teacher_temperature_start == 0.01, "never above a given end"


# ---- distillation by budget ------------------------------------------------------------------------------------------

SMALL, LARGE = {"steps": 1000, "batch_size": 64}, {"steps": 100_000, "batch_size": 256}
FACTS = DataFacts(50_000, 64, 3, "cpu")


def distillation(**keys):
    resolved, reasons = resolve(PretrainConfig(data="x", **keys), FACTS)
    dino = resolved.dino
    return (dino.weight, dino.student_visible_ratio, dino.num_teacher_views, resolved.crops.num_local), reasons


def test_on_a_small_budget_one_masked_student_pass_serves_both():
    chosen, reasons = distillation(**SMALL, dino=DinoConfig(), mae=MaeConfig())
    assert chosen == (0.1, 0.25, 1, 0)
    assert "64,000 images seen, under 1,000,000" in reasons["dino.student_visible_ratio"]
    assert distillation(**SMALL, dino=DinoConfig(), mae=MaeConfig(mask_ratio=0.6))[0][1] == 0.4


@pytest.mark.parametrize(
    "keys",
    [
        {**LARGE, "dino": DinoConfig(), "mae": MaeConfig()},
        {**SMALL, "dino": DinoConfig()},
        {**LARGE, "dino": DinoConfig(), "ibot": IbotConfig(), "mae": MaeConfig()},
    ],
)
def test_dino_keeps_its_published_form_otherwise(keys):
    assert distillation(**keys)[0] == (1.0, 1.0, 2, 2)


def test_ibots_masks_keep_the_patches():
    assert distillation(**SMALL, dino=DinoConfig(), ibot=IbotConfig(), mae=MaeConfig())[0] == (0.1, 1.0, 2, 2)


def test_what_was_given_of_the_distillation_stands():
    dino = DinoConfig(weight=0.7, student_visible_ratio=0.5, num_teacher_views=2)
    assert distillation(**SMALL, dino=dino, mae=MaeConfig())[0] == (0.7, 0.5, 2, 0)
    dino = DinoConfig(student_visible_ratio=0.5)
    assert distillation(**LARGE, dino=dino, mae=MaeConfig())[0] == (1.0, 0.5, 1, 0)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"dino": DinoConfig(student_visible_ratio=0.5), "ibot": IbotConfig()}, "set it to 1"),
        ({"ibot": IbotConfig(shared_head=True)}, "switch on dino={}"),
        ({"dino": DinoConfig(), "ibot": IbotConfig(shared_head=True, num_prototypes=7)}, "ibot.num_prototypes=7"),
    ],
)
def test_distillations_that_exclude_one_another_are_refused(sections, words):
    with pytest.raises(InputError) as caught:
        resolve(PretrainConfig(data="x", **SMALL, **sections), FACTS)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_shared_head_has_dinos_prototypes():
    sections = {"dino": DinoConfig(num_prototypes=77), "ibot": IbotConfig(shared_head=True)}
    assert resolve(PretrainConfig(data="x", **sections), FACTS)[0].ibot.num_prototypes == 77


@pytest.mark.parametrize(
    ("device", "compiles", "wanted", "words"),
    [("cuda", True, True, "compiler"), ("cuda", False, False, "missing"), ("cpu", False, False, "CPU")],
)
def test_blocks_are_compiled_where_it_pays(device, compiles, wanted, words):
    facts = DataFacts(100_000, 224, 3, device, compiles=compiles)
    resolved, reasons = resolve(PretrainConfig(data="x", mae=MaeConfig()), facts)
    assert resolved.compile is wanted and words in reasons["compile"]
    assert resolve(PretrainConfig(data="x", mae=MaeConfig(), compile=not wanted), facts)[0].compile is not wanted
