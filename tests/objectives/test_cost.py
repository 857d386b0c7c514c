"""The arithmetic of what a step costs, against what small models measure: parameters exactly, the rest within 15%."""

import dataclasses
import json
import sys

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sslvit.config import PretrainConfig
from sslvit.data.loader import Views
from sslvit.encoder.config import Preprocessing
from sslvit.objectives import pretraining
from sslvit.objectives.config import DinoConfig, IbotConfig, KoleoConfig, MaeConfig
from sslvit.objectives.cost import Run, cost, runs_of, size_of
from sslvit.objectives.distilled import teacher_as_loaded, teacher_named
from sslvit.objectives.pretraining import Pretraining
from sslvit.objectives.recipe import DataFacts, resolve
from sslvit.objectives.sizes import SIZES

HEAD = {"num_prototypes": 1024, "head_hidden_dim": 128, "head_bottleneck_dim": 64}
DINO, IBOT, MAE = DinoConfig(**HEAD), IbotConfig(**HEAD), MaeConfig(decoder_dim=64, decoder_depth=2)
CASES = {
    "joint": {"dino": DINO, "mae": MAE},
    "dino": {"dino": DINO},
    "mae": {"mae": MAE},
    "shared pass": {
        "dino": dataclasses.replace(DINO, num_teacher_views=1, student_visible_ratio=0.25),
        "mae": MAE,
    },
    "two views, one pass shared": {
        "dino": dataclasses.replace(DINO, num_teacher_views=2, student_visible_ratio=0.25),
        "mae": MAE,
    },
    "dino, ibot, koleo": {"dino": DINO, "ibot": IBOT, "koleo": KoleoConfig()},
    "shared head": {"dino": DINO, "ibot": dataclasses.replace(IBOT, shared_head=True)},
    "second form": {"dino": DINO, "mae": MAE},
    "rectangle": {"dino": DINO, "mae": MAE},
    "distilled": {"dino": DINO, "mae": MAE},
    "distilled patches": {"dino": DINO, "ibot": IBOT},
}
#: A teacher of larger patches, and one whose patches are compared one by one.
TEACHERS = {"distilled": (32, 6), "distilled patches": (16, 5)}


def resolved(name, batch=8, side=96):
    config = PretrainConfig(data="x", steps=100, batch_size=batch, precision="fp32", **CASES[name])
    encoder = config.encoder
    encoder.name, encoder.image_size, encoder.patch_size, encoder.depth = "vit_tiny_patch16_224", side, 16, 4
    encoder.class_token = name != "second form"
    config.crops.num_local = 0 if name in ("mae", "shared pass", "two views, one pass shared") else 4
    config.crops.local_size = side // 2
    if name == "rectangle":  # twice as wide as tall, local crops three times
        encoder.image_width, config.crops.local_width = 2 * side, 3 * side // 2
    config.teacher = "given" if name in TEACHERS else None
    return resolve(config, DataFacts(10_000, side, 3, "cpu"))[0]


def teacher_of(name):
    if name not in TEACHERS:
        return None
    patch, depth = TEACHERS[name]
    return timm.create_model(
        "vit_small_patch32_224", patch_size=patch, depth=depth, num_classes=0, dynamic_img_size=True
    )


def found_of(config, module):
    teacher = teacher_as_loaded(module._distilled[0]) if module._distilled else None
    return cost(config, teacher)


def batch_of(config):
    batch, crops = config.batch_size, config.crops

    def make(count, shape):
        return torch.randint(0, 256, (count, batch, 3, *shape), dtype=torch.uint8)

    from sslvit.data.photometry import NUM_PARAMETERS

    rows = [torch.zeros(count, batch, NUM_PARAMETERS) for count in (crops.num_global, crops.num_local)]
    ids = torch.arange(batch)
    views = (make(crops.num_global, config.encoder.size), make(crops.num_local, crops.local_shape))
    return Views(*views, *rows, ids, torch.zeros_like(ids))


