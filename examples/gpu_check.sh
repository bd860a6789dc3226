#!/usr/bin/env bash
# Measures everything that wants a GPU, in less than ten minutes, and writes it into one folder:
#
#     examples/gpu_check.sh openai/clip-vit-base-patch16 gpu-results [runs/my-run pictures]
#
# MODEL is a Hub id, or a folder with config and tokenizer (random weights: the same times). With a run and its pictures,
# prediction from files and half precision are measured on them too. Smaller: CLASSES="5 10" BATCH=2 STEPS=1
# METHODS="coop maple". A part that fails or takes too long is listed at the end of summary.txt, and the others go on; what
# a part had measured until then is in its .md file. Without a GPU it runs on the CPU, where PATIENCE=10 lets each part
# take ten times as long.
set -euo pipefail
model=${1:?"name a CLIP: a Hub id or a folder"} out=$(realpath -m "${2:?name a folder for the results}")
[ -e "$model" ] && model=$(realpath "$model")
run=${3:-} pictures=${4:-}
[ -e "$run" ] && run=$(realpath "$run")
[ -e "$pictures" ] && pictures=$(realpath "$pictures")
cd "$(dirname "$0")/.."
mkdir -p "$out"
read -ra classes <<< "${CLASSES:-100 1000}"
read -ra methods <<< "${METHODS:-coop kgcoop cocoop maple ivlp promptsrc mmrl mutual_prompt tgpt lora two_stage}"
failed=()

part() { # NAME SECONDS COMMAND...: its output goes to NAME.txt and to the summary
    echo "== $1" | tee -a "$out/summary.txt"
    echo "+ ${*:3}" > "$out/$1.log"
    if timeout $(($2 * ${PATIENCE:-1})) "${@:3}" > "$out/$1.txt" 2>> "$out/$1.log"; then
        tee -a "$out/summary.txt" < "$out/$1.txt"
    else
        failed+=("$1 (see $1.log)")
    fi
}

: > "$out/summary.txt"
part environment 60 python -c '
import torch, transformers, peft, hf_tgpt
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{gpu}; torch {torch.__version__}, CUDA {torch.version.cuda}, transformers {transformers.__version__}, "
      f"peft {peft.__version__}, hf-tgpt {hf_tgpt.__version__}")'
part exactness 60 python -m pytest -q -p no:cacheprovider tests/encoders/test_exactness.py
made=$(mktemp -d) # random weights are read faster than made
trap 'rm -rf "$made"' EXIT
part model 60 python -c '
import sys, transformers, hf_tgpt
hf_tgpt.load_clip(sys.argv[1]).save_pretrained(sys.argv[2])
transformers.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])' "$model" "$made"
measure=(python examples/benchmark.py --same_process --model "$made" --batch "${BATCH:-8}" --steps "${STEPS:-5}")
measure+=(--classes "${classes[@]}")
part steps 240 "${measure[@]}" --methods "${methods[@]}" --paths ours floor --mixed_precision no bf16 --json "$out/steps.json"
part cached 60 "${measure[@]}" --methods coop kgcoop tgpt --paths ours floor --cached --json "$out/cached.json"
part reference 60 "${measure[@]}" --methods coop maple tgpt --paths ours reference floor --json "$out/reference.json"
part loading 45 python examples/benchmark_loading.py --workers 0 4 8
if [ -n "$run" ]; then
    part prediction 60 python examples/benchmark_predict.py "$pictures" --adapter "$run" --rounds 3
    part precision 60 python examples/benchmark_precision.py "$run" --dataset "$pictures" --dtypes bf16 fp16
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" | tee -a "$out/summary.txt"
    exit 1
fi
