"""Alarms and events of metrics.jsonl as the page lists them."""

from __future__ import annotations

from sslvit.pages.incidents import MOST_SKIPPED, incidents, summary

UNIFORM = {"step": 60, "alarm": "dino/uniform_targets", "text": "DINO has collapsed. Lower dino.teacher_temperature."}
OVER = {"step": 90, "alarm": "dino/uniform_targets", "text": "over: no longer so at step 90"}
LINE = {"step": 100, "loss": 3.0, "skipped": 4}


def skip(step):
    return {"step": step, "event": "skipped", "text": f"step {step}: loss not finite, step skipped"}


def test_an_alarm_lasts_until_it_is_called_over():
    (lasting,) = incidents({"": [UNIFORM, LINE]})
    assert lasting.lasting and lasting.ended is None and lasting.step == 60
    assert "Lower dino.teacher_temperature" in lasting.text
    (ended,) = incidents({"": [UNIFORM, OVER, LINE]})
    assert not ended.lasting and ended.ended == 90
    again = incidents({"": [UNIFORM, OVER, {**UNIFORM, "step": 120}]})
    assert [(one.step, one.lasting) for one in again] == [(60, False), (120, True)]


def test_one_form_of_collapse_passes_into_another():
    same = {"step": 22, "alarm": "dino/same_targets", "text": "DINO learns nothing."}
    other = {"step": 70, "alarm": "ibot/same_targets", "text": "iBOT learns nothing."}
    rank = {"step": 80, "alarm": "features/low_rank", "text": "one direction"}
    alike = {"step": 81, "alarm": "features/same", "text": "nearly the same"}
    found = incidents({"": [same, UNIFORM, other, rank, alike]})
    assert [(one.step, one.ended, one.lasting) for one in found[:2]] == [(22, 60, False), (60, None, True)]
    assert all(one.lasting for one in found[2:])


def test_events_are_told_apart_and_counted():
    back = {"step": 5, "event": "rolled_back", "text": "rolled back to step 4; the data go on at sample 40"}
    found = incidents({"": [back, skip(8), UNIFORM, LINE], "text": [skip(3)]})
    assert [one.what for one in found] == ["Rolled back", "Step skipped", "Alarm dino/uniform_targets", "Step skipped"]
    assert [one.stage for one in found] == ["", "", "", "text"]
    said = summary(found, [LINE])
    assert said == "1 alarm at the end; 4 steps skipped, loss or gradient was not finite; 1 roll-back."


def test_many_skipped_steps_do_not_bury_the_rest():
    found = incidents({"": [*(skip(step) for step in range(1, 200)), UNIFORM]})
    assert len(found) == MOST_SKIPPED + 1 and found[-1].lasting


def test_lines_of_another_shape_are_passed_over():
    odd = [
        {"step": 1, "alarm": 3, "text": "x"},
        {"step": 2, "alarm": "a"},
        {"step": 3, "event": None, "text": "x"},
        OVER,
    ]
    assert incidents({"": odd}) == [] and summary([], []) == "no alarms at the end."
