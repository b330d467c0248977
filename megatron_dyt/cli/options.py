"""Types of options that several commands have."""

from pathlib import Path

import click

POSITIVE = click.IntRange(min=1)
PATH = click.Path(path_type=Path)
