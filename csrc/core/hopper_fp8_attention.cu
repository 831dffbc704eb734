// fp8_attention_operands and fp8_attention for compute capability 9.0, heads of 64 and 128.
//
// The operands: a pass over query, key and value that turns queries and keys by one rotation (signs, then a Hadamard
// transform of each head, which leaves their products as they are and spreads outliers over all columns: QuaRot,
// Ashkboos et al. 2024; FlashAttention-3, Shah et al. 2024), finds scales, and lays values out as the tensor cores take
// 8-bit floats: by columns, the keys of each 16 in the order in which a thread holds their weights.
//
// The attention: blocks of threads that stay, one warp that loads, two warpgroups of 64 queries that issue their
// products in turns, as in hopper_attention.cu. Weights become 8-bit floats in the registers where the scores were.
// Scales cost nothing: a query's and a block's of keys are part of the exponent's factor, a block's of values is added
// to the exponent, and taken out of the sum of its weights.

#include "hopper_fp8_attention.h"

#include <algorithm>
#include <cmath>

#include "hopper.cuh"
#include "wgmma.cuh"

namespace kpdeploy {
namespace {

constexpr int kRows = 64;               // queries of a warpgroup
constexpr int kGroups = 2;              // warpgroups that multiply
constexpr float kLargest = 448;         // of e4m3
constexpr float kTop = 3;               // log2 of a row's largest weight when its maximum is new
constexpr float kLog2E = 1.44269504f;   // e^x = 2^(x log2 e)
constexpr float kLeast = 0x1p-55f;      // of scales of queries and keys: a product of two is a number
constexpr float kNothing = 0x1p-100f;   // the scale of values that are all 0: their weights become small beside others
constexpr uint64_t kSigns = 0x9e3779b97f4a7c15, kMoreSigns = 0xbf58476d1ce4e5b9;  // of columns: splitmix64's numbers

// ---- Operands.

struct OperandsCall {
  CudaGrid query, key, value;
  uint8_t *query8, *key8, *value8;
  float* query_scale;
  float4* block_scale;
  const int64_t* lengths;
  int64_t lengths_stride;
  int batch, queries, keys, heads, kv_heads, query_blocks, key_blocks;
};

// A thread has four rows, whose weights lie side by side in a register of the attention, and two runs of 8 columns.
template <class T_, int kSize_>
struct Part {
  using T = T_;
  static constexpr int kSize = kSize_, kAcross = kSize / 16, kThreads = kFp8Keys / 4 * kAcross;
  int lane, four, head, batch, first;  // lane: of the kAcross of a row; four: which rows; first: of the block
  float x[4][16];

  __device__ int row(int r) const { return first + four / 4 * 16 + four % 4 * 2 + r / 2 * 8 + r % 2; }
  __device__ int column(int half) const { return (lane + half * kAcross) * 8; }
  __device__ Part(int heads, int blocks, int index) {
    lane = threadIdx.x % kAcross;
    four = threadIdx.x / kAcross;
    first = index % blocks * kFp8Keys;
    head = index / blocks % heads;
    batch = index / blocks / heads;
  }
  // Rows from `count` on are zeros.
  __device__ void read(const CudaGrid& from, int count) {
    const T* const at = static_cast<const T*>(from.data) + batch * from.batch_stride + head * kSize;
    Vector<T, 8> v[4][2];
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        v[r][half] = {};
        if (row(r) < count)
          v[r][half] = *reinterpret_cast<const Vector<T, 8>*>(at + row(r) * from.row_stride + column(half));
      }
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int i = 0; i < 16; ++i) x[r][i] = to_float(v[r][i / 8].item[i % 8]);
  }
  __device__ void turn() {
    uint32_t signs = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int byte = lane + half * kAcross;
      signs |= static_cast<uint32_t>((byte < 8 ? kSigns : kMoreSigns) >> byte % 8 * 8 & 0xff) << half * 8;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int i = 0; i < 16; ++i) x[r][i] = __uint_as_float(__float_as_uint(x[r][i]) ^ (signs >> i & 1) << 31);
#pragma unroll
      for (int step = 1; step < 16; step *= 2)
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          if (i & step) continue;
          const float a = x[r][i], b = x[r][i + step];
          x[r][i] = a + b;
          x[r][i + step] = a - b;
        }
