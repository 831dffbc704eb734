// Attention of one block of queries in one head, over blocks of keys with a running softmax (Milakov and Gimelshein
// 2018; FlashAttention, Dao et al. 2022). Included only by isa.cpp, after linear_kernel.h.

constexpr float kLog2E = 1.44269504f;  // scores are in units of ln 2, for weights by powers of 2
constexpr int64_t kKeys = 256;  // keys in a block: its scores for one tile of queries stay in the first cache

// Tiles of queries, of even size: see rows_per_tile in linear.cpp.
inline int64_t query_rows(int64_t queries) {
  const int64_t tiles = (queries + kTileRows - 1) / kTileRows;
  return (queries + tiles - 1) / tiles;
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct AttentionScratch {
  float *query, *key, *value, *out, *largest, *total, *scores;
  int64_t floats;
};

inline AttentionScratch attention_layout(float* base, int64_t queries, int64_t head_size) {
  const int64_t rows = round_up(queries, kTileRows), columns = round_up(head_size, kPanel);
  AttentionScratch s;
  s.query = base;
  s.key = s.query + round_up(rows * head_size + W, 16);
  s.value = s.key + kKeys * head_size;
  s.out = s.value + kKeys * columns;
  s.largest = s.out + rows * columns;
  s.total = s.largest + round_up(rows, 16);
  s.scores = s.total + round_up(rows, 16);
  s.floats = s.scores + kTileRows * kKeys - base;
  return s;
}

int64_t attention_scratch(int64_t queries, int64_t head_size) {
  // From a non-null base: differences from a null pointer are not defined.
  float base[1];
  return attention_layout(base, queries, head_size).floats;
}

// Scores to weights 2^(s - largest), with the running largest and total. Weights from `seen` to `width` are 0.
// Returns by what the earlier keys' part must be multiplied; `first`: there are none.
inline float soften(float* scores, int64_t seen, int64_t width, bool first, float& running, float& total) {
  const int64_t whole = seen - seen % W;
  vf top = splat(running);
  for (int64_t j = 0; j < whole; j += W) {
    const vf s = load(scores + j);
    top = s > top ? s : top;
  }
  if (whole < seen) {
    const vf s = keep(load(scores + whole), seen - whole, running);
    top = s > top ? s : top;
  }
  const float now = largest(top);
  vf added = {};
  for (int64_t j = 0; j < whole; j += W) {
    const vf weight = exp2_below(load(scores + j) - now);
    store(scores + j, weight);
    added += weight;
  }
  if (whole < seen) {
    const vf weight = keep(exp2_below(load(scores + whole) - now), seen - whole, 0);
    store(scores + whole, weight);
    added += weight;
  }
  for (int64_t j = round_up(seen, W); j < width; j += W) store(scores + j, vf{});
  const float shrink = first ? 1 : exp2_below(splat(running - now))[0];
  total = total * shrink + sum(added);
  running = now;
  return shrink;
}

// One tile of queries against the block of keys that starts at `first`.
inline void attend_tile(const AttentionBlock& t, const AttentionScratch& s, int64_t row, int64_t first, int64_t keys) {
  const int64_t each = query_rows(t.queries);
  const int rows = t.queries - row < each ? t.queries - row : each;
  const float* query = s.query + row / each * kTileRows * t.head_size;
  const int64_t last_sees = t.causal ? t.first_visible + row + rows - 1 - first : keys;
  if (last_sees <= 0) return;
  const int64_t wanted = last_sees < keys ? last_sees : keys, width = round_up(wanted, kPanel);
  const int64_t columns = round_up(t.head_size, kPanel);
  for (int64_t j = 0; j < wanted; j += kPanel)
    multiply<1, kTileRows>(rows, query, s.key + j * t.head_size, t.head_size, s.scores + j, kKeys, nullptr, 0);
  for (int r = 0; r < rows; ++r) {
    const int64_t visible = t.causal ? t.first_visible + row + r - first : wanted;
    const int64_t seen = visible < 0 ? 0 : visible < wanted ? visible : wanted;
    if (seen == 0) {
      __builtin_memset(s.scores + r * kKeys, 0, width * sizeof(float));
      continue;
    }
    const float shrink = soften(s.scores + r * kKeys, seen, width, first == 0, s.largest[row + r], s.total[row + r]);
    if (shrink != 1)
      for (int64_t c = 0; c < columns; c += W) {
        float* out = s.out + (row + r) * columns + c;
        store(out, load(out) * shrink);
      }
  }
  for (int64_t c = 0; c < columns; c += kPanel)
    multiply<kKeys, 1>(rows, s.scores, s.value + c * kKeys, wanted, s.out + row * columns + c, columns,
                       s.out + row * columns + c, columns);
}

template <class T>
void attention_block(const AttentionBlock& t) {
  const AttentionScratch s = attention_layout(t.scratch, t.queries, t.head_size);
  const int64_t columns = round_up(t.head_size, kPanel);
  const int64_t each = query_rows(t.queries);
  for (int64_t row = 0; row < t.queries; row += each) {
    const int rows = t.queries - row < each ? t.queries - row : each;
    float* tile = s.query + row / each * kTileRows * t.head_size;
    transpose_rows(static_cast<const T*>(t.query) + row * t.query_stride, t.query_stride, rows, t.head_size, tile,
                   kTileRows);
  }
  for (int64_t i = 0; i < round_up(t.queries, kTileRows) * t.head_size; i += W)
    store(s.query + i, load(s.query + i) * (t.scale * kLog2E));
  __builtin_memset(s.out, 0, round_up(t.queries, kTileRows) * columns * sizeof(float));
  for (int64_t i = 0; i < t.queries; ++i) {
    s.largest[i] = -3.4e38f;
    s.total[i] = 0;
  }

  for (int64_t first = 0; first < t.keys; first += kKeys) {
    const int64_t keys = t.keys - first < kKeys ? t.keys - first : kKeys;
    if (t.causal && t.first_visible + t.queries - 1 <= first) break;
    const T* key = static_cast<const T*>(t.key) + first * t.key_stride;
    const T* value = static_cast<const T*>(t.value) + first * t.value_stride;
    for (int64_t j = 0; j < keys; j += kPanel) {
      const int64_t some = keys - j < kPanel ? keys - j : kPanel;
      pack_panel<T>(key + j * t.key_stride, t.key_stride, some, t.head_size, s.key + j * t.head_size);
    }
    for (int64_t c = 0; c < t.head_size; c += W) {
      float* panel = s.value + c / kPanel * kPanel * kKeys + c % kPanel;
      const int64_t some = t.head_size - c < W ? t.head_size - c : W;
      for (int64_t j = 0; j < keys; ++j) store(panel + j * kPanel, load_part(value + j * t.value_stride + c, some));
    }
    if (columns - t.head_size >= W)  // the last panel's right half, which no value fills
      for (int64_t j = 0; j < keys; ++j) store(s.value + (columns - kPanel) * kKeys + j * kPanel + W, vf{});
    for (int64_t row = 0; row < t.queries; row += each) attend_tile(t, s, row, first, keys);
  }

  for (int64_t i = 0; i < t.queries; ++i) {
    const float share = s.total[i] == 0 ? 0 : 1 / s.total[i];
    T* out = static_cast<T*>(t.out) + i * t.out_stride;
    for (int64_t c = 0; c < t.head_size; c += W) {
      const int64_t some = t.head_size - c < W ? t.head_size - c : W;
      store_part(out + c, load(s.out + i * columns + c) * share, some);
    }
  }
}
