"""The card says what was measured, and its loading snippets run word for word."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sslvit.encoder.weights import load_encoder
from sslvit.exports import reopen, verify
from sslvit.exports.card import model_card, run_facts
from sslvit.exports.formats import write_formats

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
    monkeypatch.setattr(verify, "_run_process", reopen.main)
    write_formats(load_encoder(spec), {name: tmp_path / name}, {})
    card = (tmp_path / name / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippets
    for snippet in snippets:
        assert "FOLDER" in snippet
        exec(snippet.replace("FOLDER", str(tmp_path / name)), {})


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
    assert words in card and (f"license: {license}" in card) is front


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
