// The heads of one row, turned. Included only by isa.cpp.

template <class T>
void rotary_row(const void* x, const float* cos, const float* sin, void* out, int64_t heads, int64_t size,
                int64_t turned) {
  const int64_t half = turned / 2;
  for (int64_t h = 0; h < heads; ++h) {
    const T* from = static_cast<const T*>(x) + h * size;
    T* to = static_cast<T*>(out) + h * size;
    for (int64_t i = 0; i < half; i += W) {
      const int64_t some = half - i < W ? half - i : W;
      const vf a = load_part(from + i, some), b = load_part(from + half + i, some);
      store_part(to + i, a * load_part(cos + i, some) - b * load_part(sin + i, some), some);
      store_part(to + half + i, b * load_part(cos + half + i, some) + a * load_part(sin + half + i, some), some);
    }
    __builtin_memcpy(to + turned, from + turned, (size - turned) * sizeof(T));
  }
}
