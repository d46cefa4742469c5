#!/bin/sh
# Build the package, install the wheel into an empty environment, and run the demo there.
#
#   sh scripts/try_wheel.sh FOLDER     FOLDER is made; the wheel ends in FOLDER/dist
#
# BUILDER is a Python that has `build`; PYTHON the one the empty environment is made of.
set -eu
cd "$(dirname "$0")/.."
mkdir -p "$1"
folder=$(cd "$1" && pwd)
"${BUILDER:-python3}" -m build --outdir "$folder/dist" .
sh scripts/make_venv.sh "$folder/venv" "$(ls "$folder"/dist/*.whl)"
cd "$folder"
# Not the checkout, wherever Python is told to look.
unset PYTHONPATH || true
venv/bin/sidepath --version
venv/bin/sidepath doctor
venv/bin/sidepath demo --output demo-output
