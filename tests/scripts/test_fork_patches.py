"""The patches for forks: our own lines and nothing else, at the right place, doing what they should."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import fork_patches
from scripts.fork_patches import INSERTIONS, PATCHES, PatchError

REPOSITORY = Path(__file__).resolve().parents[2]
RELEASES = ("core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_v0.19.0")
CONFIG, ARGUMENTS = INSERTIONS

TRANSFORMER_CONFIG = '''
class TransformerConfig:
    """A config."""

    def __post_init__(self):
        """Checks it."""
        self.checked = True


class MLATransformerConfig(TransformerConfig):
    def __post_init__(self):
        super().__post_init__()
'''
PARSER = '''
def parse_args(extra=None):
    """Parse all arguments.

    In two lines."""
    return extra
'''


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with one release, and an empty folder for its patches."""
    clone = tmp_path / "clone"
    for file, text in ((CONFIG.file, TRANSFORMER_CONFIG), (ARGUMENTS.file, PARSER)):
        (clone / file).parent.mkdir(parents=True)
        (clone / file).write_text(text)
    git(tmp_path, "init", "--quiet", str(clone))
    for key, value in (("user.name", "test"), ("user.email", "test@example.org")):
        git(clone, "config", key, value)
    git(clone, "add", ".")
    git(clone, "commit", "--quiet", "--message", "release")
    git(clone, "tag", "core_v9.9.9")
    monkeypatch.setattr(fork_patches, "PATCHES", tmp_path)
    return clone


def test_every_release_has_a_patch_of_our_own_lines() -> None:
    assert tuple(sorted(path.stem for path in PATCHES.glob("*.patch"))) == RELEASES
    assert len(fork_patches.check(None)) == len(RELEASES)


def replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (replaced("@@\n+", "@@\n-import os\n+"), "not an inserted line"),
        (replaced("@@\n+", "@@\n import os\n+"), "not an inserted line"),
        (replaced(" @@\n", " @@ def parse_args(\n"), "a hunk that only inserts and quotes nothing"),
        (replaced(",0 +", ",1 +"), "a hunk that only inserts"),
        (replaced("index ", "index 0"), "both blobs of the file in full"),
        (replaced("+++ b/megatron/core", "+++ b/megatron/other"), "not '\\+\\+\\+ b/megatron/core"),
        (replaced("import megatron_dyt", "import megatron_dyt  # x"), "inserts other lines"),
        (replaced("8 @@\n", "7 @@\n"), "not the start of a file"),
        (lambda text: text[: text.index("diff --git", 1)], "inserts other lines"),
        (lambda text: text + text, "inserts other lines"),
    ],
)
def test_a_patch_of_another_form_is_refused(spoil: Callable[[str], str], message: str) -> None:
    text = (PATCHES / "core_v0.19.0.patch").read_text()
    spoilt = spoil(text)
    assert spoilt != text
    with pytest.raises(PatchError, match=message):
        fork_patches.check_own_lines(fork_patches.parse(spoilt))


def test_lines_that_are_numbered_wrongly_are_refused() -> None:
    first, *rest = fork_patches.parse((PATCHES / "core_v0.19.0.patch").read_text())
    first.hunks[0] = fork_patches.Hunk(3, 3, first.hunks[0].lines)
    with pytest.raises(PatchError, match="line 3 old does not become line 3 new"):
        fork_patches.check_own_lines([first, *rest])


def test_a_written_patch_applies_to_its_release(release: Path) -> None:
    patch = fork_patches.write(release, "core_v9.9.9")
    assert fork_patches.check(release) == ["core_v9.9.9.patch: applies to its release ok"]
    git(release, "apply", "--unidiff-zero", str(patch))
    assert (release / ARGUMENTS.file).read_text() == PARSER.replace(
        '    In two lines."""\n', f'    In two lines."""\n{ARGUMENTS.lines}'
    )
    git(release, "apply", "--unidiff-zero", "--reverse", str(patch))
    assert (release / ARGUMENTS.file).read_text() == PARSER


def test_a_patch_of_another_release_is_refused(release: Path) -> None:
    """Git itself would apply it, at the wrong line."""
    patch = fork_patches.write(release, "core_v9.9.9")
    (release / ARGUMENTS.file).write_text("# one line more\n" + PARSER)
    git(release, "commit", "--quiet", "--all", "--message", "another release")
    git(release, "tag", "--force", "core_v9.9.9")
    git(release, "apply", "--unidiff-zero", "--check", str(patch))
    with pytest.raises(PatchError, match=r"core_v9.9.9.patch: .*arguments.py of core_v9.9.9 is blob"):
        fork_patches.check(release)


