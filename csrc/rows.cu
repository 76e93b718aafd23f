#include "rows.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "launch.h"
#include "ptx.cuh"

namespace fusedloss {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kLanes * kWarps;
constexpr double kNormEps = 1e-12;  // a row shorter than this is divided by it, as in torch.nn.functional.normalize
constexpr double kFp32Eps = 1.0 / (1 << 23);

__host__ __device__ constexpr int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Unsigned: signed, each takes five instructions, and ptxas kept what it found: 8 bytes were spilled on sm_120.
FUSEDLOSS_INLINE int lane() { return int(unsigned(ptx::thread()) % kLanes); }
FUSEDLOSS_INLINE int warp() { return int(unsigned(ptx::thread()) / kLanes); }
FUSEDLOSS_INLINE int64_t warp_in_grid() { return int64_t(ptx::block_x()) * kWarps + warp(); }

template <class T>
FUSEDLOSS_INLINE T warp_sum(T value) {
  for (int distance = kLanes / 2; distance; distance /= 2) value += ptx::shuffle_xor(value, distance);
  return value;
}

// Vectors -------------------------------------------------------------------------------------------------------------

// Neighbours that a lane takes at once: 16 bytes of the narrowest numbers.
template <class... Ts>
constexpr int kVecOf = std::max({16 / int(sizeof(Ts))...});

// As they lie in memory: numbers that were converted at once would make each load wait for the one before.
template <class T, int kVec>
struct Vector {
  static constexpr int kPer = 4 / sizeof(T);
  uint32_t word[kVec / kPer];

  FUSEDLOSS_INLINE float operator[](int k) const {
    if constexpr (kPer == 1) {
      return ptx::bits_to_float(word[k]);
    } else {
      return ptx::to_float(T{uint16_t(word[k / 2] >> 16 * (k % 2))});
    }
  }
};

// Elements d to d + kVec of a row of D; 0 beyond its end. kWritten: by this kernel, too.
template <bool kWritten, int kVec, class T>
FUSEDLOSS_INLINE Vector<T, kVec> load_vector(const T* row, int64_t stride, bool aligned, int64_t d, int64_t D) {
  Vector<T, kVec> v{};
  if (aligned && d + kVec <= D) {
    constexpr int kPer = 16 / sizeof(T);
#pragma unroll
    for (int k = 0; k < kVec; k += kPer) {
      const Vector16 part = kWritten ? ptx::read16(row + d + k) : ptx::load16(row + d + k);
#pragma unroll
      for (int word = 0; word < 4; ++word) v.word[k / kPer * 4 + word] = part.word[word];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      if (d + k >= D) continue;
      const T* place = row + (d + k) * stride;
      const T x = kWritten ? *place : ptx::load(place);
      if constexpr (sizeof(T) == 4) {
        v.word[k] = ptx::float_to_bits(x);
      } else {
        v.word[k / 2] |= uint32_t(x.bits) << 16 * (k % 2);
      }
    }
  }
  return v;
}

template <class T, int kVec>
FUSEDLOSS_INLINE void store_vector(T* row, bool aligned, int64_t d, int64_t D, const float (&from)[kVec]) {
  if (aligned && d + kVec <= D) {
    constexpr int kPer = 16 / sizeof(T);
#pragma unroll
    for (int k = 0; k < kVec; k += kPer) {
      Vector16 v;
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        if constexpr (kPer == 4) {
          v.word[word] = ptx::float_to_bits(from[k + word]);
        } else {
          v.word[word] = ptx::pack(T{}, from[k + 2 * word], from[k + 2 * word + 1]);
        }
      }
      ptx::store16(row + d + k, v);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      if (d + k < D) row[d + k] = ptx::from_float<T>(from[k]);
    }
  }
}

bool rows_aligned(const void* pointer, DType dtype, int64_t stride, int64_t stride_d = 1) {
  const int64_t bytes = stride * (dtype == DType::float32 ? 4 : 2);
  return stride_d == 1 && reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && bytes % 16 == 0;
}

