"""The order of an epoch in blocks: still a permutation, each block read once, the same from any cursor."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sslvit.data import parquet
from sslvit.data.order import Blocks, Order, sample
from sslvit.data.sources import open_source


def png(value):
    """A flat grey image file."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class InBlocks:
    """A source of images in blocks of these sizes."""

    def __init__(self, sizes, at_once):
        self.ends, self.at_once = np.cumsum(sizes), at_once

    def __len__(self):
        return int(self.ends[-1])

    def blocks(self):
        return Blocks(self.ends, self.at_once)


SIZES = np.random.default_rng(0).integers(1, 40, 37)


@pytest.mark.parametrize("at_once", [1, 3, 37, 100])
def test_every_image_once_an_epoch_whichever_way_it_is_asked(at_once):
    source = InBlocks(SIZES, at_once)
    n = len(source)
    places = np.arange(3 * n)
    whole = Order(source, 5)(places % n, places // n)
    for epoch in range(3):
        assert sorted(whole[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert not np.array_equal(whole[:n], whole[n : 2 * n])
    assert not np.array_equal(whole[:n], Order(source, 6)(places[:n], 0 * places[:n]))
    backwards = Order(source, 5)  # another process, another cursor
    parts = [backwards(p % n, p // n) for p in (places[2 * n + 7 :], places[n - 3 : n + 9], places[:5])]
    np.testing.assert_array_equal(
        np.concatenate(parts), np.concatenate([whole[2 * n + 7 :], whole[n - 3 : n + 9], whole[:5]])
    )


def test_a_window_holds_its_blocks_and_no_other_and_mixes_them():
    source = InBlocks(np.full(60, 50), 6)
    ids = Order(source, 1)(np.arange(3000), np.zeros(3000, int))
    windows = [set(window // 50) for window in ids.reshape(10, 300)]
    assert all(len(window) == 6 for window in windows)
    assert sorted(block for window in windows for block in window) == list(range(60))
    assert any(max(w) - min(w) > 20 for w in windows), "blocks of a window come from anywhere"
    for window in ids.reshape(10, 300):  # six blocks in 300 places: runs of one block are short
        assert (np.diff(window // 50) == 0).mean() < 0.3


def test_a_plain_source_keeps_its_permutation_and_samples_are_ascending():
    plain = open_source("scenes:?n=40&size=32")
    ids = Order(plain, 3)(np.arange(80) % 40, np.arange(80) // 40)
    assert sorted(ids[:40]) == sorted(ids[40:]) == list(range(40))
    chosen = sample(plain, 10, seed=0)
    assert len(set(chosen.tolist())) == 10 and (np.diff(chosen) > 0).all()
    blocked = InBlocks(np.full(60, 50), 2)
    assert len(set((sample(blocked, 80, seed=0) // 50).tolist())) <= 2, "a sample fetches few blocks"


def test_a_large_parquet_set_reads_each_row_group_once_an_epoch(tmp_path, monkeypatch):
    """Twelve groups, of which memory holds four: a shuffle over everything would read most images' group anew."""
    noise = np.random.default_rng(0)
    for file in range(2):
        images = [{"bytes": png(10 * file + i % 10) + noise.bytes(3000), "path": f"{file}-{i}"} for i in range(60)]
        pq.write_table(pa.table({"image": images}), tmp_path / f"{file}.parquet", row_group_size=10, compression="none")
    monkeypatch.setattr(parquet, "WHOLE_BYTES", 100_000)
    monkeypatch.setattr(parquet, "KEPT_BYTES", 150_000)
    source = open_source(f"parquet:{tmp_path}")
    reads = []
    original = parquet.ParquetSource._read_group
    monkeypatch.setattr(
        parquet.ParquetSource,
        "_read_group",
        lambda self, group, columns: reads.append(group) or original(self, group, columns),
    )
    assert source.blocks().at_once == 2
    for index in Order(source, 0)(np.arange(120), np.zeros(120, int)):
        source.read(int(index))
    assert sorted(reads) == list(range(12))
    reads.clear()
    monkeypatch.setattr(parquet.ParquetSource, "blocks", lambda self: None)
    for index in Order(source, 0)(np.arange(120), np.zeros(120, int)):
        source.read(int(index))
    assert len(reads) > 40  # without windows
