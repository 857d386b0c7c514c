"""`sslvit pretrain`: images without labels become an encoder.

Reads top to bottom: open the data, resolve the recipe, build the module, train, export. DINO (arXiv:2104.14294) and MAE
(arXiv:2111.06377) alone or jointly; what each needs is in `sslvit/objectives/`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from sslvit import distributed
from sslvit.config import PretrainConfig, as_dict, check_config, load_config
from sslvit.data.decode import BadFiles, BadImage, decode
from sslvit.data.loader import Loader, measure_statistics
from sslvit.data.sources import Source, open_source
from sslvit.encoder.config import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from sslvit.encoder.weights import init_encoder
from sslvit.errors import InputError
from sslvit.exports.run_encoders import write_run_encoders
from sslvit.metrics import MetricsLog
from sslvit.objectives.explain import explain as explain_recipe
from sslvit.objectives.pretraining import Pretraining
from sslvit.objectives.recipe import DataFacts, resolve
from sslvit.optim import adamw, param_groups
from sslvit.probes.monitor import KnnMonitor
from sslvit.run_folder import RunFolder, default_output_dir
from sslvit.schedules import cosine
from sslvit.signals import StopFlag
from sslvit.training import train


def pretrain(
    *, config_file: str | None = None, output_dir: str | Path | None = None, explain: bool = False, **keys: Any
) -> Path:
    """Train an encoder on images; returns the run folder. Keys as on the command line, sections as dicts.

    With `explain` every value of the recipe is printed with its reason, and nothing is trained or written.
    Raises InputError for anything wrong with the input, Resumable when stopped by a signal or a full disk.
    """
    config = load_config(PretrainConfig, config_file, keys, default="pretrain/auto")
    check_config(config)
    if config.data is None:
        raise InputError("no images given; add data=SPEC, for example data=/my/images")
    path = Path(output_dir or default_output_dir("pretrain", config_file, config.data))
    if explain:
        print("\n".join(_explained(config)))
        return path
    with RunFolder.open(path, "pretrain", config, overwrite=config.overwrite) as folder:
        if folder.finished:
            print(f"{path}: finished already; overwrite=true starts over")
            return path
        with distributed.joined(config.device) as device:
            _run(config, folder, device)
    return path


def _run(config: PretrainConfig, folder: RunFolder, device: torch.device) -> None:
    source = open_source(str(config.data))
    bad_files = BadFiles(folder.path / "bad_files.jsonl", max_bad_rate=config.max_bad_rate)
    facts = measure_facts(source, device.type, config.encoder.in_chans)
    resolved, reasons = resolve(_as_begun(config, folder), facts)
    check_config(resolved)
    folder.write_resolved(resolved, reasons)
    preprocessing = _preprocessing(resolved, source, folder)
    module = build(resolved, preprocessing).to(device)
    if resolved.sharded:
        distributed.shard(module, bf16=resolved.precision == "bf16")
    loader = _loader(resolved, source, bad_files, device)
    optim = resolved.optim
    groups = param_groups(module, optim.weight_decay, layer_decay=optim.layer_decay, encoder_prefix="student.")
    optimizer = adamw(groups, lr=_required(optim.lr), betas=(optim.beta1, _required(optim.beta2)))
    monitor = _monitor(resolved, source, preprocessing)
    with StopFlag() as stop:
        train(
            module,
            loader,
            optimizer=optimizer,
            schedule=Schedule(resolved),
            steps=_required(resolved.steps),
            accumulate=resolved.accumulate,
            clip_norm=optim.clip_norm,
            precision=str(resolved.precision),
            device=device,
            seed=resolved.seed,
            folder=folder.path,
            checkpoint_every=_required(resolved.checkpoint.every),
            keep=resolved.checkpoint.keep,
            meta={"encoder": as_dict(resolved.encoder), "preprocessing": as_dict(preprocessing)},
            metrics=MetricsLog(folder.path),
            stop=stop,
            periodic=None if monitor is None else lambda step: _judge(monitor, module, step),
            periodic_every=_required(resolved.knn.every),
            best="knn/top1",
        )
    if distributed.is_main():
        bad_files.collect()
        write_run_encoders(folder.path)
        folder.finish()


def _explained(config: PretrainConfig) -> list[str]:
    """Every value of the recipe for this data on this machine, and why."""
    device = distributed.choose_device(config.device)
    resolved, reasons = resolve(
        config, measure_facts(open_source(str(config.data)), device.type, config.encoder.in_chans)
    )
    check_config(resolved)
    return explain_recipe(config, resolved, reasons)


def _as_begun(config: PretrainConfig, folder: RunFolder) -> PretrainConfig:
    """What was auto when the run began keeps its value: another device or a few more images must not change it."""
    begun = folder.record / "resolved.yaml"
    if not begun.exists() or not (folder.path / "checkpoints").exists():
        return config
    return _filled(config, load_config(PretrainConfig, begun, {}))


def _filled(node: Any, source: Any) -> Any:
    """A copy of the dataclass `node` in which every `None` has the value it has in `source`."""
    values = {}
    for field in dataclasses.fields(node):
        own, other = getattr(node, field.name), getattr(source, field.name)
        if dataclasses.is_dataclass(own) and other is not None:
            values[field.name] = _filled(own, other)
        elif own is None and field.name not in ("device", "num_workers"):
            values[field.name] = other
    return dataclasses.replace(node, **values)


class Schedule:
    """Learning rate and weight decay at each step: warm-up from 0, then cosine (DINO, section 3.2)."""

    def __init__(self, config: PretrainConfig) -> None:
        self.optim = config.optim
        self.steps = _required(config.steps)

    def __call__(self, step: int) -> dict[str, float]:
        """{"lr", "weight_decay"} of a step counted from 0."""
        optim = self.optim
        warmup = min(round(optim.warmup * self.steps), self.steps - 1)
        end = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
        return {
            "lr": cosine(step, self.steps, _required(optim.lr), optim.min_lr, warmup_steps=warmup),
            "weight_decay": cosine(step, self.steps, optim.weight_decay, end),
        }


def measure_facts(source: Source, device: str, channels: int | None, num_probed: int = 64) -> DataFacts:
    """Look at evenly spaced images: median shorter side (pixels) and the channels most of them have."""
    if len(source) == 0:
        raise InputError(f"{source.spec}: no images in it; give a folder or file that holds some")
    sides, counts, reasons = [], [], []
    for index in range(0, len(source), max(1, len(source) // num_probed)):
        try:
            image = decode(source.read(index), channels=None)
        except BadImage as bad:
            reasons.append(str(bad))
            continue
        sides.append(min(image.shape[:2]))
        counts.append(image.shape[2])
    if not sides:
        raise InputError(
            f"{source.spec}: none of {len(reasons)} images looked at can be read ({reasons[0]}); run check-data"
        )
    wanted, native = channels or statistics.mode(counts), distributed.native_bf16(device)
    return DataFacts(len(source), int(statistics.median(sides)), wanted, device, native)


def _preprocessing(config: PretrainConfig, source: Source, folder: RunFolder) -> Preprocessing:
    """Mean and std: ImageNet's for RGB, as every released encoder; else measured once and kept for resume."""
    size = _required(config.encoder.image_size)
    if config.encoder.in_chans == 3:
        return Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD)
    stored = folder.read_json("statistics.json")
    if stored is None:
        mean, std = measure_statistics(source, _required(config.encoder.in_chans))
        stored = {"mean": list(mean), "std": list(std)}
        folder.write_json("statistics.json", stored)
    return Preprocessing(size, tuple(stored["mean"]), tuple(stored["std"]))


