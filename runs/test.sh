#!/usr/bin/env bash
# Sets up and runs all tests, without network once the packages are there.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/setup.sh requirements-test.txt
exec .venv/bin/python -m pytest -q tests "$@"
