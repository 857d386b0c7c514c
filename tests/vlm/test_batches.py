"""The stream of training batches: keyed order, keyed turns, exact seeking, frozen tokens."""

import threading
from collections import Counter

import numpy as np
import pytest
import torch
from vlm_fixtures import small_tokenizer

from sslvit.data.decode import BadFiles
from sslvit.data.pairs import Pairs, open_pairs
from sslvit.data.turns import Turn
from sslvit.encoder.config import Preprocessing
from sslvit.errors import InputError
from sslvit.vlm.batches import PairBatches, PairImages, draw_turns
from sslvit.vlm.blocks import IGNORED
from sslvit.vlm.language import bundled_chat

SPEC = "scenes:?n=20&size=32"


def images_of(tmp_path, pairs=None):
    return PairImages(pairs or open_pairs(SPEC), Preprocessing(32), BadFiles(tmp_path / "bad_files.jsonl"))


def stream(tmp_path, pairs=None, see="images", **changes):
    settings = {"batch_size": 8, "num_turns": 3, "max_tokens": 100, "seed": 0, **changes}
    return PairBatches(images_of(tmp_path, pairs), bundled_chat(small_tokenizer()), see=see, **settings)


def take(batches, count):
    found = []
    for batch, cursor in batches:
        found.append((batch, cursor))
        if len(found) == count:
            return found
    return found


def same(one, two):
    return one.images.equal(two.images) and one.blocks.ids.equal(two.blocks.ids)


def test_every_image_once_an_epoch_and_another_order_in_the_next(tmp_path):
    batches = take(stream(tmp_path, batch_size=10), 4)
    seen = [image.sum().item() for batch, _ in batches for image in batch.images]
    assert sorted(seen[:20]) == sorted(seen[20:]) and seen[:20] != seen[20:]
    assert [cursor for _, cursor in batches] == [10, 20, 30, 40]


def test_seeking_gives_the_same_batches(tmp_path):
    straight = take(stream(tmp_path), 6)
    resumed = stream(tmp_path)
    resumed.seek(straight[2][1])
    for (one, cursor), (two, again) in zip(straight[3:], take(resumed, 3), strict=True):
        assert same(one, two) and cursor == again


def test_seeds_differ_and_turns_change_between_epochs(tmp_path):
    (one, _), (other, _) = take(stream(tmp_path), 1)[0], take(stream(tmp_path, seed=1), 1)[0]
    assert not same(one, other)
    single = open_pairs("scenes:?n=1&size=32")
    ids = {tuple(b.blocks.ids[0].tolist()) for b, _ in take(stream(tmp_path, single, batch_size=1), 6)}
    assert len(ids) > 1


def test_ranks_share_the_batch(tmp_path, monkeypatch):
    whole = take(stream(tmp_path), 2)[1][0]
    parts = []
    for rank in range(2):
        monkeypatch.setattr("sslvit.vlm.batches.distributed.world_size", lambda: 2)
        monkeypatch.setattr("sslvit.vlm.batches.distributed.rank", lambda rank=rank: rank)
        parts.append(take(stream(tmp_path), 2)[1][0].images)
    assert torch.cat(parts).equal(whole.images)


def test_turns_come_from_all_families_alike():
    turns = [Turn(f"c{i}", "a", "count") for i in range(20)] + [Turn(f"r{i}", "a", "relation") for i in range(2)]
    turns.append(Turn("d", "a", "caption"))
    drawn = Counter(t.family for seed in range(200) for t in draw_turns(turns, 3, np.random.default_rng(seed)))
    assert drawn == {"count": 200, "relation": 200, "caption": 200}
    assert len(draw_turns(turns, 50, np.random.default_rng(0))) == 23
    six = Counter(t.family for t in draw_turns(turns, 6, np.random.default_rng(0)))
    assert six == {"count": 3, "relation": 2, "caption": 1}


def test_captions_are_so_many_where_there_are_questions_too():
    captions = [Turn("d", f"a{i}", "caption") for i in range(5)]
    turns = [*captions, *(Turn(f"c{i}", "a", "count") for i in range(4))]

    def drawn(turns, num_turns, num_captions):
        chosen = draw_turns(turns, num_turns, np.random.default_rng(0), num_captions)
        return Counter(t.family for t in chosen)

    assert drawn(turns, 5, 2) == {"caption": 2, "count": 3}
    assert drawn(turns, 8, 2) == {"caption": 4, "count": 4}, "when questions run out, captions fill up"
    assert drawn(captions, 3, 1) == {"caption": 3}
    assert drawn(turns, 3, 0) == {"count": 3}