def build(config: PretrainConfig, preprocessing: Preprocessing) -> Pretraining:
    """The module at step 0: weights drawn from the seed, or the student taken from `init`."""
    torch.manual_seed(config.seed)
    if config.init is None:
        return Pretraining(config, preprocessing)
    encoder, report = init_encoder(config.init, config.encoder)
    print(f"init={config.init}: {report}")
    return Pretraining(config, preprocessing, encoder)


def _loader(config: PretrainConfig, source: Source, bad_files: BadFiles, device: torch.device) -> Loader:
    ranks = distributed.world_size()
    batch, share = _required(config.batch_size), ranks * config.accumulate
    if batch % share:
        raise InputError(f"batch_size={batch} is not divisible by {ranks} processes x accumulate={config.accumulate}")
    return Loader(
        source,
        crops=config.crops,
        photometry=config.photometry,
        global_size=_required(config.encoder.image_size),
        channels=_required(config.encoder.in_chans),
        batch_size=batch // share,
        seed=config.seed,
        rank=distributed.rank(),
        world=ranks,
        num_workers=config.num_workers,
        bad_files=bad_files,
        pin_memory=device.type == "cuda",
    )


def _monitor(config: PretrainConfig, source: Source, preprocessing: Preprocessing) -> KnnMonitor | None:
    """k-NN on clean images, if it is wanted; without labels it watches the health of the features alone."""
    if not config.knn.every:
        return None
    train_source = open_source(config.knn.train) if config.knn.train else source
    val_spec = config.knn.val or config.val_data
    val_source = open_source(val_spec) if val_spec else None
    return KnnMonitor(
        train_source,
        val_source,
        preprocessing,
        num_images=config.knn.num_images,
        num_workers=config.num_workers,
    )


def _judge(monitor: KnnMonitor, module: Pretraining, step: int) -> dict[str, float]:
    with distributed.whole(module):
        return monitor(module.judged, step)


def _required(value: Any) -> Any:
    assert value is not None and not (isinstance(value, float) and math.isnan(value))
    return value
