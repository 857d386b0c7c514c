"""What was read lately and may be asked for again: a bounded memory that threads share. Knows nothing of files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Kept(Generic[Key]):
    """The last items used, up to a number of bytes; each is loaded once, however many threads ask for it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._items: OrderedDict[Key, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._gates: dict[Key, threading.Lock] = {}

    def get(self, key: Key, load: Callable[[], Any]) -> Any:
        """The item `key`, by `load()` when it is not there; an item tells its size as `nbytes`."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key]
            gate = self._gates.setdefault(key, threading.Lock())
        with gate:
            with self._lock:
                if key in self._items:
                    return self._items[key]
            item = load()
            with self._lock:
                self._items[key] = item
                self._gates.pop(key, None)
                self.bytes += item.nbytes
                while self.bytes > self.limit and len(self._items) > 1:
                    self.bytes -= self._items.popitem(last=False)[1].nbytes
        return item
