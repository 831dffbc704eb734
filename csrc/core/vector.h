// Vectors of KPDEPLOY_WIDTH floats, by the compiler's vector extensions: one source for every instruction set.
// Included only by isa.cpp, inside its own namespace. No standard headers with inline functions here: the linker would
// be free to take an AVX-512 copy of one for the whole library.

constexpr int W = KPDEPLOY_WIDTH;

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
  uint16_t bits;
};

inline vf splat(float value) { return value - vf{}; }

inline vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline vf load(const bf16* p) {
  vh half;
  __builtin_memcpy(&half, p, sizeof half);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}

inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

// Past the caches, to an address that is a multiple of a vector: a line that is written whole need not be read first.
// Ordered with other stores by fence_streams.
inline void stream(float* p, vf v) {
#if !defined(__x86_64__)
  store(p, v);
#elif KPDEPLOY_WIDTH == 16
  __builtin_ia32_movntps512(p, v);
#elif KPDEPLOY_WIDTH == 8
  __builtin_ia32_movntps256(p, v);
#else
  __builtin_ia32_movntps(p, v);
#endif
}

inline void fence_streams() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// Round to nearest, ties to even; a NaN stays one.
inline vh round_to_bf16(vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu kept = (vu)(v != v) & ((bits >> 16) | 0x40);
  return __builtin_convertvector((~(vu)(v != v) & rounded) | kept, vh);
}

inline void store(bf16* p, vf v) {
  const vh half = round_to_bf16(v);
  __builtin_memcpy(p, &half, sizeof half);
}

// The first n (1 to W) elements; the others read as 0 and are not written.
template <class T>
inline vf load_part(const T* p, int64_t n) {
  if (n >= W) return load(p);
  T whole[W] = {};
  __builtin_memcpy(whole, p, n * sizeof(T));
  return load(whole);
}

template <class T>
inline void store_part(T* p, vf v, int64_t n) {
  if (n >= W) return store(p, v);
  T whole[W];
  store(whole, v);
  __builtin_memcpy(p, whole, n * sizeof(T));
}

inline vi lanes() {
  vi v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

// v in the first n lanes, `other` in the rest.
inline vf keep(vf v, int64_t n, float other) { return lanes() < (int32_t)(n < W ? n : W) ? v : splat(other); }

// v with its halves, then quarters, ... exchanged: step by step each lane meets all others.
template <int Step>
inline vf exchanged(vf v) {
  vi other;
  for (int i = 0; i < W; ++i) other[i] = i ^ Step;
  return __builtin_shuffle(v, other);
}

template <int Step = W / 2>
inline float sum(vf v) {
  v += exchanged<Step>(v);
  if constexpr (Step > 1) return sum<Step / 2>(v);
  return v[0];
}

template <int Step = W / 2>
inline float largest(vf v) {
  const vf other = exchanged<Step>(v);
  v = v > other ? v : other;
  if constexpr (Step > 1) return largest<Step / 2>(v);
  return v[0];
}

inline vf bound(vf v, float low, float high) {
  v = v < splat(low) ? splat(low) : v;  // these comparisons let a NaN through
  return v > splat(high) ? splat(high) : v;
}

// e^x by e^(n ln 2) e^f, |f| <= ln(2)/2, and the Taylor series of e^f to f^7 (6e-9 relative). x is bounded to what a
// normal float can hold: the least result is 1.2e-38, not 0, and the largest 2.4e38, not infinity.
inline vf exp(vf x) {
  x = bound(x, -87.3f, 88.0f);
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const vf shifted = x * 1.44269504f + to_integer;
  const vf n = shifted - to_integer;
  const vf f = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  vf p = splat(1.0f / 5040);
  p = p * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return (vf)((vi)p + ((vi)shifted << 23));
}

// 2^x for x <= 0, by 2^n 2^f, |f| <= 1/2, and a minimax polynomial of degree 5 (Lawson's algorithm; 1.7e-7 relative,
// rounding counted; 2^0 is 1). Below 2^-126 it is 2^-126, not 0.
inline vf exp2_below(vf x) {
  x = x < splat(-126.0f) ? splat(-126.0f) : x;  // lets a NaN through
  const vf shifted = x + 12582912.0f;  // as in exp
  const vf f = x - (shifted - 12582912.0f);
  vf p = splat(0.0013264399021863937f);
  p = p * f + 0.009671514853835106f;
  p = p * f + 0.055507346987724304f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  return (vf)((vi)p + ((vi)shifted << 23));
}

inline vf silu(vf x) { return x / (1.0f + exp(-x)); }

// x Phi(x). erf(x / sqrt 2) / x as a polynomial in u = 2 x^2 / 5.2^2 - 1, a minimax fit (Lawson's algorithm) on
// |x| <= 5.2; the error of erf is 1.3e-7 there, and 2e-7 beyond, where it counts as +-1.
inline vf gelu(vf x) {
  const vf c = bound(x, -5.2f, 5.2f);
  const vf u = c * c * (2.0f / (5.2f * 5.2f)) - 1.0f;
  vf p = splat(-0.0009625745587982237f);
  p = p * u + 0.0025370384100824594f;
  p = p * u - 0.002442931989207864f;
  p = p * u + 0.0036002022679895163f;
  p = p * u - 0.00957813486456871f;
  p = p * u + 0.01711997762322426f;
  p = p * u - 0.025010215118527412f;
  p = p * u + 0.03590955585241318f;
  p = p * u - 0.04944726452231407f;
  p = p * u + 0.06397992372512817f;
  p = p * u - 0.07985963672399521f;
  p = p * u + 0.10004904121160507f;
  p = p * u - 0.13548733294010162f;
  p = p * u + 0.2718999981880188f;
  return 0.5f * x * (1.0f + p * c);
}

// x/2 (1 + tanh(y)) = x / (1 + e^(-2y)), y = sqrt(2/pi) (x + 0.044715 x^3).
inline vf gelu_tanh(vf x) {
  return x / (1.0f + exp(-1.59576912f * (x + 0.044715f * x * x * x)));
}

inline vf relu(vf x) { return x < vf{} ? vf{} : x; }

inline vf activate(vf x, int activation) {
  switch (activation) {
    case KPDEPLOY_RELU: return relu(x);
    case KPDEPLOY_GELU: return gelu(x);
    case KPDEPLOY_GELU_TANH: return gelu_tanh(x);
    case KPDEPLOY_SILU: return silu(x);
    default: return x;
  }
}

// W rows of W, transposed in place by log2(W) perfect shuffles.
inline void transpose(vf (&rows)[W]) {
  vi low, high;
  for (int i = 0; i < W; ++i) {
    low[i] = i / 2 + (i % 2) * W;
    high[i] = low[i] + W / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    vf next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// out[p * out_stride + i] = in[i * in_stride + p] for i < rows (at most W) and p < n. Writes W floats at each p: the
// next p overwrites what is too much, and the caller leaves W - rows floats of room behind the last.
template <class T>
inline void transpose_rows(const T* in, int64_t in_stride, int rows, int64_t n, float* out, int64_t out_stride) {
  for (int64_t p = 0; p < n; p += W) {
    const int64_t some = n - p < W ? n - p : W;
    vf block[W];
    for (int i = 0; i < W; ++i) block[i] = i < rows ? load_part(in + i * in_stride + p, some) : vf{};
    transpose(block);
    for (int64_t i = 0; i < some; ++i) store(out + (p + i) * out_stride, block[i]);
  }
}
