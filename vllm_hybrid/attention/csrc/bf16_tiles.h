// The two products of attention, scores and weighted values, for a block of queries.
//
// Operands are pairs of bf16 in 32 bits, sums float32. Keys come as [channel / 2][64 keys], values as
// [key / 2][channels]: what a dot product of pairs eats, and also what AMX takes as its second operand.
#pragma once

#include "bf16_rows.h"

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>

constexpr int64_t kTile = 64;

#if defined(__AMX_BF16__)

#include <sys/syscall.h>
#include <unistd.h>

// Two by two tiles of 16 x 16 sums: every operand that is loaded is used twice.
constexpr int64_t kQueries = 32;
constexpr int64_t kColumns = 32;

// Linux gives a process the tiles' memory when it asks for it.
inline bool tiles_granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// GCC does not tell its optimizer which memory the tiles' instructions read.
inline void memory_is_written() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// While it lives, the calling thread's eight tiles have 16 rows of 64 bytes.
class Tiles {
 public:
  Tiles() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    std::fill_n(config.row_bytes, 8, 64);
    std::fill_n(config.rows, 8, 16);
    memory_is_written();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// out[i][j] = (adds ? out[i][j] : 0) + sum_p a[i][p] . b[p][j] for kQueries rows and kColumns columns; strides
// in 32 bits. The number of pairs is a multiple of 16.
inline void multiply(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t pairs,
                     bool adds, float* out, int64_t out_stride) {
  memory_is_written();
  if (adds) {
    _tile_loadd(0, out, out_stride * 4);
    _tile_loadd(1, out + kLanes, out_stride * 4);
    _tile_loadd(2, out + kLanes * out_stride, out_stride * 4);
    _tile_loadd(3, out + kLanes * out_stride + kLanes, out_stride * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t p = 0; p < pairs; p += kLanes) {
    _tile_loadd(4, a + p, a_stride * 4);
    _tile_loadd(5, a + kLanes * a_stride + p, a_stride * 4);
    _tile_loadd(6, b + p * b_stride, b_stride * 4);
    _tile_loadd(7, b + p * b_stride + kLanes, b_stride * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, out_stride * 4);
  _tile_stored(1, out + kLanes, out_stride * 4);
  _tile_stored(2, out + kLanes * out_stride, out_stride * 4);
  _tile_stored(3, out + kLanes * out_stride + kLanes, out_stride * 4);
}

#else

// Six queries by 64 keys (or channels) are 24 registers of sums, which leaves room for the operands.
constexpr int64_t kQueries = 6;
constexpr int64_t kColumns = kTile;

inline bool tiles_granted() { return true; }
struct Tiles {
  Tiles() {}
};

// out[i][j] = (adds ? out[i][j] : 0) + sum_p a[i][p] . b[p][j] for kQueries rows and kColumns columns; strides
// in 32 bits.
inline void multiply(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t pairs,
                     bool adds, float* out, int64_t out_stride) {
  constexpr int64_t kVectors = kColumns / kLanes;
  __m512 sum[kQueries][kVectors];
#pragma GCC unroll 6
  for (int64_t i = 0; i < kQueries; ++i) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) {
      sum[i][v] = adds ? _mm512_loadu_ps(out + i * out_stride + v * kLanes) : _mm512_setzero_ps();
    }
  }
#pragma GCC unroll 1
  for (int64_t p = 0; p < pairs; ++p) {
    __m512i columns[kVectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) columns[v] = _mm512_loadu_si512(b + p * b_stride + v * kLanes);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kQueries; ++i) {
      const __m512i row = _mm512_set1_epi32(static_cast<int>(a[i * a_stride + p]));
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) {
        sum[i][v] = _mm512_dpbf16_ps(sum[i][v], (__m512bh)row, (__m512bh)columns[v]);
      }
    }
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < kQueries; ++i) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) _mm512_storeu_ps(out + i * out_stride + v * kLanes, sum[i][v]);
  }
}

#endif

// out[i][j] = q[i] . k[j] for a block of queries and 64 keys.
template <int64_t D>
inline void score_tile(const uint32_t* q, const uint32_t* k, float* out, int64_t stride) {
  for (int64_t j = 0; j < kTile; j += kColumns) {
    multiply(q, D / 2, k + j, kTile, D / 2, false, out + j, stride);
  }
}

// out[i][c] = (adds ? out[i][c] : 0) + sum_j w[i][j] v[j][c] for a block of queries and D channels.
template <int64_t D>
inline void mix(const uint32_t* w, int64_t w_stride, const uint32_t* v, int64_t pairs, bool adds, float* out) {
  for (int64_t c = 0; c < D; c += kColumns) {
    multiply(w, w_stride, v + c, D, pairs, adds, out + c, D);
  }
}

#endif
