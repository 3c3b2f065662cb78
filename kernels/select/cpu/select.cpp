// Pooled block top-k selection for CPUs (the block-sparse method of The Sparse Frontier, arXiv 2504.17768): mean query
// of every query block against mean key of every key block, and per row the best blocks beside those always kept.
// Built and called like attend_cpu.cpp. Every row is ranked by (score, lower index first): the result depends on
// neither threads nor timing.

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

// Mirrored field by field in cpu_native.py. Strides in elements; every head dimension has stride 1.
struct Selection {
  const void *q, *k;
  const int32_t *q_segments, *kv_segments;  // [B, Sq], [B, Skv] contiguous, or null: who counts in the means
  const uint8_t* allowed;                   // [B or 1, H or 1, q_blocks, kv_blocks], or null: what the band shows
  const int32_t* budgets;                   // [B, H], blocks per row
  int32_t *counts, *indices;                // [B, H, q_blocks], [B, H, q_blocks, width] contiguous
  int64_t* visible;                         // [B, H, q_blocks]: allowed blocks
  int64_t batch, heads, kv_heads, q_len, kv_len, dim;
  int64_t q_block, kv_block, left, right, offset, width;
  int64_t rows_in_full;  // query blocks at the end that keep every allowed block
  int64_t q_b, q_h, q_s, k_b, k_h, k_s, allowed_b, allowed_h;
  double scale;
  int64_t type;  // 0 float, 1 bfloat16, 2 half
};

namespace {

int64_t blocks_of(int64_t length, int64_t block) { return (length + block - 1) / block; }

// Mean of tokens [first, last) whose segment is not -1; 0 if there is none.
template <typename T>
void mean(const T* x, int64_t step, int64_t dim, const int32_t* segments, int64_t first, int64_t last, float* out) {
  std::fill(out, out + dim, 0.0f);
  int64_t used = 0, i = first;
  for (; !segments && i + 4 <= last; i += 4, used += 4) {  // four at a time: the sums are read and written less often
    const T* token = x + i * step;
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) {
      out[d] += (static_cast<float>(token[d]) + static_cast<float>(token[step + d])) +
                (static_cast<float>(token[2 * step + d]) + static_cast<float>(token[3 * step + d]));
    }
  }
  for (; i < last; ++i) {
    if (segments && segments[i] == -1) continue;
    const T* token = x + i * step;
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) out[d] += static_cast<float>(token[d]);
    ++used;
  }
  const float part = used ? 1.0f / static_cast<float>(used) : 0.0f;
  for (int64_t d = 0; d < dim; ++d) out[d] *= part;
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

template <typename T>
void select(const Selection& c) {
  const int64_t q_blocks = blocks_of(c.q_len, c.q_block), kv_blocks = blocks_of(c.kv_len, c.kv_block);
  std::vector<float> keys(c.batch * c.kv_heads * c.dim * kv_blocks);  // [B, Hkv, D, kv_blocks]
  at::parallel_for(0, c.batch * c.kv_heads * kv_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(c.dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i % kv_blocks, head = i / kv_blocks, b = head / c.kv_heads;
      const T* x = static_cast<const T*>(c.k) + b * c.k_b + head % c.kv_heads * c.k_h;
      mean(x, c.k_s, c.dim, c.kv_segments ? c.kv_segments + b * c.kv_len : nullptr, block * c.kv_block,
           std::min(c.kv_len, (block + 1) * c.kv_block), row.data());
      for (int64_t d = 0; d < c.dim; ++d) keys[(head * c.dim + d) * kv_blocks + block] = row[d];
    }
  });
  at::parallel_for(0, c.batch * c.heads * q_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> query(c.dim), scores(kv_blocks);
    std::vector<uint8_t> state(kv_blocks);  // 1: kept
    std::vector<std::pair<float, int64_t>> rest;
    const auto better = [](const auto& a, const auto& b) {
      return a.first > b.first || (a.first == b.first && a.second < b.second);
    };
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % q_blocks, h = i / q_blocks % c.heads, b = i / q_blocks / c.heads;
      const int64_t first = row * c.q_block, last = std::min(c.q_len, first + c.q_block) - 1;
      // Blocks that the band shows: from the first key of the first query to the last key of the last one.
      const int64_t low_key = c.left < 0 ? 0 : std::max<int64_t>(0, first + c.offset - c.left);
      const int64_t high_key = c.right < 0 ? c.kv_len - 1 : std::min(c.kv_len - 1, last + c.offset + c.right);
      const int64_t low = low_key <= high_key ? low_key / c.kv_block : 0;
      const int64_t high = low_key <= high_key ? high_key / c.kv_block + 1 : 0;
      const uint8_t* allowed = c.allowed ? c.allowed + b * c.allowed_b + h * c.allowed_h + row * kv_blocks : nullptr;

      mean(static_cast<const T*>(c.q) + b * c.q_b + h * c.q_h, c.q_s, c.dim,
           c.q_segments ? c.q_segments + b * c.q_len : nullptr, first, last + 1, query.data());
      std::fill(scores.begin() + low, scores.begin() + high, 0.0f);
      const float* of_head = keys.data() + (b * c.kv_heads + h / (c.heads / c.kv_heads)) * c.dim * kv_blocks;
      for (int64_t d = 0; d < c.dim; ++d) {
        const float x = query[d] * static_cast<float>(c.scale);
#pragma omp simd
        for (int64_t j = low; j < high; ++j) scores[j] += x * of_head[d * kv_blocks + j];
      }

      const int64_t diagonal = floor_div(last + c.offset, c.kv_block);
      const bool full = row >= q_blocks - c.rows_in_full;
      int64_t kept = 0, count = 0;
      std::fill(state.begin(), state.end(), 0);
      rest.clear();
      for (int64_t j = low; j < high; ++j) {
        if (allowed && !allowed[j]) continue;
        if (count++ == 0 || full || j == diagonal || j == diagonal - 1) {
          state[j] = 1;
          ++kept;
        } else {
          rest.emplace_back(std::isnan(scores[j]) ? -std::numeric_limits<float>::infinity() : scores[j], j);
        }
      }
      c.visible[i] = count;
      const int64_t budget = c.budgets[b * c.heads + h];
      const int64_t room = std::clamp<int64_t>(std::min(budget, count) - kept, 0, rest.size());
      if (room < static_cast<int64_t>(rest.size())) std::nth_element(rest.begin(), rest.begin() + room, rest.end(), better);
      for (int64_t n = 0; n < room; ++n) state[rest[n].second] = 1;

      int32_t* list = c.indices + i * c.width;
      int64_t n = 0;
      for (int64_t j = low; j < high; ++j) {
        if (state[j]) list[n++] = static_cast<int32_t>(j);
      }
      c.counts[i] = static_cast<int32_t>(n);
      std::fill(list + n, list + c.width, 0);
    }
  });
}

}  // namespace

extern "C" int64_t sparsepass_selection_size() { return sizeof(Selection); }

extern "C" int sparsepass_select(const Selection* call) {
  try {
    if (call->type == 0) select<float>(*call);
    else if (call->type == 1) select<c10::BFloat16>(*call);
    else select<c10::Half>(*call);
    return 0;
  } catch (...) {
    return 2;
  }
}
