import importlib
import re

import pytest

import megatron_dyt
from megatron_dyt.cpu import replacements
from megatron_dyt.errors import UserError
from megatron_dyt.mcore import register as module
from megatron_dyt.patching import Replacement


def current(seam: Replacement) -> object:
    owner: object = importlib.import_module(seam.module)
    for part in seam.attribute.split("."):
        owner = vars(owner)[part] if isinstance(owner, type) else getattr(owner, part)
    return owner


def own_seams() -> list[Replacement]:
    """Those that the CPU runtime of these tests does not replace as well."""
    shared = {(row.module, row.attribute) for row in replacements.rows()}
    return [seam for seam in module.seams() if (seam.module, seam.attribute) not in shared]


@pytest.fixture
def unregistered(world: None) -> None:
    module.unregister()
    yield
    megatron_dyt.register()


def test_every_seam_is_replaced_once_and_put_back(unregistered: None) -> None:
    before = [current(seam) for seam in own_seams()]
    megatron_dyt.register()
    assert megatron_dyt.is_registered()
    after = [current(seam) for seam in own_seams()]
    assert all(new is not old for new, old in zip(after, before, strict=True))
    megatron_dyt.register()
    assert [current(seam) for seam in own_seams()] == after
    module.unregister()
    assert not megatron_dyt.is_registered()
    assert [current(seam) for seam in own_seams()] == before


def test_a_missing_seam_is_named_and_nothing_is_left_half_done(
    unregistered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [current(seam) for seam in own_seams()]
    missing = Replacement("megatron.core.dist_checkpointing", "lod", lambda original: original)
    monkeypatch.setattr(module, "seams", lambda: (*module.CORE, missing))
    named = re.escape(f"megatron-core {module.compat.megatron_version()} lacks a place ")
    with pytest.raises(UserError, match=rf"{named}.*megatron\.core\.dist_checkpointing\.lod"):
        megatron_dyt.register()
    monkeypatch.undo()
    assert not megatron_dyt.is_registered()
    assert [current(seam) for seam in own_seams()] == before


@pytest.mark.parametrize("version", ["0.12.0", "0.20.0rc0"])
def test_an_unsupported_version_is_refused(
    unregistered: None, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(module.compat, "megatron_version", lambda: version)
    with pytest.raises(UserError, match=rf"megatron-core {version} is not supported: .*>= 0\.16\.1, < 0\.20"):
        megatron_dyt.register()
    assert not megatron_dyt.is_registered()


def test_without_the_training_loop_only_the_core_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.compat, "has_training", lambda: False)
    monkeypatch.setattr(module.compat, "has_transformer_engine", lambda: False)
    assert not [seam for seam in module.seams() if seam.module.startswith("megatron.training")]
    assert not set(module.TRANSFORMER_ENGINE) & set(module.seams())
    monkeypatch.setattr(module.compat, "has_transformer_engine", lambda: True)
    assert {seam.attribute for seam in module.seams()} >= {"TENorm.__new__"}


@pytest.mark.parametrize("version", ["0.17.1", "0.18.2"])
def test_an_older_training_loop_is_touched_where_it_binds_the_names(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """0.17 parses its arguments in `initialize`; that module is imported before `arguments` is changed."""
    monkeypatch.setattr(module.compat, "has_training", lambda: True)
    monkeypatch.setattr(module.compat, "has_transformer_engine", lambda: False)
    monkeypatch.setattr(module.compat, "megatron_version", lambda: version)
    validating = [seam.module for seam in module.seams() if seam.attribute == "validate_args"]
    first = ["megatron.training.initialize"] if version == "0.17.1" else []
    assert validating == [*first, "megatron.training.arguments"]
