#!/usr/bin/env bash
# Installs the package in every way a user may, each into a virtual environment of its own in a
# folder with a space in its name, and smoke-tests it. Takes minutes: not part of `make test`.
#
#   tests/packaging/check_install.sh [PYTHON...]      default: python3
#
# TORCH as in the Makefile. For a Python that pip finds no torch for, or with NO_TORCH=1, only the
# compiled modules are built, against the torch of the first one or of QWEN1M_TORCH_DIR (its headers
# are the same), and _host is imported. (Without NO_TORCH=1, pip may choose a CUDA build of torch.)
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export QWEN1M_CUDA=${QWEN1M_CUDA:-0} PIP_DISABLE_PIP_VERSION_CHECK=1
tools=("setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.13")
torch=${TORCH:-torch==2.13.0}
torch_dir=

smoke() { # <environment>: import, self-test, one completion, from outside the sources
  cd "$work"
  "$1/bin/python" -c "import qwen1m_ext; print('  imports', qwen1m_ext.__version__)"
  "$1/bin/qwen1m" doctor | tail -1
  "$1/bin/qwen1m" generate "Once upon a time" --max-tokens 8 --temperature 0 --quiet
}

for python in "${@:-python3}"; do
  version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
  env="$work/python $version"
  echo "== Python $version"
  "$python" -m venv "$env"
  pip=("$env/bin/python" -m pip --quiet)
  export PATH="$env/bin:$PATH"
  "${pip[@]}" install "${tools[@]}"
  if [ -z "${NO_TORCH:-}" ] && "${pip[@]}" install "$torch"; then
    cp -r "$root" "$work/a copy"
    rm -rf "$work/a copy/build" "$work/a copy/.venv"
    cd "$work/a copy"
    echo "-- sdist, wheel from the sdist, installation of the wheel"
    python -c "import setuptools.build_meta as b; b.build_sdist('$work/dist')" >/dev/null
    "${pip[@]}" wheel --no-build-isolation --no-deps -w "$work/dist" "$work"/dist/*.tar.gz
    "${pip[@]}" install "$work"/dist/*.whl
    smoke "$env"
    "${pip[@]}" uninstall --yes qwen1m_ext
    echo "-- editable installation"
    cd "$work/a copy"
    "${pip[@]}" install --no-build-isolation --editable .
    smoke "$env"
    torch_dir=$(cd "$work" && "$env/bin/python" -c \
      "import importlib.util as u, os; print(os.path.dirname(u.find_spec('torch').origin))")
    cp -r "$torch_dir" "$work/torch"
    torch_dir=$work/torch
    rm -rf "$work/a copy" "$work/dist"
  else
    echo "-- no torch: compiled modules only, against ${torch_dir:=${QWEN1M_TORCH_DIR:?names a torch package}}"
    cmake -S "$root" -B "$env/build" -G Ninja -DQWEN1M_TESTS=OFF -DQWEN1M_CUDA=0 \
      -DPython_EXECUTABLE="$env/bin/python" -DQWEN1M_TORCH_DIR="$torch_dir" \
      -DCMAKE_MESSAGE_LOG_LEVEL=NOTICE -DCMAKE_BUILD_TYPE=Release
    cmake --build "$env/build" --target _C _host >/dev/null
    cd "$env/build"
    "$env/bin/python" -c "import _host; print('  _host', _host.build_info())"
  fi
done
echo "every installation works"
