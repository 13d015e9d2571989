"""`stoker doctor` on a machine with GPUs."""

from __future__ import annotations

import torch
from stoker import machine
from stoker.doctor import gpus, meeting

from support import ON_A_GPU

pytestmark = ON_A_GPU


def test_each_gpu_computes_and_is_named_with_its_peak() -> None:
    built, *found = gpus.check()
    assert f"torch is built for CUDA {torch.version.cuda}" in built.text
    assert len(found) == torch.cuda.device_count()
    for number, finding in enumerate(found):
        assert finding.state in ("ok", "note")
        assert torch.cuda.get_device_name(number) in finding.text
        assert "TFLOP/s" in finding.text


def test_ranks_meet_whatever_the_number_of_gpus() -> None:
    found = list(meeting.check())
    assert [finding.state for finding in found] == ["ok"] * len(found)
    assert len(found) == 1 + (len(machine.visible_gpus()) > 1)
