#!/usr/bin/env bash
# podman with the settings that this machine needs, without changing any file of the machine:
#     deploy/image/podman-here.sh run --rm localhost/retinue:... --help
#
# A privileged podman asks for rlimits that a sandbox may forbid, and crun refuses a hybrid of cgroups v1 and v2. Where
# one of these holds, podman reads the file made here in place of the machine's containers.conf. CONTAINERS_CONF wins.
set -euo pipefail

cannot_raise_limits() { [ "$(id -u)" = 0 ] && ! (ulimit -n 1048576) 2>/dev/null; }
has_old_cgroups() { [ "$(stat -fc %T /sys/fs/cgroup)" != cgroup2fs ]; }

settings() {
  if cannot_raise_limits; then
    printf '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'
  fi
  if has_old_cgroups && command -v runc >/dev/null; then
    printf '[engine]\nruntime = "runc"\n'
  fi
}

if [ -z "${CONTAINERS_CONF:-}" ]; then
  needed=$(settings)
  if [ -n "$needed" ]; then
    state="$(cd "$(dirname "$0")/../.." && pwd)/.retinue/image"
    mkdir -p "$state"
    # Moved into place, since another podman may be reading it.
    printf '%s\n' "$needed" >"$state/containers.conf.$$"
    mv "$state/containers.conf.$$" "$state/containers.conf"
    export CONTAINERS_CONF="$state/containers.conf"
  fi
fi
exec podman "$@"
