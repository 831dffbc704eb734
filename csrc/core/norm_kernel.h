// Layer norm and RMS norm of one row. Included only by isa.cpp.

// pass(i, some, lane) for the vectors of a row: `lane` is one of kLanes in turns, for sums that do not wait for each
// other.
constexpr int kLanes = 4;

template <class Pass>
inline void over_row(int64_t n, const Pass& pass) {
  int64_t i = 0;
  for (; i + kLanes * W <= n; i += kLanes * W)
#pragma GCC unroll 4
    for (int lane = 0; lane < kLanes; ++lane) pass(i + lane * W, W, lane);
  for (; i + W <= n; i += W) pass(i, W, 0);
  if (i < n) pass(i, n - i, 0);
}

inline float sum_of(const vf (&lanes)[kLanes]) { return sum((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])); }

template <class T>
void norm_row(const NormRow& r) {
  const T* x = static_cast<const T*>(r.x);
  const T* residual = static_cast<const T*>(r.residual);
  const T* weight = static_cast<const T*>(r.weight);
  const T* bias = static_cast<const T*>(r.bias);
  T* normalized = static_cast<T*>(r.normalized);
  T* rounded = static_cast<T*>(r.sum);
  const bool store_work = static_cast<const void*>(r.work) != r.x;
  const bool store_sum = rounded != nullptr && static_cast<void*>(r.work) != r.sum && !r.streams;
  const bool rms = r.rms;
  const int64_t n = r.n;

  vf total[kLanes] = {};
  over_row(n, [&](int64_t i, int64_t some, int lane) {
    vf v = load_part(x + i, some);
    if (residual) v += load_part(residual + i, some);
    if (store_work) store_part(r.work + i, v, some);
    if (store_sum) store_part(rounded + i, v, some);
    total[lane] += rms ? v * v : v;
  });

  float mean = 0, variance;
  if (rms) {
    variance = sum_of(total) / n;
  } else {
    // The second pass costs little, as the row is in the first cache, and E[x^2] - mean^2 would lose digits.
    mean = sum_of(total) / n;
    vf deviation[kLanes] = {};
    over_row(n, [&](int64_t i, int64_t some, int lane) {
      const vf d = keep(load_part(r.work + i, some) - mean, some, 0);
      deviation[lane] += d * d;
    });
    variance = sum_of(deviation) / n;
  }

  const float scale = 1 / __builtin_sqrtf(variance + r.eps);
  over_row(n, [&](int64_t i, int64_t some, int) {
    vf v = (load_part(r.work + i, some) - mean) * scale * load_part(weight + i, some);
    if (bias) v += load_part(bias + i, some);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (r.streams) {
        // What is in no cache is asked for a row ahead, while the memory is not read.
        __builtin_prefetch(x + n + i, 0, 3);
        if (residual) __builtin_prefetch(residual + n + i, 0, 3);
        if (rounded) stream(rounded + i, load(r.work + i));
        return stream(normalized + i, v);
      }
    }
    store_part(normalized + i, v, some);
  });
  if (r.streams && r.last) fence_streams();
}
