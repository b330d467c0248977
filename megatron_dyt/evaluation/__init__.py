"""Zero-shot lm-eval on Megatron checkpoints: `python -m megatron_dyt.evaluation`."""