#pragma unroll
      for (int step = 1; step < kAcross; step *= 2) {
        const float sign = lane & step ? -1 : 1;
#pragma unroll
        for (int i = 0; i < 16; ++i) x[r][i] = fmaf(sign, x[r][i], __shfl_xor_sync(~0u, x[r][i], step));
      }
    }
  }
  // The largest magnitude of a row of this thread, as bits: NaN is above all.
  __device__ uint32_t largest(int r) const {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) most = max(most, __float_as_uint(x[r][i]) & 0x7fffffff);
    return most;
  }
  // Of the block of threads.
  __device__ float largest() const {
    __shared__ uint32_t of_warp[kThreads / 32];
    uint32_t most = max(max(largest(0), largest(1)), max(largest(2), largest(3)));
    most = __reduce_max_sync(~0u, most);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = most;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) most = max(most, of_warp[i]);
    return __uint_as_float(most);
  }
  __device__ uint32_t four_of_row(int r, int i, float share) const {
    return pack_four(x[r][i] * share, x[r][i + 1] * share, x[r][i + 2] * share, x[r][i + 3] * share);
  }
  __device__ void write_row(uint8_t* to, int r, float share) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<uint2*>(to + column(half)) = {four_of_row(r, half * 8, share),
                                                      four_of_row(r, half * 8 + 4, share)};
  }
};

__device__ inline int keys_of(const OperandsCall& a, int batch) {
  if (!a.lengths) return a.keys;
  return static_cast<int>(min(max(a.lengths[batch * a.lengths_stride], int64_t{0}), int64_t{a.keys}));
}

template <class P>
__device__ void make_queries(const OperandsCall& a, int index) {
  P part(a.heads, a.query_blocks, index);
  part.read(a.query, a.queries);
  part.turn();
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    uint32_t most = part.largest(r);
#pragma unroll
    for (int step = 1; step < P::kAcross; step *= 2) most = max(most, __shfl_xor_sync(~0u, most, step));
    const float scale = __uint_as_float(max(most, __float_as_uint(kLeast * kLargest))) / kLargest;
    if (part.row(r) >= a.queries) continue;
    const int64_t at = int64_t{part.batch * a.heads + part.head} * a.queries + part.row(r);
    if (part.lane == 0) a.query_scale[at] = scale;
    part.write_row(a.query8 + at * P::kSize, r, 1 / scale);
  }
}

template <class P>
__device__ void make_keys(const OperandsCall& a, int index) {
  P part(a.kv_heads, a.key_blocks, index);
  part.read(a.key, keys_of(a, part.batch));
  part.turn();
  const uint32_t most = max(__float_as_uint(part.largest()), __float_as_uint(kLeast * kLargest));
  const float scale = __uint_as_float(most) / kLargest;
  if (threadIdx.x == 0) reinterpret_cast<float*>(a.block_scale + index)[0] = scale;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (part.row(r) >= a.keys) continue;
    const int64_t at = int64_t{part.batch * a.kv_heads + part.head} * a.keys + part.row(r);
    part.write_row(a.key8 + at * P::kSize, r, 1 / scale);
  }
}

// Through shared memory: there a word is four keys of one column.
template <class P>
__device__ void make_values(const OperandsCall& a, int index) {
  __shared__ __align__(16) uint32_t columns[P::kSize][kFp8Keys / 4];
  P part(a.kv_heads, a.key_blocks, index);
  part.read(a.value, keys_of(a, part.batch));
  const float most = part.largest();
  const float scale = most < kNothing * kLargest ? kNothing : most / kLargest;
  if (threadIdx.x == 0) {
    float* const to = reinterpret_cast<float*>(a.block_scale + index);
    to[1] = log2f(scale);
    to[2] = 1 / scale;
    to[3] = 0;
  }
  const float share = 1 / scale;
#pragma unroll
  for (int i = 0; i < 16; ++i)
    columns[part.column(i / 8) + i % 8][part.four ^ (part.lane % 8) << 2] =
        pack_four(part.x[0][i] * share, part.x[1][i] * share, part.x[2][i] * share, part.x[3][i] * share);
  __syncthreads();
  constexpr int kUnits = kFp8Keys / 16;  // of 16 bytes, in a column
  uint8_t* const to = a.value8 + (int64_t{part.batch * a.kv_heads + part.head} * P::kSize * a.key_blocks) * kFp8Keys;
  for (int i = threadIdx.x; i < P::kSize * kUnits; i += P::kThreads) {
    const int column = i / kUnits, unit = i % kUnits, lane = column / 8 % P::kAcross;
    *reinterpret_cast<uint4*>(to + int64_t{column} * a.key_blocks * kFp8Keys + part.first + unit * 16) =
        *reinterpret_cast<const uint4*>(&columns[column][(unit ^ lane % 8) * 4]);
  }
}

