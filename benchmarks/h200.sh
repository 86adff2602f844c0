#!/usr/bin/env bash
# Ten minutes on one GPU (H200): what only the device can show. Every line is kept as soon as it is there.
#
#     benchmarks/h200.sh [FOLDER]        writes FOLDER/results.jsonl and a log of each check (default: h200-results)
#
# A check that fails, or takes longer than its limit, does not stop the others.
#
# DEVICE=cpu SMALL=1 benchmarks/h200.sh /tmp/try shows on any machine that the script itself works.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-h200-results}" && cd "${1:-h200-results}" && pwd)
device=${DEVICE:-cuda}
if [ -n "${SMALL:-}" ]; then # seconds on a CPU
    xl=dit-2xs-4 small=dit-2xs-4 adm=adm-2xs both=ldm-xs batch=4 few=4 steps=2 images=8 precision=float32
else
    xl=dit-xl-2 small=dit-s-2 adm=adm-256 both=dit-b-2 batch=256 few=32 steps=10 images=512 precision=bfloat16
fi
python=${PYTHON:-python}

check() { # NAME SECONDS WORDS...: the command's last line of output becomes a line of the results
    local name=$1 limit=$2 begin=$SECONDS rc=0
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.out" 2>"$out/$name.log" || rc=$?
    "$python" - "$name" "$rc" "$((SECONDS - begin))" "$out/$name.out" >>"$out/results.jsonl" <<'PYTHON'
import json, sys
name, rc, seconds, path = sys.argv[1:]
text = open(path, encoding="utf-8", errors="replace").read().strip()
try:
    found = json.loads(text)  # a document
except ValueError:
    try:
        found = json.loads(text.splitlines()[-1])  # or its last line
    except (ValueError, IndexError):
        found = None
print(json.dumps({"name": name, "exit": int(rc), "seconds": int(seconds), "found": found}))
PYTHON
    echo "$name: exit $rc, $((SECONDS - begin)) s"
}
probe() { # NAME SECONDS CHECK WORDS...
    local name=$1 limit=$2
    shift 2
    check "$name" "$limit" "$python" benchmarks/gpu_checks.py "$@" --device "$device"
}
harness=("$python" -m harness)

check doctor 60 "${harness[@]}" doctor --json
probe generator 60 generator
probe sync 60 sync --backbone "$small" --batch "$few" --precision "$precision"
check bench 120 "${harness[@]}" bench --backbone "$xl" --batch "$batch" --precision "$precision" --sampling-steps "$steps" --compile off --device "$device" --json
check bench-compiled 180 "${harness[@]}" bench --backbone "$xl" --batch "$batch" --precision "$precision" --sampling-steps "$steps" --compile on --stages training,sampling --device "$device" --json
probe memory 60 memory --backbone "$xl" --batch "$few" --precision "$precision"
probe memory-adm 60 memory --backbone "$adm" --batch "$((few / 4))" --precision "$precision"
probe repeat 60 repeat --backbone "$small" --batch "$few" --precision "$precision"
probe repeat-deterministic 60 repeat --backbone "$small" --batch "$few" --precision "$precision" --deterministic
probe checkpoint 60 checkpoint --backbone "$xl" --batch "$((few / 4))" --precision "$precision"
probe features 60 features --images "$images"
probe decoder 60 decoder --images "$((images / 8))"
check torchrun 90 "$python" -m torch.distributed.run --nproc-per-node 1 -m harness train --backbone "$small" --protocol digits --steps 20 --device "$device" --out "$out/torchrun-run"
export XLA_PYTHON_CLIENT_PREALLOCATE=false # torch is on the same device
check frameworks 120 bash -c "'$python' benchmarks/frameworks.py --backbones '$both' --precision '$precision' --device '$device' --runs 3 --out '$out/frameworks.json' >&2 && cat '$out/frameworks.json'"
echo "results: $out/results.jsonl"
