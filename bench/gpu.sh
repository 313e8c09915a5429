#!/usr/bin/env bash
# GPU tests, then every benchmark; what is already in OUT is not done again.
#
#   bench/gpu.sh OUT                everything, however long it takes
#   bench/gpu.sh OUT next           as much as fits into MINUTES (6); exit status 75: call again
#   bench/gpu.sh OUT PART           one of the parts below, within MINUTES
#   bench/gpu.sh OUT profile        ncu on the kernels that match KERNELS (a regular expression)
#   bench/gpu.sh OUT ... --quick    tiny cases, also without a GPU: does the script still work?
#
# Parts, by interest: tests candidates sparse24 metrics bitmap model select prune shapes. With
# `next` each part has a time box, so that a long one leaves the others their share; what is left of
# the minutes goes to the unfinished ones in the same order.
# OUT gets tests.txt, parts.txt (what is finished), host.csv and a folder per device with CSV files; it
# may be carried to another machine of the same kind and continued there. BUNDLE=FILE.tar.gz packs
# OUT into one file after each part, and fills an empty OUT from it at the start. Where the code is
# a copy without its repository, set BENCH_COMMIT. PYTHON is the interpreter (python3), RESEARCH a
# checkout of the research code, to compare with, JOBS the processes that test and compile side by
# side (three fewer than there are processors).
# Failing tests do not stop the measuring; a benchmark that a kernel ends (a broken GPU, no answer)
# is started again and passes that kernel over.
set -u

PARTS=(tests candidates sparse24 metrics bitmap model select prune shapes)
declare -A BOX=([tests]=150 [candidates]=90 [sparse24]=75 [metrics]=60 [bitmap]=60 [model]=90
    [select]=45 [prune]=60 [shapes]=60) # seconds of a part's first turn
UNFINISHED=75
BROKEN=76
TEST_SECONDS=240 # of one file of tests, where they run in a process per file
usage() { sed -n '2,23s/^# \{0,1\}//p' "$0" >&2; exit 2; }

quick=()
words=()
for word in "$@"; do
    if [ "$word" = --quick ]; then quick=(--quick); else words+=("$word"); fi
done
[ "${#words[@]}" -ge 1 ] && [ "${#words[@]}" -le 2 ] || usage
out=${words[0]}
what=${words[1]:-all}
case " all next profile ${PARTS[*]} " in *" $what "*) ;; *) usage ;; esac

mkdir -p "$out"
out=$(cd "$out" && pwd)
bundle=${BUNDLE:+$(realpath -m "$BUNDLE")}
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 1
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
limit=$((60 * ${MINUTES:-6}))
failures=0
jobs=${JOBS:-$(($(nproc) > 4 ? $(nproc) - 3 : 1))}
box=0 # when the part that runs has had its share, in seconds since the start; 0: it has no box

left() { # seconds that the part may still take
    if [ "$what" = all ]; then
        echo "$limit"
    elif [ "$box" -gt 0 ] && [ "$box" -lt "$limit" ]; then
        echo $((box - SECONDS))
    else
        echo $((limit - SECONDS))
    fi
}
tried() { grep -qE "^$1( failed)?$" "$out/parts.txt" 2>/dev/null; }
pack() { if [ -n "$bundle" ]; then tar -C "$out" -czf "$bundle.part" . && mv "$bundle.part" "$bundle"; fi; }
least() { [ "$1" -lt "$2" ] && echo "$1" || echo "$2"; }

# run COMMAND, killed if it overruns the time that is left by more than half a minute
bounded() { timeout --signal=INT --kill-after=15 $(($(left) + 30)) "$@"; }

minutes() { echo "$(($(left) / 60)).$(($(left) % 60 * 10 / 60))"; }

