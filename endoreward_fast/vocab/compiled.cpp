// Row statistics of logits on the CPU in one read: (max, sum exp, sum x exp, sum z). Also the gradient of the logits.
//
// Plain C++17 with the vector extensions of GCC and Clang, and OpenMP. Without torch headers it compiles in 3 s.
// compiled.py builds and calls it. x = (z - shift) / alpha, where shift is the maximum so far.
//
// A row is cut into spans of SPAN columns, and a span into blocks. A block stays in the first-level cache while it is
// read twice (maximum, then exp). Spans are the unit of work and merge in order, so a row's bits depend neither on the
// other rows nor on the number of threads. Sums within a block are float32, in strips: a lane adds at most 16 numbers.
// Sums over blocks are float64.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr float SUM_SCALE = 0x1p-32f;  // see SUM_SCALE in rows.py
constexpr int64_t LANES = 16, STRIP = 256, BLOCK = 2048, SPAN = 16384, ROWS_AT_A_TIME = 256;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

inline float as_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline uint32_t as_bits(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }

inline float load(float z) { return z; }
inline float load(double z) { return static_cast<float>(z); }
inline float load(BFloat16 z) { return as_float(static_cast<uint32_t>(z.bits) << 16); }
inline float load(Half z) {  // 2^112 moves the exponent's bias from 15 to 127, subnormals included
  const uint32_t magnitude = (z.bits & 0x7fffu) << 13, sign = (z.bits & 0x8000u) << 16;
  const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
  return as_float(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

inline void store(float z, float& out) { out = z; }
inline void store(float z, double& out) { out = z; }
inline void store(float z, BFloat16& out) {  // to nearest, ties to even
  const uint32_t bits = as_bits(z), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  out.bits = static_cast<uint16_t>((z != z ? bits | 0x400000u : rounded) >> 16);
}
inline void store(float z, Half& out) {
  const uint32_t bits = as_bits(z), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);  // the addition rounds to 2^-24
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude < 0x38800000u ? subnormal : magnitude >= 0x477ff000u ? special : normal;
  out.bits = static_cast<uint16_t>(sign | half);
}

inline Floats splat(float f) { return Floats{} + f; }
inline Floats read(const float* p) { Floats v; std::memcpy(&v, p, sizeof v); return v; }
inline double sum_of(Floats v) { double s = 0; for (int i = 0; i < LANES; ++i) s += v[i]; return s; }

// exp(x) for -88 <= x <= 0, to about one unit in the last place. Exactly 0 below -87.7. NaN stays NaN.
inline Floats exp_below(Floats x) {
  const Floats shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// (z - shift) / alpha, clamped at -88, where exp_below is 0. This removes infinities. Two products are as exact as the
// division and several times as fast.
struct Scale {
  float high, low, least;
  explicit Scale(double alpha)
      : high(static_cast<float>(1 / alpha)), low(static_cast<float>(1 / alpha - high)),
        least(static_cast<float>(-88 * alpha)) {}
  Floats operator()(Floats z, float shift) const {
    Floats d = z - shift;
    d = d < splat(least) ? splat(least) : d;  // false for NaN, so NaN stays
    return low == 0 ? d * high : d * high + d * low;  // one product at alpha = 1: 5 to 13% less time
  }
};

struct State {
  double peak, total, weighted, sum;  // max z, sum exp(x), sum x exp(x), SUM_SCALE sum z

  void rise_to(double peak_now, double alpha) {
    if (!(peak_now > peak)) return;
    if (peak != -INFINITY) {
      const double step = (peak - peak_now) / alpha, shrink = std::exp(step);
      weighted = shrink * (weighted + step * total);
      total *= shrink;
    }  // else the sums are 0 or NaN, and NaN stays
    peak = peak_now;
  }

  void merge(State other, double alpha) {
    rise_to(other.peak, alpha);
    other.rise_to(peak, alpha);
    total += other.total, weighted += other.weighted, sum += other.sum;
  }
};

constexpr State NOTHING{-INFINITY, 0, 0, 0};

struct Layout {  // row i = outer * inner_count + inner of a strided (outer, inner, columns)
  int64_t inner_count, outer_stride, inner_stride, column_stride;
  int64_t row(int64_t i) const { return (i / inner_count) * outer_stride + (i % inner_count) * inner_stride; }
};

// `count` values as float32, padded with `fill` to a whole vector. Returns z itself if it already has that form.
template <typename T>
const float* block_of(const T* z, int64_t stride, int64_t count, float* buffer, float fill) {
  if (std::is_same<T, float>::value && stride == 1 && count % LANES == 0) return reinterpret_cast<const float*>(z);
  if (stride == 1) for (int64_t i = 0; i < count; ++i) buffer[i] = load(z[i]);
  else for (int64_t i = 0; i < count; ++i) buffer[i] = load(z[i * stride]);
  for (int64_t i = count; i % LANES; ++i) buffer[i] = fill;
  return buffer;
}

template <bool ENTROPY, bool MEAN, typename T>
State reduce_span(const T* z, int64_t stride, int64_t count, double alpha) {
  alignas(64) float buffer[BLOCK];
  const Scale scaled(alpha);
  State state = NOTHING;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t length = std::min(BLOCK, count - start);
    const float* block = block_of(z + start * stride, stride, length, buffer, -INFINITY);
    Floats top = splat(-INFINITY);
    for (int64_t i = 0; i < length; i += LANES) { const Floats v = read(block + i); top = v > top ? v : top; }
    float peak = -INFINITY;
    for (int i = 0; i < LANES; ++i) peak = top[i] > peak ? top[i] : peak;
    state.rise_to(peak, alpha);
    const float shift = state.peak == -INFINITY ? 0.0f : static_cast<float>(state.peak);
    Floats total{}, weighted{};
    for (int64_t strip = 0; strip < length; strip += STRIP) {
      const int64_t end = std::min(strip + STRIP, length);
      Floats strip_total{}, strip_weighted{};
      for (int64_t i = strip; i < end; i += LANES) {
        const Floats x = scaled(read(block + i), shift);
        const Floats e = exp_below(x);
        strip_total += e;
        if (ENTROPY) strip_weighted += e * x;
      }
      total += strip_total;
      if (ENTROPY) weighted += strip_weighted;
    }
    state.total += sum_of(total);
    if (ENTROPY) state.weighted += sum_of(weighted);
    if (MEAN) {
      Floats sum{};
      int64_t i = 0;
      for (; i + LANES <= length; i += LANES) sum += read(block + i) * SUM_SCALE;
      state.sum += sum_of(sum);
      for (; i < length; ++i) state.sum += block[i] * SUM_SCALE;
    }
  }
  return state;
}

template <typename T>
void update(const T* z, Layout layout, int64_t rows, int64_t columns, int64_t first, const uint8_t* mask,
            const int64_t* targets, double alpha, bool entropy, bool mean, int threads, State* state, float* picked) {
  const auto reduce = entropy ? (mean ? reduce_span<true, true, T> : reduce_span<true, false, T>)
                              : (mean ? reduce_span<false, true, T> : reduce_span<false, false, T>);
  const int64_t spans = (columns + SPAN - 1) / SPAN;
  std::vector<State> parts(static_cast<size_t>(spans * std::min(rows, ROWS_AT_A_TIME)));
  for (int64_t from = 0; from < rows; from += ROWS_AT_A_TIME) {
    const int64_t here = std::min(ROWS_AT_A_TIME, rows - from);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t item = 0; item < here * spans; ++item) {
      const int64_t row = from + item / spans, start = item % spans * SPAN;
      if (mask && !mask[row]) continue;
      const T* at = z + layout.row(row) + start * layout.column_stride;
      parts[item] = reduce(at, layout.column_stride, std::min(SPAN, columns - start), alpha);
    }
    for (int64_t row = from; row < from + here; ++row) {
      if (mask && !mask[row]) continue;
      for (int64_t span = 0; span < spans; ++span) state[row].merge(parts[(row - from) * spans + span], alpha);
      const int64_t target = targets[row] - first;
      if (target >= 0 && target < columns) picked[row] = load(z[layout.row(row) + target * layout.column_stride]);
    }
  }
}

