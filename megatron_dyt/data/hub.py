"""A Hugging Face data set as sources, streamed: nothing but what is being read is on this machine."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from megatron_dyt.data.dataset_manifest import Fields, Identity
from megatron_dyt.data.sources import BrokenSourceError, Item, as_item
from megatron_dyt.errors import UserError


@dataclass(frozen=True)
class HubDataset:
    """What `datasets.load_dataset` is called with.

    Attributes:
        path: a name on the Hub, or a directory of data files.
        config: its subset; None for the default one.
        split: for example "train".
        revision: branch, tag or commit on the Hub; None for the newest.
    """

    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    def stream(self) -> Any:
        """The `datasets.IterableDataset`; `UserError` when it cannot be opened."""
        import datasets

        return self._open(datasets.load_dataset, split=self.split, streaming=True)

    def _open(self, function: Callable[..., Any], **options: Any) -> Any:
        try:
            return function(self.path, self.config, revision=self.revision, **options)
        # The library raises its own, the Hub's and the readers' errors, without a common base.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"Hugging Face data set {self} cannot be opened: {reason}. See --hf-dataset, --hf-config, "
                "--hf-split and --hf-revision"
            ) from error

    def pinned(self) -> tuple[Self, str]:
        """This at the commit that it has on the Hub now, as parts are read hours after one another; and a
        hash of what the Hub (commit) or the file system (times) says of its files."""
        import datasets

        builder = self._open(datasets.load_dataset_builder)
        files = (builder.config.data_files or {}).get(self.split)
        origins = getattr(files, "origin_metadata", builder.hash)
        content = hashlib.sha256(repr(origins).encode()).hexdigest()
        # Of a file on the Hub: repository and commit.
        commits = {origin[1] for origin in origins or () if len(origin) == 2 and origin[0] == self.path}
        return replace(self, revision=commits.pop() if len(commits) == 1 else self.revision), content

    def __str__(self) -> str:
        return "/".join(filter(None, (self.path, self.config, self.split)))


@dataclass(frozen=True)
class HubSource:
    """One of the `count` parts of a data set: those of its files that fall to it."""

    dataset: HubDataset
    content: str
    index: int
    count: int
    unit: str = "row"
    # The library does not say how many bytes it will read.
    size: int = 0

    @property
    def base(self) -> str:
        """What the names of all parts begin with."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", str(self.dataset)).strip("-.")

    @property
    def name(self) -> str:
        return f"{self.base}-{self.index:05d}-of-{self.count:05d}"

    def __str__(self) -> str:
        return f"{self.dataset}, part {self.index + 1} of {self.count}"

    def identity(self) -> Identity:
        return {"name": self.name, "revision": self.dataset.revision, "content": self.content}

    def read(self, fields: Fields) -> Iterator[tuple[int, Item]]:
        rows = iter(self.dataset.stream().shard(num_shards=self.count, index=self.index))
        number = 0
        while True:
            try:
                record = next(rows, None)
            except Exception as error:
                reason = " ".join(str(error).split())
                raise BrokenSourceError(
                    f"{self}: reading failed after {number} rows ({type(error).__name__}: {reason}); try "
                    "again, or leave it out with --skip-broken-shards"
                ) from error
            if record is None:
                return
            number += 1
            yield 0, as_item(record, number, fields)


def find(dataset: HubDataset, fields: Fields) -> list[HubSource]:
    """The parts of a data set, as many as it has files.

    Raises:
        UserError: it cannot be opened, or has no column with the text.
    """
    dataset, content = dataset.pinned()
    stream = dataset.stream()
    columns = stream.column_names
    # What is in a column shows when its rows are read.
    if columns is not None and not {fields.text, fields.text.split(".")[0]} & set(columns):
        raise UserError(
            f'Hugging Face data set {dataset} has no column "{fields.text}"; it has {", ".join(columns)}: '
            "choose with --json-key"
        )
    return [HubSource(dataset, content, index, stream.num_shards) for index in range(stream.num_shards)]
