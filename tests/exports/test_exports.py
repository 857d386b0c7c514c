"""Oracles: timm's, transformers', open_clip's and onnxruntime's own forward; every guard is shown a damaged folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from formats import FORMS, TINY, encoder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sslvit.checkpoint import save_checkpoint
from sslvit.encoder.architecture import Architecture
from sslvit.encoder.config import EncoderConfig
from sslvit.encoder.vit import forward_tokens
from sslvit.encoder.weights import LoadedEncoder, init_encoder, load_encoder
from sslvit.errors import InputError
from sslvit.exports import reopen, verify
from sslvit.exports.formats import FORMATS, check_formats, checks_of, possible_formats, write_folder, write_formats
from sslvit.exports.hf_folder import hf_class, hf_state
from sslvit.exports.open_clip import point_to_tower
from sslvit.exports.run_encoders import write_run_encoders
from sslvit.exports.verify import Check, VerificationError

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that are opened
EXTRAS = ("transformers", "open_clip", "onnxruntime")
EXACT = {
    "ours": "dinov2_with_registers",
    "twin": "siglip_vision_model",
    "no_registers": "dinov2",
    "original": "vit",
    "class_positions": "dinov2_with_registers",
    "grey": "dinov2_with_registers",
    "five_channels": "dinov2_with_registers",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def need(*libraries: str) -> None:
    for library in libraries:
        pytest.importorskip(library, reason="an optional extra")


def export(form: str, folder: Path, *formats: str) -> dict[str, list[dict]]:
    return write_formats(encoder(form), {name: folder / name for name in formats}, {})


# --- what comes out is what went in ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_form_in_every_format_that_is_exact(form: str, tmp_path: Path) -> None:
    need("transformers", "open_clip")
    loaded = encoder(form)
    possible, refused = possible_formats(loaded)
    assert ("hf" in possible) == (form in EXACT)
    assert ("siglip" in possible) == (form == "twin")
    assert {"timm", "safetensors"} <= set(possible) and set(possible) | set(refused) == set(FORMATS)
    written = [name for name in possible if name != "onnx"]
    reports = export(form, tmp_path, *written)
    assert not list(tmp_path.glob(".export-*"))
    for name in written:
        stored = json.loads((tmp_path / name / "verification.json").read_text())
        assert stored["checks"] == reports[name] and stored["format"] == name
        for report in reports[name]:
            native_only = name in ("hf", "siglip") and EXACT[form] != "dinov2_with_registers"
            assert len(report["max_difference"]) == (1 if native_only else 2)
            exact = name not in ("siglip", "hf") or form != "twin"
            assert max(report["max_difference"].values()) < (1e-6 if exact else 1e-5)


@pytest.mark.parametrize("form", ["ours", "twin", "five_channels"])
@torch.no_grad()
def test_timm_folder_opens_in_timm(form: str, tmp_path: Path) -> None:
    loaded = encoder(form)
    export(form, tmp_path, "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    for size in ((32, 32), (48, 64)):
        x = torch.randn(2, loaded.preprocessing.channels, *size)
        assert torch.equal(model.forward_features(x), loaded.module.forward_features(x))
        assert (model(x) - forward_tokens(loaded.module, x).cls).abs().max() < 1e-5
    stated = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]["first_conv"]
    assert (stated is None) == (loaded.preprocessing.channels != 3), "timm 1.0.20 would draw that layer anew"
    config = timm.data.resolve_data_config({}, model=model)
    assert tuple(config["mean"]) == loaded.preprocessing.mean and tuple(config["std"]) == loaded.preprocessing.std
    more = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=7)
    assert more(x).shape == (2, 7)


@pytest.mark.parametrize("form", sorted(EXACT))
@torch.no_grad()
def test_hf_folder_is_the_exact_class(form: str, tmp_path: Path) -> None:
    need("transformers")
    import transformers

    loaded = encoder(form)
    export(form, tmp_path, "hf")
    options = {"add_pooling_layer": False} if EXACT[form] == "vit" else {}
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf", **options)
    assert model.config.model_type == EXACT[form]
    x = torch.randn(2, loaded.preprocessing.channels, 32, 32)
    out = model(x, output_hidden_states=True)
    assert (out.last_hidden_state - forward_tokens(loaded.module, x).all).abs().max() < 1e-5
    unnormed = forward_tokens(loaded.module, x, norm=False).all  # what LLaVA's projector reads
    assert (out.hidden_states[-1] - unnormed).abs().max() < 1e-5


def test_auto_model_opens_the_timm_folder_too(tmp_path: Path) -> None:
    need("transformers")
    import transformers
    from PIL import Image

    export("ours", tmp_path, "timm")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "timm", num_labels=5)
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 5)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "timm")
    pixels = processor(Image.new("RGB", (50, 40), (0, 0, 255)), return_tensors="pt")["pixel_values"]
    expected = torch.tensor([-0.1 / 0.3, -0.25 / 0.5, 0.6 / 0.7])
    assert pixels.shape == (1, 3, 32, 32) and torch.allclose(pixels[0, :, 3, 3], expected, atol=1e-5)


def test_a_class_count_among_the_arguments_is_left_out(tmp_path: Path) -> None:
    """timm's own `save_for_hf` writes one there, and AutoModel then raises."""
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
    write_folder(encoder("ours"), "timm", tmp_path / "theirs")
    edit("config.json", "model_args", "num_classes", value=0)(tmp_path / "theirs")
    write_folder(load_encoder(str(tmp_path / "theirs")), "timm", tmp_path / "ours")
    assert "num_classes" not in json.loads((tmp_path / "ours" / "config.json").read_text())["model_args"]


