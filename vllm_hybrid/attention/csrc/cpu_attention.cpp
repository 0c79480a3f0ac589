// Virtual unmerging attention on a CPU: key index, expansion to virtual positions, decode.
//
// A "KV row" is one slot of a KV page of one layer: for every key/value head the key followed by the
// value, contiguous ([kv_heads, 2 * head_size]). Keys of image tokens are stored unrotated.
// The Python side (vllm_hybrid/attention/cpu.py) documents shapes and meaning of every argument.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/extension.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu_bf16.h"
#include "decode_task.h"

#define DISPATCH(TYPE, NAME, ...)                                                                       \
  AT_DISPATCH_SWITCH(TYPE, NAME,                                                                        \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;

// Layout of one slot's page facts (int32 words); see vllm_hybrid/kv/page_facts.py.
constexpr int64_t kStart = 0;   // 1 + virtual position of the image's first patch, 0 for text
constexpr int64_t kCount = 1;   // live rows of the image in this tier
constexpr int64_t kMask = 2;    // bit mask over the image's patches

// Head sizes are multiples of 32 (checked on the Python side), so whole vectors cover a head.
inline __attribute__((always_inline)) float sum(const Vec& v) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_ps(v);
#else
  float lane[Vec::size()], total = 0.f;
  v.store(lane);
  for (const float x : lane) total += x;
  return total;
#endif
}

// D is the head size where the compiler may know it, else 0: then n tells.
template <int64_t D>
inline __attribute__((always_inline)) float dot(const float* a, const float* b, int64_t n) {
  Vec total(0.f);
#pragma GCC unroll 8
  for (int64_t i = 0; i < (D ? D : n); i += Vec::size()) total = at::vec::fmadd(Vec::loadu(a + i), Vec::loadu(b + i), total);
  return sum(total);
}

// Calls use(i, vector) for the n values at `from`, in float vectors.
template <typename scalar_t, typename F>
inline __attribute__((always_inline)) void each(const scalar_t* from, int64_t n, const F& use) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    for (int64_t i = 0; i < n; i += Vec::size()) use(i, Vec::loadu(from + i));
  } else {
    using Packed = at::vec::Vectorized<scalar_t>;
    for (int64_t i = 0; i < n; i += Packed::size()) {
      const auto [low, high] = at::vec::convert_to_float<scalar_t>(Packed::loadu(from + i));
      use(i, low);
      use(i + Vec::size(), high);
    }
  }
}

template <typename scalar_t>
inline __attribute__((always_inline)) void load(const scalar_t* from, float* to, int64_t n) {
  each(from, n, [&](int64_t i, const Vec& v) { v.store(to + i); });
}

template <typename scalar_t>
inline __attribute__((always_inline)) void add(const scalar_t* from, float* to, int64_t n, float factor = 1.f) {
  const Vec f(factor);
  each(from, n, [&](int64_t i, const Vec& v) { at::vec::fmadd(v, f, Vec::loadu(to + i)).store(to + i); });
}

template <typename scalar_t>
void store(const float* from, scalar_t* to, int64_t n, float factor = 1.f) {
  const Vec f(factor);
  if constexpr (std::is_same_v<scalar_t, float>) {
    for (int64_t i = 0; i < n; i += Vec::size()) (Vec::loadu(from + i) * f).store(to + i);
  } else {
    using Packed = at::vec::Vectorized<scalar_t>;
    for (int64_t i = 0; i < n; i += Packed::size()) {
      at::vec::convert_from_float<scalar_t>(Vec::loadu(from + i) * f, Vec::loadu(from + i + Vec::size()) * f)
          .store(to + i);
    }
  }
}

// z such that q . R(j) k = sum_c cos(j t_c) z[c] + sin(j t_c) z[c + half]
void correlate(const float* q, const float* k, float* z, int64_t half) {
#pragma omp simd
  for (int64_t c = 0; c < half; ++c) {
    z[c] = q[c] * k[c] + q[c + half] * k[c + half];
    z[c + half] = q[c + half] * k[c] - q[c] * k[c + half];
  }
}

// x <- rotation of x (two halves) by the angles whose cosines and sines stand in `cos_sin`.
void rotate(float* x, const float* cos_sin, int64_t head_size) {
  const int64_t half = head_size / 2;
#pragma omp simd
  for (int64_t c = 0; c < half; ++c) {
    const float a = x[c], b = x[c + half];
    x[c] = a * cos_sin[c] - b * cos_sin[c + half];
    x[c + half] = b * cos_sin[c] + a * cos_sin[c + half];
  }
}

