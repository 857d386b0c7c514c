"""Verdicts in words: each state from numbers that mean it, and none from numbers that do not."""

import pytest
from made_run import encoder_results, pretraining_rows, result, seeing_results

from sslvit.pages.comparisons import above, probed, seeing_tables
from sslvit.pages.verdict import encoder_verdict, pretraining_verdict, seeing_verdict

CONFIG = {"steps": 200}


def test_nothing_logged_is_no_verdict():
    assert pretraining_verdict([], CONFIG) is None
    assert encoder_verdict(probed([])) is None and seeing_verdict([]) is None


def test_healthy():
    verdict = pretraining_verdict(pretraining_rows(), CONFIG)
    assert (verdict.tone, verdict.word) == ("good", "Healthy")
    assert "Step 200 of 200." in verdict.sentences
    assert "k-NN on clean images went from 20% at step 0 to 60%, at best 60%." in verdict.sentences


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dino/target_entropy": 0.99}, "targets are uniform (99% of ln K)"),
        ({"dino/usage_entropy": 0.01, "dino/target_entropy": 0.01}, "one prototype"),
        ({"ibot/target_entropy": 0.99}, "iBOT: the teacher's targets are uniform"),
        ({"rankme": 1.1}, "one direction"),
        ({"feature_std": 0.001}, "nearly the same"),
    ],
)
def test_collapsed(changes, said):
    rows = pretraining_rows()
    late = {key: value for key, value in changes.items() if key in ("rankme", "feature_std")}
    for row in rows[len(rows) // 2 :]:
        row.update(late if "rankme" in row else {k: v for k, v in changes.items() if k not in late})
    verdict = pretraining_verdict(rows, CONFIG)
    assert (verdict.tone, verdict.word) == ("bad", "Collapsed")
    assert any(said in sentence for sentence in verdict.sentences)


def test_a_dip_that_was_overcome_is_no_collapse():
    rows = pretraining_rows()
    for row in rows[: len(rows) // 3]:
        if "loss" in row:
            row["dino/target_entropy"] = 0.99
    assert pretraining_verdict(rows, CONFIG).word == "Healthy"


def test_too_early():
    assert pretraining_verdict(pretraining_rows(60), {"steps": 60}).word == "Too early to tell"
    assert pretraining_verdict(pretraining_rows(200), {"steps": 10_000}).word == "Too early to tell"
    assert pretraining_verdict(pretraining_rows(200), {}).word == "Healthy", "an unknown length is no reason"


def test_starved_for_data():
    verdict = pretraining_verdict(pretraining_rows(data_wait=0.6), CONFIG)
    assert verdict.word == "Starved for data" and "60% of the time" in " ".join(verdict.sentences)


def test_no_gain_and_unstable():
    rows = [{**row, "knn/top1": 0.2} if "knn/top1" in row else row for row in pretraining_rows()]
    assert pretraining_verdict(rows, CONFIG).word == "No gain yet"
    assert pretraining_verdict(pretraining_rows(skipped=9), CONFIG).word == "Unstable"
    assert pretraining_verdict(pretraining_rows(skipped=1), CONFIG).word == "Healthy"


def test_a_run_without_knn_is_judged_by_its_targets():
    rows = [row for row in pretraining_rows() if "loss" in row]
    assert pretraining_verdict(rows, CONFIG).word == "Healthy"


def test_encoder_beside_its_controls():
    rows = encoder_results()
    verdict = encoder_verdict(probed(rows))
    assert (verdict.tone, verdict.word) == ("good", "Better than its controls")
    assert verdict.sentences[0] == (
        "k-NN 71.0% (69.0 to 73.0), beside random init 33.0% (31.0 to 35.0), raw pixels 42.0% (40.0 to 44.0)."
    )
    for row in rows:  # an interval that touches the encoder's
        if row["name"] == "linear/pixels/top1":
            row["ci95"] = [0.4, 0.70]
    assert encoder_verdict(probed(rows)).word == "Better than some of its controls"
    for row in rows:
        if "pixels" in row["name"] or "random_init" in row["name"]:
            row["ci95"] = [0.4, 0.70]
    assert encoder_verdict(probed(rows)).word == "No better than its controls"


def test_probed_leaves_variants_out_and_keeps_labels():
    names = {(one.probe, one.label, one.metric) for one in probed(encoder_results())}
    assert names == {(p, label, "top1") for p in ("knn", "linear") for label in ("", "shape", "colour")}
    assert all(set(one.rows) == {"", "random_init", "pixels"} for one in probed(encoder_results()))


def test_several_data_sets_stay_apart():
    rows = [*encoder_results(), result("knn/top1", 0.1, data="other")]
    found = [one for one in probed(rows) if one.probe == "knn" and not one.label]
    assert [(one.data, len(one.rows)) for one in found] == [("a -> b", 3), ("other", 1)]


def test_it_sees():
    verdict = seeing_verdict(seeing_results())
    assert (verdict.tone, verdict.word) == ("good", "It sees")
    assert "81.0% (79.0 to 83.0) of held-out questions" in verdict.sentences[0]
    assert "worth 1.200 nats" in " ".join(verdict.sentences)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"own": 0.43, "gain": -0.2}, "It does not see"),
        ({"own": 0.43, "gain": 0.5}, "It sees a little"),
        ({"shuffled": 0.80}, "It sees a little"),
        ({"gain": 0.05}, "It sees a little"),
    ],
)
def test_what_is_not_seeing(changes, word):
    assert seeing_verdict(seeing_results(**changes)).word == word


def test_a_random_encoder_that_answers_as_well_is_named():
    rows = [{**r, "ci95": [0.7, 0.9]} if r["name"] == "vlm/random_encoder/accuracy" else r for r in seeing_results()]
    verdict = seeing_verdict(rows)
    assert verdict.word == "It sees" and any("random encoder it answers as well" in s for s in verdict.sentences)
    assert not any("answers as well" in s for s in seeing_verdict(seeing_results()).sentences)


def test_what_pretraining_is_worth_is_told_by_pairs_where_intervals_overlap():
    rows = [{**r, "ci95": [0.7, 0.9]} if r["name"] == "vlm/random_encoder/accuracy" else r for r in seeing_results()]
    clear, unclear = (result("vlm/pretraining_gain", value, 0.01) for value in (0.03, 0.005))
    assert any("worth 3.0 points" in s for s in seeing_verdict([*rows, clear]).sentences)
    assert any("answers as well" in s for s in seeing_verdict([*rows, unclear]).sentences)


def test_captions_alone_are_judged_by_nats():
    assert seeing_verdict([result("vlm/image_gain_nats", 0.4, 0.1)]).word == "It sees"
    assert seeing_verdict([result("vlm/image_gain_nats", 0.05, 0.1)]).word == "It does not see"


def test_seeing_tables_split_the_frozen_pair():
    frozen = [result("vlm/frozen/accuracy", 0.7), result("vlm/frozen/random_encoder/accuracy", 0.6)]
    first, second = seeing_tables(seeing_results() + frozen)
    assert first.who == ["", "blind", "shuffled", "random_encoder"] and second.who == [
        "frozen",
        "frozen/random_encoder",
    ]
    assert first.families == ["", "colour", "zebras"] and second.families == [""]
    assert second.rows[""]["frozen"]["value"] == 0.7


def test_above_needs_intervals():
    one, other = result("a", 0.9), result("b", 0.5)
    assert above(one, other) is True and above(other, one) is False
    assert above(one, None) is None and above(one, {**other, "ci95": None}) is None
