"""benchmarks/attention.py on small cases: its rows, that it goes on, and that a wrong kernel is refused."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from sslvit.encoder import attention


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    spec = importlib.util.spec_from_file_location(
        "attention_benchmark", Path(__file__).parents[1] / "benchmarks" / "attention.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "attention_benchmark", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "QUICK", {"small": (12, 3, [(2, 9), (3, 4)])})
    measure = module.measure
    monkeypatch.setattr(module, "measure", lambda variants, seconds: measure(variants, seconds=0))
    return module


def test_rows_say_which_is_chosen_and_finished_cases_are_kept(script, tmp_path, monkeypatch, capsys):
    words = ["--quick", "--device", "cpu", "--output-dir", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    assert script.main(words) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    for dtype in ("fp32", "bf16"):
        for kind in ("forward", "training"):
            assert {f"attention/cpu/{dtype}/small/{kind}/{kernel}/ms" for kernel in ("explicit", "sdpa")} <= set(rows)
            assert 0 < rows[f"attention/cpu/{dtype}/small/{kind}/chosen/ratio"]["value"] <= 1
        assert f"attention/cpu/{dtype}/small/block/packed/ms" in rows
    assert "explicit is chosen" in rows["attention/cpu/bf16/small/training/chosen/ratio"]["protocol"]
    assert "sdpa is chosen" in rows["attention/cpu/fp32/small/training/chosen/ratio"]["protocol"]
    monkeypatch.setattr(script, "run", lambda *_: pytest.fail("measured again"))
    assert script.main(words) == 0
    told = capsys.readouterr().out
    assert "| cpu/bf16/small/training |" in told and (tmp_path / "rows.md").read_text() in told


def test_a_kernel_that_computes_something_else_is_refused(script, monkeypatch):
    monkeypatch.setattr(attention, "explicit_attention", lambda query, key, value, dropout_prob: value)
    case = script.Case("small", 12, 3, [(2, 9)], "fp32", "cpu")
    with pytest.raises(ValueError, match="explicit differs from sdpa"):
        script.check_alike(case, script.kernels("cpu", "fp32"))
