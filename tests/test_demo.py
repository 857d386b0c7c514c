"""The demo, small: every file it promises, and the same weights however often it is killed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = """
import sys
import sslvit.verbs.demo as demo
demo.IMAGES = "scenes:?n=64&size=48"
demo.PAIRS = "scenes:?n=64&size=48&seed=1"
demo.QUESTIONS = "scenes:?n=16&size=48&split=val"
demo.SINGLE_TRAIN = "scenes:?n=48&size=48&objects=1"
demo.SINGLE_VAL = "scenes:?n=24&size=48&objects=1&split=val"
demo.ENCODER, demo.MODEL, demo.LINEAR_STEPS = "pretrain/tiny_cpu", "align/tiny_cpu", 20
demo.FROZEN = {"encoder_lr": 0.0, "steps": 20}
demo.demo(output_dir=sys.argv[1])
"""

#: What exists when a stage is in its middle: pretraining, evaluation, each stage of the model and of its controls.
MOMENTS = [
    "checkpoints/step_0000050",
    "evaluate/cells/*",
    "stages/text/checkpoints/step_0000016",
    "stages/connector/checkpoints/step_0000008",
    "stages/instruct/checkpoints/step_0000012",
    "controls/random_encoder/stages/instruct/checkpoints/step_*",  # trained beside the model, a little behind it
    "controls/blind/stages/instruct/checkpoints/step_0000024",
    "controls/frozen/stages/connector/checkpoints/step_0000008",
    "asked/questions.jsonl",
]


def start(out: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    with open(errors_of(out), "w") as errors:
        words = [sys.executable, "-c", SMALL, str(out)]
        return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def errors_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.stderr")


def finish(out: Path) -> None:
    process = start(out)
    assert process.wait(timeout=900) == 0, errors_of(out).read_text()[-2000:]


def digests(out: Path) -> dict[str, str]:
    files = ["encoder/model.safetensors", "encoder_hf/model.safetensors", "vlm/model.safetensors"]
    files += ["controls/random_encoder/vlm/model.safetensors", "controls/frozen/vlm/model.safetensors"]
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "whole"
    finish(out)
    return out


@pytest.mark.slow
def test_it_leaves_what_is_promised(whole):
    rows = {row["name"] for row in json.loads((whole / "results.json").read_text())}
    assert {"knn/top1", "knn/shape/top1", "linear/top1", "knn/random_init/top1", "linear/pixels/top1"} <= rows
    for control in ("", "blind/", "shuffled/", "random_encoder/", "frozen/", "frozen/random_encoder/"):
        assert f"vlm/{control}accuracy" in rows, control
    assert {"vlm/image_gain_nats", "caption/cider", "caption/bleu4"} <= rows
    for name in ("report.html", "finished.json", "encoder/config.json", "encoder_hf/config.json", "vlm/config.json"):
        assert (whole / name).exists(), name
    answers = [json.loads(line) for line in (whole / "asked" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 6
    assert all("prediction" in row for row in answers)
    page = (whole / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (whole / "report.html").stat().st_size < 5e6


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_with_the_same_weights(whole, tmp_path):
    out = tmp_path / "killed"
    for moment in MOMENTS:
        process = start(out)
        deadline = time.monotonic() + 300
        while not list(out.glob(moment)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert list(out.glob(moment)), f"{moment} never came: {errors_of(out).read_text()[-1500:]}"
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish(out)
    assert digests(out) == digests(whole)
