#!/usr/bin/env bash
# Installs l4jax with everything that the tests compare it with, and runs them. Arguments go to pytest.
# libtpu is among it: kernels are compiled for real TPUs, ahead of time and without one.
#   bash scripts/test.sh               all tests; a missing oracle (torch, transformers, llama-models) fails
#   bash scripts/test.sh --no-oracle   without torch and transformers: stored arrays serve in their place
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
case " $* " in
  *" --no-oracle "*) setup "[test,video,tpu]" ;;
  *) setup "[test,oracle,video,tpu]" ;;
esac
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
