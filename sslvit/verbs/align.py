"""`sslvit align`: an encoder and images with text become a vision-language model, and a table says whether it sees.

Reads top to bottom: open pairs and encoder, train the language model on their words (text), then the connector
(connector), then both on questions and captions (instruct); write the Hugging Face folder; put the validation questions
to the model, to a blind one, to the model over wrong images, and to the same recipe over a random encoder.
LLaVA-1.5, arXiv:2310.03744. Parts and stages are in `sslvit/vlm/`.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sslvit import distributed
from sslvit.config import AlignConfig, check_config, load_config
from sslvit.data.decode import BadFiles
from sslvit.data.pairs import Pairs, open_pairs, split_by_image, text_corpus
from sslvit.encoder.weights import LoadedEncoder, load_encoder, random_like
from sslvit.exports.files import write_json
from sslvit.exports.hf_folder import hf_state
from sslvit.exports.licence import licence_of
from sslvit.exports.llava_folder import Writing, check_llava, write_llava_folder
from sslvit.exports.vlm_card import vlm_card
from sslvit.metrics import MetricsLog
from sslvit.run_folder import RunFolder, default_output_dir, write_atomically
from sslvit.signals import StopFlag
from sslvit.verbs.beside import CONTROL, control_beside, die_with, half_the_threads, runs_beside
from sslvit.vlm.batches import PairImages
from sslvit.vlm.chat import Chat
from sslvit.vlm.connectors import MlpConnector
from sslvit.vlm.folder import compare_with_folder
from sslvit.vlm.language import (
    Language,
    bundled_language,
    given_language,
    kept_tokenizer,
    language_tensors,
    merged,
)
from sslvit.vlm.model import VisionLanguage
from sslvit.vlm.recipe import STAGES, check, resolve
from sslvit.vlm.sees import (
    Answers,
    Exam,
    alarms,
    gain_row,
    others_images,
    prediction_lines,
    pretraining_rows,
    rows_of,
    set_exam,
    sit,
    table,
)
from sslvit.vlm.stages import Runtime, run_stage

CORPUS = 50_000  # texts the tokenizer is trained on
CONTROL_SEED = 1000  # added to the seed for the random encoder


def align(*, config_file: str | Path | None = None, output_dir: str | Path | None = None, **keys: Any) -> Path:
    """Train a vision-language model over an encoder; returns the run folder, whose `vlm/` transformers opens.

    Keys as on the command line, sections as dicts. Raises InputError for anything wrong with the input, Resumable when
    stopped by a signal or a full disk.
    """
    if isinstance(keys.get("controls"), str):
        keys["controls"] = [name.strip() for name in keys["controls"].split(",") if name.strip()]
    config = load_config(AlignConfig, config_file, keys)
    check_config(config)
    check(config)
    path = Path(output_dir or default_output_dir("align", config_file, config.encoder, config.data))
    with (
        distributed.joined(config.device) as device,
        RunFolder.open(path, "align", config, overwrite=config.overwrite) as folder,
    ):
        if folder.finished:
            print(f"{path}: finished already; overwrite=true starts over")
        else:
            _run(config, folder, device)
    return path


@dataclass
class Workshop:
    """What all models of one run share: resolved settings, pairs to learn from, folder, and how steps are run."""

    config: AlignConfig
    pairs: Pairs
    path: Path
    runtime: Runtime
    bad_files: BadFiles

    def images(self, encoder: LoadedEncoder, pairs: Pairs | None = None) -> PairImages:
        """Images of the pairs (those to learn from, if none are named) as this encoder wants them."""
        chosen = self.pairs if pairs is None else pairs
        return PairImages(chosen, encoder.preprocessing, self.bad_files, self.config.num_workers)

    def runtime_in(self, path: Path) -> Runtime:
        """How steps are run for the model of `path`: a control keeps its own metrics."""
        return self.runtime if path == self.path else replace(self.runtime, metrics=MetricsLog(path))

    def language(self) -> Language:
        """The given language model, or the bundled one with a tokenizer of the pairs' own words; as before training."""
        config = self.config
        if config.lm is not None:
            return given_language(config.lm, config.lora, config.seed)
        tokenizer = kept_tokenizer(
            self.path / "stages" / "tokenizer.json", lambda: text_corpus(self.pairs, CORPUS), config.language.vocab_size
        )
        return bundled_language(tokenizer, config.language, config.seed)


