// Attention of many queries in bf16, on CPUs whose dot products take bf16 pairs (AVX512-BF16, AMX).
//
// One task is one sequence and one key/value head. Its keys and values are gathered and rotated once, into
// the order in which the dot products eat them; then a block of queries at a time meets the keys they see, a
// span of keys at a time: scores, softmax, weighted values. Nothing is expanded in memory beyond one head of
// one sequence, which stays in the second cache, as scores and weights do in the first. Sums are float32;
// queries, keys, values and softmax weights are bf16, as in any bf16 kernel.
//
// The Python side (vllm_hybrid/attention/cpu.py) documents shapes and meaning of every argument.
#include "cpu_bf16.h"

#include "bf16_rows.h"
#include "bf16_tiles.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace {

using at::BFloat16;
using at::Tensor;

// x <- rotation of x (two halves) by the angles whose cosines and sines stand in `cos_sin`.
template <int64_t D>
inline void rotate_row(float* x, const float* cos_sin) {
  for (int64_t c = 0; c < D / 2; c += kLanes) {
    const __m512 a = _mm512_loadu_ps(x + c), b = _mm512_loadu_ps(x + c + D / 2);
    const __m512 cos = _mm512_loadu_ps(cos_sin + c), sin = _mm512_loadu_ps(cos_sin + c + D / 2);
    _mm512_storeu_ps(x + c, _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin)));
    _mm512_storeu_ps(x + c + D / 2, _mm512_fmadd_ps(b, cos, _mm512_mul_ps(a, sin)));
  }
}

// A row of floats as bf16 pairs of neighbouring channels.
template <int64_t D>
inline void pack_row(const float* x, uint32_t* to) {
  for (int64_t c = 0; c < D; c += 2 * kLanes) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + c + kLanes), _mm512_loadu_ps(x + c));
    _mm512_storeu_si512(to + c / 2, (__m512i)both);
  }
}

// Columns of 16 rows of 16 words each as rows.
inline void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  __m512i a[kLanes], b[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) a[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int64_t i = 0; i < kLanes; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  // Now a[4 g + c] gets the columns 4 lane + c of rows 4 g to 4 g + 3, lane by lane.
  for (int64_t i = 0; i < kLanes; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;
  for (int64_t c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(a[c], a[c + 4], kEven);
    const __m512i even_high = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], kEven);
    const __m512i odd_low = _mm512_shuffle_i32x4(a[c], a[c + 4], kOdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], kOdd);
    _mm512_storeu_si512(to + c * to_stride, _mm512_shuffle_i32x4(even_low, even_high, kEven));
    _mm512_storeu_si512(to + (c + 4) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, kEven));
    _mm512_storeu_si512(to + (c + 8) * to_stride, _mm512_shuffle_i32x4(even_low, even_high, kOdd));
    _mm512_storeu_si512(to + (c + 12) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, kOdd));
  }
}

// Keys as [key / 64][channel / 2][key % 64] pairs of channels, values as [key / 2][channel] pairs of keys.
template <int64_t D>
struct Packed {
  std::vector<uint32_t> key, value;
  int64_t keys = 0, padded = 0;

  void start(int64_t n) {
    keys = n;
    padded = (n + kTile - 1) / kTile * kTile;
    const int64_t words = padded * D / 2, last_tile = kTile * D / 2;
    key.resize(words);
    value.resize(words);
    std::fill(key.end() - last_tile, key.end(), 0u);
    std::fill(value.end() - last_tile, value.end(), 0u);
  }

  // Sixteen keys [16][channel / 2] from key `j` on, a multiple of 16.
  void set_keys(int64_t j, const uint32_t* pairs) {
    uint32_t* to = key.data() + (j / kTile) * (D / 2) * kTile + j % kTile;
    for (int64_t p = 0; p < D / 2; p += kLanes) transpose(pairs + p, D / 2, to + p * kTile, kTile);
  }

