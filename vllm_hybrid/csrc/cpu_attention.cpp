// Virtual unmerging attention on a CPU: page walk, expansion to virtual positions, decode.
//
// A "page row" is one slot of a KV page of one layer: for every key/value head the key followed by the
// value, contiguous ([kv_heads, 2 * head_size]). Keys of image tokens are stored unrotated.
// The Python side (vllm_hybrid/cpu_attention.py) documents shapes and meaning of every argument.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/extension.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;

// Layout of one slot's page facts (int32 words); see vllm_hybrid/pages.py.
constexpr int64_t kStart = 0;   // 1 + virtual position of the image's first patch, 0 for text
constexpr int64_t kCount = 1;   // live rows of the image in this tier
constexpr int64_t kMask = 2;    // bit mask over the image's patches

float dot(const float* a, const float* b, int64_t n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename scalar_t>
void load(const scalar_t* from, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

template <typename scalar_t>
void store(const float* from, scalar_t* to, int64_t n, float factor = 1.f) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<scalar_t>(from[i] * factor);
}

template <typename scalar_t>
void add(const scalar_t* from, float* to, int64_t n, float factor = 1.f) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += factor * static_cast<float>(from[i]);
}

// z such that q . R(j) k = sum_c cos(j t_c) z[c] + sin(j t_c) z[c + half]
void correlate(const float* q, const float* k, float* z, int64_t half) {
#pragma omp simd
  for (int64_t c = 0; c < half; ++c) {
    z[c] = q[c] * k[c] + q[c + half] * k[c + half];
    z[c + half] = q[c + half] * k[c] - q[c] * k[c + half];
  }
}

// x <- rotation of x (two halves) by the angles whose cosines and sines stand in `angles`.
void rotate(float* x, const float* angles, int64_t head_size) {
  const int64_t half = head_size / 2;
#pragma omp simd
  for (int64_t c = 0; c < half; ++c) {
    const float a = x[c], b = x[c + half];
    x[c] = a * angles[c] - b * angles[c + half];
    x[c + half] = b * angles[c] + a * angles[c + half];
  }
}

void exp_in_place(float* x, int64_t n, float shift) {
  int64_t i = 0;
  for (; i + Vec::size() <= n; i += Vec::size()) {
    (Vec::loadu(x + i) - Vec(shift)).exp_u20().store(x + i);
  }
  for (; i < n; ++i) x[i] = std::exp(x[i] - shift);
}

}  // namespace

// Virtual key lists of every request, read from its live pages.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> walk_pages(const Tensor& facts, const Tensor& block_table,
                                                             const Tensor& seq_lens, int64_t patches,
                                                             int64_t rows_per_block) {
  TORCH_CHECK(facts.dtype() == at::kInt && facts.is_contiguous(), "page facts must be contiguous int32");
  TORCH_CHECK(block_table.dtype() == at::kInt && block_table.stride(1) == 1, "block table must be int32 rows");
  const int64_t block_size = facts.size(1), words = facts.size(2), requests = seq_lens.size(0);
  const int32_t* fact = facts.data_ptr<int32_t>();
  const Tensor lens_tensor = seq_lens.to(at::kLong);
  const int64_t* lens = lens_tensor.data_ptr<int64_t>();
  std::vector<int64_t> row_ptr{0}, row_page, member_ptr{0}, member_pos;
  std::vector<uint8_t> row_image;
  for (int64_t r = 0; r < requests; ++r) {
    const int32_t* table = block_table.data_ptr<int32_t>() + r * block_table.stride(0);
    const auto page_of = [&](int64_t slot) {
      return std::pair<int64_t, int64_t>(table[slot / block_size], slot % block_size);
    };
    int64_t position = 0;
    while (position < lens[r]) {
      const auto [block, offset] = page_of(position);
      const int32_t* head = fact + (block * block_size + offset) * words;
      if (head[kStart] == 0) {
        row_page.push_back(block * rows_per_block + offset);
        row_image.push_back(0);
        member_pos.push_back(position);
        member_ptr.push_back(static_cast<int64_t>(member_pos.size()));
        ++position;
        continue;
      }
      TORCH_CHECK(head[kStart] - 1 == position, "page facts of slot ", position, " name image start ",
                  head[kStart] - 1, ": the page holds another request's data");
      const int64_t count = head[kCount];
      for (int64_t j = 0; j < count; ++j) {
        const auto [b, o] = page_of(position + j);
        const int32_t* mine = fact + (b * block_size + o) * words;
        row_page.push_back(b * rows_per_block + o);
        row_image.push_back(1);
        for (int64_t w = 0; w < words - kMask; ++w) {
          for (uint32_t bits = static_cast<uint32_t>(mine[kMask + w]); bits; bits &= bits - 1) {
            member_pos.push_back(position + 32 * w + __builtin_ctz(bits));
          }
        }
        member_ptr.push_back(static_cast<int64_t>(member_pos.size()));
      }
      position += patches;
    }
    row_ptr.push_back(static_cast<int64_t>(row_page.size()));
  }
  const auto longs = [](const std::vector<int64_t>& v) {
    Tensor t = at::empty({static_cast<int64_t>(v.size())}, at::kLong);
    std::memcpy(t.data_ptr(), v.data(), v.size() * sizeof(int64_t));
    return t;
  };
  Tensor image = at::empty({static_cast<int64_t>(row_image.size())}, at::kBool);
  std::memcpy(image.data_ptr(), row_image.data(), row_image.size());
  return {longs(row_ptr), longs(row_page), image, longs(member_ptr), longs(member_pos)};
}

