"""Megatron's compiled dataset helpers: already built in the wheel, to be built in a source checkout."""

import importlib.util
import subprocess
import sysconfig
from pathlib import Path

import torch

from megatron_dyt.errors import UserError

_MODULE = "megatron.core.datasets.helpers_cpp"


def prepare() -> None:
    """Make Megatron's start-up build do nothing in a wheel, and the right thing in a checkout.

    The wheel ships the helpers without their Makefile, so the build exits with an error although nothing
    needs building. In a checkout the build asks the `python3` of the PATH for headers and file name, which
    is another Python than the running one in an environment that is not activated, and it needs pybind11,
    which PyTorch ships.
    """
    import megatron.core.datasets.utils as utils

    utils.compile_helpers = _already_built if importlib.util.find_spec(_MODULE) else _build


def _already_built() -> None:
    """Stands in for `compile_helpers`."""


def _build() -> None:
    """Run the checkout's Makefile with this Python's headers, pybind11 from PyTorch, and this suffix."""
    import megatron.core.datasets as datasets

    folder = str(datasets.__path__[0])
    headers = (sysconfig.get_path("include"), Path(torch.__file__).parent / "include")
    variables = {
        "CPPFLAGS": " ".join(f"-I{header}" for header in headers),
        "LIBEXT": sysconfig.get_config_var("EXT_SUFFIX"),
    }
    command = ["make", "-C", folder, *(f"{name}={value}" for name, value in variables.items())]
    try:
        built = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        code, output = built.returncode, built.stdout
    except FileNotFoundError as error:
        code, output = 127, str(error)
    if code != 0:
        raise UserError(
            f"Megatron's dataset helpers could not be built in {folder}. That takes make, a C++ compiler, "
            "the headers of this Python and permission to write there. What the build said:\n"
            f"{output.strip()[-2000:]}"
        )
    importlib.invalidate_caches()