template <class P>
__global__ void __launch_bounds__(P::kThreads) make_operands(const __grid_constant__ OperandsCall a) {
  const int of_queries = a.batch * a.heads * a.query_blocks, of_keys = a.batch * a.kv_heads * a.key_blocks;
  int index = blockIdx.x;
  if (index < of_queries) return make_queries<P>(a, index);
  index -= of_queries;
  if (index < of_keys) return make_keys<P>(a, index);
  make_values<P>(a, index - of_keys);
}

// ---- Attention.

// Sizes, and what follows from them.
template <int kSize_>
struct Form {
  static constexpr int kSize = kSize_, kKeys = kFp8Keys, kStages = 4;
  static constexpr int kRun = kGroups * kRows, kConsumers = kGroups * 128, kThreads = kConsumers + 128;
  static constexpr int kFew = 40, kMany = 232;  // registers: of threads that load, and that multiply
  static constexpr int kPlaceBytes = kRows * kSize * 2;  // of queries, and then of their output
  static constexpr int kBlockBytes = kKeys * kSize;
  static constexpr int kTiles = 256;  // where they are, after the barriers; then the scales of blocks
  static constexpr int kScales = 512;
  static constexpr size_t kBytes =
      1024 + 2 * kGroups * kPlaceBytes + 2 * kStages * kBlockBytes + kScales + kStages * 16;
  static_assert((4 + 4 * kStages) * 8 <= kTiles && kBytes <= 227 << 10);
};

struct Call {
  CUtensorMap query, key, value;
  const float* query_scale;
  const float4* block_scale;  // of a block: of keys, log2 and inverse of values'
  void* out;
  int64_t out_batch_stride, out_row_stride;
  const float* out_scale;
  const int64_t* lengths;
  int64_t lengths_stride;
  int batch, queries, keys, heads, kv_heads, group, runs, tiles, key_blocks;
  int behind;   // query i of a causal call sees keys up to i + behind
  float scale;  // of powers of two
  uint32_t zero;
  bool causal;
};

// One run of queries of a head: what the warp that loads it tells the others.
struct alignas(16) Tile {
  int batch, head, first, seen, blocks, valid, unused[2];  // seen: leading keys that count; blocks: 0: the end

  Tile() = default;
  __device__ Tile(const Call& a, int index, int rows) : seen(a.keys), valid(true) {
    const int run = a.runs - 1 - index % a.runs;  // of causal ones the longest come first
    head = index / a.runs % a.heads;
    batch = index / a.runs / a.heads;
    first = run * rows;
    if (a.lengths) {
      const int64_t length = a.lengths[batch * a.lengths_stride];
      valid = length >= 0 && length <= a.keys;
      seen = valid ? static_cast<int>(length) : 0;
    }
    const int end = seen_by(a, min(first + rows, a.queries) - 1);
    blocks = max(1, (end + kFp8Keys - 1) / kFp8Keys);  // one at least, all of it masked
  }
  // How many leading keys query i sees.
  __device__ int seen_by(const Call& a, int i) const {
    return a.causal ? max(0, min(seen, i + a.behind + 1)) : seen;
  }
};

template <class F>
struct Memory {
  uint32_t query, key, value, barriers;
  __device__ Memory(uint32_t start) {
    query = (start + 1023) / 1024 * 1024;
    key = query + 2 * kGroups * F::kPlaceBytes;
    value = key + F::kStages * F::kBlockBytes;
    barriers = value + F::kStages * F::kBlockBytes;
  }
  __device__ uint32_t query_of(int place, int group) const {
    return query + (place * kGroups + group) * F::kPlaceBytes;
  }
  __device__ uint32_t query_full(int i) const { return barriers + i * 8; }
  __device__ uint32_t query_empty(int i) const { return barriers + (2 + i) * 8; }
  __device__ uint32_t key_full(int i) const { return barriers + (4 + i) * 8; }
  __device__ uint32_t key_empty(int i) const { return barriers + (4 + F::kStages + i) * 8; }
  __device__ uint32_t value_full(int i) const { return barriers + (4 + 2 * F::kStages + i) * 8; }
  __device__ uint32_t value_empty(int i) const { return barriers + (4 + 3 * F::kStages + i) * 8; }
  __device__ uint32_t tile(int i) const { return barriers + F::kTiles + i * sizeof(Tile); }
  __device__ uint32_t scales(int i) const { return barriers + F::kScales + i * 16; }
};

__device__ inline void put_tile(uint32_t to, const Tile& t) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(t.batch), "r"(t.head), "r"(t.first),
               "r"(t.seen)
               : "memory");
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};\n" ::"r"(to + 16), "r"(t.blocks), "r"(t.valid) : "memory");
}