@pytest.mark.parametrize("name", ["timm", "hf"])
def test_the_grey_processor_reads_grey_pictures(name: str, tmp_path: Path) -> None:
    """transformers 4 reads them with the class called fast alone, which test_formats.py shows where that version is."""
    need("transformers")
    import transformers
    from PIL import Image

    export("grey", tmp_path, name)
    stated = json.loads((tmp_path / name / "preprocessor_config.json").read_text())["image_processor_type"]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / name)
    pixels = processor(Image.new("L", (50, 40), 255), return_tensors="pt")["pixel_values"]
    assert stated == "BitImageProcessorFast" and pixels.shape == (1, 1, 32, 32)
    assert torch.allclose(pixels, torch.tensor((1 - 0.1) / 0.3))


@pytest.mark.parametrize("form", sorted(FORMS))
def test_export_import_export_is_bit_for_bit(form: str, tmp_path: Path) -> None:
    """Every format that holds weights is also a source; preprocessing comes back too."""
    need(*EXTRAS)
    loaded = encoder(form)
    for name in (name for name in possible_formats(loaded)[0] if name != "onnx"):
        once, twice = (tmp_path / which / name for which in ("once", "twice"))
        for folder in (once, twice):
            folder.mkdir(parents=True)
        write_folder(loaded, name, once)
        write_folder(load_encoder(str(once)), name, twice)
        assert load_encoder(str(twice)).preprocessing == loaded.preprocessing
        first, second = sorted(once.rglob("*.safetensors")), sorted(twice.rglob("*.safetensors"))
        for a, b in zip(first, second, strict=True):
            x, y = load_file(a), load_file(b)
            assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x), (form, name)


@pytest.mark.parametrize("form", ["ours", "twin"])
@torch.no_grad()
def test_every_format_is_a_start_for_pretraining(form: str, tmp_path: Path) -> None:
    """`init=exported/FORMAT`: the same function, also where LayerScale was multiplied in."""
    loaded, x = encoder(form), torch.randn(2, 3, 32, 32)
    for name in (name for name in possible_formats(loaded)[0] if name != "onnx"):
        (tmp_path / name).mkdir()
        write_folder(loaded, name, tmp_path / name)
        started, report = init_encoder(load_encoder(str(tmp_path / name)), loaded.config)
        difference = started.eval().forward_features(x) - loaded.module.forward_features(x)
        assert not report.missing and not report.unexpected and difference.abs().max() < 1e-5, name


