// How single queries are parted into tasks: one is a request and some of its heads.
#pragma once

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <cstdint>

template <typename scalar_t>
struct DecodeTask {
  const scalar_t* query;      // [heads, head_size], query_stride apart
  const scalar_t* kv_rows;    // KV rows, at the first of the heads
  scalar_t* out;              // [heads, head_size], out_stride apart
  int64_t query_stride, out_stride, kv_row_stride, head_stride;
  int64_t heads, group, head_size;
  float scale;
  const float* cos_sin_cache;
  const int64_t* kv_row_index;  // of the request's rows
  const bool* is_image;
  const int64_t* member_ptr;
  const int64_t* member_pos;
  int64_t rows;
  float* importance;          // per row, or null
};

// Calls run(task, scratch) for every task; a thread's scratch is its own. Arguments as those of decode.
template <typename scalar_t, class Scratch, class Run>
void run_decodes(const at::Tensor& query, const at::Tensor& query_rows, const at::Tensor& requests,
                 const at::Tensor& kv_rows, const at::Tensor& row_ptr, const at::Tensor& kv_row_index,
                 const at::Tensor& is_image, const at::Tensor& member_ptr, const at::Tensor& member_pos,
                 const at::Tensor& cos_sin_cache, double scale, const at::Tensor& out, const at::Tensor& importance,
                 const Run& run) {
  const int64_t queries = query_rows.size(0), kv_heads = kv_rows.size(1), group = query.size(1) / kv_heads;
  TORCH_CHECK(query.stride(2) == 1 && kv_rows.stride(2) == 1 && out.stride(2) == 1,
              "decode needs unit stride along the head");
  const int64_t *q_row = query_rows.data_ptr<int64_t>(), *req = requests.data_ptr<int64_t>();
  const int64_t *rptr = row_ptr.data_ptr<int64_t>(), *mptr = member_ptr.data_ptr<int64_t>();
  // A KV row holds all heads, so rows are the outer loop; requests are split by heads only where there
  // are fewer of them than threads.
  const int64_t parts = std::clamp<int64_t>(at::get_num_threads() / std::max<int64_t>(queries, 1), 1, kv_heads);
  const bool wants_importance = importance.numel() > 0;
  at::Tensor importance_of_part = wants_importance ? at::zeros({parts, importance.size(0)}, at::kFloat) : importance;
  at::parallel_for(0, queries * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / parts, part = task % parts, row0 = rptr[req[i]];
      const int64_t head0 = part * kv_heads / parts, head1 = (part + 1) * kv_heads / parts;
      const DecodeTask<scalar_t> work{
          query.data_ptr<scalar_t>() + q_row[i] * query.stride(0) + head0 * group * query.stride(1),
          kv_rows.data_ptr<scalar_t>() + head0 * kv_rows.stride(1),
          out.data_ptr<scalar_t>() + q_row[i] * out.stride(0) + head0 * group * out.stride(1),
          query.stride(1), out.stride(1), kv_rows.stride(0), kv_rows.stride(1),
          (head1 - head0) * group, group, query.size(2), static_cast<float>(scale), cos_sin_cache.data_ptr<float>(),
          kv_row_index.data_ptr<int64_t>() + row0, is_image.data_ptr<bool>() + row0, mptr + row0,
          member_pos.data_ptr<int64_t>(), rptr[req[i] + 1] - row0,
          wants_importance ? importance_of_part.data_ptr<float>() + part * importance.size(0) + row0 : nullptr};
      run(work, scratch);
    }
  });
  if (wants_importance) importance.copy_(importance_of_part.sum(0));
}
