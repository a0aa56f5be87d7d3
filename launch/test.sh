#!/usr/bin/env bash
# The whole test suite, on a fresh machine: install, lint, import contract, tests. --full adds the long matrices;
# other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/install.sh
install dev

select="not full"
if [ "${1:-}" = "--full" ]; then
  select=""
  shift
fi
export OMP_NUM_THREADS=1
ruff check .
ruff format --check .
lint-imports
python -m pytest -m "$select" -n 2 --dist loadfile "$@"  # a file's tests share what they set up
