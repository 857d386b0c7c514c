"""Every form of encoder in every export format, opened by every library it is for, at two versions of each library.

    python benchmarks/formats.py [--python PYTHON ...] [--quick] [--json FILE] [--docs docs/formats.md]

Small random encoders whose every weight matters: exactness does not depend on size. A cell is written as `sslvit
export` writes it, reopened in a fresh process of each PYTHON (this one, and `.venv-oldest`'s, where `make beside` puts
the oldest libraries), and compared with the encoder in memory. Its value is the largest absolute difference of tokens
and features; what is not exact is refused, and the reason is the result. --docs writes the tables into that page.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from sslvit.data.decode import BadFiles
from sslvit.data.pairs import open_pairs, text_corpus
from sslvit.encoder.architecture import Architecture
from sslvit.encoder.config import EncoderConfig, Preprocessing
from sslvit.encoder.vit import model_args
from sslvit.encoder.weights import LoadedEncoder
from sslvit.errors import InputError
from sslvit.exports.formats import FORMATS, checks_of, write_folder
from sslvit.exports.hf_folder import hf_state
from sslvit.exports.llava_folder import Writing, check_llava, write_llava_folder
from sslvit.exports.verify import Check, Opened, VerificationError, compare, make_inputs, reopened
from sslvit.run_folder import write_atomically
from sslvit.vlm.batches import PairImages
from sslvit.vlm.chat import Chat
from sslvit.vlm.config import LanguageConfig
from sslvit.vlm.connectors import MlpConnector
from sslvit.vlm.folder import compare_with_folder
from sslvit.vlm.language import bundled_language, language_tensors, train_tokenizer
from sslvit.vlm.model import VisionLanguage

ROOT = Path(__file__).parents[1]
OLDEST = ROOT / ".venv-oldest" / "bin" / "python"
QUICK = ("ours", "twin")
TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2}
PLAIN = {**TINY, "img_size": 32, "patch_size": 8, "dynamic_img_size": True}
DINOV3 = {"img_size": 32, "patch_size": 8, "dynamic_img_size": True, **TINY}
#: name -> (what it is, timm's name, timm's arguments)
FORMS: dict[str, tuple[str, str, dict]] = {
    "ours": (
        "class token, 4 registers (the default)",
        "vit_tiny_patch16_224",
        model_args(EncoderConfig("", 8, 32, True, 4, 3, **TINY)),
    ),
    "twin": (
        "no class token, no registers (the second form)",
        "vit_tiny_patch16_224",
        model_args(EncoderConfig("", 8, 32, False, 0, 3, **TINY)),
    ),
    "no_registers": (
        "class token, LayerScale",
        "vit_tiny_patch16_224",
        model_args(EncoderConfig("", 8, 32, True, 0, 3, **TINY)),
    ),
    "original": ("the original ViT", "vit_tiny_patch16_224", PLAIN),
    "class_positions": ("registers and positions for all tokens", "vit_tiny_patch16_224", {**PLAIN, "reg_tokens": 4}),
    "grey": (
        "the default on 1 channel",
        "vit_tiny_patch16_224",
        model_args(EncoderConfig("", 8, 32, True, 4, 1, **TINY)),
    ),
    "five_channels": (
        "the default on 5 channels",
        "vit_tiny_patch16_224",
        model_args(EncoderConfig("", 8, 32, True, 4, 5, **TINY)),
    ),
    "non_square": ("images of 32 x 48 px", "vit_tiny_patch16_224", {**PLAIN, "img_size": [32, 48]}),
    "qk_norm": ("normalised queries and keys", "vit_tiny_patch16_224", {**PLAIN, "qk_norm": True}),
    "rope": ("rotary positions (DINOv3)", "vit_small_patch16_dinov3", DINOV3),
}
PAIRS = "scenes:?n=8&size=32"
VLM = "llava"  # the column of the vision-language folder


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 1 when a cell that should be exact is not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", help="interpreters to reopen with; default this one and .venv-oldest's")
    parser.add_argument("--quick", action="store_true", help=f"only the forms {' and '.join(QUICK)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rows, in the form of results.json")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="write the tables between its markers")
    options = parser.parse_args(arguments)
    pythons = options.python or [sys.executable, *([str(OLDEST)] if OLDEST.exists() else [])]
    rows = measure(QUICK if options.quick else tuple(FORMS), pythons)
    print(tables(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.json, json.dumps(rows, indent=1) + "\n")
    if options.docs:
        write_atomically(options.docs, with_tables(options.docs.read_text(encoding="utf-8"), rows))
    return int(any("failed" in row for row in rows))


# ---- measuring ------------------------------------------------------------------------------------------------------


def encoder(form: str) -> LoadedEncoder:
    """An encoder whose every weight matters, with a mean and std of its own."""
    architecture = Architecture(*FORMS[form][1:])
    module = architecture.build(0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    channels = module.patch_embed.proj.in_channels
    mean, std = (0.1, 0.25, 0.4, 0.5, 0.6)[:channels], (0.3, 0.5, 0.7, 0.8, 0.9)[:channels]
    height, width = module.patch_embed.img_size
    preprocessing = Preprocessing(height, mean, std, image_width=None if width == height else width)
    return LoadedEncoder(module, architecture, preprocessing, form)


def measure(forms: tuple[str, ...], pythons: list[str], formats: tuple[str, ...] = (*FORMATS, VLM)) -> list[dict]:
    """All rows: one per form, format, library, version and image size, or one with the reason of a refusal."""
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as work:
        loaded = {form: encoder(form) for form in forms}
        written: list[tuple[str, str, Check]] = []
        for form in forms:
            for name in (name for name in FORMATS if name in formats):
                try:
                    written += [(form, name, check) for check in _write(loaded[form], name, Path(work) / form / name)]
                except InputError as error:
                    rows.append(_row(form, name, refused=str(error)))
        for python in pythons:
            rows += _opened_rows(loaded, written, python)
        if VLM in formats:
            for form in forms:
                rows += _vlm_rows(form, loaded[form], Path(work) / form / VLM, pythons)
    return rows


def _write(loaded: LoadedEncoder, name: str, folder: Path) -> list[Check]:
    FORMATS[name].check(loaded)
    folder.mkdir(parents=True)
    write_folder(loaded, name, folder)
    return checks_of(loaded, name, folder)


def _opened_rows(
    loaded: Mapping[str, LoadedEncoder], written: list[tuple[str, str, Check]], python: str
) -> Iterator[dict]:
    """Each library opens all of its folders in one process of `python`."""
    inputs = {form: make_inputs(one) for form, one in loaded.items()}
    for library in dict.fromkeys(check.library for _, _, check in written):
        cells = [cell for cell in written if cell[2].library == library]
        print(f"{library} in {python}: {len(cells)} folders", flush=True)
        opened = reopened([(inputs[form], [check]) for form, _, check in cells], python)
        for (form, name, check), (found,) in zip(cells, opened, strict=True):
            yield from _compared(loaded[form], inputs[form], form, name, check, found)


def _compared(loaded: LoadedEncoder, inputs: dict, form: str, name: str, check: Check, found: Opened) -> Iterator[dict]:
    version = found[1].get("version")
    try:
        report = compare(loaded, inputs, check, *found)
    except VerificationError as error:
        yield _row(form, name, check.library, version, failed=str(error))
        return
    for size, difference in report["max_difference"].items():
        yield _row(form, name, check.library, version, f"at {size}", value=difference)


def _vlm_rows(form: str, loaded: LoadedEncoder, folder: Path, pythons: list[str]) -> Iterator[dict]:
    """The encoder in a vision-language folder, with an untrained connector and language model."""
    try:
        check_llava(loaded)
    except InputError as error:
        yield _row(form, VLM, refused=str(error))
        return
    folder.mkdir(parents=True)
    model, chat = write_untrained_vlm(loaded, folder)
    images = PairImages(open_pairs(PAIRS), loaded.preprocessing, BadFiles(folder.parent / "bad_files.jsonl"))
    for python in pythons:
        try:
            report = compare_with_folder(model, chat, folder, images, python)
        except RuntimeError as error:
            yield _row(form, VLM, "transformers", failed=" ".join(str(error).split()))
            continue
        for what, difference in report["max_difference"].items():
            yield _row(form, VLM, "transformers", report["version"], what, value=difference)


def write_untrained_vlm(loaded: LoadedEncoder, folder: Path) -> tuple[VisionLanguage, Chat]:
    """Fill `folder` with the encoder, a random connector and a random language model; what is in memory, too."""
    settings = LanguageConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_length=128)
    language = bundled_language(train_tokenizer(text_corpus(open_pairs(PAIRS), 200), 400), settings, 0)
    connector = MlpConnector(loaded.module.num_features, settings.hidden_size, 0)
    chat = language.chat
    write_llava_folder(
        folder,
        vision=hf_state(loaded.module),
        connector=connector.state_dict(),
        language=(language.lm.config.to_dict(), language_tensors(language.lm)),
        writing=Writing(chat.tokenizer, chat.template(), chat.image_id, chat.end_id, chat.pad_id),
        preprocessing=loaded.preprocessing,
    )
    return VisionLanguage(loaded.module, connector, language.lm, chat.before_image()), chat


def _row(form: str, name: str, library: str = "", version: str | None = None, what: str = "", **result: object) -> dict:
    """One row; `result` is its value, or why there is none (`refused`, `failed`)."""
    parts = [form, name, *filter(None, [f"{library} {version or ''}".strip(), what])]
    facts = {"ci95": None, "protocol": f"largest absolute difference {what}".strip(), "data": "random images"}
    kept = {"form": form, "format": name, "library": library, "version": version}
    return {"name": "/".join(["formats", *parts]), "value": None, **facts, "seed": 0, "step": None, **kept, **result}


# ---- showing --------------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- tables of benchmarks/formats.py -->", "<!-- end of tables -->"


def with_tables(page: str, rows: list[dict]) -> str:
    """The page with the tables of these rows between its markers."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables(rows)}\n{END}{rest.partition(END)[2]}"


