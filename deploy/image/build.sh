#!/usr/bin/env bash
# Builds the image of Retinue and prints its name, which ends in a hash of all that went into it:
#     deploy/image/build.sh                                   on a base made from Debian packages
#     BASE=python:3.11-slim-bookworm deploy/image/build.sh    on a base from an image registry
#     ENGINE=docker BASE=... deploy/image/build.sh            with docker in place of podman
#
# Wheels are fetched here, by hash, with the pip of PYTHON and however that is set up; the build itself needs no network.
# An image whose inputs did not change is not built again. State is kept in .retinue/image.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
state="$root/.retinue/image"
PYTHON="${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}"
ENGINE="${ENGINE:-$here/podman-here.sh}"

hash_of() { (cd "$1" && find . -type f | LC_ALL=C sort | xargs -d '\n' sha256sum) | sha256sum | cut -c1-12; }

# Wheels for the image's Python and this machine's architecture, whatever Python runs pip.
fetch_wheels() {
  local arch; arch="$(uname -m)"
  "$PYTHON" -m pip download --quiet --require-hashes --only-binary=:all: -d "$1" \
    --implementation cp --python-version 3.11 --abi cp311 --abi abi3 --abi none \
    --platform "manylinux_2_34_$arch" --platform "manylinux_2_28_$arch" --platform "manylinux2014_$arch" \
    -r "$root/services/requirements.txt" -r "$here/requirements-build.txt" >&2
}

wheelhouse() {
  local want; want="$state/wheels-$(cat "$root/services/requirements.txt" "$here/requirements-build.txt" | sha256sum | cut -c1-12)"
  if [ ! -d "$want" ]; then
    rm -rf "$want.part" && mkdir -p "$want.part"
    fetch_wheels "$want.part"
    mv "$want.part" "$want"
  fi
  echo "$want"
}

lay_out_context() {
  mkdir -p "$1/src/clients/python" "$1/src/services"
  cp -al "$(wheelhouse)" "$1/wheels"
  cp "$root/services/requirements.txt" "$here/requirements-build.txt" "$here/Containerfile" "$1/"
  cp -a "$root/clients/python/pyproject.toml" "$root/clients/python/retinue" "$1/src/clients/python/"
  cp -a "$root/services/pyproject.toml" "$root/services/retinue_server" "$1/src/services/"
  find "$1/src" -name __pycache__ -type d -prune -exec rm -rf {} +
}

mkdir -p "$state"
base="${BASE:-$("$here/base.sh")}"
context="$(mktemp -d "$state/context.XXXXXX")"
trap 'rm -rf "$context"' EXIT
lay_out_context "$context"
name="localhost/retinue:$(printf '%s %s' "$base" "$(hash_of "$context")" | sha256sum | cut -c1-12)"

if ! "$ENGINE" image inspect "$name" >/dev/null 2>&1; then
  "$ENGINE" build --quiet -f "$context/Containerfile" --build-arg "BASE=$base" \
    --build-arg "VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/services/pyproject.toml")" \
    --build-arg "REVISION=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)" \
    -t "$name" "$context" >&2
fi
echo "$name"
