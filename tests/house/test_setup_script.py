"""scripts/setup.sh: the interpreter it takes; that it is idempotent, resumable and clear on errors.

No package is installed here: the interpreters are small shell scripts that answer as Python would.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash") or "/bin/bash"
TOOLS = (
    "cat",
    "cut",
    "du",
    "flock",
    "grep",
    "mv",
    "readlink",
    "rm",
    "sha256sum",
    "shasum",
    "sleep",
)

INPUTS = ("pyproject.toml", "setup.py", "constraints.txt", "megatron_dyt/ops/cpu_kernels.c")

# Answers the script's three questions (version, ensurepip, pip and version) and the commands
# `-m venv`, `-m pip` and `setup.py`. `-m pip` adds its arguments to $PIP_LOG, and fails if $PIP_FAILS is set;
# `setup.py` compiles the kernels unless $CC_FAILS is set.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-c import ensurepip, venv") exit {ensurepip_rc} ;;
  "-c import pip"*) exit 0 ;;
  "-c "*) echo "{version} $0" ;;
  "-m venv")
    /bin/rm -rf "$4"; /bin/mkdir -p "$4/bin"
    /bin/ln -s "$0" "$4/bin/python"; echo "VIRTUAL_ENV=$4" > "$4/bin/activate"
    echo "venv" >> "$PIP_LOG" ;;
  "-m pip")
    echo "$@" >> "$PIP_LOG"; /bin/sleep "${{PIP_SECONDS:-0}}"
    [ -z "${{PIP_FAILS:-}}" ] || exit 1 ;;
  "setup.py -q") [ -n "${{CC_FAILS:-}}" ] || : > megatron_dyt/ops/cpu_kernels.so ;;
  "-V "*) echo "Python {version}" ;;
esac
"""
FAILING_SHIM = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"


def write_executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_python(path: Path, version: str, ensurepip_rc: int = 0) -> Path:
    return write_executable(path, FAKE_PYTHON.format(version=version, ensurepip_rc=ensurepip_rc))


class Checkout:
    """A copy of what setup.sh reads, on a machine whose PATH is ours."""

    def __init__(self, place: Path) -> None:
        self.root = place / "checkout"
        self.bin = place / "bin"
        self.pyenv = place / "pyenv"
        self.pip_log = place / "pip.log"
        tools = place / "tools"
        for folder in (self.bin, tools):
            folder.mkdir(parents=True)
        for name in (*INPUTS, "scripts/setup.sh"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, self.root / name)
        for tool in TOOLS:
            if found := shutil.which(tool):
                (tools / tool).symlink_to(found)
        self.env = {
            "PATH": f"{self.bin}{os.pathsep}{tools}",
            "HOME": str(place),
            "PYENV_ROOT": str(self.pyenv),
            "PIP_LOG": str(self.pip_log),
        }

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BASH, str(self.root / "scripts/setup.sh"), *arguments],
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def take_log(self) -> list[str]:
        """What the fake interpreter was asked to do since the last call."""
        lines = self.pip_log.read_text().splitlines() if self.pip_log.exists() else []
        self.pip_log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


# ---- the interpreter ----


def test_interpreter_on_path_is_taken(checkout: Checkout) -> None:
    wanted = fake_python(checkout.bin / "python3.12", "3.12.7")
    result = checkout.run("--find-python")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{wanted}\n", "")


def test_shim_that_does_not_run_is_skipped(checkout: Checkout) -> None:
    write_executable(checkout.bin / "python3.12", FAILING_SHIM)
    wanted = fake_python(checkout.bin / "python3.13", "3.13.1")
    assert checkout.run("--find-python").stdout == f"{wanted}\n"


def test_second_one_of_the_same_name_on_path_is_tried(checkout: Checkout, tmp_path: Path) -> None:
    write_executable(checkout.bin / "python3.12", FAILING_SHIM)
    wanted = fake_python(tmp_path / "later" / "python3.12", "3.12.3")
    path = checkout.env["PATH"] + os.pathsep + str(tmp_path / "later")
    assert checkout.run("--find-python", PATH=path).stdout == f"{wanted}\n"


def test_pyenv_versions_are_found_without_their_shims(checkout: Checkout) -> None:
    write_executable(checkout.bin / "python3.12", FAILING_SHIM)
    fake_python(checkout.bin / "python3", "3.11.7")
    wanted = fake_python(checkout.pyenv / "versions/3.12.1/bin/python", "3.12.1")
    assert checkout.run("--find-python").stdout == f"{wanted}\n"


def test_uv_is_asked_last_and_installs_when_it_has_none(checkout: Checkout, tmp_path: Path) -> None:
    wanted = fake_python(tmp_path / "uv-python", "3.12.9")
    installed = tmp_path / "uv-installed"
    write_executable(
        checkout.bin / "uv",
        "#!/bin/sh\n"
        f'if [ "$2" = install ]; then : > {installed}; exit 0; fi\n'
        f"[ -e {installed} ] && echo {wanted}\n",
    )
    assert checkout.run("--find-python").stdout == f"{wanted}\n"
    assert installed.exists()


@pytest.mark.parametrize("version", ["3.11.9", "3.14.0", "2.7.18"])
def test_requested_interpreter_of_another_version_is_an_error(
    checkout: Checkout, version: str, tmp_path: Path
) -> None:
    fake_python(checkout.bin / "python3.12", "3.12.7")  # must not be fallen back to
    other = fake_python(tmp_path / "other", version)
    result = checkout.run("--find-python", PYTHON=str(other))
    assert (result.returncode, result.stdout) == (1, "")
    assert f"PYTHON={other} is Python {version}; Python >= 3.12, < 3.14 is needed" in result.stderr