def test_each_library_has_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("transformers")
    processes: list[set[str]] = []
    run = verify._run_process

    def counted(job: Path, python: str) -> None:
        processes.append({check["library"] for one in json.loads(job.read_text()) for check in one["checks"]})
        run(job, python)

    monkeypatch.setattr(verify, "_run_process", counted)
    export("ours", tmp_path, "timm", "hf", "safetensors")
    assert processes == [{"timm"}, {"transformers"}, {"safetensors"}]


def test_one_run_folder_fresh_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's checkpoint to encoder/ and encoder_hf/, reopened in the real subprocess."""
    loaded = encoder("ours")
    tensors = {f"teacher.{name}": tensor for name, tensor in loaded.module.state_dict().items()}
    preprocessing = vars(loaded.preprocessing)
    meta = {
        "encoder": vars(EncoderConfig("vit_tiny_patch16_224", 8, 32, True, 4, 3, **TINY)),
        "preprocessing": preprocessing,
    }
    save_checkpoint(tmp_path / "checkpoints", 7, {"model": tensors}, meta, keep=1, background=False)
    reports = write_run_encoders(tmp_path, facts={"data": "scenes:", "steps": 7, "config": {"dino": {"weight": 1.0}}})
    assert set(reports) == {"timm", "hf"} and (tmp_path / "encoder" / "config.json").is_file()
    for folder in ("encoder", "encoder_hf"):
        assert load_encoder(str(tmp_path / folder)).fingerprint == loaded.fingerprint
        card = (tmp_path / folder / "README.md").read_text()
        assert "- Data: scenes:" in card and "- Steps: 7" in card and "- Objectives: dino" in card
    assert "max difference 0.0e+00 at 32x32" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "encoder", "encoder_hf"]


def test_llava_reads_the_state_as_it_is() -> None:
    config, tensors = hf_state(encoder("ours").module)
    assert config["model_type"] == "dinov2_with_registers" and config["num_register_tokens"] == 4
    assert not tensors["embeddings.position_embeddings"][:, 0].any()
    assert torch.equal(
        tensors["encoder.layer.1.attention.attention.key.weight"],
        encoder("ours").module.blocks[1].attn.qkv.weight[64:128],
    )


@pytest.mark.parametrize(
    "form", ["ours", *(pytest.param(form, marks=pytest.mark.slow) for form in ("twin", "five_channels", "original"))]
)
def test_onnx_runs_at_any_size_and_batch(form: str, tmp_path: Path) -> None:
    need("onnxscript", "onnxruntime")
    import onnxruntime

    loaded = encoder(form)
    export(form, tmp_path, "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "encoder.onnx")
    for batch, height, width in ((1, 32, 32), (3, 64, 40)):
        x = torch.randn(batch, loaded.preprocessing.channels, height, width)
        tokens, features = session.run(None, {"images": x.numpy()})
        ours = forward_tokens(loaded.module, x)
        assert (torch.from_numpy(tokens) - ours.all).abs().max() < 1e-4
        assert (torch.from_numpy(features) - loaded.module(x)).abs().max() < 1e-4
    change_graph(tmp_path / "onnx" / "encoder.onnx")
    with pytest.raises(VerificationError, match="differ by"):
        verify.verify(loaded, checks_of(loaded, "onnx", tmp_path / "onnx"))


def change_graph(file: Path) -> None:
    """One weight of its first matrix, visibly."""
    import onnx

    graph = onnx.load(file)
    weight = next(one for one in graph.graph.initializer if len(one.dims) == 2)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 1.0
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, file)


# --- damage is caught ------------------------------------------------------------------------------------------------


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    (file,) = folder.rglob("*.safetensors")
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, header)


