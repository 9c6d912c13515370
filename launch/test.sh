#!/usr/bin/env bash
# Lint, format, types, then tests, stopping at the first that fails. Needs no root and no accelerator.
#
#   bash launch/test.sh                 everything but the slow tier, under 20 minutes on 2 cores
#   bash launch/test.sh --quick         the quick tier, under 3 minutes
#   bash launch/test.sh --slow          the slow tests alone
#   bash launch/test.sh -k rope         other arguments go to pytest

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup_env.sh dev

tier="not slow"
case "${1:-}" in
  --quick) tier="not slow and not medium"; shift ;;
  --slow) tier="slow"; shift ;;
esac

if [ "$tier" = slow ]; then
  # The compilers of chips that are not here.
  source launch/setup_env.sh chips
fi

export JAX_PLATFORMS=cpu
if [ "$tier" != slow ]; then
  # Most of the time goes into compiling what runs once. The slow tier, demo and benches compile as users do.
  export XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
fi
stage() { echo "[test] $*"; }

if [ "$tier" != slow ]; then
  stage "ruff check"; "$PYTHON" -m ruff check .
  stage "ruff format"; "$PYTHON" -m ruff format --check .
  stage "mypy"; "$PYTHON" -m mypy
fi

stage "pytest ($tier)"
# worksteal: a few files hold most of the time, and one of them must not keep a worker to itself.
code=0
"$PYTHON" -m pytest -n 2 --dist worksteal --durations 10 -m "$tier" "$@" || code=$?
if [ "$code" -eq 5 ] && [ "$tier" = slow ] && [ $# -eq 0 ]; then
  stage "there are no slow tests yet"
  code=0
fi
exit "$code"
