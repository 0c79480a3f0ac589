// Attention of single queries in bf16, on CPUs whose dot products take bf16 pairs.
//
// One task is one request and some of its heads. Heads are the lanes of a vector: a key's scores by sixteen
// heads are sixteen dot products whose sums end up side by side, and softmax runs down the keys. A merged
// token's key is never rotated: with q and k correlated once, each of its positions costs a dot product with a
// row of task.cos_sin_cache.
//
// The Python side (vllm_hybrid/attention/cpu.py) documents shapes and meaning of every argument.
#include "bf16_rows.h"
#include "cpu_bf16.h"
#include "decode_task.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#if defined(__AVX512BF16__)

namespace {

using at::BFloat16;
using at::Tensor;

// Rows of values that are added up before the sums are put away.
constexpr int64_t kRows = 4;

// Lane i of the result is the sum of the lanes of x[i].
inline __m512 sums_of(const __m512* x) {
  __m512 pair[8], four[4];
#pragma GCC unroll 8
  for (int64_t i = 0; i < 8; ++i) {
    const __m512 a = x[2 * i], b = x[2 * i + 1];
    pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
    four[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto halve = [](__m512 a, __m512 b) {
    constexpr int kEven = 0x88, kOdd = 0xdd;
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, kEven), _mm512_shuffle_f32x4(a, b, kOdd));
  };
  return halve(halve(four[0], four[1]), halve(four[2], four[3]));
}

// The dot products of up to sixteen heads: product(i) is a vector whose lanes add up to that of head i.
template <class Product>
inline __m512 of_heads(int64_t heads, const Product& product) {
  __m512 x[kLanes];
  if (heads >= kLanes) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) x[i] = product(i);
  } else {
    for (int64_t i = 0; i < kLanes; ++i) x[i] = i < heads ? product(i) : _mm512_setzero_ps();
  }
  return sums_of(x);
}

template <int64_t D>
inline __m512 products(const BFloat16* a, const BFloat16* b) {
  __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int64_t c = 0; c < D; c += 2 * kLanes) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a + c), (__m512bh)_mm512_loadu_si512(b + c));
  }
  return sum;
}

// z such that q . R(j) k = sum_c cos(j t_c) z[c] + sin(j t_c) z[c + D / 2]
template <int64_t D>
inline void correlate(const float* q, const float* k, float* z) {
#pragma GCC unroll 4
  for (int64_t c = 0; c < D / 2; c += kLanes) {
    const __m512 q1 = _mm512_loadu_ps(q + c), q2 = _mm512_loadu_ps(q + c + D / 2);
    const __m512 k1 = _mm512_loadu_ps(k + c), k2 = _mm512_loadu_ps(k + c + D / 2);
    _mm512_storeu_ps(z + c, _mm512_fmadd_ps(q1, k1, _mm512_mul_ps(q2, k2)));
    _mm512_storeu_ps(z + c + D / 2, _mm512_fmsub_ps(q2, k1, _mm512_mul_ps(q1, k2)));
  }
}

// Memory of one thread, kept from task to task. Rows of `logit`, `weight` and `over_sum` are as long as the
// heads, filled up to whole vectors.
struct Scratch {
  std::vector<float> query, logit, weight, acc, over_sum;
  std::vector<int64_t> head_at;
};

// One query over some heads of its request.
template <int64_t D>
struct Decode {
  const DecodeTask<BFloat16>& task;
  Scratch& scratch;
  const int64_t heads = task.heads, rows = task.rows, lanes = (heads + kLanes - 1) / kLanes * kLanes;

