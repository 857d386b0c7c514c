"""Checkpoints: exact round trips, nothing damaged is ever loaded, a full disk leaves the old one, no pickle runs."""

import argparse
import errno
import json
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from sslvit import checkpoint, optim
from sslvit.checkpoint import (
    best_step,
    checkpoint_path,
    checkpoint_steps,
    clean_checkpoints,
    drop_checkpoints_after,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    read_weights_file,
    save_checkpoint,
    verify_checkpoint,
)
from sslvit.errors import InputError, Resumable


def tensors(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(int(value))
    weight = torch.randn(40, 30, generator=generator)
    return {
        "model": {
            "weight": weight,
            "tied": weight,
            "transposed": weight.t(),
            "view": weight[::2, 3:7],
            "half": weight.bfloat16(),
            "flag": weight > 0,
            "count": torch.tensor(7),
            "empty": torch.zeros(0, 4),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "ünïcode/nämé": torch.ones(1, dtype=torch.float64),
        },
        "optimizer": {"weight/exp_avg": weight * value},
    }


def save(root: Path, step: int, *, keep: int = 2, best: int | None = None, background: bool = False) -> None:
    meta = {"cursor": step * 10, "encoder": {"name": "vit"}}
    save_checkpoint(root, step, tensors(step), meta, keep=keep, best=best, background=background).join()


def debris(root: Path) -> list[str]:
    return [name for name in os.listdir(root) if name.endswith(".tmp")]


@pytest.mark.parametrize("background", [False, True])
def test_round_trip(tmp_path: Path, background: bool) -> None:
    save(tmp_path, 500, background=background)
    assert sorted(os.listdir(tmp_path / "step_0000500")) == [
        "manifest.json",
        "meta.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]
    path = latest_checkpoint(tmp_path)
    assert path == checkpoint_path(tmp_path, 500)
    loaded, meta = load_checkpoint(path)
    assert meta == {"step": 500, "cursor": 5000, "encoder": {"name": "vit"}}
    for stem, group in tensors(500).items():
        assert loaded[stem].keys() == group.keys()
        for name, value in group.items():
            assert loaded[stem][name].dtype == value.dtype
            assert torch.equal(loaded[stem][name], value), name


def test_the_library_reads_our_safetensors_and_the_bytes_depend_on_tensors_only(tmp_path: Path) -> None:
    save(tmp_path / "a", 3)
    save(tmp_path / "b", 3)
    for name in os.listdir(tmp_path / "a/step_0000003"):
        assert (tmp_path / "a/step_0000003" / name).read_bytes() == (tmp_path / "b/step_0000003" / name).read_bytes()
    group = {name: value.clone().contiguous() for name, value in tensors(3)["model"].items()}
    ours = safetensors.torch.load((tmp_path / "a/step_0000003/model.safetensors").read_bytes())
    theirs = safetensors.torch.load(safetensors.torch.save(group))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_some_files_only(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert load_checkpoint(checkpoint_path(tmp_path, 1), stems=["model"])[0].keys() == {"model"}
    with pytest.raises(InputError, match=r"holds no decoder\.safetensors, only model, optimizer"):
        load_checkpoint(checkpoint_path(tmp_path, 1), stems=["decoder"])


def test_the_snapshot_is_taken_before_save_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), checkpoint._write_checkpoint
    monkeypatch.setattr(checkpoint, "_write_checkpoint", lambda *args: gate.wait() and write(*args))
    weight, meta = torch.ones(3), {"list": [1]}
    saving = save_checkpoint(tmp_path, 1, {"model": {"weight": weight}}, meta, keep=1)
    weight.zero_()
    meta["list"].append(2)
    assert latest_checkpoint(tmp_path) is None
    gate.set()
    saving.join()
    loaded, stored = load_checkpoint(checkpoint_path(tmp_path, 1))
    assert torch.equal(loaded["model"]["weight"], torch.ones(3))
    assert stored["list"] == [1]


def test_keeps_the_last_ones_and_the_best(tmp_path: Path) -> None:
    for step in (0, 10, 20, 30, 40):
        save(tmp_path, step, keep=2, best=10 if step >= 10 else None)
    assert checkpoint_steps(tmp_path) == [10, 30, 40]
    assert best_step(tmp_path) == 10
    save_checkpoint(tmp_path, 45, tensors(45), {}, keep=1, best=10, spare=[30]).join()
    assert checkpoint_steps(tmp_path) == [10, 30, 45]
    save(tmp_path, 50, keep=1, best=50)
    assert checkpoint_steps(tmp_path) == [50]
    assert best_step(tmp_path) == 50
    assert debris(tmp_path) == []


def test_nothing_is_deleted_when_the_new_one_reads_back_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=1)
    fsync_directory = checkpoint._fsync_directory

    def flip(path: Path) -> None:
        """A disk that forgets."""
        fsync_directory(path)
        for file in path.glob("model.safetensors"):
            file.write_bytes(file.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(checkpoint, "_fsync_directory", flip)
    with pytest.raises(Resumable, match="read back wrong"):
        save(tmp_path, 2, keep=1)
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step_0000002/meta.json").write_text("{}")
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)
    save(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 2)
    assert debris(tmp_path) == []


def test_checkpoints_of_an_abandoned_future_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
    drop_checkpoints_after(tmp_path, 1)
    assert checkpoint_steps(tmp_path) == [1]
    assert debris(tmp_path) == []


def damages(path: Path) -> list[tuple[str, int | None, int]]:
    """(file, offset of a flipped bit or None, length of a cut or -1 for a deletion): the files whole, sampled."""
    found: list[tuple[str, int | None, int]] = []
    for name in sorted(os.listdir(path)):
        size = (path / name).stat().st_size
        found += [(name, int(offset), 0) for offset in np.linspace(0, size - 1, 12)]
        found += [(name, None, int(cut)) for cut in np.linspace(0, size - 1, 4)]
        found.append((name, None, -1))
    return found


def test_every_damage_is_found_before_loading_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = checkpoint_path(tmp_path, 2)
    cases = damages(path)
    assert len(cases) == 4 * 17
    for name, flipped, cut in cases:
        content = (path / name).read_bytes()
        if flipped is not None:
            (path / name).write_bytes(content[:flipped] + bytes([content[flipped] ^ 4]) + content[flipped + 1 :])
        elif cut >= 0:
            (path / name).write_bytes(content[:cut])
        else:
            (path / name).unlink()
        caplog.clear()
        assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1), (name, flipped, cut)
        assert "step_0000002 is damaged" in caplog.text
        with pytest.raises(InputError, match=r"step_0000002 is damaged: .*; use another step or delete this one"):
            load_checkpoint(path)
        (path / name).write_bytes(content)
    assert verify_checkpoint(path) is None


