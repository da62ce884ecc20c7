#!/bin/bash
# The first hour on a GPU as one command: is everything right on it, and how fast is it.
#
#   tools/bench/first_hour.sh --out results            all sections, about half an hour on one GPU
#   tools/bench/first_hour.sh --out results --quick    some minutes, most of them compiling; --limit-s ends it
#   tools/bench/first_hour.sh --device cpu --quick     small sizes on a processor, to try the script itself
#
# Needs megassm and its requirements, no data and no network. Results: results.jsonl, one object a section; log.txt.
set -u
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" tools/bench/first_hour.py "$@"
