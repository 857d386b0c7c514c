"""Labels of two sets, read alike whatever they are written in: one kind, one numbering, never wrong without a word."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import sslvit
from sslvit.data.records import as_classes, number_labels
from sslvit.data.sources import open_source
from sslvit.errors import InputError
from sslvit.probes.labels import agree

ENCODER = "vit_tiny_patch16_224?pretrained=false&img_size=32&patch_size=8&depth=1&embed_dim=24&num_heads=2"


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, value // 256, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path, labels, kind="cls"):
    with tarfile.open(path, "w") as archive:
        for i, label in enumerate(labels):
            text = json.dumps({"label": label}) if kind == "json" else label
            for name, data in ((f"{i}.png", png(i)), (f"{i}.{kind}", None if text is None else text.encode())):
                if data is not None:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return open_source(f"tar:{path}")


def jsonl(path, labels, key="label"):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w") as file:
        for i, label in enumerate(labels):
            (path.parent / f"{i}.png").write_bytes(png(i))
            file.write(json.dumps({"image": f"{i}.png", key: label}) + "\n")
    return open_source(f"jsonl:{path}")


def parquet(path, column, features=None, name="label"):
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(len(column))]
    table = pa.table({"image": images, name: column})
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {name: features}}})})
    pq.write_table(table, path)
    return open_source(f"parquet:{path}")


def shared(train, val):
    """Labels of both after `agree`, in words: classes by train's names, -1 as None, unseen ones as "?"."""
    train, val, lines = agree(train, val)
    names = train.class_names.get("label")

    def said(source):
        values = source.labels["label"]
        if values.ndim == 2:
            return [None if row.min() < 0 else {names[i] for i in np.flatnonzero(row)} for row in values]
        if values.dtype.kind == "f" or not names:
            return values.tolist()
        return [None if v == -1 else names[v] if v >= 0 else "?" for v in values]

    return said(train), said(val), lines


# ---- one set --------------------------------------------------------------------------------------------------------


def test_tar_numbers_with_a_decimal_point_are_numbers(tmp_path):
    source = tar(tmp_path / "a.tar", ["0.5", "1.5", None, "-2e1"])
    assert source.labels["label"].tolist() == pytest.approx([0.5, 1.5, np.nan, -20], nan_ok=True)
    assert source.class_names == {}
    assert tar(tmp_path / "b.tar", ["0.5", "high"]).class_names == {"label": ["0.5", "high"]}
    typed = tar(tmp_path / "c.tar", [2.5, 3.0], "json")
    assert typed.labels["label"].tolist() == [2.5, 3.0]


@pytest.mark.parametrize("lists", [[[1, 2], [2], [], None, [10]], [["b", "a"], ["b"], [], None, ["c"]]])
def test_lists_are_several_classes_at_once(tmp_path, lists):
    sources = [
        jsonl(tmp_path / "j" / "a.jsonl", lists),
        jsonl(tmp_path / "j" / "b.jsonl", lists, key="labels"),
        tar(tmp_path / "a.tar", lists, "json"),
        parquet(tmp_path / "a.parquet", lists),
    ]
    for source in sources:
        names = source.class_names["label"]
        assert names == [str(name) for name in sorted({item for row in lists for item in row or ()})]
        for row, said in zip(source.labels["label"], lists, strict=True):
            assert row.tolist() == ([-1] * 3 if said is None else [int(name in map(str, said)) for name in names])


def test_parquet_lists_of_class_labels_have_their_names(tmp_path):
    """`Sequence(ClassLabel)` as the hub writes it, old and new; and only columns that are called labels."""
    label = {"_type": "ClassLabel", "names": ["cat", "dog", "owl"]}
    for feature in ({"_type": "Sequence", "feature": label}, {"_type": "List", "feature": label}, [label]):
        source = parquet(tmp_path / "a.parquet", [[2], [0, 2], None], feature, name="animals")
        assert source.class_names["label"] == ["cat", "owl"]
        assert source.labels["label"].tolist() == [[0, 1], [1, 1], [-1, -1]]
    assert parquet(tmp_path / "b.parquet", [[2], [0, 2]], name="boxes").labels == {}


def test_rows_of_flags_are_a_class_each(tmp_path):
    source = jsonl(tmp_path / "j" / "a.jsonl", [[0, 1, 1], None, [0, 0, 0]])
    assert source.class_names["label"] == ["0", "1", "2"]
    assert source.labels["label"].tolist() == [[0, 1, 1], [-1] * 3, [0, 0, 0]]


