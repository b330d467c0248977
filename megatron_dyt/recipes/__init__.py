"""LLaMA sizes and training recipes as data (`llama.yaml`), and the Megatron flags they stand for."""

from megatron_dyt.llama import NORMS
from megatron_dyt.recipes.recipe import Recipe, load, names

__all__ = ["NORMS", "Recipe", "load", "names"]