def test_requested_interpreter_that_does_not_exist_is_an_error(checkout: Checkout) -> None:
    result = checkout.run("--find-python", PYTHON="/nowhere/python3.12")
    assert result.returncode == 1
    assert "PYTHON=/nowhere/python3.12 does not run" in result.stderr


def test_interpreter_without_ensurepip_is_named(checkout: Checkout) -> None:
    fake_python(checkout.bin / "python3.12", "3.12.7", ensurepip_rc=1)
    result = checkout.run("--find-python")
    assert result.returncode == 1
    assert "without the venv and ensurepip modules" in result.stderr
    assert "Debian: install python3.12-venv" in result.stderr


def test_nothing_found_says_what_was_tried_and_what_to_do(checkout: Checkout) -> None:
    write_executable(checkout.bin / "python3.12", FAILING_SHIM)
    old = fake_python(checkout.bin / "python3", "3.11.7")
    result = checkout.run("--find-python")
    assert (result.returncode, result.stdout) == (1, "")
    for part in (
        "no usable Python >= 3.12, < 3.14 found",
        f"{checkout.bin / 'python3.12'} does not run",
        f"{old} is Python 3.11.7",
        f"pyenv: no 3.12 or 3.13 in {checkout.pyenv / 'versions'}",
        "uv is not installed",
        "PYTHON=/path/to/python3.12 make setup",
    ):
        assert part in result.stderr


def test_unknown_argument_is_an_error(checkout: Checkout) -> None:
    result = checkout.run("--find-pyton")
    assert result.returncode == 1
    assert "unknown argument '--find-pyton'; allowed: --find-python" in result.stderr


# ---- the environment ----


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    """A checkout that has been set up once."""
    fake_python(checkout.bin / "python3.12", "3.12.7")
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    log = checkout.take_log()
    assert log[0] == "venv"
    assert log[-1].endswith(f"--no-build-isolation -e {checkout.root}[train,eval,hf,dev]")
    assert all(f"-c {checkout.root}/constraints.txt" in line for line in log[1:])
    return checkout


def test_second_run_does_nothing(ready: Checkout) -> None:
    result = ready.run()
    assert (result.returncode, result.stdout, ready.take_log()) == (0, "", [])


@pytest.mark.parametrize("name", INPUTS)
def test_changed_input_installs_again_into_the_same_venv(ready: Checkout, name: str) -> None:
    with (ready.root / name).open("a") as file:
        file.write("# changed\n")
    assert ready.run().returncode == 0
    log = ready.take_log()
    assert log
    assert "venv" not in log


def test_without_cpu_kernels_it_says_so_and_tries_again_without_installing(checkout: Checkout) -> None:
    fake_python(checkout.bin / "python3.12", "3.12.7")
    for _ in range(2):
        result = checkout.run(CC_FAILS="yes")
        assert result.returncode == 0
        assert "warning: the kernels for CPUs could not be compiled" in result.stdout
        assert "install a C compiler with OpenMP (gcc), and 'make setup' tries again" in result.stdout
    checkout.take_log()
    for _ in range(2):
        assert checkout.run().stdout == ""
        assert (checkout.root / "megatron_dyt/ops/cpu_kernels.so").exists()
    assert checkout.take_log() == []


def test_failed_install_leaves_no_stamp_and_the_next_run_continues(ready: Checkout) -> None:
    (ready.root / "setup.py").write_text("# changed\n")
    failed = ready.run(PIP_FAILS="yes")
    assert failed.returncode == 1
    assert "run 'make setup' again: it continues where it stopped" in failed.stderr
    ready.take_log()
    assert ready.run().returncode == 0
    log = ready.take_log()
    assert log
    assert "venv" not in log


def test_package_cut_off_while_being_installed_is_dropped(ready: Checkout) -> None:
    packages = ready.root / ".venv/lib/python3.12/site-packages"
    whole, half = packages / "whole-1.0.dist-info", packages / "half-1.0.dist-info"
    for info in (whole, half):
        info.mkdir(parents=True)
        (info / "METADATA").touch()
    (whole / "RECORD").touch()
    (ready.root / "setup.py").write_text("# changed\n")
    assert ready.run().returncode == 0
    assert whole.exists()
    assert not half.exists()


def test_other_requested_interpreter_makes_the_venv_anew(ready: Checkout, tmp_path: Path) -> None:
    other = fake_python(tmp_path / "other", "3.13.1")
    assert ready.run(PYTHON=str(other)).returncode == 0
    assert ready.take_log()[0] == "venv"
    assert ready.run(PYTHON=str(other)).returncode == 0
    assert ready.take_log() == []


def test_venv_of_a_moved_checkout_is_made_anew(ready: Checkout, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    ready.root.rename(moved)
    ready.root = moved
    assert ready.run().returncode == 0
    assert ready.take_log()[0] == "venv"


def test_index_for_torch_is_used_for_torch_alone(checkout: Checkout) -> None:
    fake_python(checkout.bin / "python3.12", "3.12.7")
    assert checkout.run(TORCH_INDEX_URL="https://example.org/cpu").returncode == 0
    using = [line for line in checkout.take_log() if "https://example.org/cpu" in line]
    assert len(using) == 1
    assert "--no-deps" in using[0]
    assert using[0].split()[-1].startswith("torch==")


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
def test_two_at_once_set_up_once(checkout: Checkout) -> None:
    fake_python(checkout.bin / "python3.12", "3.12.7")
    both = [checkout.start(PIP_SECONDS="1") for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert checkout.take_log().count("venv") == 1
    assert sum("waiting for it" in output for output in outputs) == 1
