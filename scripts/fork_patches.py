"""The patches for forks of Megatron-LM: check them, and make the one of another release.

    python scripts/fork_patches.py check [MEGATRON_LM]         MEGATRON_LM: a clone that has the release tags
    python scripts/fork_patches.py write MEGATRON_LM TAG...    writes patches/TAG.patch

A patch holds our own lines and nothing of Megatron's: insertions without context. Such a patch says where
a line goes by number only, and git would put it anywhere; so it names the blob (git's hash of a file's
content) that it belongs to, before and after, and `check` compares both with the release.
"""

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PATCHES = Path(__file__).resolve().parents[1] / "patches"


class PatchError(Exception):
    """A patch, or a release, is not what it should be; the message says which and what to do."""


@dataclass(frozen=True)
class Insertion:
    """Lines that go into the function `function` of `file`, below its docstring."""

    file: str
    function: str
    lines: str


INSERTIONS = (
    Insertion(
        "megatron/core/transformer/transformer_config.py",
        "class TransformerConfig.def __post_init__",
        """\
        # megatron_dyt: for models that are built without a command line (megatron.core, Megatron Bridge).
        if self.normalization == "DyT":
            import megatron_dyt

            if not megatron_dyt.is_registered():
                megatron_dyt.register()
                return TransformerConfig.__post_init__(self)

""",
    ),
    Insertion(
        "megatron/training/arguments.py",
        "def parse_args",
        """\
    # megatron_dyt: --normalization DyT and the --dyt-* flags, where that package is installed.
    import importlib.util
    import sys

    if importlib.util.find_spec("megatron_dyt") is not None:
        import megatron_dyt

        megatron_dyt.register()
    elif {"DyT", "--normalization=DyT"} & set(sys.argv):
        raise ImportError("--normalization DyT was given, but the package megatron_dyt is not installed")

""",
    ),
)


@dataclass(frozen=True)
class Hunk:
    """Lines that a patch inserts below line `after` of the old file, as lines from `start` of the new one."""

    after: int
    start: int
    lines: list[str]


@dataclass(frozen=True)
class FilePatch:
    """What a patch does to one file, and the blobs before and after."""

    path: str
    old_blob: str
    new_blob: str
    hunks: list[Hunk]


_FILE = re.compile(r"diff --git a/(?P<path>\S+) b/(?P=path)")
_INDEX = re.compile(r"index (?P<old>[0-9a-f]{40})\.\.(?P<new>[0-9a-f]{40}) 100644")
_HUNK = re.compile(r"@@ -(?P<after>\d+),0 \+(?P<start>\d+)(?:,(?P<count>\d+))? @@")


def parse(text: str) -> list[FilePatch]:
    """The files of a patch.

    Raises:
        PatchError: a line is anything but an insertion without context, or a blob is not named in full.
    """
    lines = text.splitlines()
    position = 0
    files = []

    def take(pattern: re.Pattern[str], what: str) -> re.Match[str]:
        nonlocal position
        line = lines[position] if position < len(lines) else ""
        match = pattern.fullmatch(line)
        if match is None:
            raise PatchError(f"line {position + 1} is {line!r}, and not {what}")
        position += 1
        return match

    while position < len(lines):
        path = take(_FILE, "the start of a file, 'diff --git a/PATH b/PATH'")["path"]
        index = take(_INDEX, "both blobs of the file in full, 'index OLD..NEW 100644'")
        take(re.compile(re.escape(f"--- a/{path}")), f"'--- a/{path}'")
        take(re.compile(re.escape(f"+++ b/{path}")), f"'+++ b/{path}'")
        hunks: list[Hunk] = []
        while not hunks or (position < len(lines) and lines[position].startswith("@@")):
            head = take(_HUNK, "a hunk that only inserts and quotes nothing, '@@ -N,0 +N,COUNT @@'")
            added = [take(re.compile(r"\+.*"), "an inserted line")[0] for _ in range(int(head["count"] or 1))]
            hunks.append(Hunk(int(head["after"]), int(head["start"]), [line[1:] for line in added]))
        files.append(FilePatch(path, index["old"], index["new"], hunks))
    return files


def check_own_lines(files: list[FilePatch]) -> None:
    """Raise PatchError unless the patch inserts exactly `INSERTIONS`, numbered consistently."""
    expected = {each.file: [each.lines.splitlines()] for each in INSERTIONS}
    found = {each.path: [hunk.lines for hunk in each.hunks] for each in files}
    if found != expected or len(files) != len(expected):
        raise PatchError(
            "it inserts other lines than scripts/fork_patches.py holds (INSERTIONS); make it again with write"
        )
    for file in files:
        shift = 1
        for hunk in file.hunks:
            if hunk.start != hunk.after + shift:
                raise PatchError(f"{file.path}: line {hunk.after} old does not become line {hunk.start} new")
            shift += len(hunk.lines)


