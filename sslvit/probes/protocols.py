"""The probes as `evaluate` runs them. A probe is fitted on labelled training images and then answers for others.

The shape of the interface is the guard against leaks: `fit` is given the training set alone, what it returns is given
images without labels, and only `scores.score` sees the validation labels, once, after every choice is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import numpy as np
from torch import Tensor

from sslvit.encoder.vit import is_pooled
from sslvit.errors import InputError
from sslvit.probes import (
    attentive,
    augmented,
    cluster,
    duplicates,
    fewshot,
    health,
    knn,
    linear,
    logreg,
    regression,
    retrieval,
)
from sslvit.probes import segmentation as dense
from sslvit.probes.config import EvaluateConfig
from sslvit.probes.features import Examples
from sslvit.probes.scores import (
    Answer,
    Clusters,
    Draws,
    Estimates,
    Maps,
    Neighbours,
    Presence,
    Ranking,
    Score,
    per_image_score,
    score_resampled,
)

MAX_LOGITS = 2**24  # at once, where answers are ranked

Fitted = Callable[[Examples], list[Answer]]
Fit = Callable[[Examples, np.ndarray, EvaluateConfig], Fitted]


def fit_knn(train: Examples, labels: np.ndarray, config: EvaluateConfig) -> Fitted:
    """DINO's k-NN for each k; nothing is fitted."""
    features, num_classes = train.features, len(np.unique(labels))

    def answer(val: Examples) -> list[Answer]:
        rankings = knn.knn(features.cls, labels, val.features.cls)
        return [
            Answer(
                Ranking(ranking, num_classes),
                f"{knn.PROTOCOL}, {_token(train)}, k {k}{_clipped(k, len(features))}",
                "" if k == 20 else f"k{k}/",
            )
            for k, ranking in sorted(rankings.items(), key=lambda item: (item[0] != 20, item[0]))
        ]

    return answer


def fit_linear(train: Examples, labels: np.ndarray, config: EvaluateConfig) -> Fitted:
    """DINOv2's grid of heads; with `augment`, on random crops that go through the encoder again."""
    features = train.features
    variants = linear.input_variants(features.blocks, features.mean_patch, features.has_class_token)
    fitting, choosing = linear.choice_split(np.unique(labels, return_inverse=True)[1], config.seed)
    size = min(config.linear_batch_size, len(fitting))
    if config.augment:
        head = linear.fit_stream(
            variants,
            labels,
            lambda first: augmented.linear_stream(train, labels, fitting, config.seed, size, first),
            choosing,
            seed=config.seed,
            steps=config.linear_steps,
            batch_size=size,
            device=train.device,
            unfinished=train.unfinished,
        )
    else:
        head = linear.fit(
            variants,
            labels,
            seed=config.seed,
            steps=config.linear_steps,
            batch_size=size,
            device=train.device,
            unfinished=train.unfinished,
        )
    words = (
        f"{linear.PROTOCOL}; {len(variants) * len(linear.LEARNING_RATES)} heads on {_token(train)}, "
        f"{config.linear_steps} steps of {size}, "
        f"{'random crops and flips' if config.augment else 'no augmentation'}"
    )
    return _from_head(head, words, f"lr {head.learning_rate:g}, {head.inputs}")


def fit_linear_dino(train: Examples, labels: np.ndarray, config: EvaluateConfig) -> Fitted:
    """DINO's single head: four blocks below 768 dimensions, else the last with the mean patch."""
    features = train.features
    variants = linear.input_variants(features.blocks, features.mean_patch, features.has_class_token)
    last4 = [v for v in variants if "4 blocks" in v.name and "mean" not in v.name]
    chosen = last4 if features.cls.shape[1] < 768 and last4 else variants
    wide = [v for v in variants if v.name == "last block + mean patch"]
    inputs = (chosen if features.cls.shape[1] < 768 else wide or variants)[0]
    head = linear.fit_dino(inputs, labels, seed=config.seed, device=train.device, unfinished=train.unfinished)
    return _from_head(head, f"{linear.PROTOCOL_DINO}, {inputs.name} of {_token(train)}, no augmentation")


def fit_linear_mae(train: Examples, labels: np.ndarray, config: EvaluateConfig) -> Fitted:
    """MAE's head behind a batch norm, on the class token of the last block."""
    features = train.features
    inputs = linear.Inputs("last block", (features.cls,))
    head = linear.fit_mae(inputs, labels, seed=config.seed, device=train.device, unfinished=train.unfinished)
    words = f"{linear.PROTOCOL_MAE}, batch {linear.mae_batch_size(len(features))}, {_token(train)}, no augmentation"
    return _from_head(head, words)


