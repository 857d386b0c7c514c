"""The `auto` recipe: every `None` of a pretraining config resolved from the data, with the reason. Imports no torch.

Published rules where there are any; each rule names its source. Nothing given by the user is changed.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from sslvit.config import PretrainConfig
from sslvit.data.config import DINO_PHOTOMETRY, NO_PHOTOMETRY, PhotometryConfig
from sslvit.encoder.config import EncoderConfig
from sslvit.errors import InputError
from sslvit.objectives.cost import clean_flops, cost
from sslvit.objectives.distilled import Teacher
from sslvit.schedules import momentum_from_half_life

LONG_RUN = 50_000  # steps
# Images seen. Below it MAE carries and distillation has to be cheap to earn its cost; above it DINO leads on small sets
# (solo-learn, stable-pretraining). Where the order turns is a judgement until benchmarks/budgets.py has been run: joint
# forms and single objectives at several budgets on three sets. benchmarks/equal_minutes.py is one budget on one set.
SMALL_BUDGET = 1_000_000
# Images in which half of the teacher is replaced: DINO's .996 at batch 512. Larger batches are published with more: the
# same .996 at 1024 (DINO's ViT-B, iBOT) is twice as many, and so is DINOv2's .992 at 2048.
HALF_LIFE, HALF_LIFE_BATCH, MOST_HALF_LIVES = 88_700, 512, 2
# Steps: lightly-train's least momentum, .99. A teacher that follows in a few steps agrees with the student on nothing:
# with DINO alone on pretrain/tiny_cpu at a half-life of 3, targets fell on one prototype or became uniform within 60
# steps, at teacher temperatures .02 and .04 and centre momenta of .9 down to 0; at 69 (centre .5 and .9) neither.
LEAST_HALF_LIFE = 69
# The centre begins at 0 and needs some half-lives (6.6 steps at DINO's .9) to come to where the targets are. Until then
# all of them lean towards the same prototypes, which the student learns: in a joint run of 30 steps on Fashion-MNIST
# every target fell on one prototype. DINO's ablation of the centre finds momenta from 0 to .99 alike.
CENTER_SHARE = 100
# lightly-train's published table for DINO: prototypes by number of images.
_PROTOTYPES = ((20_000, 1024), (50_000, 2048), (100_000, 4096), (200_000, 16384), (500_000, 32768))
_WIDTH = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "giant": 1536}
_DECODER = ((256, 128, 2, 4), (512, 256, 4, 8), (math.inf, 512, 8, 16))  # up to this width: dim, depth, heads
# The monitor: at most 3% of a run's time. Encoding clean images may take MONITOR_SHARE of the run's FLOPs and decoding
# them, once, that of DECODED_SHARE of the images seen; comparing them is little beside both.
MONITOR_SHARE = 0.02
DECODED_SHARE = 0.025
EVALUATIONS = (3, 11)  # with those of step 0 and of the end
EVALUATE_EVERY = 50  # steps at least
MONITORED = (100, 1000, 5000)  # images of each set: never fewer, fewer evaluations rather than fewer, never more


STRENGTHS = ("brightness", "contrast", "saturation", "hue")  # of photometry's jitter


@dataclass(frozen=True)
class DataFacts:
    """What was seen of the data before the run: images, median shorter side in pixels, channels, and the device."""

    num_images: int
    side: int
    channels: int
    device: str  # "cpu" | "cuda"
    native_bf16: bool = True  # whether the device computes bf16 itself
    compiles: bool = False  # whether torch.compile works on the device and pays there
    labelled: bool = False


class _Resolver:
    """Fills `None` fields and remembers why."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.reasons: dict[str, str] = {}

    def fill(self, key: str, value: Any, reason: str) -> None:
        """Set a dotted key unless the user did."""
        *sections, name = key.split(".")
        node: Any = self.config
        for section in sections:
            node = getattr(node, section)
        if getattr(node, name) is None:
            setattr(node, name, value)
            self.reasons[key] = f"{value}: {reason}"


def resolve(
    config: PretrainConfig, facts: DataFacts, init: EncoderConfig | None = None, teacher: Teacher | None = None
) -> tuple[PretrainConfig, dict[str, str]]:
    """The config with no `None` left where a number is needed, and for each filled key its value and reason.

    `init` is what the encoder named by `config.init` is, `teacher` how large the one named by `config.teacher`.
    """
    config = copy.deepcopy(config)
    if not any((config.dino, config.ibot, config.mae)):
        raise InputError("no objective is switched on; give at least one of dino={}, ibot={}, mae={}")
    resolver = _Resolver(config)
    if init is not None:
        _resolve_from_init(resolver, facts, init)
    _resolve_encoder(resolver, facts)
    _resolve_length(resolver, facts)
    _resolve_precision(resolver, facts)
    _resolve_views(resolver)
    _resolve_distillation(resolver)
    _resolve_crops(resolver)
    _resolve_optim(resolver)
    _resolve_objectives(resolver, facts)
    _check(config)
    _resolve_monitor(resolver, facts, teacher)
    return config, resolver.reasons


