#!/usr/bin/env bash
# Builds the images of a machine without a registry, and prints the settings that name them.
set -euo pipefail
cd "$(dirname "$0")"

base=batchlab-offline/base:trixie
localstack=batchlab-offline/localstack:4.14.0
postgres=batchlab-offline/postgres:17
instance=batchlab-offline/instance:trixie
say() { printf '%s\n' "$*" >&2; }

certificates="${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}"
[ -r "$certificates" ] || certificates=/dev/null
build() { # dockerfile, tag
  docker build -q --build-arg "BASE_IMAGE=$base" --secret "id=ca_bundle,src=$certificates" \
    -f "$1" -t "$2" . >&2
}

if ! docker image inspect "$base" >/dev/null 2>&1; then
  say "the base image (debootstrap)"
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv trixie \
    "$folder/rootfs" "${BATCHLAB_DEBIAN_MIRROR:-http://deb.debian.org/debian}" >&2
  # A copy of this machine's package manager settings may not work in a container.
  rm -rf "$folder"/rootfs/var/cache/apt/* "$folder"/rootfs/var/lib/apt/lists/*
  tar -C "$folder/rootfs" -cf "$folder/rootfs.tar" .
  docker build -q -f Dockerfile.base -t "$base" "$folder" >&2
fi
say "LocalStack"
build Dockerfile.localstack "$localstack"
say "PostgreSQL"
build Dockerfile.postgres "$postgres"
say "an instance"
build Dockerfile.instance "$instance"

cat <<SETTINGS
export BATCHLAB_BASE_IMAGE=$base
export BATCHLAB_LOCALSTACK_IMAGE=$localstack
export BATCHLAB_LOCALSTACK_READ_ONLY=true
export BATCHLAB_POSTGRES_IMAGE=$postgres
export BATCHLAB_INSTANCE_IMAGE=$instance
SETTINGS