  // Values of keys j (even) and j + 1; `second` may be null behind the last key.
  void set_values(int64_t j, const BFloat16* first, const BFloat16* second) {
    uint32_t* to = value.data() + j / 2 * D;
    for (int64_t c = 0; c < D; c += kLanes) {
      const auto wide = [c](const BFloat16* row) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + c)));
      };
      __m512i both = wide(first);
      if (second) both = _mm512_or_si512(both, _mm512_slli_epi32(wide(second), 16));
      _mm512_storeu_si512(to + c, both);
    }
  }
};

// The greatest of each lane of `n` floats, a multiple of 64.
inline __m512 greatest(const float* x, int64_t n) {
  __m512 most[4];
  for (int64_t v = 0; v < 4; ++v) most[v] = _mm512_loadu_ps(x + v * kLanes);
  for (int64_t j = 4 * kLanes; j < n; j += 4 * kLanes) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v) most[v] = _mm512_max_ps(most[v], _mm512_loadu_ps(x + j + v * kLanes));
  }
  return _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
}

inline void scale_row(float* x, int64_t n, float factor) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t c = 0; c < n; c += kLanes) _mm512_storeu_ps(x + c, _mm512_mul_ps(_mm512_loadu_ps(x + c), f));
}

// Keys that a block of queries meets at once.
constexpr int64_t kSpan = 128;
// Octaves by which scores of later spans may exceed those of the first before everything is scaled anew: far
// from what overflows a float, and floats lose nothing by being large.
constexpr float kHeadroom = 40.f;

// Memory of one thread, kept from task to task.
template <int64_t D>
struct Scratch {
  Packed<D> packed;
  std::vector<float> total, bias;
  std::vector<int64_t> copies;
  alignas(64) float row[D];
  alignas(64) uint32_t pairs[kLanes * D / 2];
  alignas(64) uint32_t query[kQueries * D / 2];
  alignas(64) float score[kQueries * kSpan];
  alignas(64) uint32_t weight[kQueries * kSpan / 2];
  alignas(64) float sum[kQueries * kLanes];
  alignas(64) float acc[kQueries * D];
  float shift[kQueries], over_sum[kQueries];

  // Packs a task's keys and values: fetch(j, to) writes key j as pairs of channels, value(j) is where value j
  // stands.
  template <class Fetch, class Value>
  void gather(int64_t keys, const Fetch& fetch, const Value& value) {
    packed.start(keys);
    for (int64_t begin = 0; begin < keys; begin += kLanes) {
      const int64_t n = std::min(kLanes, keys - begin);
      std::fill(pairs + n * (D / 2), pairs + kLanes * (D / 2), 0u);
      for (int64_t i = 0; i < n; ++i) fetch(begin + i, pairs + i * (D / 2));
      packed.set_keys(begin, pairs);
    }
    for (int64_t j = 0; j < keys; j += 2) {
      packed.set_values(j, value(j), j + 1 < keys ? value(j + 1) : nullptr);
    }
  }

  // A block of queries, packed in `query`, over the first keys; query i sees `seen + i * step` of them, at
  // most all. The result is left in `acc`, to be multiplied by `over_sum`. A key weighs
  // 2^(octaves * score + bias); there is a bias, one for each key, where kWeighed.
  template <bool kWeighed>
  void attend(int64_t seen, int64_t step, float octaves, const float* bias) {
    const int64_t last = std::min(seen + (kQueries - 1) * step, packed.keys);
    for (int64_t begin = 0; begin < last; begin += kSpan) {
      const int64_t n = std::min(kSpan, (last - begin + kTile - 1) / kTile * kTile);
      for (int64_t j = 0; j < n; j += kTile) {
        score_tile<D>(query, packed.key.data() + (begin + j) * (D / 2), score + j, kSpan);
      }
      for (int64_t i = 0; i < kQueries; ++i) {
        const int64_t mine = std::min(seen + i * step, packed.keys) - begin;
        weigh<kWeighed>(i, n, mine, begin == 0, octaves, bias + (kWeighed ? begin : 0));
      }
      mix<D>(weight, kSpan / 2, packed.value.data() + begin / 2 * D, n / 2, begin > 0, acc);
    }
    for (int64_t i = 0; i < kQueries; ++i) {
      over_sum[i] = 1.f / _mm512_reduce_add_ps(_mm512_load_ps(sum + i * kLanes));
    }
  }

