#!/usr/bin/env bash
# Serves one merged model over the OpenAI-compatible protocol; further arguments go to `vllm serve`.
# The decoding is that of the evaluation: the same dtype, and no sampling defaults from the model's own files.
set -euo pipefail

if [ -z "${GOLDGATE_SERVE_MODEL:-}" ]; then
    echo "serve.sh: no model to serve. Set GOLDGATE_SERVE_MODEL to the folder of a merged model in the store" >&2
    exit 2
fi
if [ ! -f "$GOLDGATE_SERVE_MODEL/config.json" ]; then
    echo "serve.sh: $GOLDGATE_SERVE_MODEL holds no model (no config.json). Set GOLDGATE_SERVE_MODEL to the folder of a merged model in the store" >&2
    exit 2
fi

# As the engine does: float32 where the CPU build runs (few CPUs multiply bfloat16 in hardware), bfloat16 on CUDA.
case "$(vllm --version)" in
    *cpu*) dtype=float32 ;;
    *) dtype=bfloat16 ;;
esac

# --shutdown-timeout: without it, stopping waits minutes for requests under way.
exec vllm serve "$GOLDGATE_SERVE_MODEL" \
    --host 0.0.0.0 --port 8000 \
    --served-model-name goldgate \
    --dtype "$dtype" \
    --generation-config vllm \
    --shutdown-timeout 20 \
    "$@"
