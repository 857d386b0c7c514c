"""Pictures of what an encoder was shown and what it makes of it. Needs the encoder and its images; makes no page.

A few images of the run's own data: crops as the model sees them, attention of the class token, patch features as
colours, MAE's guesses, nearest neighbours, worst cases, near-duplicates. What cannot be made leaves a sentence in
`missing` instead.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from sslvit.checkpoint import checkpoint_path
from sslvit.config import PretrainConfig, load_config
from sslvit.data.bad_files import BadImage
from sslvit.data.crops import eval_transform, make_views, min_side
from sslvit.data.decode import decode
from sslvit.data.photometry import apply, normalize
from sslvit.data.records import as_classes
from sslvit.data.sources import Source, open_source
from sslvit.encoder.vit import class_attention_maps, forward_tokens, patch_grid
from sslvit.encoder.weights import LoadedEncoder, load_encoder
from sslvit.errors import InputError
from sslvit.objectives.mae import Mae
from sslvit.pages.gallery import misplaced, most_alike, repeated
from sslvit.pages.patch_colours import patch_colours
from sslvit.pages.reconstructions import open_mae, reconstruct
from sslvit.pages.run_record import RunRecord
from sslvit.probes.features import choose_indices

NUM_CROPPED, NUM_ATTENDED, NUM_COLOURED, NUM_RECONSTRUCTED = 6, 6, 8, 6
NUM_QUERIES, NUM_NEIGHBOURS, NUM_WORST, NUM_DUPLICATES = 6, 5, 6, 8
NUM_LOCAL_SHOWN, NUM_HEADS_SHOWN = 6, 12
THUMBNAIL = 112  # px
GALLERY = (32, 512)  # images among which neighbours are looked for: at least, at most
GALLERY_SECONDS = 5.0
BATCH = 16
SEED = 0
DATA_ERRORS = (InputError, OSError, BadImage)


@dataclass(frozen=True)
class Picture:
    """Pixels (H, W, 3) uint8, and their words. map: made of patches, so no two of them may blur."""

    pixels: np.ndarray
    alt: str
    caption: str = ""
    map: bool = False


@dataclass(frozen=True)
class Strip:
    """Pictures that belong together: the first is what the others are about."""

    first: Picture
    others: list[Picture]


@dataclass
class Pictures:
    """All pictures of a page. facts: of the encoder, in words. missing: section -> why there are none."""

    facts: dict[str, str] = field(default_factory=dict)
    crops: list[Strip] = field(default_factory=list)
    attention: list[Strip] = field(default_factory=list)
    colours: list[Strip] = field(default_factory=list)
    reconstructions: list[Strip] = field(default_factory=list)
    neighbours: list[Strip] = field(default_factory=list)
    worst: list[Strip] = field(default_factory=list)
    duplicates: list[Strip] = field(default_factory=list)
    thumbnails: dict[str, Picture] = field(default_factory=dict)  # image name -> what was asked about
    gallery: int = 0  # images that were compared with each other
    embed_dim: int | None = None
    class_token: bool = True
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Images of a source: their places in it, decoded (H, W, C) uint8, and as the encoder wants them (B, C, S, S)."""

    source: Source
    places: list[int]
    decoded: list[np.ndarray]
    images: Tensor

    def name(self, index: int) -> str:
        """What the source calls image `index` of the sample."""
        return printable(self.source.name(self.places[index]))

    def __len__(self) -> int:
        return len(self.places)


def make_pictures(record: RunRecord, asked: Sequence[str] = ()) -> Pictures:
    """Pictures for the page of a run; `asked` names images of the validation pairs that the page shows."""
    pictures = Pictures()
    subject = encoder_and_data(record)
    if subject is not None:
        spec, data = subject
        try:
            encoder = load_encoder(spec)
        except DATA_ERRORS as error:
            pictures.missing["encoder"] = f"No pictures: the encoder cannot be opened ({one_line(error)})."
        else:
            _describe(encoder, pictures)
            _look(encoder, data, record, pictures)
    if asked:
        _thumbnails(record, asked, pictures)
    return pictures


