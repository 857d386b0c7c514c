"""The stream of batches: every sample once an epoch, the same at any worker count and world size, and never stuck."""

import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslvit.data import crops, keyed, loader, workers
from sslvit.data.config import DINO_PHOTOMETRY, CropsConfig
from sslvit.data.decode import BadFiles, BadImage
from sslvit.data.loader import Loader, clean_batches, measure_range, measure_statistics
from sslvit.encoder.config import Preprocessing
from sslvit.errors import InputError, Resumable

CROPS = CropsConfig(num_global=2, global_scale=[0.4, 1.0], num_local=2, local_size=8)


class Pictures:
    """Random images in memory; `bad` ones are bytes that are no image."""

    def __init__(self, n=23, side=12, channels=3, bad=()):
        self.spec, self.labels, self.class_names = "pictures", {}, {}
        random = np.random.default_rng(n)
        self.images = random.integers(0, 256, (n, side, side + 2, channels), dtype=np.uint8)
        self.bad = set(bad)
        self.reads = []

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return f"picture-{index}"

    def read(self, index):
        self.reads.append(index)
        return b"no image" if index in self.bad else self.images[index]


def make(source=None, batch_size=5, *, size=16, channels=3, **settings):
    settings = {"seed": 0, "num_workers": 0, **settings}
    return Loader(
        Pictures() if source is None else source, CROPS, DINO_PHOTOMETRY, size, channels, batch_size, **settings
    )


def take(batches, count):
    stream = iter(batches)
    taken = [next(stream) for _ in range(count)]
    stream.close()
    return taken


def equal(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in vars(first))


def joined(parts):
    """Ranks' slices of one global batch, side by side."""
    axes = {"sample_ids": 0, "epochs": 0}
    names = vars(parts[0])
    return loader.Views(**{name: torch.cat([getattr(p, name) for p in parts], axes.get(name, 1)) for name in names})


def once_an_epoch(stream, n, epochs=3):
    ids = torch.cat([views.sample_ids for views, _ in stream])[: epochs * n].view(epochs, n)
    numbers = torch.cat([views.epochs for views, _ in stream])[: epochs * n].view(epochs, n)
    return all(sorted(ids[e].tolist()) == list(range(n)) and (numbers[e] == e).all() for e in range(epochs))