def test_a_file_of_another_checkpoint_is_found(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    os.replace(tmp_path / "step_0000001/model.safetensors", tmp_path / "step_0000002/model.safetensors")
    assert latest_checkpoint(tmp_path) is None
    os.rename(tmp_path / "step_0000002", tmp_path / "step_0000009")
    assert "of step 2" in str(verify_checkpoint(tmp_path / "step_0000009"))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "a/b", ""])
def test_a_manifest_cannot_point_outside(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = checkpoint_path(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["meta.json"]
    (path / "manifest.json").write_bytes(checkpoint._json_bytes(manifest))
    assert "no plain file name" in str(verify_checkpoint(path))


def test_links_and_pipes_are_no_checkpoint_files(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = checkpoint_path(tmp_path, 1)
    os.rename(path / "model.safetensors", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path / "model.safetensors")
    assert "not a regular file" in str(verify_checkpoint(path))
    os.unlink(path / "model.safetensors")
    os.mkfifo(path / "model.safetensors")
    assert "not a regular file" in str(verify_checkpoint(path))  # and does not wait for a writer


class FullDisk:
    """os.write that knows how many bytes are left."""

    def __init__(self, left: int, number: int) -> None:
        self.left, self.number, self.real = left, number, os.write

    def __call__(self, descriptor: int, data: memoryview) -> int:
        if self.left == 0:
            raise OSError(self.number, os.strerror(self.number))
        written = self.real(descriptor, data[: self.left])
        self.left -= written
        return written


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("left", [0, 100, 5_000, 20_000, 22_000])
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_resumable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, number: int, background: bool
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(left, number))
        with pytest.raises(Resumable) as caught:
            save(tmp_path, 2, background=background)
    text = str(caught.value)
    assert "\n" not in text
    assert str(checkpoint_path(tmp_path, 2)) in text
    assert os.strerror(number) in text
    assert "bytes" in text
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)
    assert debris(tmp_path) == []
    save(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 2)


@pytest.mark.parametrize("operation", ["mkdir", "open", "fsync", "rename"])
def test_any_failing_operation_is_resumable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    save(tmp_path, 1)

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, refuse)
        with pytest.raises(Resumable, match="Read-only file system"):
            save(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)
    clean_checkpoints(tmp_path)
    assert debris(tmp_path) == []


