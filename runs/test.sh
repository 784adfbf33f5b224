#!/usr/bin/env bash
# Sets up and runs all tests in two processes, without network once the packages are there.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/setup.sh requirements-test.txt
exec .venv/bin/python -m pytest -q -n 2 --dist=loadfile tests "$@"
