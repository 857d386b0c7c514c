"""benchmarks/rounds.py on made-up clocks: what counts, what is left out, when it ends."""

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture
def rounds(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "rounds", raising=False)
    return importlib.import_module("rounds")


class Machine:
    """A clock that only moves when somebody works; slow in the rounds named."""

    def __init__(self, slow_rounds=()):
        self.now, self.round, self.slow, self.best = 0.0, 0, set(slow_rounds), 0.0
        self.order = []

    def clock(self):
        return self.now

    @property
    def factor(self):
        return 5.0 if self.round in self.slow else 1.0

    def __call__(self):  # the probe
        speed = 1 / self.factor
        self.best = max(self.best, speed)
        return speed

    def work(self, name, seconds):
        def run():
            self.order.append(name)
            self.now += seconds * self.factor
            if name == "b":
                self.round += 1

        return run


def test_slow_moments_do_not_count(rounds):
    machine = Machine(slow_rounds={2, 3, 5})
    work = {"a": machine.work("a", 2.0), "b": machine.work("b", 1.0)}
    found = rounds.measure(work, seconds=100, wanted=3, probe=machine, clock=machine.clock)
    assert set(found["a"].seconds) == {2.0} and len(found["a"].seconds) >= 3
    assert found["a"].made > len(found["a"].seconds), "the slow rounds were made and dropped"
    assert rounds.ratio(found["a"], found["b"]) == (2.0, 2.0)
    assert machine.order[:6] == ["a", "b"] * 3, "variants take turns"


def test_without_the_gate_they_would_count(rounds, monkeypatch):
    monkeypatch.setattr(rounds, "GATE", 0.0)
    machine = Machine(slow_rounds={1})
    work = {"a": machine.work("a", 2.0), "b": machine.work("b", 1.0)}
    found = rounds.measure(work, seconds=100, wanted=3, probe=machine, clock=machine.clock)
    assert 10.0 in found["a"].seconds


def test_where_nothing_passes_it_is_said(rounds):
    machine = Machine(slow_rounds=range(1, 50))
    machine.best = 1.0
    work = {"a": machine.work("a", 2.0), "b": machine.work("b", 1.0)}
    found = rounds.measure(work, seconds=0, probe=machine, clock=machine.clock)
    assert not found["a"].gated and "none passed the gate" in found["a"].words()
    assert found["a"].made == 2, "two rounds at least"


def test_before_each_run(rounds):
    machine, prepared = Machine(), []
    work = {"a": machine.work("a", 1.0), "b": machine.work("b", 1.0)}
    rounds.measure(work, seconds=0, probe=machine, clock=machine.clock, before=prepared.append)
    assert prepared == machine.order


def test_the_probe_knows_its_best(rounds):
    probe = rounds.Probe(32)
    speeds = [probe() for _ in range(20)]
    assert probe.best >= max(speeds) > 0