template <class F>
cudaError_t with_dtype(DType dtype, F run) {
  switch (dtype) {
    case DType::float32:
      return run(float{});
    case DType::float16:
      return run(fp16{});
    case DType::bfloat16:
      return run(bf16{});
  }
  return cudaErrorInvalidValue;
}

// prepare -------------------------------------------------------------------------------------------------------------

// Vector by vector and lane by lane, however the row lies in memory, and explicitly fused: the bits of a norm depend on
// the numbers alone, so that a target's factor here is the very one that the tile meets.
template <class T, int kVec>
FUSEDLOSS_INLINE float plus_squares(float sum, const Vector<T, kVec>& x) {
#pragma unroll
  for (int k = 0; k < kVec; ++k) sum = fmaf(x[k], x[k], sum);
  return sum;
}

// Comparisons, because maxima drop NaN.
template <class T>
FUSEDLOSS_INLINE float inverse_norm(float squared) {
  if (std::is_same_v<T, fp16> && squared == 0.0f) squared = 1.0f;  // see fusedloss/core/numerics.py
  const float norm = sqrtf(squared);
  return 1.0f / (norm < float(kNormEps) ? float(kNormEps) : norm);
}
FUSEDLOSS_INLINE double length(double squared) {
  const double norm = sqrt(squared);
  return norm < kNormEps ? kNormEps : norm;
}

struct Margin {
  double angle, sine, cosine, less;
};

// The target's cosine less its margin, and the derivative by it: `marginal` in fusedloss/core/softmax.py.
FUSEDLOSS_INLINE double marginal(double cosine, const Margin& margin, double& slope) {
  const double square = (1 - cosine) * (1 + cosine);
  const double sine = square > 0 ? sqrt(square) : 0.0;
  const bool beyond = cosine < -margin.cosine;
  slope = beyond ? 1.0 : margin.cosine + (square > kFp32Eps ? cosine / sine : 0.0) * margin.sine;
  return (beyond ? cosine - margin.angle * margin.sine : cosine * margin.cosine - sine * margin.sine) - margin.less;
}

// A warp does row i of x, with the row of y that is its target, and row i of y.
template <class T, bool kMargin>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(PrepareParams p, Margin margin, bool x_aligned, bool y_aligned) {
  constexpr int kVec = kVecOf<T>;
  constexpr int64_t kStep = kLanes * kVec;
  const int64_t row = warp_in_grid(), first = lane() * kVec;
  const T* y = static_cast<const T*>(p.y);

  if (p.x && row < p.M) {
    const T* x = static_cast<const T*>(p.x) + row * p.stride_xm;
    const int64_t target = p.score ? ptx::load(p.target + row) : -1;
    float x_squared = 0, t_squared = 0;
    double dot = 0, x_exact = 0, t_exact = 0;
    if (target >= 0) {
      const T* t = y + target * p.stride_yn;
      for (int64_t d = first; d < p.D; d += kStep) {
        const auto own = load_vector<false, kVec>(x, p.stride_xd, x_aligned, d, p.D);
        const auto other = load_vector<false, kVec>(t, p.stride_yd, y_aligned, d, p.D);
        x_squared = plus_squares(x_squared, own);
        t_squared = plus_squares(t_squared, other);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          dot += double(own[k]) * double(other[k]);
          if constexpr (kMargin) {
            x_exact += double(own[k]) * double(own[k]);
            t_exact += double(other[k]) * double(other[k]);
          }
        }
      }
      dot = warp_sum(dot);
      if constexpr (kMargin) {
        // An angle is the root of a difference: rounded factors would cost it half its digits.
        dot /= length(warp_sum(x_exact));
        dot /= length(warp_sum(t_exact));
      }
    } else if (p.row_factor) {
      for (int64_t d = first; d < p.D; d += kStep) {
        x_squared = plus_squares(x_squared, load_vector<false, kVec>(x, p.stride_xd, x_aligned, d, p.D));
      }
    }
    const float row_factor = inverse_norm<T>(warp_sum(x_squared));
    const float target_factor = inverse_norm<T>(warp_sum(t_squared));
    if (lane() == 0) {
      if (p.row_factor) p.row_factor[row] = row_factor;
      if (p.score) {
        // The very factors that the tile meets, rounded alike.
        if (!kMargin && p.row_factor && target >= 0) dot = dot * double(row_factor) * double(target_factor);
        if (p.target_sim) p.target_sim[row] = float(dot);
        double slope = 1;
        if constexpr (kMargin) dot = marginal(dot, margin, slope);
        double score = dot * double(ptx::load(p.scale));
        if (p.bias) score += double(ptx::load(p.bias + (target < 0 ? 0 : target)));
        if (p.softcap != 0) {
          const double bent = tanh(score / p.softcap);
          score = bent * p.softcap;
          slope *= 1 - bent * bent;
        }
        p.score[row] = score;
        if (p.slope) p.slope[row] = float(slope);
      }
    }
  }

  if (p.col_factor && row < p.N) {
    float y_squared = 0;
    y += row * p.stride_yn;
    for (int64_t d = first; d < p.D; d += kStep) {
      y_squared = plus_squares(y_squared, load_vector<false, kVec>(y, p.stride_yd, y_aligned, d, p.D));
    }
    const float col_factor = inverse_norm<T>(warp_sum(y_squared));
    if (lane() == 0) p.col_factor[row] = col_factor;
  }
}