def _run(config: AlignConfig, folder: RunFolder, device: torch.device) -> None:
    pairs, val = _open_data(config)
    encoder = load_encoder(str(config.encoder))
    check_llava(encoder)
    resolved, reasons = resolve(config, len(pairs))
    folder.write_resolved(resolved, reasons)
    bad_files = BadFiles(folder.path / "bad_files.jsonl", max_bad_rate=config.max_bad_rate)
    with StopFlag() as stop:
        shop = Workshop(resolved, pairs, folder.path, _runtime(resolved, device, stop, folder.path), bad_files)
        train_text(shop, shop.images(encoder))
        with control_beside(folder.path, folder.record / "config.yaml", runs_beside(resolved, device), stop):
            seeing, chat = train_seeing(shop, encoder, folder.path)
        write_vlm(shop, encoder, seeing, chat, folder.path / "vlm")
        does_it_see(shop, encoder, seeing, chat, val, folder)
        write_card(shop, encoder, folder.path / "vlm")
    if distributed.is_main():
        bad_files.collect()
        folder.finish()


def _runtime(config: AlignConfig, device: torch.device, stop: StopFlag, path: Path) -> Runtime:
    """Of a resolved config; metrics go to `path`."""
    precision, checkpoint = str(config.precision), config.checkpoint
    every, keep, milestone_every = checkpoint.every, checkpoint.keep, checkpoint.milestone_every
    return Runtime(device, precision, config.seed, every, keep, stop, MetricsLog(path), milestone_every)


def train_control(path: str, config_file: str, parent: int) -> None:
    """In a process of its own: checkpoints of the random-encoder control of the run in `path`, which `parent` holds."""
    die_with(parent)
    run, control = Path(path), Path(path) / "controls" / CONTROL
    config = load_config(AlignConfig, config_file, {})
    pairs, _ = _open_data(config)
    encoder = load_encoder(str(config.encoder))
    resolved, _ = resolve(config, len(pairs))
    bad_files = BadFiles(control / "bad_files.jsonl", max_bad_rate=config.max_bad_rate)
    with StopFlag() as stop:
        runtime = _runtime(resolved, torch.device("cpu"), stop, control)
        shop = Workshop(resolved, pairs, run, runtime, bad_files)
        train_seeing(shop, random_like(encoder, config.seed + CONTROL_SEED), control)


def _open_data(config: AlignConfig) -> tuple[Pairs, Pairs]:
    """Pairs to learn from and pairs to be asked about; no image is in both."""
    pairs = open_pairs(str(config.data))
    if config.val_data is not None:
        return pairs, open_pairs(config.val_data)
    return split_by_image(pairs, config.val_fraction, config.seed)


def train_text(shop: Workshop, images: PairImages) -> tuple[VisionLanguage, Chat]:
    """Stage text: the language model alone, on every word of the pairs. All models of a run begin with it."""
    language = shop.language()
    model = VisionLanguage(None, None, language.lm, language.chat.before_image())
    run_stage("text", shop.config.text, model, images, language.chat, shop.path / "stages" / "text", shop.runtime)
    return model, language.chat


def train_seeing(shop: Workshop, encoder: LoadedEncoder, path: Path) -> tuple[VisionLanguage, Chat]:
    """All three stages over an encoder, with checkpoints in `path`/stages; what is finished is only loaded."""
    images = shop.images(encoder)
    text, chat = train_text(shop, images)
    connector = MlpConnector(encoder.module.num_features, text.lm.config.hidden_size, shop.config.seed)
    model = VisionLanguage(copy.deepcopy(encoder.module), connector, text.lm, text.before)
    for name in ("connector", "instruct"):
        run_stage(name, getattr(shop.config, name), model, images, chat, path / "stages" / name, shop.runtime_in(path))
    model.lm = merged(model.lm)
    return model, chat


def train_blind(shop: Workshop, encoder: LoadedEncoder, path: Path) -> tuple[VisionLanguage, Chat]:
    """The language model on the same turns for as many steps, without any image: what words alone give away."""
    images = shop.images(encoder)
    model, chat = train_text(shop, images)
    run_stage(
        "instruct", shop.config.instruct, model, images, chat, path / "stages" / "instruct", shop.runtime_in(path)
    )
    model.lm = merged(model.lm)
    return model, chat