// out[h, i, :] = source[rows[i], h, offset : offset + head_size], rotated to positions[i] where image[i].
void expand(const Tensor& source, const Tensor& rows, const Tensor& positions, const Tensor& image,
            const Tensor& angles, int64_t offset, bool rotated, const Tensor& out) {
  const int64_t heads = out.size(0), n = out.size(1), head_size = out.size(2);
  TORCH_CHECK(source.stride(2) == 1 && out.is_contiguous(), "expand needs unit stride along the head");
  const int64_t *row = rows.data_ptr<int64_t>(), *position = positions.data_ptr<int64_t>();
  const bool* turn = image.data_ptr<bool>();
  const float* table = angles.data_ptr<float>();
  const int64_t row_stride = source.stride(0), head_stride = source.stride(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, source.scalar_type(), "expand", [&] {
    const scalar_t* from = source.data_ptr<scalar_t>() + offset;
    scalar_t* to = out.data_ptr<scalar_t>();
    at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
      std::vector<float> x(head_size);
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t h = 0; h < heads; ++h) {
          const scalar_t* src = from + row[i] * row_stride + h * head_stride;
          scalar_t* dst = to + (h * n + i) * head_size;
          if (!rotated || !turn[i]) {
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

// out[first + s, h, :] = mean of copies[h, order[k], :] over k in [segment_ptr[s], segment_ptr[s + 1]).
void segment_mean(const Tensor& copies, const Tensor& order, const Tensor& segment_ptr, const Tensor& out,
                  int64_t first) {
  const int64_t heads = copies.size(0), n = copies.size(1), head_size = copies.size(2);
  const int64_t segments = segment_ptr.size(0) - 1;
  TORCH_CHECK(copies.stride(2) == 1 && out.stride(2) == 1, "segment_mean needs unit stride along the head");
  TORCH_CHECK(order.size(0) == n, "one place in the order per copy");
  const int64_t *at = order.data_ptr<int64_t>(), *ptr = segment_ptr.data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, copies.scalar_type(), "segment_mean", [&] {
    const scalar_t* from = copies.data_ptr<scalar_t>();
    scalar_t* to = out.data_ptr<scalar_t>();
    at::parallel_for(0, segments, 16, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(head_size);
      for (int64_t s = begin; s < end; ++s) {
        const float share = 1.f / static_cast<float>(ptr[s + 1] - ptr[s]);
        for (int64_t h = 0; h < heads; ++h) {
          std::fill(sum.begin(), sum.end(), 0.f);
          for (int64_t k = ptr[s]; k < ptr[s + 1]; ++k) {
            add(from + h * copies.stride(0) + at[k] * copies.stride(1), sum.data(), head_size);
          }
          store(sum.data(), to + (first + s) * out.stride(0) + h * out.stride(1), head_size, share);
        }
      }
    });
  });
}

// Attention of single, already rotated queries over the virtual keys of their requests. `mass`, where it
// is not empty, receives each row's share of the attention, summed over the query heads given here.
void decode(const Tensor& query, const Tensor& query_rows, const Tensor& requests, const Tensor& pages,
            const Tensor& row_ptr, const Tensor& row_page, const Tensor& row_image, const Tensor& member_ptr,
            const Tensor& member_pos, const Tensor& angles, double scale, const Tensor& out, const Tensor& mass) {
  const int64_t queries = query_rows.size(0), heads = query.size(1), head_size = query.size(2);
  const int64_t kv_heads = pages.size(1), group = heads / kv_heads, half = head_size / 2;
  TORCH_CHECK(query.stride(2) == 1 && pages.stride(2) == 1 && out.stride(2) == 1,
              "decode needs unit stride along the head");
  const int64_t *q_row = query_rows.data_ptr<int64_t>(), *req = requests.data_ptr<int64_t>();
  const int64_t *rptr = row_ptr.data_ptr<int64_t>(), *page = row_page.data_ptr<int64_t>();
  const int64_t *mptr = member_ptr.data_ptr<int64_t>(), *mpos = member_pos.data_ptr<int64_t>();
  const bool* is_image = row_image.data_ptr<bool>();
  const float* table = angles.data_ptr<float>();
  const bool wants_mass = mass.numel() > 0;
  Tensor head_mass = wants_mass ? at::zeros({kv_heads, mass.size(0)}, at::kFloat) : mass;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, query.scalar_type(), "decode", [&] {
    const scalar_t *q_data = query.data_ptr<scalar_t>(), *kv_data = pages.data_ptr<scalar_t>();
    scalar_t* out_data = out.data_ptr<scalar_t>();
    at::parallel_for(0, queries * kv_heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> q(group * head_size), k(head_size), z(head_size), acc(group * head_size), logit, weight;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = task / kv_heads, h = task % kv_heads, r = req[i];
        const int64_t row0 = rptr[r], row1 = rptr[r + 1], key0 = mptr[row0], keys = mptr[row1] - key0;
        const int64_t rows = row1 - row0;
        for (int64_t g = 0; g < group; ++g) {
          load(q_data + q_row[i] * query.stride(0) + (h * group + g) * query.stride(1), &q[g * head_size], head_size);
          for (int64_t c = 0; c < head_size; ++c) q[g * head_size + c] *= static_cast<float>(scale);
        }
        logit.resize(group * keys);
        weight.resize(group * rows);
        for (int64_t row = row0; row < row1; ++row) {
          load(kv_data + page[row] * pages.stride(0) + h * pages.stride(1), k.data(), head_size);
          for (int64_t g = 0; g < group; ++g) {
            const float* qg = &q[g * head_size];
            float* to = &logit[g * keys - key0];
            if (!is_image[row]) {
              to[mptr[row]] = dot(qg, k.data(), head_size);
              continue;
            }
            correlate(qg, k.data(), z.data(), half);
            for (int64_t m = mptr[row]; m < mptr[row + 1]; ++m) to[m] = dot(z.data(), table + mpos[m] * head_size, head_size);
          }
        }
        std::fill(acc.begin(), acc.end(), 0.f);
        for (int64_t g = 0; g < group; ++g) {
          float* p = &logit[g * keys];
          float top = -std::numeric_limits<float>::infinity();
          for (int64_t m = 0; m < keys; ++m) top = std::max(top, p[m]);
          exp_in_place(p, keys, top);
          float total = 0.f;
          for (int64_t row = row0; row < row1; ++row) {
            float sum = 0.f;
            for (int64_t m = mptr[row]; m < mptr[row + 1]; ++m) sum += p[m - key0];
            weight[g * rows + row - row0] = sum;
            total += sum;
          }
          const float share = 1.f / total;
          for (int64_t row = 0; row < rows; ++row) weight[g * rows + row] *= share;
        }
        for (int64_t row = row0; row < row1; ++row) {
          load(kv_data + page[row] * pages.stride(0) + h * pages.stride(1) + head_size, k.data(), head_size);
          for (int64_t g = 0; g < group; ++g) {
            const float w = weight[g * rows + row - row0];
            add(k.data(), &acc[g * head_size], head_size, w);
            if (wants_mass) head_mass.data_ptr<float>()[h * mass.size(0) + row] += w;
          }
        }
        for (int64_t g = 0; g < group; ++g) {
          store(&acc[g * head_size], out_data + q_row[i] * out.stride(0) + (h * group + g) * out.stride(1), head_size);
        }
      }
    });
  });
  if (wants_mass) mass.copy_(head_mass.sum(0));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("walk_pages", &walk_pages);
  m.def("expand", &expand);
  m.def("segment_mean", &segment_mean);
  m.def("decode", &decode);
}