// merge and settle ----------------------------------------------------------------------------------------------------

// A block has 32 rows, side by side in a table: loads are whole lines. Its warps take the tiles in turn, four at once
// each, so that 32 are in flight, and the first merges what the warps found, always in the same order.
constexpr int kTiles = 4;

struct Sums {
  float max, total;
};

// A shift for exponents: -inf - -inf would be NaN where every column is masked.
FUSEDLOSS_INLINE float finite(float max) { return max == -INFINITY ? 0.0f : max; }

// What follows is the first warp's to do: others get no sums. Without maxima all sums are relative to one shift.
FUSEDLOSS_INLINE Sums merged(const float* max, const float* sum, int64_t n_tiles, int64_t R, int64_t row) {
  Sums s{-INFINITY, 0.0f};
  if (row < R) {
    for (int64_t start = warp(); start < n_tiles; start += kTiles * kWarps) {
      float maxima[kTiles], totals[kTiles];
      float top = s.max;
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        const int64_t tile = start + k * kWarps;
        const bool inside = tile < n_tiles;
        maxima[k] = inside && max ? ptx::load(max + tile * R + row) : -INFINITY;
        totals[k] = inside ? ptx::load(sum + tile * R + row) : 0.0f;
      }
      if (max) {
#pragma unroll
        for (int k = 0; k < kTiles; ++k) top = fmaxf(top, maxima[k]);
        s.total *= expf(s.max - finite(top));
#pragma unroll
        for (int k = 0; k < kTiles; ++k) s.total += totals[k] * expf(maxima[k] - finite(top));
        s.max = top;
      } else {
#pragma unroll
        for (int k = 0; k < kTiles; ++k) s.total += totals[k];
      }
    }
  }
  Sums* const found = reinterpret_cast<Sums*>(ptx::shared_memory());  // [kWarps, kLanes]
  found[ptx::thread()] = s;
  ptx::sync();
  if (warp() != 0) return s;
  Sums all{-INFINITY, 0.0f};
  for (int k = 0; k < kWarps; ++k) all.max = fmaxf(all.max, found[k * kLanes + lane()].max);
  for (int k = 0; k < kWarps; ++k) {
    const Sums& part = found[k * kLanes + lane()];
    all.total += max ? part.total * expf(part.max - finite(all.max)) : part.total;
  }
  return all;
}

__global__ void __launch_bounds__(kThreads) merge_kernel(MergeParams p) {
  const int64_t row = int64_t(ptx::block_x()) * kLanes + lane();
  const Sums part = merged(p.max, p.sum, p.n_tiles, p.R, row);
  if (warp() != 0 || row >= p.R) return;
  const float old_total = p.running_sum[row];
  // An empty sum has any maximum: 0 would bury sums relative to exp(-100).
  const float old = old_total == 0.0f ? -INFINITY : p.running_max[row];
  const float top = fmaxf(part.max, old);
  p.running_max[row] = top;
  p.running_sum[row] = part.total * expf(part.max - finite(top)) + old_total * expf(old - finite(top));
}