@pytest.mark.parametrize(("n", "batch_size"), [(23, 5), (7, 16), (8, 4)])
def test_each_sample_comes_once_an_epoch(n, batch_size, monkeypatch):
    num_batches = -(-3 * n // batch_size)
    stream = take(make(Pictures(n), batch_size), num_batches)
    assert once_an_epoch(stream, n)
    assert [cursor for _, cursor in stream] == [batch_size * (i + 1) for i in range(num_batches)]
    ids = torch.cat([views.sample_ids for views, _ in stream]).tolist()
    assert ids[:n] != ids[n : 2 * n]
    monkeypatch.setattr(
        "sslvit.data.order.permute", lambda index, n, key: (keyed.hash_key(index) % np.uint64(n)).astype(int)
    )
    assert not once_an_epoch(take(make(Pictures(n), batch_size), num_batches), n)  # drawn with replacement: noticed


def test_batches_hold_what_make_views_makes_of_each_sample():
    source = Pictures()
    for views, _ in take(make(source), 6):
        for column, (sample, epoch) in enumerate(zip(views.sample_ids.tolist(), views.epochs.tolist(), strict=True)):
            alone = crops.make_views(source.images[sample], CROPS, 16, DINO_PHOTOMETRY, 0, epoch, sample)
            assert torch.equal(views.global_crops[:, column], alone.global_crops)
            assert torch.equal(views.local_crops[:, column], alone.local_crops)
            assert torch.equal(views.global_photometry[:, column], alone.global_photometry)
            assert torch.equal(views.local_photometry[:, column], alone.local_photometry)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(num_workers):
    bad = (3, 11)
    one = take(make(Pictures(bad=bad), bad_files=BadFiles(max_bad_rate=1)), 8)
    many = take(make(Pictures(bad=bad), num_workers=num_workers, bad_files=BadFiles(max_bad_rate=1)), 8)
    for (first, cursor), (second, same_cursor) in zip(one, many, strict=True):
        assert cursor == same_cursor and equal(first, second)


@pytest.mark.parametrize("world", [2, 3])
def test_world_size_changes_nothing_but_the_slicing(world):
    whole = take(make(batch_size=6), 8)
    ranks = [take(make(batch_size=6 // world, rank=rank, world=world), 8) for rank in range(world)]
    for step, (views, cursor) in enumerate(whole):
        assert all(rank[step][1] == cursor for rank in ranks)
        assert equal(views, joined([rank[step][0] for rank in ranks]))


def test_draws_from_a_shared_state_would_be_noticed(monkeypatch):
    state = np.random.default_rng(0)
    monkeypatch.setattr(crops, "uniforms", lambda *key: state.random((len(key[2]), len(key[3]), key[4])))
    whole, ranks = take(make(batch_size=6), 2), [take(make(batch_size=3, rank=r, world=2), 2) for r in range(2)]
    assert not equal(whole[1][0], joined([rank[1][0] for rank in ranks]))


def test_seed_changes_order_and_crops():
    (first, _), (second, _) = take(make(), 1)[0], take(make(seed=1), 1)[0]
    assert first.sample_ids.tolist() != second.sample_ids.tolist()
    assert not torch.equal(first.global_photometry, second.global_photometry)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_seek_resumes_mid_epoch_and_reads_nothing_else(num_workers):
    straight = take(make(), 9)
    source = Pictures()
    resumed = make(source, num_workers=num_workers)
    resumed.seek(straight[5][1])
    again = take(resumed, 3)
    assert all(equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(straight[6:], again, strict=True))
    assert len(source.reads) <= 5 * (3 + 3)  # the batches asked for, and those prefetched


def test_iterating_again_goes_on_at_the_cursor():
    straight, batches = take(make(), 4), make(num_workers=1)
    assert equal(take(batches, 2)[1][0], straight[1][0])
    assert batches.cursor == straight[1][1]
    assert equal(take(batches, 1)[0][0], straight[2][0])


def test_bad_images_are_replaced_alike_and_named_once(tmp_path):
    bad_files = BadFiles(tmp_path / "bad_files.jsonl", max_bad_rate=1)
    source = Pictures(23, bad=(2, 9))
    stream = take(make(source, bad_files=bad_files), 14)
    good = take(make(Pictures(23)), 14)
    for (views, _), (before, _) in zip(stream, good, strict=True):
        changed = torch.isin(before.sample_ids, torch.tensor([2, 9]))
        assert torch.equal(views.sample_ids[~changed], before.sample_ids[~changed])
        assert not torch.isin(views.sample_ids, torch.tensor([2, 9])).any()
        assert torch.equal(views.global_photometry, before.global_photometry)  # the draws stay with the place
        assert torch.equal(views.global_crops[:, ~changed], before.global_crops[:, ~changed])
    rows = [json.loads(line) for line in (tmp_path / "bad_files.jsonl").read_text().splitlines()]
    assert sorted(row["name"] for row in rows) == ["picture-2", "picture-9"] and all(row["reason"] for row in rows)


def test_read_errors_of_the_disk_are_bad_images_too():
    class Flaky(Pictures):
        def read(self, index):
            if index == 4:
                raise OSError(5, "Input/output error")
            if index == 5:
                raise BadImage("the row holds no image bytes")
            return super().read(index)

    bad_files = BadFiles(max_bad_rate=1)
    take(make(Flaky(), bad_files=bad_files), 5)
    assert set(bad_files.reasons) == {"picture-4", "picture-5"}


def test_too_many_bad_images_stop_the_run():
    with pytest.raises(InputError, match="cannot be used"):
        take(make(Pictures(50, bad=range(25)), num_workers=1), 200)
    with pytest.raises(InputError, match="unreadable"):
        take(make(Pictures(3, bad=range(3)), bad_files=BadFiles(max_bad_rate=1)), 1)


def test_an_empty_source_is_an_input_error():
    with pytest.raises(InputError, match="no images"):
        make(Pictures(0))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_failing_worker_raises_with_the_name(num_workers):
    class Broken(Pictures):
        def read(self, index):
            if index == 6:
                raise ZeroDivisionError("oops")
            return super().read(index)

    with pytest.raises(RuntimeError, match=r"at picture-6: ZeroDivisionError.*oops"):
        take(make(Broken(), num_workers=num_workers), 6)


def test_an_interrupt_stays_an_interrupt():
    class Interrupted(Pictures):
        def read(self, index):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(make(Interrupted()), 1)


def test_a_hanging_read_is_named_and_does_not_hang_the_run(monkeypatch):
    release = threading.Event()

    class Hanging(Pictures):
        def read(self, index):
            if index == 6:
                release.wait(20)
            return super().read(index)

    monkeypatch.setattr(workers, "HANG_SECONDS", 0.2)
    batches, start = iter(make(Hanging(), num_workers=1)), time.monotonic()
    threading.Timer(2.5, release.set).start()  # so that the thread is not left over
    with pytest.raises(Resumable, match="picture-6 has hung"):
        for _ in range(6):
            next(batches)
    assert time.monotonic() - start < 8


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("error", [MemoryError(), ZeroDivisionError("a transient one")], ids=["memory", "dies"])
def test_a_worker_that_fails_once_is_done_again_with_the_same_result(num_workers, error, monkeypatch, caplog):
    class Once(Pictures):
        def read(self, index):
            if index == 6 and 6 not in self.reads:
                self.reads.append(6)
                raise error
            return super().read(index)

    monkeypatch.setattr(workers, "MEMORY_SECONDS", 0.0)
    bad_files = BadFiles()
    assert same(take(make(Once(), num_workers=num_workers, bad_files=bad_files), 6), take(make(), 6))
    assert "trying again" in caplog.text and not bad_files.reasons


def same(some, others):
    return all(
        torch.equal(a.global_crops, b.global_crops) and torch.equal(a.sample_ids, b.sample_ids) and at == also
        for (a, at), (b, also) in zip(some, others, strict=True)
    )


def test_no_memory_for_decoding_is_no_fault_of_the_image(monkeypatch):
    def starve(*args, **options):
        raise MemoryError

    monkeypatch.setattr(workers, "MEMORY_SECONDS", 0.0)
    monkeypatch.setattr("sslvit.data.decode._array_to_uint8", starve)
    bad_files = BadFiles(max_bad_rate=1)

    class Wrapped(Pictures):
        def read(self, index):
            buffer = io.BytesIO()
            Image.fromarray(self.images[index].astype(np.uint16)[..., 0] * 257).save(buffer, "PNG")
            return buffer.getvalue()

    with pytest.raises(Resumable, match=r"out of memory at picture-\d+; .*smaller num_workers"):
        take(make(Wrapped(), bad_files=bad_files), 1)
    assert not bad_files.reasons


def test_a_thread_that_hangs_once_is_replaced_and_nothing_changes(monkeypatch, caplog):
    release, hung = threading.Event(), []

    class Hanging(Pictures):
        def read(self, index):
            if index == 6 and not hung:
                hung.append(index)
                release.wait(20)
            return super().read(index)

    monkeypatch.setattr(workers, "HANG_SECONDS", 0.3)
    stream = iter(make(Hanging(), num_workers=1))
    taken = [next(stream) for _ in range(6)]
    release.set()
    stream.close()
    assert same(taken, take(make(), 6)) and hung and "has hung" in caplog.text


def test_threads_end_with_the_iteration():
    before = threading.active_count()
    stream = iter(make(num_workers=3))
    next(stream)
    assert threading.active_count() == before + 3
    stream.close()
    assert threading.active_count() == before


def test_loading_threads_compute_alone_and_leave_torchs_setting_to_others():
    seen = []

    class Watching(Pictures):
        def read(self, index):
            seen.append(torch.get_num_threads())
            return super().read(index)

    own = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        take(make(Watching(), num_workers=2), 2)
        assert set(seen) == {1} and torch.get_num_threads() == 2
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen[-1] == 2
    finally:
        torch.set_num_threads(own)


def test_an_abandoned_iteration_does_not_abort_the_exit_of_the_process():
    code = """

import tests_loader_pictures as here
stream = iter(here.make(num_workers=2))
next(stream)
sys.keep = stream  # never closed
"""
    path = str(Path(__file__).parent)
    code = code.replace("tests_loader_pictures", Path(__file__).stem)
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}){code}"], timeout=60)
    assert done.returncode == 0


def test_images_are_decoded_once_when_all_fit_and_never_kept_otherwise():
    for cache_bytes, reads in ((2**20, 23), (1000, 60)):
        source = Pictures()
        take(make(source, cache_bytes=cache_bytes), 12)
        assert len(source.reads) == reads


def test_the_cache_gives_up_as_soon_as_the_whole_set_cannot_fit(monkeypatch):
    monkeypatch.setattr(loader, "_CACHE_PROBE", 4)
    source = Pictures(n=1000)
    images = loader.DecodedImages(source, 3, None, cache_bytes=20 * source.images[0].nbytes)
    for index in range(8):
        images[index]
    assert images._kept is None


def test_large_images_are_cut_a_few_at_a_time_with_the_same_result(monkeypatch):
    expected, held = take(make(), 3), []
    monkeypatch.setattr(loader, "_HELD_BYTES", 2 * 12 * 14 * 3)
    batches = make()
    cut = batches._cut
    batches._cut = lambda batch, part, images: (held.append(len(images)), cut(batch, part, images))
    assert all(equal(a[0], b[0]) for a, b in zip(expected, take(batches, 3), strict=True))
    assert max(held) == 3 and sum(held) == 15


def test_grey_and_many_channels_and_a_size_that_is_not_square():
    for channels in (1, 5):
        (views, _), *_ = take(make(Pictures(channels=channels), channels=channels, size=(16, 24)), 1)
        assert views.global_crops.shape == (2, 5, channels, 16, 24)
        assert views.local_crops.shape == (2, 5, channels, 8, 8)


def test_views_move_with_their_photometry_left_on_the_cpu():
    (views, _), *_ = take(make(), 1)
    moved = views.to("meta")
    assert moved.global_crops.is_meta and moved.local_crops.is_meta and not moved.global_photometry.is_meta


def test_large_jpegs_are_decoded_at_a_reduced_scale_when_no_crop_loses_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((400, 300)).save(file, "JPEG")
    source = Pictures(1)
    source.read = lambda index: file.getvalue()
    batches = make(source)
    take(batches, 1)
    height, width = batches._images[0].shape[:2]
    assert crops.min_side(CROPS, 16) <= min(height, width) < 300


@pytest.mark.parametrize("num_workers", [0, 2])
def test_clean_batches_give_every_readable_image_in_order(num_workers):
    source, bad_files = Pictures(23, bad=(4,)), BadFiles(max_bad_rate=1)
    preprocessing = Preprocessing(image_size=10, crop_pct=0.9)
    batches = list(clean_batches(source, preprocessing, 6, num_workers, bad_files=bad_files))
    assert np.concatenate([indices for _, indices in batches]).tolist() == [i for i in range(23) if i != 4]
    assert list(bad_files.reasons) == ["picture-4"]
    for images, indices in batches:
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 10, 10)
        for image, index in zip(images, indices, strict=True):
            assert torch.equal(image, crops.eval_transform(source.images[index], preprocessing))
    chosen = [17, 3, 3]
    (_, indices), *rest = clean_batches(source, preprocessing, 6, num_workers, indices=chosen)
    assert indices.tolist() == chosen and not rest


def test_measure_statistics_are_those_of_the_pixels():
    source = Pictures(30, channels=2)
    pixels = source.images.reshape(-1, 2) / 255
    mean, std = measure_statistics(source, 2)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-6)
    few = measure_statistics(source, 2, n=10)
    assert few == measure_statistics(source, 2, n=10) and few != (mean, std)
    with pytest.raises(InputError, match="none of"):
        measure_statistics(Pictures(5, bad=range(5)), 3)


