"""Reading run folders that are being written, half written, or no run folders at all."""

import json

import pytest
from made_run import lines, pretraining_rows, result, whole_run, write_run

from sslvit.errors import InputError
from sslvit.pages.run_record import finite, keys, last, read_lines, read_run, series


def test_whole_record(tmp_path):
    record = read_run(whole_run(tmp_path / "run"))
    assert list(record.verbs) == ["demo", "pretrain", "align"]
    assert record.config("pretrain")["steps"] == 200 and record.config("evaluate") == {}
    assert list(record.metrics) == ["", "text", "connector", "instruct"]
    assert len(record.predictions) == 10 and record.bad_files[0]["name"] == "broken.jpg"


def test_half_written_last_line_and_rubbish_are_left_out(tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    text = lines(rows) + '[1, 2]\n"text"\nnot json\n{"loss": 1}\n{"step": 3, "lo'
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_run(tmp_path).metrics == {"": rows}
    assert read_lines(tmp_path / "missing.jsonl") == []


def test_values_that_cannot_be_drawn_are_left_out():
    rows = json.loads(
        '[{"step": 1, "a": NaN}, {"step": 2, "a": Infinity}, {"step": 3, "a": true}, {"step": 4, "a": 5}]'
    )
    rows += [{"step": 5, "a": "6"}, {"step": 6, "a": 10**400}, {"step": 7}]
    assert series(rows, "a") == ([4.0], [5.0]) and last(rows, "a") == 5 and last(rows, "b") is None
    assert keys(rows) == ["a"]
    assert not finite(None) and not finite(True) and finite(0)


def test_series_is_in_order_of_steps_and_keeps_the_newest():
    rows = [{"step": 20, "a": 1}, {"step": 10, "a": 2}, {"step": 20, "a": 3}]
    assert series(rows, "a") == ([10.0, 20.0], [2.0, 3.0])


def test_results_that_are_broken(tmp_path):
    write_run(tmp_path)
    for text, expected in (
        ("", []),
        ('[{"name": "knn/top1", "val', []),
        ("{}", []),
        (json.dumps([result("a", None), {"name": 3}, 7, {"name": "b", "value": 1, "ci95": [None, 2]}]), ["a", "b"]),
    ):
        (tmp_path / "results.json").write_text(text)
        rows = read_run(tmp_path).results
        assert [row["name"] for row in rows] == expected
        assert all(row["ci95"] is None for row in rows)


def test_a_config_that_is_no_mapping(tmp_path):
    write_run(tmp_path, config="- a\n- b\n")
    assert read_run(tmp_path).config("pretrain") == {}
    write_run(tmp_path, config="{broken: [")
    record = read_run(tmp_path)
    assert record.config("pretrain") == {} and record.verbs["pretrain"].config_text == "{broken: ["


def test_names_that_are_no_utf8(tmp_path):
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss": 1, "name": "\xff"}\n' + lines(pretraining_rows()).encode()
    )
    assert "" in read_run(tmp_path).metrics


@pytest.mark.parametrize("made", [False, True])
def test_what_is_no_run_folder(tmp_path, made):
    path = tmp_path / "somewhere"
    if made:
        path.mkdir()
        (path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match=r"somewhere.*give"):
        read_run(path)