template <typename T>
void gradient(const T* z, Layout layout, int64_t rows, int64_t columns, const uint8_t* mask, const int64_t* targets,
              double alpha, const float* shift, const float* constant, const float* slope, const float* each,
              const float* at_target, int threads, T* out) {
  const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
  const Scale scaled(alpha);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
  for (int64_t item = 0; item < rows * blocks; ++item) {
    const int64_t row = item / blocks, start = item % blocks * BLOCK, length = std::min(BLOCK, columns - start);
    T* to = out + row * columns + start;
    if (mask && !mask[row]) { std::memset(static_cast<void*>(to), 0, length * sizeof(T)); continue; }
    alignas(64) float buffer[BLOCK], result[BLOCK];
    const T* from = z + layout.row(row) + start * layout.column_stride;
    const float* block = block_of(from, layout.column_stride, length, buffer, 0.0f);
    const float steep = slope ? slope[row] : 0.0f, added = each ? each[row] : 0.0f;
    for (int64_t i = 0; i < length; i += LANES) {
      const Floats x = scaled(read(block + i), shift[row]);
      const Floats e = exp_below(x), dz = e * (constant[row] + steep * x) + added;
      std::memcpy(result + i, &dz, sizeof dz);
    }
    const int64_t target = targets[row] - start;
    if (target >= 0 && target < length) result[target] += at_target[row];
    for (int64_t i = 0; i < length; ++i) store(result[i], to[i]);
  }
}

}  // namespace

