"""The ready sweep files: each can be read, and trains the model of the quickstart on its data."""

import re
import shlex
from pathlib import Path

import pytest

from megatron_dyt.sweep import flags, spec

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "examples/sweeps").glob("*.yaml"))
# The flags in it are those of the default of 200 steps.
SCRIPT = (ROOT / "examples/quickstart.sh").read_text()
for variable, value in (('"$HIDDEN"', "192"), ('"$STEPS"', "200"), ("$((STEPS / 10))", "20")):
    SCRIPT = SCRIPT.replace(variable, value)


def of_the_script(name: str) -> dict[str, str]:
    """The flags in a variable of quickstart.sh."""
    found = re.search(rf"^{name}=\((.*?)\)$", SCRIPT, re.DOTALL | re.MULTILINE)
    assert found is not None
    return flags.values(shlex.split(found[1], comments=True))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_ready_file_can_be_read(path: Path) -> None:
    sweep = spec.load(path)
    page = (ROOT / "docs/sweep.md").read_text()
    assert f"| {len(sweep.runs)} |" in next(line for line in page.splitlines() if f"[`{path.name}`]" in line)
    assert sweep.prepare
    assert sweep.plots


def test_the_quickstarts_sweep_is_of_the_quickstarts_model_and_recipe() -> None:
    run = spec.load(ROOT / "examples/sweeps/quickstart.yaml").runs[0]
    expected = of_the_script("MODEL") | of_the_script("RECIPE") | of_the_script("PORTABLE")
    expected |= {"seed": "1", "lr": "4e-3"}
    found = flags.values(run.flags)
    assert {name: found.get(name) for name in expected} == expected