__device__ inline Tile tile_from(uint32_t from) {
  const uint4 low = load_shared(from), high = load_shared(from + 16);
  Tile t;
  t.batch = low.x;
  t.head = low.y;
  t.first = low.z;
  t.seen = low.w;
  t.blocks = high.x;
  t.valid = high.y;
  return t;
}

// A box of rows of one matrix of many.
__device__ inline void copy_rows(uint32_t to, const CUtensorMap& map, int column, int row, int matrix,
                                 uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];\n" ::
          "r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(matrix), "r"(barrier)
      : "memory");
}

__device__ inline void copy_scales(uint32_t to, const float4* from, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 16, [%2];\n" ::"r"(to),
               "l"(from), "r"(barrier)
               : "memory");
}

template <class F>
__device__ void load_tile(const Call& a, const Memory<F>& m, const Tile& tile, const Place<2>& own,
                          Place<F::kStages>& place) {
  const int kv = tile.batch * a.kv_heads + tile.head / a.group;
  wait_for(m.query_empty(own.stage), own.round ^ 1);
  put_tile(m.tile(own.stage), tile);
  arrive_expecting(m.query_full(own.stage), F::kRun * F::kSize);
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
    copy_rows(m.query_of(own.stage, g), a.query, 0, tile.first + g * kRows, tile.batch * a.heads + tile.head,
              m.query_full(own.stage));
  for (int n = tile.blocks - 1; n >= 0; --n, place.next()) {
    wait_for(m.key_empty(place.stage), place.round ^ 1);
    arrive_expecting(m.key_full(place.stage), F::kBlockBytes + 16);
    copy_rows(m.key + place.stage * F::kBlockBytes, a.key, 0, n * F::kKeys, kv, m.key_full(place.stage));
    copy_scales(m.scales(place.stage), a.block_scale + int64_t{kv} * a.key_blocks + n, m.key_full(place.stage));
    wait_for(m.value_empty(place.stage), place.round ^ 1);
    arrive_expecting(m.value_full(place.stage), F::kBlockBytes);
    copy_rows(m.value + place.stage * F::kBlockBytes, a.value, n * F::kKeys, 0, kv, m.value_full(place.stage));
  }
}

// Every gridDim.x-th tile, to and fro. By one thread, which asks the copy engine.
template <class F>
__device__ void load_all(const Call& a, const Memory<F>& m) {
  Place<F::kStages> place;
  Place<2> own;
  for (int round = 0;; ++round, own.next()) {
    const int index = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    if (index >= a.tiles) break;
    load_tile<F>(a, m, Tile(a, index, F::kRun), own, place);
  }
  wait_for(m.query_empty(own.stage), own.round ^ 1);
  put_tile(m.tile(own.stage), {});
  arrive(m.query_full(own.stage));
}

// Of a matrix of rows of `line` swizzled bytes: groups of 8 rows, one after the other. One step along K is 32 bytes.
template <int line>
__device__ inline uint64_t lines_descriptor(uint32_t address) {
  static_assert(line == 64 || line == 128);
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{line * 8 >> 4} << 32 |
         uint64_t{line == 128 ? 1 : 2} << 62;
}

// d [64][columns] += left [64][32], in registers, times right [columns][32]^T in shared memory.
#define KPDEPLOY_VALUES(columns, sums, a0, a1, a2, a3, right_at)                                                      \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k32.f32.e4m3.e4m3 {" KPDEPLOY_LIST_##sums "}, {%" #a0    \
               ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #right_at ", 1, 1, 1;\n"                                          \
               : KPDEPLOY_SUMS_##sums(0)                                                                              \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right))

template <int columns>
__device__ inline void wgmma_values(float (&d)[columns / 2], const uint32_t* left, uint64_t right) {
  if constexpr (columns == 64)
    KPDEPLOY_VALUES(64, 32, 32, 33, 34, 35, 36);
  else
    KPDEPLOY_VALUES(128, 64, 64, 65, 66, 67, 68);
}

#undef KPDEPLOY_VALUES

// What a thread keeps of its two rows. largest: of log2 of weights before any is taken out.
template <class F>
struct State {
  float out[F::kSize / 2], score[F::kKeys / 2];
  uint32_t weight[F::kKeys / 8], next[F::kKeys / 8];
  float factor[2], largest[2], total[2], shrink[2];
  bool grew;
};

