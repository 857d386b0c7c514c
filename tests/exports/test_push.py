"""`push=ORG/NAME` against a local stand-in of the hub: what arrives, and that every library would find its files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch

from sslvit.commands import parse
from sslvit.encoder.weights import load_encoder
from sslvit.errors import InputError
from sslvit.exports.push import check_push, repository_files
from sslvit.verbs.export import export

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that are opened
SPEC = "vit_tiny_patch16_224?pretrained=false&img_size=32&patch_size=8&depth=1&reg_tokens=4&no_embed_class=true"
SPEC += "&init_values=0.1"
REPOSITORY, COMMIT = "me/encoder", "a" * 40


class Hub(ThreadingHTTPServer):
    """The few answers of the hub that an upload and a download need; `files` is what it holds."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.commits = 0
        self.refuse = 0  # a status to answer a commit with

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *words: object) -> None:
        pass

    def reply(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body, hub = self.rfile.read(int(self.headers["Content-Length"])), self.server
        assert self.headers["Authorization"] == "Bearer hf_secret"
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.reply({"url": f"{hub.address}/{REPOSITORY}", "name": REPOSITORY})
        elif self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.reply({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif "/commit/" in self.path and hub.refuse:
            self.reply({"error": "You have no rights here"}, hub.refuse)
        elif "/commit/" in self.path:
            hub.commits += 1
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply({"commitUrl": f"{hub.address}/{REPOSITORY}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.reply({"error": self.path}, 404)

    def do_GET(self) -> None:
        path, hub = self.path.partition("?")[0], self.server
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            self.reply([{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in hub.files.items()])
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in hub.files]
            self.reply({"id": REPOSITORY, "sha": COMMIT, "private": True, "siblings": siblings, "tags": []})
        elif path.startswith(f"/{REPOSITORY}/resolve/"):
            name = path.split("/", 5)[5]
            if name in hub.files:
                etag = hashlib.sha1(hub.files[name]).hexdigest()
                self.reply(hub.files[name], headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            else:
                self.reply({"error": "no"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self.reply({"error": path}, 404)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


@torch.no_grad()
def test_what_is_pushed_opens_by_name(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for library in ("transformers", "open_clip"):
        pytest.importorskip(library, reason="an optional extra")
    export(SPEC, output_dir=tmp_path, formats="hf,timm,open_clip,safetensors", push=REPOSITORY)
    assert f"pushed to {hub.address}/{REPOSITORY}" in capsys.readouterr().out
    assert hub.commits == 1
    created = hub.created[0]  # the word depends on huggingface_hub's version
    assert created.get("private") is True or created.get("visibility") == "private"
    assert {"model.safetensors", "config.json", "open_clip_config.json", "verification.json"} <= set(hub.files)
    assert {"hf/model.safetensors", "hf/config.json", "safetensors/encoder.safetensors"} <= set(hub.files)
    assert not [name for name in hub.files if name.startswith(("tower", "open_clip/"))]
    assert hub.files["model.safetensors"] == (tmp_path / "timm" / "model.safetensors").read_bytes()
    card = hub.files["README.md"].decode()
    assert f"hf-hub:{REPOSITORY}" in card and f'from_pretrained("{REPOSITORY}")' in card and "FOLDER" not in card
    assert str(tmp_path) not in "".join(c.decode() for n, c in hub.files.items() if not n.endswith(".safetensors"))
    ours, x = load_encoder(SPEC).module, torch.randn(2, 3, 32, 32)
    assert torch.equal(load_encoder(f"hf-hub:{REPOSITORY}").module(x), ours(x))
    assert torch.equal(timm.create_model(f"hf-hub:{REPOSITORY}", pretrained=True).eval()(x), ours(x))
    import open_clip
    from transformers import AutoModel

    tokens = ours.forward_features(x)
    assert torch.equal(AutoModel.from_pretrained(REPOSITORY)(x).last_hidden_state, tokens)
    assert torch.equal(AutoModel.from_pretrained(REPOSITORY, subfolder="hf")(x).last_hidden_state, tokens)
    tower = open_clip.create_model(f"hf-hub:{REPOSITORY}", pretrained_image=True).eval()
    assert torch.equal(tower.encode_image(x), ours(x))


def test_open_clip_names_the_repository(tmp_path: Path) -> None:
    for name in ("open_clip", "open_clip/tower"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    config = {"model_cfg": {"vision_cfg": {"timm_model_name": "local-dir:/private"}}}
    (tmp_path / "open_clip" / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip" / "README.md").write_text("local-dir:FOLDER FOLDER/file\n")
    files = repository_files(REPOSITORY, {"open_clip": tmp_path / "open_clip"})
    assert sorted(files) == ["README.md", "config.json", "open_clip_config.json"]
    assert json.loads(files["open_clip_config.json"])["model_cfg"]["vision_cfg"] == {
        "timm_model_name": f"hf-hub:{REPOSITORY}"
    }
    assert files["README.md"] == b"hf-hub:me/encoder FOLDER/file\n"


def test_a_refusal_is_one_line_and_keeps_the_folders(hub: Hub, tmp_path: Path) -> None:
    hub.refuse = 403
    with pytest.raises(InputError, match="the hub refused it") as caught:
        export(SPEC, output_dir=tmp_path, formats="safetensors", push=REPOSITORY)
    assert "\n" not in str(caught.value) and (tmp_path / "safetensors" / "encoder.safetensors").is_file()


@pytest.mark.parametrize(
    ("repository", "names", "words"),
    [
        ("encoder", ["timm"], "must be ORG/NAME"),
        ("a/b/c", ["timm"], "must be ORG/NAME"),
        ("me/encoder", ["hf", "open_clip"], "add timm to the formats"),
    ],
)
def test_wrong_names_are_refused_before_anything_is_written(
    repository: str, names: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(InputError, match=words):
        check_push(repository, names)


def test_nobody_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InputError, match="hf auth login"):
        export(SPEC, output_dir=tmp_path / "out", formats="timm", push=REPOSITORY)
    assert not (tmp_path / "out").exists()


def test_on_the_command_line() -> None:
    words = ["export", "RUN", "--output-dir", "o", "--formats", "timm", "push=me/encoder", "data_name=Our scans"]
    arguments = parse(words).arguments
    assert arguments["push"] == "me/encoder" and arguments["data_name"] == "Our scans"
    for wrong in ("pushed=me/encoder", "push", "push="):
        with pytest.raises(InputError, match="export knows data_name=, push="):
            parse(["export", "RUN", "--output-dir", "o", wrong])
