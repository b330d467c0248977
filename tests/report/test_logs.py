"""Parsing of Megatron's log and of the DyT statistics, against lines as Megatron prints them."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.report.logs import RunLog, parse_log, read_log, read_stats

TRAIN = (
    " [2025-11-23 21:00:00.123456] iteration      {i}/     300 | consumed samples:          {samples} |"
    " elapsed time per iteration (ms): {ms:.1f} | learning rate: {lr:.6E} | global batch size:    16 |"
    " lm loss: {loss:.6E} | loss scale: 1.0 | grad norm: {norm:.3f} |"
    " number of skipped iterations:   {skipped} | number of nan iterations:   {nan} |"
)


def train_line(i: int, loss: float, **changes: float) -> str:
    values = {
        "samples": i * 16,
        "ms": 1234.5,
        "lr": 1e-3,
        "norm": 0.75,
        "skipped": 0,
        "nan": 0,
    }
    return TRAIN.format(i=i, loss=loss, **(values | changes))


def valid_line(i: int, loss: float, where: str = "", name: str = "") -> str:
    return (
        f" validation{name} loss at iteration {i}{where} | lm loss value: {loss:.6E} | "
        f"lm loss PPL: {math.exp(loss):.6E} | "
    )


def parse(*lines: str) -> RunLog:
    log = parse_log(lines)
    assert log is not None
    return log


def test_fields_of_a_training_line() -> None:
    log = parse(train_line(10, 8.123456, ms=250.5, lr=1.5e-4, norm=12.345, skipped=2, nan=1))
    (point,) = log.points
    assert (point.iteration, log.train_iterations) == (10, 300)
    assert point.consumed_samples == 160
    assert point.seconds == pytest.approx(0.2505)
    assert point.learning_rate == 1.5e-4
    assert point.loss == 8.123456
    assert point.grad_norm == 12.345
    assert (point.skipped, point.nan) == (2, 1)
    assert log.skipped == (2, 1)
    assert log.global_batch_size == 16


def test_columns_follow_the_lines() -> None:
    log = parse(*(train_line(i, 9 - i / 10, ms=100 * i, lr=i * 1e-5, norm=i) for i in (1, 10, 20)))
    assert log.iterations == (1, 10, 20)
    assert log.losses == (8.9, 8.0, 7.0)
    assert log.step_seconds == pytest.approx((0.1, 1.0, 2.0))
    assert log.learning_rates == pytest.approx((1e-5, 1e-4, 2e-4))
    assert log.grad_norms == (1.0, 10.0, 20.0)


def test_the_formats_are_those_of_the_installed_megatron() -> None:
    spec = importlib.util.find_spec("megatron")
    places = list(spec.submodule_search_locations or ()) if spec else []
    sources = [Path(place) / "training" / "training.py" for place in places]
    source = next((path.read_text() for path in sources if path.is_file()), None)
    if source is None:
        pytest.skip("this Megatron has no megatron.training")
    for piece in (
        "' iteration {:8d}/{:8d} |'",
        "' consumed samples: {:12d} |'",
        "' elapsed time per iteration (ms): {:.1f} |'",
        "' learning rate: {learning_rate:.6E} |'",
        "' global batch size: {batch_size:5d} |'",
        "' {}: {:.6E} |'",
        "' grad norm: {grad_norm:.3f} |'",
        "' number of skipped iterations: {:3d} |'",
        "' number of nan iterations: {:3d} |'",
        "' validation{suffix} loss at {prefix} | '",
        "'{} value: {:.6E} | '",
        "'iteration {iteration} on validation set'",
        "'iteration {iteration} on test set'",
    ):
        assert piece in source, piece


def test_optional_fields_are_read_past_and_absent_ones_are_nan() -> None:
    line = (
        train_line(5, 3.0)
        .replace(" lm loss: 3.000000E+00 |", "")
        .replace(" learning rate", " throughput per GPU (TFLOP/s/GPU): 0.1 | learning rate")
    )
    (point,) = parse(line).points
    assert math.isnan(point.loss)
    assert point.learning_rate == 1e-3
    assert point.seconds == pytest.approx(1.2345)


def test_a_loss_that_overflowed_is_kept_as_infinite() -> None:
    (point,) = parse(train_line(5, math.inf)).points
    assert point.loss == math.inf


def test_validation_forms() -> None:
    log = parse(
        train_line(100, 3.0),
        "-" * 90,
        valid_line(100, 2.5),
        valid_line(50, 2.9),
        train_line(200, 2.6),
        valid_line(200, 2.25),
        valid_line(200, 2.125, where=" on validation set"),
        valid_line(200, 7.5, where=" on test set"),
    )
    assert [(v.iteration, v.loss) for v in log.validation] == [(50, 2.9), (100, 2.5), (200, 2.125)]
    assert log.test_loss == 7.5


def test_several_validation_sets_are_averaged() -> None:
    lines = [valid_line(10, 2.0, name="-0"), valid_line(10, 3.0, name="-code")]
    (point,) = parse(train_line(10, 3.0), *lines).validation
    assert point.loss == 2.5


def test_noise_between_and_within_lines() -> None:
    log = parse(
        "[W1123 socket.cpp:1] warning",
        "[default0]:" + train_line(1, 8.0) + "WARNING: something | lm loss: 1.0 |",
        "",
        "iteration 5 of something else | lm loss: 4.0 |",
        "saving checkpoint at iteration      10 to x",
        "\x00\ufffd" + train_line(2, 7.0),
    )
    assert log.losses == (8.0, 7.0)


@pytest.mark.parametrize("cut", [40, 90, 200, 235, 300, 318])
def test_a_truncated_last_line_is_dropped(cut: int) -> None:
    whole = train_line(20, 2.345678)
    assert cut < len(whole)
    assert parse(train_line(10, 3.0), whole[:cut]).losses == (3.0,)


def test_a_truncated_validation_number_is_dropped() -> None:
    line = valid_line(10, 2.345678)
    cut = line[: line.index("E+00")]
    assert parse(train_line(10, 3.0), cut).validation == ()


def test_garbled_numbers_do_not_stop_the_parser() -> None:
    line = train_line(10, 3.0).replace("160 |", "1x0 |").replace("0.750 |", "a.b |")
    (point,) = parse(line).points
    assert point.consumed_samples == 0
    assert math.isnan(point.grad_norm)
    assert point.loss == 3.0


def test_resume_replaces_what_came_after_the_checkpoint() -> None:
    log = parse(
        train_line(10, 5.0),
        train_line(20, 4.0),
        valid_line(20, 4.5),
        train_line(30, 9.0),
        train_line(40, 9.0),
        valid_line(40, 9.0),
        # killed; resumed from iteration 20
        train_line(21, 3.9),
        train_line(30, 3.0),
    )
    assert list(zip(log.iterations, log.losses, strict=True)) == [
        (10, 5.0),
        (20, 4.0),
        (21, 3.9),
        (30, 3.0),
    ]
    assert [(v.iteration, v.loss) for v in log.validation] == [(20, 4.5)]


def test_arguments_and_sequence_length() -> None:
    log = parse(
        "  seq_length ............ 99",
        "------------------------ arguments ------------------------",
        "  seq_length ...................................... 256",
        "[default0]:  normalization ................................... DyT",
        "  save ............................................ /data/my runs/x",
        "-------------------- end of arguments ---------------------",
        "  seq_length ...................................... 17",
        train_line(1, 8.0),
    )
    assert log.sequence_length == 256
    assert log.arguments["normalization"] == "DyT"
    assert log.arguments["save"] == "/data/my runs/x"


def test_sequence_length_is_none_without_arguments() -> None:
    assert parse(train_line(1, 8.0)).sequence_length is None


def test_skipped_counts_the_first_line_once() -> None:
    # Megatron prints the first iteration alone and counts it again in the next line.
    log = parse(train_line(1, 8.0, skipped=1), train_line(10, 7.0, skipped=3, nan=1))
    assert log.skipped == (3, 1)


def test_read_log(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_bytes(b"\xff\xfe noise\n" + train_line(10, 3.5).encode() + b"\r\n")
    assert read_log(path).losses == (3.5,)


def test_missing_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.log is missing or no file"):
        read_log(tmp_path / "nothing.log")


def test_log_without_training_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_text("Traceback\n" + valid_line(1, 2.0))
    with pytest.raises(UserError, match="holds no training line of Megatron"):
        read_log(path)


def stats_line(iteration: int, alpha: float, scale: float | None = 50.0) -> str:
    site = {
        "name": "decoder.layers.0.input_layernorm",
        "role": "attn",
        "layer": 1,
        "alpha": alpha,
        "input_std": 2.0,
        "alpha_std": 2 * alpha,
        "saturated": 0.125,
    }
    return json.dumps({"iteration": iteration, "sites": [site], "embedding_scale": scale})


def test_stats(tmp_path: Path) -> None:
    path = tmp_path / "dyt_stats.jsonl"
    path.write_text(stats_line(1, 0.5) + "\n" + stats_line(10, 0.25, scale=None) + "\n")
    first, last = read_stats(path)
    assert (first.iteration, last.iteration) == (1, 10)
    assert (first.embedding_scale, last.embedding_scale) == (50.0, None)
    (site,) = last.sites
    assert (site.name, site.role, site.layer) == ("decoder.layers.0.input_layernorm", "attn", 1)
    assert (site.alpha, site.input_std, site.alpha_std, site.saturated) == (0.25, 2.0, 0.5, 0.125)


def test_stats_of_a_resumed_run_with_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "dyt_stats.jsonl"
    lines = [
        stats_line(10, 0.5),
        stats_line(20, 0.9),
        stats_line(30, 0.9),
        stats_line(40, 0.9)[:50] + stats_line(50, 0.9),  # cut off, then appended to
        stats_line(20, 0.4),
        "[]",
        '{"iteration": 25, "sites": [{"name": "x"}]}',
        stats_line(30, 0.3)[:-20],
    ]
    path.write_text("\n".join(lines))
    assert [(r.iteration, r.sites[0].alpha) for r in read_stats(path)] == [(10, 0.5), (20, 0.4)]


def test_stats_without_a_record(tmp_path: Path) -> None:
    path = tmp_path / "dyt_stats.jsonl"
    with pytest.raises(UserError, match="missing or no file"):
        read_stats(path)
    path.write_text(stats_line(10, 0.5)[:-5])
    with pytest.raises(UserError, match="no complete record"):
        read_stats(path)


def stage_line(iteration: int, layers: list[int | None], scale: float | None = None) -> str:
    """A pipeline stage's record: one site a layer, alpha a tenth of the layer's number."""
    sites = [
        {
            "name": f"decoder.layers.{layer - 1}.input_layernorm" if layer else "decoder.final_layernorm",
            "role": "attn" if layer else "final",
            "layer": layer,
            "alpha": (layer or 9) / 10,
            "input_std": 1.0,
            "alpha_std": 0.5,
            "saturated": 0.0,
        }
        for layer in layers
    ]
    return json.dumps({"iteration": iteration, "sites": sites, "embedding_scale": scale}) + "\n"


def test_stages_are_put_together(tmp_path: Path) -> None:
    """With virtual stages each file has layers from all over; the last stage ended one record earlier."""
    first, last = tmp_path / "dyt_stats.stage0.jsonl", tmp_path / "dyt_stats.stage1.jsonl"
    first.write_text("".join(stage_line(i, [1, 3], scale=50.0) for i in (1, 10, 20)))
    last.write_text("".join(stage_line(i, [2, 4, None]) for i in (1, 10)))
    for files in ((first, last), (last, first)):
        records = read_stats(*files)
        assert [record.iteration for record in records] == [1, 10]
        assert [site.layer for site in records[1].sites] == [1, 2, 3, 4, 4]
        assert [site.alpha for site in records[1].sites] == [0.1, 0.2, 0.3, 0.4, 0.9]
        assert [record.embedding_scale for record in records] == [50.0, 50.0]


def test_a_run_resumed_with_other_stages(tmp_path: Path) -> None:
    """Begun on one stage to iteration 20, resumed from 10 on two, which write iteration 20 again."""
    whole = tmp_path / "dyt_stats.jsonl"
    whole.write_text("".join(stage_line(i, [1, 2], scale=1.0) for i in (10, 20)))
    first, last = tmp_path / "dyt_stats.stage0.jsonl", tmp_path / "dyt_stats.stage1.jsonl"
    first.write_text("".join(stage_line(i, [1], scale=2.0) for i in (20, 30)))
    last.write_text("".join(stage_line(i, [2]) for i in (20, 30)))
    records = read_stats(whole, first, last)
    assert [(record.iteration, record.embedding_scale) for record in records] == [
        (10, 1.0),
        (20, 2.0),
        (30, 2.0),
    ]
    assert all([site.layer for site in record.sites] == [1, 2] for record in records)


def test_stages_without_a_common_record(tmp_path: Path) -> None:
    first, last = tmp_path / "dyt_stats.stage0.jsonl", tmp_path / "dyt_stats.stage1.jsonl"
    first.write_text(stage_line(1, [1]))
    last.write_text(stage_line(2, [2]))
    with pytest.raises(UserError, match=r"stage0\.jsonl, .*stage1\.jsonl: no complete record"):
        read_stats(first, last)
