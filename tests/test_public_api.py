import subprocess
import sys

import pytest

import megatron_dyt

QUIET_IMPORT = """
import sys
import megatron_dyt
from megatron_dyt import DynamicTanh, DyTConfig
assert not [name for name in sys.modules if name.split(".")[0] == "megatron"], "megatron was imported"
assert DynamicTanh(4).alpha.shape == (1,)
assert DyTConfig.paper(4096).alpha_attn == 0.8
"""


def test_importing_the_package_and_its_torch_side_does_not_import_megatron() -> None:
    subprocess.run([sys.executable, "-c", QUIET_IMPORT], check=True, timeout=600)


def test_every_public_name_exists() -> None:
    for name in megatron_dyt.__all__:
        assert getattr(megatron_dyt, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'DynamicTan'"):
        _ = megatron_dyt.DynamicTan
