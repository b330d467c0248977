import builtins
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dyt import compat
from megatron_dyt.errors import UserError


def test_the_installed_version_is_supported() -> None:
    assert compat.check_version() == compat.megatron_version()


@pytest.mark.parametrize(
    "version",
    [*compat.TESTED, "0.16.2rc0", "0.19.2+abc", "0.19.3.dev0", "0.19.2.dev1+0123abc", "0.18.2.post1"],
)
def test_supported_versions(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(compat, "megatron_version", lambda: version)
    assert compat.check_version() == version


@pytest.mark.parametrize(
    "version",
    ["0.15.3", "0.16.0", "0.16.1rc0", "0.16.0+abc", "0.20.0", "0.20.0rc0", "0.20.0.dev0+0123abc", "1.0"],
)
def test_unsupported_versions_name_the_range(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(compat, "megatron_version", lambda: version)
    with pytest.raises(
        UserError,
        match=rf"megatron-core {re.escape(version)} is not supported.*>= 0\.16\.1, < 0\.20\.0",
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


@pytest.mark.parametrize(("checkout", "build"), [(True, "0.19.2+0123abc"), (False, "0.19.2")])
def test_a_commit_counts_in_a_checkout_of_megatron_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkout: bool, build: str
) -> None:
    from megatron.core import package_info

    # An environment inside a repository of the user's.
    (tmp_path / ".git").mkdir()
    root = tmp_path / "site-packages"
    (root / (".git" if checkout else "")).mkdir(parents=True)
    monkeypatch.setattr(package_info, "__version__", "0.19.2+0123abc")
    monkeypatch.setattr(package_info, "__file__", str(root / "megatron" / "core" / "package_info.py"))
    assert compat.megatron_build() == build
    assert compat.megatron_version() == "0.19.2"


@pytest.mark.parametrize(("version", "stack"), [("0.17.1", "MambaStack"), ("0.18.0", "HybridStack")])
def test_the_hybrid_stack_of_a_version(monkeypatch: pytest.MonkeyPatch, version: str, stack: str) -> None:
    monkeypatch.setattr(compat, "megatron_version", lambda: version)
    assert compat.hybrid_stack()[1] == stack


def test_what_is_no_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "megatron_version", lambda: "main")
    with pytest.raises(UserError, match=r"'main', which is no version; .*>= 0\.16\.1, < 0\.20\.0"):
        compat.check_version()


@pytest.mark.needs("training_loop")
def test_the_entry_points_know_this_training_loop() -> None:
    compat.check_training_version()


@pytest.mark.parametrize(("version", "there"), [("0.16.1", True), ("0.19.2", False)])
def test_the_entry_points_name_the_training_loop_they_need(
    monkeypatch: pytest.MonkeyPatch, version: str, there: bool
) -> None:
    """Too old even in a checkout, which has one; a wheel of 0.19 that lost it."""
    monkeypatch.setattr(compat, "megatron_version", lambda: version)
    monkeypatch.setattr(compat, "has_training", lambda: there)
    with pytest.raises(UserError, match=rf"{re.escape(version)} is installed, .*need >= 0\.17"):
        compat.check_training_version()


@pytest.mark.parametrize(
    ("feature", "version", "expected"),
    [
        ("config_container", "0.17.1", False),
        ("config_container", "0.18.0rc1", True),
        ("config_container", "0.18.2+abc", True),
        ("model_builders", "0.18.2", False),
        ("model_builders", "0.19.2", True),
        ("model_builders", "1.0", True),
    ],
)
def test_features_by_release(feature: str, version: str, expected: bool) -> None:
    assert compat.has(feature, version) is expected


def test_the_tested_releases_are_supported_and_end_with_the_pinned_one() -> None:
    root = Path(__file__).resolve().parents[1]
    assert f"megatron-core=={compat.TESTED[-1]}\n" in (root / "constraints.txt").read_text()
    low, high = compat.SUPPORTED
    assert compat.TESTED[0] == low
    # pyproject.toml says the upper bound without its last number.
    assert f'>={low},<{high.removesuffix(".0")}"' in (root / "pyproject.toml").read_text()
