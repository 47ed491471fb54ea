#!/usr/bin/env bash
# Makes a base image with Python 3.11 from Debian packages, where no image registry can be reached, and prints its name:
#     BASE=$(deploy/image/base.sh)
#     deploy/image/base.sh memcached redis-server          with these packages besides
#
# It is made once for each state of this file; a newer security update comes with `REFRESH=1 deploy/image/base.sh`.
# Needs root, mmdebstrap and podman; fetches what apt fetches on this machine.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"

SUITE=bookworm
PACKAGES="$(IFS=,; echo "python3,ca-certificates,tzdata${*:+,$*}")"
name="localhost/retinue-base:$SUITE-$(printf '%s %s' "$(cat "$0")" "$PACKAGES" | sha256sum | cut -c1-12)"

if [ -z "${REFRESH:-}" ] && "$here/podman-here.sh" image exists "$name"; then
  echo "$name"
  exit
fi

rootfs="$(mktemp -d)"
trap 'rm -rf "$rootfs"' EXIT
mmdebstrap --quiet --variant=minbase --include="$PACKAGES" \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  "$SUITE" "$rootfs/rootfs.tar" >&2
"$here/podman-here.sh" import --quiet \
  --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
  --change 'CMD ["python3"]' "$rootfs/rootfs.tar" "$name" >/dev/null
echo "$name"
