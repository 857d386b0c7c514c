"""`sslvit pretrain`: images without labels become an encoder.

Reads top to bottom: open the data, resolve the recipe, build the module, train, export. DINO (arXiv:2104.14294) and MAE
(arXiv:2111.06377) alone or jointly; what each needs is in `sslvit/objectives/`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sslvit import distributed, memory
from sslvit.config import PretrainConfig, as_dict, check_config, load_config
from sslvit.data.decode import BadFiles, BadImage, decode
from sslvit.data.loader import Loader, measure_range, measure_statistics
from sslvit.data.order import sample
from sslvit.data.sources import Source, open_source
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.weights import LoadedEncoder, init_encoder, load_encoder
from sslvit.errors import InputError
from sslvit.exports.run_encoders import write_run_encoders
from sslvit.metrics import MetricsLog
from sslvit.objectives.cost import cost
from sslvit.objectives.distilled import Teacher, teacher_as_loaded
from sslvit.objectives.explain import explain as explain_recipe
from sslvit.objectives.pretraining import Pretraining, frozen_steps
from sslvit.objectives.recipe import DataFacts, resolve
from sslvit.optim import adamw, param_groups
from sslvit.probes.alarms import Alarms
from sslvit.probes.monitor import HELD_OUT, KnnMonitor
from sslvit.run_folder import RunFolder, default_output_dir
from sslvit.schedules import cosine, linear_warmup
from sslvit.signals import StopFlag
from sslvit.training import train

MOST_MONITORED = 0.03  # of the time; above it the run says so


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
    init = load_encoder(config.init) if config.init else None
    teacher = load_encoder(config.teacher) if config.teacher else None
    size = None if teacher is None else teacher_as_loaded(teacher.module)
    resolved, reasons = resolve(_as_begun(config, folder), facts, None if init is None else init.config, size)
    check_config(resolved)
    folder.write_resolved(resolved, reasons)
    preprocessing = _preprocessing(resolved, source, folder, teacher or init)
    module = build(resolved, preprocessing, init, teacher).to(device)
    if resolved.sharded:
        distributed.shard(module, bf16=resolved.precision == "bf16")
    loader = _loader(resolved, source, bad_files, device, preprocessing)
    optim = resolved.optim
    groups = param_groups(module, optim.weight_decay, _required(optim.layer_decay), encoder_prefix="student.")
    optimizer = adamw(groups, lr=_required(optim.lr), betas=(optim.beta1, _required(optim.beta2)))
    began = time.monotonic()
    monitor = _monitor(resolved, source, preprocessing)
    before = partial(_judge_init, resolved, init, source, device)
    metrics = _metrics(resolved, folder, loader, module, size)
    with StopFlag() as stop, memory.kept(device):
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
            milestone_every=resolved.checkpoint.milestone_every,
            meta={
                "encoder": as_dict(resolved.encoder),
                "preprocessing": as_dict(preprocessing),
                "license": None if init is None else init.license,
            },
            metrics=metrics,
            stop=stop,
            periodic=None if monitor is None else lambda step: _judge(monitor, module, step, before),
            periodic_every=_required(resolved.knn.every),
            best="knn/top1",
            watch=Alarms(resolved),
            prepare=module.prepare if module.needs_whole_batch else None,
            max_drop=_required(resolved.knn.max_drop) if _guarded(resolved) else math.inf,
        )
    if monitor is not None and (share := monitor.seconds / (time.monotonic() - began)) > MOST_MONITORED:
        metrics.say(f"evaluation took {share:.0%} of the time; raise knn.every or lower knn.num_images")
    if distributed.is_main():
        bad_files.collect()
        write_run_encoders(folder.path)
        folder.finish()


def _explained(config: PretrainConfig) -> list[str]:
    """Every value of the recipe for this data on this machine, and why."""
    device = distributed.choose_device(config.device)
    facts = measure_facts(open_source(str(config.data)), device.type, config.encoder.in_chans)
    init = load_encoder(config.init).config if config.init else None
    teacher = teacher_as_loaded(load_encoder(config.teacher).module) if config.teacher else None
    resolved, reasons = resolve(config, facts, init, teacher)
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
        elif own is None and field.name not in ("device", "num_workers", "compile"):
            values[field.name] = other
    return dataclasses.replace(node, **values)


class Schedule:
    """Learning rate and weight decay at each step: warm-up from 0, then cosine (DINO, section 3.2).

    Steps on a frozen encoder come first: warm-up to the heads' own rate, which then lasts until the encoder joins in.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.optim = config.optim
        self.steps = _required(config.steps)
        self.has_teacher = config.dino is not None or config.ibot is not None
        self.frozen = frozen_steps(config)

    def __call__(self, step: int) -> dict[str, float]:
        """{"lr", "weight_decay"} of a step counted from 0, and the teacher's "momentum" for the log."""
        optim = self.optim
        end = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
        values = {"lr": self._lr(step), "weight_decay": cosine(step, self.steps, optim.weight_decay, end)}
        if self.has_teacher:
            values["momentum"] = cosine(step, self.steps, _required(optim.momentum), optim.momentum_end)
        return values

    def _lr(self, step: int) -> float:
        optim, rest = self.optim, self.steps - self.frozen
        if step < self.frozen:
            return linear_warmup(step, 0.0, _required(optim.heads_lr), round(optim.warmup * self.frozen))
        warmup = min(round(optim.warmup * rest), rest - 1)
        return cosine(step - self.frozen, rest, _required(optim.lr), optim.min_lr, warmup_steps=warmup)


