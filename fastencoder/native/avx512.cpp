// The kernels for processors with AVX-512.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include <immintrin.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

namespace fastencoder {
namespace avx512 {
#include "isa_avx512.h"
#include "vectors.inc"
#include "activations.inc"
#include "add_norm.inc"
#include "embed_norm.inc"
#include "attention.inc"
#include "finish.inc"
#include "linear.inc"
#include "layer.inc"
}  // namespace avx512
}  // namespace fastencoder
