"""A training run around Megatron's loop: checks before it, its data sets, signals and its end."""