def encoder_and_data(record: RunRecord) -> tuple[str, str] | None:
    """The encoder a run is about and the images to look at it with; None when neither is named."""
    pretrain, evaluate, align = (record.config(verb) for verb in ("pretrain", "evaluate", "align"))
    if pretrain.get("data") and (record.path / "checkpoints").is_dir():
        return str(record.path), str(pretrain["data"])
    if evaluate.get("encoder") and evaluate.get("val_dataset"):
        return str(evaluate["encoder"]), str(evaluate["val_dataset"])
    if align.get("encoder") and align.get("data"):
        return str(align["encoder"]), str(align["data"])
    return None


def _describe(encoder: LoadedEncoder, pictures: Pictures) -> None:
    module, size = encoder.module, "x".join(map(str, dict.fromkeys(encoder.preprocessing.size)))
    millions = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    pictures.embed_dim, pictures.class_token = module.embed_dim, module.cls_token is not None
    pictures.facts["encoder"] = (
        f"{encoder.architecture.name}, width {module.embed_dim}, {len(module.blocks)} blocks, "
        f"{millions:.1f} M parameters, patches of {module.patch_embed.patch_size[0]} px at {size} px"
        + ("" if encoder.step is None else f", as of step {encoder.step:,}")
    )


def _look(encoder: LoadedEncoder, data: str, record: RunRecord, pictures: Pictures) -> None:
    """Everything that needs images, from one sample of them."""
    try:
        source = open_source(data)
        most = max(NUM_COLOURED, NUM_RECONSTRUCTED, NUM_CROPPED, NUM_ATTENDED)
        sample = draw_sample(source, encoder, choose_indices(len(source), 2 * most, SEED), most)
    except DATA_ERRORS as error:
        pictures.missing["data"] = f"No pictures: the images of {data} cannot be opened any more ({one_line(error)})."
        return
    if not len(sample):
        pictures.missing["data"] = f"No pictures: none of the images of {data} that were tried can be read."
        return
    config = pretrain_config(record)
    if config is not None and encoder.step is not None:
        pictures.crops = crop_strips(sample, config)
        try:
            opened = open_mae(checkpoint_path(record.path / "checkpoints", encoder.step), config)
        except DATA_ERRORS as error:
            pictures.missing["reconstructions"] = f"No reconstructions: {one_line(error)}."
        else:
            pictures.reconstructions = [] if opened is None else reconstruction_strips(sample, *opened, encoder)
    try:
        pictures.attention = attention_strips(sample, encoder)
    except InputError as error:
        pictures.missing["attention"] = f"No attention maps: {one_line(error)}."
    pictures.colours = colour_strips(sample, encoder)
    try:
        gallery = open_gallery(source, encoder)
        if gallery is not None:
            pictures.gallery = len(gallery.sample)
            pictures.neighbours, pictures.worst = neighbour_strips(gallery), worst_strips(gallery)
            pictures.duplicates = duplicate_strips(gallery)
    except DATA_ERRORS as error:
        pictures.missing["neighbours"] = f"No neighbours: {one_line(error)}."


def pretrain_config(record: RunRecord) -> PretrainConfig | None:
    """The resolved config of the pretraining in this folder, None without one that this version understands."""
    if "pretrain" not in record.verbs or not record.verbs["pretrain"].resolved_text:
        return None
    try:
        return load_config(PretrainConfig, record.verbs["pretrain"].folder / "resolved.yaml")
    except InputError:
        return None


def draw_sample(source: Source, encoder: LoadedEncoder, places: Sequence[int] | np.ndarray, at_most: int) -> Sample:
    """The first `at_most` of the images at `places` that can be read."""
    kept: list[int] = []
    decoded: list[np.ndarray] = []
    images: list[Tensor] = []
    for place in np.asarray(places).tolist():
        if len(kept) == at_most:
            break
        try:
            how = encoder.preprocessing
            image = decode(source.read(place), channels=how.channels, value_range=how.value_range)
        except (BadImage, OSError):
            continue
        kept.append(place)
        decoded.append(image)
        images.append(eval_transform(image, encoder.preprocessing))
    return Sample(source, kept, decoded, torch.stack(images) if images else torch.empty(0))


