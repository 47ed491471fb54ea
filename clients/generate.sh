#!/usr/bin/env bash
# Regenerates the committed stubs from protos/, each language with its own local plugins; --check fails on any difference.
# Python's are made with the oldest grpcio-tools we support, so that they import under every later runtime.
set -euo pipefail
cd "$(dirname "$0")/.."
out=clients
if [ "${1:-}" = --check ]; then out=$(mktemp -d); trap 'rm -rf "$out"' EXIT; fi
protos=$(cd protos && find retinue -name '*.proto' | sort)

python_stubs() {
  local tools=.retinue/generate target=$out/python
  if ! cmp -s clients/python/requirements-generate.txt "$tools/requirements.txt"; then
    rm -rf "$tools" && "${PYTHON:-python3}" -m venv "$tools"
    "$tools/bin/python" -m pip install -q --require-hashes -r clients/python/requirements-generate.txt
    cp clients/python/requirements-generate.txt "$tools/requirements.txt"
  fi
  mkdir -p "$target"
  # shellcheck disable=SC2086 # a list of files
  PATH="$tools/bin:$PATH" "$tools/bin/python" -m grpc_tools.protoc -Iprotos --python_out="$target" --grpc_python_out="$target" \
    --mypy_out="quiet:$target" --mypy_grpc_out="quiet:$target" $protos
}

python_stubs
if [ "$out" != clients ]; then
  (cd "$out/python" && find . -type f) | while read -r f; do
    cmp -s "$out/python/$f" "clients/python/$f" || { echo "clients/python/$f is not what protos/ gives: run make generate" >&2; exit 1; }
  done
fi
