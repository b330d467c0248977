"""The build of Megatron's dataset helpers: left out for a wheel, done with this Python for a checkout."""

import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.training import dataset_helpers

# As Megatron's: what is built is named by $(LIBEXT), and compiled with $(CPPFLAGS).
MAKEFILE = "helpers_cpp$(LIBEXT):\n\t@for flag in $(CPPFLAGS); do echo $$flag; done > $@\n"


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    import megatron.core.datasets.utils as module

    monkeypatch.setattr(module, "compile_helpers", module.compile_helpers)  # put back at the end
    return module


@pytest.fixture
def checkout(utils: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A datasets folder in which nothing is built."""
    import megatron.core.datasets as datasets

    monkeypatch.delitem(sys.modules, "megatron.core.datasets.helpers_cpp", raising=False)
    monkeypatch.setattr(datasets, "__path__", [str(tmp_path)])
    return tmp_path


def test_what_is_built_is_left_alone(utils: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no make to be found
    dataset_helpers.prepare()
    utils.compile_helpers()


def test_a_checkout_is_built_with_this_python(utils: SimpleNamespace, checkout: Path) -> None:
    (checkout / "Makefile").write_text(MAKEFILE)
    dataset_helpers.prepare()
    utils.compile_helpers()
    built = checkout / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    included = [Path(flag.removeprefix("-I")) for flag in built.read_text().split()]
    for header in ("Python.h", "pybind11/pybind11.h"):
        assert any((folder / header).is_file() for folder in included), header


def test_a_failed_build_says_what_it_takes(utils: SimpleNamespace, checkout: Path) -> None:
    (checkout / "Makefile").write_text("all:\n\t@echo no compiler here; exit 3\n")
    dataset_helpers.prepare()
    with pytest.raises(UserError, match=r"(?s)takes make, a C\+\+ compiler.*no compiler here"):
        utils.compile_helpers()


def test_without_make(utils: SimpleNamespace, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_helpers.prepare()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="No such file or directory: 'make'"):
        utils.compile_helpers()
