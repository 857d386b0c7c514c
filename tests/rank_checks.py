"""What two processes do together, each check in the same two processes. Not a test: test_ranks.py starts it.

`python rank_checks.py RANK WORLD FOLDER`; every check raises on failure, and the main process prints results as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from toy_run import Stream, Toy, digest, run

from sslvit import checkpoint, distributed, optim, training
from sslvit.checkpoint import checkpoint_path, checkpoint_steps
from sslvit.data.sources import open_source
from sslvit.encoder.config import Preprocessing
from sslvit.encoder.weights import load_encoder
from sslvit.errors import InputError, Outage, Resumable
from sslvit.metrics import MetricsLog
from sslvit.objectives.accumulation import sinkhorn_columns
from sslvit.objectives.dino import Centering, sinkhorn
from sslvit.objectives.koleo import koleo_loss
from sslvit.probes.monitor import KnnMonitor
from sslvit.signals import StopFlag

NAN = float("nan")


class OnOneRank(Toy):
    """On rank 1 only: asks for a stop, or has a NaN loss, at given steps."""

    def __init__(self, stop: StopFlag | None = None, stop_at: int = -1, bad: frozenset[int] = frozenset()) -> None:
        super().__init__(dropout=0.0)
        self.stop, self.stop_at, self.bad = stop, stop_at, bad

    def forward(self, batch: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        loss, logs = super().forward(batch, step)
        if distributed.rank() == 1 and step in self.bad:
            loss = loss + torch.tensor(NAN)
        if distributed.rank() == 1 and step == self.stop_at:
            assert self.stop is not None
            self.stop.received = "SIGTERM"
        return loss, logs


def state_sum(module: torch.nn.Module) -> list[float]:
    """The state as numbers, and proof that every process has the same."""
    flat = torch.cat([value.double().flatten() for value in module.state_dict().values()])
    everywhere = distributed.all_gather_cat(flat[None])
    assert all(torch.equal(row, flat) for row in everywhere), "the processes went apart"
    return flat.tolist()


def collectives(folder: Path) -> None:
    rank, world = distributed.rank(), distributed.world_size()
    ragged = torch.arange(rank + 1)[:, None] + 10 * rank
    expected = [[i + 10 * r] for r in range(world) for i in range(r + 1)]
    assert distributed.all_gather_cat(ragged).tolist() == expected
    assert distributed.all_reduce_sum_(torch.tensor(rank + 1.0)) == sum(range(1, world + 1))
    assert distributed.all_reduce_max_(torch.tensor(float(rank))) == world - 1
    assert distributed.broadcast_object({"rank": rank}) == {"rank": 0}
    distributed.barrier()


def plain(folder: Path) -> list[float]:
    module = Toy(dropout=0.0)
    run(folder, module=module, size=8 // distributed.world_size())
    return state_sum(module)


def accumulated(folder: Path) -> list[float]:
    module = Toy(dropout=0.0)
    run(folder, module=module, size=4 // distributed.world_size(), accumulate=2)
    return state_sum(module)


def sharded(folder: Path) -> list[float]:
    """FSDP2: the same weights as without, resumed from whole tensors bit for bit; each process keeps its share."""
    size = 8 // distributed.world_size()
    module, stop = Toy(dropout=0.0), StopFlag()
    distributed.shard(module, bf16=False)
    run(folder / "whole", module=module, size=size)
    held = sum(distributed.unsharded(parameter).numel() for parameter in module.parameters())
    assert held <= 0.6 * sum(parameter.numel() for parameter in module.parameters()), held
    cut = OnOneRank(stop, stop_at=6)
    distributed.shard(cut, bf16=False)
    try:
        run(folder / "cut", module=cut, size=size, stop=stop)
    except Resumable:
        pass
    else:
        raise AssertionError("not stopped")
    again = Toy(dropout=0.0)
    distributed.shard(again, bf16=False)
    run(folder / "cut", module=again, size=size)
    with distributed.whole(again):
        assert not any(isinstance(parameter, DTensor) for parameter in again.parameters())
    first, second = ([distributed.full(value) for value in m.state_dict().values()] for m in (module, again))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return torch.cat([value.double().flatten() for value in first]).tolist()


def saving_gathers_one_tensor_at_a_time(folder: Path) -> None:
    """Otherwise weights, teacher and both moments would be whole on every GPU at each save, and after a resume."""
    whole: list[weakref.ref[torch.Tensor]] = []
    most = 0
    full_tensor = DTensor.full_tensor

    def counting(self: DTensor, **options: Any) -> torch.Tensor:
        nonlocal most
        tensor = full_tensor(self, **options)
        most = max(most, 1 + sum(ref() is not None for ref in whole))
        whole.append(weakref.ref(tensor))
        return tensor

    DTensor.full_tensor = counting
    try:
        for steps in (3, 6):  # the second goes on from the first
            module = Toy(dropout=0.0)
            distributed.shard(module, bf16=False)
            optimizer = optim.adamw(optim.param_groups(module, 0.1), 1e-2)
            run(folder, module=module, optimizer=optimizer, steps=steps, size=4)
    finally:
        DTensor.full_tensor = full_tensor
    assert most == 1 and len(whole) > 20, (most, len(whole))
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, DTensor)]
    kept = [value.to_local() for value in [*moments, *module.parameters()]]
    assert all(value.untyped_storage().nbytes() <= value.nbytes + 64 for value in kept), "a share keeps the whole alive"


def no_data_on_one_rank(folder: Path) -> None:
    """Both stop at the step that one got no batch for, and both know why: rank 0, who writes the job's note, too."""
    for accumulate in (1, 2):
        stream = Stream(4 // accumulate, away=22 if distributed.rank() == 1 else None)
        try:
            run(folder / f"{accumulate}", stream=stream, accumulate=accumulate)
        except Outage as outage:
            assert "saved in" in str(outage) and "step_0000002" in str(outage), outage
            assert ("process 1 got no data" in str(outage)) == distributed.is_main(), outage
        else:
            raise AssertionError("not stopped")
        assert checkpoint_steps(folder / f"{accumulate}" / "checkpoints")[-1] == 2


def random_draws_differ(folder: Path) -> None:
    module = Toy(dropout=0.5)
    seen = []
    module.student[2].register_forward_hook(lambda layer, inputs, output: seen.append(output.detach() == 0))
    run(folder, module=module, size=4, steps=2)
    everywhere = distributed.all_gather_cat(torch.stack(seen)[None])
    assert distributed.world_size() == 1 or not torch.equal(everywhere[0], everywhere[1])
    state_sum(module)


def stopped_and_resumed(folder: Path) -> None:
    """A signal that one process alone receives stops all at the same step; the same command goes on exactly."""
    size = 8 // distributed.world_size()
    run(folder / "whole", size=size)
    stop = StopFlag()
    try:
        run(folder / "cut", module=OnOneRank(stop, stop_at=6), size=size, stop=stop)
    except Resumable as error:
        assert "after step 7" in str(error), error
    else:
        raise AssertionError("not stopped")
    if distributed.is_main():
        assert checkpoint_steps(folder / "cut/checkpoints")[-1] == 7
    distributed.barrier()
    module = Toy(dropout=0.0)
    run(folder / "cut", module=module, size=size)
    whole = Toy(dropout=0.0)
    run(folder / "again", module=whole, size=size)
    assert state_sum(module) == state_sum(whole)


def bad_on_one_rank(folder: Path) -> None:
    module = OnOneRank(bad=frozenset({5}))
    progress = run(folder / "one", module=module, size=4)
    assert progress.skipped == 1
    assert module.applied == [step for step in range(12) if step != 5]
    assert all(value == value for value in state_sum(module))
    module = OnOneRank(bad=frozenset({5, 6, 7}))
    try:
        run(folder / "many", module=module, size=4)
    except InputError as error:
        assert "the last good state is" in str(error), error
    else:
        raise AssertionError("steps 5, 6 and 7 stay bad after the roll-back, so the second one stops")
    assert module.applied == [0, 1, 2, 3, 4, 4]
    state_sum(module)


class Alone(OnOneRank):
    """Talks to nobody in after_step."""

    def after_step(self, step: int) -> None:
        self.applied.append(step)


def without_agreement_they_go_apart(folder: Path) -> None:
    agreed, named = training._not_finite, training._what_is_bad
    training._what_is_bad = lambda module, logs: "loss"
    training._not_finite = lambda norm, logs: (~torch.isfinite(logs[0]["loss"])).float()
    module = Alone(bad=frozenset({5}))
    run(folder, module=module, size=4)
    training._not_finite, training._what_is_bad = agreed, named
    try:
        state_sum(module)
    except AssertionError:
        return
    raise RuntimeError("a step skipped on one process alone went unnoticed")


def unused_parameter(folder: Path) -> None:
    module = Toy()
    module.extra = torch.nn.Linear(2, 2)
    try:
        run(folder, module=module, size=4)
    except AssertionError as error:
        assert "extra.weight and 1 others take no part in the loss" in str(error), error
    else:
        raise RuntimeError("an unused parameter went unnoticed")


def full_disk(folder: Path, seconds: float = 0.0) -> None:
    """The main process cannot write: every process ends resumably."""
    write = checkpoint._write_checkpoint

    def full(path: Path, *rest: Any) -> None:
        if path.name == "step_0000008":
            time.sleep(seconds)
            raise OSError(28, "No space left on device")
        write(path, *rest)

    checkpoint._write_checkpoint = full
    try:
        run(folder, size=4)
    except Resumable as error:
        assert ("No space left" in str(error)) == distributed.is_main(), error
    else:
        raise AssertionError("not stopped")
    finally:
        checkpoint._write_checkpoint = write
    distributed.barrier()
    assert checkpoint_path(folder / "checkpoints", 4).is_dir()


def full_disk_noticed_late(folder: Path) -> None:
    """The write is still under way when the next save is due."""
    full_disk(folder, seconds=1.0)


def other_world(folder: Path) -> list[float]:
    """Goes on from a run that one process began; see test_ranks.py."""
    module = Toy(dropout=0.0)
    stream = Stream(8 // distributed.world_size())
    run(folder, module=module, stream=stream)
    seen = distributed.all_gather_cat(torch.tensor(stream.seen))
    assert sorted(seen.tolist()) == list(range(5 * 8, 12 * 8)), seen
    return state_sum(module)


def no_masked_patch_on_one_rank(folder: Path) -> None:
    """A rank without a token takes part in every collective; targets and centre are those of the others' tokens."""
    tokens = torch.linspace(-1, 1, 12).reshape(3, 4)
    mine = tokens if distributed.rank() == 1 else tokens[:0]
    spread = sinkhorn(mine, 0.1)
    assert spread.shape == mine.shape and torch.allclose(spread.sum(1), torch.ones(len(mine)))
    centering = Centering(4, "softmax", 0.5)
    for given, expected in ((mine, tokens.mean(0) / 2), (tokens[:0], tokens.mean(0) / 2)):
        centering.targets(given, 0.1)
        centering.after_step()
        assert torch.allclose(centering.center, expected)


def koleo_over_ranks(folder: Path) -> None:
    """Value and averaged gradient are those of one process with all features."""
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    rank, world = distributed.rank(), distributed.world_size()
    mine = features.chunk(world)[rank].clone().requires_grad_()
    value = koleo_loss(mine)
    value.backward()
    found = distributed.all_gather_cat(mine.grad) / world  # DDP's average of one rank's gradient and others' zeros
    everyone = features.clone().requires_grad_()
    unit = torch.nn.functional.normalize(everyone, dim=-1)
    nearest = torch.cdist(unit.detach(), unit.detach()).fill_diagonal_(9).argmin(1)
    expected = -(unit - unit[nearest]).norm(dim=-1).log().mean()
    expected.backward()
    assert torch.allclose(value, expected, atol=1e-6), (value, expected)
    assert torch.allclose(found, everyone.grad, atol=1e-6)


def columns_over_ranks(folder: Path) -> None:
    """Sinkhorn's scaling over two micro-batches a rank is Sinkhorn over all of them."""
    logits = torch.rand(12, 4, generator=torch.Generator().manual_seed(0))
    parts = logits.chunk(2 * distributed.world_size())[2 * distributed.rank() :][:2]
    centering = Centering(4, "sinkhorn", 0.9)
    centering.columns = sinkhorn_columns(lambda: parts, 0.1)
    targets = centering.targets(torch.cat(parts), 0.1)
    assert torch.allclose(targets, sinkhorn(torch.cat(parts), 0.1), atol=1e-6)


def monitor(folder: Path) -> dict[str, float]:
    """Each process decodes its share; the main one has the numbers of all."""
    sets = [open_source(f"scenes:?n=25&size=32&objects=1&label=shape&split={split}") for split in ("train", "val")]
    judge = KnnMonitor(*sets, Preprocessing(32), precision="fp32", num_workers=0)
    assert len(judge.train) in ((25,) if distributed.world_size() == 1 else (12, 13))
    encoder = load_encoder(
        "vit_tiny_patch16_224?pretrained=false&img_size=32&patch_size=8&embed_dim=32&depth=1&num_heads=2"
    )
    numbers = judge(encoder.module, 3)
    assert bool(numbers) == distributed.is_main()
    return numbers


CHECKS = (
    collectives,
    plain,
    accumulated,
    sharded,
    saving_gathers_one_tensor_at_a_time,
    no_data_on_one_rank,
    random_draws_differ,
    stopped_and_resumed,
    bad_on_one_rank,
    without_agreement_they_go_apart,
    unused_parameter,
    full_disk,
    full_disk_noticed_late,
    no_masked_patch_on_one_rank,
    koleo_over_ranks,
    columns_over_ranks,
    monitor,
)


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = {check.__name__: check(folder / check.__name__) for check in CHECKS}
    if (folder / "begun").is_dir():
        results["other_world"] = other_world(folder / "begun")
        if distributed.is_main():
            results["digest"] = digest(folder / "begun")
    if distributed.is_main():
        (folder / "results.json").write_text(json.dumps(results))
    distributed.shutdown()


if __name__ == "__main__":
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os.fsync = lambda descriptor: None  # nothing is killed here
    MetricsLog._open_board = lambda self, resumed: None  # type: ignore[method-assign]
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
