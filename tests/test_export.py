"""`sslvit export` as a function: what it writes, prints and refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sslvit.encoder.weights import load_encoder
from sslvit.errors import InputError
from sslvit.exports import verify
from sslvit.verbs.export import export

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that are opened
SPEC = "vit_tiny_patch16_224?pretrained=false&img_size=32&patch_size=8&depth=1&reg_tokens=4&no_embed_class=true"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_default_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="needs sslvit[vlm]")
    reports = export(SPEC, output_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "timm"] == sorted(reports)
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'hf'}: transformers" in printed and "max difference 0.0e+00 at 32x32" in printed


def test_all_says_why_a_format_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = verify.importlib.util.find_spec
    hidden = ("onnxruntime", "open_clip")
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name, *a: None if name in hidden else find(name, *a))
    reports = export(SPEC, output_dir=tmp_path, formats="all")
    assert {"timm", "safetensors"} <= set(reports) and not {"siglip", "onnx", "open_clip"} & set(reports)
    printed = capsys.readouterr().out
    assert "siglip: skipped, SigLIP has no class token" in printed
    assert "open_clip: skipped, format open_clip cannot be verified, open_clip is not installed" in printed


def test_formats_as_the_command_line_gives_them(tmp_path: Path) -> None:
    assert list(export(SPEC, output_dir=str(tmp_path), formats="safetensors,timm")) == ["safetensors", "timm"]
    again = load_encoder(str(tmp_path / "safetensors" / "encoder.safetensors"))
    assert again.fingerprint == load_encoder(SPEC).fingerprint


def test_a_licence_that_is_not_permissive_is_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(SPEC, output_dir=tmp_path / "a", formats="timm")
    assert "warning" not in capsys.readouterr().out
    config = tmp_path / "a" / "timm" / "config.json"
    config.write_text(config.read_text().replace('"tag": "sslvit"', '"license": "dinov3-license"'))
    export(tmp_path / "a" / "timm", output_dir=tmp_path / "b", formats="safetensors")
    assert "under dinov3-license, which is not permissive" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("run", "formats", "words"),
    [
        (SPEC, "gguf", "unknown format 'gguf'; choose from timm"),
        (SPEC, "siglip", "pretrain with encoder.class_token=false"),
        (SPEC, "", "no formats given"),
        (SPEC, [], "no formats given"),
        ("/no/such/run", "timm", "no such run"),
    ],
)
def test_what_is_refused_leaves_nothing(run: str, formats: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        export(run, output_dir=tmp_path / "out", formats=formats)
    assert not (tmp_path / "out").exists()


def test_leftovers_of_a_killed_export_are_removed_and_of_a_running_one_kept(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for name in (f".export-{int(gone.stdout)}-x", ".export-old", f".export-{os.getpid()}-y"):
        (tmp_path / name / "timm").mkdir(parents=True)
    export(SPEC, output_dir=tmp_path, formats="safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".export-{os.getpid()}-y", "safetensors"]