def measure_facts(source: Source, device: str, channels: int | None, num_probed: int = 64) -> DataFacts:
    """Look at some images: median shorter side (pixels) and the channels most of them have."""
    if len(source) == 0:
        raise InputError(f"{source.spec}: no images in it; give a folder or file that holds some")
    sides, counts, reasons = [], [], []
    for index in sample(source, num_probed, seed=0).tolist():
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
    compiles = distributed.compiles(device)
    side, labelled = int(statistics.median(sides)), bool(source.labels)
    return DataFacts(len(source), side, wanted, device, native, compiles, labelled)


def _preprocessing(
    config: PretrainConfig, source: Source, folder: RunFolder, given: LoadedEncoder | None
) -> Preprocessing:
    """Mean, std and range: those the weights it starts from expect, else measured once on the images and kept."""
    height, width = config.encoder.size
    channels = _required(config.encoder.in_chans)
    if given is not None and given.preprocessing.channels == channels:
        mean, std, values = given.preprocessing.mean, given.preprocessing.std, given.preprocessing.value_range
    else:
        stored = folder.read_json("statistics.json") if distributed.is_main() else None
        if stored is None and distributed.is_main():
            values = measure_range(source)
            mean, std = measure_statistics(source, channels, value_range=values)
            stored = {"mean": mean, "std": std, "value_range": values}
            folder.write_json("statistics.json", stored)
        stored = distributed.broadcast_object(stored)
        mean, std = tuple(stored["mean"]), tuple(stored["std"])
        values = stored["value_range"] and (tuple(stored["value_range"][0]), tuple(stored["value_range"][1]))
    return Preprocessing(height, mean, std, image_width=None if width == height else width, value_range=values)


def build(
    config: PretrainConfig,
    preprocessing: Preprocessing,
    init: LoadedEncoder | None = None,
    teacher: LoadedEncoder | None = None,
) -> Pretraining:
    """The module at step 0: weights drawn from the seed, or the student taken from `init`."""
    torch.manual_seed(config.seed)
    distilled = None if teacher is None else teacher.module
    if init is None:
        return Pretraining(config, preprocessing, teacher=distilled)
    encoder, report = init_encoder(init, config.encoder)
    if distributed.is_main():
        print(f"init={config.init}: {report}")
    return Pretraining(config, preprocessing, encoder, distilled)


