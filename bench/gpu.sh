#!/usr/bin/env bash
# GPU tests, then every benchmark; what is already in OUT is not done again.
#
#   bench/gpu.sh OUT                everything, however long it takes
#   bench/gpu.sh OUT next           as much as fits into MINUTES (9); exit status 75: call again
#   bench/gpu.sh OUT PART           one of the parts below, within MINUTES
#   bench/gpu.sh OUT ... --quick    tiny cases, also without a GPU: does the script still work?
#
# OUT gets tests.txt, parts.txt (what is finished) and a folder per device with the CSV files; it
# may be carried to another machine of the same kind and continued there. BUNDLE=FILE.tar.gz packs
# OUT into one file after each part, and fills an empty OUT from it at the start. Where the code is
# a copy without its repository, set BENCH_COMMIT. PYTHON is the interpreter (python3), RESEARCH a
# checkout of the research code, to compare with.
# Tests that fail are said and do not stop the measuring; a benchmark that a kernel ends (a broken
# GPU, no answer) is started again and passes that kernel over.
set -u

PARTS=(tests sparse24 metrics model bitmap select prune shapes)
UNFINISHED=75
BROKEN=76
TEST_SECONDS=240 # of one file of tests; they run side by side
usage() { sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2; }

quick=()
words=()
for word in "$@"; do
    if [ "$word" = --quick ]; then quick=(--quick); else words+=("$word"); fi
done
[ "${#words[@]}" -ge 1 ] && [ "${#words[@]}" -le 2 ] || usage
out=${words[0]}
what=${words[1]:-all}
case " all next ${PARTS[*]} " in *" $what "*) ;; *) usage ;; esac

mkdir -p "$out"
out=$(cd "$out" && pwd)
bundle=${BUNDLE:+$(realpath -m "$BUNDLE")}
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 1
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
limit=$((60 * ${MINUTES:-9}))
failures=0

left() { [ "$what" = all ] && echo "$limit" || echo $((limit - SECONDS)); }
tried() { grep -qE "^$1( failed)?$" "$out/parts.txt" 2>/dev/null; }
pack() { if [ -n "$bundle" ]; then tar -C "$out" -czf "$bundle.part" . && mv "$bundle.part" "$bundle"; fi; }
least() { [ "$1" -lt "$2" ] && echo "$1" || echo "$2"; }

# run COMMAND, killed if it overruns the time that is left by more than half a minute
bounded() { timeout --signal=INT --kill-after=15 $(($(left) + 30)) "$@"; }

benchmark() { # MODULE ARGUMENTS
    bounded "$python" -m "bench.$1" --output "$out" --brief \
        --minutes "$(($(left) / 60)).$(($(left) % 60 * 10 / 60))" "${quick[@]}" ${RESEARCH:+--research "$RESEARCH"} "${@:2}"
}

# the tests of one file; after one that breaks the GPU, those without it in a new process
test_file() { # FILE LOG SECONDS
    local status=$BROKEN without=() end=$((SECONDS + $3)) culprit
    : >"$2"
    while [ $status -eq $BROKEN ] && [ $SECONDS -lt $end ]; do
        OMP_NUM_THREADS=2 timeout --signal=INT --kill-after=15 $((end - SECONDS)) "$python" \
            -m pytest -q --color=no -p no:cacheprovider -m gpu "${without[@]}" "$1" >>"$2" 2>&1
        status=$?
        culprit=$(sed -nE 's/^!+ (.+) broke the GPU !+$/\1/p' "$2" | tail -n 1)
        [ -n "$culprit" ] && without+=(--deselect "$culprit")
    done
    [ $status -eq 5 ] && status=0 # nothing to test, or nothing but what broke the GPU
    [ ${#without[@]} -gt 0 ] && [ $status -eq 0 ] && status=1
    return $status
}

# one process per file, all at once: no plug-in needed
tests() {
    local files file pids=() failed=0 seconds
    mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests | sort)
    [ ${#quick[@]} -gt 0 ] && files=(tests/prunekernels/sparse/test_sparse24_gpu.py)
    seconds=$(least "$(left)" "$TEST_SECONDS")
    mkdir -p "$out/tests"
    for file in "${files[@]}"; do
        test_file "$file" "$out/tests/$(basename "$file" .py).txt" "$seconds" &
        pids+=($!)
    done
    : >"$out/tests.txt"
    for index in "${!files[@]}"; do
        wait "${pids[$index]}"
        local status=$? log
        log="$out/tests/$(basename "${files[$index]}" .py).txt"
        echo "${files[$index]}: status $status, $(tail -n 1 "$log")" | tee -a "$out/tests.txt" >&2
        if [ $status -ne 0 ]; then
            failed=1
            grep -E '^(FAILED|ERROR) ' "$log" | cut -c -200 | head -n 12 >&2
        fi
    done
    for file in "$out"/tests/*.txt; do
        printf '\n== %s\n' "$(basename "$file")" && cat "$file"
    done >>"$out/tests.txt"
    rm -r "$out/tests"
    return $failed
}

part() {
    case $1 in
    tests) tests ;;
    sparse24) benchmark bench_sparse --pattern 2:4 --model Llama-3-8B ;;
    bitmap) benchmark bench_sparse --pattern unstructured --model Llama-3-8B ;;
    metrics) benchmark bench_metrics ;;
    model) benchmark bench_model ;;
    select) benchmark bench_select ;;
    prune) benchmark bench_prune --layer 8B ;;
    shapes) benchmark bench_sparse ;; # other models' layers: long, and the least new
    esac
}

# do PART once; 0: finished, 75: more is left, 1: failed
attempt() {
    [ "$what" != "$1" ] && tried "$1" && return 0
    grep -qx "$1" "$out/parts.txt" 2>/dev/null && return 0
    local status=$BROKEN turns=0
    while [ $status -eq $BROKEN ] && [ $turns -lt 20 ]; do
        [ "$(left)" -lt 20 ] && return $UNFINISHED
        echo "== $1 ($(left) s left)" >&2
        part "$1"
        status=$?
        turns=$((turns + 1))
    done
    case $status in
    0) echo "$1" >>"$out/parts.txt" ;;
    "$UNFINISHED" | 124 | 137) status=$UNFINISHED ;; # out of time: the rows so far are safe
    *)
        echo "== $1 failed with status $status" >&2
        # tests cannot go on where they stopped: the next call has better things to do
        [ "$1" = tests ] && echo "tests failed" >>"$out/parts.txt"
        status=1
        ;;
    esac
    pack
    return $status
}

if [ -n "$bundle" ] && [ -f "$bundle" ] && [ -z "$(ls -A "$out")" ]; then
    tar -C "$out" -xzf "$bundle" || exit 1
fi
if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv \
        >"$out/machine.txt" 2>&1
fi
if [ "$what" != all ] && [ "$what" != next ]; then
    attempt "$what"
    exit
fi
for name in "${PARTS[@]}"; do
    attempt "$name"
    status=$?
    turns=1
    while [ "$what" = all ] && [ $status -eq $UNFINISHED ] && [ $turns -lt 20 ]; do
        attempt "$name"
        status=$?
        turns=$((turns + 1))
    done
    if [ $status -eq $UNFINISHED ]; then
        echo "== time is up in $name: call again" >&2
        exit $UNFINISHED
    fi
    [ $status -eq 0 ] || failures=$((failures + 1))
done
"$python" -m bench.summary "$out" >&2
echo "== done, $failures of ${#PARTS[@]} parts failed" >&2
[ $failures -eq 0 ] && ! grep -q ' failed$' "$out/parts.txt"
