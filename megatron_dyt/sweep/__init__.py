"""Many small training runs from one file: `megatron-dyt sweep FILE.yaml`."""
