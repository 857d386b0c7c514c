"""What was read lately and may be asked for again: a bounded memory that threads share. Knows nothing of files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Kept(Generic[Key]):
    """The last items used, up to a number of bytes; each is loaded once, however many threads ask for it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._items: OrderedDict[Key, Any] = OrderedDict()
        self._loading: dict[Key, Future[Any]] = {}
        self._lock = threading.Lock()

    def get(self, key: Key, load: Callable[[], Any]) -> Any:
        """The item `key`, by `load()` when it is not there; an item tells its size as `nbytes`.

        Threads that come while it is loaded get what that load gives, item or error, even if it is not kept for long.
        """
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key]
            loading = self._loading.get(key)
            if loading is None:
                mine = self._loading[key] = Future()
        if loading is not None:
            return loading.result()
        try:
            item = load()
        except BaseException as error:
            with self._lock:
                del self._loading[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._loading[key]
            self._items[key] = item
            self.bytes += item.nbytes
            while self.bytes > self.limit and len(self._items) > 1:
                self.bytes -= self._items.popitem(last=False)[1].nbytes
        mine.set_result(item)
        return item
