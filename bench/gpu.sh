#!/usr/bin/env bash
# GPU tests, then every benchmark; what is already in OUT is not done again.
#
#   bench/gpu.sh OUT                everything, however long it takes
#   bench/gpu.sh OUT next           as much as fits into MINUTES (9); exit status 75: call again
#   bench/gpu.sh OUT PART           one of the parts below, within MINUTES
#   bench/gpu.sh OUT ... --quick    tiny cases, also without a GPU: does the script still work?
#
# OUT gets tests.txt, parts.txt (what is finished) and a folder per device with the CSV files; it
# may be carried to another machine of the same kind and continued there. Where the code is a copy
# without its repository, set BENCH_COMMIT. PYTHON is the interpreter (python3).
set -u

PARTS=(tests sparse24 metrics model bitmap select)
UNFINISHED=75
usage() { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }

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
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 1
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
limit=$((60 * ${MINUTES:-9}))
failures=0

left() { [ "$what" = all ] && echo "$limit" || echo $((limit - SECONDS)); }
finished() { grep -qx "$1" "$out/parts.txt" 2>/dev/null; }

# run COMMAND, killed if it overruns the time that is left by more than half a minute
bounded() { timeout --signal=INT --kill-after=15 $(($(left) + 30)) "$@"; }

benchmark() { # FILE ARGUMENTS
    bounded "$python" "bench/$1" --output "$out" --minutes "$(($(left) / 60)).$(($(left) % 60 * 10 / 60))" \
        "${quick[@]}" "${@:2}"
}

part() {
    case $1 in
    tests)
        local files=(tests)
        [ ${#quick[@]} -gt 0 ] && files=(tests/prunekernels/test_sparse24_gpu.py)
        bounded "$python" -m pytest -q -m gpu "${files[@]}" 2>&1 | tee "$out/tests.txt"
        local status=${PIPESTATUS[0]}
        [ "$status" -eq 5 ] && status=0 # nothing to test
        [ "$status" -eq 0 ] # tests cannot go on where they stopped: too long is a failure
        ;;
    sparse24) benchmark bench_sparse.py --pattern 2:4 ;;
    bitmap) benchmark bench_sparse.py --pattern unstructured ;;
    metrics) benchmark bench_metrics.py ;;
    model) benchmark bench_model.py ;;
    select) benchmark bench_select.py ;;
    esac
}

# do PART once; 0: finished, 75: more is left, 1: failed
attempt() {
    finished "$1" && return 0
    [ "$(left)" -lt 20 ] && return $UNFINISHED
    echo "== $1 ($(left) s left)" >&2
    part "$1"
    local status=$?
    case $status in
    0) echo "$1" >>"$out/parts.txt" ;;
    "$UNFINISHED" | 124 | 137) return $UNFINISHED ;; # out of time: the rows so far are safe
    *)
        echo "== $1 failed with status $status" >&2
        return 1
        ;;
    esac
}

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
echo "== done, $failures of ${#PARTS[@]} parts failed" >&2
[ $failures -eq 0 ]
