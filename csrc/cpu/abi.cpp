// What Python asks the library before it calls an op.
#include "export.h"

R1_EXPORT int r1_cpu_abi_version() { return R1_CPU_ABI_VERSION; }

// Whether this processor has the instructions that the library is compiled for.
R1_EXPORT int r1_cpu_is_supported() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}
