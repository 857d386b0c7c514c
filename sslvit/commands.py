"""The command line of each verb: words -> what to call with which arguments. Imports no torch and runs nothing.

`cli.py` carries a command out here and now, `verbs/submit.py` as a job; both read it with `parse`, so that a wrong
word, key or file is found before anything heavy is imported or queued.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from sslvit.config import (
    AlignConfig,
    EmbedConfig,
    EvaluateConfig,
    PretrainConfig,
    as_dict,
    check_config,
    load_config,
    parse_overrides,
)
from sslvit.errors import EXIT_BUG, EXIT_INPUT, EXIT_RESUMABLE, InputError, Resumable
from sslvit.run_folder import default_output_dir, is_disk_full

EXPORT_FORMATS = ("timm", "hf", "siglip", "open_clip", "onnx", "safetensors")
EXPORT_KEYS = ("data_name", "push")
EMBED_KEYS = ("batch_size", "device", "precision", "num_workers")
PRETRAIN_DEFAULT = "pretrain/auto"

#: The extra of setup.cfg that brings an optional package.
EXTRAS = {
    "transformers": "vlm",
    "tokenizers": "vlm",
    "peft": "vlm",
    "matplotlib": "report",
    "tensorboard": "report",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "open_clip": "openclip",
    "fsspec": "remote",
}


class JobFailed(RuntimeError):
    """A submitted job ended with a bug; its traceback is in its own output."""


@dataclass(frozen=True)
class Command:
    """A checked command: `sslvit.VERB(*positional, **arguments)`. output_dir: where its or its job's files go."""

    verb: str
    positional: tuple[Any, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    output_dir: Path | None = None


@dataclass(frozen=True)
class Verb:
    """One verb of the command line: how it is written, what it does, its options, and how they become a Command."""

    usage: str
    summary: str
    options: Callable[[argparse.ArgumentParser], None]
    command: Callable[[argparse.Namespace], Command]
    schema: type | None = None


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are ours: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError instead of printing the usage."""
        raise InputError(f"{message}; see {self.prog} --help")


def parse(words: Sequence[str]) -> Command:
    """`["pretrain", "data=scenes:", "steps=3"]` -> a checked Command. InputError when anything in it is wrong."""
    name = verb_named(words[0] if words else "")
    parser = make_parser(name)
    own, rest = _split_at_verb(parser, words[1:]) if name == "submit" else (list(words[1:]), [])
    options, unknown = parser.parse_known_intermixed_args(own)
    if name == "submit":
        options.verb_args = rest
    if unknown:
        known = [text for action in parser._actions for text in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        raise InputError(
            f"unknown option {unknown[0]}{f'; nearest: {close[0]}' if close else f'; see {parser.prog} --help'}"
        )
    return VERBS[name].command(options)


def explain(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the one line of an ending that needs no traceback here; None for everything else."""
    if isinstance(error, InputError):
        return EXIT_INPUT, " ".join(str(error).split())
    if isinstance(error, Resumable):
        return EXIT_RESUMABLE, " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return EXIT_RESUMABLE, "interrupted; the same command goes on from the last checkpoint"
    if isinstance(error, JobFailed):
        return EXIT_BUG, " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").partition(".")[0])):
        return EXIT_INPUT, f"{error.name} is not installed; pip install 'sslvit[{extra}]'"
    if is_disk_full(error):
        return EXIT_RESUMABLE, f"{' '.join(str(error).split())}; make room and give the same command again"
    return None