@pytest.mark.parametrize("value", [{"x": 1}, [0.5, 0.7], [[1, 2], [3, 4]], [{"box": [1, 2]}]])
def test_what_can_be_no_label_is_left_out_with_a_warning(tmp_path, caplog, value):
    source = jsonl(tmp_path / "j" / "a.jsonl", [value, value])
    assert source.labels == {} == source.class_names
    assert "label is left out" in caplog.text


def test_whole_numbers_with_gaps_are_classes_and_large_ones_are_not():
    assert as_classes(np.array([2.0, np.nan, 0.0])).tolist() == [2, -1, 0]
    for values in ([1e300, 2.0], [np.inf, 2.0], [0.5]):
        assert as_classes(np.array(values)).tolist() == values
    assert number_labels([2**70, 3])[1] == [str(2**70), "3"]


# ---- two sets -------------------------------------------------------------------------------------------------------


def test_numbers_in_one_set_are_numbers_in_both(tmp_path):
    """Validation happens to hold whole numbers only, in every form."""
    expected = ([0.5, 1.5, 3.0], [3.0, -1.0, 1.0])
    for number, (train, val) in enumerate(
        [
            (tar(tmp_path / "a.tar", ["0.5", "1.5", "3.0"]), tar(tmp_path / "b.tar", ["3", "-1.0", "1"])),
            (jsonl(tmp_path / "t" / "a.jsonl", [0.5, 1.5, 3.0]), jsonl(tmp_path / "v" / "a.jsonl", [3, -1.0, 1])),
            (parquet(tmp_path / "a.parquet", [0.5, 1.5, 3.0]), parquet(tmp_path / "b.parquet", [3.0, -1.0, 1.0])),
        ]
    ):
        assert shared(train, val) == (*expected, []), number
        assert shared(val, train) == (*expected[::-1], []), number


def test_an_unknown_class_beside_numbers_is_told(tmp_path):
    train, val = jsonl(tmp_path / "t" / "a.jsonl", [0.5, 1.5]), jsonl(tmp_path / "v" / "a.jsonl", [3, -1])
    _, said, lines = shared(train, val)
    assert said == pytest.approx([3.0, np.nan], nan_ok=True) and "1 times -1 is taken as unknown" in lines[0]


def test_whole_floats_in_both_sets_are_classes_and_said_to_be(tmp_path):
    train, val = parquet(tmp_path / "a.parquet", [0.0, 2.0, None]), parquet(tmp_path / "b.parquet", [2.0, 0.0])
    assert shared(train, val)[:2] == ([0, 2, -1], [2, 0])
    assert "taken as 3 classes" in shared(train, val)[2][0] or "taken as 2 classes" in shared(train, val)[2][0]
    ints = parquet(tmp_path / "c.parquet", [2, 0])
    assert shared(train, ints) == ([0, 2, -1], [2, 0], [])


def test_numbers_are_matched_to_names_as_they_are_written(tmp_path):
    """Train numbers its three names 0, 1, 2; validation's 10 and 2 are two of those names."""
    named, plain = tar(tmp_path / "a.tar", ["10", "2", "x"]), tar(tmp_path / "b.tar", ["10", "2", "7"])
    assert shared(named, plain) == (["10", "2", "x"], ["10", "2", "?"], [])
    assert shared(plain, named) == (["10", "2", "7"], ["10", "2", "?"], [])
    padded = tar(tmp_path / "c.tar", ["010", "x"])
    assert shared(padded, plain)[1] == ["010", "?", "?"]


def test_numbers_beside_names_of_another_kind_are_their_places(tmp_path):
    """ImageNet's shards number what its folders name: 0 is the first name. It is said, or refused."""
    named, plain = tar(tmp_path / "a.tar", ["dog", "cat"]), tar(tmp_path / "b.tar", ["0", "1", "-1"])
    train, val, lines = shared(named, plain)
    assert (train, val) == (["dog", "cat"], ["cat", "dog", None]) and "0 is taken for 'cat'" in lines[0]
    assert shared(plain, named)[:2] == (["cat", "dog", None], ["dog", "cat"])
    with pytest.raises(InputError, match="none of these names"):
        agree(named, tar(tmp_path / "c.tar", ["0", "5"]))
    assert "no class in common" in shared(named, tar(tmp_path / "d.tar", ["owl", "fox"]))[2][0]


