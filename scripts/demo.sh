#!/usr/bin/env bash
# Installs l4jax into .venv, if need be, and runs the demo. Arguments go to the demo: bash scripts/demo.sh --fast
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup ""
exec .venv/bin/python -m l4jax demo "$@"
