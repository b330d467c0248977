"""lm-eval tasks that come with megatron_dyt: the group `dyt_paper` and a `record` that runs."""
