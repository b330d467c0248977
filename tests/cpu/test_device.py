"""--device and MEGATRON_DYT_DEVICE."""

import pytest
import torch

from megatron_dyt import cpu
from megatron_dyt.cpu import device
from megatron_dyt.errors import UserError


@pytest.fixture
def enabled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Receives "cpu" each time the CPU runtime is asked for."""
    monkeypatch.delenv("MEGATRON_DYT_DEVICE", raising=False)
    calls: list[str] = []
    monkeypatch.setattr(cpu, "enable", lambda: calls.append("cpu"))
    return calls


@pytest.mark.parametrize("words", [["--device", "cpu"], ["--device=cpu"]])
def test_the_flag_is_taken_out(enabled: list[str], words: list[str]) -> None:
    assert device.activate(["--lr", "1", *words, "--seed", "2"]) == ["--lr", "1", "--seed", "2"]
    assert enabled == ["cpu"]


def test_auto_without_cuda_uses_the_cpu_and_says_so(
    enabled: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.activate([]) == []
    assert enabled == ["cpu"]
    assert "no CUDA device found: using the CPU" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--device", "cuda"]])
def test_with_cuda_nothing_is_replaced(
    enabled: list[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.activate([*words, "--lr", "1"]) == ["--lr", "1"]
    assert enabled == []


def test_the_flag_wins_over_the_environment(enabled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_DYT_DEVICE", "tpu")
    device.activate(["--device", "cpu"])
    assert enabled == ["cpu"]
    with pytest.raises(UserError, match=r"'tpu'.*allowed are auto, cpu, cuda"):
        device.activate([])


def test_cuda_without_a_device_is_an_error(enabled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no CUDA device"):
        device.activate(["--device", "cuda"])
    assert enabled == []


def test_a_missing_value_is_an_error(enabled: list[str]) -> None:
    with pytest.raises(UserError, match="allowed are auto, cpu, cuda"):
        device.activate(["--device"])
