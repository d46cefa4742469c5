#!/bin/sh
# Make an environment, in about half a minute where wheels are near.
#
#   sh scripts/make_venv.sh                 .venv, with everything the make targets need
#   sh scripts/make_venv.sh FOLDER WHEEL    another one, with that wheel and what it needs
#   EXTRAS=A,B sh scripts/make_venv.sh FOLDER    another one, with these extras of the checkout
#
# Torch: constraints.txt asks for one exact version. Where pip is configured with find-links
# (a folder of wheels), uv is handed the same, and takes the wheel that lies there. Elsewhere uv
# chooses the build by itself (--torch-backend=auto): CUDA where an NVIDIA driver is, else the CPU
# build, about 200 MB instead of several GB.
set -eu
venv="${1:-.venv}"
wheel="${2:-}"
python="${PYTHON:-python3}"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
links="${PIP_FIND_LINKS:-$("$venv/bin/python" -m pip config get global.find-links 2>/dev/null || true)}"
set -- --quiet --python "$venv/bin/python" --constraint constraints.txt
if [ -n "$links" ]; then
  for link in $links; do set -- "$@" --find-links "$link"; done
else
  set -- "$@" --torch-backend=auto
fi
if [ -n "$wheel" ]; then set -- "$@" "$wheel"; else set -- "$@" --editable ".[${EXTRAS:-dev}]"; fi
"$venv/bin/python" -m uv pip install "$@"
touch "$venv/installed"
