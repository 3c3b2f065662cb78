// Block-sparse attention for CPUs, fp32 and bf16. Built at first use (cpu_build.py), called through ctypes.
//
// One task is one query block of one head; threads draw tasks from a counter, since rows differ in length and other
// programs may hold a core. A task walks over its listed key blocks in steps of about STEP_KEYS keys: product with the
// keys, mask, online softmax, product with the values. Products are oneDNN's, through PyTorch's exported `brgemm`, which
// use the CPU's tile unit in bf16. They want their right operand packed: keys transposed, and in bf16 both keys and
// values in pairs; that is done once per call.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

namespace cpublas = at::native::cpublas;

// Mirrored field by field in cpu_native.py. Strides in elements; every head dimension has stride 1.
struct Call {
  const void *q, *k, *v;
  void* out;
  float* lse;                // [B, H, Sq] or null
  const int32_t *counts;     // strides below, last dimension contiguous
  const int32_t *indices;    // idem
  const int32_t *q_segments, *kv_segments;  // [B, Sq], [B, Skv] contiguous, or null
  const uint8_t* mask;       // strides below (0 where shared), or null: 0 hides
  const void* bias;          // idem, added to the scores; at most `hidden` hides
  const float *slopes;       // [B or 1, H] contiguous, or null: times key minus query position, added
  const float *sinks;        // [H], or null: logits without a value
  const int8_t* blocks;      // [B or 1, H or 1, q_blocks, kv_blocks], or null: 2 where mask and bias hide nothing
  int64_t batch, heads, kv_heads, q_len, kv_len, dim, v_dim;
  int64_t q_block, kv_block, left, right, offset;
  int64_t q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s;
  int64_t counts_b, counts_h, indices_b, indices_h, indices_i;
  int64_t mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k;
  int64_t slopes_b, blocks_b, blocks_h, bias_bf16;
  double scale, softcap, hidden, skip;  // softcap 0: none; skip -inf: no block is skipped
  int64_t bf16;
};

