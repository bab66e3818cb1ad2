"""What is assumed of a machine."""

from __future__ import annotations

import pytest

from pi_gguf.common import machine


@pytest.mark.parametrize(
    ("flags", "bf16", "share"), [("avx2", False, 0.5), ("avx512_bf16", True, 0.5), ("avx512_bf16 amx_bf16", True, 0.25)]
)
def test_training_reaches_less_of_what_amx_multiplies(monkeypatch, flags, bf16, share):
    monkeypatch.setattr(machine, "_cpu_flags", lambda: flags)
    assert machine.fast_bf16("cpu") == bf16 and machine.efficiency("cpu") == share
    assert machine.efficiency("cuda") == 0.35


def test_processes_share_the_memory_of_their_machine_and_have_a_card_each(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 1200)
    for variables, device, free, nodes in (
        ({}, "cpu", 1200, 1), ({"WORLD_SIZE": "4"}, "cpu", 300, 1),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "cpu", 600, 2), ({"WORLD_SIZE": "4"}, "cuda", 1200, 1),
    ):  # fmt: skip
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        here = machine.Machine.here(device)
        assert (here.free_bytes, here.nodes, here.processes) == (free, nodes, int(variables.get("WORLD_SIZE", "1")))