def _loader(
    config: PretrainConfig, source: Source, bad_files: BadFiles, device: torch.device, preprocessing: Preprocessing
) -> Loader:
    ranks = distributed.world_size()
    batch, share = _required(config.batch_size), ranks * config.accumulate
    if batch % share:
        raise InputError(f"batch_size={batch} is not divisible by {ranks} processes x accumulate={config.accumulate}")
    return Loader(
        source,
        crops=config.crops,
        photometry=config.photometry,
        global_size=config.encoder.size,
        channels=_required(config.encoder.in_chans),
        batch_size=batch // share,
        seed=config.seed,
        rank=distributed.rank(),
        world=ranks,
        num_workers=config.num_workers,
        bad_files=bad_files,
        pin_memory=device.type == "cuda",
        value_range=preprocessing.value_range,
    )


def _metrics(
    config: PretrainConfig, folder: RunFolder, loader: Loader, module: Pretraining, teacher: Teacher | None
) -> MetricsLog:
    """The run's log; its utilisation counts the FLOPs of the encoder as it is, also where it came from `init`."""
    sizes = dataclasses.replace(config.encoder, embed_dim=module.student.embed_dim, depth=len(module.student.blocks))
    found = cost(dataclasses.replace(config, init=None, encoder=sizes), teacher)
    return MetricsLog(
        folder.path,
        flops_per_image=None if found is None else found.flops_per_image,
        precision=str(config.precision),
        data_advice=loader.advice,
    )


def _monitor(config: PretrainConfig, source: Source, preprocessing: Preprocessing) -> KnnMonitor | None:
    """k-NN on clean images, if it is wanted; without labels it watches the health of the features alone."""
    if not config.knn.every:
        return None
    train_source = open_source(config.knn.train) if config.knn.train else source
    val_spec = config.knn.val or config.val_data
    val_source = open_source(val_spec) if val_spec else None
    monitor = KnnMonitor(
        train_source,
        val_source,
        preprocessing,
        num_images=_required(config.knn.num_images),
        hold_out=_guarded(config),
        num_workers=config.num_workers,
    )
    if config.init is not None and _guarded(config) and not monitor.labels and distributed.is_main():
        print(
            "no labels to watch: the run cannot notice that init forgets; give val_data, or knn.train and knn.val, or "
            f"data with labels for {2 * HELD_OUT} images and more"
        )
    return monitor


def _guarded(config: PretrainConfig) -> bool:
    """Whether the run stops when k-NN falls."""
    return config.knn.max_drop not in (None, 1.0)


def _judge(
    monitor: KnnMonitor, module: Pretraining, step: int, before: Callable[[KnnMonitor], dict[str, float]]
) -> dict[str, float]:
    """Numbers of the encoder at a step; at the first one also of `before`."""
    with distributed.whole(module):
        values = monitor(module.judged, step)
    if step == 0:
        values |= before(monitor)
    return {**values, "monitor_s": round(monitor.seconds, 3)}


def _judge_init(
    config: PretrainConfig, init: LoadedEncoder | None, source: Source, device: torch.device, monitor: KnnMonitor
) -> dict[str, float]:
    """{"knn/init/top1"}: k-NN of the encoder the run begins with, as it was, on the images of the monitor.

    Where the run sees another size or other patches: resizing costs accuracy, and step 0 comes after it. Else {}.
    """
    if init is None or not monitor.labels or not _guarded(config):
        return {}
    own, encoder = init.config, config.encoder
    if (own.size, own.patch_size) == (encoder.size, encoder.patch_size) or own.in_chans != encoder.in_chans:
        return {}
    height, width = own.size
    sized = dataclasses.replace(
        monitor.preprocessing, image_size=height, image_width=None if width == height else width
    )
    same = _required(_monitor(config, source, sized))
    values = same(init.module.to(device), 0)
    init.module.cpu()
    monitor.seconds += same.seconds
    return {"knn/init/top1": values["knn/top1"]} if "knn/top1" in values else {}


def _required(value: Any) -> Any:
    assert value is not None and not (isinstance(value, float) and math.isnan(value))
    return value
