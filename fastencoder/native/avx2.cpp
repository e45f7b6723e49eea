// The kernels for processors with AVX2.
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

namespace fastencoder {
namespace avx2 {
#include "isa_avx2.h"
#include "vectors.inc"
#include "activations.inc"
#include "add_norm.inc"
#include "embed_norm.inc"
#include "attention.inc"
#include "finish.inc"
#include "linear.inc"
#include "layer.inc"
}  // namespace avx2
}  // namespace fastencoder