  void run() const {
    scratch.query.resize(heads * D);
    scratch.logit.resize((task.member_ptr[rows] - task.member_ptr[0]) * lanes);
    scratch.weight.resize(rows * lanes);
    scratch.over_sum.resize(lanes);
    scratch.head_at.resize(heads);
    scratch.acc.assign(heads * D, 0.f);
    for (int64_t g = 0; g < heads; ++g) {
      load_row(task.query + g * task.query_stride, scratch.query.data() + g * D, D);
      scratch.head_at[g] = g / task.group * task.head_stride;
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t g = 0; g < heads; g += kLanes) {
        if (task.is_image[row]) score_image(row, g);
        else score_text(row, g);
      }
    }
    for (int64_t g = 0; g < heads; g += kLanes) softmax(g);
    for (int64_t row = 0; row < rows; row += kRows) mix(row);
    for (int64_t g = 0; g < heads; ++g) store(g);
    if (task.importance) add_importance();
  }

  const BFloat16* key(int64_t row, int64_t head) const {
    return task.kv_rows + task.kv_row_index[row] * task.kv_row_stride + scratch.head_at[head];
  }

  // The next row's keys are far away in memory, at a stride that the CPU does not foresee.
  void prefetch_next(int64_t row, int64_t head) const {
    if (row + 1 == rows) return;
    const BFloat16* next = key(row + 1, head);
#pragma GCC unroll 4
    for (int64_t c = 0; c < D; c += 2 * kLanes)
      _mm_prefetch(reinterpret_cast<const char*>(next + c), _MM_HINT_T0);
  }

  // Scores of the heads g, g + 1, ... at one key.
  float* scores(int64_t member, int64_t g) const {
    return scratch.logit.data() + (member - task.member_ptr[0]) * lanes + g;
  }

  void score_text(int64_t row, int64_t g) const {
    const __m512 score = of_heads(std::min(kLanes, heads - g), [&](int64_t i) {
      prefetch_next(row, g + i);
      return products<D>(task.query + (g + i) * task.query_stride, key(row, g + i));
    });
    _mm512_storeu_ps(scores(task.member_ptr[row], g), score);
  }

  void score_image(int64_t row, int64_t g) const {
    alignas(64) float k[D], z[kLanes * D];
    const int64_t n = std::min(kLanes, heads - g);
    for (int64_t i = 0; i < n; ++i) {
      prefetch_next(row, g + i);
      if (i == 0 || scratch.head_at[g + i] != scratch.head_at[g + i - 1]) load_row(key(row, g + i), k, D);
      correlate<D>(scratch.query.data() + (g + i) * D, k, z + i * D);
    }
    for (int64_t m = task.member_ptr[row]; m < task.member_ptr[row + 1]; ++m) {
      __m512 cos_sin[D / kLanes];
#pragma GCC unroll 8
      for (int64_t c = 0; c < D / kLanes; ++c)
        cos_sin[c] = _mm512_loadu_ps(task.cos_sin_cache + task.member_pos[m] * D + c * kLanes);
      const __m512 score = of_heads(n, [&](int64_t i) {
        __m512 sum = _mm512_mul_ps(cos_sin[0], _mm512_load_ps(z + i * D));
#pragma GCC unroll 8
        for (int64_t c = 1; c < D / kLanes; ++c) {
          sum = _mm512_fmadd_ps(cos_sin[c], _mm512_load_ps(z + i * D + c * kLanes), sum);
        }
        return sum;
      });
      _mm512_storeu_ps(scores(m, g), score);
    }
  }

  // Each row's weight, summed over its members, and 1 / the sum of all.
  void softmax(int64_t g) const {
    __m512 m_i = _mm512_set1_ps(-std::numeric_limits<float>::max()), l_i = _mm512_setzero_ps();
    for (int64_t m = task.member_ptr[0]; m < task.member_ptr[rows]; ++m) {
      m_i = _mm512_max_ps(m_i, _mm512_loadu_ps(scores(m, g)));
    }
    const float octaves = task.scale * kOctaves;
    const __m512 factor = _mm512_set1_ps(octaves), shift = _mm512_mul_ps(m_i, _mm512_set1_ps(-octaves));
    for (int64_t row = 0; row < rows; ++row) {
      __m512 weight = _mm512_setzero_ps();
      for (int64_t m = task.member_ptr[row]; m < task.member_ptr[row + 1]; ++m) {
        weight = _mm512_add_ps(weight, exp2(_mm512_fmadd_ps(_mm512_loadu_ps(scores(m, g)), factor, shift)));
      }
      _mm512_storeu_ps(scratch.weight.data() + row * lanes + g, weight);
      l_i = _mm512_add_ps(l_i, weight);
    }
    const __mmask16 real = static_cast<__mmask16>((1u << std::min(kLanes, heads - g)) - 1);
    _mm512_storeu_ps(scratch.over_sum.data() + g, _mm512_maskz_div_ps(real, _mm512_set1_ps(1.f), l_i));
  }

  // Adds weighted values of kRows rows to `acc`, where the even and the odd ones of 32 channels stand
  // together.
  void mix(int64_t first) const {
    const __m512i odd_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const int64_t n = std::min(kRows, rows - first);
    for (int64_t g = 0; g < heads; ++g) {
      float* to = scratch.acc.data() + g * D;
      __m512 sum[D / kLanes];
#pragma GCC unroll 8
      for (int64_t c = 0; c < D / kLanes; ++c) sum[c] = _mm512_loadu_ps(to + c * kLanes);
      for (int64_t row = first; row < first + n; ++row) {
        const __m512 weight = _mm512_set1_ps(scratch.weight[row * lanes + g]);
        const BFloat16* value = key(row, g) + D;
#pragma GCC unroll 8
        for (int64_t c = 0; c < D / kLanes; c += 2) {
          const __m512i both = _mm512_loadu_si512(value + c * kLanes);
          const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
          const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, odd_half));
          sum[c] = _mm512_fmadd_ps(even, weight, sum[c]);
          sum[c + 1] = _mm512_fmadd_ps(odd, weight, sum[c + 1]);
        }
      }
