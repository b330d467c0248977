"""What lies in a directory of Megatron checkpoints: iterations, stored arguments, tensors, damage."""
