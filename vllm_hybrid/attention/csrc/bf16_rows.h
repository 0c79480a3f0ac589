// Rows of bf16 in vectors of floats, and the exponential that softmax takes.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>

constexpr int64_t kLanes = 16;

// Base 2 exponents in one of base e.
constexpr float kOctaves = 1.44269504f;

// A row of bf16 as pairs of neighbouring channels, which it is.
template <int64_t D>
inline void copy_row(const c10::BFloat16* from, uint32_t* to) {
  std::memcpy(to, from, D * sizeof(c10::BFloat16));
}

inline void load_row(const c10::BFloat16* from, float* to, int64_t n) {
  for (int64_t c = 0; c < n; c += kLanes) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + c));
    _mm512_storeu_ps(to + c, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)));
  }
}

// 2^x to 3e-6 of itself, by a polynomial on x - floor(x); 0 far below.
inline __m512 exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 y = _mm512_set1_ps(0.0135341668f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.0520114675f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.241442755f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.693003833f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.00000262f));
  return _mm512_scalef_ps(y, x);
}

#endif