#pragma GCC unroll 8
      for (int64_t c = 0; c < D / kLanes; ++c) _mm512_storeu_ps(to + c * kLanes, sum[c]);
    }
  }

  void store(int64_t g) const {
    const float* from = scratch.acc.data() + g * D;
    const __m512 factor = _mm512_set1_ps(scratch.over_sum[g]);
    const auto rounded = [&](int64_t c) {
      return _mm512_cvtepu16_epi32(
          (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(from + c), factor)));
    };
    for (int64_t c = 0; c < D; c += 2 * kLanes) {
      const __m512i both = _mm512_or_si512(rounded(c), _mm512_slli_epi32(rounded(c + kLanes), 16));
      _mm512_storeu_si512(task.out + g * task.out_stride + c, both);
    }
  }

  void add_importance() const {
    for (int64_t row = 0; row < rows; ++row) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t g = 0; g < heads; g += kLanes) {
        const __m512 weight = _mm512_loadu_ps(scratch.weight.data() + row * lanes + g);
        sum = _mm512_fmadd_ps(weight, _mm512_loadu_ps(scratch.over_sum.data() + g), sum);
      }
      task.importance[row] += _mm512_reduce_add_ps(sum);
    }
  }
};

}  // namespace

void bf16_decode(const Tensor& query, const Tensor& query_rows, const Tensor& requests, const Tensor& kv_rows,
                 const Tensor& row_ptr, const Tensor& kv_row_index, const Tensor& is_image,
                 const Tensor& member_ptr, const Tensor& member_pos, const Tensor& cos_sin_cache, double scale,
                 const Tensor& out, const Tensor& importance) {
  const int64_t head_size = query.size(2);
  TORCH_CHECK(bf16_serves(head_size), "head size ", head_size, " has no bf16 kernel");
  const auto run = [&](const DecodeTask<BFloat16>& task, Scratch& scratch) {
    if (head_size == 64) Decode<64>{task, scratch}.run();
    else Decode<128>{task, scratch}.run();
  };
  run_decodes<BFloat16, Scratch>(query, query_rows, requests, kv_rows, row_ptr, kv_row_index, is_image, member_ptr,
                              member_pos, cos_sin_cache, scale, out, importance, run);
}

#else

void bf16_decode(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                 const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                 double, const at::Tensor&, const at::Tensor&) {
  TORCH_CHECK(false, "this build has no bf16 kernels: the CPU lacks AVX512-BF16");
}

#endif
