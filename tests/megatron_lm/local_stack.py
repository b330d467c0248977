"""`--spec tests.megatron_lm.local_stack SPEC`: a hybrid stack of local layers, for runs without a GPU."""

from tests.families import hybrid_spec

SPEC = hybrid_spec()
