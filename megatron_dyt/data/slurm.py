"""The datasets of a directory as tasks of a Slurm cluster, by datatrove's executor.

`WriteShards` is the step that datatrove runs: one task, one dataset or a few. A dataset is finished when its
manifest says so, not when datatrove has marked the task as complete, which it stays when the files are gone.
"""

import sys
from collections.abc import Mapping, Sequence

from megatron_dyt.data import prepare
from megatron_dyt.data.shard import Settings, Shard, finished, write
from megatron_dyt.data.sources import Source
from megatron_dyt.errors import UserError

try:
    from datatrove.executor import SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.utils.logging import logger
except ImportError as error:
    raise UserError(
        "--slurm-partition needs datatrove, which is not installed: pip install 'megatron-dyt[slurm]'"
    ) from error

# Where in the output directory datatrove's state and the tasks' logs are.
STATE = "slurm"


class WriteShards(PipelineStep):
    """Writes those of `shards` that fall to the task and are not finished, one after the other."""

    name = "tokenize and write"
    type = "megatron_dyt"

    def __init__(self, shards: Sequence[Shard], settings: Settings) -> None:
        super().__init__()
        self.shards, self.settings = shards, settings

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the datasets of task `rank` of `world_size`.

        Raises:
            BrokenSourceError, UserError: as `shard.write`; the task then counts as failed.
        """
        encode = self.settings.tokenizer.encoder()
        for shard in self.shards[rank::world_size]:
            if finished(shard, self.settings) is None:
                write(shard, self.settings, encode, lambda read, counts: None)
                self.stat_update("datasets")


class Finish(PipelineStep):
    """Does what a command without Slurm would do now: writes what is left, then the directory's manifest."""

    name = "manifest"
    type = "megatron_dyt"

    def __init__(
        self, sources: Sequence[Source], settings: Settings, destination: prepare.Destination
    ) -> None:
        super().__init__()
        self.arguments = sources, settings, destination

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        logger.info(prepare.prepare(*self.arguments, processes=1))


def submit(
    sources: Sequence[Source],
    settings: Settings,
    destination: prepare.Destination,
    partition: str,
    time_limit: str,
    at_once: int | None,
    options: Mapping[str, str],
) -> str:
    """Submit a job array with a task per dataset that is not finished, and a job that finishes behind it.

    Args:
        partition, time_limit: of Slurm, for each task.
        at_once: how many tasks may run at a time; None for no limit.
        options: more of sbatch's, such as {"account": "team"}.

    Returns:
        A line about what was submitted.
    """
    todo = [
        shard
        for shard in prepare.find_shards(sources, settings, destination)
        if finished(shard, settings) is None
    ]
    state = destination.place.resolve() / STATE
    common = {
        "time": time_limit,
        "partition": partition,
        # Clusters without a quality of service of this name refuse datatrove's default.
        "qos": options.get("qos"),
        "sbatch_args": {name: value for name, value in options.items() if name != "qos"},
        "venv_path": f"{sys.prefix}/bin/activate" if sys.prefix != sys.base_prefix else None,
        # Manifests say what is finished.
        "skip_completed": False,
    }
    writing = SlurmPipelineExecutor(
        [WriteShards(todo, settings)],
        tasks=len(todo),
        workers=at_once or -1,
        job_name="prepare-data",
        logging_dir=str(state / "write"),
        **common,
    )
    finishing = SlurmPipelineExecutor(
        [Finish(sources, settings, destination)],
        tasks=1,
        job_name="prepare-data-finish",
        logging_dir=str(state / "finish"),
        depends=writing if todo else None,
        # It says what has become of broken shards.
        run_on_dependency_fail=True,
        **common,
    )
    try:
        finishing.run()
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} is not on this machine: submit where Slurm is, or leave out --slurm-partition"
        ) from error
    return f"{destination.place}: submitted {len(todo)} tasks, and a job for the manifest; logs in {state}"
