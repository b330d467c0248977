#!/usr/bin/env bash
# datatrove 0.10.1: JsonlReader opens files in text mode with universal newlines, so a carriage return between two
# tokens of a record, which JSON allows as white space, ends the line. The record is left out with a warning that names
# the file only, and the run succeeds. A file with two records gives one document (seen on Python 3.12, 2026-11-28):
#
#   Error when reading `a.jsonl`: unexpected end of data: line 2 column 1 (char 9)
#   Error when reading `a.jsonl`: unexpected content after document: line 1 column 8 (char 7)
#   documents: ['second']
#
# Exits with 0 while that is so. Installs into a temporary folder; PYTHON chooses the interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datatrove==0.10.1 orjson==3.13.0
mkdir "$folder/data"
printf '{"text":\r"first"}\n{"text": "second"}\n' > "$folder/data/a.jsonl"
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import json
from datatrove.pipeline.readers import JsonlReader

records = [json.loads(line) for line in open("data/a.jsonl", newline="\n")]
assert [record["text"] for record in records] == ["first", "second"], "both lines are valid JSON"
texts = [document.text for document in JsonlReader("data").run()]
print("documents:", texts)
raise SystemExit(texts != ["second"])
END
