"""A damaged checkpoint is refused before anything is loaded, or passed over when the user allows it."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_dyt.checkpoints import crc, damage
from megatron_dyt.checkpoints.iterations import TRACKER, DamagedCheckpoint
from megatron_dyt.errors import UserError
from tests import bits

Run = Callable[[list[str]], SimpleNamespace]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def copy(megatron_run: Run, tiny_llama: list[str], saved: Path, tmp_path: Path) -> Path:
    """A --save directory with the checkpoints 2 and 4 (trained once for all tests)."""
    if not (saved / TRACKER).exists():
        megatron_run([*dyt(tiny_llama), "--save", str(saved), "--save-interval", "2"])
    return shutil.copytree(saved, tmp_path / "copy")


def dyt(tiny_llama: list[str]) -> list[str]:
    return [*tiny_llama, "--normalization", "DyT", "--dyt-preset", "unit"]


def resuming(tiny_llama: list[str], directory: Path, *flags: str) -> list[str]:
    where = ["--save", str(directory), "--load", str(directory), "--save-interval", "100"]
    return [*dyt(tiny_llama), *where, "--train-iters", "5", "--override-opt_param-scheduler", *flags]


def flip(checkpoint: Path, name: str) -> None:
    """Change a value of the stored tensor or object `name`."""
    item = next(each for each in crc.stored_items(checkpoint) if each.name.startswith(name))
    text, further = (b"iteration", 0) if name == "common_state" else (b"data/0", 100)
    bits.flip(item.file, item.file.read_bytes().index(text, item.offset) + further, bit=6)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


WEIGHT = "decoder.layers.mlp.linear_fc2.weight"
OPTIMIZER = "optimizer.state.exp_avg.decoder.final_layernorm.weight"


@pytest.mark.parametrize("name", [WEIGHT, OPTIMIZER, "common_state"])
def test_a_flipped_bit_is_refused_and_nothing_is_written(
    copy: Path, megatron_run: Run, tiny_llama: list[str], name: str
) -> None:
    flip(copy / "iter_0000004", name)
    before = contents(copy)
    with pytest.raises(DamagedCheckpoint, match=rf"iter_0000004 is damaged.*{name}.*--dyt-load-fallback"):
        megatron_run(resuming(tiny_llama, copy))
    assert contents(copy) == before


def test_it_can_be_loaded_without_the_check(copy: Path, megatron_run: Run, tiny_llama: list[str]) -> None:
    flip(copy / "iter_0000004", WEIGHT)
    run = megatron_run(resuming(tiny_llama, copy, "--no-dyt-verify-load"))
    assert len(run.losses) == 1


def test_data_that_are_not_loaded_are_not_read(copy: Path, megatron_run: Run, tiny_llama: list[str]) -> None:
    flip(copy / "iter_0000004", OPTIMIZER)
    assert len(megatron_run(resuming(tiny_llama, copy, "--no-load-optim")).losses) == 1


def truncate(checkpoint: Path) -> None:
    data = next(checkpoint.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1000])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weight": lambda checkpoint: flip(checkpoint, WEIGHT),
    "arguments": lambda checkpoint: flip(checkpoint, "common_state"),
    "truncated": truncate,
    "missing shards": lambda checkpoint: [path.unlink() for path in checkpoint.glob("*.distcp")],
    "no metadata.json": lambda checkpoint: (checkpoint / "metadata.json").unlink(),
    "metadata": lambda checkpoint: (checkpoint / ".metadata").write_bytes(b"garbage"),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_is_taken_when_allowed(
    copy: Path, megatron_run: Run, tiny_llama: list[str], damage: str
) -> None:
    DAMAGES[damage](copy / "iter_0000004")
    damaged = contents(copy / "iter_0000004")
    run = megatron_run(resuming(tiny_llama, copy, "--dyt-load-fallback"))
    assert len(run.losses) == 3  # Steps 3, 4 and 5.
    assert "WARNING: --dyt-load-fallback: going back to" in run.log
    assert (copy / TRACKER).read_text() == "5"
    if damage != "gone":
        assert contents(copy / "iter_0000004.damaged") == damaged
    assert not (copy / "iter_0000004").exists()


def test_also_when_the_arguments_come_from_it(copy: Path, megatron_run: Run, tiny_llama: list[str]) -> None:
    truncate(copy / "iter_0000004")
    run = megatron_run(resuming(tiny_llama, copy, "--dyt-load-fallback", "--use-checkpoint-args"))
    assert len(run.losses) == 3
    assert (copy / "iter_0000004.damaged").is_dir()


def test_all_damaged_is_an_error_that_changes_nothing(
    copy: Path, megatron_run: Run, tiny_llama: list[str]
) -> None:
    for iteration in (2, 4):
        flip(copy / f"iter_000000{iteration}", WEIGHT)
    before = contents(copy)
    with pytest.raises(DamagedCheckpoint, match=r"iter_0000002 is damaged.*No complete checkpoint is before"):
        megatron_run(resuming(tiny_llama, copy, "--dyt-load-fallback"))
    assert contents(copy) == before


def test_another_directory_is_left_as_it_is(
    copy: Path, megatron_run: Run, tiny_llama: list[str], tmp_path: Path
) -> None:
    flip(copy / "iter_0000004", WEIGHT)
    before = contents(copy)
    run = megatron_run(resuming(tiny_llama, copy, "--dyt-load-fallback", "--save", str(tmp_path / "new")))
    assert len(run.losses) == 3
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("told", "raised"), [("for another layout", UserError), (None, RuntimeError)], ids=["layout", "other"]
)
def test_megatrons_error_for_another_layout_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: str | None, raised: type[Exception]
) -> None:
    def refuse_other(_args: object, path: Path) -> None:
        assert path == tmp_path / "iter_0000003"
        if told:
            raise UserError(told)

    def load_checkpoint() -> None:
        raise RuntimeError("Please use `--ckpt-fully-parallel-save` flag")

    (tmp_path / TRACKER).write_text("3")
    monkeypatch.setattr(damage, "parsed_args", lambda: SimpleNamespace(load=str(tmp_path)))
    monkeypatch.setattr(damage, "_check_start", lambda *_, **__: None)
    monkeypatch.setattr(damage.optimizer_layout, "refuse_other", refuse_other)
    with pytest.raises(raised, match=told or "fully-parallel-save"):
        damage.wrap_load_checkpoint(load_checkpoint)()


@pytest.mark.parametrize("here", [True, False])
def test_a_rank_without_the_directory_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    """A mount that is missing on one node: its ranks must not leave the others waiting."""
    args = SimpleNamespace(load=str(tmp_path), ckpt_step=None)
    if here:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
        (tmp_path / "iter_0000007").mkdir()
    mine = tmp_path / "iter_0000007" if here else None
    theirs = None if here else tmp_path / "iter_0000007"

    def gather(value: Path | None) -> list[Path | None]:
        assert value == mine
        return [mine, theirs]

    monkeypatch.setattr(damage.world, "gather", gather)
    monkeypatch.setattr(damage, "_problem_of_start", lambda path, args: None)
    monkeypatch.setattr(damage, "_agree", lambda problem, group=None: None)
    with pytest.raises(UserError, match=r"but rank 1 .*1 of 2 ranks differ.*mounted on all nodes"):
        damage._check_start(args, alone=False)


def test_object_stores_are_left_alone() -> None:
    damage.verify("msc://bucket/iter_0000001", {"weight"})
    assert damage._to_load(SimpleNamespace(load="msc://bucket")) is None


@pytest.mark.parametrize("flags", [[], ["--async-save", "--use-persistent-ckpt-worker"]])
def test_with_the_fallback_the_last_two_are_kept(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path, flags: list[str]
) -> None:
    saving = ["--save", str(tmp_path), "--save-interval", "1", "--save-retain-interval", "3"]
    megatron_run([*dyt(tiny_llama), "--train-iters", "5", *saving, "--dyt-load-fallback", *flags])
    deadline = time.monotonic() + 120
    while (kept := sorted(path.name[-1] for path in tmp_path.glob("iter_*"))) != ["3", "4", "5"]:
        assert time.monotonic() < deadline, kept  # Megatron deletes in the background.
        time.sleep(0.05)


def test_without_it_megatrons_choice_stays(tmp_path: Path) -> None:
    deleted: list[tuple[str, int]] = []
    damage.wrap_delete(lambda *args: deleted.append(args))(str(tmp_path), 7)
    assert deleted == [(str(tmp_path), 7)]


def test_of_those_before_the_last_two_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (2, 3, 6, 7, 8):
        (tmp_path / f"iter_{number:07d}").mkdir()
        (tmp_path / f"iter_{number:07d}" / "metadata.json").write_text("{}")
    flags = SimpleNamespace(dyt_load_fallback=True, save_retain_interval=3)
    monkeypatch.setattr(damage, "parsed_args", lambda: flags)
    deleted: list[int] = []
    delete = damage.wrap_delete(lambda _save, number, *_rest: deleted.append(number))
    delete(str(tmp_path), 7)  # 8 is saved: 7 and 8 stay, 6 is retained.
    delete(str(tmp_path), 2)
    assert deleted == [2]