def flip_bit(folder: Path) -> None:
    """The last bit of one weight: no library's outputs would show it."""

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in sorted(tensors) if n.endswith(("mlp.fc1.weight", "norm1.bias")))
        tensors[name].view(-1).view(torch.int32)[3] ^= 1

    change_weights(folder, flip)


def drop_key(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop(next(n for n in sorted(tensors) if n.endswith("fc2.bias"))))


def edit(file: str, *path: str, value: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (folder / file).write_text(json.dumps(content))

    return damage


DAMAGE = {
    "flipped bit": ("hf", flip_bit, "bit for bit"),
    "flipped bit in timm": ("timm", flip_bit, "bit for bit"),
    "missing key": ("hf", drop_key, "bit for bit|missing"),
    "missing key in timm": ("timm", drop_key, "bit for bit|missing"),
    "registers forgotten in timm": ("timm", edit("config.json", "model_args", "reg_tokens", value=0), "left over: reg"),
    "mean": ("hf", edit("preprocessor_config.json", "image_mean", value=[0.5, 0.5, 0.5]), "states"),
    "std in timm": ("timm", edit("config.json", "pretrained_cfg", "std", value=[0.5, 0.5, 0.5]), "states"),
    "epsilon": ("hf", edit("config.json", "layer_norm_eps", value=1e-2), "tokens differ by"),
    "activation": ("hf", edit("config.json", "hidden_act", value="relu"), "hidden_act"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_a_damaged_folder_is_caught(damage: str, tmp_path: Path) -> None:
    need("transformers")
    name, harm, words = DAMAGE[damage]
    loaded = encoder("ours")
    export("ours", tmp_path, name)
    check = Check(tmp_path / name, FORMATS[name].libraries[-1])
    verify.verify(loaded, [check])
    harm(tmp_path / name)
    with pytest.raises(VerificationError, match=words) as caught:
        verify.verify(loaded, [check])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "onnx"])
def test_every_format_shows_a_flipped_bit_and_a_missing_key(name: str, tmp_path: Path) -> None:
    loaded, folder = encoder("twin"), tmp_path / name
    folder.mkdir()
    write_folder(loaded, name, folder)
    verify._compare_weights(loaded, Check(folder, ""))
    for number, (harm, words) in enumerate(((flip_bit, "bit for bit"), (drop_key, "missing|bit for bit"))):
        harmed = tmp_path / str(number)
        shutil.copytree(folder, harmed)
        if name == "open_clip":
            point_to_tower(harmed, harmed)
        harm(harmed)
        with pytest.raises(VerificationError, match=words):
            verify._compare_weights(loaded, Check(harmed, ""))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing key", "weights missing or left over: encoder.layer.0.mlp.fc2.bias"),
        ("mean", "normalises with mean"),
        ("epsilon", "tokens differ"),
    ],
)
def test_the_library_alone_notices_too(damage: str, words: str, tmp_path: Path) -> None:
    """Without our own loader's look at the folder."""
    need("transformers")
    name, harm, _ = DAMAGE[damage]
    export("ours", tmp_path, name)
    harm(tmp_path / name)
    with pytest.raises(VerificationError, match=words):
        verify.verify(encoder("ours"), [Check(tmp_path / name, "transformers", reimport=False)])


def test_a_transform_that_disagrees_with_its_numbers_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export("ours", tmp_path, "timm")
    honest = reopen.with_timm

    def dishonest(folder: Path, images: dict, picture: torch.Tensor) -> tuple[dict, dict]:
        outputs, facts = honest(folder, images, picture)
        return outputs | {"pixels": outputs["pixels"].flip(0)}, facts

    monkeypatch.setitem(reopen.LIBRARIES, "timm", dishonest)
    with pytest.raises(VerificationError, match="pixels that differ"):
        verify.verify(encoder("ours"), [Check(tmp_path / "timm", "timm")])


