"""Sources: every form gives the same images, labels and text; hostile, broken and missing input is named."""

import gzip
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import threading
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sslvit.data import files, folder, parquet
from sslvit.data.decode import BadImage, decode
from sslvit.data.sources import Source, open_source
from sslvit.errors import InputError


def png(value, size=(4, 6)):
    """A flat grey image file."""
    buffer = io.BytesIO()
    Image.fromarray(np.full(size, value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, data=b""):
    path = os.fsencode(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def values(source):
    return [int(decode(source.read(index), channels=1)[0, 0, 0]) for index in range(len(source))]


def names(source):
    return [source.name(index) for index in range(len(source))]


def check_contract(source, expected):
    """What every source owes: the protocol, order, pickling, and reads from many threads at once."""
    assert isinstance(source, Source)
    assert len(source) == len(expected) and values(source) == expected
    again = pickle.loads(pickle.dumps(source))
    assert values(again) == expected and names(again) == names(source)
    assert again.fingerprint() == source.fingerprint()
    results = {}
    threads = [threading.Thread(target=lambda k=k: results.update({k: values(source)})) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[k] == expected for k in range(4))
    for label in source.labels.values():
        assert label.dtype == np.int64 and label.shape == (len(source),)


# ---- folders


def test_folder_with_classes(tmp_path):
    for number, name in enumerate(["b/1.png", "a/2.PNG", "a/sub/3.jpeg", "b/0.png"]):
        write(tmp_path / name, png(number))
    write(tmp_path / "readme.txt")
    write(tmp_path / "a" / "._2.png", b"a shadow of macOS")
    write(tmp_path / ".cache" / "9.png", png(9))
    source = open_source(str(tmp_path))
    check_contract(source, [1, 2, 3, 0])
    assert names(source) == ["a/2.PNG", "a/sub/3.jpeg", "b/0.png", "b/1.png"]
    assert source.labels["label"].tolist() == [0, 0, 1, 1] and source.class_names == {"label": ["a", "b"]}
    assert source.ignored == {"*.txt": 1, "*.png": 1}
    assert not source.has_text and source.text(0) is None


def test_folder_labels_need_two_classes_and_no_loose_image(tmp_path):
    write(tmp_path / "a" / "1.png", png(1))
    assert open_source(f"folder:{tmp_path}").labels == {}
    write(tmp_path / "b" / "2.png", png(2))
    assert "label" in open_source(f"folder:{tmp_path}").labels
    write(tmp_path / "3.png", png(3))
    assert open_source(f"folder:{tmp_path}").labels == {}


def test_folder_with_odd_names_links_and_pipes(tmp_path):
    root = os.fsencode(tmp_path / "images")
    odd = [b"not\xffutf8.png", b"new\nline.png", b"n" * 251 + b".png", "ünï \u2028.png".encode()]
    for number, name in enumerate(odd):
        write(os.path.join(root, name), png(number))
    write(tmp_path / "elsewhere" / "real.png", png(100))
    os.symlink(tmp_path / "elsewhere", os.path.join(root, b"linked"))
    os.symlink(root, os.path.join(root, b"loop"))
    os.symlink(os.path.join(root, b"x.png"), os.path.join(root, b"x.png"))  # leads to itself
    os.symlink(b"/nowhere.png", os.path.join(root, b"dangling.png"))
    os.mkfifo(os.path.join(root, b"pipe.jpg"))
    os.mkdir(os.path.join(root, b"folder.png"))
    source = open_source(os.fsdecode(root))
    expected = [*sorted(odd), b"linked/real.png"]
    assert [os.fsencode(name) for name in names(source)] == expected
    check_contract(source, [*(odd.index(name) for name in sorted(odd)), 100])
    assert source.ignored == {"(not a regular file)": 3}


def test_a_pipe_that_comes_after_the_scan_does_not_hang(tmp_path):
    write(tmp_path / "a.png", png(1))
    write(tmp_path / "b.png", png(2))
    source = open_source(str(tmp_path))
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").unlink()
    with pytest.raises(BadImage, match="not a regular file"):
        source.read(0)
    with pytest.raises(BadImage, match="No such file"):
        source.read(1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders(tmp_path):
    write(tmp_path / "a.png", png(1))
    write(tmp_path / "closed" / "b.png", png(1))
    source = open_source(str(tmp_path))
    (tmp_path / "a.png").chmod(0)
    (tmp_path / "closed").chmod(0)
    with pytest.raises(BadImage, match="Permission denied"):
        source.read(0)
    assert open_source(str(tmp_path)).ignored == {"(folder: Permission denied)": 1}
    (tmp_path / "closed").chmod(0o700)


def test_huge_files_are_refused_unread(tmp_path, monkeypatch):
    write(tmp_path / "a.png", png(1))
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10)
    with pytest.raises(BadImage, match="over the limit"):
        open_source(str(tmp_path)).read(0)


def test_files_without_extension_count_when_there_is_nothing_else(tmp_path):
    write(tmp_path / "0a1b", png(1))
    write(tmp_path / "notes.txt")
    assert values(open_source(str(tmp_path))) == [1]
    write(tmp_path / "real.png", png(2))
    assert names(open_source(str(tmp_path))) == ["real.png"]


def test_the_index_of_a_large_folder_is_kept_until_the_folder_changes(tmp_path, monkeypatch):
    root = tmp_path / "images"
    for number in range(6):
        write(root / f"class{number % 2}" / f"{number}.png", png(number))
    hour_ago = [(Path(path), 1) for path, _, _ in os.walk(root)]
    for path, _ in hour_ago:
        os.utime(path, (1_700_000_000, 1_700_000_000))
    monkeypatch.setattr(folder, "CACHE_FROM", 1)
    scans = []
    scan = folder._scan
    monkeypatch.setattr(folder, "_scan", lambda root: scans.append(root) or scan(root))
    first, second = open_source(f"folder:{root}"), open_source(f"folder:{root}")
    assert len(scans) == 1 and names(second) == names(first)
    assert (second.labels["label"] == first.labels["label"]).all() and second.class_names == first.class_names
    write(root / "class0" / "new.png", png(9))
    third = open_source(f"folder:{root}")
    assert len(scans) == 2 and len(third) == 7
    open_source(f"folder:{root}")
    assert len(scans) == 3  # it changed a moment ago: a second change now might not be seen, so nothing was kept
    os.utime(root / "class0", (1_700_000_001, 1_700_000_001))
    open_source(f"folder:{root}")
    kept = files.cache_root() / "folders"
    for array in kept.rglob("files.npy"):
        array.write_bytes(b"damaged")
    assert len(open_source(f"folder:{root}")) == 7


# ---- tar


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_tar_samples_labels_and_text(tmp_path):
    members = [
        ("000.png", png(10)),
        ("000.cls", b"3\n"),
        ("000.json", json.dumps({"captions": ["one", " two "]}).encode()),
        ("001.cls", b"1"),
        ("001.PNG", png(11)),
        ("001.seg.png", png(99)),
        ("001.txt", "drei ü".encode()),
        ("lonely.txt", b"no image"),
        ("dir/2.5m_a.png", png(12)),
        ("dir/2.5m_b.png", png(13)),
    ]
    write_tar(tmp_path / "a-0.tar", members)
    write_tar(tmp_path / "a-1.tar", [("000.png", png(14))])
    source = open_source(f"tar:{tmp_path}/a-{{0..1}}.tar")
    check_contract(source, [10, 11, 12, 13, 14])
    assert names(source)[:3] == ["a-0.tar/000.png", "a-0.tar/001.PNG", "a-0.tar/dir/2.5m_a.png"]
    assert names(source)[4] == "a-1.tar/000.png"
    assert source.labels["label"].tolist() == [3, 1, -1, -1, -1]
    assert source.has_text and source.text(0) == {"captions": ["one", "two"]}
    assert source.text(1) == {"captions": ["drei ü"]} and source.text(2) is None


def test_tar_labels_by_name_and_from_json(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.cls", b"dog"), ("1.png", png(1)), ("1.cls", b"cat")])
    source = open_source(str(tmp_path / "a.tar"))
    assert source.labels["label"].tolist() == [1, 0] and source.class_names == {"label": ["cat", "dog"]}
    write_tar(tmp_path / "b.tar", [("0.png", png(0)), ("0.json", b'{"label": 7}')])
    assert open_source(str(tmp_path / "b.tar")).labels["label"].tolist() == [7]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_index_agrees_with_tarfile(tmp_path, form):
    rng = np.random.default_rng(0)
    members = [(f"{'long' * int(rng.integers(1, 22))}/{i:04d}.png", png(i % 256)) for i in range(40)]
    members += [("ü" * 60 + ".png", png(7))] if form != tarfile.USTAR_FORMAT else []
    members += [("deep/" * 60 + "x.png", png(8))] if form != tarfile.USTAR_FORMAT else []
    write_tar(tmp_path / "a.tar", members, form)
    source = open_source(str(tmp_path / "a.tar"))
    with tarfile.open(tmp_path / "a.tar") as archive:
        expected = [(f"a.tar/{info.name}", archive.extractfile(info).read()) for info in archive]
    assert [(source.name(i), source.read(i)) for i in range(len(source))] == expected


def test_the_tar_index_is_kept_until_a_shard_changes(tmp_path, monkeypatch):
    from sslvit.data import tar

    write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.cls", b"5")])
    built = []
    index = tar._index
    monkeypatch.setattr(tar, "_index", lambda files, shards: built.append(1) or index(files, shards))
    for _ in range(2):
        source = open_source(str(tmp_path / "a.tar"))
        assert values(source) == [0] and source.labels["label"].tolist() == [5]
    assert len(built) == 1
    write_tar(tmp_path / "a.tar", [("0.png", png(1)), ("1.png", png(2))])
    assert values(open_source(str(tmp_path / "a.tar"))) == [1, 2] and len(built) == 2


def test_hostile_members_are_left_out_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in [
            ("../../outside.png", tarfile.REGTYPE),
            ("/absolute.png", tarfile.REGTYPE),
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("device.png", tarfile.CHRTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
            ("folder", tarfile.DIRTYPE),
            ("good.png", tarfile.REGTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = len(png(5)) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(png(5)))
    before = sorted(tmp_path.rglob("*"))
    source = open_source("a.tar")
    assert names(source) == ["a.tar/good.png"] and values(source) == [5]
    reasons = dict(item.split(": ", 1) for item in source.skipped)
    assert reasons == {
        "a.tar/../../outside.png": "its name leads outside",
        "a.tar//absolute.png": "its name leads outside",
        "a.tar/link.png": "a symbolic link",
        "a.tar/hard.png": "a hard link",
        "a.tar/device.png": "not a regular file",
        "a.tar/pipe.png": "not a regular file",
    }
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_tars(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(4)])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 3 * 1024 + 512 + 30])
    source = open_source(str(tmp_path / "cut.tar"))
    assert values(source) == [0, 1, 2] and "cut off" in source.skipped[0]
    flipped = bytearray(whole)
    flipped[2 * 1024 + 3] ^= 1  # in the third header
    (tmp_path / "flipped.tar").write_bytes(flipped)
    source = open_source(str(tmp_path / "flipped.tar"))
    assert values(source) == [0, 1] and "damaged here" in source.skipped[0]
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole))
    for name, data in (("packed.tar", gzip.compress(whole)), ("text.tar", b"hello"), ("empty.tar", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="no uncompressed tar"):
            open_source(str(tmp_path / name))
    write_tar(tmp_path / "none.tar", [("a.txt", b"x")])
    with pytest.raises(InputError, match="no images"):
        open_source(str(tmp_path / "none.tar"))


def test_negative_and_endless_sizes_end(tmp_path):
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    for size in (b"\xff" * 12, b"\x80" + b"\xff" * 11):
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "a.tar").write_bytes(tarfile.TarInfo("b.txt").tobuf() + bytes(header) + b"\0" * 1024)
        with pytest.raises(InputError, match="no images"):
            open_source(str(tmp_path / "a.tar"))