def test_the_range_is_measured_per_band_over_the_set():
    source = Pictures(30, channels=2)
    assert measure_range(source) is None  # eight bits
    source.images = source.images.astype(np.uint16) * np.array([4, 16], np.uint16) + np.uint16(7)
    low, high = measure_range(source)
    wanted = np.percentile(source.images.reshape(-1, 2), (0.1, 99.9), axis=0)
    np.testing.assert_allclose([low, high], wanted, rtol=0.02, atol=8)
    colours = Pictures(30)
    colours.images = colours.images.astype(np.uint16) * np.array([4, 16, 1], np.uint16)
    lows, highs = measure_range(colours)
    assert len(set(lows)) == len(set(highs)) == 1 and highs[0] > 4000  # or their colours would change
    mean, std = measure_statistics(source, 2, value_range=(low, high))
    np.testing.assert_allclose(mean, 0.5, atol=0.02)  # uniform values fill their range
    np.testing.assert_allclose(std, 12**-0.5, atol=0.02)
    views, _ = take(make(source, channels=2, value_range=(low, high)), 1)[0]
    assert views.global_crops.max() > 240 and take(make(source, channels=2), 1)[0][0].global_crops.max() < 20


@pytest.mark.parametrize(
    ("seconds", "num_workers", "words"),
    [
        ({"read": 6.0, "decode": 3.0, "cut": 1.0}, 2, "60% of loading is reading files: move the images to a local"),
        ({"read": 1.0, "decode": 6.0, "cut": 3.0}, 2, "raise num_workers from 2 to 8"),
        ({"read": 1.0, "decode": 6.0, "cut": 3.0}, 8, "decoding, on every core there is: store the images with a"),
        ({"read": 1.0, "decode": 3.0, "cut": 6.0}, 7, "cutting crops, on every core there is: lower crops.num_local"),
    ],
)
def test_advice_names_what_takes_the_time_and_the_remedy(seconds, num_workers, words):
    made = make(num_workers=num_workers)
    made._images.seconds = seconds
    assert words in made.advice(cores=8)


def test_time_is_booked_where_it_is_spent():
    class Slow(Pictures):
        def read(self, index):
            time.sleep(0.002)
            return super().read(index)

    made = make(Slow(), num_workers=2)
    take(made, 3)
    assert made._images.seconds["read"] > 3 * 5 * 0.002 > 0
    assert "reading files" in made.advice(cores=8)
