"""What is assumed of a machine."""

from __future__ import annotations

import pytest

from pi_gguf.common import machine


@pytest.mark.parametrize(
    ("flags", "bf16", "share"), [("avx2", False, 0.5), ("avx512_bf16", True, 0.5), ("avx512_bf16 amx_bf16", True, 0.1)]
)
def test_training_reaches_less_of_what_amx_multiplies(monkeypatch, flags, bf16, share):
    monkeypatch.setattr(machine, "_cpu_flags", lambda: flags)
    assert machine.fast_bf16("cpu") == bf16 and machine.efficiency("cpu") == share
    assert machine.efficiency("cuda") == 0.35
