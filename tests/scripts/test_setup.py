"""scripts/setup.sh and scripts/uv.sh: the interpreter they take, what they pass on, and errors.

uv and the interpreters are real; uv's `pip install` is not: it writes its arguments into a file.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash") or "/bin/bash"
UV = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
PYTHON = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
TOOLS = ("cat", "chmod", "dirname", "flock", "grep", "mkdir", "mv", "readlink", "rm", "sha256sum", "sleep")
KERNELS = ("megatron_dyt/ops/cpu_kernels", "megatron_dyt/cpu/layer_kernels")
INPUTS = ("pyproject.toml", "constraints.txt", *(f"{kernels}.c" for kernels in KERNELS))

# Compiles nothing: the kernels are there afterwards unless CC_FAILS is set.
SETUP_PY = f"""import os, pathlib
if not os.environ.get("CC_FAILS"):
    for kernels in {KERNELS}:
        pathlib.Path(kernels + ".so").touch()
"""
# uv, but for `pip install`, which fails with UV_FAILS, and for `venv` with PIP_LOG: that environment's python
# writes down the calls of pip.
FAKE_UV = r"""#!/bin/sh
if [ "$1 $2" = "pip install" ]; then
  echo "$UV_DEFAULT_INDEX: $@" >> "{log}"
  sleep "${{INSTALL_SECONDS:-0}}"
  exit ${{UV_FAILS:-0}}
fi
"{uv}" "$@" || exit
if [ "$1" = venv ]; then
  echo venv >> "{log}"
  if [ -n "${{PIP_LOG:-}}" ]; then
    for place; do :; done
    rm "$place/bin/python"
    cat > "$place/bin/python" <<'END'
#!/bin/sh
case "$1 $2" in "-m "*) echo "$@" >> "$PIP_LOG"; exit ${{PIP_FAILS:-0}};; esac
exec {python} "$@"
END
    chmod +x "$place/bin/python"
  fi
fi
"""
SHIM = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"

pytestmark = pytest.mark.skipif(UV is None, reason="needs uv, which `make setup` installs")


def write_executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Checkout:
    """A copy of what the scripts read, on a machine whose PATH is ours; `bin` comes first on it."""

    def __init__(self, place: Path) -> None:
        self.root, self.bin, self.pyenv = place / "checkout", place / "bin", place / "pyenv"
        self.log = place / "uv.log"
        tools = place / "tools"
        for folder in (self.bin, tools):
            folder.mkdir(parents=True)
        for name in (*INPUTS, "scripts/setup.sh", "scripts/uv.sh"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, self.root / name)
        (self.root / "setup.py").write_text(SETUP_PY)
        for tool in TOOLS:
            if found := shutil.which(tool):
                (tools / tool).symlink_to(found)
        self.fake_uv = FAKE_UV.format(uv=UV, log=self.log, python=PYTHON)
        write_executable(self.bin / "uv", self.fake_uv)
        self.env = {
            "PATH": f"{self.bin}{os.pathsep}{tools}",
            "HOME": str(place),
            "PYENV_ROOT": str(self.pyenv),
            "UV_PYTHON_INSTALL_DIR": str(place / "uv-python"),
            "UV_CACHE_DIR": str(place / "uv-cache"),
            "UV_OFFLINE": "1",
        }

    def put_python(self, path: Path) -> None:
        """An interpreter that runs, at `path`."""
        write_executable(path, f'#!/bin/sh\nexec {PYTHON} "$@"\n')

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
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def take_log(self) -> list[str]:
        """What uv was asked to make or install since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    """A checkout that has been set up once."""
    checkout.put_python(checkout.bin / f"python{VERSION}")
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    log = checkout.take_log()
    assert log[0] == "venv"
    what = f"-e {checkout.root}[train,eval,hf,report,slurm,docs,dev]"
    assert log[-1].endswith(f"--no-build-isolation --no-binary multiprocess {what}")
    assert all(f"-c {checkout.root}/constraints.txt" in line for line in log[1:])
    return checkout


def test_second_run_does_nothing(ready: Checkout) -> None:
    result = ready.run()
    assert (result.returncode, result.stdout, result.stderr, ready.take_log()) == (0, "", "", [])