def test_more_shards_than_descriptors_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MAX_OPEN", 2)
    for number in range(5):
        write_tar(tmp_path / f"{number}.tar", [("a.png", png(number))])
    source = open_source(f"tar:{tmp_path}/*.tar")
    check_contract(source, [0, 1, 2, 3, 4])
    assert len(source._files._descriptors) == 2


# ---- Parquet


def write_parquet(path, images, features=None, row_group_size=None, plain=False, **columns):
    data = images if plain else [{"bytes": item, "path": f"{i}.png"} for i, item in enumerate(images)]
    kind = pa.binary() if plain else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(data, kind), **columns})
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=row_group_size)


def test_parquet_of_the_hub(tmp_path):
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    for part in range(2):
        numbers = range(part * 5, part * 5 + 5)
        write_parquet(
            tmp_path / f"train-{part}.parquet",
            [png(i) for i in numbers],
            features,
            row_group_size=2,
            label=pa.array([i % 2 if i != 3 else None for i in numbers], pa.int64()),
            caption=[f"number {i}" for i in numbers],
        )
    source = open_source(f"parquet:{tmp_path}/train-*.parquet")
    check_contract(source, list(range(10)))
    assert source.labels["label"].tolist() == [0, 1, 0, -1, 0, 1, 0, 1, 0, 1]
    assert source.class_names == {"label": ["cat", "dog"]}
    assert names(source)[:2] == ["0.png", "1.png"]
    assert source.has_text and source.text(7) == {"captions": ["number 7"]}


