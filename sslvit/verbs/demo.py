"""`sslvit demo`: the whole story on built-in scenes, offline: images, encoder, numbers, exports, a model that answers.

Every step is a verb with the settings of a shipped config; the folder holds all of them. The same command goes on where
it was stopped.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sslvit.data.pairs import open_pairs
from sslvit.data.scenes import Scenes
from sslvit.probes.rows import Row
from sslvit.run_folder import RunFolder
from sslvit.verbs.align import align
from sslvit.verbs.ask import ask
from sslvit.verbs.evaluate import evaluate
from sslvit.verbs.pretrain import pretrain
from sslvit.verbs.report import report

IMAGES = "scenes:?n=20000&size=48&clutter=0.3&scale=1.2&objects=1-2"
PAIRS = "scenes:?n=20000&size=48&clutter=0.3&scale=1.2&objects=1-2&seed=1"
QUESTIONS = "scenes:?n=1000&size=48&clutter=0.3&scale=1.2&objects=1-2&split=val"
SINGLE_TRAIN = "scenes:?n=4000&size=48&clutter=0.3&scale=1.2&seed=2&objects=1"
SINGLE_VAL = "scenes:?n=2000&size=48&clutter=0.3&scale=1.2&seed=2&objects=1&split=val"
ENCODER = "pretrain/scenes"
MODEL = "align/scenes"
FROZEN = {"encoder_lr": 0.0, "steps": 1000}
LINEAR_STEPS = 1500
NUM_SHOWN = 6


@dataclass
class DemoConfig:
    """The demo has no settings: it is the same story everywhere."""

    images: str = IMAGES
    pairs: str = PAIRS


def demo(*, output_dir: str | Path | None = None) -> Path:
    """Run the whole story into `output_dir` (runs/demo); returns it. Raises Resumable when stopped by a signal."""
    out = Path(output_dir or "runs/demo")
    began = time.monotonic()
    with RunFolder.open(out, "demo", DemoConfig()) as folder:
        if folder.finished:
            print(f"{out}: finished already; delete the folder to start over")
            if not (out / "report.html").exists():
                report(out)
            return out
        _chapter("1. pretrain: 20,000 images without labels become an encoder")
        pretrain(config_file=ENCODER, output_dir=out, data=IMAGES, knn={"train": SINGLE_TRAIN, "val": SINGLE_VAL})
        _chapter("2. evaluate: what did it learn, beside a random encoder and raw pixels?")
        evaluate(
            encoder=str(out),
            train_dataset=SINGLE_TRAIN,
            val_dataset=SINGLE_VAL,
            protocol=["knn", "linear"],
            linear_steps=LINEAR_STEPS,
            output_dir=out,
        )
        _chapter("3. align: encoder and text become a vision-language model, beside its controls")
        align(config_file=MODEL, output_dir=out, encoder=str(out), data=PAIRS, val_data=QUESTIONS)
        _chapter("4. align again with the encoder frozen, pretrained beside random")
        folder.add_results(_frozen(out))
        _chapter("5. ask")
        _ask(out)
        folder.finish()
        page = report(out)
    _chapter(f"done in {(time.monotonic() - began) / 60:.1f} minutes")
    print(f"numbers        {out / 'results.json'}")
    print(f"report         {page}")
    print(f"encoder        {out / 'encoder'} (timm, AutoModel), {out / 'encoder_hf'} (transformers)")
    print(f"answers        sslvit ask {out} --image IMAGE --question QUESTION    or    sslvit serve {out}")
    return out


def _chapter(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _frozen(out: Path) -> list[Row]:
    """The same recipe with the encoder held still; its rows under `vlm/frozen/`."""
    frozen = align(
        config_file=MODEL,
        output_dir=out / "controls" / "frozen",
        encoder=str(out / "encoder"),
        data=PAIRS,
        val_data=QUESTIONS,
        instruct=FROZEN,
        controls=["random_encoder"],
    )
    rows: list[Row] = json.loads((frozen / "results.json").read_text())
    return [
        {**row, "name": row["name"].replace("vlm/", "vlm/frozen/", 1)} for row in rows if row["name"].startswith("vlm/")
    ]


def _ask(out: Path) -> None:
    """A few questions about scenes nobody trained on, through the exported folder; kept in OUT/asked/."""
    pairs = open_pairs(QUESTIONS)
    source = Scenes.from_spec(QUESTIONS)
    folder = out / "asked"
    folder.mkdir(exist_ok=True)
    rows = []
    for index in range(NUM_SHOWN):
        place = folder / f"scene{index}.png"
        Image.fromarray(source.read(index)).save(place)
        questions = [turn for turn in pairs.turns(index) if turn.family != "caption"]
        turn = questions[index % len(questions)]
        rows.append({"image": place.name, "question": turn.question, "answer": turn.answer})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask(out / "vlm", jsonl=folder / "questions.jsonl", output_file=folder / "answers.jsonl")
    for row in map(json.loads, (folder / "answers.jsonl").read_text().splitlines()):
        print(f"{row['image']}: {row['question']}  {row['prediction']}   (truth: {row['answer']})")
