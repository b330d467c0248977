"""Text to Megatron's indexed datasets, in as many processes as there are cores.

    megatron-dyt prepare-data --input pile/train --tokenizer-model llama.model --output data/train

takes JSON lines (plain, .zst, .gz), Parquet files, directories or patterns of them, or a Hugging Face data
set, and writes one dataset a file: data/train/00.bin, 00.idx and 00.manifest.json, then manifest.json over
all. --print-blend data/train says what --train-data-path takes; --verify data/train reads all of it again.
--output-prefix P makes one dataset of all inputs instead: P.bin, P.idx, P.manifest.json.

A document is BOS + text + EOS, as the DyT paper's LLaMA runs have it; Megatron adds neither at training
time. Started again, it goes on from the shards that are finished.
"""

from __future__ import annotations

import argparse
import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dyt.atomic import read_json
from megatron_dyt.data import collection, hub, sources, tokenizers, workers
from megatron_dyt.data.blend import blend
from megatron_dyt.data.dataset_manifest import HUGGING_FACE, SENTENCEPIECE, manifest_path
from megatron_dyt.data.progress import Progress, duration
from megatron_dyt.data.records import DEFAULT_DOMAIN_KEY, DEFAULT_TEXT_KEY, Fields
from megatron_dyt.data.settings import Filters, Settings, Shard
from megatron_dyt.data.shard import all_paths, finished, output_paths
from megatron_dyt.data.shard_names import shards_of
from megatron_dyt.data.sources import BrokenSourceError, Source
from megatron_dyt.data.tracker import Tracker
from megatron_dyt.data.verify import verify
from megatron_dyt.errors import UserError, describe, run_main

# A full disk, a quota and a limit on a file's size: nothing that a traceback explains.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.print_blend:
        print(*blend(args.print_blend))
    elif args.verify:
        _verify(args.verify)
    else:
        _check(args)
        _prepare(args, _settings(args))
    return 0


def _prepare(args: argparse.Namespace, settings: Settings) -> None:
    """Write what is not finished yet, and say what there is then."""
    started = time.monotonic()
    shards = _shards(args, settings)
    todo = [shard for shard in shards if finished(shard, settings) is None]
    existing = [shard.prefix for shard in todo if output_paths(shard.prefix)[1].exists()]
    broken = _write(todo, settings, args) if todo else {}
    if broken and not args.skip_broken_shards:
        raise BrokenSourceError("; ".join(broken.values()))
    whole = _result(args, shards, settings, broken)
    if not whole["documents"]:
        raise UserError(f"no document is left: {_left_out(whole) or 'all shards are broken'}")
    took = f"{duration(time.monotonic() - started)}" if todo else "up to date"
    print(f"{summary(args.output or args.output_prefix, whole)}; {took}")
    if replaced := [prefix for prefix in existing if prefix.name not in broken]:
        # Megatron names cached sample indices by the path, not the content (megatron_dataset.py).
        print(
            f"replaced: {', '.join(map(str, replaced))}. Delete the indices that Megatron cached for what "
            f"was there (the directory of --data-cache-path, else {replaced[0].parent}/cache) before training"
        )


def _write(shards: list[Shard], settings: Settings, args: argparse.Namespace) -> dict[str, str]:
    """Write the shards; the problems of broken ones by their names."""
    obstacle = settings.tokenizer.obstacle
    if obstacle and settings.tokenizer.kind == SENTENCEPIECE:
        print(f"{settings.tokenizer.name} is used without the word cache, because {obstacle}")
    label = (args.output or args.output_prefix).name
    with Progress(label, sum(shard.size for shard in shards)) as progress:
        tracker = Tracker(shards, progress, args.skip_broken_shards)
        try:
            workers.run(shards, settings, args.workers, tracker)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise UserError(
                f"writing {args.output or args.output_prefix} failed: {describe(error)}"
            ) from error
    return tracker.broken


def _result(
    args: argparse.Namespace, shards: list[Shard], settings: Settings, broken: dict[str, str]
) -> dict[str, Any]:
    """The manifest of all that is there now; that of a directory is written."""
    if args.output:
        return collection.write_total(args.output, [shard.prefix.name for shard in shards], broken, settings)
    manifest: dict[str, Any] = read_json(manifest_path(args.output_prefix))
    return manifest


def summary(place: Path, manifest: dict[str, Any]) -> str:
    """One line for people about a dataset or a directory of them."""
    shards = f"{len(manifest['shards'])} shards, " if "shards" in manifest else ""
    left_out = _left_out(manifest)
    return (
        f"{place}: {shards}{manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"{manifest['text_bytes'] / manifest['tokens']:.2f} bytes a token"
        + (f"; left out: {left_out}" if left_out else "")
    )


def _left_out(manifest: dict[str, Any]) -> str:
    """What is not in the data, and where it is named."""
    broken = len(manifest.get("broken_shards", ()))
    counts = {
        "broken shards": broken,
        "empty": manifest["empty_documents"],
        "malformed (named in *.malformed.jsonl)": sum(manifest["malformed"].values()),
        "filtered": sum(manifest["filtered"].values()),
    }
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def _verify(place: Path) -> None:
    count, problems = verify(place)
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(
            f"{place}: {len(problems)} problems in {count} shards; remove the manifests of damaged shards, "
            "and the same prepare-data command writes those anew"
        )
    print(f"{place}: {count} shards are as they were written")