__global__ void __launch_bounds__(kThreads) settle_kernel(SettleParams p) {
  const int64_t row = int64_t(ptx::block_x()) * kLanes + lane();
  const Sums sums = merged(p.max, p.sum, p.n_tiles, p.R, row);
  if (warp() != 0 || row >= p.R) return;
  const float total = sums.total, weight = ptx::load(p.weight + row);
  const bool left_out = weight == 0.0f || (p.decoupled && total == 0.0f);
  double score = ptx::load(p.score + row);
  if (float(score) == INFINITY) score = NAN;  // in the dtype of the other logits: inf - inf, as in torch's own
  float row_shift = p.max ? finite(sums.max) : p.shift;
  // A row without negatives: 1 / l is 1 and not exp(-score).
  if (total == 0.0f && !left_out) row_shift = float(score);
  const double above = score - double(row_shift);

  // Bounded: see fusedloss/core/rows.py.
  const double most = p.label_smoothing != 0 || p.z_loss != 0 ? 80.0 : 88.0;
  float l = total;
  if (!p.decoupled) l += p.copies * float(exp(above > most ? most : above));

  // log(copies + exp(difference)); a NaN total stays.
  double loss = (total == 0.0f ? -INFINITY : log(double(total))) - above;
  if (!p.decoupled && loss == loss) {
    const double floor = log(double(p.copies)), apart = loss > floor ? loss - floor : floor - loss;
    loss = (loss > floor ? loss : floor) + log1p(exp(-apart));
  }
  float spread = p.label_smoothing;
  if (p.z_loss != 0) {  // see fusedloss/core/rows.py
    const float lse = float(score + loss);
    spread += 2 * p.z_loss * lse;
    l /= 1 + 2 * p.z_loss * lse;
    loss += double(p.z_loss) * (double(lse) * double(lse));
  }

  const float over_l = left_out ? 0.0f : weight / l;
  if (p.row_shift) p.row_shift[row] = row_shift;
  if (p.over_l) p.over_l[row] = over_l;
  if (p.loss) p.loss[row] = left_out ? 0.0f : weight * float(loss);
  if (!p.entry && !p.out) return;
  float entry = p.out ? spread * l - total : spread * weight - over_l * total;
  if (p.smooth) entry -= ptx::load(p.smooth + row);
  if (p.slope) entry *= ptx::load(p.slope + row);
  if (left_out) entry = 0.0f;
  if (p.entry) p.entry[row] = entry;
  const int64_t target = p.out ? ptx::load(p.target + row) : -1;
  if (target < 0) return;
  if (p.row_factor) entry = entry * ptx::load(p.row_factor + row) * ptx::load(p.col_factor + target);
  const int64_t place = row * p.stride_om + target;
  switch (p.out_dtype) {
    case DType::float32:
      static_cast<float*>(p.out)[place] = entry;
      break;
    case DType::float16:
      static_cast<fp16*>(p.out)[place] = ptx::from_float<fp16>(entry);
      break;
    case DType::bfloat16:
      static_cast<bf16*>(p.out)[place] = ptx::from_float<bf16>(entry);
      break;
  }
}

// scale_rows ----------------------------------------------------------------------------------------------------------

constexpr int kVectorsPerLane = 4;           // before a second block helps with the same row
constexpr int64_t kMaxRowBlocks = 1 << 16;   // from here on blocks walk on through the rows
constexpr int64_t kMaxColumnBlocks = 65535;  // the limit of gridDim.y

