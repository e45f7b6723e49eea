// Vectors of 16 floats: AVX-512.
#pragma once

using vf = __m512;
constexpr int W = 16;

static inline vf zero() { return _mm512_setzero_ps(); }
static inline vf set1(float x) { return _mm512_set1_ps(x); }
static inline vf load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
static inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf larger(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf smaller(vf a, vf b) { return _mm512_min_ps(a, b); }
// x where `test` has its sign bit, otherwise y
static inline vf where_negative(vf test, vf x, vf y) { return _mm512_mask_mov_ps(y, _mm512_movepi32_mask(_mm512_castps_si512(test)), x); }
static inline float sum(vf x) { return _mm512_reduce_add_ps(x); }
static inline float largest(vf x) { return _mm512_reduce_max_ps(x); }
static inline vf nearest(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n
static inline vf times_power(vf x, vf n) { return _mm512_scalef_ps(x, n); }
// x where it is not less than bound or is NaN, otherwise zero
static inline vf unless_below(vf test, float bound, vf x) {
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(test, set1(bound), _CMP_LT_OQ), zero());
}

static inline vf from_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline void to_bf16(uint16_t* p, vf x) {  // rounded to nearest, ties to even; NaN stays NaN
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
static inline vf from_fp16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void to_fp16(uint16_t* p, vf x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// a0 b0 a1 b1 ... of the lower and of the upper halves
static inline vf interleave_low(vf a, vf b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
}
static inline vf interleave_high(vf a, vf b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
}
