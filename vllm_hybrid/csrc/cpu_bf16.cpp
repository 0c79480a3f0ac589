// Attention of many queries in bf16, on CPUs whose dot products take bf16 pairs (AVX512-BF16, AMX).
//
// One task is one sequence and one key/value head. Its keys and values are gathered and rotated once, into
// the order in which the dot products eat them; then a block of queries at a time meets all keys they see:
// scores, softmax, weighted values. Nothing is expanded in memory beyond one head of one sequence, which stays in
// the cache. Sums are float32; queries, keys, values and softmax weights are bf16, as in any bf16 kernel.
//
// The Python side (vllm_hybrid/cpu_attention.py) documents shapes and meaning of every argument.
#include "cpu_bf16.h"

#include "bf16_tiles.h"

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace {

using at::BFloat16;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;

inline uint16_t* halves(uint32_t* pairs) { return reinterpret_cast<uint16_t*>(pairs); }

inline void load_row(const BFloat16* from, float* to, int64_t n) {
  for (int64_t c = 0; c < n; c += kLanes) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + c));
    _mm512_storeu_ps(to + c, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)));
  }
}

// x <- rotation of x (two halves) by the angles whose cosines and sines stand in `angles`.
template <int64_t D>
inline void rotate_row(float* x, const float* angles) {
  for (int64_t c = 0; c < D / 2; c += kLanes) {
    const __m512 a = _mm512_loadu_ps(x + c), b = _mm512_loadu_ps(x + c + D / 2);
    const __m512 cos = _mm512_loadu_ps(angles + c), sin = _mm512_loadu_ps(angles + c + D / 2);
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

// Keys as [key / 64][channel / 2][key % 64] pairs of channels, values as [key / 2][channel] pairs of keys.
template <int64_t D>
struct Packed {
  std::vector<uint32_t> key, value;
  int64_t keys = 0, padded = 0;

  void start(int64_t n) {
    keys = n;
    padded = (n + kTile - 1) / kTile * kTile;
    key.assign(padded * D / 2, 0);
    value.assign(padded / 2 * D, 0);
  }

  void set_key(int64_t j, const uint32_t* pairs) {
    uint32_t* to = key.data() + (j / kTile) * (D / 2) * kTile + j % kTile;
    for (int64_t p = 0; p < D / 2; ++p) to[p * kTile] = pairs[p];
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

// Softmax weights of one query over `n` scores (a multiple of 32), of which it sees `seen`, as bf16;
// returns 1 / their sum. `bias` is added to the scaled scores where it is given.
inline float weights(float* score, int64_t n, int64_t seen, float scale, const float* bias, uint32_t* to) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  const Vec factor(scale);
  Vec top(kNever);
  std::fill(score + seen, score + n, kNever);
  for (int64_t j = 0; j < n; j += kLanes) {
    Vec x = Vec::loadu(score + j) * factor;
    if (bias) x = x + Vec::loadu(bias + j);
    x.store(score + j);
    top = at::vec::maximum(top, x);
  }
  const Vec shift(_mm512_reduce_max_ps(top));
  Vec sum(0.f);
  for (int64_t j = 0; j < n; j += 2 * kLanes) {
    const Vec low = (Vec::loadu(score + j) - shift).exp_u20();
    const Vec high = (Vec::loadu(score + j + kLanes) - shift).exp_u20();
    sum = sum + low + high;
    const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(to + j / 2, (__m512i)both);
  }
  return 1.f / _mm512_reduce_add_ps(sum);
}

// Memory of one thread, kept from task to task.
template <int64_t D>
struct Desk {
  Packed<D> packed;
  std::vector<float> score, total;
  std::vector<uint32_t> weight;
  std::vector<int64_t> copies;
  alignas(64) float row[D];
  alignas(64) uint32_t query[kQueries * D / 2];
  alignas(64) float mixed[kQueries * D];
  alignas(64) uint32_t pairs[D / 2];
  float over_sum[kQueries];

  // A block of queries, packed in `query`, over the first keys; query i sees `seen + i * step` of them, at most
  // all. The result is left in `mixed`, to be multiplied by `over_sum`.
  void attend(int64_t seen, int64_t step, float scale, const float* bias) {
    const int64_t last = std::min(seen + (kQueries - 1) * step, packed.keys);
    const int64_t n = (last + kTile - 1) / kTile * kTile;
    if (static_cast<int64_t>(score.size()) < kQueries * n) {
      score.resize(kQueries * n);
      weight.resize(kQueries * n / 2);
    }
    for (int64_t j = 0; j < n; j += kTile) {
      score_tile<D>(query, packed.key.data() + j * (D / 2), score.data() + j, n);
    }
    for (int64_t i = 0; i < kQueries; ++i) {
      const int64_t mine = std::min(seen + i * step, packed.keys);
      over_sum[i] = weights(score.data() + i * n, n, mine, scale, bias, weight.data() + i * (n / 2));
    }
    for (int64_t c = 0; c < D; c += kTile) {
      mix_tile<D>(weight.data(), n / 2, packed.value.data() + c, n / 2, mixed + c);
    }
  }
};

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
  const BFloat16 *query, *pages;
  BFloat16* out;
  int64_t query_stride, head_stride, page_stride, out_stride, out_head_stride;
  int64_t group;
  const int64_t *row, *position;
  const bool* image;
  int64_t queries;
  const int64_t *key_page, *key_position;
  const bool* key_image;
  int64_t keys;
  const float* angles;
  float scale;

  void run(Desk<D>& desk) const {
    gather_keys(desk);
    const auto [low, high] = std::minmax_element(row, row + queries);
    const int64_t first = *low, rows = *high - *low + 1;
    for (int64_t g = 0; g < group; ++g) {
      desk.total.assign(rows * D, 0.f);
      desk.copies.assign(rows, 0);
      for (int64_t begin = 0; begin < queries; begin += kQueries) {
        const int64_t n = std::min(kQueries, queries - begin);
        std::fill(desk.query, desk.query + kQueries * D / 2, 0u);
        for (int64_t i = 0; i < n; ++i) gather_query(desk, begin + i, g, desk.query + i * (D / 2));
        // A request's queries stand at its last positions.
        desk.attend(keys - queries + begin + 1, 1, scale, nullptr);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t mine = row[begin + i] - first;
          add_row(desk.mixed + i * D, desk.total.data() + mine * D, D, desk.over_sum[i]);
          ++desk.copies[mine];
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        if (desk.copies[r] == 0) continue;
        BFloat16* to = out + (first + r) * out_stride + g * out_head_stride;
        store_row(desk.total.data() + r * D, to, D, 1.f / static_cast<float>(desk.copies[r]));
      }
    }
  }

  void gather_keys(Desk<D>& desk) const {
    desk.packed.start(keys);
    for (int64_t j = 0; j < keys; ++j) {
      const BFloat16* page = pages + key_page[j] * page_stride;
      desk.packed.set_key(j, turned(desk, page, key_image[j], key_position[j], desk.pairs));
      if (j % 2 == 0) {
        desk.packed.set_values(j, page + D, j + 1 < keys ? pages + key_page[j + 1] * page_stride + D : nullptr);
      }
    }
  }

  void gather_query(Desk<D>& desk, int64_t i, int64_t g, uint32_t* to) const {
    turned(desk, query + row[i] * query_stride + g * head_stride, image[i], position[i], to);
  }

  const uint32_t* turned(Desk<D>& desk, const BFloat16* from, bool turns, int64_t at, uint32_t* to) const {
    if (turns) {
      load_row(from, desk.row, D);
      rotate_row<D>(desk.row, angles + at * D);
      pack_row<D>(desk.row, to);
    } else {
      std::copy_n(reinterpret_cast<const uint16_t*>(from), D, halves(to));
    }
    return to;
  }
};

template <int64_t D>
void prefill(const Tensor& query, const Tensor& pages, const Tensor& rows, const Tensor& positions,
             const Tensor& image, const Tensor& query_ptr, const Tensor& key_page, const Tensor& key_positions,
             const Tensor& key_image, const Tensor& key_ptr, const Tensor& angles, double scale,
             const Tensor& out) {
  const int64_t requests = query_ptr.size(0) - 1, kv_heads = pages.size(1);
  const int64_t group = query.size(1) / kv_heads;
  const int64_t *q_ptr = query_ptr.data_ptr<int64_t>(), *k_ptr = key_ptr.data_ptr<int64_t>();
  at::parallel_for(0, requests * kv_heads, 1, [&](int64_t begin, int64_t end) {
    const Tiles tiles;
    Desk<D> desk;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r = task / kv_heads, h = task % kv_heads;
      const Prefill<D> work{query.data_ptr<BFloat16>() + h * group * query.stride(1),
                            pages.data_ptr<BFloat16>() + h * pages.stride(1),
                            out.data_ptr<BFloat16>() + h * group * out.stride(1),
                            query.stride(0), query.stride(1), pages.stride(0), out.stride(0), out.stride(1),
                            group,
                            rows.data_ptr<int64_t>() + q_ptr[r], positions.data_ptr<int64_t>() + q_ptr[r],
                            image.data_ptr<bool>() + q_ptr[r], q_ptr[r + 1] - q_ptr[r],
                            key_page.data_ptr<int64_t>() + k_ptr[r],
                            key_positions.data_ptr<int64_t>() + k_ptr[r],
                            key_image.data_ptr<bool>() + k_ptr[r], k_ptr[r + 1] - k_ptr[r],
                            angles.data_ptr<float>(), static_cast<float>(scale)};
      if (work.queries > 0) work.run(desk);
    }
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
  at::parallel_for(0, sequences * heads, 1, [&](int64_t begin, int64_t end) {
    const Tiles tiles;
    Desk<D> desk;
    std::vector<float> padded_bias;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t s = task / heads, h = task % heads, first = start[s], tokens = start[s + 1] - first;
      if (tokens == 0) continue;
      desk.packed.start(tokens);
      for (int64_t j = 0; j < tokens; ++j) {
        std::copy_n(reinterpret_cast<const uint16_t*>(row(key, first + j, h)), D, halves(desk.pairs));
        desk.packed.set_key(j, desk.pairs);
        if (j % 2 == 0) {
          desk.packed.set_values(j, row(value, first + j, h), j + 1 < tokens ? row(value, first + j + 1, h) : nullptr);
        }
      }
      padded_bias.assign(desk.packed.padded, 0.f);
      std::copy_n(bias.data_ptr<float>() + first, tokens, padded_bias.data());
      for (int64_t q = 0; q < tokens; q += kQueries) {
        const int64_t n = std::min(kQueries, tokens - q);
        std::fill(desk.query, desk.query + kQueries * D / 2, 0u);
        for (int64_t i = 0; i < n; ++i) {
          std::copy_n(reinterpret_cast<const uint16_t*>(row(query, first + q + i, h)), D,
                      halves(desk.query + i * (D / 2)));
        }
        desk.attend(tokens, 0, static_cast<float>(scale), padded_bias.data());
        for (int64_t i = 0; i < n; ++i) {
          store_row(desk.mixed + i * D, row(out, first + q + i, h), D, desk.over_sum[i]);
        }
      }
    }
  });
}

}  // namespace

bool bf16_serves(int64_t head_size) { return (head_size == 64 || head_size == 128) && tiles_granted(); }

#define BY_HEAD_SIZE(CALL, ...)                        \
  TORCH_CHECK(bf16_serves(query.size(2)), "head size " , query.size(2), " has no bf16 kernel"); \
  if (query.size(2) == 64) CALL<64>(__VA_ARGS__);      \
  else CALL<128>(__VA_ARGS__)

void bf16_prefill(const Tensor& query, const Tensor& pages, const Tensor& rows, const Tensor& positions,
                  const Tensor& image, const Tensor& query_ptr, const Tensor& key_page,
                  const Tensor& key_positions, const Tensor& key_image, const Tensor& key_ptr,
                  const Tensor& angles, double scale, const Tensor& out) {
  TORCH_CHECK(query.stride(2) == 1 && pages.stride(2) == 1 && out.stride(2) == 1,
              "prefill needs unit stride along the head");
  BY_HEAD_SIZE(prefill, query, pages, rows, positions, image, query_ptr, key_page, key_positions, key_image,
               key_ptr, angles, scale, out);
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
