"""The page from hand-made runs: every number is there, nothing foreign runs or loads, missing pieces leave no trace."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from made_run import HOSTILE, encoder_results, lines, predictions, pretraining_rows, result, whole_run, write_run

from sslvit.pages import report_page
from sslvit.pages.curves import pretraining_figures
from sslvit.pages.pictures import Picture, Pictures, Strip
from sslvit.pages.report_page import MAX_BYTES, asked_images, asked_questions, render
from sslvit.pages.run_record import read_run

SECTIONS = ("verdict", "training", "pictures", "results", "alignment", "seeing", "questions", "record")
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Outline(HTMLParser):
    """Tags, attributes and text of a page; fails where a tag is not closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    @property
    def ids(self):
        return [attributes["id"] for tag, attributes in self.tags if "id" in attributes]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def some_pictures(side=16, count=2, seed=0):
    draw = np.random.default_rng(seed)

    def picture(alt):
        return Picture(draw.integers(0, 256, (side, side, 3), dtype=np.uint8), alt, "caption")

    strips = [Strip(picture(f"first {i}"), [picture(f"other {i} {j}") for j in range(3)]) for i in range(count)]
    pictures = Pictures(crops=strips, attention=strips, colours=strips, reconstructions=strips, neighbours=strips)
    pictures.worst = pictures.duplicates = strips
    pictures.gallery, pictures.embed_dim = 1234, 192
    return pictures


def page_of(path, pictures=None):
    record = read_run(path)
    return render(record, Pictures() if pictures is None else pictures, asked_questions(record.predictions))


def test_whole_page(tmp_path):
    page = page_of(whole_run(tmp_path / "run"), some_pictures())
    outline = Outline(page)
    assert [name for name in outline.ids if name in SECTIONS] == list(SECTIONS)
    words = outline.words
    for said in ("Healthy", "Better than its controls", "It sees", "Loss", "DINO loss", "MAE loss", "Learning rate"):
        assert said in words
    for said in ("Gradient norm", "Teacher entropy", "RankMe", "k-NN accuracy", "Throughput", "Waiting for data"):
        assert said in words
    for said in (
        "Connector: loss",
        "1,234 images",
        "Worst cases",
        "Near-duplicates",
        "broken.jpg",
        "truncated",
        "torch",
        "8.7.6",
        "sslvit pretrain data=x",
    ):
        assert said in words
    links = {attributes["href"] for tag, attributes in outline.tags if tag == "a"}
    assert links == {f"#{name}" for name in SECTIONS}


def test_alarms_and_roll_backs_are_listed_with_step_and_remedy(tmp_path):
    alarm = {"step": 120, "alarm": "dino/uniform_targets", "text": f"Lower dino.teacher_temperature. {HOSTILE}"}
    over = {"step": 150, "alarm": "dino/uniform_targets", "text": "over: no longer so at step 150"}
    copy = {"step": 160, "alarm": "teacher/copy", "text": "Raise optim.momentum."}
    back = {"step": 41, "event": "rolled_back", "text": "rolled back to step 40; the data go on at sample 9"}
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(lines([*pretraining_rows(skipped=3), back, alarm, over, copy]))
    page = page_of(tmp_path)
    words = Outline(page).words
    assert 'href="#alarms"' in page and "<script>alert" not in page
    assert "1 alarm at the end; 1 alarm that ended; 3 steps skipped" in words and "1 roll-back" in words
    assert "Step 120 Alarm dino/uniform_targets over at step 150 Lower dino.teacher_temperature." in words
    assert "Step 160 Alarm teacher/copy Raise optim.momentum." in words
    assert "Step 41 Rolled back rolled back to step 40" in words


def test_a_run_without_alarms_has_no_list_of_them(tmp_path):
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(lines(pretraining_rows()))
    assert "alarms" not in Outline(page_of(tmp_path)).ids


def test_no_near_duplicates_is_said(tmp_path):
    pictures = some_pictures()
    pictures.worst = pictures.duplicates = []
    words = Outline(page_of(whole_run(tmp_path / "run"), pictures)).words
    assert "None among these 1,234 images" in words and "Worst cases" not in words


