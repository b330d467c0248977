"""`prepare-data` and `train-tokenizer`: from text to what Megatron trains on."""

import os
from collections.abc import Sequence
from pathlib import Path

import click

from megatron_dyt.cli.options import PATH, POSITIVE
from megatron_dyt.data.dataset_manifest import HUGGING_FACE, SENTENCEPIECE, Fields, Filters
from megatron_dyt.errors import UserError

_FORMATS = (
    "files, directories or quoted patterns: .jsonl, .json, .ndjson, with .zst, .zstd or .gz behind; .parquet"
)


class _SeveralValues(click.Command):
    """Lets `--input a b c` be `--input a --input b --input c`, for options with `multiple`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        several = {name for each in self.params if each.multiple for name in each.opts}
        words: list[str] = []
        option = None
        for word in args:
            if word.startswith("-") and word != "-":
                name, given, _value = word.partition("=")
                option = name if name in several else None
                fresh = not given
            elif option and not fresh:
                words.append(option)
            else:
                fresh = False
            words.append(word)
        return super().parse_args(ctx, words)


@click.command("prepare-data", cls=_SeveralValues)
@click.option("--input", "inputs", multiple=True, metavar="PATH ...", help=_FORMATS)
@click.option("--hf-dataset", metavar="NAME", help="a Hugging Face data set, streamed")
@click.option("--hf-config", metavar="NAME", help="its subset")
@click.option("--hf-split", default="train", metavar="NAME", show_default=True)
@click.option("--hf-revision", metavar="COMMIT", help="pins its content")
@click.option(
    "--json-key", default=Fields.text, show_default=True, help="key or column of the text, or path of keys"
)
@click.option(
    "--domain-key", default=Fields.domain, show_default=True, help="path of keys to a record's domain"
)
@click.option(
    "--tokenizer-type",
    type=click.Choice([SENTENCEPIECE, HUGGING_FACE]),
    default=SENTENCEPIECE,
    show_default=True,
)
@click.option(
    "--tokenizer-model", metavar="PATH", help="a SentencePiece .model; a Hugging Face directory or name"
)
@click.option("--append-eod/--no-append-eod", default=True, show_default=True, help="end documents with EOS")
@click.option("--bos/--no-bos", default=True, show_default=True, help="begin documents with BOS")
@click.option("--output", type=PATH, metavar="DIR", help="one dataset per file, and a manifest")
@click.option("--output-prefix", type=PATH, metavar="P", help="one dataset of all: P.bin, P.idx")
@click.option("--overwrite", is_flag=True, help="replace data made with other settings")
@click.option(
    "--workers",
    type=POSITIVE,
    metavar="N",
    help="processes (as many as cores); with --slurm-partition: tasks at a time (all)",
)
@click.option("--slurm-partition", metavar="NAME", help="write on a Slurm cluster, one task per dataset")
@click.option("--slurm-time", default="24:00:00", show_default=True, metavar="T", help="time limit of a task")
@click.option("--slurm-option", multiple=True, metavar="KEY=VALUE ...", help="more for sbatch: account=team")
@click.option("--skip-broken-shards", is_flag=True, help="leave out files that are truncated or damaged")
@click.option(
    "--min-chars", type=click.IntRange(min=0), default=0, metavar="N", help="leave out shorter documents"
)
@click.option("--max-chars", type=POSITIVE, metavar="N", help="leave out longer ones")
@click.option("--domains", multiple=True, metavar="NAME ...", help="only documents of these")
@click.option("--not-domains", multiple=True, metavar="NAME ...", help="no documents of these")
@click.option("--verify", type=PATH, metavar="DIR|P", help="read prepared data again and compare")
@click.option(
    "--print-blend", type=PATH, multiple=True, metavar="DIR|P ...", help="print what --train-data-path takes"
)
def prepare_data(
    inputs: tuple[str, ...],
    hf_dataset: str | None,
    hf_config: str | None,
    hf_split: str,
    hf_revision: str | None,
    json_key: str,
    domain_key: str,
    tokenizer_type: str,
    tokenizer_model: str | None,
    append_eod: bool,
    bos: bool,
    output: Path | None,
    output_prefix: Path | None,
    overwrite: bool,
    workers: int | None,
    slurm_partition: str | None,
    slurm_time: str,
    slurm_option: tuple[str, ...],
    skip_broken_shards: bool,
    min_chars: int,
    max_chars: int | None,
    domains: tuple[str, ...],
    not_domains: tuple[str, ...],
    verify: Path | None,
    print_blend: tuple[Path, ...],
) -> None:
    """Tokenize text into Megatron's indexed datasets, check them, or blend them.

    JSON lines, Parquet files or a Hugging Face data set become one dataset per file with a manifest, and
    manifest.json over all. The same command again goes on from the datasets that are finished.
    """
    from megatron_dyt.data import hub, prepare, sources
    from megatron_dyt.data.verify import blend, verified

    if print_blend:
        click.echo(" ".join(blend(print_blend)))
        return
    if verify:
        click.echo(verified(verify))
        return
    if bool(inputs) == bool(hf_dataset):
        raise UserError("give either --input or --hf-dataset")
    place = output or output_prefix
    if place is None or (output and output_prefix):
        raise UserError("give either --output or --output-prefix")
    if skip_broken_shards and output_prefix:
        raise UserError(
            "--skip-broken-shards needs --output: a single dataset has no shards to leave out. Leave the "
            "broken file out of --input"
        )
    if not tokenizer_model:
        raise UserError("give --tokenizer-model, with --tokenizer-type if it is not a SentencePiece model")
    if slurm_partition and output_prefix:
        raise UserError("--slurm-partition needs --output: a single dataset is the work of one process")
    if wrong := [each for each in slurm_option if "=" not in each]:
        raise UserError(f"--slurm-option {wrong[0]}: give KEY=VALUE, such as account=team")
    if max_chars is not None and max_chars < min_chars:
        raise UserError(f"--min-chars {min_chars} --max-chars {max_chars} leave no document")
    if both := set(domains) & set(not_domains):
        raise UserError(f"--domains and --not-domains both name {', '.join(sorted(both))}")
    fields = Fields(json_key, domain_key)
    filters = Filters(min_chars, max_chars, tuple(sorted(domains)), tuple(sorted(not_domains)))
    settings = prepare.find_settings(tokenizer_type, tokenizer_model, bos, append_eod, fields, filters)
    found: Sequence[sources.Source]
    if hf_dataset:
        found = hub.find(hub.HubDataset(hf_dataset, hf_config, hf_split, hf_revision), fields)
    else:
        found = sources.find(inputs)
    destination = prepare.Destination(place, output is None, overwrite, skip_broken_shards)
    if slurm_partition:
        from megatron_dyt.data import slurm

        options = dict(each.split("=", 1) for each in slurm_option)
        click.echo(slurm.submit(found, settings, destination, slurm_partition, slurm_time, workers, options))
    else:
        processes = workers or len(os.sched_getaffinity(0))
        click.echo(prepare.prepare(found, settings, destination, processes))


@click.command("train-tokenizer", cls=_SeveralValues)
@click.option("--input", "inputs", multiple=True, required=True, metavar="PATH ...", help=_FORMATS)
@click.option(
    "--json-key", default=Fields.text, show_default=True, help="key or column of the text, or path of keys"
)
@click.option("--vocab-size", type=POSITIVE, required=True, help="number of pieces")
@click.option("--output", type=PATH, required=True, help="the .model file to write")
@click.option(
    "--max-bytes",
    type=POSITIVE,
    default=16_000_000,
    show_default=True,
    help="train on an even sample of about this many bytes",
)
def train_tokenizer(
    inputs: tuple[str, ...], json_key: str, vocab_size: int, output: Path, max_bytes: int
) -> None:
    """Train a SentencePiece BPE tokenizer with LLaMA 2's settings on a corpus."""
    from megatron_dyt.data.train_tokenizer import write_tokenizer

    write_tokenizer(inputs, vocab_size, output, max_bytes, json_key)
