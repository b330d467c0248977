"""DyT inside Megatron-Core: the norm, the spec rewrite, flags, checkpoints, and their registration."""
