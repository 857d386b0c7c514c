"""Exported folders as one repository of the Hugging Face hub, in one commit: `push=ORG/NAME`.

The first format (timm's where it is among them) lies at the root, where libraries look; each other one in its own
folder, `subfolder="hf"`. open_clip names its image tower by a place, so there it shares the root with timm's files.
A new repository is private; its owner makes it public on its page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from sslvit.errors import InputError
from sslvit.exports.card import PLACE
from sslvit.exports.open_clip import CONFIG, TOWER, with_tower

_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def check_push(repository: str, names: list[str]) -> None:
    """InputError when `repository` is no ORG/NAME, nobody is logged in, or open_clip would have no tower there."""
    from huggingface_hub import get_token

    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"push={repository}: must be ORG/NAME, letters, digits and . _ - on both sides")
    if "open_clip" in names and _root(names) not in ("timm", "open_clip"):
        raise InputError(f"push={repository}: open_clip's tower must lie at the root; add timm to the formats")
    if get_token() is None:
        raise InputError(f"push={repository}: nobody is logged in to the hub; run hf auth login, or set HF_TOKEN")


def push_folders(repository: str, places: Mapping[str, Path]) -> str:
    """Upload the folders of `places` (format -> folder) as one commit; the address of the repository.

    Raises InputError with the hub's reason; the local folders stay as they are.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    operations = [CommitOperationAdd(path, content) for path, content in repository_files(repository, places).items()]
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.create_commit(repository, operations, commit_message="An encoder exported with sslvit")
    except (HfHubHTTPError, HFValidationError, OSError, *_connection_errors()) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error)).strip()
        raise InputError(f"push={repository}: the hub refused it ({reason}); the exported folders are kept") from error
    return str(address)


def repository_files(repository: str, places: Mapping[str, Path]) -> dict[str, bytes | str]:
    """Path in the repository -> a local file's path, or bytes where the content names places."""
    root = _root(list(places))
    files: dict[str, bytes | str] = {}
    for name, place in places.items():
        for file in sorted(path for path in place.rglob("*") if path.is_file()):
            if (there := _path_there(name, file.relative_to(place), root)) is not None:
                files[there.as_posix()] = str(file)
    if "open_clip" in places:
        config = with_tower(json.loads((places["open_clip"] / CONFIG).read_text()), f"hf-hub:{repository}")
        files[CONFIG] = json.dumps(config, indent=2).encode()
    card = (places[root] / "README.md").read_text(encoding="utf-8")
    return files | {"README.md": _card_there(repository, card).encode()}


def _root(names: list[str]) -> str:
    return "timm" if "timm" in names else names[0]


def _path_there(name: str, inside: Path, root: str) -> Path | None:
    """Where a file of format `name` goes; None for open_clip's when timm's files are there already."""
    if name == "open_clip" and root != name:
        return None
    if name != root:
        return Path(name) / inside
    return inside.relative_to(TOWER) if inside.parts[0] == TOWER and name == "open_clip" else inside


def _card_there(repository: str, text: str) -> str:
    """The card with the repository's name where snippets say FOLDER, but for single files."""
    for before in ("local-dir:", "--encoder "):
        text = text.replace(before + PLACE, before.replace("local-dir:", "") + f"hf-hub:{repository}")
    return re.sub(rf"{PLACE}(?!/)", repository, text)


def _connection_errors() -> tuple[type[Exception], ...]:
    """What newer huggingface_hub raises without a network; older ones raise OSError."""
    try:
        import httpx
    except ImportError:
        return ()
    return (httpx.HTTPError,)
