"""The command line: words become checked commands, mistakes become one line and exit code 2, without torch."""

import errno
import subprocess
import sys

import pytest

import sslvit
from sslvit import cli
from sslvit.commands import VERBS, JobFailed, parse
from sslvit.errors import InputError, Resumable


@pytest.fixture
def calls(monkeypatch):
    """Every verb only notes how it was called."""
    noted = []
    for name in sslvit.VERBS:
        monkeypatch.setitem(vars(sslvit), name, lambda *a, _name=name, **k: noted.append((_name, a, k)))
    return noted


def run(*words):
    return cli.main(list(words))


COMMANDS = [
    (["demo"], "demo", (), {}),
    (["demo", "--output-dir", "o"], "demo", (), {"output_dir": "o"}),
    (
        ["pretrain", "data=x", "--output-dir", "o", "optim.lr=1e-4", "--config-file", "pretrain/tiny_cpu", "dino={}"],
        "pretrain",
        (),
        {"config_file": "pretrain/tiny_cpu", "output_dir": "o", "data": "x", "optim": {"lr": 1e-4}, "dino": {}},
    ),
    (
        ["pretrain", "data=/my/images"],
        "pretrain",
        (),
        {"config_file": None, "output_dir": "runs/pretrain-images", "data": "/my/images"},
    ),
    (
        [
            "evaluate",
            "--pretrained-weights",
            "r",
            "--train-dataset",
            "a",
            "--val-dataset",
            "b",
            "--protocol",
            "knn,linear",
        ],
        "evaluate",
        (),
        {
            "config_file": None,
            "output_dir": "runs/evaluate-r",
            "encoder": "r",
            "train_dataset": "a",
            "val_dataset": "b",
            "protocol": ["knn", "linear"],
        },
    ),
    (
        ["embed", "--encoder", "r", "batch_size=8", "--data", "d", "--output-file", "f.npz", "device=cpu"],
        "embed",
        (),
        {"encoder": "r", "data": "d", "output_file": "f.npz", "batch_size": 8, "device": "cpu"},
    ),
    (
        ["embed", "--encoder", "r", "--data", "d", "--output-file", "f.npz", "--index"],
        "embed",
        (),
        {"encoder": "r", "data": "d", "output_file": "f.npz", "index": True},
    ),
    (["export", "r", "--output-dir", "o"], "export", ("r",), {"output_dir": "o", "formats": ("timm", "hf")}),
    (
        ["export", "--formats", "onnx, siglip", "r@best", "--output-dir", "o"],
        "export",
        ("r@best",),
        {"output_dir": "o", "formats": ("onnx", "siglip")},
    ),
    (
        ["align", "encoder=r", "data=scenes:", "controls=", "text.steps=5"],
        "align",
        (),
        {
            "config_file": None,
            "output_dir": "runs/align-r-scenes",
            "encoder": "r",
            "data": "scenes:",
            "controls": [],
            "text": {"steps": 5},
        },
    ),
    (["ask", "v", "--image", "i", "--question", "q?"], "ask", ("v",), {"image": "i", "question": "q?"}),
    (["ask", "--jsonl", "a", "v", "--output-file", "b"], "ask", ("v",), {"jsonl": "a", "output_file": "b"}),
    (["serve", "v"], "serve", ("v",), {"host": "127.0.0.1", "port": 7860}),
    (["serve", "v", "--port", "0", "--host", "0.0.0.0"], "serve", ("v",), {"host": "0.0.0.0", "port": 0}),
    (["report", "o"], "report", ("o",), {}),
    (["doctor"], "doctor", (), {}),
    (["check-data", "s"], "check_data", ("s",), {}),
    (["check-data", "s", "--output-dir", "o"], "check_data", ("s",), {"output_dir": "o"}),
    (
        [
            "submit",
            "--launch",
            "local",
            "--sweep",
            "a=1",
            "--sweep=b=2",
            "--wait",
            "pretrain",
            "--output-dir",
            "o",
            "x=1",
        ],
        "submit",
        (["pretrain", "--output-dir", "o", "x=1"],),
        {
            "launch": "local",
            "sweep": ["a=1", "b=2"],
            "dry_run": False,
            "wait": True,
            "follow": False,
            "status": None,
            "cancel": None,
        },
    ),
]