namespace {

constexpr int64_t STEP_KEYS = 512;
constexpr int64_t PART_DIM = 256;  // dimensions summed at a time: longer sums in fp32 err more than a dense kernel's
constexpr float NONE = -std::numeric_limits<float>::infinity();

enum Status { DONE = 0, BAD_INDEX = 1, FAILED = 2 };

// exp for x <= 0 (NaN passes through): 2^n * p(r), |r| <= ln(2)/2. Degree 6 errs by about 1 unit in the last place of
// fp32, degree 5 by 3e-6, far under the rounding of a bf16 weight. Plain arithmetic on purpose: every compiler
// vectorizes it, and -inf costs no more than any other number. Under -87.7, n is -127 and the power exactly 0.
template <int DEGREE>
inline float exp_nonpositive(float x) {
  const float clamped = x < -88.0f ? -88.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = DEGREE == 6 ? 1.3888889e-3f * r + 8.3333333e-3f : 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3F800000u;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// Odd polynomial near 0, where 1 - exp(-2x) would lose digits; both err by a few units in the last place of fp32.
inline float tanh_of(float x) {
  const float a = std::fabs(x), e = exp_nonpositive<6>(-2.0f * a), x2 = x * x;
  float p = -8.8632355e-3f * x2 + 2.1869488e-2f;
  p = p * x2 - 5.3968254e-2f;
  p = p * x2 + 0.13333333f;
  p = p * x2 - 0.33333333f;
  const float near = a + a * (p * x2), far = (1.0f - e) / (1.0f + e);
  return std::copysign(a < 0.35f ? near : far, x);
}

inline void store_one(float* at, float x) { *at = x; }
inline void store_one(at::BFloat16* at, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  at->x = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
// A weight: never negative, so that adding half a unit rounds it (ties up; to even would cost two operations more).
inline void store_weight(float* at, float x) { *at = x; }
inline void store_weight(at::BFloat16* at, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  at->x = static_cast<uint16_t>((bits + 0x8000u) >> 16);
}
inline float load_one(const float* at) { return *at; }
inline float load_one(const at::BFloat16* at) {
  const uint32_t bits = static_cast<uint32_t>(at->x) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <typename T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t n) : data(static_cast<T*>(::operator new(sizeof(T) * std::max<int64_t>(n, 1), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

template <typename T>
class Attend {
  static constexpr bool PACKED = std::is_same_v<T, at::BFloat16>;
  const Call& c;
  const int64_t q_blocks, kv_blocks, step, group;
  const float scale;
  const bool changed;             // scaled scores are changed before the softmax
  const bool prescale;            // a scale of 0 or less would turn the -inf of hidden pairs into something else
  const float skip;
  const bool skips;
  const float late_scale;         // the scale that is left to the softmax
  Buffer<T> keys;                 // packed blocks
  Buffer<T> values;               // packed blocks, bf16 only
  Buffer<uint8_t> bad_values;     // per (batch, kv head, block): holds a non-finite value
  std::atomic<int64_t> next{0};
  std::atomic<int> status{DONE};

  const T* at(const void* base, int64_t offset) const { return static_cast<const T*>(base) + offset; }
  int64_t held(int64_t block) const { return std::min(c.kv_block, c.kv_len - block * c.kv_block); }

 public:
  explicit Attend(const Call& call)
      : c(call),
        q_blocks((c.q_len + c.q_block - 1) / c.q_block),
        kv_blocks((c.kv_len + c.kv_block - 1) / c.kv_block),
        step(std::max<int64_t>(1, STEP_KEYS / c.kv_block)),
        group(c.heads / c.kv_heads),
        scale(static_cast<float>(c.scale)),
        changed(c.softcap > 0.0 || c.slopes || c.bias),
        prescale(changed || !(scale > 0.0f)),
        skip(static_cast<float>(c.skip)),
        skips(skip > NONE),
        late_scale(prescale ? 1.0f : scale),
        keys(c.batch * c.kv_heads * kv_blocks * c.kv_block * c.dim),
        values(PACKED ? c.batch * c.kv_heads * kv_blocks * c.kv_block * c.v_dim : 0),
        bad_values(c.batch * c.kv_heads * kv_blocks) {}

  int run() {
    const int64_t sources = c.batch * c.kv_heads * kv_blocks;
    at::parallel_for(0, sources, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) prepare(i);
    });
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work();
    });
    return status;
  }

 private:
  // Pack one block, zeros behind the last key: keys [dim, key]; in bf16, as the tile unit reads its right operand, keys
  // [dim/2, key, 2] and values [key/2, dim, 2]. Notes non-finite values.
  void prepare(int64_t source) {
    const int64_t block = source % kv_blocks, kv_head = source / kv_blocks % c.kv_heads, b = source / kv_blocks / c.kv_heads;
    const int64_t first = block * c.kv_block, count = held(block);
    const T* v = at(c.v, b * c.v_b + kv_head * c.v_h + first * c.v_s);
    int bad = 0;
    for (int64_t j = 0; j < count; ++j) {
      float probe = 0.0f;
#pragma omp simd reduction(+ : probe)
      for (int64_t d = 0; d < c.v_dim; ++d) probe += load_one(v + j * c.v_s + d) * 0.0f;
      bad |= !(probe == 0.0f);
    }
    bad_values.data[source] = static_cast<uint8_t>(bad);
    const T* k = at(c.k, b * c.k_b + kv_head * c.k_h + first * c.k_s);
    T* packed = keys.data + source * c.kv_block * c.dim;
    if constexpr (!PACKED) {
      for (int64_t j = 0; j < c.kv_block; ++j) {
        for (int64_t d = 0; d < c.dim; ++d) packed[d * c.kv_block + j] = j < count ? k[j * c.k_s + d] : 0.0f;
      }
    } else {
      T* packed_v = values.data + source * c.kv_block * c.v_dim;
      for (int64_t j = 0; j < c.kv_block; ++j) {
        for (int64_t d = 0; d < c.dim / 2; ++d) {
          T* to = packed + (d * c.kv_block + j) * 2;
          to[0] = j < count ? k[j * c.k_s + 2 * d] : T(0.0f);
          to[1] = j < count ? k[j * c.k_s + 2 * d + 1] : T(0.0f);
        }
      }
      for (int64_t j = 0; j < c.kv_block; ++j) {
        T* to = packed_v + (j / 2) * c.v_dim * 2 + j % 2;
        for (int64_t d = 0; d < c.v_dim; ++d) to[2 * d] = j < count ? v[j * c.v_s + d] : T(0.0f);
      }
    }
  }

  void work() {
    const int64_t width = step * c.kv_block;
    Buffer<float> scores(c.q_block * width), acc(c.q_block * c.v_dim), top(c.q_block), total(c.q_block);
    Buffer<T> weights(PACKED ? c.q_block * width : 0);
    Buffer<int64_t> kept(step);
    const int64_t tasks = c.batch * c.heads * q_blocks;
    for (int64_t i = next++; i < tasks && status == DONE; i = next++) {
      try {
        // Long causal rows come last in a head: drawing from the end keeps the threads busy to the end.
        const int64_t task = tasks - 1 - i;
        row(task / q_blocks / c.heads, task / q_blocks % c.heads, task % q_blocks, scores.data, weights.data, acc.data,
            top.data, total.data, kept.data);
      } catch (...) {
        status = FAILED;
      }
    }
    cpublas::brgemm_release(PACKED);
  }

  void row(int64_t b, int64_t h, int64_t qi, float* scores, T* weights, float* acc, float* top, float* total, int64_t* kept) {
    const int64_t first = qi * c.q_block, rows = std::min(c.q_block, c.q_len - first);
    const int64_t source = (b * c.kv_heads + h / group) * kv_blocks, width = step * c.kv_block;
    const T* q = at(c.q, b * c.q_b + h * c.q_h + first * c.q_s);
    const T* v = at(c.v, b * c.v_b + h / group * c.v_h);
    const int32_t count = c.counts[b * c.counts_b + h * c.counts_h + qi];
    const int32_t* list = c.indices + b * c.indices_b + h * c.indices_h + qi * c.indices_i;
    std::fill(acc, acc + rows * c.v_dim, 0.0f);
    const float sink = c.sinks ? c.sinks[h] : NONE;  // as a key already seen, whose value is 0
    std::fill(top, top + rows, sink);
    std::fill(total, total + rows, sink == NONE ? 0.0f : 1.0f);
    const int8_t* states = c.blocks ? c.blocks + b * c.blocks_b + h * c.blocks_h + qi * kv_blocks : nullptr;
    for (int64_t low = 0; low < count; low += step) {
      const int64_t listed = std::min<int64_t>(step, count - low);
      int64_t used = 0, blocks = 0;
      for (int64_t i = 0; i < listed; ++i) {
        const int64_t block = list[low + i], n = blocks;
        if (block < 0 || block >= kv_blocks) {
          status = BAD_INDEX;
          return;
        }
        float* s = scores + n * c.kv_block;
        const int64_t columns = PACKED ? c.kv_block : held(block);
        const T* packed = keys.data + (source + block) * c.kv_block * c.dim;
        for (int64_t d = 0; d < c.dim; d += PART_DIM) {  // keys are packed dimension by dimension, so that parts follow
          cpublas::brgemm(rows, columns, std::min(PART_DIM, c.dim - d), c.q_s, c.kv_block, width, d > 0, q + d, packed + d * c.kv_block, s, PACKED);
        }
        if (changed) change(b, h, first, rows, block, columns, s, width);
        hide(b, h, first, rows, block, columns, (c.mask || c.bias) && !(states && states[block] == 2), s, width);
        if (skips && skipped(s, rows, columns, width, scores, n * c.kv_block, top)) continue;
        used = n * c.kv_block + columns;
        kept[blocks++] = block;
      }
      if (!blocks) continue;
      for (int64_t i = 0; i < rows; ++i) soften(scores + i * width, used, weights + i * width, acc + i * c.v_dim, top[i], total[i]);
      for (int64_t n = 0; n < blocks; ++n) {
        const int64_t block = kept[n];
        const int64_t columns = PACKED ? c.kv_block : held(block);
        if (bad_values.data[source + block]) {
          add_seen(b, h, first, rows, block, scores + n * c.kv_block, weights + n * c.kv_block, width, v, acc);
        } else if constexpr (PACKED) {
          cpublas::brgemm(rows, c.v_dim, columns, width, c.v_dim, c.v_dim, true, weights + n * c.kv_block, values.data + (source + block) * c.kv_block * c.v_dim, acc);
        } else {
          cpublas::brgemm(rows, c.v_dim, columns, width, c.v_s, c.v_dim, true, scores + n * c.kv_block, v + block * c.kv_block * c.v_s, acc, false);
        }
      }
    }
    T* out = static_cast<T*>(c.out) + b * c.o_b + h * c.o_h + first * c.o_s;
    for (int64_t i = 0; i < rows; ++i) {
      const float part = total[i] == 0.0f ? 0.0f : 1.0f / total[i];
      for (int64_t d = 0; d < c.v_dim; ++d) store_one(out + i * c.o_s + d, acc[i * c.v_dim + d] * part);
      if (c.lse) c.lse[(b * c.heads + h) * c.q_len + first + i] = total[i] == 0.0f ? NONE : top[i] + std::log(total[i]);
    }
  }

  // Keys [from, to) of the block that the band shows to query row `query`.
  void shown(int64_t query, int64_t block, int64_t& from, int64_t& to) const {
    const int64_t position = query + c.offset - block * c.kv_block;
    from = c.left < 0 ? 0 : std::clamp<int64_t>(position - c.left, 0, held(block));
    to = c.right < 0 ? held(block) : std::clamp<int64_t>(position + c.right + 1, from, held(block));
  }

  bool same_segment(int64_t b, int64_t query, int64_t key) const {
    const int32_t segment = c.kv_segments[b * c.kv_len + key];
    return segment != -1 && segment == (c.q_segments ? c.q_segments[b * c.q_len + query] : 0);
  }

  float bias_at(int64_t place) const {
    return c.bias_bf16 ? load_one(static_cast<const at::BFloat16*>(c.bias) + place) : static_cast<const float*>(c.bias)[place];
  }

  bool hidden_by_scores(int64_t b, int64_t h, int64_t query, int64_t key) const {
    if (c.mask && !c.mask[b * c.mask_b + h * c.mask_h + query * c.mask_q + key * c.mask_k]) return true;
    return c.bias && bias_at(b * c.bias_b + h * c.bias_h + query * c.bias_q + key * c.bias_k) <= static_cast<float>(c.hidden);
  }

  template <typename B>
  void add_bias(float* s, const B* bias, int64_t count) const {
    const int64_t step = c.bias_k;
    if (step == 1) {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) s[j] += load_one(bias + j);
    } else {
      for (int64_t j = 0; j < count; ++j) s[j] += load_one(bias + j * step);
    }
  }

  template <typename B>
  void hide_by_bias(float* s, const B* bias, int64_t count) const {
    const int64_t step = c.bias_k;
    const float hidden = static_cast<float>(c.hidden);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) s[j] = load_one(bias + j * step) <= hidden ? NONE : s[j];
  }