  // Softmax weights of query i over the `n` scores of a span, of which it sees `seen`, as bf16.
  template <bool kWeighed>
  void weigh(int64_t i, int64_t n, int64_t seen, bool first, float octaves, const float* bias) {
    float* mine = score + i * kSpan;
    if (seen < n) std::fill(mine + std::max<int64_t>(seen, 0), mine + n, -std::numeric_limits<float>::max());
    const __m512 factor = _mm512_set1_ps(octaves);
    set_shift(i, _mm512_mul_ps(greatest(mine, n), factor), first);
    const __m512 by = _mm512_set1_ps(shift[i]);
    const auto weight_of = [&](int64_t j) {
      __m512 x = _mm512_fmadd_ps(_mm512_load_ps(mine + j), factor, by);
      if (kWeighed) x = _mm512_add_ps(x, _mm512_loadu_ps(bias + j));
      return exp2(x);
    };
    __m512 low_sum = _mm512_load_ps(sum + i * kLanes), high_sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < n; j += 2 * kLanes) {
      const __m512 low = weight_of(j), high = weight_of(j + kLanes);
      low_sum = _mm512_add_ps(low_sum, low);
      high_sum = _mm512_add_ps(high_sum, high);
      _mm512_store_si512(weight + i * (kSpan / 2) + j / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    _mm512_store_ps(sum + i * kLanes, _mm512_add_ps(low_sum, high_sum));
  }

  // What to add to a query's scores, in octaves, so that its weights are neither too great nor all too small.
  void set_shift(int64_t i, __m512 m_i, bool first) {
    if (first) {
      shift[i] = -_mm512_reduce_max_ps(m_i);
      _mm512_store_ps(sum + i * kLanes, _mm512_setzero_ps());
    } else if (_mm512_cmp_ps_mask(m_i, _mm512_set1_ps(kHeadroom - shift[i]), _CMP_GT_OQ)) {
      const float before = shift[i];
      shift[i] = -_mm512_reduce_max_ps(m_i);
      const float factor = std::exp2(shift[i] - before);
      scale_row(sum + i * kLanes, kLanes, factor);
      scale_row(acc + i * D, D, factor);
    }
  }
};

// Every task done once. A thread takes the next one as soon as it is free, as sequences differ in length.
template <int64_t D, class Work>
void run_tasks(int64_t tasks, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const Tiles tiles;
    Scratch<D> scratch;
    for (int64_t task; (task = next++) < tasks;) work(scratch, task);
  });
}

void add_row(const float* from, float* to, int64_t n, float factor) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t c = 0; c < n; c += kLanes) {
    _mm512_storeu_ps(to + c, _mm512_fmadd_ps(_mm512_loadu_ps(from + c), f, _mm512_loadu_ps(to + c)));
  }
}

void store_row(const float* from, BFloat16* to, int64_t n, float factor) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t c = 0; c < n; c += kLanes) {
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(from + c), f));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c), (__m256i)half);
  }
}

// The prefill of one request and one key/value head.
template <int64_t D>
struct Prefill {
  const BFloat16 *query, *kv_rows;
  BFloat16* out;
  int64_t query_stride, head_stride, kv_row_stride, out_stride, out_head_stride;
  int64_t group;
  const int64_t *row, *position;
  const bool* image;
  int64_t queries;
  const int64_t *kv_row_index, *key_position;
  const bool* key_image;
  int64_t keys;
  const float* cos_sin_cache;
  float scale;