def check_against(files: list[FilePatch], clone: Path, tag: str, patch: Path) -> None:
    """Raise PatchError unless the patch belongs to the release, applies to it, and leaves valid Python."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        _git(tree, "init", "--quiet")  # inside another repository git would look there
        for file in files:
            blob = _git(clone, "rev-parse", f"{tag}:{file.path}").strip()
            if blob != file.old_blob:
                raise PatchError(f"{file.path} of {tag} is blob {blob}; the patch is for {file.old_blob}")
            _write(tree / file.path, _git(clone, "cat-file", "blob", blob))
        apply = ("apply", "--unidiff-zero", "--whitespace=error")
        _git(tree, *apply, "--check", str(patch))
        _git(tree, *apply, str(patch))
        for file in files:
            blob = _git(tree, "hash-object", file.path).strip()
            if blob != file.new_blob:
                raise PatchError(f"{file.path} becomes blob {blob}; the patch says {file.new_blob}")
            compile((tree / file.path).read_text(encoding="utf-8"), file.path, "exec")


def make(clone: Path, tag: str) -> str:
    """The text of the patch for a release."""
    parts = []
    for insertion in INSERTIONS:
        path = insertion.file
        old = _git(clone, "show", f"{tag}:{path}")
        new, after = insert(old, insertion)
        added = insertion.lines.splitlines(keepends=True)
        parts += [
            f"diff --git a/{path} b/{path}\n",
            f"index {_blob(clone, old)}..{_blob(clone, new)} 100644\n",
            f"--- a/{path}\n+++ b/{path}\n@@ -{after},0 +{after + 1},{len(added)} @@\n",
            *(f"+{line}" for line in added),
        ]
    return "".join(parts)


def insert(source: str, insertion: Insertion) -> tuple[str, int]:
    """A file's text with the lines in it, and the number of the line below which they are."""
    after = _last_line_of_docstring(source, insertion.function)
    lines = source.splitlines(keepends=True)
    return "".join([*lines[:after], insertion.lines, *lines[after:]]), after


def _last_line_of_docstring(source: str, function: str) -> int:
    """Its number, for `function` named as "def f" or "class C.def m"."""
    scope: ast.AST = ast.parse(source)
    for part in function.split("."):
        kind, name = part.split()
        wanted = ast.ClassDef if kind == "class" else ast.FunctionDef
        inside = [node for node in ast.iter_child_nodes(scope) if isinstance(node, wanted)]
        named = [node for node in inside if node.name == name]
        if len(named) != 1:
            raise PatchError(f"there are {len(named)} of {part!r}; INSERTIONS must say another place")
        scope = named[0]
    assert isinstance(scope, ast.FunctionDef)
    first = scope.body[0]
    if ast.get_docstring(scope) is None or first.end_lineno is None:
        raise PatchError(f"{function} has no docstring any more; INSERTIONS must say another place")
    return first.end_lineno


def _blob(clone: Path, content: str) -> str:
    return _git(clone, "hash-object", "--stdin", stdin=content).strip()


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", newline="")


def _git(folder: Path, *arguments: str, stdin: str | None = None) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise PatchError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def tags_of(clone: Path) -> set[str]:
    """The tags of a clone. Raises PatchError when it is not a git clone."""
    return set(_git(clone, "tag").split())


def check(clone: Path | None) -> list[str]:
    """One line for each patch that is right; PatchError names the first that is not."""
    patches = sorted(PATCHES.glob("*.patch"))
    if not patches:
        raise PatchError(f"{PATCHES} holds no patch")
    lines = []
    tags = set() if clone is None else tags_of(clone)
    for patch in patches:
        try:
            files = parse(patch.read_text(encoding="utf-8"))
            check_own_lines(files)
            if clone is not None and patch.stem not in tags:
                raise PatchError(f"{clone} has no tag {patch.stem}; fetch it with: git fetch --tags")
            if clone is not None:
                check_against(files, clone, patch.stem, patch)
        except PatchError as error:
            raise PatchError(f"{patch.name}: {error}") from error
        lines.append(f"{patch.name}: " + ("its form" if clone is None else "applies to its release") + " ok")
    return lines


def write(clone: Path, tag: str) -> Path:
    """Write the patch of a release into patches/, and check it."""
    if tag not in tags_of(clone):
        raise PatchError(f"{clone} has no tag {tag}")
    path = PATCHES / f"{tag}.patch"
    new = path.with_suffix(".new")
    new.write_text(make(clone, tag), encoding="utf-8")
    try:
        check_against(parse(new.read_text(encoding="utf-8")), clone, tag, new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check")
    checking.add_argument("clone", metavar="MEGATRON_LM", nargs="?", default="")
    writing = commands.add_parser("write")
    writing.add_argument("clone", metavar="MEGATRON_LM")
    writing.add_argument("tags", metavar="TAG", nargs="+")
    options = parser.parse_args()
    clone = Path(options.clone).resolve() if options.clone else None
    try:
        if clone is not None and options.command == "write":
            for tag in options.tags:
                print(write(clone, tag))
        else:
            print("\n".join(check(clone)))
    except PatchError as error:
        print(f"fork_patches: error: {error}", file=sys.stderr)
        return 2
    if clone is None:
        print("skipped: whether they apply; MEGATRON_LM=/path/to/a/clone/with/the/release/tags checks that")
    return 0


if __name__ == "__main__":
    sys.exit(main())