// Of one block of keys: what its scales do to scores, log2 weights, and the sum of weights.
struct BlockScale {
  float key, value_log2, value_inverse;
  __device__ BlockScale(uint32_t at) {
    const uint4 v = load_shared(at);
    key = __uint_as_float(v.x);
    value_log2 = __uint_as_float(v.y);
    value_inverse = __uint_as_float(v.z);
  }
};

template <class F>
__device__ inline void multiply_keys(State<F>& s, uint32_t query, uint32_t key) {
  wgmma_fence();
  const uint64_t left = lines_descriptor<F::kSize>(query), right = lines_descriptor<F::kSize>(key);
#pragma unroll
  for (int k = 0; k < F::kSize / 32; ++k) wgmma<f8, F::kKeys>(s.score, left + k * 2, right + k * 2, k > 0);
  wgmma_commit();
}

template <class F>
__device__ inline void multiply_values(State<F>& s, uint32_t value) {
  wgmma_fence();
  const uint64_t right = lines_descriptor<F::kKeys>(value);
#pragma unroll
  for (int k = 0; k < F::kKeys / 32; ++k) wgmma_values<F::kSize>(s.out, s.weight + k * 4, right + k * 2);
  wgmma_commit();
}

// Of four exponentials, how many are no more exact than the 8 bits that they become: the unit for exponentials has as
// much to do as the tensor cores (16 a cycle), and is not kept as busy (benchmarks/README.md).
constexpr int kRough = 2;

// 2^x within -4 to +2 %, on the units for float32 and integers: exponent and mantissa are those of x itself, once 512
// more puts them where a shift by 9 makes them a float's (Schraudolph 1999). Below 2^-127: 0.
constexpr float kRoughBias = 512 + 127 - 0.0574f;  // less the mean of log2(1 + f) - f
__device__ inline float rough_exp2_biased(float x) { return __uint_as_float(__float_as_uint(fmaxf(x, 512)) << 9); }

// Weights 2^(log2 weight - largest + kTop), in next; the sums of this thread's.
template <class F>
__device__ inline void exponentials(State<F>& s, const BlockScale& block, float (&added)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = s.factor[half] * block.key;
    const float base = (s.largest[half] == -INFINITY ? 0 : kTop - s.largest[half]) + block.value_log2;
    const float rough_base = base + kRoughBias;
    float sum[2] = {};
#pragma unroll
    for (int j = 0; j < F::kKeys / 16; ++j) {
      float w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float score = s.score[(j * 2 + i / 2) * 4 + half * 2 + i % 2];
        w[i] = i < kRough ? rough_exp2_biased(fmaf(score, factor, rough_base)) : exp2_of(fmaf(score, factor, base));
        sum[i % 2] += w[i];
      }
      s.next[j / 2 * 4 + j % 2 * 2 + half] = pack_four(w[0], w[1], w[2], w[3]);
    }
    added[half] = sum[0] + sum[1];
  }
}

template <class F>
__device__ inline void raise(State<F>& s, const BlockScale& block) {
  float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < F::kKeys / 2; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s.score[i]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float log2_weight = fmaf(lanes_max<4>(top[half]), s.factor[half] * block.key, block.value_log2);
    const float found = fmaxf(log2_weight, s.largest[half]);
    s.shrink[half] = found > s.largest[half] ? exp2_of(s.largest[half] - found) : 1;
    s.largest[half] = found;
  }
  s.grew = s.shrink[0] < 1 || s.shrink[1] < 1;
}