def test_parquet_with_plain_bytes_several_labels_and_dialogue(tmp_path):
    write_parquet(
        tmp_path / "a.parquet",
        [png(1), None, png(3)],
        plain=True,
        fine_label=[5, 6, 7],
        coarse_label=["b", "a", "b"],
        question=["how many?"] * 3,
        answer=["one", "two", "three"],
        weight=[0.1, 0.2, 0.3],
    )
    source = open_source(str(tmp_path / "a.parquet"))
    assert source.labels["fine_label"].tolist() == [5, 6, 7]
    assert source.labels["coarse_label"].tolist() == [1, 0, 1] and source.class_names["coarse_label"] == ["a", "b"]
    assert sorted(source.labels) == ["coarse_label", "fine_label"]
    assert names(source) == ["a.parquet/0", "a.parquet/1", "a.parquet/2"]
    assert source.text(2) == {"question": "how many?", "answer": "three"}
    with pytest.raises(BadImage, match="no image bytes"):
        source.read(1)


def test_large_parquet_keeps_a_bounded_part_in_memory(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", [png(i) for i in range(60)], row_group_size=6)
    monkeypatch.setattr(parquet, "WHOLE_BYTES", 1)
    monkeypatch.setattr(parquet, "KEPT_BYTES", 3000)
    source = open_source(str(tmp_path / "a.parquet"))
    order = np.random.default_rng(0).permutation(60)
    assert [int(decode(source.read(int(i)))[0, 0, 0]) for i in order] == order.tolist()
    assert source._kept.bytes <= 3000 and len(source._kept._items) < 10


def test_each_row_group_is_read_once_however_many_threads(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", [png(i) for i in range(20)], row_group_size=5)
    source = open_source(str(tmp_path / "a.parquet"))
    reads = []
    read_group = source._read_group
    monkeypatch.setattr(source, "_read_group", lambda *key: reads.append(key) or read_group(*key))
    threads = [threading.Thread(target=values, args=(source,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 4


def test_parquet_without_images_or_no_parquet_at_all(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no image column"):
        open_source(str(tmp_path / "a.parquet"))
    (tmp_path / "b.parquet").write_bytes(b"hello")
    with pytest.raises(InputError, match="no readable Parquet"):
        open_source(str(tmp_path / "b.parquet"))
    write_parquet(tmp_path / "c.parquet", [])
    with pytest.raises(InputError, match="no rows"):
        open_source(str(tmp_path / "c.parquet"))


# ---- jsonl


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def test_jsonl_rows(tmp_path):
    for number in range(3):
        write(tmp_path / "images" / f"{number}.png", png(number))
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "grey"}]
    rows = [
        {"image": "images/2.png", "captions": ["a", "b"], "label": "x"},
        {"file_name": "images/0.png", "conversations": turns, "label": "y"},
        {"conversations": turns},
        {"image": "images/1.png", "question": "q?", "answer": "a", "choices": ["a", "b"]},
        {"image": "images/gone.png"},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    source = open_source(str(tmp_path / "rows.jsonl"))
    assert names(source) == ["images/2.png", "images/0.png", "images/1.png", "images/gone.png"]
    assert [int(decode(source.read(i))[0, 0, 0]) for i in range(3)] == [2, 0, 1]
    assert source.labels["label"].tolist() == [0, 1, -1, -1] and source.class_names == {"label": ["x", "y"]}
    assert [source.text(i) for i in range(4)] == [
        {"captions": ["a", "b"]},
        {"conversations": turns},
        {"question": "q?", "answer": "a", "choices": ["a", "b"]},
        None,
    ]
    assert source.skipped == [f"line 3 of {tmp_path}/rows.jsonl: no image"]
    with pytest.raises(BadImage, match="No such file"):
        source.read(3)


@pytest.mark.parametrize("image", ["../secret.png", "/secret.png", "a/../../secret.png", "a\0.png"])
def test_jsonl_paths_outside_are_refused(tmp_path, image):
    write(tmp_path / "secret.png", png(1))
    write_jsonl(tmp_path / "set" / "rows.jsonl", [{"image": image.replace("/secret", f"{tmp_path}/secret", 1)}])
    with pytest.raises(InputError, match=r"line 1 .* outside .*root="):
        open_source(str(tmp_path / "set" / "rows.jsonl"))


def test_jsonl_links_outside_are_bad_and_root_allows_more(tmp_path):
    write(tmp_path / "secret.png", png(1))
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "secret.png", tmp_path / "set" / "link.png")
    os.mkfifo(tmp_path / "set" / "pipe.png")
    write_jsonl(tmp_path / "set" / "rows.jsonl", [{"image": "link.png"}, {"image": "pipe.png"}])
    source = open_source(str(tmp_path / "set" / "rows.jsonl"))
    with pytest.raises(BadImage, match="leads outside"):
        source.read(0)
    with pytest.raises(BadImage, match="not a regular file"):
        source.read(1)
    write_jsonl(tmp_path / "set" / "wide.jsonl", [{"image": "secret.png"}, {"image": "set/link.png"}])
    check_contract(open_source(f"jsonl:{tmp_path}/set/wide.jsonl?root={tmp_path}"), [1, 1])


def test_jsonl_errors(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}\nnot json\n')
    with pytest.raises(InputError, match=r"line 2 .* no JSON object"):
        open_source(str(tmp_path / "bad.jsonl"))
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"line 1 .* no JSON object"):
        open_source(str(tmp_path / "deep.jsonl"))
    write_jsonl(tmp_path / "none.jsonl", [{"text": "x"}])
    with pytest.raises(InputError, match="names an image"):
        open_source(str(tmp_path / "none.jsonl"))


# ---- torchvision and the hub


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_torchvision_opens_packed_mnist_without_touching_it(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    for part, count in (("train", 6), ("t10k", 3)):
        write_idx(
            raw / f"{part}-images-idx3-ubyte.gz", np.arange(count * 28 * 28).reshape(count, 28, 28).astype(np.uint8)
        )
        write_idx(raw / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8))
    before = sorted(tmp_path.rglob("*"))
    source = open_source(f"torchvision:FashionMNIST?root={tmp_path}&split=test")
    expected = (np.arange(3 * 28 * 28).astype(np.uint8)).reshape(3, 28, 28)
    assert all((decode(source.read(i), channels=1)[:, :, 0] == expected[i]).all() for i in range(3))
    assert source.labels["label"].tolist() == [0, 1, 2] and source.class_names["label"][1] == "Trouser"
    assert len(open_source(f"torchvision:FashionMNIST?root={tmp_path}")) == 6
    assert sorted(tmp_path.rglob("*")) == before
    check_contract(source, [int(image[0, 0]) for image in expected])


def test_torchvision_errors(tmp_path):
    with pytest.raises(InputError, match="no data set 'Nothing'"):
        open_source("torchvision:Nothing")
    with pytest.raises(InputError, match="cannot open torchvision:CIFAR10 split test below"):
        open_source(f"torchvision:CIFAR10?root={tmp_path}&split=test")
    with pytest.raises(InputError, match="splits train and test"):
        open_source(f"torchvision:CIFAR10?root={tmp_path}&split=val")
    with pytest.raises(InputError, match="unknown option 'rot'"):
        open_source(f"torchvision:CIFAR10?rot={tmp_path}")


class FakeHubTable:
    """The part of `datasets.Dataset` that is used."""

    def __init__(self, rows, features):
        self.rows, self.features, self._fingerprint = rows, features, "f"

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]

    def cast_column(self, name, feature):
        return self


def test_hub_sets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        open_source("hf:user/set?split=train")
    module = types.ModuleType("datasets")
    module.Image = type("Image", (), {"__init__": lambda self, decode=True: None})
    module.ClassLabel = type("ClassLabel", (), {"__init__": lambda self, names=(): setattr(self, "names", names)})
    rows = [{"image": {"bytes": png(i), "path": None}, "label": i, "caption": f"no. {i}"} for i in range(3)]
    features = {"image": module.Image(), "label": module.ClassLabel(["a", "b", "c"]), "caption": None}
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return FakeHubTable(rows, features)

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    source = open_source("hf:user/set?split=val&config=small")
    assert asked == [("user/set", "small", "val")] and values(source) == [0, 1, 2]
    assert source.labels["label"].tolist() == [0, 1, 2] and source.class_names == {"label": ["a", "b", "c"]}
    assert source.text(1) == {"captions": ["no. 1"]} and names(source) == ["0", "1", "2"]


# ---- specs


def test_bare_paths_are_recognised(tmp_path):
    write(tmp_path / "photos" / "a.png", png(1))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    write_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", [png(2)])
    write_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", [png(3)])
    write_tar(tmp_path / "shards" / "00000.tar", [("a.png", png(4))])
    write_tar(tmp_path / "shards" / "00001.tar", [("a.png", png(5))])
    write(tmp_path / "llava" / "images" / "a.png", png(6))
    write_jsonl(tmp_path / "llava" / "chat.jsonl", [{"image": "images/a.png", "captions": ["x"]}])
    write(tmp_path / "listed" / "images" / "a.png", png(7))
    write_jsonl(tmp_path / "listed" / "manifest.jsonl", [{"file": "images/a.png"}])
    for name, expected in [("photos", [1]), ("hub", [2]), ("shards", [4, 5]), ("llava", [6]), ("listed", [7])]:
        assert values(open_source(str(tmp_path / name))) == expected, name
    assert values(open_source(f"{tmp_path}/hub?split=test")) == [3]
    with pytest.raises(InputError, match=r"no split 'val'.* test, train"):
        open_source(f"{tmp_path}/hub?split=val")
    assert open_source(str(tmp_path / "hub")).spec == f"parquet:{tmp_path}/hub/data/train-00000-of-00001.parquet"
    assert open_source(str(tmp_path / "shards")).spec == f"tar:{tmp_path}/shards/0000*.tar"


def test_split_folders_are_not_classes(tmp_path):
    for split, count in (("train", 2), ("val", 1)):
        for label in ("cat", "dog"):
            for number in range(count):
                write(tmp_path / split / label / f"{number}.png", png(number))
    source = open_source(str(tmp_path))
    assert len(source) == 4 and source.class_names["label"] == ["cat", "dog"]
    assert len(open_source(f"{tmp_path}?split=val")) == 2
    assert open_source(f"folder:{tmp_path}").class_names["label"] == ["train", "val"]
    (tmp_path / "lion").mkdir()
    assert len(open_source(str(tmp_path))) == 6


def test_lists_ranges_and_globs(tmp_path):
    for number in (8, 9, 10):
        write_tar(tmp_path / f"a-{number:02d}.tar", [("a.png", png(number))])
    base = f"tar:{tmp_path}"
    assert values(open_source(f"{base}/a-{{08..10}}.tar")) == [8, 9, 10]
    assert values(open_source(f"{base}/a-{{10,08}}.tar")) == [10, 8]
    assert values(open_source(f"{base}/a-?9.tar,{tmp_path}/a-*.tar")) == [9, 8, 10]
    assert values(open_source(base)) == [8, 9, 10]
    for pattern, message in [
        ("a-{10..08}.tar", "backwards"),
        ("b*.tar", "no .tar file"),
        ("a-{08..11}.tar", "a-11.tar"),
    ]:
        with pytest.raises(InputError, match=message):
            open_source(f"{base}/{pattern}")


@pytest.mark.parametrize("name", ["[1] a{b}, c?.d", "what?x=1"])
def test_paths_that_look_like_patterns(tmp_path, name):
    write(tmp_path / name / "a.png", png(1))
    write_tar(tmp_path / name / "tars" / "b.tar", [("a.png", png(2))])
    assert values(open_source(f"folder:{tmp_path / name}")) == [1]
    assert values(open_source(f"tar:{tmp_path / name}/tars/b.tar")) == [2]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/missing", "no such path"),
        ("folder:{}/missing", "no folder"),
        ("folder:{}/empty", "no images in the folder .* no files"),
        ("folder:{}/text", "it holds 1 \\*.txt"),
        ("{}/text/a.txt", "no .parquet, .tar or .jsonl"),
        ("tar:{}/missing.tar", "no .tar file"),
        ("parquet:{}/missing/*.parquet", "no .parquet file"),
        ("jsonl:{}/missing.jsonl", "no .jsonl file"),
        ("nonsense:{}", "no such path"),
        ("", "no such path"),
    ],
)
def test_missing_input_is_one_line_with_a_remedy(tmp_path, spec, message):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "text" / "a.txt")
    with pytest.raises(InputError, match=message) as caught:
        open_source(spec.format(tmp_path))
    assert "\n" not in str(caught.value)


def test_scenes_are_dispatched():
    assert len(open_source("scenes:?n=3&size=32")) == 3


# ---- real data


def test_real_sets(real_data):
    cifar = open_source(f"{real_data}/cifar10")
    assert (
        len(cifar) == 50_000
        and cifar.class_names["label"][3] == "cat"
        and cifar.spec.endswith("cifar10/train-0000*.parquet")
    )
    counts = np.bincount(cifar.labels["label"])
    assert counts.tolist() == [5000] * 10
    assert decode(cifar.read(49_999)).shape == (32, 32, 3)
    flickr = open_source(f"{real_data}/flickr8k")
    assert len(flickr) == 6000 and len(flickr.text(5999)["captions"]) == 5
    assert decode(flickr.read(5999)).shape == (128, 128, 3)


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(InputError, match=r"cannot read the folder .*Permission denied"):
        open_source(str(tmp_path))
