"""The GPU benchmark, as far as it runs without one: its peers, its errors, its bytes and its report."""

import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

HERE = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/kernels.py on the CPU."""
    monkeypatch.syspath_prepend(str(HERE))
    module = importlib.import_module("kernels")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # Generating code takes longer than all the rest.
    monkeypatch.setattr(module, "PEERS", [p for p in module.PEERS if "compile" not in p.name])
    return module


class WallClock:
    """`Timer` for a CPU."""

    def call(self, into: list[float], function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        into.append(time.perf_counter() - start)
        return result

    def collect(self) -> None:
        pass


def test_installed_peers_compute_what_they_should(kernels: ModuleType) -> None:
    left_out: dict[str, str] = {}
    peers = kernels.working_peers(64, torch.bfloat16, left_out)
    assert {"dyt", "dyt eager", "rmsnorm torch", "add dyt", "add rmsnorm torch"} <= peers.keys()
    assert len(peers) + len(left_out) == len(kernels.PEERS)
    for name, (peer, run) in peers.items():
        found = kernels.errors(peer, run, 64, torch.bfloat16)
        wanted = {"y", "dx", "dweight"}
        wanted |= {"dalpha", "dbias"} if peer.kind == "dyt" else set()
        wanted |= {"dresidual"} if peer.residual else set()
        assert found.keys() == wanted, name
        assert all(1e-9 < error < 2e-2 for error in found.values()), (name, found)


def test_a_wrong_peer_has_a_large_error(kernels: ModuleType) -> None:
    peers = kernels.working_peers(64, torch.bfloat16, {})
    peer, run = peers["add dyt"]
    wrong = kernels.errors(peer, lambda i: run(i._replace(alpha=i.alpha * 1.1)), 64, torch.bfloat16)
    assert wrong["y"] > 2e-2
    assert wrong["dx"] > 1e-2


def test_bytes_of_an_operation(kernels: ModuleType) -> None:
    by_name = {p.name: p for p in kernels.PEERS}
    for name, tensors in (("dyt", (2, 3)), ("rmsnorm torch", (2, 3)), ("add dyt", (4, 4))):
        found = tuple(kernels.moved_bytes(by_name[name], phase, 1000, 2) for phase in kernels.PHASES)
        assert found == tuple(2000 * n for n in tensors)


def test_measures_and_reports_every_peer(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "Timer", WallClock)
    monkeypatch.setattr(kernels, "measure_copy", lambda timer, rounds: 1e9)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(name="a device", multi_processor_count=1),
    )
    report_file = tmp_path / "report.json"
    args = SimpleNamespace(dtype="bf16", rounds=4, hidden=(64,), tokens=(8, 16), json=report_file)
    report = kernels.measure_all(args)
    assert [(s["tokens"], s["hidden"]) for s in report["shapes"]] == [(8, 64), (16, 64)]
    forward = report["shapes"][1]["peers"]["add dyt"]["forward"]
    rate = 4 * 16 * 64 * 2 / (forward["median_us"] / 1e6)
    assert forward["gb_per_s"] == pytest.approx(rate / 1e9)
    assert forward["of_copy"] == pytest.approx(rate / 1e9)
    assert forward["quartile1_us"] <= forward["median_us"] <= forward["quartile3_us"]
    assert report["left_out"].keys() >= {"dyt liger, hidden 64", "add rmsnorm te, hidden 64"}
    assert report["host"]["dyt"]["median_us"] > 0
    assert set(report) >= {"commit", "device", "versions", "copy_gb_per_s", "accuracy", "rounds"}
    kernels.write_json(report_file, report)
    assert json.loads(report_file.read_text())["shapes"] == report["shapes"]
    out, err = capsys.readouterr()
    assert "16 x 64" in out
    assert "left out: dyt liger" in err


def test_without_a_gpu_it_says_so_and_times_the_cpu(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels.cpu_norms, "main", called.append)
    monkeypatch.setattr("sys.argv", ["kernels.py", "--rounds", "7", "--json", "out.json"])
    kernels.main()
    assert "No CUDA device" in capsys.readouterr().out
    assert called == [["--rounds", "7", "--json", "out.json"]]
