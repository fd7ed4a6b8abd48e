#!/usr/bin/env bash
# All stages of RIL on NLVR: real pictures, sentences that people wrote.
# Usage: scripts/nlvr.sh NLVR_FOLDER [qwen|internvl] [--section.key value ...]
# Everything lands in runs/nlvr. Stop it at any time; the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 1 ] || [ ! -f "$1/train.jsonl" ]; then
    echo "usage: scripts/nlvr.sh NLVR_FOLDER [qwen|internvl] [--section.key value ...]" >&2
    exit 2
fi
source_folder=$1
student=${2:-qwen}
shift $(($# > 1 ? 2 : 1))
python=${PYTHON:-.venv/bin/python}
out=runs/nlvr
data=(--data.train $out/data/train.jsonl --data.validation $out/data/validation.jsonl)
export TOKENIZERS_PARALLELISM=false
threads=${OMP_NUM_THREADS:-1}

[ -f $out/data/validation.jsonl ] || $python -m playground.nlvr --source "$source_folder" --out $out/data

build() { # name, then sizes
    local name=$1
    shift
    $python -m playground.build --out "$out/models/$name" --texts $out/data/train.jsonl \
        --max-pixels 23520 --tile-size 56 --max-tiles 4 "$@"
}
teacher_a() {
    build teacher_a --architecture qwen2_5_vl --hidden-size 96 --num-layers 4
    $python -m openril.cli sft recipes/nlvr/teacher_a.yaml "${data[@]}"
}
teacher_b() {
    build teacher_b --architecture internvl --tokenizer unigram --hidden-size 96 --num-layers 4
    $python -m openril.cli sft recipes/nlvr/teacher_b.yaml "${data[@]}"
}
others() {
    build student_qwen --architecture qwen2_5_vl --hidden-size 64 --num-layers 3
    build student_internvl --architecture internvl --hidden-size 64 --num-layers 3
}
judge() {
    $python -m playground.judge --out $out/models/judge --train $out/data/train.jsonl \
        --validation $out/data/validation.jsonl --steps "${JUDGE_STEPS:-300}"
}

# Two lanes: two jobs of one thread beat one job of two.
export OMP_NUM_THREADS=1
(teacher_a && judge) &
lane=$!
# A stage that is asked to stop saves first. (Children of a script ignore Ctrl-C; they are told here.)
trap 'pkill -TERM -P $lane 2>/dev/null; kill $lane 2>/dev/null; wait $lane 2>/dev/null || true' EXIT
teacher_b
others
wait $lane

export OMP_NUM_THREADS=$threads
$python -m playground.serve $out/models/judge --port 8132 --with-parent &
lane=$!
until $python -c "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8132/v1/models')" 2>/dev/null; do
    kill -0 $lane
    sleep 1
done
$python -m openril.cli run "recipes/nlvr/student_$student.yaml" "${data[@]}" "$@"
