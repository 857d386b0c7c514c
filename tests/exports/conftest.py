"""For the tests of exports: a small text tower beside ours, where open_clip draws 60 million weights nobody reads."""

import pytest

from sslvit.exports import open_clip


@pytest.fixture(autouse=True)
def _small_text_tower(request, monkeypatch):
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setitem(open_clip.TEXT, "width", 64)
        monkeypatch.setitem(open_clip.TEXT, "heads", 1)
        monkeypatch.setitem(open_clip.TEXT, "layers", 1)
