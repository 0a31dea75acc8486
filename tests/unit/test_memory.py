"""What is asked of an accelerator's memory."""

from __future__ import annotations

import pytest
import torch

from fedclient.trainer.memory import free_device_memory, peak_device_memory


def test_an_accelerator_whose_memory_torch_does_not_count_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError):
            torch.accelerator.max_memory_allocated()
    assert peak_device_memory() == 0
    free_device_memory()
