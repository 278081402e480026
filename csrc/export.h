// The C calling convention between r1kernels/cuda_lib.py and the launchers in this folder.
//
// A launcher is named r1_<op>, takes device pointers (const T*, T*), then int64_t sizes, then float
// scalars, then one cudaStream_t, and ends in `return cudaGetLastError();`. It allocates nothing and
// does not synchronize. Arguments are checked in Python, which knows shapes, dtypes and devices.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// Raise it when the signature or meaning of an exported function changes; cuda_lib.py holds the same number.
#define R1_ABI_VERSION 1

#define R1_EXPORT extern "C" __attribute__((visibility("default")))
