#!/usr/bin/env bash
# Build distillserve-{rollout,teacher,trainer}:$BACKEND. Further arguments go to `docker build`.
set -euo pipefail
cd "$(dirname "$0")/.."
backend="${BACKEND:-gpu}"
for role in rollout teacher trainer; do
    docker build --file docker/Dockerfile --target "$role" --build-arg BACKEND="$backend" \
        --tag "distillserve-$role:$backend" "$@" .
done
