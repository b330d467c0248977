"""Print pins for an image: `pins.py IMAGE.txt EXTRA ...`, in the checkout's top.

IMAGE.txt is what `pip list --format=freeze` says in the image. What is there stays as it is; the rest of what
pyproject.toml asks for has the versions of constraints.txt.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

# megatron-core[training] asks for it.
INDIRECT = {"wandb"}


def name_of(requirement: str) -> str:
    """A package's name, in the one spelling of the package index."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=; ]", requirement)[0]).lower()


def asked(root: Path, extras: list[str]) -> set[str]:
    """Names of the package's dependencies and those of `extras`."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {name_of(line) for line in lines} - {project["name"]} | INDIRECT


def pins(root: Path, image: list[str], extras: list[str]) -> list[str]:
    """Lines such as "torch==2.11.0a0+eb65b36914.nv26.02" (the image's) and "click==8.5.1" (ours)."""
    there = {name_of(line): line for line in image if "==" in line}
    ours = asked(root, extras) - there.keys()
    lines = (root / "constraints.txt").read_text().splitlines()
    return [*there.values(), *(line for line in lines if name_of(line) in ours)]


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def check_torch(lines: list[str], root: Path) -> str | None:
    """What is wrong with the image's torch, or None."""
    tested = re.search(r"^torch==(.+)$", (root / "constraints.txt").read_text(), re.M)
    found = next((line.split("==")[1] for line in lines if name_of(line) == "torch"), "")
    assert tested is not None
    if minor(found) == minor(tested[1]):
        return None
    return (
        f"the image has torch {found or 'nowhere'}, and tested is {tested[1]}. Take an image of torch "
        f"{minor(tested[1])} (--build-arg BASE=...), or this one as it is (--build-arg ANY_TORCH=1)"
    )


if __name__ == "__main__":
    image = Path(sys.argv[1]).read_text().splitlines()
    wrong = check_torch(image, Path.cwd())
    if wrong and not os.environ.get("ANY_TORCH"):
        sys.exit(f"pins.py: error: {wrong}")
    print("\n".join(pins(Path.cwd(), image, sys.argv[2:])))
