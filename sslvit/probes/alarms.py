"""Alarms of a pretraining run in words: what is wrong, by which number, and which setting to change.

Judges the lines of metrics.jsonl as they are written; measures nothing itself. That entropy and KL of the teacher's
targets tell both forms of collapse is DINO's (arXiv:2104.14294, section 5.3); the other levels are judgement, and a
line must cross one several times in a row before anything is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sslvit import distributed
from sslvit.config import PretrainConfig
from sslvit.objectives.config import DinoConfig, IbotConfig

UNIFORM, ONE_PROTOTYPE = 0.95, 0.05  # entropies of targets, as shares of ln K
FEW = 4.0  # prototypes in use, exp of the mean target's entropy, where enough samples come together to use more
# Entropy of the mean target less that of one target, as a share of ln K: what it says about the image. Of n targets
# no more than ln n can be told; an eighth of that is enough.
SAME = 0.01
NARROW_TOKENS = 0.02  # spread of class tokens, as a share of the widest
LOW_RANK, NARROW = 1.5, 0.1  # RankMe; feature spread as a share of that at step 0
LOSES = 0.02  # of k-NN accuracy, below step 0
FADED = 1e-6  # gradient norm
SPIKE = 20.0  # gradient norm over its running mean
LEFT_BEHIND = 0.2  # cosine of student and teacher
COPY = 0.5  # momentum: half of the teacher is replaced in a step
QUICK = 0.95  # momentum: half of the teacher is replaced in 14 steps; by itself no alarm
MEAN_PATCH = 0.98  # MAE's loss; 1 is what predicting the mean of each patch costs
SKIPPED = 0.01  # share of all steps

LINES, EVALUATIONS = 3, 2  # in a row before an alarm
GRACE_STEPS, GRACE_SHARE, MOST_GRACE = 20, 0.25, 2000  # before that a run has only begun
TITLES = {"dino": "DINO", "ibot": "iBOT"}


class Alarms:
    """Call it with each line of a run; it answers with the alarms to be said now, {name: text}, mostly none.

    `state` holds all it remembers, numbers by name; kept in the checkpoint, it makes a resumed run say the same.
    """

    def __init__(self, config: PretrainConfig) -> None:
        """`config` is resolved; its values choose the remedy."""
        assert config.steps
        self.config = config
        self.steps = config.steps
        self.grace = max(GRACE_STEPS, min(int(GRACE_SHARE * config.steps), MOST_GRACE))

    def __call__(self, row: Mapping[str, float], state: dict[str, float]) -> dict[str, str]:
        """A line of training counts the skipped steps; any other is an evaluation's."""
        if "skipped" in row:
            said = self._count("line", LINES, self._of_line(row, state), row, state)
            _remember_gradient(row, state)
            return said
        found = self._of_evaluation(row, state)
        patience = 1 if row["step"] == self.steps else EVALUATIONS
        return self._count("evaluation", patience, found, row, state)

    def _count(
        self, kind: str, patience: int, found: dict[str, str], row: Mapping[str, float], state: dict[str, float]
    ) -> dict[str, str]:
        """Says what was found `patience` times in a row, once, and once when it has ended."""
        said = {}
        if kind == "line" and row["step"] < self.grace:
            found = {}
        unseen = kind == "line" and "loss" not in row  # each of its steps was skipped: nothing else was measured
        for name in [key.partition(":")[2] for key in state if key.startswith(f"{kind}:")]:
            if name not in found and not (unseen and name != "steps/skipped"):
                count = state.pop(f"{kind}:{name}")
                if count < 0 and not any(_group(other) == _group(name) for other in found):
                    said[name] = f"over: no longer so at step {int(row['step'])}"
        for name, text in found.items():
            count = state.get(f"{kind}:{name}", 0)
            if count >= 0:  # below 0: said already
                count = count + 1
                if count >= patience:
                    count, said[name] = -1, text
                state[f"{kind}:{name}"] = count
        return said

    def _of_line(self, row: Mapping[str, float], state: Mapping[str, float]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in ("dino", "ibot"):
            section = getattr(self.config, name)
            if section is not None and f"{name}/target_entropy" in row:
                found |= self._of_targets(name, section, row)
        found |= self._of_tokens(row) | self._of_gradient(row, state)
        if self.config.mae is not None and self.config.mae.norm_pixels and row.get("mae/loss", 0) > MEAN_PATCH:
            found["mae/mean_patch"] = (
                f"MAE predicts no more than the mean of each patch (loss {row['mae/loss']:.3f}, 1 is the mean's): "
                f"raise optim.lr ({self.config.optim.lr:g}) or shorten optim.warmup ({self.config.optim.warmup:g})"
            )
        if row.get("skipped", 0) >= max(3, SKIPPED * row["step"]):
            found["steps/skipped"] = (
                f"{int(row['skipped'])} of {int(row['step'])} steps had no finite loss or gradient: "
                f"lower optim.lr ({self.config.optim.lr:g}) or use precision=fp32 ({self.config.precision})"
            )
        return found

    def _of_targets(self, name: str, section: DinoConfig | IbotConfig, row: Mapping[str, float]) -> dict[str, str]:
        """At most one sentence about the targets of an objective."""
        target, usage = row[f"{name}/target_entropy"], row[f"{name}/usage_entropy"]
        title = TITLES[name]
        log_k = math.log(section.num_prototypes or 1)
        if target > UNIFORM:
            loss = f"its loss is stuck at ln K = {log_k:.2f}" if name == "dino" else "its loss can fall no further"
            return {
                f"{name}/uniform_targets": f"{title} has collapsed: the teacher's targets are uniform "
                f"({target:.1%} of ln K) and {loss}. {self._remedy(name, section, 'uniform')}"
            }
        apart = _told_apart(self.config, name)
        if usage < ONE_PROTOTYPE and apart > 1:
            return {
                f"{name}/one_prototype": f"{title} has collapsed: all images fall on one prototype "
                f"(the mean target has {usage:.1%} of ln K) and its loss goes to 0. "
                f"{self._remedy(name, section, 'one')}"
            }
        prototypes = math.exp(usage * log_k)
        if prototypes < least_prototypes(self.config, name):
            return {
                f"{name}/few_prototypes": f"{title} is collapsing: the targets use {prototypes:.1f} of "
                f"{section.num_prototypes} prototypes. {self._remedy(name, section, 'one')}"
            }
        if apart > 1 and (usage - target) * log_k < min(SAME * log_k, math.log(apart) / 8):
            return {
                f"{name}/same_targets": f"{title} learns nothing about the images: the teacher's target is the same "
                f"for all of them (entropy {target:.1%} of ln K, of the mean target {usage:.1%}). "
                f"{self._remedy(name, section, 'same')}"
            }
        return {}

    def _remedy(self, name: str, section: DinoConfig | IbotConfig, form: str) -> str:
        """The setting that stands far from the published ones; where none does, what helps against this form."""
        optim = self.config.optim
        temperature, momentum = section.teacher_temperature or 0.0, optim.momentum or 0.0
        if form != "one" and temperature > section.student_temperature * 0.9:
            return f"Lower {name}.teacher_temperature ({temperature:g}; published .04 to .07)."
        if section.centering == "softmax" and (section.center_momentum or 0) > 0.99:
            return f"Lower {name}.center_momentum ({section.center_momentum:g}; published .9): the centre stands still."
        if momentum < COPY:
            return f"Raise optim.momentum ({momentum:g}; published .996 at batch 512): the teacher copies the student."
        if momentum < QUICK:
            return (
                f"Raise optim.momentum ({momentum:g}; auto takes .99 and more): the teacher follows within a few steps."
            )
        if form == "one":
            return f"Raise {name}.teacher_temperature ({temperature:g}) or use {name}.centering=sinkhorn."
        sharper = f"Lower {name}.teacher_temperature ({temperature:g}) or optim.lr ({optim.lr:g})"
        if section.centering == "softmax":
            sharper += f", use {name}.centering=sinkhorn"
        company = "" if self.config.mae is not None else ", or add mae={}, which learns without targets"
        return f"{sharper}{company}; a new encoder may also only need more steps ({self.steps})."

    def _of_tokens(self, row: Mapping[str, float]) -> dict[str, str]:
        found = {}
        spread, cosine = row.get("health/token_spread"), row.get("health/teacher_student_cosine")
        if spread is not None and spread < NARROW_TOKENS and _images_together(self.config) > 1:
            found["tokens/same"] = (
                f"The class token is the same for every image (spread {spread:.2%} of the widest). "
                f"Add koleo={{}} or mae={{}}, or lower optim.lr ({self.config.optim.lr:g})."
            )
        if cosine is not None and cosine < LEFT_BEHIND:
            found["teacher/left_behind"] = (
                f"The teacher was left behind by the student (cosine {cosine:.2f}). Lower optim.momentum "
                f"({self.config.optim.momentum:g}) or optim.lr ({self.config.optim.lr:g})."
            )
        if row.get("momentum", 1.0) < COPY:
            found["teacher/copy"] = (
                f"The teacher is a copy of the student (momentum {row['momentum']:.2f}: half of it is replaced in "
                "less than a step), which collapses. Raise optim.momentum (published .996 at batch 512)."
            )
        return found

    def _of_gradient(self, row: Mapping[str, float], state: Mapping[str, float]) -> dict[str, str]:
        norm, usual = row.get("grad_norm"), state.get("usual_gradient")
        if norm is None:
            return {}
        if norm < FADED:
            return {"gradient/faded": f"The gradient has faded (norm {norm:.1e}): nothing is learned. Raise optim.lr."}
        if usual and norm > SPIKE * usual:
            return {
                "gradient/spike": f"The gradient's norm is {norm:.3g}, usually {usual:.3g}: lower optim.lr "
                f"({self.config.optim.lr:g}) or optim.clip_norm ({self.config.optim.clip_norm:g})."
            }
        return {}

    def _of_evaluation(self, row: Mapping[str, float], state: dict[str, float]) -> dict[str, str]:
        """RankMe as it is; spread and k-NN beside those of step 0."""
        for key in ("feature_std", "knn/top1", "knn/init/top1"):
            if key in row and math.isfinite(row[key]):
                state.setdefault(f"first:{key}", row[key])
        found = {}
        rank, spread, top1 = (row.get(key, math.nan) for key in ("rankme", "feature_std", "knn/top1"))
        if rank < LOW_RANK:
            found["features/low_rank"] = (
                f"The features lie along one direction (RankMe {rank:.2f}). Add koleo={{}} or mae={{}}, "
                f"or lower optim.lr ({self.config.optim.lr:g})."
            )
        first = state.get("first:feature_std", 0.0)
        if spread < NARROW * first:
            found["features/same"] = (
                f"The features of all images are nearly the same (spread {spread:.2g}, {first:.2g} at the start). "
                f"Add koleo={{}} or mae={{}}, or lower optim.lr ({self.config.optim.lr:g})."
            )
        if top1 < state.get("first:knn/top1", 0.0) - LOSES:
            found["knn/fell"] = (
                f"k-NN has fallen to {top1:.1%} from {state['first:knn/top1']:.1%} at the start: "
                f"{self._untrained_token}lower optim.lr ({self.config.optim.lr:g}), or train longer than "
                f"{self.steps} steps."
            )
        before = state.get("first:knn/init/top1", 0.0)
        if row["step"] == self.steps and top1 < before:
            found["knn/below_init"] = (
                f"k-NN ends at {top1:.1%}, and init had {before:.1%} before it was resized for this run: keep that "
                f"encoder, lower optim.lr ({self.config.optim.lr:g}), or train longer than {self.steps} steps."
            )
        return found

    @property
    def _untrained_token(self) -> str:
        """What to do first where no objective has a target for the class token, which k-NN reads."""
        missing = self.config.ibot is not None and self.config.dino is None
        return "add dino={} (nothing else has a target for the class token), " if missing else ""


def least_prototypes(config: PretrainConfig, name: str) -> float:
    """How many prototypes healthy targets of an objective (`dino`, `ibot`) use at least: an eighth of those averaged
    in a line, at most FEW. A line averages over the class tokens of the teacher's views, or the masked patches, of one
    process's micro-batch.
    """
    every = config.crops.num_global or 1
    if name == "dino" and config.dino is not None:
        return min(FEW, _images_together(config) * min(config.dino.num_teacher_views or every, every) / 8)
    return min(FEW, _told_apart(config, name) / 8)


def _told_apart(config: PretrainConfig, name: str) -> float:
    """How many targets of a line healthy ones differ in: DINO's by image, for views of one image agree; iBOT's all."""
    images = _images_together(config)
    if name == "dino" or config.ibot is None:
        return images
    rows, columns = (side // (config.encoder.patch_size or 16) for side in config.encoder.size)
    share = config.ibot.mask_prob * (config.ibot.mask_ratio_min + config.ibot.mask_ratio_max) / 2
    return images * (config.crops.num_global or 1) * share * rows * columns


def _images_together(config: PretrainConfig) -> float:
    """Images in one process's micro-batch: what the numbers of a line are taken over before they are averaged."""
    return (config.batch_size or 1) / (distributed.world_size() * config.accumulate)


def _group(name: str) -> str:
    """`dino` of `dino/uniform_targets`: one form of an ill may pass into another."""
    return name.partition("/")[0]


def _remember_gradient(row: Mapping[str, float], state: dict[str, float]) -> None:
    """The running mean of the gradient's norm over about ten lines."""
    norm = row.get("grad_norm", math.nan)
    if math.isfinite(norm):
        usual = state.get("usual_gradient", norm)
        state["usual_gradient"] = 0.9 * usual + 0.1 * norm
