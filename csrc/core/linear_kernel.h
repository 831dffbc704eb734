// Tiles of a matrix product. Included only by isa.cpp.
//
// A is laid out in tiles [k][kTileRows], B in panels [k][kPanel]: the product of one tile with one panel stays in
// registers (AVX-512: 14 x 2 of 32), and every address in the inner loop is a constant offset.

constexpr int kTileRows = W == 16 ? 14 : W == 8 ? 6 : 4;
constexpr int kPanel = 2 * W;

// Products are added up in runs of about this many, then the runs are: a panel's run stays in the first cache while
// the tiles pass, and the rounding error grows with the roots of both numbers. Up to kOneRun there is one.
constexpr int64_t kRun = 256, kOneRun = 384;

// c[r][kPanel] = sum over p of a[r * RowStep + p * DepthStep] * b[p][kPanel], plus `add`, where that is not null.
template <int Rows, int RowStep, int DepthStep>
inline void multiply_rows(const float* a, const float* b, int64_t depth, float* c, int64_t c_stride, const float* add,
                          int64_t add_stride) {
  vf left[Rows], right[Rows];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) left[r] = right[r] = vf{};
  for (int64_t p = 0; p < depth; ++p) {
    const vf b_left = load(b), b_right = load(b + W);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const float value = a[r * RowStep];
      left[r] += value * b_left;
      right[r] += value * b_right;
    }
    a += DepthStep;
    b += kPanel;
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    float* row = c + r * c_stride;
    if (add) {
      left[r] += load(add + r * add_stride);
      right[r] += load(add + r * add_stride + W);
    }
    store(row, left[r]);
    store(row + W, right[r]);
  }
}

template <int RowStep, int DepthStep, int Rows = kTileRows>
inline void multiply(int rows, const float* a, const float* b, int64_t depth, float* c, int64_t c_stride,
                     const float* add, int64_t add_stride) {
  if (rows == Rows) return multiply_rows<Rows, RowStep, DepthStep>(a, b, depth, c, c_stride, add, add_stride);
  if constexpr (Rows > 1)
    multiply<RowStep, DepthStep, Rows - 1>(rows, a, b, depth, c, c_stride, add, add_stride);
}

template <class T>
void finish_row(const float* product, const float* gate, const void* bias, int activation, void* out, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const int64_t some = n - i < W ? n - i : W;
    vf v = load_part(product + i, some);
    if (bias) v += load_part(static_cast<const T*>(bias) + i, some);
    v = activate(v, activation);
    if (gate) v *= silu(load_part(gate + i, some));
    store_part(static_cast<T*>(out) + i, v, some);
  }
}

// Where a tile's result will be written is asked for while its sums are made: lines of rows far apart, whose misses
// would otherwise be waited for one after the other.
template <class T>
inline void fetch_out(const T* out, int64_t stride, int rows, int64_t columns) {
  for (int r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; i += 64 / sizeof(T)) __builtin_prefetch(out + r * stride + i, 1, 3);
}

// One tile with one panel over one run. Sums that are not whole wait in the scratch; those of the last run pass through
// a tile in the first cache to the result.
template <class T>
inline void multiply_run(const MultiplyBlock& m, int64_t row, int64_t column, int64_t first, int64_t depth,
                         bool last) {
  const int rows = m.rows - row < m.rows_per_tile ? m.rows - row : m.rows_per_tile;
  const int64_t stride = (m.columns + kPanel - 1) / kPanel * kPanel, gate_at = m.rows * stride;
  const float* a = m.a + row / m.rows_per_tile * m.tile_floats + first * kTileRows;
  const int64_t at = column * m.k + first * kPanel;
  float* sums = m.scratch + row * stride + column;
  const float* before = first > 0 ? sums : nullptr;
  if (!last) {
    multiply<1, kTileRows>(rows, a, m.b + at, depth, sums, stride, before, stride);
    if (m.b_gate)
      multiply<1, kTileRows>(rows, a, m.b_gate + at, depth, sums + gate_at, stride, before ? before + gate_at : before,
                             stride);
    return;
  }
  const int64_t columns = m.columns - column < kPanel ? m.columns - column : kPanel;
  T* out = static_cast<T*>(m.out) + row * m.out_stride + column;
  fetch_out(out, m.out_stride, rows, columns);
  alignas(64) float product[kTileRows * kPanel], gate[kTileRows * kPanel];
  multiply<1, kTileRows>(rows, a, m.b + at, depth, product, kPanel, before, stride);
  if (m.b_gate)
    multiply<1, kTileRows>(rows, a, m.b_gate + at, depth, gate, kPanel, before ? before + gate_at : before, stride);
  const T* bias = m.bias ? static_cast<const T*>(m.bias) + column : nullptr;
  for (int r = 0; r < rows; ++r)
    finish_row<T>(product + r * kPanel, m.b_gate ? gate + r * kPanel : nullptr, bias, m.activation,
                  out + r * m.out_stride, columns);
}