def normal(images: Tensor, encoder: LoadedEncoder) -> Tensor:
    """uint8 (B, C, H, W) as the encoder reads them."""
    return normalize(images, encoder.preprocessing.mean, encoder.preprocessing.std)


def crop_strips(sample: Sample, config: PretrainConfig) -> list[Strip]:
    """Each image, then its global and local views with colours as in training (epoch 0)."""
    strips = []
    size = config.encoder.size
    for i in range(min(NUM_CROPPED, len(sample))):
        image = shrunk(sample.decoded[i], min_side(config.crops, size))
        views = make_views(image, config.crops, size, config.photometry, config.seed, 0, sample.places[i])
        others = []
        for kind, crops, rows in (
            ("global", views.global_crops, views.global_photometry),
            ("local", views.local_crops[:NUM_LOCAL_SHOWN], views.local_photometry[:NUM_LOCAL_SHOWN]),
        ):
            if len(crops):
                channels = crops.shape[1]
                coloured = apply(crops, rows, (0.0,) * channels, (1.0,) * channels).mul(255).round().to(torch.uint8)
                name = sample.name(i)
                others += [Picture(p, f"{kind} view of {name}", kind) for p in as_pictures(coloured)]
        strips.append(Strip(Picture(rgb(image), f"image {sample.name(i)}", "image"), others))
    return strips


