#!/usr/bin/env bash
# The whole test suite, on a fresh machine: install, lint, import contract, types, tests.
# Usage: launch/test.sh [--full] [--torch X] [arguments of pytest]
#   --full      the long matrices, too
#   --torch X   the tests alone on another release of torch, in an environment of its own, .venv-torch-X
# PYTHON=python3.12 chooses the interpreter. All other packages have the versions of launch/constraints.txt. Without a GPU,
# name PyTorch's index of CPU builds in PIP_EXTRA_INDEX_URL: its torch is a tenth of the size.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/install.sh

select="not full" torch=""
while [ $# -gt 0 ]; do
  case "$1" in
    --full) select="" ;;
    --torch)
      torch="${2:-}"
      [[ "$torch" =~ ^[0-9]+(\.[0-9]+)+$ ]] || { echo "error: --torch wants a release, such as 2.11.0" >&2; exit 2; }
      shift ;;
    *) break ;;
  esac
  shift
done

export OMP_NUM_THREADS=1
if [ -z "$torch" ]; then
  install dev .venv launch/constraints.txt
  shellcheck -x launch/*.sh launch/slurm.sbatch .ci/run
  ruff check .
  ruff format --check .
  lint-imports
  mypy
else  # torch's own types differ between releases, and lint does not
  environment=".venv-torch-$torch"
  mkdir -p "$environment"
  { grep -v '^torch==' launch/constraints.txt; echo "torch==$torch"; } > "$environment/constraints.txt"
  install dev "$environment" "$environment/constraints.txt"
fi
python -m pytest -m "$select" -n 2 --dist loadfile "$@"  # a file's tests share what they set up
