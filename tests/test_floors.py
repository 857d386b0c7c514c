"""Who may import whom, what may import torch, and what `import sslvit` and `sslvit --help` cost."""

import ast
import configparser
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sslvit"

#: Files by floor, lowest first. A room is a folder; one that is not listed is no room of this house.
FLOORS = {
    "errors": 0,
    "room settings": 1,
    "config": 2,
    "tools": 3,
    "encoder": 4,
    "data": 4,
    "objectives": 5,
    "probes": 5,
    "exports": 5,
    "vlm": 5,
    "pages": 6,
    "verbs": 7,
    "demo and submit": 8,
    "cli": 9,
}
TOOLS = ["distributed", "schedules", "optim", "checkpoint", "metrics", "signals", "run_folder", "training", "commands"]
TOOLS += ["utilisation", "memory"]
TORCH_FREE = ["sslvit", "sslvit.errors", "sslvit.config", "sslvit.run_folder", "sslvit.commands", "sslvit.cli"]
TORCH_FREE += ["sslvit.verbs.submit", "sslvit.verbs.job", "sslvit.verbs.plan", "sslvit.objectives.cost"]
TORCH_FREE += [f"sslvit.{room}.config" for room in ("data", "encoder", "objectives", "probes", "vlm")]


def house(name: str) -> str | None:
    """`sslvit.data.crops` -> its house, `data`; None for the package itself, which everything may import."""
    parts = name.split(".")[1:]
    if not parts or parts == ["__main__"]:
        return None
    if len(parts) == 1 and parts[0] in ("errors", "config", "cli"):
        return parts[0]
    if len(parts) == 1 and parts[0] in TOOLS:
        return "tools"
    if parts[-1] == "config" and len(parts) == 2:
        return "room settings"
    if parts[0] == "verbs" and parts[1:] and parts[1] in ("demo", "submit", "job"):
        return "demo and submit"
    return parts[0]


def modules() -> dict[str, Path]:
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(source: str, known: set[str]) -> set[str]:
    """Our own modules that a source imports, anywhere in it; `from sslvit.data import crops` names the file crops."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            dotted = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else str(node.module) for name in dotted}
    return {name for name in names if name.split(".")[0] == "sslvit"}


def violations(importer: str, imported: set[str]) -> list[str]:
    own, found = house(importer), []
    for name in sorted(imported):
        other = house(name)
        if own is None or other is None or own == other:
            continue
        if own not in FLOORS or other not in FLOORS or FLOORS[other] >= FLOORS[own]:
            found.append(f"{importer} ({own}) imports {name} ({other})")
    return found


def test_floors():
    known = modules()
    assert len(known) > 40
    broken = [line for name, file in known.items() for line in violations(name, imports(file.read_text(), set(known)))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("sslvit.data.crops", "from sslvit.encoder.vit import create_encoder"),
        ("sslvit.data.crops", "def f():\n    from sslvit.verbs import pretrain"),
        ("sslvit.optim", "import sslvit.data.crops"),
        ("sslvit.errors", "import sslvit.config"),
        ("sslvit.verbs.pretrain", "from sslvit.verbs.submit import submit"),
        ("sslvit.probes.knn", "from sslvit.vlm import score"),
        ("sslvit.helpers.things", "import sslvit.errors"),
    ],
)
def test_floors_notice(importer, source):
    assert violations(importer, imports(source, set(modules())))


def test_torch_free_modules_import_no_torch():
    code = f"import sys\nfor name in {TORCH_FREE!r}:\n    __import__(name)\n    assert 'torch' not in sys.modules, name"
    subprocess.run([sys.executable, "-c", code], check=True)


def seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def test_import_and_help_are_quick():
    bare = min(seconds(sys.executable, "-c", "pass") for _ in range(3))
    assert min(seconds(sys.executable, "-c", "import sslvit") for _ in range(5)) - bare < 0.3
    assert min(seconds(sys.executable, "-m", "sslvit", "--help") for _ in range(5)) - bare < 0.5


def test_import_takes_no_heavy_module():
    code = "import sslvit, sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert "torch" not in loaded and "numpy" not in loaded and "omegaconf" not in loaded


def test_setup_lists_every_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    packages = {name for name, file in modules().items() if file.name == "__init__.py"}
    assert listed == packages | {"sslvit.configs", "sslvit.launch"}
