// Products in fixed point, for processors with AVX-512 that multiply integers (VNNI).
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#include <immintrin.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

namespace fastencoder {
namespace vnni {
#include "isa_avx512.h"
#include "vectors.inc"
#include "activations.inc"
#include "finish.inc"
#include "fixed.inc"
}  // namespace vnni
}  // namespace fastencoder
