// What products on compute capability 9.0 share: what becomes of a sum, and their tensors as the copy engine sees them.
#pragma once

#include <math.h>

#include "hopper.cuh"
#include "wgmma.cuh"

namespace kpdeploy {

constexpr int kLine = 128;  // bytes of K in a stage
constexpr int kShared = 227 << 10;

template <class T>
constexpr bool kIsF8 = std::is_same_v<T, f8>;

// What becomes of a sum: scaled (8-bit x and weight only), biased, activated or added to a residual, scaled for an 8-bit
// out.
struct Finish {
  const void *bias, *residual;  // null: none
  int64_t residual_stride;
  const float *x_scale, *weight_scale, *gate_scale, *out_scale;
  int x_scale_step, weight_scale_step, gate_scale_step;  // 0: one for all
  // v / (1 + 2^(v (c0 + c1 v^2 + ...))), or v / 2 (1 + tanh(v (half0 + half1 v^2 + ...))), v^2 up to `most` in the
  // polynomials; else max(v, least).
  bool smooth;
  float c[5], half[3], most, least;
};

// Elements between rows; any where there is one row at most.
inline int64_t step_of(const Walk& walk) { return walk.dims ? walk.strides[0] : 0; }

inline Finish finish_of(const CudaLinear& a) {
  Finish f{};
  f.bias = a.bias;
  f.residual = a.residual.data;
  f.residual_stride = step_of(a.residual);
  f.x_scale = a.x_scale;
  f.weight_scale = a.weight_scale;
  f.out_scale = a.out_scale;
  f.x_scale_step = a.x_scale_rows;
  f.weight_scale_step = a.weight_scale_rows;
  f.gate_scale = a.gate_scale;
  f.gate_scale_step = a.gate_scale_rows;
  const int activation = a.activation;  // not of a gated product, which has its own
  f.least = activation == KPDEPLOY_RELU ? 0 : -INFINITY;
  f.most = 1e4f;
  f.smooth = activation == KPDEPLOY_GELU || activation == KPDEPLOY_GELU_TANH || activation == KPDEPLOY_SILU;
  // log(Phi(v) / Phi(-v)) / v in powers of v^2, fitted for v^2 <= 25: GELU by erf within 1e-5 of its value, or 3e-5.
  static const float kErf[5] = {1.5955501f, 0.07317247f, -3.7566669e-4f, -3.9307416e-5f, 1.1411932e-6f};
  static const float kShortErf[3] = {1.5951197f, 0.07393136f, -6.9194020e-4f};
  static const float kTanh[5] = {1.59576912f, 0.07135481f, 0, 0, 0}, kSilu[5] = {1, 0, 0, 0, 0};
  const bool by_erf = activation == KPDEPLOY_GELU;
  const float* const c = by_erf ? kErf : activation == KPDEPLOY_GELU_TANH ? kTanh : kSilu;
  if (by_erf) f.most = 25;
  for (int i = 0; i < 5; ++i) f.c[i] = -1.44269504f * c[i];
  for (int i = 0; i < 3; ++i) f.half[i] = 0.5f * (by_erf ? kShortErf : c)[i];
  return f;
}

__device__ inline float inverse_of(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(v));
  return r;
}

__device__ inline float power_of(const Finish& f, float v) {
  const float s = fminf(v * v, f.most);
  const float p = fmaf(fmaf(fmaf(fmaf(f.c[4], s, f.c[3]), s, f.c[2]), s, f.c[1]), s, f.c[0]);
  return exp2_of(fminf(v * p, 60));
}

__device__ inline float tanh_of(float v) {
  float t;
  asm("tanh.approx.f32 %0, %1;\n" : "=f"(t) : "f"(v));
  return t;
}

// Two at once. Exact: within 1e-5, by one division for both, for float16; else by the GPU's own tanh, whose 2^-11 is a
// quarter of what rounding to bfloat16 takes, in half the instructions.
template <bool kSmooth, bool kExact>
__device__ inline void activate(const Finish& f, float& a, float& b) {
  if constexpr (!kSmooth) {
    a = a < f.least ? f.least : a;
    b = b < f.least ? f.least : b;
  } else if constexpr (kExact) {
    const float p = 1 + power_of(f, a), q = 1 + power_of(f, b), r = inverse_of(p * q);
    a *= r * q;
    b *= r * p;
  } else {
    const float s = fminf(a * a, f.most), t = fminf(b * b, f.most);
    const float c = a * 0.5f, d = b * 0.5f;
    a = fmaf(c, tanh_of(a * fmaf(fmaf(f.half[2], s, f.half[1]), s, f.half[0])), c);
    b = fmaf(d, tanh_of(b * fmaf(fmaf(f.half[2], t, f.half[1]), t, f.half[0])), d);
  }
}

// The same by SiLU, which needs no polynomial.
template <bool kExact>
__device__ inline void silu(float& a, float& b) {
  if constexpr (kExact) {
    const float p = 1 + exp2_of(fminf(a * -1.44269504f, 60)), q = 1 + exp2_of(fminf(b * -1.44269504f, 60));
    const float r = inverse_of(p * q);
    a *= r * q;
    b *= r * p;
  } else {
    const float c = a * 0.5f, d = b * 0.5f;
    a = fmaf(c, tanh_of(c), c);
    b = fmaf(d, tanh_of(d), d);
  }
}

template <class Out>
constexpr bool kExact = std::is_same_v<Out, f16>;

template <class Out>
__device__ inline uint32_t packed(float a, float b) {
  if constexpr (kIsF8<Out>)
    return __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
  else
    return pack<Out>(a, b);
}

template <class T>
__device__ inline float2 unpacked(uint32_t both) {
  const auto v = *reinterpret_cast<const Vector<T, 2>*>(&both);
  return {to_float(v.item[0]), to_float(v.item[1])};
}

template <class T>
using BiasOf = std::conditional_t<kIsF8<T>, bf16, T>;

struct Grid {
  int rows, columns;  // of out
  int steps;          // along K
  int down, across;   // tiles
};

template <class T>
constexpr CUtensorMapDataType kMapType = kIsF8<T>                  ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                         : std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                   : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;

// Bytes between rows; any where there is one row at most.
template <class T>
int64_t pitch_of(const Walk& walk, int64_t columns) {
  return walk.dims ? walk.strides[0] * int64_t{sizeof(T)} : (columns * int64_t{sizeof(T)} + 15) / 16 * 16;
}

template <class T>
CUtensorMap map_of(const CudaMatrix& m, int64_t rows, int64_t k, int box) {
  return tensor_map(m.data, kMapType<T>, sizeof(T), rows, k, m.stride * int64_t{sizeof(T)}, box);
}

inline int blocks_of(int64_t n, int64_t size) { return static_cast<int>((n + size - 1) / size); }

}  // namespace kpdeploy
