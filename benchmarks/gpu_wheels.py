"""Collect the wheels that a GPU machine without network lacks: python benchmarks/gpu_wheels.py [--output DIR]

For Linux on x86-64 with Python 3.12, in order of worth, in folders DIR/1, DIR/2, ... of at most 60 MiB each,
as what can be carried at a time; a wheel that is larger than what is left of a folder goes on in the next, in
pieces that `gpu_hour.py` joins. Taken for given, besides torch and triton: numpy, matplotlib, transformers,
sentencepiece, pyarrow, pytest with pytest-timeout and pytest-xdist, click, pyyaml and tqdm.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 60 << 20
# Those in constraints.txt have the release that is tested; of the others the newest.
PACKAGES = (
    *("megatron-core", "omegaconf", "liger-kernel"),
    *("quack-kernels", "apache-tvm-ffi", "torch-c-dlpack-ext", "einops", "nvidia-cutlass-dsl"),
    *("nvidia-cutlass-dsl-libs-core", "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-cu13"),
)
# manylinux_2_N is matched exactly.
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (5, 12, 17, 24, 27, 28)] + ["manylinux2014_x86_64"]


def pinned(package: str) -> str:
    """With the version of constraints.txt, where that has one."""
    text = (ROOT / "constraints.txt").read_text()
    found = re.search(rf"^{re.escape(package)}==\S+", text, re.MULTILINE | re.IGNORECASE)
    return found[0] if found else package


def download(directory: Path) -> list[Path]:
    """The wheels in the order of PACKAGES, each alone: what it needs is in the list or taken for given."""
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    options += [word for platform in PLATFORMS for word in ("--platform", platform)]
    wheels: list[Path] = []
    for package in PACKAGES:
        target = directory / package
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            *options,
            "-d",
            str(target),
            pinned(package),
        ]
        subprocess.run(command, check=True)
        wheels += target.glob("*.whl")
    return wheels


def check(wheel: Path) -> None:
    """A wheel is unpacked, not installed: what installers put elsewhere would be lost."""
    names = zipfile.ZipFile(wheel).namelist()
    if elsewhere := [name for name in names if re.match(r"[^/]+\.data/(?!purelib|platlib|data/share)", name)]:
        raise SystemExit(f"gpu_wheels: {wheel.name} has files for an installer, such as {elsewhere[0]}")


def deal(wheels: list[Path], output: Path, limit: int = LIMIT) -> None:
    """Write the wheels into numbered folders of at most `limit` bytes."""
    folder, left = 1, limit
    (output / "1").mkdir(parents=True)
    for wheel in wheels:
        data, pieces = wheel.read_bytes(), []
        while data:
            # Of a wheel that fits nowhere whole, or of the only one, as much as there is room for.
            if len(data) > left and (len(data) <= limit or not left):
                folder, left = folder + 1, limit
                (output / str(folder)).mkdir()
            pieces.append((folder, data[:left]))
            data = data[left:]
            left -= len(pieces[-1][1])
        for number, (where, piece) in enumerate(pieces, 1):
            suffix = f".{number}of{len(pieces)}" if len(pieces) > 1 else ""
            (output / str(where) / f"{wheel.name}{suffix}").write_bytes(piece)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-wheels", metavar="DIR")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        wheels = download(Path(directory))
        for wheel in wheels:
            check(wheel)
        shutil.rmtree(args.output, ignore_errors=True)
        deal(wheels, args.output)
    for folder in sorted(args.output.iterdir()):
        files = sorted(folder.iterdir())
        size = sum(file.stat().st_size for file in files)
        print(f"{folder}: {size / (1 << 20):.1f} MiB: {', '.join(file.name for file in files)}")


if __name__ == "__main__":
    main()
