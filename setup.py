"""Compiles the CPU kernels; the metadata is in pyproject.toml.

Without a C compiler that knows OpenMP the installation goes on without them, and DyT on CPU is plain torch.
"""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildLibraries(build_ext):
    """Shared libraries to be opened by ctypes: their names have no tag of a Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"


# A product and a sum become one operation where the processor has that. Without the last two options GCC does
# not vectorize what could set errno or trap.
OPTIONS = ["-O3", "-std=c11", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

setup(
    ext_modules=[
        Extension(
            "megatron_dyt.ops.cpu_kernels",
            ["megatron_dyt/ops/cpu_kernels.c"],
            extra_compile_args=OPTIONS,
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibraries},
)