// Scores become weights. `left`: the keys of this block that each row sees, less this thread's first column. `fresh`:
// the first block of a row. Else the weights are first tried with the maximum so far: they may grow until a thread's
// are more than one 8-bit float together.
template <bool masks, bool fresh, class F>
__device__ inline void weigh(State<F>& s, const BlockScale& block, int left0, int left1) {
  if (masks) {
#pragma unroll
    for (int i = 0; i < F::kKeys / 2; ++i)
      if (i / 4 * 8 + i % 2 >= (i % 4 < 2 ? left0 : left1)) s.score[i] = -INFINITY;
  }
  float added[2];
  if (fresh) {
    s.largest[0] = s.largest[1] = -INFINITY;
    s.total[0] = s.total[1] = 0;
    raise(s, block);
    exponentials(s, block, added);
  } else {
    s.grew = false;
    s.shrink[0] = s.shrink[1] = 1;
    exponentials(s, block, added);
    const bool fits = added[0] <= kLargest && added[1] <= kLargest && fminf(s.largest[0], s.largest[1]) > -INFINITY;
    if (__any_sync(~0u, !fits)) {
      raise(s, block);
      exponentials(s, block, added);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
    s.total[half] = fmaf(added[half], block.value_inverse, s.total[half] * s.shrink[half]);
}

// `zero`, which the compiler does not know, keeps these copies where they are: see hopper_attention.cu.
template <class F>
__device__ inline void keep_weights(State<F>& s, uint32_t zero) {
#pragma unroll
  for (int i = 0; i < F::kKeys / 8; ++i) s.weight[i] = s.next[i] ^ zero;
}

template <class F>
__device__ inline void shrink_out(State<F>& s) {
  if (!s.grew) return;
#pragma unroll
  for (int i = 0; i < F::kSize / 2; ++i) s.out[i] *= s.shrink[i / 2 % 2];
}

enum { kTurnBarrier = 1 };  // ids of named barriers: one a warpgroup

// Divides by the sums of the weights, and stores the rows of this warp: through shared memory, where its own queries
// were, so that whole lines go out.
template <class F>
__device__ inline void finish(const Call& a, const Memory<F>& m, State<F>& s, const float (&total)[2], int index,
                              int group, int lane, int warp) {
  const Tile tile = tile_from(m.tile(index));  // again: registers are short while there is work
  const uint32_t place = m.query_of(index, group);
  const int first = tile.first + group * kRows + warp * 16, left = a.queries - first;
  const float wanted = a.out_scale ? 1 / *a.out_scale : 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = lanes_sum<4>(total[half]);
    const float share = !tile.valid ? NAN : sum == 0 ? 0 : wanted / sum;
#pragma unroll
    for (int i = 0; i < F::kSize / 4; ++i) s.out[i / 2 * 4 + half * 2 + i % 2] *= share;
  }
  const int64_t at = tile.batch * a.out_batch_stride + first * a.out_row_stride + tile.head * F::kSize;
  if (a.out_scale) {
    // Two neighbours have 4 columns of a row each, of two runs of 8: they exchange pairs, so that each has 4 in a row.
    uint8_t* const to = static_cast<uint8_t*>(a.out) + at;
    const bool odd = lane % 2;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < F::kSize / 8; j += 2) {
        const float* const o = s.out + j * 4 + half * 2;
        const uint32_t both = pack_four(o[0], o[1], o[4], o[5]);
        const uint32_t other = __shfl_xor_sync(~0u, both, 1);
        const uint32_t four = odd ? __byte_perm(other, both, 0x7632) : __byte_perm(both, other, 0x5410);
        const int row = lane / 4 + half * 8, column = (j + odd) * 8 + lane % 4 / 2 * 4;
        if (row < left) *reinterpret_cast<uint32_t*>(to + row * a.out_row_stride + column) = four;
      }
  } else {
    const int row = warp * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < F::kSize / 8; j += 2) {
      const int unit = (j + lane / 16) % 8;
      store_matrices(place + j / 8 * (kRows * 128) + row * 128 + (unit ^ row % 8) * 16,
                     pack_pair<bf16>(s.out[j * 4], s.out[j * 4 + 1]),
                     pack_pair<bf16>(s.out[j * 4 + 2], s.out[j * 4 + 3]),
                     pack_pair<bf16>(s.out[j * 4 + 4], s.out[j * 4 + 5]),
                     pack_pair<bf16>(s.out[j * 4 + 6], s.out[j * 4 + 7]));
    }
    __syncwarp();
    bf16* const to = static_cast<bf16*>(a.out) + at;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i * 4 + lane / 8, unit = lane % 8;
#pragma unroll
      for (int line = 0; line < F::kSize / 64; ++line) {
        const uint4 v = load_shared(place + line * (kRows * 128) + (warp * 16 + r) * 128 + (unit ^ r % 8) * 16);
        if (r < left) *reinterpret_cast<uint4*>(to + r * a.out_row_stride + line * 64 + unit * 8) = v;
      }
    }
    fence_stores();  // before the copy engine writes there again
  }
  __syncwarp();
}