def _from_head(head: linear.Head, words: str, chosen: str = "") -> Fitted:
    def answer(val: Examples) -> list[Answer]:
        features = val.features
        variants = linear.input_variants(features.blocks, features.mean_patch, features.has_class_token)
        parts = next(variant.parts for variant in variants if variant.name == head.inputs)
        ranking = best_first(lambda rows: head.logits([p[rows] for p in parts]), len(features), head.classes)
        return [Answer(ranking, words, chosen=chosen)]

    return answer


def fit_logreg(train: Examples, labels: np.ndarray, config: EvaluateConfig) -> Fitted:
    """DINOv2's logistic regression on the class token."""
    unfinished = train.unfinished
    model = logreg.fit(train.features.cls, labels, seed=config.seed, device=train.device, unfinished=unfinished)
    words = f"{logreg.PROTOCOL}, {_token(train)}"

    def answer(val: Examples) -> list[Answer]:
        queries = val.features.cls
        ranking = best_first(lambda rows: model.logits(queries[rows]), len(queries), model.classes)
        return [Answer(ranking, words, chosen=f"C {model.strength:.3g}")]

    return answer


def fit_fewshot(train: Examples, labels: np.ndarray, config: EvaluateConfig) -> Fitted:
    """Nearest class mean from 1, 5, 10 images of each class and from 1% and 10% of the training set."""
    features = train.features.cls
    middle = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    unit = fewshot.centred(features, middle)
    draws = range(fewshot.NUM_DRAWS)
    subsets = {f"{n}shot": [fewshot.draw_shots(labels, n, config.seed, d) for d in draws] for n in fewshot.SHOTS}
    subsets |= {
        f"{round(100 * share)}percent": [fewshot.draw_share(labels, share, config.seed, d) for d in draws]
        for share in fewshot.SHARES
    }
    fitted = {
        name: [fewshot.class_means(unit[index], labels[index]) for index in indices]
        for name, indices in subsets.items()
    }

    def answer(val: Examples) -> list[Answer]:
        queries = fewshot.centred(val.features.cls, middle)
        return [
            Answer(
                Draws(np.stack([c[fewshot.closest(queries, means)] for means, c in models], axis=1)),
                f"{fewshot.PROTOCOL}, {_token(train)}, {name}: {len(subsets[name][0])} images",
                f"{name}/",
            )
            for name, models in fitted.items()
        ]

    return answer


def fit_retrieval(train: Examples, labels: np.ndarray, config: EvaluateConfig) -> Fitted:
    """Nothing is fitted: each validation image looks for its class among the others."""

    def answer(val: Examples) -> list[Answer]:
        if len(val.features) < 2:
            raise InputError("retrieval needs at least two validation images")
        neighbours = retrieval.leave_one_out(val.features.cls)
        return [Answer(Neighbours(neighbours), f"{retrieval.PROTOCOL}, {_token(val)}")]

    return answer


def fit_cluster(train: Examples, labels: np.ndarray, config: EvaluateConfig) -> Fitted:
    """The number of classes is all that is learned from train."""
    num_classes = len(np.unique(labels))

    def answer(val: Examples) -> list[Answer]:
        assignment = cluster.kmeans(val.features.cls, num_classes, config.seed)
        return [Answer(Clusters(assignment), f"{cluster.PROTOCOL}, {_token(val)}")]

    return answer


def fit_attentive(train: Examples, labels: np.ndarray, config: EvaluateConfig) -> Fitted:
    """Learned queries over the patches of the last block."""
    check_patches(train, "attentive")
    rows = attentive.affordable_rows(train, config.seed)
    heads, chosen, classes = attentive.fit(
        attentive.patch_tokens(train, rows),
        labels[rows],
        seed=config.seed,
        steps=config.attentive_steps,
        batch_size=config.linear_batch_size,
        device=train.device,
        unfinished=train.unfinished,
    )
    words = (
        f"{attentive.PROTOCOL}; {config.attentive_steps} steps of {min(config.linear_batch_size, len(rows))} from "
        f"{len(rows)} images, no augmentation"
    )

    def answer(val: Examples) -> list[Answer]:
        best = []
        for layers, _ in val.tokens(val.features.indices):
            patches = layers[0].patches.half()

            def logits(rows: slice, patches: Tensor = patches) -> np.ndarray:
                return attentive.predict(heads, patches[rows], train.device)[chosen].numpy()

            best.append(best_first(logits, len(patches), classes).labels)
        ranking = Ranking(np.concatenate(best), len(classes))
        return [Answer(ranking, words, chosen=f"lr {attentive.LEARNING_RATES[chosen]:g}")]

    return answer


