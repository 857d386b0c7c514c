"""The scripts in launch/ say what is true: bash runs them with a stand-in for sslvit, and each command given parses."""

import os
import subprocess
from pathlib import Path

import pytest

from sslvit.commands import parse
from sslvit.config import PretrainConfig, check_config, load_config
from sslvit.objectives.recipe import resolve
from sslvit.verbs.plan import IMAGENET
from sslvit.verbs.submit import read_launch

LAUNCH = Path(__file__).parents[1] / "launch"
STAND_INS = {
    "sslvit": r"""#!/bin/sh
for word in "$@"; do printf '%s\037' "$word"; done >> "$SAID"
echo >> "$SAID"
""",
    "python": '#!/bin/sh\ncat > "$SNIPPET"\n',
}


def commands(name, folder, **variables):
    """The words of each sslvit command of a script, in order."""
    (folder / "bin").mkdir()
    for tool, text in STAND_INS.items():
        (folder / "bin" / tool).write_text(text)
        (folder / "bin" / tool).chmod(0o755)
    places = {"SAID": str(folder / "said"), "SNIPPET": str(folder / "snippet.py")}
    environment = {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", **places, **variables}
    subprocess.run(["bash", LAUNCH / name], env=environment, cwd=folder, check=True, capture_output=True, timeout=60)
    return [line.split("\037")[:-1] for line in (folder / "said").read_text().splitlines()]


def check_pretrain(words, **keys):
    """The recipe resolves on ImageNet's numbers and says these values."""
    command = parse(words)
    given = {key: value for key, value in command.arguments.items() if key not in ("config_file", "output_dir")}
    config, _ = resolve(load_config(PretrainConfig, None, given, default="pretrain/auto"), IMAGENET)
    check_config(config)
    assert {key: getattr(config, key) for key in keys} == keys


def test_every_script_is_here():
    assert sorted(path.name for path in LAUNCH.glob("*.sh")) == ["imagenet_vits16.sh", "tour.sh"]


def test_the_tour(tmp_path):
    said = commands("tour.sh", tmp_path)
    story = ["doctor", "check-data", "pretrain", "evaluate", "embed", "export", "align", "ask", "report", "report"]
    assert [words[0] for words in said] == story
    for words in said:
        assert parse(words).verb == words[0].replace("-", "_"), words
    check_pretrain(said[2])
    compile((tmp_path / "snippet.py").read_text(), "tour.sh", "exec")


@pytest.mark.parametrize("more", [{}, {"DRY": "--dry-run", "TRAIN": "tar:/data/train-*.tar", "VAL": "/data/val"}])
def test_imagenet(tmp_path, more):
    said = commands("imagenet_vits16.sh", tmp_path, IMAGENET="/datasets/imagenet", **more)
    inner = []
    for words in said:
        parse(words)
        assert words[0] == "submit" and ("--dry-run" in words) == ("DRY" in more)
        read_launch(words[words.index("--launch") + 1])
        inner.append(words[words.index("--follow") + 1 + ("DRY" in more) :])
    assert [words[0] for words in inner] == ["pretrain", "evaluate"]
    assert all(parse(words).output_dir == Path("runs/imagenet_vits16") for words in inner)
    check_pretrain(inner[0], batch_size=1024, steps=125100)


def test_a_wrong_key_of_a_script_would_be_noticed(tmp_path):
    with pytest.raises(ValueError, match="stepz"):
        [parse(words) for words in commands("tour.sh", tmp_path, PRETRAIN_KEYS="stepz=3")]