def test_every_row_of_the_results_is_there_with_its_interval(tmp_path):
    rows = [*encoder_results(), result("odd/value", None), result("big/value", 31_234.5, 100.0)]
    write_run(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(rows))
    words = Outline(page_of(tmp_path)).words
    for row in rows:
        assert f"{row['name']} {row['protocol']}" in words
    assert "knn/top1 protocol of knn/top1 0.7100 0.6900 to 0.7300" in words
    assert "odd/value protocol of odd/value not a number" in words
    assert "31,234" in words or "31,235" in words


def test_more_rows_than_the_table_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "MAX_ROWS", 3)
    write_run(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(encoder_results()))
    words = Outline(page_of(tmp_path)).words
    assert f"The last {len(encoder_results()) - 3} are only in the file" in words


def test_what_init_had_before_it_was_resized_is_a_level():
    rows = pretraining_rows()
    rows[0]["knn/init/top1"] = 0.55
    (figure,) = (one for one in pretraining_figures(rows, {}, 192) if one.title == "k-NN accuracy")
    assert "init before it was resized" in figure.svg and figure.legend == []


def test_hostile_strings_stay_text(tmp_path):
    path = write_run(tmp_path / "run", config=f"data: {json.dumps(HOSTILE)}\nsteps: 200\ndino: {{num_prototypes: 7}}\n")
    environment = {"verb": "pretrain", "host": HOSTILE, "packages": {HOSTILE: HOSTILE}}
    (path / "env.json").write_text(json.dumps(environment))
    (path / "command.txt").write_text(HOSTILE)
    rows = [{**row, HOSTILE: 1.0, f"knn/{HOSTILE}/top1": 0.5} for row in pretraining_rows()]
    (path / "metrics.jsonl").write_text(lines([*rows, {"step": 3, "stage": HOSTILE, "loss": 1.0}]))
    named = [result(f"{part}{HOSTILE}", 0.5, data=HOSTILE, protocol=HOSTILE) for part in ("knn/", "x", "vlm/accuracy/")]
    named += [result(f"vlm/{HOSTILE}/accuracy", 0.5), result("vlm/accuracy", 0.5, seed=HOSTILE, step=HOSTILE)]
    named += [result("knn/pixels/top1", 0.5, data=HOSTILE), result("knn/top1", 0.5, data=HOSTILE)]
    (path / "results.json").write_text(json.dumps(named))
    asked = {key: HOSTILE for key in ("image", "family", "question", "answer", "prediction", "blind")}
    (path / "predictions.jsonl").write_text(lines([asked, {**asked, "answer": "b"}, {**asked, "image": ["list"]}]))
    (path / "bad_files.jsonl").write_text(lines([{"name": HOSTILE, "reason": HOSTILE}]))
    pictures = some_pictures()
    pictures.crops = [Strip(Picture(np.zeros((4, 4, 3), np.uint8), HOSTILE, HOSTILE), [])]
    pictures.facts["encoder"] = HOSTILE
    pictures.missing = {name: HOSTILE for name in ("encoder", "data", "asked", "reconstructions")}
    pictures.thumbnails[HOSTILE] = pictures.crops[0].first
    outline = Outline(page_of(path, pictures))
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in outline.tags}
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)
    assert all(a["src"].startswith("data:image/") for tag, a in outline.tags if tag == "img")
    assert HOSTILE in "".join(outline.text), "shown as it is, not evaluated"


def test_autoescape_is_what_keeps_them_text():
    assert report_page._template().environment.autoescape is True
    import jinja2

    assert "<script>" in jinja2.Environment(autoescape=False).from_string("{{ x }}").render(x=HOSTILE)


def test_nothing_outside_is_loaded(tmp_path):
    page = page_of(whole_run(tmp_path / "run"), some_pictures())
    assert "default-src 'none'" in page and "<script" not in page
    loading = re.findall(r"""(?:src|href|srcset|action|xlink:href)\s*=\s*["']([^"']*)""", page)
    assert loading and all(value.startswith(("data:", "#")) for value in loading)
    assert not re.search(r"url\(|@import|https?://|//[a-z]+\.[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))


def test_every_picture_has_words(tmp_path):
    outline = Outline(page_of(whole_run(tmp_path / "run"), some_pictures()))
    images = [attributes for tag, attributes in outline.tags if tag == "img"]
    shown_in_pairs = 2  # an image and one other: patch colours, near-duplicates
    assert len(images) == 7 * 2 * 4 - shown_in_pairs * 2 * 2 and all(image["alt"].strip() for image in images)
    charts = [attributes for tag, attributes in outline.tags if tag == "svg" and attributes.get("role") == "img"]
    assert charts and all(chart["aria-label"].strip() for chart in charts)


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("metrics.jsonl", {"training", "alignment"}),
        ("results.json", {"results", "seeing"}),
        ("predictions.jsonl", {"questions"}),
    ],
)
def test_missing_pieces_leave_no_trace(tmp_path, name, gone):
    path = whole_run(tmp_path / "run")
    (path / name).unlink()
    outline = Outline(page_of(path, some_pictures()))
    assert [s for s in outline.ids if s in SECTIONS] == [s for s in SECTIONS if s not in gone]
    links = {attributes["href"] for tag, attributes in outline.tags if tag == "a"}
    assert links == {f"#{s}" for s in SECTIONS if s not in gone}


