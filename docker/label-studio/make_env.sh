#!/usr/bin/env bash
# Makes the environment that a Label Studio of one's own runs in: docker/label-studio/make_env.sh FOLDER
# It is apart from Goldgate's own because its pins (of some 150 packages) do not fit beside Prefect's and MLflow's.
# The file goldgate-label-studio.txt is written last; an environment without it is half made, and is made anew.
set -euo pipefail

folder=$(realpath -m "${1:?usage: make_env.sh FOLDER}")
cd "$(dirname "$(realpath "$0")")"

# What the environment was made from: the same inputs need no second making.
recipe=$(cat make_env.sh constraints.txt | sha256sum | cut -d' ' -f1)
if [ -f "$folder/goldgate-label-studio.txt" ] && grep -qx "recipe $recipe" "$folder/goldgate-label-studio.txt"; then
    echo "Label Studio's environment is up to date: $folder"
    exit 0
fi

echo "Making Label Studio's environment in $folder (about 2 minutes and 1 GB)"
rm -rf "$folder"
"${PYTHON:-python3.11}" -m venv "$folder"
echo '*' >"$folder/.gitignore"
"$folder/bin/pip" install --quiet label-studio==1.23.2 --constraint constraints.txt
"$folder/bin/python" -c 'from importlib.metadata import version; print("Label Studio", version("label-studio"))'
printf 'recipe %s\n' "$recipe" >"$folder/goldgate-label-studio.txt"
echo "Done: $folder"
