"""The README says what is true: its commands parse, its snippets compile, its make targets and configs exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from formats import encoder, write_untrained_vlm

from sslvit.commands import parse
from sslvit.config import AlignConfig, EvaluateConfig, PretrainConfig, load_config, shipped_config_names
from sslvit.encoder.config import Preprocessing
from sslvit.exports.formats import write_folder
from sslvit.objectives.pretraining import Pretraining
from sslvit.objectives.recipe import DataFacts, resolve

ROOT = Path(__file__).parents[1]

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    found = [line.partition("sslvit ")[2] for line in lines if re.match(r"(sslvit |torchrun .* -m sslvit )", line)]
    return [shlex.split(line) for line in found]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_parses(words):
    parse(words)


def test_a_wrong_command_would_be_noticed():
    with pytest.raises(ValueError, match="steps"):
        parse(["pretrain", "data=/my/images", "stepz=3"])


def test_every_snippet_compiles():
    assert blocks("python")
    for snippet in blocks("python"):
        compile(snippet, "README.md", "exec")


@pytest.mark.filterwarnings("ignore")  # of the libraries that are opened
def test_the_loading_snippets_run(tmp_path, monkeypatch):
    """On folders as `pretrain` and `align` leave them, of tiny encoders."""
    pytest.importorskip("transformers", reason="needs sslvit[vlm]")
    runs = tmp_path / "runs"
    for name, place in {"timm": "pretrain-images/encoder", "hf": "pretrain-images/encoder_hf"}.items():
        (runs / place).mkdir(parents=True)
        write_folder(encoder("ours"), name, runs / place)
    (runs / "align-pretrain-images-pairs" / "vlm").mkdir(parents=True)
    write_untrained_vlm(encoder("ours"), runs / "align-pretrain-images-pairs" / "vlm")
    monkeypatch.chdir(tmp_path)
    ours = encoder("ours").module.state_dict()
    opened = {}
    for snippet in blocks("python"):
        exec(snippet, opened)
        if "timm" in snippet:
            assert all(torch.equal(tensor, ours[name]) for name, tensor in opened["encoder"].state_dict().items())
    assert opened["encoder"].config.model_type == "dinov2_with_registers"
    assert type(opened["model"]).__name__ == "LlavaForConditionalGeneration" and opened["processor"].tokenizer


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", README, flags=re.M)
    assert targets
    for target in map("".join, targets):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_every_verb_is_in_the_table():
    import sslvit

    for verb in sslvit.VERBS:
        assert f"`sslvit {verb.replace('_', '-')}" in README, verb


@pytest.mark.parametrize("name", [name for name in shipped_config_names() if name.startswith("pretrain/")])
def test_every_pretraining_config_builds(name):
    """On the meta device, so that the large ones cost nothing."""
    config = load_config(PretrainConfig, name, {"data": "x"})
    resolved, _ = resolve(config, DataFacts(50_000, 256, 3, "cpu"))
    with torch.device("meta"):
        module = Pretraining(resolved, Preprocessing(resolved.encoder.image_size))
    assert sum(p.numel() for p in module.student.parameters()) > 1e6


@pytest.mark.parametrize("name", [name for name in shipped_config_names() if not name.startswith("pretrain/")])
def test_every_other_config_loads(name):
    load_config(AlignConfig if name.startswith("align/") else EvaluateConfig, name, {})


@pytest.mark.parametrize("name", shipped_config_names())
def test_every_header_says_command_hardware_and_numbers(name):
    header = "\n".join(
        line for line in (ROOT / "configs" / f"{name}.yaml").read_text().splitlines() if line.startswith("#")
    ).lower()
    for word in ("command:", "hardware:", "numbers:"):
        assert word in header, word