def test_a_run_that_has_only_begun(tmp_path):
    outline = Outline(page_of(write_run(tmp_path)))
    assert "Nothing has been logged or measured here yet." in outline.words and "not finished yet" in outline.words
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "knn/top1": 0.2}\n{"step": 1, "loss": 3.0, "lr"')
    outline = Outline(page_of(tmp_path))
    assert "Too early to tell" in outline.words and "k-NN accuracy" in outline.words
    (tmp_path / "finished.json").write_text("{}")
    assert "not finished yet" not in Outline(page_of(tmp_path)).words


def test_why_there_are_no_pictures(tmp_path):
    pictures = Pictures(missing={"data": "No pictures: the images of /x cannot be opened any more."})
    assert pictures.missing["data"] in Outline(page_of(write_run(tmp_path), pictures)).words


def test_the_page_stays_small(tmp_path, monkeypatch):
    assert MAX_BYTES <= 5_000_000
    monkeypatch.setattr(report_page, "MAX_BYTES", 600_000)
    record, pictures = read_run(whole_run(tmp_path / "run")), some_pictures(side=300, count=3)
    page = render(record, pictures, [])
    assert len(page.encode()) <= 600_000
    first = report_page._template().render(**report_page._context(record, pictures, [], report_page.ENCODINGS[0]))
    assert len(first.encode()) > 600_000, "at full size these pictures would be too much"
    assert len(Outline(page).tags) == len(Outline(first).tags), "smaller pictures, not fewer"


def test_long_texts_are_cut(tmp_path):
    path = whole_run(tmp_path / "run")
    asked = {"image": "i", "family": "x", "question": "q" * 10**6, "answer": "a" * 10**6, "prediction": "p" * 10**6}
    (path / "predictions.jsonl").write_text(lines([{**asked, "image": str(i), "blind": "b" * 10**6} for i in range(9)]))
    (path / "command.txt").write_text("c" * 10**6)
    (path / "resolved.yaml").write_text("r: " + "r" * 10**6)
    assert len(page_of(path)) < 500_000


def test_names_that_are_no_utf8_can_be_written(tmp_path):
    path = whole_run(tmp_path / "run")
    (path / "bad_files.jsonl").write_text('{"name": "\\udcff.jpg", "reason": "broken"}\n')
    page_of(path).encode("utf-8")


# ---- questions ------------------------------------------------------------------------------------------------------


def test_wrong_answers_come_first_then_right_ones_then_captions():
    asked = asked_questions(predictions())
    assert [one.right for one in asked] == [False] * 4 + [True] * 4 + [None]
    families = [one.row["family"] for one in asked[:4]]
    assert families == ["count", "colour", "count", "colour"], "each kind in turn"
    assert asked[0].others == [("blind", "guess 4")]
    assert asked_images(asked)[0] == "scene-4" and len(asked_images(asked)) == 8


def test_few_are_chosen_from_many():
    rows = [{**row, "image": f"{row['image']}-{n}"} for n in range(50) for row in predictions()]
    asked = asked_questions(rows)
    assert [sum(one.right is mark for one in asked) for mark in (False, True, None)] == [12, 8, 6]


def test_questions_on_the_page(tmp_path):
    path = whole_run(tmp_path / "run")
    pictures = Pictures(thumbnails={"scene-4": Picture(np.zeros((8, 8, 3), np.uint8), "image scene-4")})
    words = Outline(page_of(path, pictures)).words
    assert "count · wrong Question 4? it says error 4 true truth 4 blind guess 4" in words
    assert "count · right Question 0? it says Truth, 0 blind guess 0" in words
    assert "caption Describe the image. it says a thing true one reference" in words
    assert "From 10 held-out questions" in words
