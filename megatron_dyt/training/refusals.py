"""Megatron's refusals of flags as one line each, which names the flags and the way out.

Megatron asserts, often by the names of attributes and after minutes of loading, and a traceback follows.
"""

import re
import traceback

from megatron_dyt.errors import UserError, describe

# Functions that look at flags, and at nothing else.
_OF_FLAGS = ("validate_args", "__post_init__")

_SCHEDULE = re.compile(
    r"OptimizerParamScheduler: class input value (\S+) and checkpoint\s*value (\S+) for (.+) do not match"
)
_SCHEDULE_FLAGS = {
    "learning rate": "--lr",
    "minimum learning rate": "--min-lr",
    "warmup iterations": "--lr-warmup-iters, --lr-warmup-fraction or --global-batch-size, in samples",
    "total number of iterations": "--train-iters, --lr-decay-iters or --global-batch-size, in samples",
    "learning rate decay style": "--lr-decay-style",
    "start weight decay": "--weight-decay or --start-weight-decay",
    "end weight decay": "--weight-decay or --end-weight-decay",
    "total number of weight decay iterations": "--train-iters or --global-batch-size, in samples",
    "weight decay incr style": "--weight-decay-incr-style",
}


def of(error: BaseException) -> UserError | None:
    """What `error` says about the flags, where it is a refusal of them."""
    if isinstance(error, UserError):
        return error
    for translate in (_schedule, _parameter_groups, _validation):
        if text := translate(error):
            return UserError(text)
    return None


def _schedule(error: BaseException) -> str | None:
    """A resumed run's schedule is another one than the checkpoint's."""
    found = _SCHEDULE.search(str(error))
    if found is None:
        return None
    ours, saved, name = found.groups()
    flags = _SCHEDULE_FLAGS.get(name, name)
    return (
        f"the checkpoint was saved with another {name} ({saved}; now {ours}): {flags}. "
        "Give --override-opt_param-scheduler to go on by the schedule of these flags, as if it had been so "
        "from the start, or --use-checkpoint-opt_param-scheduler to go on by the checkpoint's; or what the "
        "run was started with"
    )


def _parameter_groups(error: BaseException) -> str | None:
    """The groups of the optimizer are found by their rates."""
    if not str(error).startswith("Could not find parameter group with key"):
        return None
    return (
        "the optimizer in the checkpoint has parameter groups with another --lr, --min-lr or rule for weight "
        "decay, and Megatron finds them by these. Give what the run was started with, or --no-load-optim to "
        "go on with the weights, a new optimizer and a schedule that begins anew"
    )


def _validation(error: BaseException) -> str | None:
    if not isinstance(error, AssertionError | ValueError):
        return None
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.name in _OF_FLAGS and "/megatron/" in frame.filename:
            return f"Megatron refuses the flags: {describe(error)}"
    return None