  void run(Scratch<D>& scratch) const {
    gather_keys(scratch);
    const auto [low, high] = std::minmax_element(row, row + queries);
    const int64_t first = *low, rows = *high - *low + 1;
    for (int64_t g = 0; g < group; ++g) {
      scratch.total.assign(rows * D, 0.f);
      scratch.copies.assign(rows, 0);
      for (int64_t begin = 0; begin < queries; begin += kQueries) {
        const int64_t n = std::min(kQueries, queries - begin);
        std::fill(scratch.query, scratch.query + kQueries * D / 2, 0u);
        for (int64_t i = 0; i < n; ++i) gather_query(scratch, begin + i, g, scratch.query + i * (D / 2));
        // A request's queries stand at its last positions.
        scratch.template attend<false>(keys - queries + begin + 1, 1, scale * kOctaves, nullptr);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t mine = row[begin + i] - first;
          add_row(scratch.acc + i * D, scratch.total.data() + mine * D, D, scratch.over_sum[i]);
          ++scratch.copies[mine];
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        if (scratch.copies[r] == 0) continue;
        BFloat16* to = out + (first + r) * out_stride + g * out_head_stride;
        store_row(scratch.total.data() + r * D, to, D, 1.f / static_cast<float>(scratch.copies[r]));
      }
    }
  }

  void gather_keys(Scratch<D>& scratch) const {
    const auto kv_row = [&](int64_t j) { return kv_rows + kv_row_index[j] * kv_row_stride; };
    const auto fetch = [&](int64_t j, uint32_t* to) {
      rotated_row(scratch, kv_row(j), key_image[j], key_position[j], to);
    };
    scratch.gather(keys, fetch, [&](int64_t j) { return kv_row(j) + D; });
  }

  void gather_query(Scratch<D>& scratch, int64_t i, int64_t g, uint32_t* to) const {
    rotated_row(scratch, query + row[i] * query_stride + g * head_stride, image[i], position[i], to);
  }

  void rotated_row(Scratch<D>& scratch, const BFloat16* from, bool rotates, int64_t at, uint32_t* to) const {
    if (rotates) {
      load_row(from, scratch.row, D);
      rotate_row<D>(scratch.row, cos_sin_cache + at * D);
      pack_row<D>(scratch.row, to);
    } else {
      copy_row<D>(from, to);
    }
  }
};

template <int64_t D>
void prefill(const Tensor& query, const Tensor& kv_rows, const Tensor& rows, const Tensor& positions,
             const Tensor& image, const Tensor& query_start_loc, const Tensor& kv_row_index, const Tensor& key_positions,
             const Tensor& key_image, const Tensor& key_start_loc, const Tensor& cos_sin_cache, double scale,
             const Tensor& out) {
  const int64_t requests = query_start_loc.size(0) - 1, kv_heads = kv_rows.size(1);
  const int64_t group = query.size(1) / kv_heads;
  const int64_t *q_ptr = query_start_loc.data_ptr<int64_t>(), *k_ptr = key_start_loc.data_ptr<int64_t>();
  run_tasks<D>(requests * kv_heads, [&](Scratch<D>& scratch, int64_t task) {
    const int64_t r = task / kv_heads, h = task % kv_heads;
    const Prefill<D> work{query.data_ptr<BFloat16>() + h * group * query.stride(1),
                          kv_rows.data_ptr<BFloat16>() + h * kv_rows.stride(1),
                          out.data_ptr<BFloat16>() + h * group * out.stride(1),
                          query.stride(0),
                          query.stride(1),
                          kv_rows.stride(0),
                          out.stride(0),
                          out.stride(1),
                          group,
                          rows.data_ptr<int64_t>() + q_ptr[r],
                          positions.data_ptr<int64_t>() + q_ptr[r],
                          image.data_ptr<bool>() + q_ptr[r],
                          q_ptr[r + 1] - q_ptr[r],
                          kv_row_index.data_ptr<int64_t>() + k_ptr[r],
                          key_positions.data_ptr<int64_t>() + k_ptr[r],
                          key_image.data_ptr<bool>() + k_ptr[r],
                          k_ptr[r + 1] - k_ptr[r],
                          cos_sin_cache.data_ptr<float>(),
                          static_cast<float>(scale)};
    if (work.queries > 0) work.run(scratch);
  });
}