def _split_at_verb(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of submit, and the command behind them: everything from the first word that is no option or value."""
    with_value = {text for action in parser._actions if action.nargs != 0 for text in action.option_strings}
    position = 0
    while position < len(words) and words[position].startswith("-"):
        position += 2 if words[position] in with_value else 1
    return list(words[:position]), list(words[position:])


def verb_named(name: str) -> str:
    """The name itself if it is a verb; InputError with the nearest one otherwise."""
    if name in VERBS:
        return name
    close = difflib.get_close_matches(name, list(VERBS), n=1)
    raise InputError(f"unknown verb {name!r}; {f'nearest: {close[0]}' if close else 'see sslvit --help'}")


def make_parser(name: str) -> OneLineParser:
    """The parser of one verb, its help included."""
    verb = VERBS[name]
    parser = OneLineParser(
        prog=f"sslvit {name}",
        usage=verb.usage,
        description=verb.summary,
        epilog=None if verb.schema is None else _key_list(verb.schema),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.options(parser)
    return parser


def _key_list(schema: type) -> str:
    lines = ["keys and their defaults (null: switched off; auto: resolved from the data):"]

    def walk(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                shown = "auto" if value is None else str(value).lower() if isinstance(value, bool) else value
                lines.append(f"  {prefix}{key}={shown}")

    walk(as_dict(schema()), "")
    switches = [name for name, hint in schema.__annotations__.items() if "Config | None" in str(hint)]
    return "\n".join(
        line if line[2:].split("=")[0] not in switches else line.replace("=auto", "=null") for line in lines
    )


# ---- options and commands, verb by verb -----------------------------------------------------------------------------


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", metavar="C", help="a YAML file, or a shipped name such as pretrain/tiny_cpu")
    parser.add_argument("--output-dir", metavar="OUT", help="the run folder; default runs/VERB-NAME")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="any key below, e.g. optim.lr=1e-4")


def _pretrain_options(parser: argparse.ArgumentParser) -> None:
    _config_options(parser)
    parser.add_argument("--explain", action="store_true", help="print every value of the recipe and why; train nothing")


def _pretrain_command(options: argparse.Namespace) -> Command:
    loose = [word for word in options.keys if "=" not in word]
    if loose:
        raise InputError(f"{loose[0]!r} is not of the form key=value; for images write data={loose[0]}")
    keys = parse_overrides(PretrainConfig, options.keys)
    config = load_config(PretrainConfig, options.config_file, keys, default=PRETRAIN_DEFAULT)
    check_config(config)
    output_dir = options.output_dir or default_output_dir("pretrain", options.config_file, config.data)
    return _with_config("pretrain", options, keys | ({"explain": True} if options.explain else {}), output_dir)


def _align_command(options: argparse.Namespace) -> Command:
    keys = parse_overrides(AlignConfig, options.keys)
    config = load_config(AlignConfig, options.config_file, keys)
    check_config(config)
    output_dir = options.output_dir or default_output_dir("align", options.config_file, config.encoder, config.data)
    return _with_config("align", options, keys, output_dir)


def _with_config(verb: str, options: argparse.Namespace, keys: dict[str, Any], output_dir: str | Path) -> Command:
    arguments = {"config_file": options.config_file, "output_dir": str(output_dir), **keys}
    return Command(verb, (), arguments, Path(output_dir))


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoder", "--pretrained-weights", metavar="E", help="a run, folder, timm or hub name, or file"
    )
    parser.add_argument("--train-dataset", metavar="SPEC")
    parser.add_argument("--val-dataset", metavar="SPEC")
    parser.add_argument("--protocol", metavar="NAMES", help="knn,linear,logreg,...")
    _config_options(parser)


def _evaluate_command(options: argparse.Namespace) -> Command:
    keys = parse_overrides(EvaluateConfig, options.keys)
    for name in ("encoder", "train_dataset", "val_dataset", "protocol"):
        if getattr(options, name) is not None:
            keys |= parse_overrides(EvaluateConfig, [f"{name}={getattr(options, name)}"])
    config = load_config(EvaluateConfig, options.config_file, keys)
    check_config(config)
    keys |= {"encoder": config.encoder, "train_dataset": config.train_dataset, "val_dataset": config.val_dataset}
    return _with_config("evaluate", options, keys, options.output_dir or default_output_dir("evaluate", config.encoder))


def _embed_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoder", "--pretrained-weights", metavar="E", required=True)
    parser.add_argument("--data", metavar="SPEC", required=True)
    parser.add_argument("--output-file", metavar="F", required=True, help="F.npz or F.parquet")
    parser.add_argument("--index", action="store_true", help="also F.faiss: an index of the unit-length features")
    parser.add_argument("keys", nargs="*", metavar="key=value", help=", ".join(EMBED_KEYS))


def _embed_command(options: argparse.Namespace) -> Command:
    for text in options.keys:
        if text.partition("=")[0] not in EMBED_KEYS:
            raise InputError(f"unknown key {text.partition('=')[0]!r}; embed knows {', '.join(EMBED_KEYS)}")
    if Path(options.output_file).suffix not in (".npz", ".parquet"):
        raise InputError(f"--output-file {options.output_file} must end in .npz or .parquet")
    given = {"encoder": options.encoder, "data": options.data, "output_file": options.output_file}
    given |= {"index": True} if options.index else {}
    given |= parse_overrides(EmbedConfig, options.keys)
    check_config(load_config(EmbedConfig, None, given))
    return Command("embed", (), given, default_output_dir("embed", options.encoder, options.data))


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run, RUN@best or RUN@step_N")
    parser.add_argument("--output-dir", metavar="OUT", required=True, help="each format goes into OUT/FORMAT/")
    parser.add_argument("--formats", default="timm,hf", metavar="NAMES", help=",".join(EXPORT_FORMATS) + " | all")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="data_name=TEXT for the cards | push=ORG/NAME")


def _export_command(options: argparse.Namespace) -> Command:
    formats = tuple(part.strip() for part in options.formats.split(",") if part.strip())
    for name in formats:
        if name not in (*EXPORT_FORMATS, "all"):
            raise InputError(f"unknown format {name!r}; there are {', '.join(EXPORT_FORMATS)}, all")
    arguments = {"output_dir": options.output_dir, "formats": formats}
    for text in options.keys:
        key, equals, value = text.partition("=")
        if key not in EXPORT_KEYS or not equals or not value:
            raise InputError(f"unknown key {text!r}; export knows {', '.join(f'{key}=' for key in EXPORT_KEYS)}")
        arguments[key] = value
    return Command("export", (options.run,), arguments, Path(options.output_dir))


def _ask_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vlm", metavar="VLM", help="a VLM folder, or the run that holds one")
    parser.add_argument("--image", metavar="I")
    parser.add_argument("--question", metavar="Q")
    parser.add_argument("--jsonl", metavar="IN", help="rows with image and question")
    parser.add_argument("--output-file", metavar="OUT", help="the rows with their predictions")


def _ask_command(options: argparse.Namespace) -> Command:
    one, many = (options.image, options.question), (options.jsonl, options.output_file)
    if not (all(one) and not any(many)) and not (all(many) and not any(one)):
        raise InputError("give --image and --question, or --jsonl and --output-file")
    arguments = {name: value for name, value in vars(options).items() if name != "vlm" and value is not None}
    return Command("ask", (options.vlm,), arguments, default_output_dir("ask", options.vlm))


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vlm", metavar="VLM", help="a VLM folder, or the run that holds one")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)


def _serve_command(options: argparse.Namespace) -> Command:
    if not 0 <= options.port < 65536:
        raise InputError(f"--port {options.port} is no port; ports are 0 to 65535")
    arguments = {"host": options.host, "port": options.port}
    return Command("serve", (options.vlm,), arguments, default_output_dir("serve", options.vlm))


def _submit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--launch", metavar="L", help="local, slurm, or a YAML file like launch/slurm.yaml")
    parser.add_argument(
        "--sweep", metavar="k=v1,v2", action="append", default=[], help="one job per value (repeatable)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and print what would be submitted")
    parser.add_argument("--wait", action="store_true", help="return when the job has ended")
    parser.add_argument("--follow", action="store_true", help="show the job's output while waiting")
    parser.add_argument("--status", metavar="OUT", help="what became of the jobs of OUT")
    parser.add_argument("--cancel", metavar="OUT", help="stop the jobs of OUT")


def _submit_command(options: argparse.Namespace) -> Command:
    arguments = {name: value for name, value in vars(options).items() if name != "verb_args"}
    asked = [name for name in ("status", "cancel") if getattr(options, name)]
    if asked and (options.verb_args or len(asked) > 1):
        raise InputError(f"--{asked[0]} takes OUT and nothing else")
    if not asked and not options.verb_args:
        raise InputError("what shall be submitted? Write sslvit submit --launch L VERB ...")
    if not asked and options.launch is None:
        raise InputError("where to? Add --launch local, --launch slurm or a file of your own")
    return Command("submit", (options.verb_args,), arguments)


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output_dir", metavar="OUT", help="a run folder")


def _out_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", metavar="OUT")


def _spec_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help="images: a path, or folder: parquet: tar: jsonl: hf: scenes: ...")
    parser.add_argument("--output-dir", metavar="OUT", help="also write OUT/bad_files.jsonl")


def _demo_command(options: argparse.Namespace) -> Command:
    given = {} if options.output_dir is None else {"output_dir": options.output_dir}
    return Command("demo", (), given, Path(options.output_dir or "runs/demo"))


def _check_data_command(options: argparse.Namespace) -> Command:
    given = {} if options.output_dir is None else {"output_dir": options.output_dir}
    folder = Path(options.output_dir) if options.output_dir else default_output_dir("check-data", options.spec)
    return Command("check_data", (options.spec,), given, folder)


VERBS: dict[str, Verb] = {
    "demo": Verb(
        "sslvit demo [--output-dir OUT]",
        "The whole story on built-in scenes, offline.",
        _out_options,
        _demo_command,
    ),
    "pretrain": Verb(
        "sslvit pretrain [--config-file C] [--output-dir OUT] [--explain] data=SPEC [key=value ...]",
        "Images without labels become an encoder.",
        _pretrain_options,
        _pretrain_command,
        PretrainConfig,
    ),
    "evaluate": Verb(
        "sslvit evaluate --encoder E --train-dataset SPEC --val-dataset SPEC [--protocol knn,linear,...]\n"
        "                       [--config-file C] [--output-dir OUT] [key=value ...]",
        "How good an encoder is: probes with intervals, beside a random encoder and raw pixels.",
        _evaluate_options,
        _evaluate_command,
        EvaluateConfig,
    ),
    "embed": Verb(
        "sslvit embed --encoder E --data SPEC --output-file F.npz|F.parquet [--index] [key=value ...]",
        "One feature vector per image, in a file.",
        _embed_options,
        _embed_command,
    ),
    "export": Verb(
        "sslvit export RUN --output-dir OUT [--formats timm,hf,siglip,open_clip,onnx,safetensors | all]\n"
        "                     [data_name=TEXT] [push=ORG/NAME]",
        "Folders that other tools open, each reopened and compared.",
        _export_options,
        _export_command,
    ),
    "align": Verb(
        "sslvit align [--config-file C] [--output-dir OUT] encoder=E data=SPEC [key=value ...]",
        "An encoder and images with text become a vision-language model.",
        _config_options,
        _align_command,
        AlignConfig,
    ),
    "ask": Verb(
        "sslvit ask VLM --image I --question Q\n       sslvit ask VLM --jsonl IN --output-file OUT",
        "Ask a vision-language model about an image, or about many.",
        _ask_options,
        _ask_command,
    ),
    "serve": Verb(
        "sslvit serve VLM [--host 127.0.0.1 --port 7860]",
        "A page: drop an image, ask, watch the answer stream.",
        _serve_options,
        _serve_command,
    ),
    "report": Verb(
        "sslvit report OUT",
        "(Re)build OUT/report.html, also while a run is going.",
        _run_options,
        lambda options: Command("report", (options.output_dir,), {}, Path(options.output_dir)),
    ),
    "submit": Verb(
        "sslvit submit --launch L [--sweep k=v1,v2] [--dry-run] [--wait | --follow] VERB ...\n"
        "       sslvit submit --status OUT | --cancel OUT",
        "Any verb as a job on this machine or on Slurm; it goes on by itself after an interruption.",
        _submit_options,
        _submit_command,
    ),
    "doctor": Verb(
        "sslvit doctor",
        "What this machine can do, in words.",
        lambda parser: None,
        lambda options: Command("doctor"),
    ),
    "check-data": Verb(
        "sslvit check-data SPEC [--output-dir OUT]",
        "Count, sizes, channels, and every unreadable file with its reason.",
        _spec_options,
        _check_data_command,
    ),
}
