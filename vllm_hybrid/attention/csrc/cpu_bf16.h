// Attention in bf16 on CPUs with AVX512-BF16: see cpu_bf16.cpp, and for single queries cpu_bf16_decode.cpp.
#pragma once
#include <torch/extension.h>

// Whether this build has the kernels, the process may use them, and they serve a head size.
bool bf16_serves(int64_t head_size);

void bf16_prefill(const at::Tensor& query, const at::Tensor& kv_rows, const at::Tensor& rows,
                  const at::Tensor& positions, const at::Tensor& image, const at::Tensor& query_start_loc,
                  const at::Tensor& kv_row_index, const at::Tensor& key_positions, const at::Tensor& key_image,
                  const at::Tensor& key_start_loc, const at::Tensor& cos_sin_cache, double scale, const at::Tensor& out);

void bf16_weighed(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const at::Tensor& starts, const at::Tensor& bias, double scale, const at::Tensor& out);

void bf16_decode(const at::Tensor& query, const at::Tensor& query_rows, const at::Tensor& requests,
                 const at::Tensor& kv_rows, const at::Tensor& row_ptr, const at::Tensor& kv_row_index,
                 const at::Tensor& is_image, const at::Tensor& member_ptr, const at::Tensor& member_pos,
                 const at::Tensor& cos_sin_cache, double scale, const at::Tensor& out, const at::Tensor& importance);