void exp_in_place(float* x, int64_t n, float shift) {
  int64_t i = 0;
  for (; i + Vec::size() <= n; i += Vec::size()) {
    (Vec::loadu(x + i) - Vec(shift)).exp_u20().store(x + i);
  }
  for (; i < n; ++i) x[i] = std::exp(x[i] - shift);
}

// weight[row] <- softmax of the keys' logits, summed over the row's members. Overwrites the logits.
void row_weights(float* logit, int64_t keys, const int64_t* member_ptr, int64_t rows, float* weight) {
  float m_i = -std::numeric_limits<float>::infinity();
  for (int64_t m = 0; m < keys; ++m) m_i = std::max(m_i, logit[m]);
  exp_in_place(logit, keys, m_i);
  float l_i = 0.f;
  for (int64_t row = 0; row < rows; ++row) {
    float sum = 0.f;
    for (int64_t m = member_ptr[row]; m < member_ptr[row + 1]; ++m) sum += logit[m - member_ptr[0]];
    weight[row] = sum;
    l_i += sum;
  }
  for (int64_t row = 0; row < rows; ++row) weight[row] /= l_i;
}

}  // namespace

// Virtual key lists of every request, read from its live pages.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> build_key_index(
    const Tensor& facts, const Tensor& block_table, const Tensor& seq_lens, int64_t patches,
    int64_t kv_rows_per_block) {
  TORCH_CHECK(facts.dtype() == at::kInt && facts.is_contiguous(), "page facts must be contiguous int32");
  TORCH_CHECK(block_table.dtype() == at::kInt && block_table.stride(1) == 1, "block table must be int32 rows");
  const int64_t block_size = facts.size(1), words = facts.size(2), requests = seq_lens.size(0);
  const int32_t* fact = facts.data_ptr<int32_t>();
  const Tensor lens_tensor = seq_lens.to(at::kLong);
  const int64_t* lens = lens_tensor.data_ptr<int64_t>();
  std::vector<int64_t> row_ptr{0}, kv_row_index, member_ptr{0}, member_pos;
  std::vector<uint8_t> is_image;
  for (int64_t r = 0; r < requests; ++r) {
    const int32_t* table = block_table.data_ptr<int32_t>() + r * block_table.stride(0);
    const auto block_and_offset = [&](int64_t slot) {
      return std::pair<int64_t, int64_t>(table[slot / block_size], slot % block_size);
    };
    int64_t position = 0;
    while (position < lens[r]) {
      const auto [block, offset] = block_and_offset(position);
      const int32_t* head = fact + (block * block_size + offset) * words;
      if (head[kStart] == 0) {
        kv_row_index.push_back(block * kv_rows_per_block + offset);
        is_image.push_back(0);
        member_pos.push_back(position);
        member_ptr.push_back(static_cast<int64_t>(member_pos.size()));
        ++position;
        continue;
      }
      const int64_t count = head[kCount];
      const bool fits = count >= 1 && count <= patches && position + patches <= lens[r];
      TORCH_CHECK(fits && head[kStart] - 1 == position, "page facts of slot ", position, " name image start ",
                  head[kStart] - 1, " and ", count, " live rows: the page holds another request's data");
      for (int64_t j = 0; j < count; ++j) {
        const auto [b, o] = block_and_offset(position + j);
        const int32_t* mine = fact + (b * block_size + o) * words;
        kv_row_index.push_back(b * kv_rows_per_block + o);
        is_image.push_back(1);
        for (int64_t w = 0; w < words - kMask; ++w) {
          for (uint32_t bits = static_cast<uint32_t>(mine[kMask + w]); bits; bits &= bits - 1) {
            member_pos.push_back(position + 32 * w + __builtin_ctz(bits));
          }
        }
        member_ptr.push_back(static_cast<int64_t>(member_pos.size()));
      }
      position += patches;
    }
    row_ptr.push_back(static_cast<int64_t>(kv_row_index.size()));
  }
  const auto longs = [](const std::vector<int64_t>& v) {
    Tensor t = at::empty({static_cast<int64_t>(v.size())}, at::kLong);
    std::memcpy(t.data_ptr(), v.data(), v.size() * sizeof(int64_t));
    return t;
  };
  Tensor image = at::empty({static_cast<int64_t>(is_image.size())}, at::kBool);
  std::memcpy(image.data_ptr(), is_image.data(), is_image.size());
  return {longs(row_ptr), longs(kv_row_index), image, longs(member_ptr), longs(member_pos)};
}

