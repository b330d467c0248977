"""Zero-shot lm-eval on Megatron checkpoints: `megatron-dyt eval`."""