def test_a_bug_in_the_writer_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_write_checkpoint", lambda *args: 1 // 0)
    saving = save_checkpoint(tmp_path, 1, tensors(), {}, keep=1)
    with pytest.raises(ZeroDivisionError):
        saving.join()
    assert saving.failed


def test_the_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 3))

    def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        net(torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        net[1].bias.grad = None  # has no state of its own
        optimizer.step()

    first, second = model(), model()
    ours, theirs = (optim.adamw(optim.param_groups(net, 0.1), 1e-2) for net in (first, second))
    step(first, ours, 0)
    state = optimizer_tensors(ours)
    assert sorted(state) == [
        f"{n}/{k}" for n in ("0.bias", "0.weight", "1.weight") for k in ("exp_avg", "exp_avg_sq", "step")
    ]
    save_checkpoint(tmp_path, 1, {"model": first.state_dict(), "optimizer": state}, {}, keep=1).join()
    loaded = load_checkpoint(checkpoint_path(tmp_path, 1))[0]
    step(second, theirs, 99)  # whatever was there before is replaced
    second.load_state_dict(loaded["model"])
    load_optimizer_tensors(theirs, loaded["optimizer"])
    for seed in (1, 2, 3):
        step(first, ours, seed)
        step(second, theirs, seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(InputError, match=r"knows a parameter '0\.weight'"):
        load_optimizer_tensors(torch.optim.AdamW([torch.ones(1, requires_grad=True)]), state)


def test_an_optimizer_without_names_goes_by_index() -> None:
    parameters = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimizer = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}], fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {name.split("/")[0] for name in optimizer_tensors(optimizer)} == {"0", "1"}


def test_weights_files_of_others(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    safetensors.torch.save_file({"blocks.0.weight": weight}, tmp_path / "a.safetensors")
    args = argparse.Namespace(arch="vit_small", lr=1e-3)
    torch.save({"teacher": {"module.backbone.weight": weight}, "epoch": 3, "args": args}, tmp_path / "dino.pth")
    torch.save({"weight": weight}, tmp_path / "flat.pt")
    assert torch.equal(read_weights_file(tmp_path / "a.safetensors")["blocks.0.weight"], weight)
    assert torch.equal(read_weights_file(tmp_path / "dino.pth")["teacher.module.backbone.weight"], weight)
    assert read_weights_file(tmp_path / "dino.pth").keys() == {"teacher.module.backbone.weight"}
    assert torch.equal(read_weights_file(tmp_path / "flat.pt")["weight"], weight)


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.safetensors"])
@pytest.mark.parametrize("writer", ["torch", "pickle", "legacy"])
def test_hostile_weights_do_not_run(tmp_path: Path, name: str, writer: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / name
    content = {"weight": torch.ones(1), "payload": Payload(canary)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"payload": Payload(canary)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(InputError, match="no weights that can be read safely") as caught:
        read_weights_file(path)
    assert "\n" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x80\x04.", b"PK\x03\x04", b"\xff" * 100])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_no_weights_at_all(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError):
        read_weights_file(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        read_weights_file(tmp_path / "missing.pth")
