#!/usr/bin/env bash
# Build a virtual environment with torch and align: tools/make_venv.sh FOLDER [WHAT ...]
#
#   WHAT         what pip installs after torch (default: align itself, editable, with its tools)
#   PYTHON       the Python to build it with (default python3)
#   TORCH        cpu (default) or cuda; only Linux has two kinds of wheels
#   TORCH_INDEX  where the CPU wheels of torch lie
#
# Python 3.11 gets the versions of constraints/py311.txt, other Pythons the newest that
# pyproject.toml allows.
set -euo pipefail

venv=$1
shift
[ $# -gt 0 ] || set -- -e '.[dev,gguf]'
python=${PYTHON:-python3}
torch=${TORCH:-cpu}
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
pins=constraints/py311.txt

fail() {
  echo "make: $*" >&2
  exit 1
}

command -v "$python" >/dev/null || fail "$python: not found; name a Python >= 3.10: make PYTHON=..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$python is Python $version; 3.10 or newer is needed: make PYTHON=python3.11"
case $torch in cpu | cuda) ;; *) fail "TORCH=$torch: allowed are cpu and cuda" ;; esac

echo "building $venv (Python $version, torch for ${torch}): one to five minutes, once"
started=$SECONDS
if [ "$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != "$version" ]; then
  rm -rf "$venv"
  "$python" -m venv "$venv" || fail "$python -m venv failed; on Debian: apt install python3-venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

constraints=()
torch_wheel=torch
if [ "$version" = 3.11 ]; then
  constraints=(-c "$pins")
  torch_wheel=$(grep '^torch==' "$pins")
fi

kind=$("$venv/bin/python" -c 'import torch; print("cuda" if torch.version.cuda else "cpu")' 2>/dev/null || echo none)
if [ "$(uname -s)" = Linux ] && [ "$kind" != "$torch" ]; then
  if [ "$torch" = cuda ]; then
    pip install -qq --force-reinstall "${constraints[@]}" "$torch_wheel"
  else
    # asked for by its local version, so that pip never falls back to PyPI's CUDA build
    [ "$torch_wheel" = torch ] || torch_wheel="$torch_wheel+cpu"
    where=()
    if "$venv/bin/python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1] + "/torch/", timeout=10)' \
      "$index" 2>/dev/null; then
      where=(--extra-index-url "$index")
      [ "$torch_wheel" != torch ] || where=(--index-url "$index")
    elif [ "$torch_wheel" = torch ]; then
      fail "$index is not reachable; set TORCH_INDEX to a mirror, or use Python 3.11"
    fi
    pip install -qq --no-deps "${where[@]}" "$torch_wheel" ||
      fail "no $torch_wheel at $index; set TORCH_INDEX to a mirror, or TORCH=cuda for PyPI's build"
  fi
fi
pip install -qq "${constraints[@]}" "$@"
echo "$venv is ready after $((SECONDS - started)) s"