// kv_rows[kv_row_index[i], h] = key[i, h] followed by value[i, h].
void write_rows(const Tensor& key, const Tensor& value, const Tensor& kv_rows, const Tensor& kv_row_index) {
  const int64_t n = kv_row_index.size(0), heads = kv_rows.size(1), head_size = key.size(2);
  TORCH_CHECK(key.stride(2) == 1 && value.stride(2) == 1 && kv_rows.stride(2) == 1 &&
                  key.scalar_type() == kv_rows.scalar_type() && value.scalar_type() == kv_rows.scalar_type(),
              "write needs unit stride along the head and one dtype");
  const int64_t* kv_row = kv_row_index.data_ptr<int64_t>();
  const size_t item = key.element_size(), width = head_size * item;
  const char *k = static_cast<const char*>(key.data_ptr()), *v = static_cast<const char*>(value.data_ptr());
  char* to = static_cast<char*>(kv_rows.data_ptr());
  at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        char* cell = to + (kv_row[i] * kv_rows.stride(0) + h * kv_rows.stride(1)) * item;
        std::memcpy(cell, k + (i * key.stride(0) + h * key.stride(1)) * item, width);
        std::memcpy(cell + width, v + (i * value.stride(0) + h * value.stride(1)) * item, width);
      }
    }
  });
}

// out[i, h, :] = source[rows[i], h, offset : offset + head_size], rotated to positions[i] where image[i].
void expand(const Tensor& source, const Tensor& rows, const Tensor& positions, const Tensor& image,
            const Tensor& cos_sin_cache, int64_t offset, bool rotated, const Tensor& out) {
  const int64_t n = out.size(0), heads = out.size(1), head_size = out.size(2);
  TORCH_CHECK(source.stride(2) == 1 && out.is_contiguous(), "expand needs unit stride along the head");
  const int64_t *row = rows.data_ptr<int64_t>(), *position = positions.data_ptr<int64_t>();
  const bool* rotates = image.data_ptr<bool>();
  const float* table = cos_sin_cache.data_ptr<float>();
  const int64_t row_stride = source.stride(0), head_stride = source.stride(1);
  DISPATCH(source.scalar_type(), "expand", [&] {
      const scalar_t* from = source.data_ptr<scalar_t>() + offset;
      scalar_t* to = out.data_ptr<scalar_t>();
      at::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
        std::vector<float> x(head_size);
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t h = 0; h < heads; ++h) {
            const scalar_t* src = from + row[i] * row_stride + h * head_stride;
            scalar_t* dst = to + (i * heads + h) * head_size;
            if (!rotated || !rotates[i]) {
              std::memcpy(dst, src, head_size * sizeof(scalar_t));
              continue;
            }
            load(src, x.data(), head_size);
            rotate(x.data(), table + position[i] * head_size, head_size);
            store(x.data(), dst, head_size);
          }
        }
      });
  });
}

// out[segment_row[s], :] = mean of copies[order[k], :] over k in [segment_ptr[s], segment_ptr[s + 1]).
void segment_mean(const Tensor& copies, const Tensor& order, const Tensor& segment_ptr, const Tensor& segment_row,
                  const Tensor& out) {
  const int64_t width = copies.size(1) * copies.size(2), segments = segment_row.size(0);
  TORCH_CHECK(copies.is_contiguous() && out[0].is_contiguous(), "segment_mean needs contiguous rows");
  const int64_t *at = order.data_ptr<int64_t>(), *ptr = segment_ptr.data_ptr<int64_t>();
  const int64_t* row = segment_row.data_ptr<int64_t>();
  DISPATCH(copies.scalar_type(), "segment_mean", [&] {
      const scalar_t* from = copies.data_ptr<scalar_t>();
      scalar_t* to = out.data_ptr<scalar_t>();
      at::parallel_for(0, segments, 8, [&](int64_t begin, int64_t end) {
        std::vector<float> total(width);
        for (int64_t s = begin; s < end; ++s) {
          std::fill(total.begin(), total.end(), 0.f);
          for (int64_t k = ptr[s]; k < ptr[s + 1]; ++k) add(from + at[k] * width, total.data(), width);
          store(total.data(), to + row[s] * out.stride(0), width, 1.f / static_cast<float>(ptr[s + 1] - ptr[s]));
        }
      });
  });
}