// Each tile brings its share of the next panel's run into the second cache: with few tiles, waiting for the weight to
// come from memory is what takes the time.
inline void fetch(const MultiplyBlock& m, int64_t row, const float* next, int64_t floats) {
  const int64_t tiles = (m.rows + m.rows_per_tile - 1) / m.rows_per_tile, share = floats / tiles / 16 * 16 + 16;
  const int64_t from = row / m.rows_per_tile * share, to = from + share < floats ? from + share : floats;
  for (int64_t i = from; i < to; i += 16) __builtin_prefetch(next + i, 0, 2);
}

template <class T>
void multiply_block(const MultiplyBlock& m) {
  const int64_t runs = m.k > kOneRun ? (m.k + kRun - 1) / kRun : 1;
  const int64_t run = (m.k + runs - 1) / runs;
  for (int64_t i = 0; i < runs; ++i) {
    const int64_t first = i * run, depth = m.k - first < run ? m.k - first : run;
    for (int64_t column = 0; column < m.columns; column += kPanel)
      for (int64_t row = 0; row < m.rows; row += m.rows_per_tile) {
        if (column + kPanel < m.columns) fetch(m, row, m.b + (column + kPanel) * m.k + first * kPanel, depth * kPanel);
        multiply_run<T>(m, row, column, first, depth > 0 ? depth : 0, i + 1 == runs);
      }
  }
}

// tile [k][kTileRows] and W floats of room; rows that are not there are left out of the product.
template <class T>
void pack_tile(const void* x, int64_t stride, int rows, int64_t k, float* tile) {
  transpose_rows(static_cast<const T*>(x), stride, rows, k, tile, kTileRows);
}

// panel [k][kPanel]; columns that are not there are 0.
template <class T>
void pack_panel(const void* weight, int64_t stride, int columns, int64_t k, float* panel) {
  const T* w = static_cast<const T*>(weight);
  for (int part = 0; part < kPanel; part += W) {
    const int some = columns - part < W ? columns - part : W;
    transpose_rows(w + (some > 0 ? part * stride : 0), stride, some > 0 ? some : 0, k, panel + part, kPanel);
  }
}

template <class T>
void dot_rows(const void* x, const void* weight, int64_t k, float* result) {
  const T* a = static_cast<const T*>(x);
  const T* b = static_cast<const T*>(weight);
  const int64_t whole = k - k % (4 * W);
  vf part[4] = {};
  for (int64_t p = 0; p < whole; p += 4 * W)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) part[i] += load(a + p + i * W) * load(b + p + i * W);
  for (int64_t p = whole; p < k; p += W) {
    const int64_t some = k - p < W ? k - p : W;
    part[0] += load_part(a + p, some) * load_part(b + p, some);
  }
  *result = sum((part[0] + part[1]) + (part[2] + part[3]));
}

template <class T>
void activate_row(const void* x, const void* bias, int activation, void* out, int64_t n) {
  const T* in = static_cast<const T*>(x);
  const T* b = static_cast<const T*>(bias);
  for (int64_t i = 0; i < n; i += W) {
    const int64_t some = n - i < W ? n - i : W;
    vf v = load_part(in + i, some);
    if (b) v += load_part(b + i, some);
    store_part(static_cast<T*>(out) + i, activate(v, activation), some);
  }
}

template <class T>
void gate_row(const void* gate, const void* up, void* out, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const int64_t some = n - i < W ? n - i : W;
    const vf g = load_part(static_cast<const T*>(gate) + i, some);
    store_part(static_cast<T*>(out) + i, silu(g) * load_part(static_cast<const T*>(up) + i, some), some);
  }
}