# --- what is asked for -----------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> None:
    for one, other in (("input", "hf_dataset"), ("output", "output_prefix")):
        if bool(getattr(args, one)) == bool(getattr(args, other)):
            flags = " or ".join("--" + name.replace("_", "-") for name in (one, other))
            raise UserError(f"give either {flags}")
    if args.skip_broken_shards and args.output_prefix:
        raise UserError(
            "--skip-broken-shards needs --output: a single dataset has no shards to leave out. Leave the "
            "broken file out of --input"
        )
    if not args.tokenizer_model:
        raise UserError("give --tokenizer-model, with --tokenizer-type if it is not a SentencePiece model")
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, not {args.workers}")
    if args.min_chars < 0 or (args.max_chars is not None and args.max_chars < max(args.min_chars, 1)):
        raise UserError(f"--min-chars {args.min_chars} --max-chars {args.max_chars} leave no document")
    if both := set(args.domains) & set(args.not_domains):
        raise UserError(f"--domains and --not-domains both name {', '.join(sorted(both))}")


def _settings(args: argparse.Namespace) -> Settings:
    tokenizer = tokenizers.find(args.tokenizer_type, args.tokenizer_model)
    for name, wanted, found, remedy in (
        ("BOS", args.bos, tokenizer.bos, "--no-bos"),
        ("EOS", args.append_eod, tokenizer.eos, "--no-append-eod"),
    ):
        if wanted and found is None:
            raise UserError(f"the tokenizer has no {name} token; use another tokenizer or {remedy}")
    domains, not_domains = tuple(sorted(args.domains)), tuple(sorted(args.not_domains))
    return Settings(
        tokenizer=tokenizer,
        bos=args.bos,
        append_eod=args.append_eod,
        fields=Fields(args.json_key, args.domain_key),
        filters=Filters(args.min_chars, args.max_chars, domains, not_domains),
    )


def _shards(args: argparse.Namespace, settings: Settings) -> list[Shard]:
    found: Sequence[Source]
    if args.hf_dataset:
        dataset = hub.HubDataset(args.hf_dataset, args.hf_config, args.hf_split, args.hf_revision)
        found = hub.find(dataset, settings.fields)
    else:
        found = sources.find(args.input)
    _check_not_written(args, found)
    if args.output_prefix:
        if not args.overwrite:
            collection.check_shard(args.output_prefix, settings)
        return [Shard(args.output_prefix, tuple(found))]
    if not args.overwrite:
        collection.check_settings(args.output, settings)
    return shards_of(args.output, found, collection.manifests(args.output), args.overwrite)


def _check_not_written(args: argparse.Namespace, found: Sequence[Source]) -> None:
    """No input is where the output goes."""
    for source in found:
        if not isinstance(source, sources.FileSource):
            continue
        path = source.path.resolve()
        if args.output and args.output.resolve() in path.parents:
            raise UserError(f"input {source.path} is in the output directory; write to another one")
        if args.output_prefix and path in map(Path.resolve, all_paths(args.output_prefix)):
            raise UserError(f"input {source.path} would be replaced; give another --output-prefix")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-dyt prepare-data",
        description="Tokenize text into Megatron's indexed datasets, check them, or blend them.",
    )
    yes_no = argparse.BooleanOptionalAction
    cores = len(os.sched_getaffinity(0))

    source = parser.add_argument_group("text")
    source.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="files, directories or quoted patterns: " + " ".join(sources.FORMATS),
    )
    source.add_argument("--hf-dataset", metavar="NAME", help="a Hugging Face data set, streamed")
    source.add_argument("--hf-config", metavar="NAME", help="its subset")
    source.add_argument("--hf-split", default="train", metavar="NAME")
    source.add_argument("--hf-revision", metavar="COMMIT", help="pins its content")
    source.add_argument(
        "--json-key", default=DEFAULT_TEXT_KEY, help="key or column of the text (%(default)s)"
    )
    source.add_argument(
        "--domain-key", default=DEFAULT_DOMAIN_KEY, help="path of keys to a record's domain (%(default)s)"
    )

    ids = parser.add_argument_group("tokens")
    ids.add_argument("--tokenizer-type", choices=[SENTENCEPIECE, HUGGING_FACE], default=SENTENCEPIECE)
    ids.add_argument(
        "--tokenizer-model", metavar="PATH", help="a SentencePiece .model; a Hugging Face directory or name"
    )
    ids.add_argument("--append-eod", action=yes_no, default=True, help="end documents with EOS")
    ids.add_argument("--bos", action=yes_no, default=True, help="begin documents with BOS")

    output = parser.add_argument_group("result")
    output.add_argument("--output", type=Path, metavar="DIR", help="one dataset a file, and a manifest")
    output.add_argument("--output-prefix", type=Path, metavar="P", help="one dataset of all: P.bin, P.idx")
    output.add_argument("--overwrite", action="store_true", help="replace data made with other settings")
    output.add_argument("--workers", type=int, default=cores, help="processes (%(default)s)")
    output.add_argument(
        "--skip-broken-shards", action="store_true", help="leave out files that are truncated or damaged"
    )

    filters = parser.add_argument_group("which documents (all)")
    filters.add_argument("--min-chars", type=int, default=0, metavar="N", help="leave out shorter ones")
    filters.add_argument("--max-chars", type=int, metavar="N", help="leave out longer ones")
    filters.add_argument("--domains", nargs="+", default=[], metavar="NAME", help="only these")
    filters.add_argument("--not-domains", nargs="+", default=[], metavar="NAME", help="none of these")

    done = parser.add_argument_group("prepared data")
    done.add_argument("--verify", type=Path, metavar="DIR|P", help="read all again and compare")
    done.add_argument(
        "--print-blend", type=Path, nargs="+", metavar="DIR|P", help="print what --train-data-path takes"
    )
    return parser


if __name__ == "__main__":
    run_main(main)
