"""The bound that benchmarks/roofline.py reads from machine code, against one worked out by hand."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
from aot import Compiled, Kernel

ROOT = Path(__file__).parents[1]


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("roofline")


def test_the_bound_is_the_unit_that_is_needed_most(roofline, monkeypatch):
    # 132 multiprocessors of 1 GHz that copy 1.32e12 bytes: 10 bytes a cycle on each.
    monkeypatch.setattr(roofline, "GPUS", {"made up": roofline.Gpu(1.32e12, clock=1e9, latency=1e-6)})
    loop = {"LDG.E.128": 4, "FFMA": 300, "MUFU.EX2": 16}
    made = Compiled("k", 100, 0, 0, 0, loop | {"EXIT": 900}, "", (loop, {"LDG.E": 1}))
    work = roofline.Work(Kernel("k", {}, num_warps=4), values=2, written=1)
    row = roofline.bound(made, work)
    # 4 loads of 8 values, 2 values an element: 16 elements a pass, 20 instructions each, 2 elements a cycle.
    assert (row["instructions"], row["bytes"]) == (20, 5)
    # 104 registers of 128 threads: 4 blocks; 512 threads with 64 bytes each on their way.
    assert (row["blocks"], row["warps"], row["kb_in_flight"]) == (4, 16, 32)
    assert row["made up_issue"] == pytest.approx(2 * 20 / 128)
    assert row["made up_special"] == pytest.approx(2 * 1 / 16)
    assert row["made up_flight"] == pytest.approx(8 * 1000 / 32768)  # 8 of 10 bytes are read
    assert row["made up_share"] == 1.0
    slow = roofline.bound(replace(made, loops=()), work)
    assert slow["instructions"] == pytest.approx(1220 / 16)
    assert slow["made up_share"] == pytest.approx(128 / (2 * 1220 / 16))