template <class In, class Out>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(ScaleRowsParams p, bool in_aligned, bool out_aligned) {
  constexpr int kVec = kVecOf<In, Out>;
  const float scalar = p.scalar ? ptx::load(p.scalar) : 1.0f;
  for (int64_t m = warp_in_grid(); m < p.M; m += int64_t(ptx::blocks_x()) * kWarps) {
    const In* in = static_cast<const In*>(p.input) + m * p.in_stride;
    Out* out = static_cast<Out*>(p.out) + m * p.out_stride;
    const float row_factor = p.row_factor ? ptx::load(p.row_factor + m) : 1.0f;
    const int64_t step = int64_t(ptx::blocks_y()) * kLanes * kVec;
#pragma unroll 1
    for (int64_t d = (int64_t(ptx::block_y()) * kLanes + lane()) * kVec; d < p.D; d += step) {
      const auto v = load_vector<true, kVec>(in, p.in_stride_d, in_aligned, d, p.D);
      float product[kVec];
#pragma unroll
      for (int k = 0; k < kVec; ++k) product[k] = v[k] * row_factor * scalar;
      store_vector(out, out_aligned, d, p.D, product);
    }
  }
}

// weigh ---------------------------------------------------------------------------------------------------------------

constexpr int kRows = 4;  // of a warp: their loads are in flight together and share the columns' weights

template <class T>
__global__ void __launch_bounds__(kThreads) weigh_kernel(WeighParams p, bool aligned, bool weights_aligned) {
  constexpr int kVec = kVecOf<T>;
  const int64_t groups = cdiv(p.N, kLanes * kVec);  // of columns, a warp each
  const int64_t first = warp_in_grid() / groups * kRows;
  const int64_t d = (warp_in_grid() % groups * kLanes + lane()) * kVec;
  if (first >= p.R || d >= p.N) return;
  T* out = static_cast<T*>(p.out) + first * p.stride_om;
  Vector<T, kVec> v[kRows];
  const auto columns = load_vector<false, kVec>(p.col_weight, 1, weights_aligned, d, p.N);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r < p.R) v[r] = load_vector<true, kVec>(out + r * p.stride_om, 1, aligned, d, p.N);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r;
    if (row >= p.R) return;
    const float row_weight = ptx::load(p.row_weight + row);
    const int64_t target = ptx::load(p.target + row);
    float dz[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) dz[k] = v[r][k] * (row_weight + columns[k]);
    if (target >= d && target < d + kVec && target < p.N) {
      float entry = ptx::load(p.entry + row);
      if (p.row_factor) entry = entry * ptx::load(p.row_factor + row) * ptx::load(p.col_factor + target);
#pragma unroll
      for (int k = 0; k < kVec; ++k) dz[k] = d + k == target ? entry : dz[k];
    }
    store_vector(out + r * p.stride_om, aligned, d, p.N, dz);
  }
}

// finish --------------------------------------------------------------------------------------------------------------

template <class X, class Out>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(FinishParams p, bool total_aligned, bool x_aligned, bool out_aligned) {
  constexpr int kVec = kVecOf<X, Out>;
  constexpr int64_t kStep = kLanes * kVec;
  const int64_t row = warp_in_grid(), begin = lane() * kVec;
  if (row >= p.R) return;
  const float* total = p.total + row * p.stride_tm;
  const X* x = static_cast<const X*>(p.x) + (p.x ? row * p.stride_xm : 0);
  Out* out = static_cast<Out*>(p.out) + row * p.stride_om;
  float multiplier = ptx::load(p.scale);
  if (p.gain) multiplier /= ptx::load(p.gain);
  if (p.over_l) multiplier *= ptx::load(p.over_l + row);
  float along = 0;
  if (p.x) {
    for (int64_t d = begin; d < p.D; d += kStep) {
      const auto dx = load_vector<true, kVec>(total, 1, total_aligned, d, p.D);
      const auto own = load_vector<false, kVec>(x, p.stride_xd, x_aligned, d, p.D);
#pragma unroll
      for (int k = 0; k < kVec; ++k) along += dx[k] * multiplier * own[k];
    }
    const float factor = ptx::load(p.factor + row);
    // A row shorter than kNormEps is divided by a constant: nothing to project.
    along = warp_sum(along) * (factor >= float(1 / kNormEps) ? 0.0f : factor * factor);
  }
  for (int64_t d = begin; d < p.D; d += kStep) {
    const auto v = load_vector<true, kVec>(total, 1, total_aligned, d, p.D);
    Vector<X, kVec> own{};
    if (p.x) own = load_vector<false, kVec>(x, p.stride_xd, x_aligned, d, p.D);
    float dx[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) dx[k] = p.x ? v[k] * multiplier - along * own[k] : v[k] * multiplier;
    store_vector(out, out_aligned, d, p.D, dx);
  }
}

