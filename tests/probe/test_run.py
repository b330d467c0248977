"""`megatron-dyt probe`: files and summary from a checkpoint, and clear errors for what does not fit."""

import csv
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from megatron_dyt.cli.probe import probe
from megatron_dyt.data.indexed_dataset import IndexedDatasetWriter
from megatron_dyt.errors import UserError
from megatron_dyt.probe.run import _earlier
from megatron_dyt.probe.sources import Source, tokens
from tests.evaluation.conftest import (  # noqa: F401
    SEQUENCE,
    Trained,
    fresh_megatron,
    home,
    tokenizer_model,
    trained,
)
from tests.hf.conftest import add_tokenizer, hf_directory, without_cpu_runtime
from tests.license_tokenizer import TEXT

FIGURES = ("maps_by_token", "maps_by_channel", "alpha", "by_layer")


def dataset(prefix: Path, *documents: list[int]) -> str:
    with IndexedDatasetWriter(prefix.with_suffix(".bin"), prefix.with_suffix(".idx"), np.uint16) as writer:
        writer.add(np.concatenate(documents), np.array([len(ids) for ids in documents]))
        writer.finish()
    return str(prefix)


def run(**options: Any) -> None:
    probe.main(
        [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))],
        standalone_mode=False,
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def check_figures(output: Path) -> None:
    assert not list(output.glob("*.partial"))
    for name in FIGURES:
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (output / f"{name}.svg").read_text()
        ElementTree.fromstring(svg)
        # Points are one picture, not thousands of marks.
        assert ("data:image/png" in svg) == name.startswith("maps"), name


def test_a_megatron_checkpoint_with_its_history(
    trained: Callable[..., Trained],  # noqa: F811
    fresh_megatron: None,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = dataset(tmp_path / "data", *(list(range(i, 370, 3)) for i in range(3)))
    load, output = trained("RMSNorm", "").directory, tmp_path / "out"
    run(load=load, output=output, data_path=data, sequences=2, device="cpu")
    check_figures(output)
    sites = {row["name"]: row for row in rows(output / "sites.csv")}
    assert len(sites) == 5
    assert {row["kind"] for row in sites.values()} == {"RMSNorm"}
    assert {row["tokens"] for row in sites.values()} == {str(2 * SEQUENCE)}
    moments = rows(output / "alpha.csv")
    assert [row["iteration"] for row in moments] == ["2"] * 5 + ["4"] * 5
    last = {row["name"]: row for row in moments[5:]}
    assert all(row["alpha"] == sites[name]["tanh_alpha"] for name, row in last.items())
    assert moments[0]["inverse_std"] != moments[5]["inverse_std"]
    parts = [row["part"] for row in rows(output / "layers.csv")]
    assert "decoder.layers.1" in parts
    text = capsys.readouterr().out
    assert "5 sites, RMSNorm" in text
    assert "pre_mlp_layernorm 2" in text


def test_a_hugging_face_model_with_dyt(
    tokenizer_model: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load, output, text = tmp_path / "hf", tmp_path / "out", tmp_path / "text"
    text.write_text(TEXT)
    model = hf_directory(load, {"dyt_bias": True}, vocab_size=400)
    add_tokenizer(load, tokenizer_model)
    with without_cpu_runtime():
        run(load=load, output=output, text=text, sequences=2, device="cpu")
    check_figures(output)
    sites = {row["name"]: row for row in rows(output / "sites.csv")}
    assert len(sites) == 5
    for name, row in sites.items():
        assert row["kind"] == "DyT"
        assert float(row["alpha"]) == pytest.approx(float(model.get_submodule(name).alpha), rel=1e-5)
    assert "post_attention_layernorm 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("iteration", "most", "expected"),
    [
        (50, 8, [10, 20, 30, 40]),
        (50, 3, [10, 30]),
        (50, 2, [10]),
        (50, 1, []),
        (10, 8, []),
        (30, 8, [10, 20]),
    ],
)
def test_which_checkpoints_stand_for_the_training(iteration: int, most: int, expected: list[int]) -> None:
    assert _earlier([10, 20, 30, 40, 50, 60], iteration, most) == expected


# --- what does not fit --------------------------------------------------------------------------------


def source(saved: Namespace | None = None, **options: Any) -> Source:
    model = torch.nn.Linear(1, 1)
    given: dict[str, Any] = {"rows": 64, "positions": 32, "tokenize": lambda text: [1] * len(text)}
    return Source(
        model, iteration=None, saved=saved, call=lambda _: {}, load_iteration=None, **(given | options)
    )


def test_sequences_are_spread_over_the_data_set(tmp_path: Path) -> None:
    """Across the ends of documents, as training reads them."""
    data = dataset(tmp_path / "data", list(range(7)), list(range(7, 20)), list(range(20, 40)))
    found = tokens(source(), data, None, 3, 11)
    assert found.tolist() == [list(range(start, start + 12)) for start in (0, 13, 26)]


def test_validation_data_of_the_run_come_first(tmp_path: Path) -> None:
    train, valid = (dataset(tmp_path / name, [value] * 20) for name, value in (("train", 1), ("valid", 2)))
    saved = Namespace(
        train_data_path=[train], valid_data_path=["0.5", valid], tokenizer_type=None, tokenizer_model=None
    )
    assert tokens(source(saved), None, None, 1, 8).unique().tolist() == [2]


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, {}, "no batch was given; give a data set's prefix with --data-path, or --text"),
        (
            {"saved": Namespace(train_data_path=["0.3", "far/away"])},
            {},
            r"the run's data \(far/away\) are not here; start where .* or give .*--data-path",
        ),
        ({}, {"data_path": "nowhere"}, r"--data-path nowhere: there is no nowhere.idx. Give the prefix"),
        ({}, {"text": "nowhere"}, "--text nowhere cannot be read"),
        ({"rows": 5}, {"data_path": "data"}, "holds the id 8, and the model's vocabulary has 5 entries"),
        ({}, {"data_path": "data", "sequences": 9}, "data has 20 tokens, and 81 are needed; give fewer"),
        ({}, {"text": "text"}, "has 5 tokens, and 9 are needed; give more text"),
        ({}, {"length": 33}, "--length 33 was given; the model has 32 positions"),
    ],
)
def test_data_that_do_not_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    given: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset(Path("data"), list(range(20)))
    Path("text").write_text("12345")
    call: dict[str, Any] = {"data_path": None, "text": None, "sequences": 1, "length": 8} | given
    if call["text"]:
        call["text"] = Path(call["text"])
    with pytest.raises(UserError, match=message):
        tokens(source(**options), **call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "a", "data_path": "b"}, "--data-path and --text were both given"),
        ({"ckpt_step": 3, "load": "hf"}, "--ckpt-step 3 was given, and --load hf is a Hugging Face model"),
        ({"load": "nowhere"}, "--load nowhere: no such directory"),
        ({"load": "empty"}, "--load empty: there is no checkpoint"),
        ({"output": "file"}, "--output file is a file"),
        ({"load": "hf", "device": "abacus"}, "--device abacus: allowed are"),
        ({"load": "hf"}, "--load hf cannot be loaded as a causal language model"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("hf", "empty"):
        Path(name).mkdir()
    Path("hf", "config.json").write_text("{}")
    Path("file").touch()
    with pytest.raises(UserError, match=message):
        run(**({"load": "empty", "output": "out"} | options))
    assert not Path("out").exists()
