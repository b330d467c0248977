"""The GPU benchmark, as far as it runs without one: its peers, its errors, its bytes and its report."""

import contextlib
import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/kernels.py on the CPU, as --rehearse has it."""
    module = importlib.import_module("kernels")
    for name in ("DEVICE", "PEERS", "SMALL"):
        monkeypatch.setattr(module, name, getattr(module, name))
    module.rehearse()
    return module


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
    monkeypatch.setattr(kernels, "measure_copy", lambda clock, rounds: 1e9)
    args = SimpleNamespace(dtype="bf16", rounds=4, hidden=(64, 96), tokens=(8, 16), output=tmp_path)
    report = kernels.measure_all(args)
    (saved,) = tmp_path.glob("*.json")  # Written after each shape: what an interruption would leave.
    assert json.loads(saved.read_text())["results"] == report["results"]
    assert [(r["tokens"], r["hidden"]) for r in report["results"]] == [(8, 64), (16, 64), (8, 96), (16, 96)]
    forward = report["results"][1]["peers"]["add dyt"]["forward"]
    rate = 4 * 16 * 64 * 2 / (forward["median_us"] / 1e6)
    assert forward["gb_per_s"] == pytest.approx(rate / 1e9)
    assert forward["of_copy"] == pytest.approx(rate / 1e9)
    assert forward["quartile1_us"] <= forward["median_us"] <= forward["quartile3_us"]
    assert report["left_out"].keys() >= {"dyt liger, hidden 64", "add rmsnorm te, hidden 64"}
    assert report["host"]["dyt"]["median_us"] > 0
    out, err = capsys.readouterr()
    assert "16 x 64" in out
    assert "left out: dyt liger" in err
    # The table has the peers at 16 tokens, the picture those that add a residual.
    rows = kernels.table(report).splitlines()[2:]
    peers = report["results"][1]["peers"]
    assert len(rows) == 2 * len(peers)
    assert all(row.startswith(("| 16 x 64 |", "| 16 x 96 |")) for row in rows)
    picture = kernels.picture(report)
    shown = [name for name in peers if name.startswith("add ") and "eager" not in name]
    described = ElementTree.fromstring(picture.encode()).findtext("{http://www.w3.org/2000/svg}desc") or ""
    assert all(described.count(f" tokens, {name.removeprefix('add ')}: ") == 2 for name in shown)


def test_a_run_that_was_cut_off_has_a_table(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Errors come after all shapes of a width; what is saved before has none."""
    monkeypatch.setattr(kernels, "measure_copy", lambda clock, rounds: 1e9)

    def cut_off(*rest: Any) -> dict[str, float]:
        raise KeyboardInterrupt

    hour = tmp_path / "hour"
    for hidden in (64, 96):
        args = SimpleNamespace(
            dtype="bf16", rounds=2, hidden=(hidden,), tokens=(8,), output=hour / str(hidden)
        )
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            if hidden == 96:
                patch.setattr(kernels, "errors", cut_off)
            kernels.save_figures(kernels.measure_all(args), args.output)
        (saved,) = args.output.glob("*.json")
        stage = {"reports": [json.loads(saved.read_text())]}
        (hour / f"kernels-{hidden}.json").write_text(json.dumps(stage))
    run = importlib.import_module("run")
    run.take(hour, tmp_path / "results")
    text = "<!-- results: kernels on cpu -->\n<!-- end -->"
    filled = run.fill(text, run.newest(tmp_path / "results"), tmp_path / "benchmarks.md")
    cells = [line.split(" | ") for line in filled.splitlines() if " | add dyt | " in line]
    assert [row[0] for row in cells] == ["| 8 x 64", "| 8 x 96"]
    assert float(cells[0][-1].rstrip(" |")) > 0
    assert cells[1][-1].strip(" |") == ""


@pytest.mark.parametrize("name", ["rmsnorm torch", "add rmsnorm torch"])
def test_torchs_norm_casts_no_weight(kernels: ModuleType, name: str) -> None:
    """As in a model, whose weight is a leaf in the dtype of its activations."""
    peer, run = kernels.working_peers(64, torch.bfloat16, {})[name]
    inputs = kernels.make_inputs(8, 64, torch.bfloat16)
    found = kernels.gradients(peer, run(inputs), inputs, torch.ones_like(inputs.x))
    assert [gradient.dtype for gradient in found] == [torch.bfloat16] * len(kernels.used_inputs(peer))


def test_a_shape_that_does_not_fit_is_left_out(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = kernels.measure_shape

    def measure_shape(clock: Any, tokens: int, *rest: Any) -> Any:
        if tokens == 16:
            raise torch.OutOfMemoryError("no memory")
        return original(clock, tokens, *rest)

    monkeypatch.setattr(kernels, "measure_copy", lambda clock, rounds: 1e9)
    monkeypatch.setattr(kernels, "measure_shape", measure_shape)
    args = SimpleNamespace(dtype="bf16", rounds=2, hidden=(64,), tokens=(16, 8), output=tmp_path)
    report = kernels.measure_all(args)
    assert [r["tokens"] for r in report["results"]] == [8]
    assert report["left_out"]["16 x 64"] == "no memory"


def test_without_a_gpu_it_says_so(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        kernels.main([])
    assert "there is no CUDA device; benchmarks/cpu_norms.py times the CPU path" in capsys.readouterr().err
