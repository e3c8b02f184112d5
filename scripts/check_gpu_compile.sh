#!/usr/bin/env bash
# Compiles every GPU kernel for H100 and H200 (sm_90); needs no GPU. Exit code 1 if one does not compile.
# Makes .venv-gpu (5 GB, with CUDA's compiler) the first time. Arguments are words of the names of calls to choose.
#   bash scripts/check_gpu_compile.sh                   all, about a minute of one core
#   bash scripts/check_gpu_compile.sh Scout decode      calls with these two words in their names
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
export PIP_NO_CACHE_DIR=1
setup "[gpu]" .venv-gpu
# JAX_PLATFORMS: nothing runs here. TF_CPP_MIN_LOG_LEVEL: the plugin would report that it finds no GPU.
JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 PYTHONPATH=. exec .venv-gpu/bin/python scripts/check_gpu_compile.py "$@"