// The blocks of all tiles in one sequence: the first product of a tile is under way with the last one of the one
// before.
template <class F>
__device__ void attend_all(const Call& a, const Memory<F>& m) {
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const auto await_turn = [&] { asm volatile("bar.sync %0, 256;\n" ::"r"(kTurnBarrier + group) : "memory"); };
  const auto end_turn = [&] { asm volatile("bar.arrive %0, 256;\n" ::"r"(kTurnBarrier + 1 - group) : "memory"); };
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) arrive(barrier);
  };

  State<F> s;
  Place<F::kStages> keys, values;
  Place<2> own;
  int n, seen[2], clear;  // n: the block; clear: blocks that need no mask
  const auto row_of = [&](const Tile& tile) { return tile.first + group * kRows + warp * 16 + lane / 4; };
  const auto read_scales = [&](const Tile& tile, float (&to)[2]) {
    const int64_t at = int64_t{tile.batch * a.heads + tile.head} * a.queries;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      to[half] = a.scale * __ldg(a.query_scale + at + min(row_of(tile) + half * 8, a.queries - 1));
  };
  const auto enter = [&](const Tile& tile) {
    const int column = lane % 4 * 2;
    seen[0] = tile.seen_by(a, row_of(tile)) - column;
    seen[1] = tile.seen_by(a, row_of(tile) + 8) - column;
    clear = tile.seen_by(a, tile.first + group * kRows) / F::kKeys;
#pragma unroll
    for (int i = 0; i < F::kSize / 2; ++i) s.out[i] = 0;
  };
  const auto multiply_both = [&] {
    wait_for(m.key_full(keys.stage), keys.round);
    await_turn();
    multiply_keys<F>(s, m.query_of(own.stage, group), m.key + keys.stage * F::kBlockBytes);
    wait_for(m.value_full(values.stage), values.round);
    multiply_values<F>(s, m.value + values.stage * F::kBlockBytes);
    end_turn();
    const BlockScale block(m.scales(keys.stage));
    wgmma_wait<1>();
    release(m.key_empty(keys.stage));
    keys.next();
    return block;
  };
  const auto await_values = [&] {
    wgmma_wait<0>();
    release(m.value_empty(values.stage));
    values.next();
  };

  wait_for(m.query_full(own.stage), own.round);
  {
    const Tile tile = tile_from(m.tile(own.stage));
    if (!tile.blocks) return;
    if (group == kGroups - 1) end_turn();
    enter(tile);
    read_scales(tile, s.factor);
    n = tile.blocks - 1;
  }
  wait_for(m.key_full(keys.stage), keys.round);
  multiply_keys<F>(s, m.query_of(own.stage, group), m.key + keys.stage * F::kBlockBytes);
  {
    const BlockScale block(m.scales(keys.stage));
    wgmma_wait<0>();
    release(m.key_empty(keys.stage));
    keys.next();
    weigh<true, true>(s, block, seen[0] - n * F::kKeys, seen[1] - n * F::kKeys);
  }
  keep_weights(s, a.zero);
  for (;;) {
    const auto step = [&](auto masks) {
      const BlockScale block = multiply_both();
      weigh<masks.value, false>(s, block, seen[0] - n * F::kKeys, seen[1] - n * F::kKeys);
      await_values();
      shrink_out(s);
      keep_weights(s, a.zero);
    };
    for (--n; n >= clear; --n) step(std::true_type{});
    for (; n >= 0; --n) step(std::false_type{});

    const float total[2] = {s.total[0], s.total[1]};
    const int place = own.stage;
    own.next();
    wait_for(m.query_full(own.stage), own.round);
    const Tile next = tile_from(m.tile(own.stage));
    if (!next.blocks) {
      wait_for(m.value_full(values.stage), values.round);
      multiply_values<F>(s, m.value + values.stage * F::kBlockBytes);
      await_values();
      finish(a, m, s, total, place, group, lane, warp);
      return;
    }
    read_scales(next, s.factor);
    n = next.blocks - 1;
    {
      const BlockScale block = multiply_both();
      const int before = n * F::kKeys + lane % 4 * 2;
      weigh<true, true>(s, block, next.seen_by(a, row_of(next)) - before, next.seen_by(a, row_of(next) + 8) - before);
    }
    await_values();
    finish(a, m, s, total, place, group, lane, warp);
    release(m.query_empty(place));
    enter(tile_from(m.tile(own.stage)));
    keep_weights(s, a.zero);
  }
}

template <class F>
__global__ void __launch_bounds__(F::kThreads, 1) attend(const __grid_constant__ Call a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Memory<F> m(shared_address(memory));
  if (threadIdx.x == 0) {
    prefetch_map(a.query);
    prefetch_map(a.key);
    prefetch_map(a.value);
    for (int i = 0; i < 2; ++i) {
      barrier_init(m.query_full(i), 1);
      barrier_init(m.query_empty(i), kGroups * 4);
    }
    for (int i = 0; i < F::kStages; ++i) {
      barrier_init(m.key_full(i), 1);
      barrier_init(m.value_full(i), 1);
      barrier_init(m.key_empty(i), kGroups * 4);
      barrier_init(m.value_empty(i), kGroups * 4);
    }
    barriers_ready();
  }
  __syncthreads();
  if (threadIdx.x >= F::kConsumers) {
    registers_down<F::kFew>();
    if (threadIdx.x == F::kConsumers) load_all<F>(a, m);
  } else {
    registers_up<F::kMany>();
    attend_all<F>(a, m);
  }
}