@pytest.mark.parametrize("name", CASES)
def test_the_runs_are_those_that_are_made(name, monkeypatch):
    """Each group of passes as it reaches the encoders: views, patches of each, and whether its last block is whole."""
    config = resolved(name, batch=2)
    module, made = Pretraining(config, Preprocessing(96)).train(), []
    original = pretraining.forward_packed

    def forward_packed(encoder, inputs, **options):
        for item in inputs:
            kept = item.images[0, 0].numel() // 16**2 if item.keep is None else item.keep.shape[1]
            made.append(Run(encoder is module.teacher, len(item.images) // 2, kept, not item.cls_only))
        return original(encoder, inputs, **options)

    monkeypatch.setattr(pretraining, "forward_packed", forward_packed)
    module(batch_of(config), 50)
    assert sorted(made, key=repr) == sorted(runs_of(config, *[size_of(config)] * 2), key=repr)


@pytest.fixture(scope="module", params=CASES)
def measured(request):
    """(config, module, bytes that autograd saved, FLOPs) of one forward and backward pass."""
    torch.manual_seed(0)
    config = resolved(request.param)
    seen = Preprocessing(config.encoder.image_size, image_width=config.encoder.image_width)
    module = Pretraining(config, seen, teacher=teacher_of(request.param)).train()
    module._colour_crops = lambda crops, rows: crops.float() / 255  # as many bytes, without the work
    held = [*module.state_dict().values(), *(p for teacher in module._distilled for p in teacher.parameters())]
    own = {tensor.untyped_storage().data_ptr() for tensor in held}
    saved: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    views = batch_of(config)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = module(views, 50)
    loss.backward()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = module(views, 50)
        loss.backward()
    return config, module, sum(saved.values()), counter.get_total_flops()


def test_parameters_are_exact(measured):
    config, module, _, _ = measured
    found = found_of(config, module)
    assert found.frozen == sum(p.numel() for teacher in module._distilled for p in teacher.parameters())
    assert found.encoder == sum(p.numel() for p in module.student.parameters())
    assert found.student == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert found.teacher == sum(p.numel() for p in module.parameters() if not p.requires_grad)


def test_flops_are_within_15_percent(measured):
    config, module, _, flops = measured
    assert found_of(config, module).flops_per_image * config.batch_size == pytest.approx(flops, rel=0.15)


def test_activations_are_within_15_percent(measured):
    config, module, saved, _ = measured
    assert found_of(config, module).activation_bytes_per_image * config.batch_size == pytest.approx(saved, rel=0.15)


def test_checkpoints_are_within_15_percent(measured):
    config, module, _, _ = measured
    trained = [p for p in module.parameters() if p.requires_grad]
    held = sum(t.nbytes for t in module.state_dict().values()) + 8 * sum(p.numel() for p in trained)
    assert found_of(config, module).checkpoint_bytes == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_timm_s(name):
    patch = {"tiny": 16, "small": 16, "base": 16, "large": 16}.get(name, 14)
    with torch.device("meta"):
        model = timm.create_model(f"vit_{name}_patch{patch}_224", depth=1)
    dim, _, heads, hidden = SIZES[name]
    assert (model.embed_dim, model.blocks[0].attn.num_heads, model.blocks[0].mlp.fc1.out_features) == (
        dim,
        heads,
        hidden,
    )


def test_crops_are_as_wide_as_they_are():
    """Twice held: as uint8 made float, and joined; of three channels in 4 bytes."""
    config = resolved("rectangle")
    pixels = 2 * 96 * 192 + 4 * 48 * 144
    assert cost(config).crop_bytes_per_image == 2 * 4 * 3 * pixels


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", {}),
        ("vit_large_patch14_dinov2.lvd142m", {}),
        ("vit_base_patch14_reg4_dinov2", {}),
        ("vit_small_patch16_384", {"patch_size": 8, "img_size": [64, 96], "init_values": 1e-5, "reg_tokens": 2}),
    ],
)
def test_teachers_that_a_name_or_a_folder_tells(name, args, tmp_path):
    with torch.device("meta"):
        module = timm.create_model(name.split(".")[0], num_classes=0, dynamic_img_size=True, **args)
    spec = name
    if args:
        spec = str(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "model_args": args}))
    assert teacher_named(spec) == teacher_as_loaded(module)


def test_a_teacher_of_unknown_size_has_no_plan(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "hidden_size": 384}')
    config = resolved("joint")
    for spec in (
        "vit_giant_patch14_dinov2",
        "vit_base_patch16_siglip_224",
        "vit_tiny_patch16_224?depth=2",
        str(tmp_path),
    ):
        config.teacher = spec
        assert teacher_named(spec) is None and cost(config) is None, spec
    config.teacher = "vit_large_patch16_224"
    with torch.device("meta"):
        large = teacher_as_loaded(timm.create_model("vit_large_patch16_224", num_classes=0))
    assert cost(config) == cost(config, large)
    assert cost(config).state_bytes(bf16=True, shards=64) > 4 * large.parameters, "whole on every device"


def test_unknown_encoders_have_no_plan():
    config = resolved("joint")
    config.encoder.name = "vit_wonderful_patch16_224"
    assert size_of(config) is None and cost(config) is None
    assert "torch" in sys.modules  # of this test, not of the arithmetic: test_floors.py