dim3 blocks(int64_t work, int64_t per_block) { return dim3(unsigned(cdiv(work, per_block))); }

}  // namespace

cudaError_t prepare(const PrepareParams& p, cudaStream_t stream) {
  const int64_t rows = std::max(p.x ? p.M : 0, p.col_factor ? p.N : 0);
  if (rows == 0) return cudaSuccess;  // a grid of 0 blocks is an error
  const bool x_aligned = rows_aligned(p.x, p.dtype, p.stride_xm, p.stride_xd);
  const bool y_aligned = rows_aligned(p.y, p.dtype, p.stride_yn, p.stride_yd);
  const Margin margin{p.margin_angle, std::sin(p.margin_angle), std::cos(p.margin_angle), p.margin_cosine};
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool any = p.margin_angle != 0 || p.margin_cosine != 0;
    return launch(any ? &prepare_kernel<T, true> : &prepare_kernel<T, false>, blocks(rows, kWarps), kThreads, 0, stream,
                  p, margin, x_aligned, y_aligned);
  });
}

cudaError_t merge(const MergeParams& p, cudaStream_t stream) {
  if (p.R == 0) return cudaSuccess;
  return launch(&merge_kernel, blocks(p.R, kLanes), kThreads, kThreads * sizeof(Sums), stream, p);
}

cudaError_t settle(const SettleParams& p, cudaStream_t stream) {
  if (p.R == 0) return cudaSuccess;
  return launch(&settle_kernel, blocks(p.R, kLanes), kThreads, kThreads * sizeof(Sums), stream, p);
}

cudaError_t scale_rows(const ScaleRowsParams& p, cudaStream_t stream) {
  if (p.M == 0 || p.D == 0) return cudaSuccess;
  const bool in_aligned = rows_aligned(p.input, p.in_dtype, p.in_stride, p.in_stride_d);
  const bool out_aligned = rows_aligned(p.out, p.out_dtype, p.out_stride);
  return with_dtype(p.in_dtype, [&](auto in) {
    return with_dtype(p.out_dtype, [&](auto out) {
      using In = decltype(in);
      using Out = decltype(out);
      constexpr int kPerBlock = kLanes * kVectorsPerLane * kVecOf<In, Out>;
      const dim3 grid(unsigned(std::min(cdiv(p.M, kWarps), kMaxRowBlocks)),
                      unsigned(std::min(cdiv(p.D, kPerBlock), kMaxColumnBlocks)));
      return launch(&scale_rows_kernel<In, Out>, grid, kThreads, 0, stream, p, in_aligned, out_aligned);
    });
  });
}

cudaError_t weigh(const WeighParams& p, cudaStream_t stream) {
  if (p.R == 0 || p.N == 0) return cudaSuccess;
  const bool aligned = rows_aligned(p.out, p.dtype, p.stride_om);
  const bool weights_aligned = rows_aligned(p.col_weight, DType::float32, 0);
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t warps = cdiv(p.R, kRows) * cdiv(p.N, kLanes * kVecOf<T>);
    return launch(&weigh_kernel<T>, blocks(warps, kWarps), kThreads, 0, stream, p, aligned, weights_aligned);
  });
}

cudaError_t finish(const FinishParams& p, cudaStream_t stream) {
  if (p.R == 0 || p.D == 0) return cudaSuccess;
  const bool total_aligned = rows_aligned(p.total, DType::float32, p.stride_tm);
  const bool x_aligned = rows_aligned(p.x, p.x_dtype, p.stride_xm, p.stride_xd);
  const bool out_aligned = rows_aligned(p.out, p.out_dtype, p.stride_om);
  return with_dtype(p.x_dtype, [&](auto x) {
    return with_dtype(p.out_dtype, [&](auto out) {
      return launch(&finish_kernel<decltype(x), decltype(out)>, blocks(p.R, kWarps), kThreads, 0, stream, p,
                    total_aligned, x_aligned, out_aligned);
    });
  });
}

}  // namespace fusedloss