def fit_presence(train: Examples, labels: np.ndarray, config: EvaluateConfig) -> Fitted:
    """Several classes at once: one-vs-rest logistic regression."""
    predict, strength = regression.fit_presence(train.features.cls, labels, config.seed, train.unfinished)
    words = f"{regression.PROTOCOL_PRESENCE}, {_token(train)}"
    return lambda val: [Answer(Presence(predict(val.features.cls)), words, chosen=f"C {strength:g}")]


def fit_numbers(train: Examples, labels: np.ndarray, config: EvaluateConfig) -> Fitted:
    """Numbers: ridge regression."""
    predict, penalty = regression.fit_ridge(train.features.cls, labels, config.seed)
    words = f"{regression.PROTOCOL_RIDGE}, {_token(train)}"
    return lambda val: [Answer(Estimates(predict(val.features.cls)), words, chosen=f"penalty {penalty:g}")]


def fit_knn_mean(said: type[Presence] | type[Estimates]) -> Fit:
    """Several classes at once, or numbers: the mean over the neighbours' labels."""

    def fit(train: Examples, labels: np.ndarray, config: EvaluateConfig) -> Fitted:
        words = f"{regression.PROTOCOL_KNN}{_clipped(20, len(labels))}, {_token(train)}"
        return lambda val: [Answer(said(regression.knn_mean(train.features.cls, labels, val.features.cls)), words)]

    return fit


CLASS_PROBES: dict[str, Fit] = {
    "knn": fit_knn,
    "linear": fit_linear,
    "linear_dino": fit_linear_dino,
    "linear_mae": fit_linear_mae,
    "logreg": fit_logreg,
    "attentive": fit_attentive,
    "fewshot": fit_fewshot,
    "retrieval": fit_retrieval,
    "cluster": fit_cluster,
}
PRESENCE_PROBES: dict[str, Fit] = {"knn": fit_knn_mean(Presence), "linear": fit_presence, "logreg": fit_presence}
NUMBER_PROBES: dict[str, Fit] = {"knn": fit_knn_mean(Estimates), "linear": fit_numbers}


#: The modules whose PROTOCOL words a protocol prints; `regression` besides, which judges other kinds of labels.
MODULES: dict[str, tuple[ModuleType, ...]] = {
    "knn": (knn,),
    "linear": (linear, augmented),
    "linear_dino": (linear,),
    "linear_mae": (linear,),
    "logreg": (logreg,),
    "attentive": (attentive,),
    "fewshot": (fewshot,),
    "retrieval": (retrieval, duplicates),
    "cluster": (cluster,),
    "segmentation": (dense,),
    "health": (health,),
}
#: Raised for a protocol when its numbers change and its words do not.
REVISIONS = {"cluster": 2, "linear": 2, "linear_mae": 2, "retrieval": 2, "segmentation": 2}


def protocol_hash(name: str) -> str:
    """Changes with the words and the revision of a protocol: numbers of an earlier one are not taken for its own."""
    words = [
        value
        for module in (*MODULES[name], regression)
        for key, value in sorted(vars(module).items())
        if key.startswith("PROTOCOL")
    ]
    return hashlib.sha256(json.dumps([name, REVISIONS.get(name, 1), words]).encode()).hexdigest()[:16]


def probe_for(name: str, labels: np.ndarray, label: str) -> Fit:
    """The probe `name` for these labels: (n,) int classes, (n, C) int of 0 and 1, or (n,) float numbers."""
    kind, probes = "one class per image", CLASS_PROBES
    if labels.ndim == 2:
        kind, probes = "several classes at once", PRESENCE_PROBES
    elif labels.dtype.kind == "f":
        kind, probes = "numbers", NUMBER_PROBES
    if name not in probes:
        raise InputError(f"protocol {name} cannot judge label {label!r} ({kind}); use {', '.join(probes)}")
    return probes[name]


