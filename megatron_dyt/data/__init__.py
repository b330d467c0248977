"""Text to what Megatron trains on: a tokenizer model, then tokenized, indexed datasets."""
