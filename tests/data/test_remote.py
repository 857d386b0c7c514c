"""Tar shards behind URLs: an HTTP server, a real S3 one, and fsspec's memory; the local tar source is the oracle."""

import http.server
import io
import pickle
import socket
import tarfile
import threading
import time
import urllib.request
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from sslvit.data import remote, tar
from sslvit.data.config import DINO_PHOTOMETRY, CropsConfig
from sslvit.data.loader import Loader
from sslvit.data.sources import open_source
from sslvit.errors import InputError, Outage, Resumable
from sslvit.exports import formats
from sslvit.metrics import MetricsLog
from sslvit.verbs.pretrain import pretrain

CROPS = CropsConfig(num_global=2, global_scale=[0.4, 1.0], num_local=0)


def png(value):
    """A grey image file that does not shrink away."""
    noise = np.random.default_rng(value).integers(0, 256, (24, 30), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def shard(first, count):
    """The bytes of a WebDataset shard."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for number in range(first, first + count):
            for name, data in ((f"{number}.png", png(number)), (f"{number}.cls", str(number % 3).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


class Server(http.server.BaseHTTPRequestHandler):
    """Ranges of files in memory."""

    files: dict[str, bytes]
    asked: Counter
    failing = 0  # how many of the next requests fail
    refusing = 0  # a status that is the answer to all
    tries = 0
    ranges = True
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        type(self).tries += 1
        if type(self).failing > 0 or self.refusing:
            type(self).failing -= 1
            return self.say(self.refusing or 503, b"")
        data = self.files.get(self.path.split("?")[0])
        if data is None:
            return self.say(404, b"")
        header, status = {"ETag": f'"{hash(data)}"', "Accept-Ranges": "bytes"}, 200
        if body and (wanted := self.headers.get("Range")) and self.ranges:
            first, last = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
            header["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            data, status = data[first : last + 1], 206
            self.asked[self.path.split("?")[0], first] += 1
        return self.say(status, data, body, **header)

    def say(self, status, data, body=True, **header):
        self.send_response(status)
        for name, value in header.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """(address, its class): two shards below /b/data/."""
    shards = {f"/b/data/train-{i:02d}.tar": shard(20 * i, 20) for i in range(2)}
    handler = type("Files", (Server,), {"files": shards, "asked": Counter()})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "OUTAGE_SECONDS", 0.2)
    monkeypatch.setattr(remote, "_given_up", {})
    yield f"http://127.0.0.1:{running.server_port}", handler
    running.shutdown()
    running.server_close()


@pytest.fixture
def local(tmp_path):
    """The same shards on the disk."""
    for i in range(2):
        (tmp_path / f"train-{i:02d}.tar").write_bytes(shard(20 * i, 20))
    return open_source(f"tar:{tmp_path}/train-{{00..01}}.tar")


@pytest.fixture
def memory():
    """fsspec's own: no packages, no sockets."""
    fsspec = pytest.importorskip("fsspec", reason="needs sslvit[remote]")
    system = fsspec.filesystem("memory")
    for i in range(2):
        system.pipe_file(f"/shards/train-{i:02d}.tar", shard(20 * i, 20))
    yield "memory://shards"
    system.rm("/shards", recursive=True)


def check_same(far, near):
    assert len(far) == len(near) == 40 and far.class_names == near.class_names
    np.testing.assert_array_equal(far.labels["label"], near.labels["label"])
    again = pickle.loads(pickle.dumps(far))
    for index in (0, 19, 20, 39):
        assert far.name(index) == near.name(index)
        assert far.read(index) == again.read(index) == near.read(index)
    assert again.fingerprint() == far.fingerprint()


@pytest.mark.parametrize("pattern", ["/train-{00..01}.tar", "/*.tar", "/"])
def test_shards_in_memory_are_those_on_the_disk(pattern, memory, local):
    check_same(open_source(f"tar:{memory}{pattern}"), local)


def test_shards_over_http_are_those_on_the_disk(server, local):
    pytest.importorskip("aiohttp", reason="needs sslvit[remote]")
    check_same(open_source(f"tar:{server[0]}/b/data/train-{{00..01}}.tar"), local)
    signed = ",".join(f"{server[0]}/b/data/train-0{i}.tar?token=a&expires=9" for i in range(2))
    check_same(open_source(f"tar:{signed}"), local)


def stream(source, cursor=0, count=9, **settings):
    loader = Loader(source, CROPS, DINO_PHOTOMETRY, 16, 1, 5, seed=3, num_workers=2, **settings)
    loader.seek(cursor)
    batches = iter(loader)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return [views.sample_ids.tolist() for views, _ in taken], [cursor for _, cursor in taken]


def test_order_and_resume_are_exact_and_each_block_comes_once_an_epoch(server, monkeypatch):
    """A block of 4 KiB holds a few images; memory has room for four of about ten."""
    pytest.importorskip("aiohttp", reason="needs sslvit[remote]")
    for module in (remote, tar):
        monkeypatch.setattr(module, "BLOCK_BYTES", 4096)
        monkeypatch.setattr(module, "KEPT_BYTES", 8 * 4096)
    address, handler = server
    spec = f"tar:{address}/b/data/train-{{00..01}}.tar"
    source = open_source(spec)
    num_blocks = sum(-(-len(data) // 4096) for data in handler.files.values())
    assert source.blocks().at_once == 4 and len(source.blocks().ends) > 8
    handler.asked.clear()
    ids, cursors = stream(source, count=8)  # one epoch of 40
    assert sorted(i for batch in ids for i in batch) == list(range(40))
    assert handler.asked.total() <= num_blocks + len(source.blocks().ends) / 4 + 2, (
        "a straddling image at most a window"
    )
    later, _ = stream(open_source(spec), cursor=cursors[2], count=5)
    assert later == ids[3:]
    shares = [stream(open_source(spec), count=4, rank=rank, world=2)[0] for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == [ids[2 * i] + ids[2 * i + 1] for i in range(4)]


def test_the_index_is_kept_shard_by_shard(memory, monkeypatch):
    built = []
    index = tar._index
    monkeypatch.setattr(tar, "_index", lambda files, shards: built.append(list(shards)) or index(files, shards))
    for _ in range(2):
        open_source(f"tar:{memory}/*.tar")
    assert sorted(built) == [[0], [1]]
    import fsspec

    fsspec.filesystem("memory").pipe_file("/shards/train-02.tar", shard(40, 5))
    assert len(open_source(f"tar:{memory}/*.tar")) == 45 and built[2:] == [[2]]


def test_of_all_processes_of_a_machine_one_makes_the_index_and_all_map_it(memory, monkeypatch):
    """Threads stand for processes: the lock is the file's, not the process's."""
    built, opened, index = [], [], tar._index

    def slowly(files, shards):
        built.append(list(shards))
        time.sleep(0.2)
        return index(files, shards)

    monkeypatch.setattr(tar, "_index", slowly)
    ranks = [threading.Thread(target=lambda: opened.append(open_source(f"tar:{memory}/*.tar"))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sorted(built) == [[0], [1]] and [len(source) for source in opened] == [40] * 4
    assert all(isinstance(source._members, np.memmap) for source in opened)
    assert all(
        isinstance(source._names.data.base, np.memmap) or isinstance(source._names.data, np.memmap) for source in opened
    )


def test_a_network_that_fails_for_a_moment_does_no_harm_and_one_that_stays_away_is_an_outage(server, monkeypatch):
    pytest.importorskip("aiohttp", reason="needs sslvit[remote]")
    address, handler = server
    source = open_source(f"tar:{address}/b/data/train-00.tar")
    fresh = pickle.loads(pickle.dumps(source))
    handler.failing = 3
    assert fresh.read(3) == png(3)
    handler.failing = 10**6
    fresh = pickle.loads(pickle.dumps(source))
    with pytest.raises(Outage, match=r"cannot read http.*run the same command again"):
        fresh.read(0)
    tries = handler.tries
    with pytest.raises(Outage):  # from a loading thread too: never a replaced "bad image"
        stream(pickle.loads(pickle.dumps(source)), count=1)
    assert handler.tries <= tries + 4, "what one thread has found out need not be found out by all"
    monkeypatch.setattr(remote, "_JUST_NOW", 0.0)
    handler.failing = 3
    assert fresh.read(0) == png(0)


def test_the_pauses_grow_for_minutes(monkeypatch):
    now, pauses = [0.0], []
    monkeypatch.setattr(remote.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(remote.time, "sleep", lambda pause: (pauses.append(pause), now.__setitem__(0, now[0] + pause)))
    monkeypatch.setattr(remote, "_given_up", {})

    def away():
        raise OSError("no route to host")

    with pytest.raises(Outage, match="no route to host"):
        remote._persist("s3://b/x.tar", away)
    assert pauses[:6] == [1, 2, 4, 8, 16, 30] and max(pauses) == 30 and 240 < sum(pauses) <= 300


def test_a_shard_is_opened_through_a_moment_without_network_and_after_a_long_one_the_run_can_go_on(server):
    pytest.importorskip("aiohttp", reason="needs sslvit[remote]")
    address, handler = server
    handler.failing = 5
    assert len(open_source(f"tar:{address}/b/data/train-00.tar")) == 20
    handler.failing = 10**6
    with pytest.raises(Outage, match=r"cannot read http.*503"):
        open_source(f"tar:{address}/b/data/train-01.tar")
    with pytest.raises(Outage, match=r"cannot read http://127.0.0.1:9/"):  # nobody listens there
        open_source("tar:http://127.0.0.1:9/x.tar")


def test_a_refusal_is_the_users_at_the_start_and_can_be_mended_later(server):
    pytest.importorskip("aiohttp", reason="needs sslvit[remote]")
    address, handler = server
    source = open_source(f"tar:{address}/b/data/train-00.tar")
    handler.refusing, tries = 403, handler.tries
    with pytest.raises(InputError, match=r"cannot open http.*403"):
        open_source(f"tar:{address}/b/data/train-01.tar")
    with pytest.raises(Resumable, match=r"cannot read http.*any more: 403.*your credentials") as caught:
        pickle.loads(pickle.dumps(source)).read(0)
    assert type(caught.value) is Resumable, "to wait does not help"
    assert handler.tries <= tries + 3  # HEAD, GET, and the read


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tar:{}/b/data/none.tar", "nothing at http"),
        ("tar:{}/b/data/train-00.tar,/tmp/x.tar", "no .tar file"),
        ("parquet:{}/b/data/x.parquet", "only tar shards are read from afar"),
        ("tar:nosuch://b/x.tar", "nosuch://b/x.tar"),
    ],
)
def test_what_cannot_be_opened_is_one_line(spec, words, server):
    pytest.importorskip("aiohttp", reason="needs sslvit[remote]")
    with pytest.raises(InputError, match=words) as caught:
        open_source(spec.format(server[0]))
    assert "\n" not in str(caught.value)


def test_a_server_without_ranges_and_a_missing_package_are_named(server, monkeypatch):
    pytest.importorskip("aiohttp", reason="needs sslvit[remote]")
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    server[1].ranges = False
    with pytest.raises(InputError, match="serves no ranges"):
        open_source(f"tar:{server[0]}/b/data/train-01.tar")
    import fsspec

    def absent(url):
        raise ImportError("no module named s3fs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(InputError, match=r"pip install 'sslvit\[remote\]'"):
        open_source("tar:s3://b/x.tar")


# ---- a real object store ---------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch):
    """Two shards in a bucket of moto's S3 server on loopback, which can go away and come back with what it holds."""
    s3fs = pytest.importorskip("s3fs", reason="needs sslvit[dev]")
    moto = pytest.importorskip("moto.server", reason="needs sslvit[dev]")

    class Store:
        def __init__(self):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]

        def start(self):
            self.server = moto.ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
            self.server.start()

        def stop(self):
            self.server.stop()

    store = Store()
    store.start()
    address = f"http://127.0.0.1:{store.port}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset", method="POST")).close()  # of other tests
    place = {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
    place |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in {**place, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # which knows another test's server
    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    for i in range(2):
        system.pipe_file(f"bucket/data/train-{i:02d}.tar", shard(20 * i, 20))
    for name, value in {"_FIRST_PAUSE": 0.01, "OUTAGE_SECONDS": 0.2, "_JUST_NOW": 0.0, "BLOCK_BYTES": 4096}.items():
        monkeypatch.setattr(remote, name, value)
    monkeypatch.setattr(remote, "KEPT_BYTES", 4 * 4096)
    monkeypatch.setattr(tar, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(tar, "KEPT_BYTES", 4 * 4096)
    yield store
    store.stop()
    system.invalidate_cache()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{00..01}.tar", ""])
def test_shards_in_a_bucket_are_those_on_the_disk(bucket, local, pattern):
    check_same(open_source(f"tar:s3://bucket/data/{pattern}"), local)


def test_order_and_resume_from_a_bucket_are_exact_through_an_outage(bucket):
    spec = "tar:s3://bucket/data/train-*.tar"
    ids, _ = stream(open_source(spec), count=8)
    assert sorted(i for batch in ids for i in batch) == list(range(40)) and ids != [sorted(batch) for batch in ids]
    loader = Loader(open_source(spec), CROPS, DINO_PHOTOMETRY, 16, 1, 5, seed=3, num_workers=2, cache_bytes=0)
    batches, seen, after = iter(loader), [], 0
    with pytest.raises(Outage, match="cannot read s3://bucket/data/train-0"):
        while True:
            views, after = next(batches)
            seen.append(views.sample_ids.tolist())
            if len(seen) == 2:
                bucket.stop()
    assert 2 <= len(seen) < 8 and seen == ids[: len(seen)]
    with pytest.raises(Outage, match="cannot read s3://bucket"):
        open_source("tar:s3://bucket/data/train-00.tar")
    bucket.start()
    assert stream(open_source(spec), cursor=after, count=8 - len(seen))[0] == ids[len(seen) :]


def test_what_a_bucket_refuses_is_the_users(bucket):
    for spec in ("tar:s3://bucket/data/none.tar", "tar:s3://nowhere/x.tar", "tar:s3://bucket/none-*.tar"):
        with pytest.raises(InputError, match=r"nothing at s3|no \.tar file at"):
            open_source(spec)


def test_a_run_from_a_bucket_saves_at_an_outage_and_goes_on_to_the_same_bytes(bucket, tmp_path, monkeypatch):
    """The store goes away during the third step of the first epoch, long before a checkpoint is due."""
    settings = {
        **{"data": "tar:s3://bucket/data/train-*.tar", "steps": 8, "batch_size": 5, "num_workers": 0, "device": "cpu"},
        **{"mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}, "knn": {"every": 0}},
        **{"precision": "fp32", "checkpoint": {"every": 100}, "crops": {"num_local": 0}},
        "encoder": {"name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 32}
        | {"num_heads": 2},
    }
    monkeypatch.setattr(formats, "_verify", lambda loaded, folders: {name: [] for name in folders})
    whole = pretrain(output_dir=tmp_path / "whole", **settings)
    tick = MetricsLog.tick

    def ticking(self, step, *rest):
        tick(self, step, *rest)
        if step == 2:
            bucket.stop()

    with monkeypatch.context() as breaking:
        breaking.setattr(MetricsLog, "tick", ticking)
        with pytest.raises(Outage, match=r"cannot read s3://bucket.*; saved in .*step_000000[2-7]$") as caught:
            pretrain(output_dir=tmp_path / "cut", **settings)
    reached = str(caught.value)[-7:]
    bucket.start()
    cut = pretrain(output_dir=tmp_path / "cut", **settings)
    assert f"going on from step {int(reached)}" in (cut / "train.log").read_text()
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (run / "checkpoints" / "step_0000008" / name for run in (whole, cut))
        assert first.read_bytes() == second.read_bytes(), name
