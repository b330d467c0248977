"""Compiles the CPU kernels; the metadata is in pyproject.toml.

Without a C compiler that knows OpenMP the installation goes on without them, and DyT on CPU is plain torch.
"""

import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = ("megatron_dyt/ops/cpu_kernels.c", "megatron_dyt/cpu/layer_kernels.c")


class BuildLibraries(build_ext):
    """Shared libraries to be opened by ctypes: their names have no tag of a Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        # Where compilation fails, no earlier library may stay and be taken for this one.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().build_extension(ext)


class PlatformWheel(bdist_wheel):
    """A wheel for every Python of the platform: the libraries do not link to Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# A product and a sum become one operation where the processor has that. Without the last two options GCC does
# not vectorize what could set errno or trap. -ffast-math in CFLAGS would lose NaN, and in the whole process
# denormals.
OPTIONS = ["-O3", "-std=c11", "-fopenmp", "-fno-fast-math"]
OPTIONS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

setup(
    ext_modules=[
        Extension(
            source.removesuffix(".c").replace("/", "."),
            [source],
            define_macros=[("SOURCE_CRC32", f"{zlib.crc32(Path(source).read_bytes())}u")],
            extra_compile_args=OPTIONS,
            extra_link_args=["-fopenmp", "-fno-fast-math"],
            libraries=["m"],
            optional=True,
        )
        for source in SOURCES
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