  // Scale, soft cap, slope and bias, in this order.
  void change(int64_t b, int64_t h, int64_t first, int64_t rows, int64_t block, int64_t columns, float* s, int64_t width) const {
    const int64_t count = held(block), start = block * c.kv_block;
    const float cap = static_cast<float>(c.softcap), factor = cap > 0.0f ? static_cast<float>(c.scale / c.softcap) : scale;
    for (int64_t i = 0; i < rows; ++i) {
      float* at = s + i * width;
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) at[j] *= factor;
      if (cap > 0.0f) {
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) at[j] = cap * tanh_of(at[j]);
      }
      if (c.slopes) {
        const float slope = c.slopes[b * c.slopes_b + h];
        const int64_t distance = start - (first + i + c.offset);
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) at[j] += slope * static_cast<float>(distance + j);
      }
      if (c.bias) {
        const int64_t place = b * c.bias_b + h * c.bias_h + (first + i) * c.bias_q + start * c.bias_k;
        if (c.bias_bf16) add_bias(at, static_cast<const at::BFloat16*>(c.bias) + place, count);
        else add_bias(at, static_cast<const float*>(c.bias) + place, count);
      }
    }
  }

  // Set the scores of hidden pairs of one block to -inf; scale them where the softmax cannot.
  void hide(int64_t b, int64_t h, int64_t first, int64_t rows, int64_t block, int64_t columns, bool by_scores, float* s, int64_t width) const {
    const bool ragged = held(block) < columns, late = prescale && !changed;
    if (!late && !c.kv_segments && !ragged && !by_scores) {
      int64_t from, to, last_from, last_to;  // the band is monotonic: what first and last row see whole, all do
      shown(first, block, from, to);
      shown(first + rows - 1, block, last_from, last_to);
      if (from == 0 && last_from == 0 && to == columns && last_to == columns) return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      float* at = s + i * width;
      int64_t from, to;
      shown(first + i, block, from, to);
      if (late) {
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) at[j] *= scale;
      }
      if (from > 0 || to < columns || ragged) {
        std::fill(at, at + from, NONE);
        std::fill(at + to, at + columns, NONE);
      }
      if (c.kv_segments) {
        const int32_t* of_key = c.kv_segments + b * c.kv_len + block * c.kv_block;
        const int32_t own = c.q_segments ? c.q_segments[b * c.q_len + first + i] : 0;
        if (own == -1) {
          std::fill(at, at + columns, NONE);
        } else {
#pragma omp simd
          for (int64_t j = from; j < to; ++j) at[j] = of_key[j] == own ? at[j] : NONE;
        }
      }
      if (by_scores && c.mask) {
        const uint8_t* shows = c.mask + b * c.mask_b + h * c.mask_h + (first + i) * c.mask_q + block * c.kv_block * c.mask_k;
        const int64_t step_k = c.mask_k;
#pragma omp simd
        for (int64_t j = from; j < to; ++j) at[j] = shows[j * step_k] ? at[j] : NONE;
      }
      if (by_scores && c.bias) {
        const int64_t place = b * c.bias_b + h * c.bias_h + (first + i) * c.bias_q + (block * c.kv_block + from) * c.bias_k;
        if (c.bias_bf16) hide_by_bias(at + from, static_cast<const at::BFloat16*>(c.bias) + place, to - from);
        else hide_by_bias(at + from, static_cast<const float*>(c.bias) + place, to - from);
      }
    }
  }

  // Whether all rows have met scores before that leave this block weights of less than exp(c.skip): in earlier steps
  // (`top`), or in the blocks of this one, whose scores lie in front of it (`before` of them in a row).
  bool skipped(const float* s, int64_t rows, int64_t columns, int64_t width, const float* scores, int64_t before, const float* top) const {
    for (int64_t i = 0; i < rows; ++i) {
      float here = NONE, met = NONE;
      int nan = 0;
#pragma omp simd reduction(max : here) reduction(| : nan)
      for (int64_t j = 0; j < columns; ++j) {
        here = s[i * width + j] > here ? s[i * width + j] : here;
        nan |= s[i * width + j] != s[i * width + j];
      }
      if (nan) return false;
      if (here == NONE) continue;  // the row sees nothing of it
#pragma omp simd reduction(max : met)
      for (int64_t j = 0; j < before; ++j) met = scores[i * width + j] > met ? scores[i * width + j] : met;
      if (!(here * late_scale < std::max(top[i], met * late_scale) + skip)) return false;
    }
    return true;
  }

  // One row of one step of the online softmax; weights replace the scores in fp32.
  void soften(float* s, int64_t used, T* weights, float* acc, float& top, float& total) const {
    float best = NONE;
#pragma omp simd reduction(max : best)
    for (int64_t j = 0; j < used; ++j) best = s[j] > best ? s[j] : best;
    best = std::max(top, best * late_scale);
    const float base = best == NONE ? 0.0f : best;  // nothing visible so far: every weight becomes exactly 0
    T* to;
    if constexpr (PACKED) to = weights; else to = s;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < used; ++j) {
      const float w = exp_nonpositive<PACKED ? 5 : 6>(s[j] * late_scale - base);
      sum += w;
      store_weight(to + j, w);
    }
    if (best != top) {
      const float fade = top == NONE ? 0.0f : exp_nonpositive<6>(top - best);
      total *= fade;
      for (int64_t d = 0; d < c.v_dim; ++d) acc[d] *= fade;
      top = best;
    }
    total += sum;
  }

  // Product with a block of values of which some are not finite: pairs that are hidden must not meet them, as 0 * inf
  // is NaN. Rare, so plain.
  void add_seen(int64_t b, int64_t h, int64_t first, int64_t rows, int64_t block, const float* s, const T* weights, int64_t width, const T* v, float* acc) const {
    for (int64_t i = 0; i < rows; ++i) {
      int64_t from, to;
      shown(first + i, block, from, to);
      for (int64_t j = from; j < to; ++j) {
        const int64_t key = block * c.kv_block + j;
        if (c.kv_segments && !same_segment(b, first + i, key)) continue;
        if ((c.mask || c.bias) && hidden_by_scores(b, h, first + i, key)) continue;
        const float w = PACKED ? load_one(weights + i * width + j) : s[i * width + j];
        for (int64_t d = 0; d < c.v_dim; ++d) acc[i * c.v_dim + d] += w * load_one(v + key * c.v_s + d);
      }
    }
  }
};

}  // namespace

extern "C" int64_t sparsepass_call_size() { return sizeof(Call); }

extern "C" int64_t sparsepass_has_bf16() { return cpublas::could_pack(at::kBFloat16); }

// Whether the products work here: oneDNN has them for x86 with AVX2 and later.
extern "C" int64_t sparsepass_runs() {
  try {
    const float one[1] = {1.0f};
    float sum[1] = {1.0f};
    cpublas::brgemm(1, 1, 1, 1, 1, 1, true, one, one, sum, false);
    cpublas::brgemm_release(false);
    return sum[0] == 2.0f;
  } catch (...) {
    return 0;
  }
}

extern "C" int sparsepass_attend(const Call* call) {
  try {
    if (call->bf16) return Attend<at::BFloat16>(*call).run();
    return Attend<float>(*call).run();
  } catch (...) {
    return FAILED;
  }
}