@pytest.mark.parametrize(("words", "verb", "positional", "arguments"), COMMANDS)
def test_words_become_calls(calls, words, verb, positional, arguments):
    assert run(*words) == 0
    assert calls == [(verb, positional, arguments)]


def test_every_verb_is_there():
    assert {name.replace("-", "_") for name in VERBS} == set(sslvit.VERBS)


MISTAKES = [
    (["pretran"], ["pretran", "nearest: pretrain"]),
    (["xyz"], ["sslvit --help"]),
    (["pretrain"], ["data"]),
    (["pretrain", "/my/images"], ["data=/my/images"]),
    (["pretrain", "data=x", "lr=3"], ["optim.lr"]),
    (["pretrain", "data=x", "--ouput-dir", "o"], ["--ouput-dir", "--output-dir"]),
    (["pretrain", "data=x", "--output-dir"], ["--output-dir"]),
    (["pretrain", "data=x", "--config-file", "nowhere.yaml"], ["nowhere.yaml"]),
    (["pretrain", "data=x", "dino=null", "mae=null", "koleo=null", "ibot=null"], ["objective"]),
    (["pretrain", "data=x", "encoder.patch_size=16", "crops.local_size=40"], ["crops.local_size"]),
    (["pretrain", "data=x", "steps=many"], ["steps", "many"]),
    (["evaluate", "--encoder", "x"], ["train"]),
    (["evaluate", "--encoder", "a", "--train-dataset", "b", "--val-dataset", "c", "lr=3"], ["lr"]),
    (["embed", "--encoder", "x"], ["--data"]),
    (["embed", "--encoder", "x", "--data", "y", "--output-file", "f.csv"], [".npz"]),
    (["embed", "--encoder", "x", "--data", "y", "--output-file", "f.npz", "steps=3"], ["steps", "batch_size"]),
    (["embed", "--encoder", "x", "--data", "y", "--output-file", "f.npz", "batch_size=0"], ["batch_size"]),
    (["embed", "--encoder", "x", "--data", "y", "--output-file", "f.npz", "batch_size=abc"], ["batch_size", "abc"]),
    (["embed", "--encoder", "x", "--data", "y", "--output-file", "f.npz", "device=gpu"], ["device", "gpu", "cuda"]),
    (["embed", "--encoder", "x", "--data", "y", "--output-file", "f.npz", "precision=fp16"], ["fp16", "bf16"]),
    (["evaluate", "--encoder", "a", "--train-dataset", "b", "--val-dataset", "c", "device=gpu"], ["device", "gpu"]),
    (["align", "encoder=x", "data=y", "language.num_heads=0"], ["language.num_heads"]),
    (["export", "r"], ["--output-dir"]),
    (["export", "r", "--output-dir", "o", "--formats", "tensorflow"], ["tensorflow", "timm"]),
    (["align", "data=x"], ["encoder"]),
    (["align", "encoder=x"], ["data"]),
    (["ask", "v"], ["--image"]),
    (["ask", "v", "--image", "i"], ["--question"]),
    (["ask", "v", "--image", "i", "--question", "q", "--jsonl", "j"], ["--jsonl"]),
    (["serve", "v", "--port", "99999"], ["99999"]),
    (["serve", "v", "--port", "x"], ["--port"]),
    (["report"], ["OUT"]),
    (["doctor", "now"], ["now"]),
    (["check-data"], ["SPEC"]),
    (["submit"], ["VERB"]),
    (["submit", "pretrain", "data=x"], ["--launch"]),
    (["submit", "--launch", "local"], ["VERB"]),
    (["submit", "--folow", "--launch", "local", "pretrain"], ["--follow"]),
    (["submit", "--status", "o", "pretrain"], ["--status"]),
]


