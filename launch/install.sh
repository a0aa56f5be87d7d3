# Sourced by the other scripts: makes .venv and installs the project with the named extras, once for each pyproject.toml.
# Usage: . launch/install.sh EXTRAS        PYTHON=python3.12 chooses the interpreter.
install() {
  local stamp=".venv/.installed-$1" python="${PYTHON:-python3}"
  if [ ! -x .venv/bin/python ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "error: Python 3.11 or newer is needed; name one with PYTHON=python3.12 $0" >&2
      return 2
    }
    echo "creating .venv"
    "$python" -m venv .venv
  fi
  if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "installing finetune[$1] into .venv (the first time takes a few minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$1]"
    touch "$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}