def test_interpreter_of_pyenv_is_taken_where_its_shim_does_not_run(checkout: Checkout) -> None:
    write_executable(checkout.bin / f"python{VERSION}", SHIM)
    checkout.put_python(checkout.pyenv / f"versions/{VERSION}.1/bin/python{VERSION}")
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    assert f"making .venv with {checkout.pyenv}" in result.stdout or f"with {PYTHON}" in result.stdout


def test_nothing_found_says_what_was_tried_and_what_to_do(checkout: Checkout) -> None:
    write_executable(checkout.bin / "python3.12", SHIM)
    result = checkout.run()
    assert result.returncode == 1
    for part in (
        "no usable Python >= 3.12, < 3.14 found",
        "python3.12 and python3.13 on PATH",
        str(checkout.pyenv / "versions"),
        "a download by uv",
        "PYTHON=/path/to/python3.12 make setup",
    ):
        assert part in result.stderr


@pytest.mark.parametrize(
    ("text", "reason"),
    [(SHIM, "does not run"), ("#!/bin/sh\necho 3.11.9 /usr/bin/python3\n", "is Python 3.11.9")],
)
def test_requested_interpreter_that_is_unfit_is_an_error(ready: Checkout, text: str, reason: str) -> None:
    other = write_executable(ready.root / "other", text)
    result = ready.run(PYTHON=str(other))
    assert (result.returncode, result.stdout) == (1, "")
    assert f"PYTHON={other} {reason}; Python >= 3.12, < 3.14 is needed" in result.stderr


def test_unknown_argument_is_an_error(checkout: Checkout) -> None:
    result = checkout.run("--fast")
    assert result.returncode == 1
    assert "unknown argument '--fast'" in result.stderr


@pytest.mark.parametrize("name", [*INPUTS, "setup.py"])
def test_changed_input_installs_again_into_the_same_venv(ready: Checkout, name: str) -> None:
    with (ready.root / name).open("a") as file:
        file.write("# changed\n")
    assert ready.run().returncode == 0
    log = ready.take_log()
    assert log
    assert "venv" not in log


@pytest.mark.parametrize("kernels", KERNELS)
def test_without_cpu_kernels_it_says_so_and_tries_again_without_installing(
    ready: Checkout, kernels: str
) -> None:
    library = ready.root / f"{kernels}.so"
    library.unlink()
    result = ready.run(CC_FAILS="yes")
    assert result.returncode == 0
    assert "warning: the kernels for CPUs could not be compiled" in result.stdout
    assert "install a C compiler with OpenMP (gcc), and 'make setup' tries again" in result.stdout
    assert ready.run().stdout == ""
    assert library.exists()
    assert ready.take_log() == []


def test_where_uv_fails_pip_tries(checkout: Checkout, tmp_path: Path) -> None:
    checkout.put_python(checkout.bin / f"python{VERSION}")
    pip_log = tmp_path / "pip.log"
    result = checkout.run(UV_FAILS="1", PIP_LOG=str(pip_log))
    assert result.returncode == 0, result.stderr
    assert "trying pip, which has network settings of its own" in result.stdout
    assert (
        pip_log.read_text().splitlines()[-1].endswith(f"{checkout.root}[train,eval,hf,report,slurm,docs,dev]")
    )


def test_failed_install_leaves_no_stamp_and_the_next_run_continues(
    checkout: Checkout, tmp_path: Path
) -> None:
    checkout.put_python(checkout.bin / f"python{VERSION}")
    failed = checkout.run(UV_FAILS="1", PIP_FAILS="1", PIP_LOG=str(tmp_path / "pip.log"))
    assert failed.returncode == 1
    assert "run 'make setup' again: it continues where it stopped" in failed.stderr
    checkout.take_log()
    assert checkout.run().returncode == 0
    log = checkout.take_log()
    assert log
    assert "venv" not in log


def test_package_cut_off_while_being_installed_is_dropped(ready: Checkout) -> None:
    packages = next((ready.root / ".venv/lib").glob("python3*")) / "site-packages"
    whole, half = packages / "whole-1.0.dist-info", packages / "half-1.0.dist-info"
    for info in (whole, half):
        info.mkdir()
        (info / "RECORD").touch()
    (whole / "INSTALLER").touch()
    (ready.root / "setup.py").write_text(SETUP_PY + "# changed\n")
    assert ready.run().returncode == 0
    assert whole.exists()
    assert not half.exists()