@pytest.mark.parametrize(("words", "parts"), MISTAKES)
def test_mistakes_are_one_line(calls, capsys, words, parts):
    assert run(*words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith(f"sslvit {words[0]}: ")
    assert all(part in said.err for part in parts), said.err
    assert not calls


ENDINGS = [
    (InputError("folder x\nis empty"), 2, "sslvit doctor: folder x is empty\n"),
    (Resumable("stopped by SIGTERM"), 75, "sslvit doctor: stopped by SIGTERM\n"),
    (KeyboardInterrupt(), 75, "sslvit doctor: interrupted; the same command goes on from the last checkpoint\n"),
    (ModuleNotFoundError("no", name="transformers.x"), 2, "pip install 'sslvit[vlm]'\n"),
    (OSError(errno.ENOSPC, "No space left on device", "f"), 75, "'f'; make room and give the same command again\n"),
    (
        RuntimeError("I/O error: No space left on device (os error 28)"),
        75,
        "make room and give the same command again\n",
    ),
    (JobFailed("job 3 failed"), 1, "sslvit doctor: job 3 failed\n"),
]


@pytest.mark.parametrize(("error", "code", "line"), ENDINGS)
def test_exit_codes(monkeypatch, capsys, error, code, line):
    def fail():
        raise error

    monkeypatch.setitem(vars(sslvit), "doctor", fail)
    assert run("doctor") == code
    said = capsys.readouterr().err
    assert said.endswith(line) and said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "x"),
        ZeroDivisionError("a bug"),
        ValueError("x"),
        ModuleNotFoundError("x", name="sslvit.y"),
    ],
)
def test_bugs_keep_their_traceback(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setitem(vars(sslvit), "doctor", fail)
    with pytest.raises(type(error)):
        run("doctor")


def test_bugs_exit_with_1(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sslvit\nsslvit.doctor = lambda: 1 / 0\n")
    command = [sys.executable, "-m", "sslvit", "doctor"]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_texts_that_verbs_return_are_printed(monkeypatch, capsys):
    monkeypatch.setitem(vars(sslvit), "ask", lambda *a, **k: "two red circles")
    assert run("ask", "v", "--image", "i", "--question", "q") == 0
    assert capsys.readouterr().out == "two red circles\n"


def test_the_run_folder_is_printed_once(calls, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    run("pretrain", "data=x")
    assert capsys.readouterr().out == "run folder: runs/pretrain-x\n"
    monkeypatch.setenv("RANK", "1")
    run("pretrain", "data=x")
    assert capsys.readouterr().out == ""


def test_help(capsys):
    for words in ([], ["--help"], ["help"], ["-h"]):
        assert run(*words) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown for name in VERBS)
        assert max(map(len, shown.splitlines())) <= 120
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == sslvit.__version__


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(capsys, verb):
    with pytest.raises(SystemExit) as caught:
        run(verb, "--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: sslvit {verb}")
    if verb == "pretrain":
        assert "optim.lr=auto" in shown and "dino=null" in shown and "overwrite=false" in shown


def test_mistakes_import_no_torch():
    code = (
        "import sys\nfrom sslvit.cli import main\n"
        "for words in (['pretrain', 'data=x', 'lr=3'], ['align'], ['evaluate'], ['--help'], ['pretran'],\n"
        "              ['submit', '--launch', 'slurm', '--dry-run', 'pretrain', 'data=scenes:']):\n"
        "    main(words)\n    assert 'torch' not in sys.modules, words\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_submitted_words_are_checked_like_others():
    assert parse(["pretrain", "data=x"]).output_dir.name == "pretrain-x"
    with pytest.raises(InputError):
        parse([])


def test_verbs_are_functions_whatever_was_imported_before():
    import sslvit.verbs.doctor
    import sslvit.verbs.submit

    assert callable(sslvit.doctor) and callable(sslvit.submit)
    assert sslvit.submit is sslvit.verbs.submit.submit
    with pytest.raises(AttributeError, match="pretrain"):
        sslvit.train  # noqa: B018
    assert set(sslvit.VERBS) <= set(dir(sslvit))