def shrunk(image: np.ndarray, shorter: int) -> np.ndarray:
    """A large image at half, a third, ... of its size, by leaving out pixels, with a side of at least `shorter`."""
    stride = max(1, min(image.shape[:2]) // max(1, 2 * shorter))
    return np.ascontiguousarray(image[::stride, ::stride])


@torch.no_grad()
def attention_strips(sample: Sample, encoder: LoadedEncoder) -> list[Strip]:
    """Each image, where its class token looks on average over the heads, then head by head."""
    images = sample.images[:NUM_ATTENDED]
    maps = class_attention_maps(encoder.module, normal(images, encoder)).float().numpy()  # (B, heads, rows, columns)
    strips = []
    for i, picture in enumerate(as_pictures(images)):
        name = sample.name(i)
        mean = Picture(heat(maps[i].mean(axis=0)), f"mean attention over {name}", "mean", map=True)
        heads = [
            Picture(heat(one), f"attention of head {h + 1} over {name}", f"head {h + 1}", map=True)
            for h, one in enumerate(maps[i][:NUM_HEADS_SHOWN])
        ]
        strips.append(Strip(Picture(picture, f"image {name}", "image"), [mean, *heads]))
    return strips


# Anchors of the heat scale: dark violet over rose to pale yellow, of even rise in lightness.
HEAT = np.array([(18, 14, 38), (74, 30, 106), (146, 48, 118), (216, 82, 92), (248, 150, 94), (252, 236, 180)])


def heat(values: np.ndarray) -> np.ndarray:
    """A map (rows, columns) as colours (rows, columns, 3) uint8, from its least to its largest value."""
    low, high = float(values.min()), float(values.max())
    share = (values - low) / (high - low) if high > low else np.zeros_like(values)
    at = np.linspace(0, 1, len(HEAT))
    return np.rint(np.stack([np.interp(share, at, HEAT[:, c]) for c in range(3)], axis=-1)).astype(np.uint8)


@torch.no_grad()
def colour_strips(sample: Sample, encoder: LoadedEncoder) -> list[Strip]:
    """Each image beside its patch features as colours."""
    images = sample.images[:NUM_COLOURED]
    patches = forward_tokens(encoder.module, normal(images, encoder)).patches.float().numpy()
    maps = patch_colours(patches, patch_grid(encoder.module, (images.shape[2], images.shape[3])))
    return [
        Strip(
            Picture(picture, f"image {sample.name(i)}"),
            [Picture(maps[i], f"patch features of {sample.name(i)} as colours", map=True)],
        )
        for i, picture in enumerate(as_pictures(images))
    ]


def reconstruction_strips(sample: Sample, student: VisionTransformer, mae: Mae, encoder: LoadedEncoder) -> list[Strip]:
    """Each image, what the student saw of it, and the decoder's guess."""
    images = sample.images[:NUM_RECONSTRUCTED]
    visible, guessed = (as_pictures(p) for p in reconstruct(student, mae, images, encoder.preprocessing, SEED))
    return [
        Strip(
            Picture(picture, f"image {sample.name(i)}"),
            [
                Picture(visible[i], f"visible patches of {sample.name(i)}"),
                Picture(guessed[i], f"reconstruction of {sample.name(i)}"),
            ],
        )
        for i, picture in enumerate(as_pictures(images))
    ]


@dataclass(frozen=True)
class Gallery:
    """Images that are compared with each other; features: their class tokens (n, D)."""

    sample: Sample
    features: np.ndarray

    def strip(self, query: int, others: Sequence[tuple[int, str]], words: str, role: str) -> Strip:
        """Image `query` under `words`, then others under theirs; role: what the others are to it."""
        labels = Labels(self.sample.source.labels, self.sample.source.class_names)

        def picture(index: int, said: str, alt: str) -> Picture:
            caption = " · ".join(part for part in (said, labels(self.sample.places[index])) if part)
            return Picture(as_pictures(self.sample.images[index : index + 1])[0], alt, caption)

        name = self.sample.name(query)
        found = [
            picture(i, said, f"{role} {n + 1} of {name}: {self.sample.name(i)}") for n, (i, said) in enumerate(others)
        ]
        return Strip(picture(query, words, f"query: {name}"), found)


@torch.no_grad()
def open_gallery(source: Source, encoder: LoadedEncoder) -> Gallery | None:
    """As many images of a source as a few seconds allow, with their features; None for fewer than two."""
    places = np.random.default_rng(SEED).permutation(len(source))[: GALLERY[1]]
    samples: list[Sample] = []
    features: list[np.ndarray] = []
    began, seen = time.monotonic(), 0
    for start in range(0, len(places), BATCH):
        if seen >= GALLERY[0] and time.monotonic() - began > GALLERY_SECONDS:
            break
        part = draw_sample(source, encoder, places[start : start + BATCH], BATCH)
        if len(part):
            samples.append(part)
            features.append(forward_tokens(encoder.module, normal(part.images, encoder)).cls.float().numpy())
            seen += len(part)
    if seen < 2:
        return None
    images = torch.cat([part.images for part in samples])
    return Gallery(
        Sample(source, [place for part in samples for place in part.places], [], images), np.concatenate(features)
    )


def neighbour_strips(gallery: Gallery) -> list[Strip]:
    """Some images with those most like them by class token."""
    similarities, index = most_alike(gallery.features, NUM_NEIGHBOURS)
    return [
        gallery.strip(query, _with_cosines(index[query], similarities[query]), "", "neighbour")
        for query in range(min(NUM_QUERIES, len(index)))
    ]


def worst_strips(gallery: Gallery) -> list[Strip]:
    """The images whose neighbours vote most surely for another class, and those neighbours; for the first label."""
    source = gallery.sample.source
    readable = {name: as_classes(values) for name, values in source.labels.items()}
    classes = (name for name, values in readable.items() if values.ndim == 1 and values.dtype.kind == "i")
    label = next(classes, None)
    if label is None:
        return []
    found = misplaced(gallery.features, readable[label][gallery.sample.places])[:NUM_WORST]
    if not found:
        return []
    names = Labels({label: np.array([one.said for one in found])}, source.class_names)
    similarities, index = most_alike(gallery.features, NUM_NEIGHBOURS)
    return [
        gallery.strip(
            one.row,
            _with_cosines(index[one.row], similarities[one.row]),
            f"neighbours say {names(number)} ({one.share:.0%})",
            "voter",
        )
        for number, one in enumerate(found)
    ]


def duplicate_strips(gallery: Gallery) -> list[Strip]:
    """Pairs of images that show the same picture."""
    pairs = repeated(gallery.features, gallery.sample.images)[:NUM_DUPLICATES]
    return [gallery.strip(p.row, [(p.other, f"{p.concordance:.3f}")], "", "near-duplicate") for p in pairs]


def _with_cosines(index: np.ndarray, similarities: np.ndarray) -> list[tuple[int, str]]:
    return [(int(i), f"{s:.2f}") for i, s in zip(index, similarities, strict=True)]


@dataclass(frozen=True)
class Labels:
    """The labels of a source, in words."""

    values: dict[str, np.ndarray]
    names: dict[str, list[str]]

    def __call__(self, place: int) -> str:
        """Those of one image; "" where none is known."""
        said = []
        for label, values in self.values.items():
            value, names = values[place], self.names.get(label)
            if np.ndim(value) == 1:
                there = np.flatnonzero(value > 0).tolist()
                said.append(" ".join(str(names[i]) if names else str(i) for i in there))
            elif value >= 0:
                name = str(names[int(value)]) if names and value < len(names) else f"{value:g}"
                said.append(f"{label} {name}" if name.replace(".", "").isdigit() else name)
        return printable(", ".join(filter(None, said)))[:60]


def _thumbnails(record: RunRecord, asked: Sequence[str], pictures: Pictures) -> None:
    """The images that questions were asked about, read again from the pairs by their names."""
    spec = pairs_spec(record)
    if spec is None:
        pictures.missing["asked"] = "No images: the run does not name the pairs it was asked about."
        return
    try:
        source = open_source(spec)
    except DATA_ERRORS as error:
        pictures.missing["asked"] = f"No images: {spec} cannot be opened any more ({one_line(error)})."
        return
    wanted = set(asked)
    for place in range(len(source)):
        name = source.name(place)
        if name in wanted:
            wanted.discard(name)
            with contextlib.suppress(*DATA_ERRORS):
                pictures.thumbnails[name] = thumbnail(source, place)
        if not wanted:
            return


def thumbnail(source: Source, place: int) -> Picture:
    """One image, not much larger than the page shows it; raises BadImage or OSError."""
    pixels = shrunk(decode(source.read(place), channels=None, min_side=2 * THUMBNAIL), THUMBNAIL)
    return Picture(rgb(pixels), f"image {printable(source.name(place))}")


def pairs_spec(record: RunRecord) -> str | None:
    """Where the questions' images come from: as the row of their accuracy says, else as the config says."""
    rows: list[dict[str, Any]] = [r for r in record.results if r["name"].startswith(("vlm/", "caption/"))]
    align = record.config("align")
    specs = [*(row.get("data") for row in rows), align.get("val_data"), align.get("data")]
    return next((str(spec) for spec in specs if spec), None)


def as_pictures(images: Tensor) -> list[np.ndarray]:
    """uint8 (B, C, H, W) to (H, W, 3) each."""
    return [rgb(image.permute(1, 2, 0).numpy()) for image in images]


def rgb(image: np.ndarray) -> np.ndarray:
    """(H, W, C) to (H, W, 3): one channel, or the first of two, as grey; of more than three the first three."""
    shown = image[:, :, :3] if image.shape[2] >= 3 else np.repeat(image[:, :, :1], 3, axis=2)
    return np.ascontiguousarray(shown)


def printable(text: str) -> str:
    """Text without the surrogates that stand for bytes which are no UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def one_line(error: BaseException) -> str:
    """The first line of an error, for a sentence."""
    lines = str(error).strip().splitlines()
    return printable(lines[0] if lines else type(error).__name__).rstrip(".")