def test_venv_of_a_moved_checkout_is_made_anew(ready: Checkout, tmp_path: Path) -> None:
    ready.root = ready.root.rename(tmp_path / "moved")
    assert ready.run().returncode == 0
    assert ready.take_log()[0] == "venv"


def test_index_for_torch_is_used_for_torch_alone(checkout: Checkout) -> None:
    checkout.put_python(checkout.bin / f"python{VERSION}")
    assert checkout.run(TORCH_INDEX_URL="https://example.org/cpu").returncode == 0
    using = [line for line in checkout.take_log() if "https://example.org/cpu" in line]
    assert len(using) == 1
    assert "--no-deps" in using[0]
    assert using[0].split()[-1].startswith("torch==")


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
def test_two_at_once_set_up_once(checkout: Checkout) -> None:
    checkout.put_python(checkout.bin / f"python{VERSION}")
    both = [checkout.start(INSTALL_SECONDS="0.3") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert checkout.take_log().count("venv") == 1
    assert sum("waiting for it" in output for output in outputs) == 1


# ---- scripts/uv.sh ----


def test_uv_that_is_missing_is_installed_by_pip(checkout: Checkout) -> None:
    uv = (checkout.bin / "uv").rename(checkout.bin / "uv-of-pip")
    write_executable(
        checkout.bin / "python3",
        f"""#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$4/bin"; ln -s "$0" "$4/bin/python" ;;
  "-m pip") case "$*" in *"install -q uv=="*) ln -s {uv} "${{0%/*}}/uv" ;; esac ;;
esac
""",
    )
    (checkout.bin / "ln").symlink_to(shutil.which("ln") or "")
    checkout.put_python(checkout.bin / f"python{VERSION}")
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    assert (checkout.root / ".venv-uv/bin/uv").exists()


def test_uv_that_cannot_be_installed_is_an_error(checkout: Checkout) -> None:
    (checkout.bin / "uv").unlink()
    write_executable(checkout.bin / "python3", '#!/bin/sh\n[ "$1" = -c ]\n')
    result = checkout.run()
    assert result.returncode == 1
    assert "uv is not here and could not be installed by pip. Tried: python3" in result.stderr
    assert "Install uv (https://docs.astral.sh/uv)" in result.stderr


PIP_CONFIG = r"""
:env:.cert='/etc/company.pem'
global.cert='/etc/other.pem'
global.extra-index-url='\nhttps://a.example/simple\nhttps://b.example/simple'
global.index-url='https://mirror.example/simple'
global.find-links='/wheels /more'
"""


def settings_of_uv(checkout: Checkout, **env: str) -> dict[str, str]:
    """What uv gets where pip is configured with PIP_CONFIG."""
    write_executable(checkout.bin / "python3", f"#!/bin/sh\ncat <<'END'\n{PIP_CONFIG}END\n")
    write_executable(
        checkout.bin / "uv", '#!/bin/sh\n[ "$1" = env ] && exec /usr/bin/env || echo uv 0.13.9\n'
    )
    command = [BASH, str(checkout.root / "scripts/uv.sh"), "env"]
    out = subprocess.run(command, env=checkout.env | env, capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in out.splitlines())


def test_settings_of_pip_become_those_of_uv(checkout: Checkout) -> None:
    seen = settings_of_uv(checkout)
    assert seen["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert seen["UV_INDEX"] == "https://a.example/simple https://b.example/simple"
    assert seen["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert seen["UV_FIND_LINKS"] == "/wheels,/more"
    assert seen["SSL_CERT_FILE"] == "/etc/company.pem"


def test_settings_that_uv_has_of_its_own_stay(checkout: Checkout) -> None:
    seen = settings_of_uv(checkout, UV_DEFAULT_INDEX="https://own.example/simple", SSL_CERT_FILE="/own.pem")
    assert seen["UV_DEFAULT_INDEX"] == "https://own.example/simple"
    assert seen["SSL_CERT_FILE"] == "/own.pem"
    assert "UV_INDEX" not in seen
