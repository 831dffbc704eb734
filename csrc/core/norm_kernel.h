// Layer norm and RMS norm of one row. Included only by isa.cpp.

template <class T>
void norm_row(const NormRow& r) {
  const T* x = static_cast<const T*>(r.x);
  const T* residual = static_cast<const T*>(r.residual);
  const T* weight = static_cast<const T*>(r.weight);
  const T* bias = static_cast<const T*>(r.bias);
  T* normalized = static_cast<T*>(r.normalized);
  T* rounded = static_cast<T*>(r.sum);
  const bool store_work = static_cast<const void*>(r.work) != r.x;
  const bool store_sum = rounded != nullptr && static_cast<void*>(r.work) != r.sum;
  const int64_t n = r.n, whole = n - n % W;

  vf total = {}, squares = {};
  const auto first_pass = [&](int64_t i, int64_t some) {
    vf v = load_part(x + i, some);
    if (residual) v += load_part(residual + i, some);
    if (store_work) store_part(r.work + i, v, some);
    if (store_sum) store_part(rounded + i, v, some);
    total += v;
    squares += v * v;
  };
  for (int64_t i = 0; i < whole; i += W) first_pass(i, W);
  if (whole < n) first_pass(whole, n - whole);

  float mean = 0, variance;
  if (r.rms) {
    variance = sum(squares) / n;
  } else {
    // The second pass costs little, as the row is in the first cache, and E[x^2] - mean^2 would lose digits.
    mean = sum(total) / n;
    vf deviation = {};
    for (int64_t i = 0; i < whole; i += W) {
      const vf d = load(r.work + i) - mean;
      deviation += d * d;
    }
    if (whole < n) {
      const vf d = keep(load_part(r.work + whole, n - whole) - mean, n - whole, 0);
      deviation += d * d;
    }
    variance = sum(deviation) / n;
  }

  const float scale = 1 / __builtin_sqrtf(variance + r.eps);
  const auto last_pass = [&](int64_t i, int64_t some) {
    vf v = (load_part(r.work + i, some) - mean) * scale * load_part(weight + i, some);
    if (bias) v += load_part(bias + i, some);
    store_part(normalized + i, v, some);
  };
  for (int64_t i = 0; i < whole; i += W) last_pass(i, W);
  if (whole < n) last_pass(whole, n - whole);
}