// Every token of a sequence attends to all of it; a key's logit gets its bias.
template <int64_t D>
void weighed(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& starts,
             const Tensor& bias, double scale, const Tensor& out) {
  const int64_t sequences = starts.size(0) - 1, heads = query.size(1);
  const int64_t* start = starts.data_ptr<int64_t>();
  const auto row = [](const Tensor& x, int64_t t, int64_t h) {
    return x.data_ptr<BFloat16>() + t * x.stride(0) + h * x.stride(1);
  };
  run_tasks<D>(sequences * heads, [&](Scratch<D>& scratch, int64_t task) {
    const int64_t s = task / heads, h = task % heads, first = start[s], tokens = start[s + 1] - first;
    if (tokens == 0) return;
    scratch.gather(
        tokens, [&](int64_t j, uint32_t* to) { copy_row<D>(row(key, first + j, h), to); },
        [&](int64_t j) { return row(value, first + j, h); });
    scratch.bias.assign(scratch.packed.padded, 0.f);
    for (int64_t j = 0; j < tokens; ++j) scratch.bias[j] = bias.data_ptr<float>()[first + j] * kOctaves;
    for (int64_t q = 0; q < tokens; q += kQueries) {
      const int64_t n = std::min(kQueries, tokens - q);
      std::fill(scratch.query, scratch.query + kQueries * D / 2, 0u);
      for (int64_t i = 0; i < n; ++i) {
        copy_row<D>(row(query, first + q + i, h), scratch.query + i * (D / 2));
      }
      scratch.template attend<true>(tokens, 0, static_cast<float>(scale) * kOctaves, scratch.bias.data());
      for (int64_t i = 0; i < n; ++i) {
        store_row(scratch.acc + i * D, row(out, first + q + i, h), D, scratch.over_sum[i]);
      }
    }
  });
}

}  // namespace

#define BY_HEAD_SIZE(CALL, ...)                                                                 \
  TORCH_CHECK(bf16_serves(query.size(2)), "head size ", query.size(2), " has no bf16 kernel"); \
  if (query.size(2) == 64) CALL<64>(__VA_ARGS__);                                              \
  else CALL<128>(__VA_ARGS__)

bool bf16_serves(int64_t head_size) { return (head_size == 64 || head_size == 128) && tiles_granted(); }

void bf16_prefill(const Tensor& query, const Tensor& kv_rows, const Tensor& rows, const Tensor& positions,
                  const Tensor& image, const Tensor& query_start_loc, const Tensor& kv_row_index,
                  const Tensor& key_positions, const Tensor& key_image, const Tensor& key_start_loc,
                  const Tensor& cos_sin_cache, double scale, const Tensor& out) {
  TORCH_CHECK(query.stride(2) == 1 && kv_rows.stride(2) == 1 && out.stride(2) == 1,
              "prefill needs unit stride along the head");
  BY_HEAD_SIZE(prefill, query, kv_rows, rows, positions, image, query_start_loc, kv_row_index, key_positions, key_image,
               key_start_loc, cos_sin_cache, scale, out);
}

void bf16_weighed(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& starts,
                  const Tensor& bias, double scale, const Tensor& out) {
  TORCH_CHECK(query.stride(2) == 1 && key.stride(2) == 1 && value.stride(2) == 1 && out.stride(2) == 1,
              "attention needs unit stride along the head");
  BY_HEAD_SIZE(weighed, query, key, value, starts, bias, scale, out);
}

#else

bool bf16_serves(int64_t) { return false; }

void bf16_prefill(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                  const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                  const at::Tensor&, double, const at::Tensor&) {
  TORCH_CHECK(false, "this build has no bf16 kernels: the CPU lacks AVX512-BF16");
}

void bf16_weighed(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                  double, const at::Tensor&) {
  TORCH_CHECK(false, "this build has no bf16 kernels: the CPU lacks AVX512-BF16");
}

#endif