def write_vlm(shop: Workshop, encoder: LoadedEncoder, model: VisionLanguage, chat: Chat, path: Path) -> None:
    """The Hugging Face folder, replaced as a whole, and checked: transformers must compute what was trained."""
    if not distributed.is_main():
        return
    assert model.encoder is not None and model.connector is not None
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_llava_folder(
            partial,
            vision=hf_state(model.encoder),
            connector=model.connector.state_dict(),
            language=(model.lm.config.to_dict(), language_tensors(model.lm)),
            writing=Writing(chat.tokenizer, chat.template(), chat.image_id, chat.end_id, chat.pad_id),
            preprocessing=encoder.preprocessing,
        )
        checked = compare_with_folder(model, chat, partial, shop.images(encoder))
        write_json(partial / "verification.json", {"format": "llava", "checks": [checked]})
        write_card(shop, encoder, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    found = ", ".join(f"{difference:.1e} ({what})" for what, difference in checked["max_difference"].items())
    print(f"{path}: transformers opens it; largest differences {found}")


def write_card(shop: Workshop, encoder: LoadedEncoder, vlm: Path) -> None:
    """README.md of the VLM folder, with the numbers that are known by now."""
    if not distributed.is_main():
        return
    config = shop.config
    lm = config.lm or f"trained from scratch ({config.language.num_layers} layers of {config.language.hidden_size})"
    stages = {name: getattr(config, name) for name in STAGES}
    made_of = {
        "Encoder": encoder.source,
        "Encoder it started from (SHA-256)": encoder.fingerprint,
        "Language model": lm,
        "Pairs": config.data,
        "Steps": ", ".join(f"{name} {stage.steps}" for name, stage in stages.items()),
    }
    licenses = {
        "Encoder": encoder.license or licence_of(encoder.source),
        "Language model": licence_of(config.lm) if config.lm else None,
    }
    known = {}
    for name, file in (("environment", "env.json"), ("results", "results.json")):
        if vlm.parent == shop.path and (shop.path / file).is_file():  # a control has no numbers of its own
            known[name] = json.loads((shop.path / file).read_text(encoding="utf-8"))
    (checked,) = json.loads((vlm / "verification.json").read_text(encoding="utf-8"))["checks"]
    write_atomically(vlm / "README.md", vlm_card(made_of, licenses, checked, **known))


def does_it_see(
    shop: Workshop, encoder: LoadedEncoder, seeing: VisionLanguage, chat: Chat, val: Pairs, folder: RunFolder
) -> None:
    """The same questions to the model and to its controls: rows, predictions and the table."""
    config, device, path = shop.config, shop.runtime.device, folder.path
    exam = set_exam(shop.images(encoder, val), config.num_val_images, config.seed)
    answers = {"": sit(seeing, exam, chat, device)}
    if "shuffled" in config.controls:
        answers["shuffled"] = sit(seeing, exam, chat, device, shown=others_images(len(exam.numbers), config.seed))
    if "blind" in config.controls:
        blind, chat = train_blind(shop, encoder, path / "controls" / "blind")
        answers["blind"] = sit(blind, exam, chat, device)
    if CONTROL in config.controls:
        control = random_like(encoder, config.seed + CONTROL_SEED)
        with half_the_threads(runs_beside(config, device)):
            other, chat = train_seeing(shop, control, path / "controls" / CONTROL)
        write_vlm(shop, control, other, chat, path / "controls" / CONTROL / "vlm")
        answers[CONTROL] = sit(other, exam, chat, device)
    record(exam, answers, config, folder)


def record(exam: Exam, answers: dict[str, Answers], config: AlignConfig, folder: RunFolder) -> None:
    """results.json, predictions.jsonl and the printed table."""
    spec, seed, step = str(config.val_data or config.data), config.seed, int(config.instruct.steps or 0)
    rows = [row for name in answers for row in rows_of(exam, answers[name], name, spec, seed, step)]
    if "blind" in answers:
        rows.append(gain_row(exam, answers[""], answers["blind"], spec, seed, step))
    if CONTROL in answers:
        rows += pretraining_rows(exam, answers[""], answers[CONTROL], spec, seed, step)
    if not distributed.is_main():
        return
    folder.add_results(rows)
    lines = [json.dumps(line, ensure_ascii=False) for line in prediction_lines(exam, answers)]
    write_atomically(folder.path / "predictions.jsonl", "\n".join(lines) + "\n")
    text = table(rows, exam.families(), [name for name in answers if name])
    write_atomically(folder.path / "does_it_see.txt", text + "\n")
    print(text)
    for warning in alarms(rows):
        print(f"warning: {warning}")
