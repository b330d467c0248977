"""The container recipe takes our pins for what we depend on, and copies what is there. Not built here."""

import re
import tomllib
from pathlib import Path

import pytest

from examples.container.pins import asked, check_torch, name_of, pins

ROOT = Path(__file__).resolve().parents[2]
RECIPE = (ROOT / "examples/container/Dockerfile").read_text()
EXTRAS = re.findall(r"--editable '\.\[(.+)\]'", RECIPE)[0].split(",")
# As `pip list --format=freeze` writes it in NVIDIA's image.
IMAGE = ["torch==2.11.0a0+eb65b36914.nv26.2", "numpy==2.1.0", "PyYAML==6.0.1", "transformer_engine==2.12.0"]


def test_the_images_packages_stay_and_the_rest_has_our_pin() -> None:
    pinned = pins(ROOT, IMAGE, EXTRAS)
    assert pinned[: len(IMAGE)] == IMAGE
    names = [name_of(line) for line in pinned]
    assert len(names) == len(set(names))
    assert set(names) == {name_of(line) for line in IMAGE} | asked(ROOT, EXTRAS)
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(pinned[len(IMAGE) :]) <= set(constraints)
    assert {"megatron-core", "click", "transformers", "tensorboard", "wandb"} <= set(names)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (IMAGE, None),
        (["torch==2.10.0a0+b4e4ee81d3.nv25.12"], r"has torch 2\.10\.0a0.*, and tested is 2\.11"),
        ([], "has torch nowhere"),
    ],
)
def test_another_torch_than_the_tested_is_refused(image: list[str], message: str | None) -> None:
    found = check_torch(image, ROOT)
    assert found is None if message is None else re.search(message, found or "")


def test_pins_are_made_for_what_is_installed() -> None:
    assert re.findall(r"pins\.py /tmp/image\.txt (.+) > /tmp/pins\.txt", RECIPE) == [" ".join(EXTRAS)]


def test_the_check_is_sound_python() -> None:
    text = (ROOT / "examples/container/check.sh").read_text()
    compile(text.split("<<'PYTHON'\n")[1].split("\nPYTHON\n")[0], "check.sh", "exec")


def test_what_it_copies_is_there() -> None:
    copied = [word for line in re.findall(r"^COPY (.+)$", RECIPE, re.M) for word in line.split()[:-1]]
    assert "constraints.txt" in copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {build["project"]["readme"], *build["project"]["license-files"], "setup.py"} <= {*copied}


def test_the_base_is_one_image_with_a_version() -> None:
    assert re.search(r"^ARG BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", RECIPE, re.M)
    assert re.findall(r"^FROM (.+)$", RECIPE, re.M) == ["${BASE}"]
