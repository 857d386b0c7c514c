"""sslvit: images without labels to a vision encoder, honest numbers, open exports and a small vision-language model.

Every verb of the command line is a function here, loaded when it is first asked for: `import sslvit` imports no torch.
"""

from __future__ import annotations

from typing import Any

VERBS = (
    "demo",
    "pretrain",
    "evaluate",
    "embed",
    "export",
    "align",
    "ask",
    "serve",
    "report",
    "submit",
    "doctor",
    "check_data",
)

__all__ = ["__version__", *VERBS]


def __getattr__(name: str) -> Any:
    """`sslvit.pretrain` is the function, not its module; `sslvit.__version__` is the installed version."""
    if name in VERBS:
        from importlib import import_module

        return getattr(import_module(f"sslvit.verbs.{name}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("sslvit")
    raise AttributeError(f"module 'sslvit' has no attribute {name!r}; its verbs are {', '.join(VERBS)}")


def __dir__() -> list[str]:
    return sorted(__all__)