// Boxes of `columns` x `rows` bytes of matrices [count][height][width], swizzled by lines of as many bytes as columns.
CUtensorMap matrices_map(void* data, int64_t width, int64_t height, int64_t count, int columns, int rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(height),
                              static_cast<cuuint64_t>(count)},
                   strides[] = {sizes[0], sizes[0] * sizes[1]};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(rows), 1}, steps[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                columns == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) refuse("the copy engine refuses a tensor (CUDA error %d)", static_cast<int>(result));
  return map;
}

int blocks_of(int64_t keys) { return static_cast<int>((keys + kFp8Keys - 1) / kFp8Keys); }

template <class F>
void run(const CudaFp8Attention& a, int processors, void* stream) {
  Call c{};
  c.key_blocks = blocks_of(a.keys);
  c.query = matrices_map(a.query, F::kSize, a.queries, a.batch * a.heads, F::kSize, kRows);
  c.key = matrices_map(a.key, F::kSize, a.keys, a.batch * a.kv_heads, F::kSize, F::kKeys);
  c.value = matrices_map(a.value, int64_t{c.key_blocks} * F::kKeys, F::kSize, a.batch * a.kv_heads, F::kKeys, F::kSize);
  c.query_scale = a.query_scale;
  c.block_scale = reinterpret_cast<const float4*>(a.block_scale);
  c.out = a.out.data;
  c.out_batch_stride = a.out.batch_stride;
  c.out_row_stride = a.out.row_stride;
  c.out_scale = a.out_scale;
  c.lengths = a.lengths;
  c.lengths_stride = a.lengths_stride;
  c.batch = static_cast<int>(a.batch);
  c.queries = static_cast<int>(a.queries);
  c.keys = static_cast<int>(a.keys);
  c.heads = static_cast<int>(a.heads);
  c.kv_heads = static_cast<int>(a.kv_heads);
  c.group = c.heads / c.kv_heads;
  c.runs = (c.queries + F::kRun - 1) / F::kRun;
  c.tiles = c.batch * c.heads * c.runs;
  c.behind = c.keys - c.queries;
  c.scale = a.scale * kLog2E / F::kSize;  // the transform makes rows sqrt(kSize) times as long
  c.causal = a.causal;
  // Where lengths differ the hardware hands out the runs.
  const int blocks = a.lengths ? c.tiles : std::min(processors, c.tiles);
  launch_when(false, attend<F>, blocks, 1, F::kThreads, F::kBytes, stream, c);
}

template <class T, int kSize>
void make(const CudaFp8Operands& a, void* stream) {
  using P = Part<T, kSize>;
  OperandsCall c{};
  c.query = a.query;
  c.key = a.key;
  c.value = a.value;
  c.query8 = static_cast<uint8_t*>(a.query8);
  c.key8 = static_cast<uint8_t*>(a.key8);
  c.value8 = static_cast<uint8_t*>(a.value8);
  c.query_scale = a.query_scale;
  c.block_scale = reinterpret_cast<float4*>(a.block_scale);
  c.lengths = a.lengths;
  c.lengths_stride = a.lengths_stride;
  c.batch = static_cast<int>(a.batch);
  c.queries = static_cast<int>(a.queries);
  c.keys = static_cast<int>(a.keys);
  c.heads = static_cast<int>(a.heads);
  c.kv_heads = static_cast<int>(a.kv_heads);
  c.query_blocks = blocks_of(a.queries);
  c.key_blocks = blocks_of(a.keys);
  launch(make_operands<P>, a.batch * (a.heads * c.query_blocks + 2 * a.kv_heads * c.key_blocks), P::kThreads, 0, stream,
         c);
}

}  // namespace

template <class T>
void hopper_fp8_attention_operands(const CudaFp8Operands& a, void* stream) {
  a.head_size == 64 ? make<T, 64>(a, stream) : make<T, 128>(a, stream);
}
template void hopper_fp8_attention_operands<bf16>(const CudaFp8Operands&, void*);
template void hopper_fp8_attention_operands<f16>(const CudaFp8Operands&, void*);

void hopper_fp8_attention(const CudaFp8Attention& a, int processors, void* stream) {
  a.head_size == 64 ? run<Form<64>>(a, processors, stream) : run<Form<128>>(a, processors, stream);
}

}  // namespace kpdeploy
