#!/usr/bin/env bash
# What a GPU is needed for, in calls of under nine minutes each:
#
#     bench/gpu.sh [--again] [--wheels DIR] [--seconds PART=N]... [--dry-run] [PART ...] [-- OPTION ...]
#
# PART      correctness, kernels, peers, train-e; none named: these, in this order, except those whose rows of this
#           source on this device are there already (--again repeats them; so does naming them).
#           By name alone, each a call of its own: train-a (attention cores at 32k and 128k), train-b (2 and 4 layers at
#           128k and 512k against the memory plan), train-c (whole 8B and 7B models, an NPO step at 32k and 128k),
#           train-d (one measure after another at 32k). train: train-a to train-e one after another, 40 minutes
# --wheels  a folder of wheels of liger-kernel, cut-cross-entropy, quack-kernels, trl and whatever they want; installed
#           beside nothing, without a network. What is not there is reported and left out; wheels of torch and triton
#           are not taken, as the peers would run on another torch than the kernels they are compared with
# --seconds a part's share of the time; past it the part takes no new shapes and says which it left out
# --dry-run shapes of a few rows on the CPU with the torch backend: tries the scripts, by default in a temporary $OUT
# -- ...    options for the parts themselves (python -m bench.gpu_kernels --help)
#
# Wants python3 (or $PYTHON) with torch, triton and transformers. Writes $OUT/gpu_PART.jsonl, a row as soon as it is
# measured, and $OUT/gpu_PART.log ($OUT defaults to bench/results); prints a table of the rows last. The exit status is
# 1 if a part failed; a missing peer is no failure.
set -uo pipefail

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }
root="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-python3}"
all=(correctness kernels peers train-e)
# 445 s without train-a to train-d, and at most 20 more each for imports and for a part that does not stop by itself:
# 525 in all, and for each of those four as well
declare -A seconds=([correctness]=145 [kernels]=165 [peers]=75 [train-e]=60)
seconds+=([train-a]=420 [train-b]=500 [train-c]=500 [train-d]=500)
grace=15
again=0 dry=0 wheels="" parts=() options=()

while [ $# -gt 0 ]; do
    case "$1" in
        --again) again=1 ;;
        --wheels) wheels="$(cd "${2:?--wheels wants a folder}" && pwd)" || exit 2; shift ;;
        --seconds)
            case "${2:-}" in
                correctness=* | kernels=* | peers=* | train-[a-e]=*) seconds["${2%%=*}"]="${2#*=}"; shift ;;
                *) echo "--seconds wants PART=N" >&2; exit 2 ;;
            esac ;;
        --dry-run) options+=(--device cpu --backend torch --tiny); dry=1 ;;
        --help | -h) usage; exit 0 ;;
        --) shift; options+=("$@"); break ;;
        correctness | kernels | peers | train-[a-e]) parts+=("$1") ;;
        train) parts+=(train-a train-b train-c train-d train-e) ;;
        *) echo "unknown argument: $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
if [ ${#parts[@]} -eq 0 ]; then
    parts=("${all[@]}")
    [ "$again" = 1 ] || options+=(--if-missing)
fi

# what a dry run writes is no result
[ "$dry" = 1 ] && OUT="${OUT:-$(mktemp -d)}"
out="${OUT:-$root/bench/results}"
mkdir -p "$out" && out="$(cd "$out" && pwd)" || exit 2
cd "$root" || exit 2
export PYTHONPATH=".:kernels" PYTHONUNBUFFERED=1
# shapes of many sizes in one process; torch 2.11 to 2.13 read this name, and its successor is not read by all
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-${PYTORCH_ALLOC_CONF:-expandable_segments:True}}"

if [ -n "$wheels" ]; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    for wheel in "$wheels"/*.whl; do
        case "$(basename "$wheel")" in
            torch-* | triton-* | pytorch_triton*)
                echo "peers: $(basename "$wheel") is left out: torch and triton are the machine's" >&2
                continue ;;
        esac
        # one by one: a wheel that does not fit this Python leaves the others
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
            --upgrade --target "$site" "$wheel" || echo "peers: $(basename "$wheel") was not installed" >&2
    done
fi

failed=()
for part in "${parts[@]}"; do
    case "$part" in
        peers) command=(bench.gpu_kernels --peers) ;;
        train-a) command=(bench.gpu_attention) ;;
        train-[b-d]) command=(bench.gpu_context "$part") ;;
        train-e) command=(bench.gpu_train) ;;
        *) command=("bench.gpu_$part") ;;
    esac
    path="$PYTHONPATH"
    # first, so that a peer's own requirements are found before the machine's; the working directory stays before it
    [ "$part" = peers ] && [ -n "$wheels" ] && path="$site:$PYTHONPATH"
    echo "== $part, ${seconds[$part]} s"
    log="$out/gpu_$part.log"
    PYTHONPATH="$path" timeout --kill-after=5 "$((seconds[$part] + grace))" \
        "$python" -m "${command[@]}" --out "$out" --seconds "${seconds[$part]}" ${options[@]+"${options[@]}"} \
        >"$log.new" 2>&1
    status=$?
    # a part that found its rows there has nothing to log
    if grep -q "rows of this source on this device exist" "$log.new"; then
        cat "$log.new"; rm "$log.new"
    else
        mv "$log.new" "$log"; tail -n 3 "$log"
    fi
    [ "$status" = 0 ] || failed+=("$part (status $status)")
done

echo
"$python" -m bench.gpu_summary --out "$out" "${parts[@]}"
if [ ${#failed[@]} -gt 0 ]; then
    echo
    echo "failed: ${failed[*]}"
    exit 1
fi