def test_a_folder_its_library_cannot_open_is_named(tmp_path: Path) -> None:
    export("ours", tmp_path, "timm")
    (tmp_path / "timm" / "config.json").write_text("{")
    with pytest.raises(VerificationError, match="timm cannot be opened by timm: JSONDecodeError") as caught:
        verify.verify(encoder("ours"), [Check(tmp_path / "timm", "timm", reimport=False)])
    assert "\n" not in str(caught.value)


def test_a_fresh_process_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nprintf 'Traceback\\nMemoryError: of 2 GB\\n\\n' >&2; exit 1\n")
    (tmp_path / "python").chmod(0o700)
    with pytest.raises(VerificationError, match=r"opened by its library: MemoryError: of 2 GB$") as caught:
        verify._run_process(tmp_path / "job.json", str(tmp_path / "python"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["flipped bit in timm", "std in timm"])
def test_nothing_is_left_behind_and_the_old_export_stays(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export("ours", tmp_path, "timm")
    before = {path: path.read_bytes() for path in (tmp_path / "timm").iterdir()}
    _, harm, _ = DAMAGE[damage]
    write = FORMATS["timm"].write

    def wrong(loaded: LoadedEncoder, folder: Path) -> None:
        write(loaded, folder)
        harm(folder)

    monkeypatch.setitem(FORMATS, "timm", type(FORMATS["timm"])(FORMATS["timm"].check, wrong, ("timm",)))
    with pytest.raises(VerificationError):
        export("ours", tmp_path, "safetensors", "timm")
    assert {path: path.read_bytes() for path in (tmp_path / "timm").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["timm"]


def test_a_second_export_replaces_the_first(tmp_path: Path) -> None:
    export("ours", tmp_path, "safetensors")
    (tmp_path / "safetensors" / "stale").write_text("")
    export("twin", tmp_path, "safetensors")
    assert not (tmp_path / "safetensors" / "stale").exists()
    assert load_encoder(str(tmp_path / "safetensors")).config.class_token is False


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "name", "words"),
    [
        ("rope", "hf", "Eva has rotary positions"),
        ("rope", "onnx", "rotary positions are traced"),
        ("qk_norm", "hf", "normalises queries"),
        ("non_square", "hf", "not square"),
        ("ours", "siglip", "no class token"),
        ("five_channels", "open_clip", "5 channels"),
        ("ours", "gguf", "unknown format 'gguf'"),
    ],
)
def test_what_is_not_exact_is_refused_with_the_reason(form: str, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        check_formats(encoder(form), {name: Path()})
    assert "\n" not in str(caught.value)


def test_odd_widths_are_refused_where_transformers_cannot_say_them() -> None:
    architecture = Architecture("vit_tiny_patch16_224", {**FORMS["ours"][2], "mlp_ratio": 2.5})
    with pytest.raises(InputError, match="whole mlp_ratio"):
        hf_class(architecture.build())


@pytest.mark.parametrize(
    ("library", "name"), [("transformers", "hf"), ("open_clip", "open_clip"), ("onnxruntime", "onnx")]
)
def test_a_missing_extra_is_named(library: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = verify.importlib.util.find_spec
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda n, *a: None if n == library else find(n, *a))
    with pytest.raises(InputError, match=rf"{library}.*not installed; pip install 'sslvit\["):
        check_formats(encoder("ours"), {name: Path()})
    assert name not in possible_formats(encoder("ours"))[0]


def test_a_run_without_transformers_still_gets_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = verify.importlib.util.find_spec
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda n, *a: None if n == "transformers" else find(n, *a))
    reports = export("ours", tmp_path, "timm", "hf")
    assert reports["hf"] == [{"library": "transformers", "skipped": "needs sslvit[vlm]"}]
    assert "not checked: needs sslvit[vlm]" in (tmp_path / "hf" / "README.md").read_text()
    assert load_encoder(str(tmp_path / "hf")).fingerprint == encoder("ours").fingerprint
