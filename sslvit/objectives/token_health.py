"""What the class tokens of a step tell about collapse, beside the losses and for nothing: no pass is run for it.

The spread of unit-length features is that of SimSiam (arXiv:2011.10566, section 4.1), here as a share of 1 / sqrt(D).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvit.encoder.vit import Tokens
from sslvit.objectives.passes import Pass


@torch.no_grad()
def token_health(tokens: dict[Pass, Tokens]) -> dict[str, Tensor]:
    """health/token_spread and, with a teacher, health/teacher_student_cosine, over the global views, each read once.

    Spread of the teacher's class tokens (the student's without a teacher): 1 when they fill the sphere, 0 when all
    images have the same. Cosine between the student's and the teacher's token of an image, of the same view if the
    teacher saw it. Empty without a global view.
    """
    student = {p.index: _unit(t) for p, t in tokens.items() if p.network == "student" and p.crop == "global"}
    teacher = {p.index: _unit(t) for p, t in tokens.items() if p.network == "teacher" and p.crop == "global"}
    judged = teacher or student
    if not judged:
        return {}
    spreads = [unit.std(0, correction=0).mean() * unit.shape[1] ** 0.5 for unit in judged.values()]
    numbers = {"health/token_spread": torch.stack(spreads).mean()}
    if teacher and student:
        first = next(iter(teacher.values()))
        cosines = [(unit * teacher.get(view, first)).sum(-1).mean() for view, unit in student.items()]
        numbers["health/teacher_student_cosine"] = torch.stack(cosines).mean()
    return numbers


def _unit(tokens: Tokens) -> Tensor:
    """Unit-length class tokens (B, D) in fp32; the mean patch without a class token."""
    return F.normalize(tokens.cls.float(), dim=-1, eps=1e-6)