def _resolve_from_init(resolver: _Resolver, facts: DataFacts, init: EncoderConfig) -> None:
    """What the encoder is already; images as large as it was trained on, or as there are."""
    encoder = resolver.config.encoder
    own = ("embed_dim", "depth", "num_heads") if encoder.name in (None, init.name) else ()
    for key in ("name", *own, "patch_size", "class_token", "num_registers", "init_values", "act_layer"):
        if getattr(init, key) is not None:
            resolver.fill(f"encoder.{key}", getattr(init, key), "as init has it")
    assert init.image_size is not None and encoder.patch_size is not None
    if encoder.image_size is None and encoder.image_width is None and facts.side >= min(init.size):
        resolver.fill("encoder.image_width", init.image_width, "as init has it")
    unit = encoder.patch_size
    side = max(1, min(init.image_size, facts.side) // unit) * unit
    resolver.fill("encoder.image_size", side, f"init's {init.image_size}, images are about {facts.side} px")
    resolver.fill("knn.max_drop", 0.02, "a run that continues stops when it forgets")


def _resolve_encoder(resolver: _Resolver, facts: DataFacts) -> None:
    encoder = resolver.config.encoder
    small = facts.device == "cpu" or facts.num_images < 20_000
    name = "vit_tiny_patch16_224" if small else "vit_small_patch16_224"
    resolver.fill("encoder.name", name, "no GPU or under 20,000 images" if small else "a GPU and 20,000 images or more")
    wanted = 224 if facts.device == "cuda" else 64
    unit = encoder.patch_size if encoder.patch_size and 16 % encoder.patch_size else 16
    side = max(math.ceil(32 / unit), min(wanted, facts.side) // unit) * unit
    resolver.fill("encoder.image_size", side, f"images are about {facts.side} px; at most {wanted} on {facts.device}")
    size = encoder.image_size
    assert size is not None
    patch = 4 if size <= 40 else 8 if size <= 112 else 16
    resolver.fill("encoder.patch_size", patch, f"about 8 x 8 patches or more at {size} px")
    resolver.fill("encoder.class_token", True, "DINOv2")
    resolver.fill(
        "encoder.num_registers", 4 if encoder.class_token else 0, "DINOv2 with registers; none without class token"
    )
    resolver.fill("encoder.in_chans", facts.channels, "channels of the data")


def _resolve_length(resolver: _Resolver, facts: DataFacts) -> None:
    batch = 256 if facts.device == "cuda" else 64
    batch = min(batch, max(2, 2 ** int(math.log2(max(2, facts.num_images)))))
    resolver.fill("batch_size", batch, f"{facts.device}, {facts.num_images} images")
    size = resolver.config.batch_size
    assert size is not None
    seen = min(max(200 * facts.num_images, 2_000_000), max(100 * facts.num_images, 20_000_000))
    if facts.device == "cpu":
        seen = min(seen, 200_000)
    resolver.fill("steps", max(100, seen // size), f"about {seen:,} images seen at batch {size} on {facts.device}")
    short = _required(resolver.config.steps) < LONG_RUN
    reason = f"DINOv2's 1e-5 starts too slowly below {LONG_RUN:,} steps" if short else "DINOv2"
    resolver.fill("encoder.init_values", 0.1 if short else 1e-5, reason)
    _resolve_start(resolver, short)
    resolver.fill("checkpoint.every", max(50, _required(resolver.config.steps) // 10), "ten a run")


def _resolve_start(resolver: _Resolver, short: bool) -> None:
    reconstructs = resolver.config.mae is not None
    start = "xavier" if short or reconstructs else "trunc_normal"
    reason = "MAE" if reconstructs else "a narrow normal starts too slowly in short runs" if short else "DINO"
    resolver.fill("encoder.weight_init", start, reason)
    if resolver.config.encoder.weight_init not in ("xavier", "trunc_normal"):
        raise InputError(
            f"encoder.weight_init={resolver.config.encoder.weight_init} is unknown; take xavier or trunc_normal"
        )


def _resolve_precision(resolver: _Resolver, facts: DataFacts) -> None:
    if facts.native_bf16:
        resolver.fill("precision", "bf16", "autocast; losses, softmax and averages stay in fp32")
    else:
        resolver.fill("precision", "fp32", f"this {facts.device} only emulates bf16")
    if resolver.config.sharded:
        resolver.fill("compile", False, "not tried with sharded=true")
    elif facts.compiles:
        resolver.fill("compile", True, f"a {facts.device} device and a compiler are here")
    elif facts.device == "cuda":
        resolver.fill("compile", False, "Triton or a C compiler is missing")
    else:
        resolver.fill("compile", False, "minutes of compiling rarely pay on a CPU")


def _compares_views(config: PretrainConfig) -> bool:
    return config.dino is not None or config.ibot is not None


def _resolve_views(resolver: _Resolver) -> None:
    """Views that are compared differ in colour, too; what MAE alone reconstructs keeps its colours."""
    config = resolver.config
    if _compares_views(config):
        resolver.fill("crops.num_global", 2, "DINO, section 3.1")
        _fill_photometry(resolver, DINO_PHOTOMETRY, "DINO, section 3.1 (BYOL's): views that are compared")
        return
    assert config.mae is not None
    resolver.fill("crops.num_global", config.mae.num_views, "MAE alone: the views it reconstructs")
    colours = config.photometry
    if colours.jitter_prob and not _strengths(colours):
        for name in STRENGTHS:
            resolver.fill(f"photometry.{name}", getattr(DINO_PHOTOMETRY, name), "DINO's, because jitter was asked for")
    elif any(_strengths(colours)):
        resolver.fill("photometry.jitter_prob", DINO_PHOTOMETRY.jitter_prob, "DINO's, because a strength was given")
    _fill_photometry(resolver, NO_PHOTOMETRY, "MAE alone: crops and flips, no colour operations (MAE, table 1e)")


def _strengths(colours: PhotometryConfig) -> list[float]:
    """Those of the jitter that were given."""
    return [value for name in STRENGTHS if (value := getattr(colours, name)) is not None]


def _fill_photometry(resolver: _Resolver, values: PhotometryConfig, reason: str) -> None:
    for name, value in vars(values).items():
        resolver.fill(f"photometry.{name}", copy.copy(value), reason)


def _resolve_distillation(resolver: _Resolver) -> None:
    """What DINO may cost: beside MAE on a small budget a masked student that both read, else the published form."""
    config = resolver.config
    seen = _required(config.steps) * _required(config.batch_size)
    small = seen < SMALL_BUDGET
    budget = f"{seen:,} images seen, {'under' if small else 'not under'} {SMALL_BUDGET:,}"
    if config.dino is not None:
        carried = small and config.mae is not None
        resolver.fill(
            "dino.weight", 0.1 if carried else 1.0, f"{budget}: MAE carries" if carried else f"DINO; {budget}"
        )
        if carried and config.ibot is None and config.mae is not None:
            visible, why = (
                round(1 - config.mae.mask_ratio, 6),
                "MAE's visible share: one student pass serves both (MSN)",
            )
            resolver.fill("dino.student_visible_ratio", visible, f"{budget}; {why}")
        else:
            why = "iBOT brings its own masks" if config.ibot is not None else f"DINO; {budget}"
            resolver.fill("dino.student_visible_ratio", 1.0, f"whole views: {why}")
        masked = config.dino.student_visible_ratio != 1
        why = "one teacher's forward is all that a masked student adds to MAE" if masked else "DINO, both global views"
        resolver.fill("dino.num_teacher_views", 1 if masked else min(2, _required(config.crops.num_global)), why)
    size = "a quarter and a half of DINO's 2048 and 256" if small else "DINO, appendix C"
    for name in ("dino", "ibot"):
        if getattr(config, name) is not None:
            resolver.fill(f"{name}.head_hidden_dim", 512 if small else 2048, f"{size}; {budget}")
            resolver.fill(f"{name}.head_bottleneck_dim", 128 if small else 256, f"{size}; {budget}")


def _resolve_crops(resolver: _Resolver) -> None:
    config = resolver.config
    size, patch = _required(config.encoder.image_size), _required(config.encoder.patch_size)
    masked = config.dino is not None and config.dino.student_visible_ratio != 1
    if config.dino is None or masked:
        resolver.fill(
            "crops.num_local", 0, "a masked student's views are local enough" if masked else "none without DINO"
        )
    else:
        resolver.fill("crops.num_local", 8 if size >= 160 else 2, "DINO's multi-crop; fewer at small sizes")
    local = max(patch, round(size * 96 / 224 / patch) * patch)
    resolver.fill("crops.local_size", local, "96 of 224 pixels, as DINO, in whole patches")
    if config.encoder.image_width is not None:
        share = _required(config.crops.local_size) / size
        width = max(patch, round(config.encoder.image_width * share / patch) * patch)
        resolver.fill("crops.local_width", width, "as much of image_width, in whole patches")
    if config.crops.num_local:
        resolver.fill("crops.global_scale", [0.4, 1.0], "DINO with local crops")
    elif config.dino is not None:
        resolver.fill("crops.global_scale", [0.3, 1.0], "MSN; DINO without local crops takes .14")
    elif config.ibot is not None:
        resolver.fill("crops.global_scale", [0.25, 1.0], "iBOT")
    else:
        resolver.fill("crops.global_scale", [0.2, 1.0], "MAE alone")


def _resolve_optim(resolver: _Resolver) -> None:
    config = resolver.config
    batch, steps = _required(config.batch_size), _required(config.steps)
    rate = min(4e-3 * math.sqrt(batch / 1024), 1.5e-3)
    rule = "4e-3 sqrt(batch / 1024) (DINOv2), at most 1.5e-3"
    if config.init is not None:
        resolver.fill("optim.freeze_encoder", 0.1, "new heads first, on the encoder as it is")
        resolver.fill("optim.heads_lr", round(rate, 7), rule)
        resolver.fill(
            "optim.lr", round(rate / 10, 7), "a tenth of the rule for random weights: init is trained already"
        )
        resolver.fill("optim.layer_decay", 0.75, "the layers near the pixels change least (BEiT, MAE's fine-tuning)")
    resolver.fill("optim.lr", round(rate, 7), rule)
    resolver.fill("optim.layer_decay", 1.0, "all layers alike")
    resolver.fill("optim.freeze_encoder", 0.0, "the encoder is as new as the heads")
    if config.optim.freeze_encoder:
        resolver.fill("optim.heads_lr", round(rate, 7), rule)
    resolver.fill("knn.max_drop", 1.0, "from random weights k-NN may fall at first")
    alone = config.dino is None and config.ibot is None
    resolver.fill("optim.beta2", 0.95 if alone else 0.999, "MAE alone .95, else .999, as published")
    published = HALF_LIFE * min(MOST_HALF_LIVES, max(1, batch / HALF_LIFE_BATCH))
    half_life = max(LEAST_HALF_LIFE * batch, min(round(published), batch * steps // 20))
    resolver.fill(
        "optim.momentum",
        round(momentum_from_half_life(half_life, batch), 6),
        f"half-life of {half_life:,} images, {half_life / batch:.0f} steps: DINO's .996 at 512 and 1024, DINOv2's .992 "
        f"at 2048, at most 1/20 of the run, but at least {LEAST_HALF_LIFE} steps",
    )


def _resolve_objectives(resolver: _Resolver, facts: DataFacts) -> None:
    config = resolver.config
    prototypes = next((k for limit, k in _PROTOTYPES if facts.num_images < limit), 65536)
    share = min(1.0, max(0.0, (facts.num_images - 20_000) / (1_281_167 - 20_000)))
    start, end = round(0.02 + 0.02 * share, 4), round(0.02 + 0.05 * share, 4)
    steps = _required(config.steps)
    center = round(min(0.9, 0.5 ** (CENTER_SHARE / steps)), 4)
    for name in ("dino", "ibot"):
        if getattr(config, name) is not None:
            resolver.fill(
                f"{name}.center_momentum", center, "DINO's .9, with a half-life of at most a hundredth of the run"
            )
            if name == "ibot" and config.ibot and config.ibot.shared_head and config.dino:
                resolver.fill("ibot.num_prototypes", config.dino.num_prototypes, "DINO's head is shared")
            resolver.fill(f"{name}.num_prototypes", prototypes, f"{facts.num_images:,} images")
            rule = "for up to 20,000 images, linear to DINO's {} at ImageNet's 1.28 million (lightly-train)"
            resolver.fill(f"{name}.teacher_temperature", end, ".02 " + rule.format(".07"))
            given = getattr(config, name).teacher_temperature
            resolver.fill(f"{name}.teacher_temperature_start", min(start, given), ".02 " + rule.format(".04"))
    if config.mae is not None:
        width = config.encoder.embed_dim or next((w for n, w in _WIDTH.items() if n in str(config.encoder.name)), 768)
        dim, depth, heads = next(row[1:] for row in _DECODER if width <= row[0])
        resolver.fill("mae.decoder_dim", dim, f"encoder width {width}; MAE's 512 for width 768 and above")
        resolver.fill("mae.decoder_depth", depth, f"encoder width {width}; MAE's 8 for width 768 and above")
        resolver.fill("mae.decoder_num_heads", heads, "32 channels a head")


def _resolve_monitor(resolver: _Resolver, facts: DataFacts, teacher: Teacher | None) -> None:
    """As many evaluations of as many images as the monitor's share of the run pays for.

    From arithmetic and not from a clock, so that a resumed run evaluates, and stops by `max_drop`, where the
    uninterrupted one does. A run that continues from `init` takes many images before many evaluations: it stops at a
    drop of two points, which a thousand images cannot tell from noise. Without a validation set it is judged by a part
    of its own labelled images (monitor.py).
    """
    config = resolver.config
    knn, steps = config.knn, _required(config.steps)
    given = bool(knn.val or config.val_data)
    held_out = not given and knn.max_drop not in (None, 1.0) and (facts.labelled or knn.train is not None)
    sets = 2 if given or held_out else 1
    seen = steps * _required(config.batch_size)
    affordable = MONITOR_SHARE * seen * _worth(config, teacher) / sets  # images of each set, over all evaluations
    least, enough, most = MONITORED
    most = max(least, min(most, int(DECODED_SHARE * seen / sets)))
    if knn.train is None:
        most = min(most, max(1, facts.num_images // sets) if held_out else facts.num_images)
    enough = most if config.init is not None else min(enough, most)
    if knn.every is None:
        count = max(EVALUATIONS[0], min(EVALUATIONS[1], int(affordable / (knn.num_images or enough))))
        count = min(count, 1 + math.ceil(steps / EVALUATE_EVERY))
    else:
        count = 1 + math.ceil(steps / knn.every) if knn.every else EVALUATIONS[1]
    why = f"at most {MONITOR_SHARE:.0%} of the run's FLOPs"
    resolver.fill("knn.num_images", min(most, max(least, int(affordable / count))), f"of each set: {why}")
    resolver.fill("knn.every", max(EVALUATE_EVERY, math.ceil(steps / (count - 1))), f"{count} a run: {why}")


def _worth(config: PretrainConfig, teacher: Teacher | None) -> float:
    """How many clean images are encoded for the FLOPs of training on one, without a teacher of unknown size."""
    own = copy.copy(config)
    own.init = None  # its sizes were filled in
    trained = cost(own, teacher)
    if trained is None and own.teacher is not None:
        own.teacher = None
        trained = cost(own)
    return 3.0 if trained is None else trained.flops_per_image / clean_flops(own)


def _check(config: PretrainConfig) -> None:
    """What no default can mend."""
    patch = _required(config.encoder.patch_size)
    for key, size in zip(("image_size", "image_width"), config.encoder.size, strict=True):
        if size % patch:
            raise InputError(
                f"encoder.{key}={size} is no multiple of encoder.patch_size={patch}; take {size // patch * patch}"
            )
    if config.crops.num_local:
        for key, local in zip(("local_size", "local_width"), config.crops.local_shape, strict=True):
            if local % patch:
                near = max(patch, local // patch * patch)
                raise InputError(f"crops.{key}={local} is no multiple of encoder.patch_size={patch}; take {near}")
    if config.dino is not None and _required(config.crops.num_global) < 2:
        raise InputError(f"dino needs two global crops, crops.num_global={config.crops.num_global}; set it to 2")
    if config.koleo is not None and config.dino is None and config.ibot is None:
        raise InputError("koleo spreads class tokens and learns nothing alone; switch on dino={} with it")
    _check_distillation(config)
    if _required(config.batch_size) % config.accumulate:
        raise InputError(f"accumulate={config.accumulate} does not divide batch_size={config.batch_size}")
    if not config.encoder.class_token and config.encoder.num_registers:
        raise InputError(
            f"encoder.num_registers={config.encoder.num_registers} needs encoder.class_token=true; set it to 0"
        )


def _check_distillation(config: PretrainConfig) -> None:
    dino, ibot = config.dino, config.ibot
    if ibot is not None and dino is not None and dino.student_visible_ratio != 1:
        raise InputError(
            f"dino.student_visible_ratio={dino.student_visible_ratio} removes patches that ibot predicts; set it to 1"
        )
    if ibot is not None and ibot.shared_head and dino is None:
        raise InputError("ibot.shared_head=true shares DINO's head; switch on dino={} or set it to false")
    if ibot is not None and ibot.shared_head and dino is not None and ibot.num_prototypes != dino.num_prototypes:
        raise InputError(
            f"ibot.num_prototypes={ibot.num_prototypes} differs from dino.num_prototypes={dino.num_prototypes}, but "
            "ibot.shared_head=true; leave it out"
        )


def _required(value: int | None) -> int:
    assert value is not None
    return value
