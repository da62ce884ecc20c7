#!/usr/bin/env bash
# Runs tests as processors of three generations would: rounding differs between them, and no result may depend on it.
#
#   tools/test_kernels.sh                        the whole suite, three times
#   tools/test_kernels.sh tests/test_hankel.py   these tests; anything else that pytest takes, too
#
# Each setting chooses the kernels of every library that has some: OpenBLAS (numpy, scipy), MKL and oneDNN (PyTorch),
# PyTorch's and numpy's own. PYTHON is the interpreter (default: .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}

# setting NAME OPENBLAS MKL ONEDNN ATEN NUMPY_WITHOUT -- PYTEST ARGUMENTS
setting() {
  local name=$1 openblas=$2 mkl=$3 onednn=$4 aten=$5 without=$6
  shift 7
  echo "== $name: OpenBLAS $openblas, MKL $mkl, oneDNN $onednn, PyTorch $aten"
  export OPENBLAS_CORETYPE=$openblas MKL_CBWR=$mkl ONEDNN_MAX_CPU_ISA=$onednn ATEN_CPU_CAPABILITY=$aten
  export NPY_DISABLE_CPU_FEATURES=$without OMP_NUM_THREADS=1
  if [ $# -gt 0 ]; then
    "$PYTHON" -m pytest "$@"
  else
    "$PYTHON" -m pytest -m 'not ranks' --numprocesses 2
    "$PYTHON" -m pytest -m ranks --numprocesses 2 --dist loadgroup
  fi
}

flags=$(grep -m1 '^flags' /proc/cpuinfo)
avx512="X86_V4 AVX512_ICL AVX512_SPR"
setting "without AVX" Prescott COMPATIBLE SSE41 default "X86_V3 $avx512" -- "$@"
if [[ $flags == *avx2* ]]; then setting "AVX2" Haswell AVX2 AVX2 avx2 "$avx512" -- "$@"; fi
if [[ $flags == *avx512* ]]; then setting "AVX-512" SkylakeX AVX512 AVX512_CORE avx512 "" -- "$@"; fi