def test_too_long_turns_are_left_out(tmp_path):
    long = take(stream(tmp_path, max_tokens=25, num_turns=20), 1)[0][0]
    lengths = [(long.blocks.turn[0] == t).sum().item() for t in range(int(long.blocks.turn[0].max()) + 1)]
    assert 0 < max(lengths) <= 25
    none = take(stream(tmp_path, max_tokens=2), 1)[0][0]
    assert bool((none.blocks.targets == IGNORED).all())


class Broken:
    """A source in which some images are no images."""

    spec = "folder:/broken"

    def __init__(self, scenes, broken):
        self.scenes, self.broken = scenes, broken

    def __len__(self):
        return len(self.scenes)

    def name(self, i):
        return f"{i}.jpg"

    def read(self, i):
        return b"no image" if i in self.broken else self.scenes.read(i)


def broken_pairs(broken):
    whole = open_pairs(SPEC)
    return Pairs(Broken(whole.source, broken), [(i,) for i in range(len(whole))], whole.turns)


def test_unreadable_images_are_named_and_replaced(tmp_path):
    batches = stream(tmp_path, broken_pairs({3, 4}), batch_size=20)
    (batch, _), good = take(batches, 1)[0], open_pairs(SPEC)
    assert len(batch.images) == 20
    sums = Counter(image.sum().item() for image in batch.images)
    five = torch.from_numpy(good.read(5)).permute(2, 0, 1).sum().item()
    assert sums[five] == 3, "3 and 4 are replaced by the next that can be read"
    with pytest.raises(InputError, match="can be read"):
        take(stream(tmp_path, broken_pairs(set(range(20)))), 1)


def visited(tmp_path, num_images, broken, epochs, **limits):
    """The counters after some epochs over images that are not kept in memory."""
    scenes = open_pairs(f"scenes:?n={num_images}&size=32")
    pairs = Pairs(Broken(scenes.source, broken), [(i,) for i in range(num_images)], scenes.turns)
    images = PairImages(pairs, Preprocessing(32), BadFiles(tmp_path / "bad_files.jsonl", **limits), num_workers=2)
    images._kept = None
    for _ in range(epochs):
        read = images.readable_all(range(num_images))
    assert [number for number, _ in read] == [n + 1 if n in broken else n for n in range(num_images)]
    return images.bad_files


def test_each_image_counts_once_good_or_bad(tmp_path):
    bad_files = visited(tmp_path, 20, {3}, epochs=8)
    assert bad_files.num_seen == 20 and set(bad_files.reasons) == {"3.jpg"}
    bad_files = visited(tmp_path, 120, {3, 50, 90}, epochs=2)
    assert bad_files.num_seen == 120
    with pytest.raises(InputError, match="limit 1%"):
        visited(tmp_path, 120, {3, 50, 118}, epochs=1, max_bad_rate=0.01)


def test_a_file_that_is_gone_is_a_bad_image(tmp_path):
    pairs = broken_pairs(set())
    pairs.source.read = lambda i: (tmp_path / "gone.jpg").read_bytes() if i == 3 else open_pairs(SPEC).read(i)
    images = images_of(tmp_path, pairs)
    assert images.readable(3)[0] == 4 and list(images.bad_files.reasons) == ["3.jpg"]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_threads_decode_what_is_not_in_memory_and_change_nothing(tmp_path, num_workers):
    one, many = images_of(tmp_path), images_of(tmp_path)
    many.num_workers, threads, read = num_workers, set(), many.pairs.source.read
    many.pairs.source.read = lambda i: threads.add(threading.current_thread().name) or read(i)
    wanted = [7, 2, 2, 19, 7]
    for _ in range(2):
        got = many.readable_all(wanted)
        assert [number for number, _ in got] == wanted
        assert all(image.equal(one.get(number)) for number, image in got)
        assert threads == {"loader" if num_workers else "MainThread"}
    assert len(many._kept) == 3


def test_frozen_tokens_are_made_once_and_belong_to_their_images(tmp_path):
    calls = []

    def encode(pixels):
        calls.append(len(pixels))
        return pixels.float().mean(dim=(2, 3))[:, None]

    frozen = stream(tmp_path, see="tokens", encode=encode)
    seen = stream(tmp_path)
    for (one, _), (two, _) in zip(take(frozen, 5), take(seen, 5), strict=True):
        torch.testing.assert_close(one.tokens[:, 0], two.images.float().mean(dim=(2, 3)))
        assert one.images is None and one.blocks.ids.equal(two.blocks.ids)
    assert sum(calls) == 20


def test_text_alone_reads_no_image(tmp_path):
    batch, _ = take(stream(tmp_path, broken_pairs(set(range(20))), see="nothing", whole=True), 1)[0]
    assert batch.images is None and bool((batch.blocks.targets != IGNORED).any())