def test_unseen_classes_stay_apart(tmp_path):
    """Retrieval on classes that train does not hold: were they one, every neighbour would be right."""
    _, val, _ = agree(tar(tmp_path / "a.tar", ["a", "b"]), tar(tmp_path / "b.tar", ["c", "d", "c", "a"]))
    codes = val.labels["label"].tolist()
    assert codes[0] == codes[2] < -1 and codes[1] < -1 and codes[1] != codes[0] and codes[3] == 0


def test_a_number_beyond_the_names_is_no_last_class(tmp_path):
    feature = {"_type": "ClassLabel", "names": ["cat", "dog"]}
    train = parquet(tmp_path / "a.parquet", [0, 1], feature)
    val = parquet(tmp_path / "b.parquet", [1, 2, None], {**feature, "names": ["dog", "cat"]})
    assert shared(train, val)[1] == ["cat", "?", None]


def test_several_classes_have_one_column_each_in_both(tmp_path):
    train = jsonl(tmp_path / "t" / "a.jsonl", [["b", "a"], ["b"], None])
    val = jsonl(tmp_path / "v" / "a.jsonl", [["c"], ["b", "c"], []])
    assert shared(train, val) == ([{"a", "b"}, {"b"}, None], [{"c"}, {"b", "c"}, set()], [])
    single = jsonl(tmp_path / "s" / "a.jsonl", ["c", "a", None])
    assert shared(train, single)[1] == [{"c"}, {"a"}, None]
    assert shared(single, train)[:2] == ([{"c"}, {"a"}, None], [{"a", "b"}, {"b"}, None])
    with pytest.raises(InputError, match="several classes at once"):
        agree(train, jsonl(tmp_path / "n" / "a.jsonl", [0.5, 1.5]))


def test_a_set_that_needs_nothing_stays_itself():
    scenes = [open_source(f"scenes:?n=8&size=32&objects=1&split={split}") for split in ("train", "val")]
    assert agree(*scenes)[:2] == tuple(scenes)


# ---- from end to end ------------------------------------------------------------------------------------------------


def rows(tmp_path, train, val, **keys):
    settings = {"protocol": "knn", "controls": [], "num_workers": 0, "precision": "fp32", **keys}
    found = sslvit.evaluate(
        encoder=ENCODER, train_dataset=train.spec, val_dataset=val.spec, output_dir=tmp_path / "out", **settings
    )
    return {row["name"]: row["value"] for row in found}


def test_lists_are_judged_by_map_and_tar_numbers_by_r2(tmp_path):
    tags = [["a"] if i % 2 else ["a", "b"] if i % 3 else ["b", "c"] for i in range(12)]
    train, val = parquet(tmp_path / "a.parquet", tags), parquet(tmp_path / "b.parquet", tags[1:])
    assert set(rows(tmp_path, train, val)) == {"knn/map"}
    train, val = (tar(tmp_path / f"{n}.tar", [str(i / 2) for i in range(12 - n)]) for n in range(2))
    assert set(rows(tmp_path, train, val, protocol="knn,linear")) == {"knn/r2", "linear/r2"}


def test_embed_and_check_data_take_every_kind(tmp_path):
    tags = [["a"], ["b", "a"], None]
    source = jsonl(tmp_path / "j" / "a.jsonl", tags)
    keys = {"encoder": ENCODER, "data": source.spec, "num_workers": 0}
    arrays = sslvit.embed(output_file=tmp_path / "f.npz", **keys)
    assert arrays["labels"].tolist() == [[1, 0], [1, 1], [-1, -1]]
    assert arrays["label_names"].tolist() == ["label/a", "label/b"]
    sslvit.embed(output_file=tmp_path / "f.parquet", **keys)
    assert pq.read_table(tmp_path / "f.parquet")["label"].to_pylist() == [["a"], ["a", "b"], None]
    assert sslvit.check_data(source.spec)["labels"]["label"]["per_class"] == {"a": 2, "b": 1}
    numbers = jsonl(tmp_path / "n" / "a.jsonl", [-2.5, 1.0, None])
    assert sslvit.check_data(numbers.spec)["labels"]["label"] == {
        "numbers": 2, "unlabelled": 1, "smallest": -2.5, "largest": 1.0
    }  # fmt: skip
