// The C calling convention between r1kernels/cpu_lib.py and the functions in this folder.
//
// A function is named r1_cpu_<op> and takes the threads to run on (OpenMP's GOMP_parallel, and how many), then pointers
// (const float*, float*; null where an argument is optional), then int64_t sizes, then float scalars. Arrays are
// float32 in C order unless a stride is passed. Arguments are checked in Python, which knows shapes, dtypes and
// devices.
#pragma once

#include <cstdint>

#include "parallel.h"

// Raise it when the signature or meaning of an exported function changes; cpu_lib.py holds the same number.
#define R1_CPU_ABI_VERSION 4

#define R1_EXPORT extern "C" __attribute__((visibility("default")))
