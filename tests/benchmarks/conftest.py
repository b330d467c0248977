"""Megatron on the CPU for benchmarks that build its layers."""

from tests.mcore.conftest import world  # noqa: F401
