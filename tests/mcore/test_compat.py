import builtins
import sys
from typing import Any

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.mcore import compat


def test_the_installed_version_is_supported() -> None:
    assert compat.check_version() == compat.megatron_version()


@pytest.mark.parametrize("version", ["0.16.1", "0.16.2rc0", "0.19.2", "0.19.2+abc"])
def test_supported_versions(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(compat, "megatron_version", lambda: version)
    assert compat.check_version() == version


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.20.0", "1.0"])
def test_unsupported_versions_name_the_range(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(compat, "megatron_version", lambda: version)
    with pytest.raises(
        UserError, match=rf"megatron-core {version} is not supported.*>= 0\.16\.1, < 0\.20\.0"
    ):
        compat.check_version()


def test_a_missing_megatron_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "megatron.core.package_info":
            raise ImportError("no megatron")
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "megatron.core.package_info", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'megatron-dyt\[train\]'"):
        compat.megatron_version()


def test_the_commit_of_the_working_directory_is_no_part_of_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.core import package_info

    monkeypatch.setattr(package_info, "__version__", "0.19.2+0123abc")
    assert compat.megatron_version() == "0.19.2"


@pytest.mark.parametrize(("version", "stack"), [("0.17.1", "MambaStack"), ("0.18.0", "HybridStack")])
def test_the_hybrid_stack_of_a_version(monkeypatch: pytest.MonkeyPatch, version: str, stack: str) -> None:
    monkeypatch.setattr(compat, "megatron_version", lambda: version)
    assert compat.hybrid_stack()[1] == stack


def test_the_entry_points_name_the_training_loop_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    compat.check_training_version()
    monkeypatch.setattr(compat, "megatron_version", lambda: "0.18.2")
    with pytest.raises(UserError, match=r"0\.18\.2 is installed; .*need >= 0\.19\.0"):
        compat.check_training_version()
