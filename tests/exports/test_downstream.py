"""docs/downstream.md runs: every Python block as it stands there, on tiny folders, and what it trained is looked at."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from formats import encoder, write_untrained_vlm
from PIL import Image
from safetensors.torch import load_file
from test_conditions import plain_siglip

from sslvit.encoder.vit import forward_tokens
from sslvit.exports.formats import write_folder
from sslvit.exports.open_clip import point_to_tower

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "downstream.md").read_text(encoding="utf-8")
BLOCKS = {
    heading.partition(":")[0].strip(): re.findall(r"```python\n(.*?)```", text, flags=re.S)
    for heading, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.S | re.M)
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `exported/`, `vlm/` and `photos/`, as the page has them."""
    root = tmp_path_factory.mktemp("shop")
    for name, form in {"timm": "ours", "hf": "ours", "open_clip": "ours", "siglip": "twin"}.items():
        (root / "exported" / name).mkdir(parents=True)
        write_folder(encoder(form), name, root / "exported" / name)
    point_to_tower(root / "exported" / "open_clip", root / "exported" / "open_clip")
    (root / "vlm").mkdir()
    write_untrained_vlm(encoder("twin"), root / "vlm")
    for colour in ("red", "blue"):
        (root / "photos" / colour).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40 + i, 36), colour).save(root / "photos" / colour / f"{i}.png")
    return root


def run(name: str, shop: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The names a block leaves behind."""
    (block,) = BLOCKS[name]
    assert len(block.strip().splitlines()) <= 12, "ten lines, not a program"
    monkeypatch.chdir(shop)
    names: dict = {}
    exec(compile(block, f"docs/downstream.md, {name}", "exec"), names)
    return names


def test_every_block_of_the_page_is_run() -> None:
    source = Path(__file__).read_text()
    for name, blocks in BLOCKS.items():
        assert not blocks or f'"{name}"' in source, name


def test_timm(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("timm", shop, monkeypatch)
    before, after = encoder("ours").module.state_dict(), names["model"].state_dict()
    moved = max((after[name] - before[name]).abs().max() for name in before)
    assert names["loss"].isfinite() and 0 < moved < 5e-3, "it began with our weights and trained them"


def test_transformers_trainer(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs sslvit[vlm]")
    names = run("transformers", shop, monkeypatch)
    trained = {name.partition(".")[2]: tensor for name, tensor in names["model"].state_dict().items()}
    before = load_file(shop / "exported" / "hf" / "model.safetensors")
    moved = (trained["layernorm.weight"] - before["layernorm.weight"]).abs().max()
    assert 0 < moved < 2e-3, "it began with our weights and trained them"


def test_open_clip(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("open_clip", reason="needs sslvit[openclip]")
    names = run("open_clip", shop, monkeypatch)
    tower = names["model"].visual.trunk.state_dict()
    assert all(torch.equal(tower[name], tensor) for name, tensor in encoder("ours").module.state_dict().items())
    assert names["loss"].isfinite() and all(p.requires_grad is False for p in names["model"].visual.parameters())
    assert any(p.grad is not None and p.grad.any() for p in names["model"].parameters())


def test_peft(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="needs sslvit[vlm]")
    names = run("peft", shop, monkeypatch)
    merged, before = names["merged"].state_dict(), encoder("ours").module.state_dict()
    assert merged.keys() == before.keys()
    changed = {name for name in before if not torch.equal(merged[name], before[name])}
    assert changed == {f"blocks.{i}.{x}.weight" for i in (0, 1) for x in ("attn.qkv", "mlp.fc1", "mlp.fc2")}


def test_lmms_eval(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs sslvit[vlm]")
    from sslvit.verbs.ask import ask

    names = run("lmms-eval", shop, monkeypatch)
    whole = ask(shop / "vlm", image=shop / "photos" / "red" / "0.png", question="What colour is it?")
    assert whole.startswith(names["answer"].strip())


@torch.no_grad()
def test_llava_next(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs sslvit[vlm]")
    names = run("LLaVA-NeXT's vision loaders", shop, monkeypatch)
    ours = forward_tokens(encoder("ours").module, names["pixels"], norm=False).all
    assert (names["features"] - ours).abs().max() < 1e-5


@torch.no_grad()
def test_nanovlm(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("nanoVLM's vision loader", shop, monkeypatch)
    config = json.loads((shop / "exported" / "siglip" / "config.json").read_text())
    loaded, pixels = encoder("twin"), torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(x)[:, None, None] for x in (loaded.preprocessing.mean, loaded.preprocessing.std))
    ours = loaded.module.forward_features((pixels - mean) / std)
    theirs = plain_siglip(load_file(shop / "for_nanovlm.safetensors"), config, pixels)
    assert (ours - theirs).abs().max() < 1e-4


def test_trl(shop: Path, downstream_python: str) -> None:
    """In the environment that holds TRL, which is not among the project's own."""
    (block,) = BLOCKS["TRL"]
    look = "\nimport json, math\nprint('LOG', json.dumps(trainer.state.log_history))"
    look += "\ntrainer.save_model('tuned')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [downstream_python, "-c", block + look],
        cwd=shop,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOG ")]
    assert any(0 < row.get("train_loss", 0) < 20 for row in json.loads(line.removeprefix("LOG ")))
    before, after = (load_file(shop / name / "model.safetensors") for name in ("vlm", "tuned"))
    assert len(before) == len(after), "the tuned folder holds as many tensors"
