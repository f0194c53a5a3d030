#!/usr/bin/env bash
# The kernel and host tests with native builds that watch every access (address) and every operation whose
# result C++ does not define (undefined). Usage: sanitize.sh PYTHON [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift

# A copy of the package goes first on the path: the installed builds stay as they are. It is also
# what is compiled, so that an edit during the build changes nothing.
copy=build/sanitized
rm -rf "$copy"
mkdir -p "$copy"
cp -r kernels/specserve_kernels "$copy"
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
cxx=${CXX:-g++}
common=(-std=c++17 -fopenmp -ffp-contract=off -fPIC -shared -O1 -g -fno-omit-frame-pointer
        -fsanitize=address,undefined -fno-sanitize-recover=undefined)
build() {
    local name=$1
    shift
    "$cxx" "${common[@]}" "$@" "$copy"/specserve_kernels/cpu/csrc/*.cpp \
        -o "$copy/specserve_kernels/cpu/_$name$suffix"
}
build portable
if [ "$(uname -m)" = x86_64 ]; then
    build avx2 -march=x86-64-v3
    build avx512 -march=x86-64-v4 -mavx512vnni
    build avx512bf16 -march=x86-64-v4 -mavx512vnni -mavx512bf16
fi

"$cxx" "${common[@]}" $("$python" -m pybind11 --includes) "$copy"/specserve_kernels/host/csrc/*.cpp \
    -o "$copy/specserve_kernels/host/_compiled$suffix"

# The runtime has to be there before the interpreter, which is not built with it. The interpreter
# keeps memory to its end on purpose: no report of leaks. It also throws through torch's own frames.
# The C++ library goes beside it: the runtime looks for what it wraps there when it starts.
export LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$PWD/$copy${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=2
"$python" -c "
import specserve_kernels, sys
sys.exit('$copy' not in specserve_kernels.__file__ and specserve_kernels.__file__ + ' is not the copy')"
# A report goes to descriptor 2 and ends the process: pytest must not have put a file in its place.
"$python" -m pytest -q --capture=sys tests/kernels tests/drafts/test_host_reference.py \
    -k 'not triton' -p no:cacheprovider "$@"
