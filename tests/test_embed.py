"""embed writes exactly what evaluate judges."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import sslvit
from sslvit.data.sources import open_source
from sslvit.encoder.weights import load_encoder
from sslvit.errors import InputError
from sslvit.probes.features import Examples, Extraction, default_precision
from sslvit.probes.knn import nearest
from sslvit.run_folder import is_disk_full

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
ENCODER = "vit_tiny_patch16_224?pretrained=false&seed=1&img_size=32&patch_size=8&depth=2&embed_dim=24&num_heads=2"
DATA = "scenes:?n=12&size=32&objects=1&label=shape"


def judged(data=DATA):
    loaded = load_encoder(ENCODER)
    extraction = Extraction(precision=default_precision("cpu"), num_workers=0)
    return Examples(open_source(data), loaded.module, loaded.preprocessing, extraction).features


def test_npz_holds_what_evaluate_judges(tmp_path):
    file = tmp_path / "new" / "f.npz"
    sslvit.embed(encoder=ENCODER, data=DATA, output_file=file, num_workers=0)
    with np.load(file, allow_pickle=False) as stored:
        assert set(stored) == {"features", "labels", "names"}
        assert stored["features"].dtype == np.float32 and stored["labels"].dtype == np.int64
        assert stored["names"].dtype.kind == "U"
        assert np.array_equal(stored["features"], judged().cls)
        assert np.array_equal(stored["labels"], open_source(DATA).labels["shape"])
        assert stored["names"].tolist() == [open_source(DATA).name(i) for i in range(12)]
    assert np.linalg.norm(judged().cls, axis=1).std() >= 0  # not normalised: whatever the encoder says
    assert [p.name for p in file.parent.iterdir()] == ["f.npz"]


def test_parquet_holds_the_same(tmp_path):
    arrays = sslvit.embed(encoder=ENCODER, data=DATA, output_file=tmp_path / "f.parquet", num_workers=0)
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["name", "features", "shape"]
    assert np.array_equal(np.stack(table["features"].to_numpy()), arrays["features"])
    assert table["name"].to_pylist() == arrays["names"].tolist()


def test_several_labels_stand_side_by_side(tmp_path):
    data = DATA.replace("&label=shape", "")
    arrays = sslvit.embed(encoder=ENCODER, data=data, output_file=tmp_path / "f.npz", num_workers=0)
    assert arrays["labels"].shape == (12, 3)
    assert arrays["label_names"].tolist() == ["shape", "colour", "size"]


def test_numbers_stay_numbers(tmp_path):
    """Ages of 1.5 and 2.5 are no classes 1 and 2."""
    for i, age in enumerate((1.5, 2.5, 40.0)):
        Image.new("RGB", (32, 32), (60 * i, 9, 9)).save(tmp_path / f"{i}.png")
        with open(tmp_path / "rows.jsonl", "a") as file:
            file.write(json.dumps({"image": f"{i}.png", "label": age}) + "\n")
    keys = {"encoder": ENCODER, "data": f"jsonl:{tmp_path}/rows.jsonl", "num_workers": 0}
    arrays = sslvit.embed(output_file=tmp_path / "f.npz", **keys)
    assert arrays["labels"].dtype == np.float64 and arrays["labels"].tolist() == [1.5, 2.5, 40.0]


def test_without_labels_and_with_odd_names(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"plain.png", b"caf\xe9.png"):
        Image.new("RGB", (32, 32), (200, 9, 9)).save(folder / "x.png")
        (folder / "x.png").rename(folder.joinpath(name.decode("utf-8", "surrogateescape")))
    (folder / "broken.png").write_bytes(b"no image")
    for suffix in ("npz", "parquet"):
        arrays = sslvit.embed(encoder=ENCODER, data=str(folder), output_file=tmp_path / f"f.{suffix}", num_workers=0)
        assert set(arrays) == {"features", "names"}
        assert len(arrays["features"]) == 2
    assert "caf\\udce9.png" in pq.read_table(tmp_path / "f.parquet")["name"].to_pylist()


def test_index_finds_neighbours(tmp_path):
    import faiss

    arrays = sslvit.embed(encoder=ENCODER, data=DATA, output_file=tmp_path / "f.npz", num_workers=0, index=True)
    index = faiss.read_index(str(tmp_path / "f.faiss"))
    unit = arrays["features"] / np.linalg.norm(arrays["features"], axis=1, keepdims=True)
    assert np.array_equal(index.search(unit, 3)[1], nearest(arrays["features"], arrays["features"], 3)[1])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"output_file": "f.csv"}, r"\.npz"),
        ({"output_file": "/proc/f.npz"}, "cannot write"),
        ({"data": "/nowhere"}, "nowhere"),
        ({"encoder": "vit_tinny"}, "vit_tinny"),
        ({"device": "gpu"}, "device"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "abc"}, "batch_size"),
        ({"precision": "fp16"}, "precision"),
        ({"num_workers": -1}, "num_workers"),
        pytest.param({"device": "cuda"}, "no usable CUDA", marks=NO_GPU),
    ],
)
def test_wrong_input_is_named(tmp_path, keys, message):
    settings = {"encoder": ENCODER, "data": DATA, "output_file": tmp_path / "f.npz", "num_workers": 0, **keys}
    with pytest.raises(InputError, match=message):
        sslvit.embed(**settings)


def test_a_full_disk_is_no_wrong_input(tmp_path, monkeypatch):
    """It leaves neither file nor debris, and is told apart from a wrong place."""
    monkeypatch.setattr(np, "savez", lambda *a, **k: (_ for _ in ()).throw(OSError("12 requested and 3 written")))
    with pytest.raises(OSError, match="12 requested") as caught:
        sslvit.embed(encoder=ENCODER, data=DATA, output_file=tmp_path / "f.npz", num_workers=0)
    assert is_disk_full(caught.value) and not list(tmp_path.iterdir())
