"""The wheel holds the configurations and launch files, and sslvit finds them there."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
ASK = """
import sslvit
from sslvit.config import PretrainConfig, load_config, shipped_config_names, shipped_file
from sslvit.verbs.submit import read_launch
print(sslvit.__file__, *shipped_config_names(), shipped_file("launch", "slurm"))
load_config(PretrainConfig, "pretrain/auto")
read_launch("launch/slurm.yaml")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, unpacked, built from a copy so that the checkout stays as it is."""
    pytest.importorskip("setuptools", "77", reason="no setuptools here to build with")
    source = tmp_path_factory.mktemp("source")
    for name in ("sslvit", "configs", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, source / file)
    built = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(built)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = built.glob("*.whl")
    with zipfile.ZipFile(archive) as file:
        file.extractall(built / "site")
    return built / "site"


def test_everything_is_in_the_wheel(wheel):
    held = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    patterns = {"sslvit": ["**/*.py", "pages/*"], "configs": ["**/*.yaml"], "launch": ["*.yaml", "*.sh"]}
    for folder, globs in patterns.items():
        for file in (path for glob in globs for path in (ROOT / folder).glob(glob) if path.is_file()):
            name = file.relative_to(ROOT) if folder == "sslvit" else Path("sslvit") / file.relative_to(ROOT)
            assert str(name) in held, name


def test_an_installed_sslvit_finds_its_files(wheel, tmp_path):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(wheel)!r})\n{ASK}"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert answer[0].startswith(str(wheel)) and answer[-1] == str(wheel / "sslvit" / "launch" / "slurm.yaml")
    assert "pretrain/auto" in answer and "pretrain/tiny_cpu" in answer
