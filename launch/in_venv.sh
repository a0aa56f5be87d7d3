#!/usr/bin/env bash
# Runs a command with the tools of .venv; without a .venv, with those of the environment that is active.
PATH="$(dirname "$0")/../.venv/bin:$PATH" exec "$@"