// dtype: 0 float32, 1 float64, 2 bfloat16, 3 float16. Python refuses other dtypes.
#define BY_DTYPE(CALL) \
  switch (dtype) { \
    case 0: { using T = float; CALL; break; } \
    case 1: { using T = double; CALL; break; } \
    case 2: { using T = BFloat16; CALL; break; } \
    default: { using T = Half; CALL; } \
  }

extern "C" {

// Add columns [first, first + columns) of each row to state (rows, 4) float64. Store the target's logit in picked.
void er_update(const void* z, int dtype, int64_t inner_count, int64_t outer_stride, int64_t inner_stride,
               int64_t column_stride, int64_t rows, int64_t columns, int64_t first, const uint8_t* mask,
               const int64_t* targets, double alpha, int entropy, int mean, int threads, double* state, float* picked) {
  const Layout layout{inner_count, outer_stride, inner_stride, column_stride};
  BY_DTYPE(update(static_cast<const T*>(z), layout, rows, columns, first, mask, targets, alpha, entropy, mean, threads,
                  reinterpret_cast<State*>(state), picked))
}

void er_start(int64_t rows, double* state) { std::fill_n(reinterpret_cast<State*>(state), rows, NOTHING); }

// Write the statistics of rows that have been read completely. entropy and mean may be null. Skips rows off the mask.
void er_finish(const double* state, int64_t rows, int64_t vocab, const uint8_t* mask, double alpha, float* lse,
               float* entropy, float* mean, float* shift, float* log_total) {
  const double most = std::log(static_cast<double>(vocab));
  for (int64_t row = 0; row < rows; ++row) {
    if (mask && !mask[row]) continue;
    const State s = reinterpret_cast<const State*>(state)[row];
    const double log_sum = std::log(s.total), h = s.total == 0 ? 0.0 : log_sum - s.weighted / s.total;
    shift[row] = static_cast<float>(s.peak);
    log_total[row] = static_cast<float>(log_sum);
    lse[row] = static_cast<float>(s.peak / alpha + log_sum);
    if (entropy) entropy[row] = static_cast<float>(h < 0 ? 0 : h > most ? most : h);
    if (mean) mean[row] = static_cast<float>(s.sum / vocab / SUM_SCALE);
  }
}

void er_gradient(const void* z, int dtype, int64_t inner_count, int64_t outer_stride, int64_t inner_stride,
                 int64_t column_stride, int64_t rows, int64_t columns, const uint8_t* mask, const int64_t* targets,
                 double alpha, const float* shift, const float* constant, const float* slope, const float* each,
                 const float* at_target, int threads, void* out) {
  const Layout layout{inner_count, outer_stride, inner_stride, column_stride};
  BY_DTYPE(gradient(static_cast<const T*>(z), layout, rows, columns, mask, targets, alpha, shift, constant, slope, each,
                    at_target, threads, static_cast<T*>(out)))
}

}  // extern "C"
