#!/bin/sh
# Run a command as the owner of the folder $RUN_AS_OWNER_OF and with no privilege, so that what it writes belongs to
# whoever started the stack. As anybody but root, or without the variable, run it as it is.
set -eu
if [ "$(id -u)" -ne 0 ] || [ -z "${RUN_AS_OWNER_OF:-}" ]; then exec "$@"; fi
uid=$(stat -c %u "$RUN_AS_OWNER_OF")
gid=$(stat -c %g "$RUN_AS_OWNER_OF")
exec setpriv --reuid="$uid" --regid="$gid" --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs "$@"