def tables(rows: list[dict]) -> str:
    """Forms by formats, then formats by versions of libraries, then why a cell is empty."""
    forms = [form for form in FORMS if any(row["form"] == form for row in rows)]
    formats = [name for name in (*FORMATS, VLM) if any(row["format"] == name for row in rows)]
    lines = [f"| encoder | {' | '.join(formats)} |", "|---" * (len(formats) + 1) + "|"]
    for form in forms:
        cells = [_cell([row for row in rows if (row["form"], row["format"]) == (form, name)]) for name in formats]
        lines.append(f"| {FORMS[form][0]} | {' | '.join(cells)} |")
    opened = sorted({(row["library"], row["version"]) for row in rows if row["version"]})
    lines += ["", f"| opened by | {' | '.join(formats)} |", "|---" * (len(formats) + 1) + "|"]
    for library, version in opened:
        own = [row for row in rows if (row["library"], row["version"]) == (library, version)]
        cells = [_cell([row for row in own if row["format"] == name]) for name in formats]
        lines.append(f"| {library} {version} | {' | '.join(cells)} |")
    lines += ["", "| format | not for | because |", "|---|---|---|"]
    for (name, reason), refused in _refused(rows).items():
        others = [form for form in forms if form not in refused]
        which = f"all but: {_names(others)}" if len(refused) > len(FORMS) // 2 else _names(refused)
        lines.append(f"| {name} | {which} | {reason} |")
    return "\n".join(lines) + "\n"


def _refused(rows: list[dict]) -> dict[tuple[str, str], list[str]]:
    """(format, reason without its remedy) -> the forms it is true of."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if reason := row.get("refused"):
            for known in (f"{row['form']}: ", f"{row['format']}: ", "a vision-language folder cannot hold it; "):
                reason = reason.removeprefix(known)
            found.setdefault((row["format"], reason.partition("; ")[0]), []).append(row["form"])
    return found


def _names(forms: list[str]) -> str:
    return "; ".join(FORMS[form][0] for form in forms)


def _cell(rows: list[dict]) -> str:
    if failed := [row for row in rows if "failed" in row]:
        return f"**differs** ({len(failed)})"
    values = [row["value"] for row in rows if row["value"] is not None]
    if not values:
        return "refused" if any("refused" in row for row in rows) else ""
    return "0" if max(values) == 0 else f"{max(values):.0e}"


if __name__ == "__main__":
    if importlib.util.find_spec("transformers") is None:
        sys.exit("transformers is not installed; pip install 'sslvit[vlm,openclip,onnx]'")
    sys.exit(main())