# compile what a benchmark needs in processes side by side: alone, each kernel takes a second or more
declare -A compiled=()
ahead() { # MODULE ARGUMENTS
    local pids=() index
    command -v nvidia-smi >/dev/null || return 0
    [ -z "${compiled[$*]:-}" ] || return 0
    compiled[$*]=1
    for ((index = 0; index < jobs; index++)); do
        OMP_NUM_THREADS=1 bounded "$python" -m "bench.$1" --output "$out" --minutes "$(minutes)" \
            "${quick[@]}" "${@:2}" --compile "$index/$jobs" >/dev/null 2>&1 &
        pids+=($!)
    done
    wait "${pids[@]}"
}

benchmark() { # MODULE ARGUMENTS
    ahead "$@"
    bounded "$python" -m "bench.$1" --output "$out" --brief --minutes "$(minutes)" \
        "${quick[@]}" ${RESEARCH:+--research "$RESEARCH"} "${@:2}"
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

tests() {
    if [ ${#quick[@]} -eq 0 ] && "$python" -c 'import xdist' 2>/dev/null; then
        tests_side_by_side
        local status=$?
        # a test that broke the GPU took others with it: those need new processes
        [ $status -ne $BROKEN ] && return $status
    fi
    tests_by_file
}

# all of them shared among processes, where pytest-xdist is there
tests_side_by_side() {
    local status
    OMP_NUM_THREADS=1 timeout --signal=INT --kill-after=15 "$(left)" "$python" -m pytest -q \
        --color=no -p no:cacheprovider -m gpu -n "$jobs" tests >"$out/tests.txt" 2>&1
    status=$?
    grep -q 'broke the GPU' "$out/tests.txt" && status=$BROKEN
    tail -n 1 "$out/tests.txt" >&2
    grep -E '^(FAILED|ERROR) ' "$out/tests.txt" | cut -c -200 | head -n 40 >&2
    return $status
}

# one process per file, all at once: no plug-in needed
tests_by_file() {
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
    candidates)
        [ ${#quick[@]} -eq 0 ] && bounded "$python" -m bench.bench_host --csv "$out/host.csv" >&2
        benchmark bench_candidates
        ;;
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
# ncu's counters and stalls of named kernels, as text: opened anywhere, without its program
profile() {
    command -v ncu >/dev/null || { echo "ncu is not installed: it comes with the CUDA toolkit" >&2; return 1; }
    [ -n "${KERNELS:-}" ] || { echo "KERNELS='pair_sums|mma24' names what to profile" >&2; return 2; }
    bounded ncu --clock-control none --set full --import-source yes --launch-count 8 \
        --kernel-name "regex:$KERNELS" --export "$out/profile" --force-overwrite \
        "$python" -m bench.bench_candidates --output "$out/profiled" --fresh --rounds 1 >&2 &&
        ncu --import "$out/profile.ncu-rep" --page details >"$out/profile.txt" &&
        ncu --import "$out/profile.ncu-rep" --page source --csv >"$out/profile_source.csv"
}

if [ "$what" = profile ]; then
    profile
    exit
fi
if [ "$what" != all ] && [ "$what" != next ]; then
    attempt "$what"
    exit
fi
# `next`: a turn within the boxes, then the minutes that are left for whoever is not finished
turns=2
[ "$what" = all ] && turns=20
unfinished=("${PARTS[@]}")
for ((turn = 1; turn <= turns && ${#unfinished[@]} > 0; turn++)); do
    names=("${unfinished[@]}")
    unfinished=()
    for name in "${names[@]}"; do
        box=0
        [ "$what" = next ] && [ $turn -eq 1 ] && box=$((SECONDS + ${BOX[$name]}))
        attempt "$name"
        case $? in
        0) ;;
        "$UNFINISHED") unfinished+=("$name") ;;
        *) failures=$((failures + 1)) ;;
        esac
    done
done
box=0
if [ ${#unfinished[@]} -gt 0 ]; then
    echo "== time is up in ${unfinished[*]}: call again" >&2
    exit $UNFINISHED
fi
"$python" -m bench.summary "$out" >&2
echo "== done, $failures of ${#PARTS[@]} parts failed" >&2
[ $failures -eq 0 ] && ! grep -q ' failed$' "$out/parts.txt"
