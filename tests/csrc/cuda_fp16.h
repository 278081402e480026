// cuda_fp8.h of this folder has the little of float16 that csrc/ needs: for tests only.
#pragma once

#include "cuda_fp8.h"
