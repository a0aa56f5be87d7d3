# shellcheck shell=bash
# Sourced by the other scripts: makes a virtual environment, installs the project into it, and puts it first in PATH.
# Usage: install EXTRAS [ENVIRONMENT [CONSTRAINTS]]
#   ENVIRONMENT   its folder (.venv)
#   CONSTRAINTS   a file that pins versions; without it pip takes the newest that pyproject.toml allows
# PYTHON=python3.12 chooses the interpreter of an environment that is made. It is installed anew if pyproject.toml, the
# version or the constraints have changed.
install() {
  local extras="$1" environment="${2:-.venv}" constraints="${3:-}" python="${PYTHON:-python3}"
  local stamp="$environment/.installed-$extras" wanted pins=()
  if [ ! -x "$environment/bin/python" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "error: Python 3.11 or newer is needed; name one with PYTHON=python3.12 $0" >&2
      return 2
    }
    echo "creating $environment"
    "$python" -m venv "$environment"
  elif [ -n "${PYTHON:-}" ] && [ "$(version_of "$python")" != "$(version_of "$environment/bin/python")" ]; then
    echo "error: $environment has Python $(version_of "$environment/bin/python"), not that of PYTHON=$PYTHON;" \
      "remove the folder to make it anew" >&2
    return 2
  fi
  if [ -n "$constraints" ]; then
    pins=(--constraint "$constraints")
  fi
  wanted="$(cat pyproject.toml finetune/__init__.py ${constraints:+"$constraints"} | cksum)"
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "installing finetune[$extras] into $environment (the first time takes a few minutes)"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check ${pins[@]+"${pins[@]}"} -e ".[$extras]"
    echo "$wanted" > "$stamp"
  fi
  export PATH="$PWD/$environment/bin:$PATH"
}

version_of() {
  "$1" -c 'import platform; print(platform.python_version())'
}
