"""The card says what was measured, and its loading snippets run word for word."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sslvit.encoder.weights import load_encoder
from sslvit.exports.card import model_card
from sslvit.exports.facts import run_facts
from sslvit.exports.formats import write_formats
from sslvit.exports.licence import licence_of, licence_warning
from sslvit.exports.vlm_card import vlm_card

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that are opened
SPEC = "vit_tiny_patch16_224?pretrained=false&img_size=32&patch_size=8&depth=1"
OURS = SPEC + "&reg_tokens=4&no_embed_class=true&init_values=1e-5"
TWIN = SPEC + "&class_token=false&global_pool=avg&fc_norm=false&act_layer=gelu_tanh"


@pytest.mark.parametrize(
    ("spec", "name"),
    [(OURS, "timm"), (OURS, "hf"), (SPEC, "hf"), (TWIN, "siglip"), (OURS, "open_clip"), (OURS, "safetensors")],
)
def test_loading_snippets_run(spec: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("transformers", "open_clip"):
        pytest.importorskip(library, reason="an optional extra")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_formats(load_encoder(spec), {name: tmp_path / name}, {})
    card = (tmp_path / name / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippets
    for snippet in snippets:
        assert "FOLDER" in snippet
        small = snippet.replace("width=512, heads=8, layers=12", "width=64, heads=1, layers=1")  # a text tower
        exec(small.replace("FOLDER", str(tmp_path / name)), {})


def test_facts_of_a_run_become_the_card(tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text("data: folder:/my/scans\nsteps: 60\ndino: {weight: 1.0}\nmae: null\n")
    (tmp_path / "env.json").write_text(json.dumps({"host": "secret-host", "num_cpus": 2, "world_size": 1}))
    row = {
        "name": "knn/top1",
        "value": 0.5,
        "ci95": [0.45, 0.55],
        "protocol": "k = 20",
        "data": "scans",
        "seed": 0,
        "step": 60,
    }
    (tmp_path / "results.json").write_text(json.dumps([row, {**row, "name": "vlm/accuracy", "ci95": None}]))
    card = model_card(
        load_encoder(OURS),
        "timm",
        run_facts(tmp_path),
        [{"library": "timm", "version": "1", "max_difference": {"32x32": 0.0}}],
    )
    for line in (
        "- Data: folder:/my/scans",
        "- Started from: random weights",
        "- Steps: 60",
        "- Objectives: dino",
        "- Hardware: 1 process, 2 CPU cores",
        "| knn/top1 | 0.5000 | 0.4500 to 0.5500 | k = 20 | scans | 0 |",
        "| timm 1 | 32x32 | 0 |",
        "4 registers",
    ):
        assert line in card
    assert "secret-host" not in card and "native size" not in card


@pytest.mark.parametrize(
    ("license", "words", "front"),
    [
        ("apache-2.0", "under `apache-2.0`.\n", True),
        ("dinov3-license", "not a permissive licence", True),
        (None, "Chosen by", False),
    ],
)
def test_licence_of_the_start_is_carried_and_warned_about(license: str | None, words: str, front: bool) -> None:
    card = model_card(replace(load_encoder(SPEC), license=license), "timm", {}, [])
    stated = "license: other\nlicense_name: dinov3-license" if license == "dinov3-license" else f"license: {license}"
    assert words in card and (stated in card) is front


def test_licence_of_a_start_is_found_without_its_weights(tmp_path: Path) -> None:
    assert licence_of("vit_small_patch16_dinov3") == "dinov3-license"
    assert licence_of("vit_small_patch16_dinov3?pretrained=false&seed=1") is None
    assert licence_of("some/where.pth") is None
    for name, init in (("first", "vit_small_patch14_dinov2"), ("second", str(tmp_path / "first@best"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "resolved.yaml").write_text(f"data: x\ninit: {init}\n")
    assert licence_of(str(tmp_path / "second")) == "apache-2.0" == run_facts(tmp_path / "second")["licence"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("---\nlicense: other\nlicense_name: my-licence\n---\n")
    assert licence_of(str(tmp_path / "folder")) == "my-licence"
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "resolved.yaml").write_text(f"init: {tmp_path / 'third'}\n")
    assert licence_of(str(tmp_path / "third")) is None, "a circle ends"


@pytest.mark.parametrize(
    ("license", "facts", "words"),
    [
        ("apache-2.0", {}, None),
        (None, {}, None),
        (None, {"init": "a.pth"}, "a.pth, whose licence is not known"),
        (None, {"init": "b", "licence": "dinov3-license"}, "b, under dinov3-license, which is not permissive"),
        ("cc-by-nc-4.0", {}, "under cc-by-nc-4.0, which is not permissive"),
    ],
)
def test_the_exporter_is_warned(license: str | None, facts: dict, words: str | None) -> None:
    warning = licence_warning(replace(load_encoder(SPEC), license=license), facts)
    assert warning is None if words is None else words in str(warning)


def test_the_data_can_have_a_name(tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text("data: folder:/private/x\nknn: {train: /private/y}\nmae: {weight: 1}\n")
    (tmp_path / "results.json").write_text(json.dumps([{"name": "a", "value": 1, "data": "folder:/private/x"}]))
    card = model_card(load_encoder(SPEC), "timm", run_facts(tmp_path, "Our scans"), [])
    assert "- Data: Our scans" in card and "private" not in card
    assert "arXiv:2111.06377" in card and "@software{sslvit" in card and "arXiv:2104.14294" not in card


def test_the_card_of_a_vision_language_folder() -> None:
    checked = {"library": "transformers", "version": "5", "max_difference": {"answers": 1e-6}}
    rows = [{"name": "vlm/accuracy", "value": 0.5, "ci95": [0.4, 0.6], "protocol": "p", "data": "d", "seed": 0}]
    licenses = {"Encoder": "apache-2.0", "Language model": "llama3"}
    card = vlm_card({"Encoder": "runs/a"}, licenses, checked, environment={"num_cpus": 2}, results=rows)
    for line in (
        "license: other\nlicense_name: several",
        "- Encoder: runs/a",
        "- Hardware: 2 CPU cores",
        "| transformers 5 | answers | 1e-06 |",
        "| vlm/accuracy | 0.5000 | 0.4000 to 0.6000 | p | d | 0 |",
        "- Language model: `llama3`. **Not a permissive licence",
    ):
        assert line in card, line
    assert "license: mit\n" in vlm_card({}, {"Encoder": None, "Language model": "mit"}, checked)


def test_native_only_classes_say_so() -> None:
    assert "native size only" in model_card(load_encoder(SPEC), "hf", {}, [])
    assert "native size only" in model_card(load_encoder(TWIN), "siglip", {}, [])
    assert "5 channels" in model_card(load_encoder(OURS + "&in_chans=5"), "timm", {}, [])


def test_a_demo_keeps_pretrainings_record_in_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "config.yaml").write_text("data: given\n")
    (tmp_path / "pretrain" / "resolved.yaml").write_text("data: scenes\nsteps: 60\n")
    (tmp_path / "pretrain" / "env.json").write_text(json.dumps({"num_cpus": 2}))
    (tmp_path / "config.yaml").write_text("images: scenes\n")
    (tmp_path / "env.json").write_text(json.dumps({"num_cpus": 9}))
    (tmp_path / "results.json").write_text("[]")
    facts = run_facts(tmp_path)
    assert (facts["data"], facts["steps"], facts["environment"]["num_cpus"], facts["results"]) == ("scenes", 60, 2, [])


def test_numbers_that_were_not_finite_are_left_empty(tmp_path: Path) -> None:
    rows = [{"name": "a", "value": None, "ci95": [None, 0.5]}, {"name": "b", "value": 1, "ci95": [0.5, 1]}]
    card = model_card(load_encoder(SPEC), "timm", {"results": rows}, [])
    assert "| a |  |  |" in card and "| b | 1.0000 | 0.5000 to 1.0000 |" in card
