"""The model card (README.md) of a vision-language folder, from facts: parts, checks, numbers, limits, licences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sslvit.exports.card import hardware, numbers_table
from sslvit.exports.licence import PERMISSIVE, license_lines

LOADING = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("this/folder")
processor = AutoProcessor.from_pretrained("this/folder")
```

```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="this/folder")
```

```bash
sslvit ask this/folder --image photo.jpg --question "What is this?"
```
"""


def vlm_card(
    made_of: Mapping[str, Any],
    licenses: Mapping[str, str | None],
    checked: Mapping[str, Any],
    *,
    environment: Any = None,
    results: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The card. `made_of`: parts and how they were trained, in words; `licenses`: of encoder and language model;
    `checked`: the report of the comparison; `environment` and `results`: env.json and results.json of the run.
    """
    stated = sorted({name for name in licenses.values() if name})
    front = ["---", *(license_lines(stated[0] if len(stated) == 1 else "several") if stated else [])]
    front += ["library_name: transformers", "pipeline_tag: image-text-to-text", "tags:", "- llava", "- sslvit", "---"]
    facts = {**made_of, "Hardware": hardware(environment)}
    parts = [
        "\n".join(front) + "\n",
        "# A vision-language model made with sslvit\n",
        "\n".join(f"- {key}: {value}" for key, value in facts.items() if value is not None) + "\n",
        "## Load it\n\n" + LOADING,
        "## Checked\n\n" + _checked(checked),
    ]
    if results:
        parts.append("## Numbers\n\n" + numbers_table(results))
    parts += ["## Limits\n\n" + _limits(), "## Licence\n\n" + _licences(licenses)]
    return "\n".join(parts)


def _checked(report: Mapping[str, Any]) -> str:
    lines = [
        "Reopened in a fresh process and compared with the network that was trained: every weight bit for bit, the "
        "tokens it makes of images, and the log probabilities of answers.",
        "",
    ]
    lines += ["| library | what | maximum difference |", "|---|---|---|"]
    for what, difference in report["max_difference"].items():
        lines.append(f"| {report['library']} {report['version']} | {what} | {difference:.2g} |")
    return "\n".join(lines) + "\n"


def _limits() -> str:
    return (
        "It was trained on one image and one question at a time, and knows what its pairs show; "
        "the numbers of the blind model and of other images say how much of an answer is seen.\n"
    )


def _licences(licenses: Mapping[str, str | None]) -> str:
    lines = []
    for part, name in licenses.items():
        warning = "" if name is None or name in PERMISSIVE else " **Not a permissive licence: read it before use.**"
        lines.append(f"- {part}: {f'`{name}`' if name else 'chosen by whoever trained it'}.{warning}")
    return "\n".join(lines) + "\n"