def test_a_result_other_than_pinned_is_refused(release: Path) -> None:
    patch = fork_patches.write(release, "core_v9.9.9")
    head = f"@@ -{PARSER.count(chr(10)) - 1},0"
    text = patch.read_text()
    patch.write_text(text.replace(head, "@@ -0,0").replace("+6,11 @@", "+1,11 @@"))
    assert patch.read_text() != text
    with pytest.raises(PatchError, match="the patch says"):
        fork_patches.check(release)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def parse(extra=None):\n    pass\n", "there are 0 of 'def parse_args'"),
        ("def parse_args():\n    pass\n", "has no docstring"),
    ],
)
def test_a_place_that_has_gone_is_an_error(source: str, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        fork_patches.insert(source, ARGUMENTS)


def test_not_a_clone_and_a_missing_tag(release: Path, tmp_path: Path) -> None:
    fork_patches.write(release, "core_v9.9.9")
    with pytest.raises(PatchError, match="no tag core_v1"):
        fork_patches.write(release, "core_v1")
    git(release, "tag", "--delete", "core_v9.9.9")
    with pytest.raises(PatchError, match=r"has no tag core_v9\.9\.9; fetch it"):
        fork_patches.check(release)
    with pytest.raises(PatchError, match="not a git repository"):
        fork_patches.check(tmp_path)


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        (["--normalization", "RMSNorm"], False),
        (["--normalization", "DyT"], True),
        (["--normalization=DyT"], True),
    ],
)
def test_without_the_package_only_dyt_is_an_error(
    argv: list[str], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    lines = textwrap.dedent(ARGUMENTS.lines)
    if asked:
        with pytest.raises(ImportError, match="the package megatron_dyt is not installed"):
            exec(lines, {})
    else:
        exec(lines, {})


# Both ways into DyT in a patched Megatron: a config without a command line, and the command line.
BOTH_WAYS = """
import sys
from megatron_dyt import cpu
cpu.enable()
import megatron_dyt
from megatron_dyt.mcore.register import unregister
from megatron.core.transformer import TransformerConfig
from megatron.training.arguments import parse_args
import megatron.core
assert megatron.core.__file__.startswith(sys.argv[1]), megatron.core.__file__

size = dict(num_layers=1, hidden_size=4096, num_attention_heads=32)
TransformerConfig(**size, normalization="RMSNorm")
assert not megatron_dyt.is_registered()
config = TransformerConfig(**size, normalization="DyT")
assert megatron_dyt.is_registered()
assert (config.dyt.name, config.dyt.alpha_ffn) == ("auto", 1.0)
again = TransformerConfig(**size, normalization="DyT")
assert again.dyt == config.dyt and vars(again).keys() == vars(config).keys()

unregister()
sys.argv = ["train.py", "--normalization", "DyT", "--dyt-preset", "unit", "--micro-batch-size", "1"]
assert parse_args().dyt_preset == "unit"
print("both ways")
"""


def test_a_patched_megatron_takes_dyt_without_our_entry_points(tmp_path: Path) -> None:
    """The installed Megatron by links, with the inserted lines in the two files."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parents[1]
    if not (installed / "training").is_dir():
        pytest.skip("this megatron-core has no megatron.training")
    for insertion in INSERTIONS:
        patch_by_links(installed.parent, tmp_path, Path(insertion.file))
        text = (installed.parent / insertion.file).read_text()
        target = tmp_path / insertion.file
        target.unlink()
        target.write_text(fork_patches.insert(text, insertion)[0])
    done = subprocess.run(
        [sys.executable, "-c", BOTH_WAYS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["both ways"]), done.stderr[-2000:]


def patch_by_links(source: Path, target: Path, file: Path) -> None:
    """Make the folders above `file` in `target`, with links to everything else that is beside it."""
    for folder in reversed(file.parents[:-1]):
        if (target / folder).is_symlink():
            (target / folder).unlink()
        (target / folder).mkdir(exist_ok=True)
        for entry in (source / folder).iterdir():
            if not os.path.lexists(target / folder / entry.name):
                (target / folder / entry.name).symlink_to(entry)
