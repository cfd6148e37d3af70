#!/usr/bin/env bash
# Makes the environment that vLLM runs in: docker/vllm/make_env.sh FOLDER [cpu|cuda]
# It is apart from Goldgate's own because their pins do not fit together (fastapi, transformers).
# Without the second argument: cuda where `nvidia-smi` finds a device, else cpu.
# The file goldgate-vllm.txt is written last; an environment without it is half made, and is made anew.
set -euo pipefail

folder=$(realpath -m "${1:?usage: make_env.sh FOLDER [cpu|cuda]}")
device=${2:-}
if [ -z "$device" ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then device=cuda; else device=cpu; fi
fi
cd "$(dirname "$(realpath "$0")")"
if [ ! -f "requirements-$device.txt" ]; then
    echo "make_env.sh: unknown device '$device'; use cpu or cuda" >&2
    exit 2
fi

# What the environment was made from: the same inputs need no second making.
recipe=$(cat make_env.sh "requirements-$device.txt" "constraints-$device.txt" stubs/*/pyproject.toml | sha256sum | cut -d' ' -f1)
if [ -f "$folder/goldgate-vllm.txt" ] && grep -qx "recipe $recipe" "$folder/goldgate-vllm.txt"; then
    echo "vLLM environment for $device is up to date: $folder"
    exit 0
fi

echo "Making the vLLM environment for $device in $folder (about 2 minutes and 3.4 GB for cpu, more for cuda)"
rm -rf "$folder"
"${PYTHON:-python3.11}" -m venv "$folder"
# The CPU build of torch is not on PyPI itself: where the configured indexes lack it, PyTorch's own has it.
if [ "$device" = cpu ] && ! "$folder/bin/pip" install --quiet --constraint constraints-cpu.txt torch; then
    echo "Taking torch from download.pytorch.org"
    "$folder/bin/pip" install --quiet --constraint constraints-cpu.txt torch \
        --extra-index-url https://download.pytorch.org/whl/cpu
fi
"$folder/bin/pip" install --quiet --requirement "requirements-$device.txt" --constraint "constraints-$device.txt"
"$folder/bin/python" -c 'import vllm; print("vllm", vllm.__version__, "imports")'
printf 'device %s\nrecipe %s\n' "$device" "$recipe" >"$folder/goldgate-vllm.txt"
echo "Done: $folder"