struct Scratch {
  std::vector<float> query, logit, weight, acc;
};

// One decode query over some heads: the scores of every virtual key, their softmax, the weighted values. D is
// the head size where the compiler may know it, else 0.
template <typename scalar_t, int64_t D>
struct Decode {
  const DecodeTask<scalar_t>& task;
  Scratch& scratch;
  const int64_t d = D ? D : task.head_size, first = task.member_ptr[0],
                keys = task.member_ptr[task.rows] - first;

  void run() const {
    scratch.query.resize(task.heads * d);
    scratch.logit.resize(task.heads * keys);
    scratch.weight.resize(task.heads * task.rows);
    scratch.acc.assign(task.heads * d, 0.f);
    for (int64_t g = 0; g < task.heads; ++g) {
      float* to = scratch.query.data() + g * d;
      each(task.query + g * task.query_stride, d,
           [&](int64_t i, const Vec& v) { (v * Vec(task.scale)).store(to + i); });
    }
    for (int64_t row = 0; row < task.rows; ++row) score(row);
    for (int64_t g = 0; g < task.heads; ++g) {
      row_weights(scratch.logit.data() + g * keys, keys, task.member_ptr, task.rows,
                  scratch.weight.data() + g * task.rows);
    }
    for (int64_t row = 0; row < task.rows; ++row) {
      for (int64_t g = 0; g < task.heads; ++g) {
        const float w = scratch.weight[g * task.rows + row];
        add(key(row, g) + d, scratch.acc.data() + g * d, d, w);
        if (task.importance) task.importance[row] += w;
      }
    }
    for (int64_t g = 0; g < task.heads; ++g) {
      store(scratch.acc.data() + g * d, task.out + g * task.out_stride, d);
    }
  }

  const scalar_t* key(int64_t row, int64_t head) const {
    return task.kv_rows + task.kv_row_index[row] * task.kv_row_stride + head / task.group * task.head_stride;
  }

  void score(int64_t row) const {
    alignas(64) float k[512], z[512];
    const int64_t begin = task.member_ptr[row], end = task.member_ptr[row + 1];
    for (int64_t g = 0; g < task.heads; ++g) {
      if (g % task.group == 0) load(key(row, g), k, d);
      const float* q = scratch.query.data() + g * d;
      float* to = scratch.logit.data() + g * keys - first;
      if (!task.is_image[row]) {
        to[begin] = dot<D>(q, k, d);
        continue;
      }
      correlate(q, k, z, d / 2);
      for (int64_t m = begin; m < end; ++m) to[m] = dot<D>(z, task.cos_sin_cache + task.member_pos[m] * d, d);
    }
  }
};

// Attention of single, already rotated queries over the virtual keys of their requests. `importance`, where it
// is not empty, receives each row's share of the attention, summed over the query heads given here.
void decode(const Tensor& query, const Tensor& query_rows, const Tensor& requests, const Tensor& kv_rows,
            const Tensor& row_ptr, const Tensor& kv_row_index, const Tensor& is_image, const Tensor& member_ptr,
            const Tensor& member_pos, const Tensor& cos_sin_cache, double scale, const Tensor& out,
            const Tensor& importance) {
  const int64_t head_size = query.size(2);
  TORCH_CHECK(head_size % 32 == 0 && head_size <= 512, "the head size is ", head_size,
              ", but CPU attention needs a multiple of 32 up to 512");
  DISPATCH(query.scalar_type(), "decode", [&] {
    const auto run = [&](const DecodeTask<scalar_t>& task, Scratch& scratch) {
      if (head_size == 64) Decode<scalar_t, 64>{task, scratch}.run();
      else if (head_size == 128) Decode<scalar_t, 128>{task, scratch}.run();
      else Decode<scalar_t, 0>{task, scratch}.run();
    };
    run_decodes<scalar_t, Scratch>(query, query_rows, requests, kv_rows, row_ptr, kv_row_index, is_image, member_ptr,
                                member_pos, cos_sin_cache, scale, out, importance, run);
  });
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_key_index", &build_key_index);
  m.def("write_rows", &write_rows);
  m.def("expand", &expand);
  m.def("segment_mean", &segment_mean);
  m.def("decode", &decode);
  m.def("bf16_decode", &bf16_decode);
  m.def("bf16_serves", &bf16_serves);
  m.def("bf16_prefill", &bf16_prefill);
  m.def("bf16_weighed", &bf16_weighed);
}
