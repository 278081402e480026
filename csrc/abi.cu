// What Python asks the library before it calls an op: which interface, how it was built, what an error means.
#include "export.h"

#define R1_TEXT_(x) #x
#define R1_TEXT(x) R1_TEXT_(x)
#define R1_CUDA_VERSION R1_TEXT(__CUDACC_VER_MAJOR__) "." R1_TEXT(__CUDACC_VER_MINOR__)

R1_EXPORT int r1_abi_version() { return R1_ABI_VERSION; }

R1_EXPORT const char* r1_build_info() {
    return "CUDA " R1_CUDA_VERSION ", architectures " R1_CUDA_ARCHITECTURES ", g++ " __VERSION__;
}

R1_EXPORT const char* r1_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