def fit_segmentation(train: Examples, config: EvaluateConfig) -> Fitted:
    """Linear and k-NN on patches; the masks of the training set are its labels."""
    dense.check_masks(train.source)
    check_patches(train, "segmentation")
    rows = dense.affordable_rows(train, config.seed)
    rows = np.random.default_rng([config.seed, len(rows)]).permutation(rows)  # the last tenth chooses
    patches = dense.training_patches(train, train.source, rows)
    per_image = len(patches.tokens) // len(rows)
    linear_head = dense.LinearHead(patches, max(1, len(rows) // 10) * per_image, train.unfinished)
    facts = f"{len(rows)} images of {per_image} patches"

    def answer(val: Examples) -> list[Answer]:
        methods: dict[str, tuple[dense.Method, str, str]] = {
            "linear/": (linear_head, dense.PROTOCOL_LINEAR, f"C {linear_head.strength:g}"),
            "knn/": (dense.NearestPatches(patches), dense.PROTOCOL_KNN, ""),
        }
        said: dict[str, list[np.ndarray]] = {name: [] for name in methods}
        for layers, _ in val.tokens(val.features.indices):
            for name, (method, _, _) in methods.items():
                maps = dense.to_pixels(method(layers[0].patches.cpu()), val.grid, val.preprocessing.size)
                said[name].append(maps.byte().numpy())
        return [
            Answer(Maps(np.concatenate(said[name])), f"{words}; {facts}", name, chosen)
            for name, (_, words, chosen) in methods.items()
        ]

    return answer


def measure_duplicates(train: Examples, val: Examples, config: EvaluateConfig) -> Score:
    """The share of validation images that the training set holds already, and which they are."""
    pairs = duplicates.near_duplicates(train, val)
    repeated = np.zeros(len(val.features))
    repeated[[pair.row for pair in pairs]] = 1
    checked = min(len(val.features), duplicates.MAX_CHECKED)
    words = f"{duplicates.PROTOCOL}, {_token(val)}; {checked} images looked at"
    cases: list[dict[str, object]] = [
        {
            "val": val.features.names[pair.row],
            "train": train.features.names[pair.other],
            "concordance": round(pair.concordance, 4),
        }
        for pair in pairs
    ]
    return replace(per_image_score("duplicates", repeated, words, config.seed), cases=cases)


def measure_health(train: Examples, config: EvaluateConfig) -> list[Score]:
    """Numbers of the training features that need no labels."""
    features, seed = train.features.cls, config.seed
    some = health.sample(features, health.MAX_IMAGES, seed)
    few = health.sample(features, health.MAX_PAIRED, seed)
    words = f"{health.PROTOCOL}, {_token(train)}"
    scores = [
        score_resampled("rankme", lambda rows: health.rankme(some[rows]), len(some), words, seed, 40),
        score_resampled("spectrum_decay", lambda rows: health.spectrum_decay(some[rows]), len(some), words, seed, 40),
        score_resampled("feature_std", lambda rows: health.feature_std(some[rows]), len(some), words, seed, 40),
        score_resampled("uniformity", lambda rows: health.uniformity(few[np.unique(rows)]), len(few), words, seed, 40),
    ]
    if train.module is not None:
        first, second = augmented.two_views(train, health.MAX_PAIRED, seed)
        views = f"{words}, two random crops of {len(first)} images"
        scores.append(
            score_resampled(
                "alignment", lambda rows: health.alignment(first[rows], second[rows]), len(first), views, seed, 200
            )
        )
    return scores


def best_first(
    logits_of: Callable[[slice], np.ndarray], num_images: int, classes: np.ndarray, places: int = 5
) -> Ranking:
    """The labels of the largest logits, ties by label. `logits_of(rows)` gives (rows, C): never all at once."""
    places, step = min(places, len(classes)), max(1, MAX_LOGITS // len(classes))
    rankings = []
    for start in range(0, num_images, step):
        logits = logits_of(slice(start, min(start + step, num_images))).copy()
        best = np.empty((len(logits), places), dtype=np.int64)
        for place in range(places):
            best[:, place] = logits.argmax(axis=1)
            logits[np.arange(len(logits)), best[:, place]] = -np.inf
        rankings.append(classes[best])
    return Ranking(np.concatenate(rankings), len(classes))


def check_patches(examples: Examples, protocol: str) -> None:
    """InputError for an encoder that says one vector of the whole image."""
    if examples.module is not None and is_pooled(examples.module):
        raise InputError(
            f"protocol {protocol} reads patches, and {type(examples.module).__name__} has pooled features alone; "
            "choose a vit_* or eva* model, or another protocol"
        )


def _token(examples: Examples) -> str:
    if examples.module is None:
        return "pixels"
    if is_pooled(examples.module):
        return "pooled features"
    return "class token" if examples.features.has_class_token else "mean patch"


def _clipped(k: int, num_train: int) -> str:
    return "" if k <= num_train else f" (clipped to {num_train} training images)"
