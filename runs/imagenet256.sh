#!/usr/bin/env bash
# The paper's system-level run on 8 GPUs, from a bare folder of ImageNet to gFID: DATA=imagenet runs/imagenet256.sh
set -euo pipefail
cd "$(dirname "$0")/.."
runs/setup.sh
PYTHON=.venv/bin/python exec runs/table4.sh
