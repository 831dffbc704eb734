// attention and packed_attention for compute capability 9.0, 16-bit dtypes, heads of up to 128 (a multiple of 8).
//
// Heads are rows of 32, 64, 96 or 128 columns: the copy engine fills those that a smaller head lacks with zeros.
//
// A block of threads stays on its multiprocessor and takes run after run of queries, each of one head. One warp knows
// which, from lengths and offsets where there are some, has the copy engine fill a ring of blocks of keys and values
// and fetch the queries of the next run, and tells the others what they are; the other warpgroups have 64 queries each:
// scores S = Q K^T, and out += P V with P from registers, on the tensor cores (wgmma). While a warpgroup takes the
// exponentials of one block of keys, its product of the block before is under way, also from one run to the next; with
// heads of 128 the two warpgroups issue their products in turns, so that one has the tensor cores while the other takes
// exponentials. (A softmax with a running maximum: Milakov and Gimelshein 2018. Overlap between and within warpgroups:
// FlashAttention-3, Shah et al. 2024.) The weights of a block are first taken with the maximum so far, which is raised
// only when they come out above kMost: a pass over the scores less, and the output is seldom scaled anew.
//
// Few queries, as in decoding: attend_with_few, further down, divides the keys of a head among blocks.

#include "hopper_attention.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <random>

#include "hopper.cuh"
#include "wgmma.cuh"

namespace kpdeploy {
namespace {

constexpr int kRows = 64;       // queries of a warpgroup
constexpr int kLine = 64;       // columns of a swizzled line of 128 bytes
constexpr float kMost = 8192;   // of a thread's weights in a block together, before the maximum is raised
constexpr float kLog2E = 1.44269504f;  // e^x = 2^(x log2 e)
constexpr int kMostRows = 1 << 30;      // that 32 bits count, with room

// d [64][columns] += left [64][16], in registers, times right [16 keys][columns], rows of keys in shared memory.
#define KPDEPLOY_VALUES(columns, sums, a0, a1, a2, a3, right_at, types)                                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." types " {" KPDEPLOY_LIST_##sums "}, {%" #a0    \
               ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #right_at ", 1, 1, 1, 1;\n"                                       \
               : KPDEPLOY_SUMS_##sums(0)                                                                              \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right))

#define KPDEPLOY_VALUES_OF(columns, sums, a0, a1, a2, a3, right_at)              \
  if constexpr (std::is_same_v<T, bf16>)                                          \
    KPDEPLOY_VALUES(columns, sums, a0, a1, a2, a3, right_at, "bf16.bf16");        \
  else                                                                            \
    KPDEPLOY_VALUES(columns, sums, a0, a1, a2, a3, right_at, "f16.f16")

template <class T, int columns>
__device__ inline void wgmma_values(float (&d)[columns / 2], const uint32_t* left, uint64_t right) {
  if constexpr (columns == 32)
    KPDEPLOY_VALUES_OF(32, 16, 16, 17, 18, 19, 20);
  else if constexpr (columns == 64)
    KPDEPLOY_VALUES_OF(64, 32, 32, 33, 34, 35, 36);
  else if constexpr (columns == 96)
    KPDEPLOY_VALUES_OF(96, 48, 48, 49, 50, 51, 52);
  else
    KPDEPLOY_VALUES_OF(128, 64, 64, 65, 66, 67, 68);
}

#undef KPDEPLOY_VALUES_OF
#undef KPDEPLOY_VALUES

// Of rows of keys: columns of 64, `line_bytes` apart, each of groups of 8 rows, 1024 bytes apart.
__device__ inline uint64_t values_descriptor(uint32_t address, int line_bytes) {
  return (address & 0x3ffff) >> 4 | uint64_t(line_bytes >> 4) << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// From shared memory of block `rank` of the cluster, at this address.
__device__ inline float4 load_from(uint32_t address, int rank) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}\n"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(address), "r"(rank)
      : "memory");
  return v;
}

__device__ inline float2 load_pair_from(uint32_t address, int rank) {
  float2 v;
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %2, %3;\n"
      "ld.shared::cluster.v2.f32 {%0, %1}, [there];\n}\n"
      : "=f"(v.x), "=f"(v.y)
      : "r"(address), "r"(rank)
      : "memory");
  return v;
}

// A box of a tensor of four dims that starts at these coordinates.
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, int c0, int c1, int c2, int c3, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];\n" ::"r"(to),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
      : "memory");
}

struct Call {
  CUtensorMap query, key, value;
  void* out;
  int64_t out_batch_stride, out_row_stride;
  const float* out_scale;                  // null: out is of T, else of 8-bit floats
  const int64_t *lengths, *offsets;        // null: there are none
  int64_t lengths_stride, offsets_stride;
  int batch, queries, keys, heads, group;  // batch: of rows or of packed sequences; group: heads for each of keys
  int size;                                // of a head
  int tiles, runs;                         // runs of queries in a head; neither is known of packed sequences
  int behind;                              // query i of a causal call sees keys up to i + behind
  float scale;                             // of powers of two
  uint32_t zero;
  bool causal, sorts;                      // sorts: by length; see Walk
};

// Queries and keys that belong together: a row of the batch, or a packed sequence.
struct Sequence {
  int batch, start, queries, keys;
  bool valid;

  __device__ Sequence(const Call& a, int index)
      : batch(index), start(0), queries(a.queries), keys(a.keys), valid(true) {
    if (a.offsets) {
      const auto offset = [&](int i) {
        return static_cast<int>(min(max(a.offsets[i * a.offsets_stride], int64_t{0}), int64_t{a.queries}));
      };
      batch = 0;
      start = offset(index);
      queries = keys = max(0, offset(index + 1) - start);
    } else if (a.lengths) {
      const int64_t length = a.lengths[index * a.lengths_stride];
      valid = length >= 0 && length <= a.keys;
      keys = valid ? static_cast<int>(length) : 0;
    }
  }
  __device__ int runs(int rows) const { return (queries + rows - 1) / rows; }
};

// One run of queries of a head: what the warp that loads it tells the others.
struct alignas(16) Tile {
  int batch, head, row, first;     // row: of the tensors, where its first query is; first: that query, in its sequence
  int queries, seen, blocks;       // queries: of the sequence; seen: its leading keys that count; blocks: 0: the end
  int valid;

  Tile() = default;
  __device__ Tile(const Call& a, const Sequence& sequence, int head, int first, int rows, int block_keys)
      : batch(sequence.batch),
        head(head),
        row(sequence.start + first),
        first(first),
        queries(sequence.queries),
        seen(sequence.keys),
        valid(sequence.valid) {
    const int end = seen_by(a, min(first + rows, queries) - 1);
    blocks = max(1, (end + block_keys - 1) / block_keys);  // one at least, all of it masked
  }
  // How many leading keys query i sees.
  __device__ int seen_by(const Call& a, int i) const {
    return a.causal ? max(0, min(seen, i + a.behind + 1)) : seen;
  }
};

// Sizes, and what follows from them. kBlocks: how many are on a multiprocessor.
template <class T_, int kSize_, int kKeys_, int kGroups_, int kStages_, int kBlocks_ = 1>
struct Form {
  using T = T_;
  static constexpr int kSize = kSize_, kKeys = kKeys_, kGroups = kGroups_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kLines = (kSize + kLine - 1) / kLine, kConsumers = kGroups * 128;
  static constexpr bool kAlone = kBlocks == 1;
  static constexpr int kQueryBytes = kRows * kLines * 128, kBlockBytes = kKeys * kLines * 128;
};

// Whether a head fills its lines, so that one box has all of them: see rows_map.
template <class F>
__host__ __device__ bool fills_lines(int64_t size) { return F::kLines > 1 && size == F::kLines * kLine; }

// `rows` rows of a head of `size` columns, from `row` on, as rows_map has them.
template <class F>
__device__ inline void copy_rows(uint32_t to, const CUtensorMap& map, int rows, int size, int row, int head, int batch,
                                 uint32_t barrier) {
  if (fills_lines<F>(size)) return copy_box(to, map, 0, row, head * F::kLines, batch, barrier);
#pragma unroll
  for (int line = 0; line < F::kLines; ++line)
    copy_box(to + line * rows * 128, map, line * kLine, row, head, batch, barrier);
}

// Of runs of queries. kTurns: warpgroups issue their products in turns.
template <class T, int kSize, int kKeys, int kGroups, int kStages, bool kTurns_, int kBlocks>
struct RunForm : Form<T, kSize, kKeys, kGroups, kStages, kBlocks> {
  using F = Form<T, kSize, kKeys, kGroups, kStages, kBlocks>;
  static constexpr bool kTurns = kTurns_;
  static_assert(!kTurns || (kGroups == 2 && F::kAlone));
  static constexpr int kRun = kGroups * kRows;
  // Registers of a thread, where a block is alone: some go from the warpgroup that loads to those that multiply. Where
  // there are two, one warp that loads leaves more to either.
  static constexpr int kFew = kGroups > 2 ? 32 : 40, kMany = kGroups > 2 ? 112 : 232;
  static_assert(!F::kAlone || F::kConsumers * kMany + 128 * kFew <= 64 << 10);
  static constexpr int kThreads = F::kConsumers + (F::kAlone ? 128 : 32);
  static constexpr int kTiles = 256;  // where they are, after the barriers
  static constexpr size_t kBytes = 1024 + 2 * kGroups * F::kQueryBytes + 2 * kStages * F::kBlockBytes + 512;
  static_assert((6 + 4 * kStages) * 8 <= kTiles && kTiles + 2 * sizeof(Tile) <= 512);
};

// Where things are in shared memory. Two places for the queries of a run, which its output then takes.
template <class F>
struct Memory {
  uint32_t query, key, value, barriers;
  __device__ Memory(uint32_t start) {
    query = (start + 1023) / 1024 * 1024;
    key = query + 2 * F::kGroups * F::kQueryBytes;
    value = key + F::kStages * F::kBlockBytes;
    barriers = value + F::kStages * F::kBlockBytes;
  }
  __device__ uint32_t query_of(int place, int group) const {
    return query + (place * F::kGroups + group) * F::kQueryBytes;
  }
  __device__ uint32_t query_full(int i) const { return barriers + i * 8; }
  __device__ uint32_t query_empty(int i) const { return barriers + (2 + i) * 8; }
  __device__ uint32_t key_full(int i) const { return barriers + (4 + i) * 8; }
  __device__ uint32_t key_empty(int i) const { return barriers + (4 + F::kStages + i) * 8; }
  __device__ uint32_t value_full(int i) const { return barriers + (4 + 2 * F::kStages + i) * 8; }
  __device__ uint32_t value_empty(int i) const { return barriers + (4 + 3 * F::kStages + i) * 8; }
  __device__ uint32_t tile(int i) const { return barriers + F::kTiles + i * sizeof(Tile); }
};

__device__ inline void put_tile(uint32_t to, const Tile& t) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(t.batch), "r"(t.head), "r"(t.row),
               "r"(t.first)
               : "memory");
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(to + 16), "r"(t.queries), "r"(t.seen), "r"(t.blocks),
               "r"(t.valid)
               : "memory");
}

__device__ inline Tile tile_from(uint32_t from) {
  Tile t;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(t.batch), "=r"(t.head), "=r"(t.row), "=r"(t.first)
               : "r"(from)
               : "memory");
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(t.queries), "=r"(t.seen), "=r"(t.blocks), "=r"(t.valid)
               : "r"(from + 16)
               : "memory");
  return t;
}

// The tiles of a block, by a whole warp: every gridDim.x-th, to and fro. Where lengths differ, long sequences come
// before short ones, so that the blocks of threads get about equal work.
template <class F>
struct Walk {
  static constexpr int kClasses = 16;  // of lengths
  int round = 0, most = 0;             // most: blocks of keys of the longest sequence
  int of = kClasses - 1, first = 0;    // where the search is: a class, and the first of 32 sequences
  int before = 0;                      // tiles before these

  __device__ Walk(const Call& a) {
    if (!a.sorts) return;
    for (int i = threadIdx.x % 32; i < a.batch; i += 32) most = max(most, blocks_of(Sequence(a, i)));
    most = __reduce_max_sync(~0u, most);
  }
  __device__ static int blocks_of(const Sequence& sequence) { return (sequence.keys + F::kKeys - 1) / F::kKeys; }

  // The next tile; false: there are no more.
  __device__ bool take(const Call& a, Tile& tile) {
    const int index = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    ++round;
    if (a.sorts) return find(a, index, tile);
    if (index >= a.tiles) return false;
    const int sequence = index / (a.runs * a.heads);
    tile = in_sequence(a, Sequence(a, sequence), index - sequence * a.runs * a.heads);
    return true;
  }
  __device__ static Tile in_sequence(const Call& a, const Sequence& sequence, int index) {
    const int runs = sequence.runs(F::kRun), run = runs - 1 - index % runs;  // of causal ones the longest come first
    return Tile(a, sequence, index / runs, run * F::kRun, F::kRun, F::kKeys);
  }
  __device__ bool find(const Call& a, int index, Tile& tile) {
    const int lane = threadIdx.x % 32;
    for (; of >= 0; --of, first = 0)
      for (; first < a.batch; first += 32) {
        int upto = 0;
        if (first + lane < a.batch) {
          const Sequence sequence(a, first + lane);
          if (blocks_of(sequence) * kClasses / (most + 1) == of) upto = sequence.runs(F::kRun) * a.heads;
        }
        if (!__any_sync(~0u, upto)) continue;
        const int own = upto;
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
          const int other = __shfl_up_sync(~0u, upto, i);
          if (lane >= i) upto += other;
        }
        const unsigned behind = __ballot_sync(~0u, before + upto > index);
        if (behind) {
          const int found = __ffs(behind) - 1, start = before + __shfl_sync(~0u, upto - own, found);
          if (start > index) return false;  // offsets that are none gave more tiles than can be counted
          tile = in_sequence(a, Sequence(a, first + found), index - start);
          return true;
        }
        before += __shfl_sync(~0u, upto, 31);
      }
    return false;
  }
};

template <class F>
__device__ void load_tile(const Call& a, const Memory<F>& m, const Tile& tile, const Place<2>& own,
                          Place<F::kStages>& place) {
  const int kv_head = tile.head / a.group, start = tile.row - tile.first;
  wait_for(m.query_empty(own.stage), own.round ^ 1);
  put_tile(m.tile(own.stage), tile);
  arrive_expecting(m.query_full(own.stage), F::kGroups * F::kQueryBytes);
#pragma unroll
  for (int g = 0; g < F::kGroups; ++g)
    copy_rows<F>(m.query_of(own.stage, g), a.query, kRows, a.size, tile.row + g * kRows, tile.head, tile.batch,
                 m.query_full(own.stage));
  for (int n = tile.blocks - 1; n >= 0; --n, place.next()) {
    wait_for(m.key_empty(place.stage), place.round ^ 1);
    arrive_expecting(m.key_full(place.stage), F::kBlockBytes);
    copy_rows<F>(m.key + place.stage * F::kBlockBytes, a.key, F::kKeys, a.size, start + n * F::kKeys, kv_head, tile.batch,
                 m.key_full(place.stage));
    wait_for(m.value_empty(place.stage), place.round ^ 1);
    arrive_expecting(m.value_full(place.stage), F::kBlockBytes);
    copy_rows<F>(m.value + place.stage * F::kBlockBytes, a.value, F::kKeys, a.size, start + n * F::kKeys, kv_head,
                 tile.batch, m.value_full(place.stage));
  }
}

// By a whole warp, of which one thread asks the copy engine.
template <class F>
__device__ void load_all(const Call& a, const Memory<F>& m) {
  Walk<F> walk(a);
  Place<F::kStages> place;
  Place<2> own;
  const bool asks = threadIdx.x % 32 == 0;
  for (Tile tile; walk.take(a, tile); own.next()) {
    if (asks) load_tile<F>(a, m, tile, own, place);
    __syncwarp();
  }
  if (!asks) return;
  wait_for(m.query_empty(own.stage), own.round ^ 1);
  put_tile(m.tile(own.stage), {});
  arrive(m.query_full(own.stage));
}

// What a thread keeps of its two rows.
template <class F>
struct State {
  float out[F::kSize / 2], score[F::kKeys / 2];
  uint32_t weight[F::kKeys / 4], next[F::kKeys / 4];
  float largest[2], total[2], shrink[2];
  bool grew;
};

// scores = queries times one block of keys.
template <class F>
__device__ inline void multiply_keys(State<F>& s, uint32_t query, uint32_t key) {
  wgmma_fence();
  const uint64_t left = matrix_descriptor(query), right = matrix_descriptor(key);
#pragma unroll
  for (int k = 0; k < F::kSize / 16; ++k)
    wgmma<typename F::T, F::kKeys>(s.score, left + k / 4 * (kRows * 128 >> 4) + k % 4 * 2,
                                   right + k / 4 * (F::kKeys * 128 >> 4) + k % 4 * 2, k > 0);
  wgmma_commit();
}

// out += weights times one block of values.
template <class F>
__device__ inline void multiply_values(State<F>& s, uint32_t value) {
  wgmma_fence();
  const uint64_t right = values_descriptor(value, F::kKeys * 128);
#pragma unroll
  for (int k = 0; k < F::kKeys / 16; ++k)
    wgmma_values<typename F::T, F::kSize>(s.out, s.weight + k * 4, right + k * (16 * 128 >> 4));
  wgmma_commit();
}

template <class F>
__device__ inline float base_of(const State<F>& s, int half, float scale) {
  return s.largest[half] == -INFINITY ? 0 : s.largest[half] * scale;
}

// Weights 2^(scores * scale - base), in next where those before are still needed; the sums of this thread's.
template <class F>
__device__ inline void exponentials(State<F>& s, float scale, float (&added)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float base = base_of(s, half, scale);
    float sum[2] = {};
#pragma unroll
    for (int j = 0; j < F::kKeys / 8; ++j) {
      const float low = exp2_of(fmaf(s.score[j * 4 + half * 2], scale, -base));
      const float high = exp2_of(fmaf(s.score[j * 4 + half * 2 + 1], scale, -base));
      sum[0] += low;
      sum[1] += high;
      (F::kAlone ? s.next : s.weight)[j * 2 + half] = pack_pair<typename F::T>(low, high);
    }
    added[half] = sum[0] + sum[1];
  }
}

// The maximum of the scores so far.
template <class F>
__device__ inline void raise(State<F>& s, float scale) {
  float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < F::kKeys / 2; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s.score[i]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float found = fmaxf(lanes_max<4>(top[half]), s.largest[half]);
    s.shrink[half] = found > s.largest[half] ? exp2_of((s.largest[half] - found) * scale) : 1;
    s.largest[half] = found;
  }
  s.grew = s.shrink[0] < 1 || s.shrink[1] < 1;
}

// Scores become weights. `left`: the keys of this block that each row sees, less this thread's first column. `fresh`:
// the first block of a row. Else the weights are first tried with the maximum so far: they may grow to kMost.
template <bool masks, bool fresh, class F>
__device__ inline void weigh(State<F>& s, float scale, int left0, int left1) {
  if (masks) {
#pragma unroll
    for (int i = 0; i < F::kKeys / 2; ++i)
      if (i / 4 * 8 + i % 2 >= (i % 4 < 2 ? left0 : left1)) s.score[i] = -INFINITY;
  }
  float added[2];
  if (fresh) {
    s.largest[0] = s.largest[1] = -INFINITY;
    s.total[0] = s.total[1] = 0;
  }
  if (fresh || !F::kAlone) {  // two blocks leave no registers for scores beside their weights
    raise(s, scale);
    exponentials(s, scale, added);
  } else {
    s.grew = false;
    s.shrink[0] = s.shrink[1] = 1;
    exponentials(s, scale, added);
    const bool fits = added[0] <= kMost && added[1] <= kMost && fminf(s.largest[0], s.largest[1]) > -INFINITY;
    if (__any_sync(~0u, !fits)) {
      raise(s, scale);
      exponentials(s, scale, added);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) s.total[half] = s.total[half] * s.shrink[half] + added[half];
}

// `zero`, which the compiler does not know, keeps these copies where they are, after the product that reads the weights
// before: it would take next for weight, and no longer have products under way while next is computed.
template <class F>
__device__ inline void keep_weights(State<F>& s, uint32_t zero) {
#pragma unroll
  for (int i = 0; i < F::kKeys / 4; ++i) s.weight[i] = s.next[i] ^ zero;
}

template <class F>
__device__ inline void shrink_out(State<F>& s) {
  if (!s.grew) return;
#pragma unroll
  for (int i = 0; i < F::kSize / 2; ++i) s.out[i] *= s.shrink[i / 2 % 2];
}

// Values of keys that do not count may be anything: zeros, from row `from` of the block.
template <class F>
__device__ inline void clear_values(uint32_t value, int from, int thread) {
  for (int i = from * 8 + thread; i < F::kKeys * 8; i += 128)
#pragma unroll
    for (int line = 0; line < F::kLines; ++line)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};\n" ::"r"(value + line * F::kKeys * 128 + i * 16), "r"(0)
                   : "memory");
  fence_stores();
}

// Rows of the queries of a warpgroup that are none become zeros: they would choose, for the warp, when the maximum is
// raised, and so how others are rounded.
template <class F>
__device__ inline void clear_queries(uint32_t query, int from, int thread, int threads) {
  for (int i = max(from, 0) * 8 + thread; i < kRows * 8; i += threads)
#pragma unroll
    for (int line = 0; line < F::kLines; ++line)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};\n" ::"r"(query + line * kRows * 128 + i * 16), "r"(0)
                   : "memory");
  fence_stores();
}

enum { kTurnBarrier = 1, kGroupBarrier = 5 };  // ids of named barriers: one a warpgroup each

// The rows of this warp over out_scale, as 8-bit floats; `to`: the first of `left` ones. Four neighbours have two
// columns of every eight of the same two rows each: they exchange them, so that each has 16 side by side. In kernels of
// their own, without the branch that leads here, short runs took up to 5 % longer (benchmarks/README.md).
template <class F>
__device__ inline void store_f8(const Call& a, const State<F>& s, uint8_t* to, int left, int lane) {
  constexpr int kAcross = F::kSize / 16;  // of 16 columns, in a row
  const bool odd = lane % 2, high = lane / 2 % 2;
  const float inverse = 1 / *a.out_scale;
#pragma unroll
  for (int first = 0; first < 2 * kAcross; first += 4) {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const o = s.out + (first + i) % kAcross * 8 + (first + i) / kAcross * 2;
      v[i] = pack_four(o[0] * inverse, o[1] * inverse, o[4] * inverse, o[5] * inverse);
    }
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t other = __shfl_xor_sync(~0u, odd ? v[i] : v[i + 1], 1);
      odd ? v[i] = other : v[i + 1] = other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t other = __shfl_xor_sync(~0u, high ? v[i] : v[i + 2], 2);
      high ? v[i] = other : v[i + 2] = other;
    }
    const int own = first + lane % 4, row = lane / 4 + own / kAcross * 8, column = own % kAcross * 16;
    const uint2 low = {__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[2], v[3], 0x5410)};
    const uint2 rest = {__byte_perm(v[0], v[1], 0x7632), __byte_perm(v[2], v[3], 0x7632)};
    uint8_t* const at = to + row * a.out_row_stride + column;
    if (row < left && column < a.size) {
      if (a.size % 16 == 0) {
        *reinterpret_cast<uint4*>(at) = {low.x, low.y, rest.x, rest.y};
      } else {
        *reinterpret_cast<uint2*>(at) = low;
        if (column + 8 < a.size) *reinterpret_cast<uint2*>(at + 8) = rest;
      }
    }
  }
}

// Divides by the sums of the weights, and stores the rows of this warp that are in the sequence: those of 16 bits
// through shared memory, where its own queries were, so that whole lines go out.
template <class F>
__device__ inline void finish(const Call& a, const Memory<F>& m, State<F>& s, const float (&total)[2], int index,
                              int group, int lane, int warp) {
  const Tile tile = tile_from(m.tile(index));  // again: registers are short while there is work
  const uint32_t place = m.query_of(index, group);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = lanes_sum<4>(total[half]);
    const float share = !tile.valid ? NAN : sum == 0 ? 0 : 1 / sum;
#pragma unroll
    for (int i = 0; i < F::kSize / 4; ++i) s.out[i / 2 * 4 + half * 2 + i % 2] *= share;
  }
  const int first = group * kRows + warp * 16, left = tile.queries - tile.first - first;
  const auto at = [&] {
    return tile.batch * a.out_batch_stride + (tile.row + first) * a.out_row_stride + tile.head * a.size;
  };
  if (a.out_scale) {
    store_f8(a, s, static_cast<uint8_t*>(a.out) + at(), left, lane);
    return __syncwarp();  // all of it have read the tile
  }
  const int row = warp * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < F::kSize / 8; j += 2) {
    const int unit = (j + lane / 16) % 8;
    store_matrices(place + j / 8 * (kRows * 128) + row * 128 + (unit ^ row % 8) * 16,
                   pack_pair<typename F::T>(s.out[j * 4], s.out[j * 4 + 1]),
                   pack_pair<typename F::T>(s.out[j * 4 + 2], s.out[j * 4 + 3]),
                   pack_pair<typename F::T>(s.out[j * 4 + 4], s.out[j * 4 + 5]),
                   pack_pair<typename F::T>(s.out[j * 4 + 6], s.out[j * 4 + 7]));
  }
  __syncwarp();
  typename F::T* const to = static_cast<typename F::T*>(a.out) + at();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = i * 4 + lane / 8, unit = lane % 8;
#pragma unroll
    for (int line = 0; line < F::kLines; ++line) {
      const uint4 v = load_shared(place + line * (kRows * 128) + (warp * 16 + r) * 128 + (unit ^ r % 8) * 16);
      if (r < left && line * kLine + unit * 8 < a.size)
        *reinterpret_cast<uint4*>(to + r * a.out_row_stride + line * kLine + unit * 8) = v;
    }
  }
  fence_stores();  // before the copy engine writes there again
  __syncwarp();
}

// Rows that no sequence has.
template <class F>
__device__ inline void clear_rest(const Call& a) {
  const int width = a.heads * (a.size / 8);
  const int64_t end = min(max(a.offsets[a.batch * a.offsets_stride], int64_t{0}), int64_t{a.queries});
  for (int64_t r = end + blockIdx.x; r < a.queries; r += gridDim.x)
    for (int i = threadIdx.x; i < width; i += F::kConsumers) {
      const int64_t at = r * a.out_row_stride + i * 8;
      if (a.out_scale)
        *reinterpret_cast<uint2*>(static_cast<uint8_t*>(a.out) + at) = {};
      else
        *reinterpret_cast<uint4*>(static_cast<typename F::T*>(a.out) + at) = {};
    }
}

// The blocks of all tiles in one sequence: the first product of a tile is under way with the last one of the one
// before.
template <class F>
__device__ void attend_all(const Call& a, const Memory<F>& m) {
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  const auto await_turn = [&] {
    if (F::kTurns) asm volatile("bar.sync %0, 256;\n" ::"r"(kTurnBarrier + group) : "memory");
  };
  const auto end_turn = [&] {
    if (F::kTurns) asm volatile("bar.arrive %0, 256;\n" ::"r"(kTurnBarrier + (group + 1) % F::kGroups) : "memory");
  };
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) arrive(barrier);
  };

  State<F> s;
  Place<F::kStages> keys, values;
  Place<2> own;
  wait_for(m.query_full(own.stage), own.round);
  int n, seen[2], clear, seen_by_some;  // n: the block; clear: blocks that need no mask
  const auto enter = [&](const Tile& tile) {
    seen_by_some = tile.seen;
    const int first = tile.first + group * kRows, row = first + warp * 16 + lane / 4, column = lane % 4 * 2;
    seen[0] = tile.seen_by(a, row) - column;
    seen[1] = tile.seen_by(a, row + 8) - column;
    clear = tile.seen_by(a, first) / F::kKeys;
#pragma unroll
    for (int i = 0; i < F::kSize / 2; ++i) s.out[i] = 0;
  };
  const auto clear_tail = [&](int n) {
    if (seen_by_some >= a.keys || seen_by_some >= (n + 1) * F::kKeys) return;
    wait_for(m.value_full(values.stage), values.round);
    clear_values<F>(m.value + values.stage * F::kBlockBytes, seen_by_some - n * F::kKeys, thread);
    group_sync(kGroupBarrier + group, 128);
  };
  const auto clear_beyond = [&](const Tile& tile) {
    if (!a.offsets) return;  // beyond the end of a tensor there are zeros
    const int left = tile.queries - tile.first - group * kRows;
    if (left >= kRows) return;
    clear_queries<F>(m.query_of(own.stage, group), left, thread, 128);
    group_sync(kGroupBarrier + group, 128);
  };
  const auto multiply_both = [&] {
    wait_for(m.key_full(keys.stage), keys.round);
    await_turn();
    multiply_keys<F>(s, m.query_of(own.stage, group), m.key + keys.stage * F::kBlockBytes);
    wait_for(m.value_full(values.stage), values.round);
    multiply_values<F>(s, m.value + values.stage * F::kBlockBytes);
    end_turn();
    wgmma_wait<1>();
    release(m.key_empty(keys.stage));
    keys.next();
  };
  const auto await_values = [&] {
    wgmma_wait<0>();
    release(m.value_empty(values.stage));
    values.next();
  };

  {
    const Tile tile = tile_from(m.tile(own.stage));
    if (!tile.blocks) return;
    if (group == F::kGroups - 1) end_turn();
    enter(tile);
    clear_beyond(tile);
    n = tile.blocks - 1;
  }
  wait_for(m.key_full(keys.stage), keys.round);
  multiply_keys<F>(s, m.query_of(own.stage, group), m.key + keys.stage * F::kBlockBytes);
  wgmma_wait<0>();
  release(m.key_empty(keys.stage));
  keys.next();
  weigh<true, true>(s, a.scale, seen[0] - n * F::kKeys, seen[1] - n * F::kKeys);
  keep_weights(s, a.zero);
  clear_tail(n);
  for (;;) {
    const auto step = [&](auto masks) {
      multiply_both();
      weigh<masks.value, false>(s, a.scale, seen[0] - n * F::kKeys, seen[1] - n * F::kKeys);
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
    clear_beyond(next);
    multiply_both();
    n = next.blocks - 1;
    {
      const int row = next.first + group * kRows + warp * 16 + lane / 4, before = n * F::kKeys + lane % 4 * 2;
      weigh<true, true>(s, a.scale, next.seen_by(a, row) - before, next.seen_by(a, row + 8) - before);
    }
    await_values();
    finish(a, m, s, total, place, group, lane, warp);
    release(m.query_empty(place));
    enter(tile_from(m.tile(own.stage)));
    keep_weights(s, a.zero);
    clear_tail(n);
  }
}

// One product at a time: the other block of the multiprocessor has the tensor cores meanwhile.
template <class F>
__device__ void attend_plainly(const Call& a, const Memory<F>& m) {
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  State<F> s;
  Place<F::kStages> place;
  for (Place<2> own;; own.next()) {
    wait_for(m.query_full(own.stage), own.round);
    const Tile tile = tile_from(m.tile(own.stage));
    if (!tile.blocks) return;
    const int first = tile.first + group * kRows, row = first + warp * 16 + lane / 4, column = lane % 4 * 2;
    const int seen[2] = {tile.seen_by(a, row) - column, tile.seen_by(a, row + 8) - column};
    const int clear = tile.seen_by(a, first) / F::kKeys;
#pragma unroll
    for (int i = 0; i < F::kSize / 2; ++i) s.out[i] = 0;
    s.largest[0] = s.largest[1] = -INFINITY;
    s.total[0] = s.total[1] = 0;
    for (int n = tile.blocks - 1; n >= 0; --n, place.next()) {
      const uint32_t value = m.value + place.stage * F::kBlockBytes;
      wait_for(m.key_full(place.stage), place.round);
      multiply_keys<F>(s, m.query_of(own.stage, group), m.key + place.stage * F::kBlockBytes);
      wgmma_wait<0>();
      if (lane == 0) arrive(m.key_empty(place.stage));
      if (n >= clear)
        weigh<true, false>(s, a.scale, seen[0] - n * F::kKeys, seen[1] - n * F::kKeys);
      else
        weigh<false, false>(s, a.scale, 0, 0);
      shrink_out(s);
      wait_for(m.value_full(place.stage), place.round);
      if (tile.seen < a.keys && tile.seen < (n + 1) * F::kKeys) {
        clear_values<F>(value, tile.seen - n * F::kKeys, thread);
        group_sync(kGroupBarrier + group, 128);
      }
      multiply_values<F>(s, value);
      wgmma_wait<0>();
      if (lane == 0) arrive(m.value_empty(place.stage));
    }
    finish(a, m, s, s.total, own.stage, group, lane, warp);
    if (lane == 0) arrive(m.query_empty(own.stage));
  }
}

template <class F>
__global__ void __launch_bounds__(F::kThreads, F::kBlocks) attend(const __grid_constant__ Call a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Memory<F> m(shared_address(memory));
  if (threadIdx.x == 0) {
    prefetch_map(a.query);
    prefetch_map(a.key);
    prefetch_map(a.value);
    for (int i = 0; i < 2; ++i) {
      barrier_init(m.query_full(i), 1);
      barrier_init(m.query_empty(i), F::kGroups * 4);
    }
    for (int i = 0; i < F::kStages; ++i) {
      barrier_init(m.key_full(i), 1);
      barrier_init(m.value_full(i), 1);
      barrier_init(m.key_empty(i), F::kGroups * 4);
      barrier_init(m.value_empty(i), F::kGroups * 4);
    }
    barriers_ready();
  }
  let_next_kernel_begin();
  __syncthreads();
  wait_for_earlier_kernels();
  if (threadIdx.x >= F::kConsumers) {
    if constexpr (F::kAlone) registers_down<F::kFew>();
    if (threadIdx.x / 32 == F::kConsumers / 32) load_all<F>(a, m);
  } else {
    if constexpr (F::kAlone) registers_up<F::kMany>();
    if (a.offsets) clear_rest<F>(a);
    if constexpr (F::kAlone)
      attend_all<F>(a, m);
    else
      attend_plainly<F>(a, m);
  }
}

// Few queries: the keys of one head are divided among blocks, and in each among the warpgroups. The rows of a block are
// up to 64 queries, of all heads that share these keys. Where the caller has memory to lend, the parts meet there: the
// last block of a head, by its index, waits for the others, and sums. They are then on the chip, or were: blocks begin
// in the order of their indices. Otherwise the blocks are a cluster, and meet in shared memory; clusters leave
// multiprocessors idle.

struct FewCall {
  CUtensorMap query, key, value;  // query: [batch][query][head][size]
  void* out;
  int64_t out_batch_stride, out_row_stride;
  const float* out_scale;
  const int64_t* lengths;
  int64_t lengths_stride;
  int queries, keys, kv_heads, group, runs, run;  // run: queries of a block
  int size;                                       // of a head
  float scale;
  uint32_t zero;
  bool causal;
  // Where the parts meet in memory: how many there are of a head's keys, and, for each part of each head, a float4 of
  // every four columns of its rows, their maxima and sums, and whether they are there: then `there` holds `ticket`.
  int parts;
  float4* part_out;
  float2* part_sums;
  uint64_t* there;
  uint64_t ticket;
};

template <class F>
struct FewMemory {
  static constexpr int kPart = kRows * F::kSize * 4 + kRows * 8;  // out, the maxima and the sums of a warpgroup
  static_assert(F::kGroups * kPart <= 2 * F::kStages * F::kBlockBytes);
  static constexpr size_t kBytes = F::kQueryBytes + 2 * F::kStages * F::kBlockBytes + 32 * 8;
  uint32_t query, key, value, barriers;
  __device__ FewMemory(uint32_t start) {
    query = start;
    key = query + F::kQueryBytes;
    value = key + F::kStages * F::kBlockBytes;
    barriers = value + F::kStages * F::kBlockBytes;
  }
  __device__ uint32_t query_full() const { return barriers; }
  __device__ uint32_t key_full(int i) const { return barriers + (1 + i) * 8; }
  __device__ uint32_t key_empty(int i) const { return barriers + (1 + F::kStages + i) * 8; }
  __device__ uint32_t value_full(int i) const { return barriers + (1 + 2 * F::kStages + i) * 8; }
  __device__ uint32_t value_empty(int i) const { return barriers + (1 + 3 * F::kStages + i) * 8; }
  __device__ uint32_t part(int group) const { return key + group * kPart; }  // where the keys were
};

// The block's share.
template <class F>
struct Few {
  int batch, kv_head, first, seen, begin, end;  // begin, end: blocks of keys
  bool valid;
  __device__ Few(const FewCall& a, int rank, int blocks) {
    const int index = blockIdx.x / blocks;
    first = index % a.runs * a.run;
    kv_head = index / a.runs % a.kv_heads;
    batch = index / a.runs / a.kv_heads;
    const int64_t keys = a.lengths ? a.lengths[batch * a.lengths_stride] : a.keys;
    valid = keys >= 0 && keys <= a.keys;
    seen = valid ? static_cast<int>(keys) : 0;
    const int all = (seen_by(a, min(first + a.run, a.queries) - 1) + F::kKeys - 1) / F::kKeys;
    begin = static_cast<int>(int64_t{all} * rank / blocks);
    end = static_cast<int>(int64_t{all} * (rank + 1) / blocks);
  }
  __device__ int seen_by(const FewCall& a, int i) const {
    return a.causal ? max(0, min(seen, i + a.keys - a.queries + 1)) : seen;
  }
};

template <class F>
__device__ void load_few(const FewCall& a, const FewMemory<F>& m, const Few<F>& few) {
  arrive_expecting(m.query_full(), a.run * a.group * F::kLines * 128);
#pragma unroll
  for (int line = 0; line < F::kLines; ++line)
    copy_box(m.query + line * kRows * 128, a.query, line * kLine, few.kv_head * a.group, few.first, few.batch,
             m.query_full());
  Place<F::kStages> place;
  for (int n = few.begin; n < few.end; ++n, place.next()) {
    wait_for(m.key_empty(place.stage), place.round ^ 1);
    arrive_expecting(m.key_full(place.stage), F::kBlockBytes);
    copy_rows<F>(m.key + place.stage * F::kBlockBytes, a.key, F::kKeys, a.size, n * F::kKeys, few.kv_head, few.batch,
                 m.key_full(place.stage));
    wait_for(m.value_empty(place.stage), place.round ^ 1);
    arrive_expecting(m.value_full(place.stage), F::kBlockBytes);
    copy_rows<F>(m.value + place.stage * F::kBlockBytes, a.value, F::kKeys, a.size, n * F::kKeys, few.kv_head, few.batch,
                 m.value_full(place.stage));
  }
}

template <class F>
__device__ void attend_few(const FewCall& a, const FewMemory<F>& m, const Few<F>& few) {
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  const int row = warp * 16 + lane / 4, column = lane % 4 * 2;
  const int seen[2] = {few.seen_by(a, few.first + row / a.group) - column,
                       few.seen_by(a, few.first + (row + 8) / a.group) - column};
  State<F> s;
#pragma unroll
  for (int i = 0; i < F::kSize / 2; ++i) s.out[i] = 0;
  s.largest[0] = s.largest[1] = -INFINITY;
  s.total[0] = s.total[1] = 0;
  Place<F::kStages> place;
  const auto next = [&] {
#pragma unroll
    for (int i = 0; i < F::kGroups; ++i) place.next();
  };
  for (int i = 0; i < group; ++i) place.next();
  wait_for(m.query_full(), 0);
  for (int n = few.begin + group; n < few.end; n += F::kGroups, next()) {
    const uint32_t value = m.value + place.stage * F::kBlockBytes;
    wait_for(m.key_full(place.stage), place.round);
    multiply_keys<F>(s, m.query, m.key + place.stage * F::kBlockBytes);
    wgmma_wait<0>();
    if (lane == 0) arrive(m.key_empty(place.stage));
    weigh<true, false>(s, a.scale, seen[0] - n * F::kKeys, seen[1] - n * F::kKeys);
    shrink_out(s);
    keep_weights(s, a.zero);
    wait_for(m.value_full(place.stage), place.round);
    if (few.seen < a.keys && few.seen < (n + 1) * F::kKeys) {
      clear_values<F>(value, few.seen - n * F::kKeys, thread);
      group_sync(kGroupBarrier + group, 128);
    }
    multiply_values<F>(s, value);
    wgmma_wait<0>();
    if (lane == 0) arrive(m.value_empty(place.stage));
  }
  group_sync(kTurnBarrier, F::kConsumers);  // nobody needs the keys any more
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + half * 8;
    const float sum = lanes_sum<4>(s.total[half]);
    if (at >= a.run * a.group) continue;
    const uint32_t to = m.part(group) + at * F::kSize * 4;
#pragma unroll
    for (int j = 0; j < F::kSize / 8; ++j)
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(to + (j * 8 + column) * 4), "f"(s.out[j * 4 + half * 2]),
                   "f"(s.out[j * 4 + half * 2 + 1])
                   : "memory");
    if (lane % 4 == 0)
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(m.part(group) + kRows * F::kSize * 4 + at * 8),
                   "f"(s.largest[half]), "f"(sum)
                   : "memory");
  }
}

// The sum of parts, of four columns of a row.
struct Sum {
  float largest = -INFINITY, total = 0, out[4] = {};
  __device__ void add(float2 sums, float4 v, float scale) {
    const float top = fmaxf(largest, sums.x), base = top == -INFINITY ? 0 : top;
    const float shrink = exp2_of((largest - base) * scale), weight = exp2_of((sums.x - base) * scale);
    largest = top;
    total = total * shrink + sums.y * weight;
    out[0] = out[0] * shrink + v.x * weight;
    out[1] = out[1] * shrink + v.y * weight;
    out[2] = out[2] * shrink + v.z * weight;
    out[3] = out[3] * shrink + v.w * weight;
  }
};

template <class F>
__device__ void store_sum(const FewCall& a, const Few<F>& few, int row, int column, const Sum& sum) {
  using T = typename F::T;
  const int query = few.first + row / a.group;
  if (query >= a.queries || column >= a.size) return;
  const float by = a.out_scale ? 1 / *a.out_scale : 1;
  const float share = !few.valid ? NAN : sum.total == 0 ? 0 : by / sum.total;
  const int64_t at = few.batch * a.out_batch_stride + query * a.out_row_stride +
                     (few.kv_head * a.group + row % a.group) * a.size + column;
  const float v[4] = {sum.out[0] * share, sum.out[1] * share, sum.out[2] * share, sum.out[3] * share};
  if (a.out_scale)
    *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(a.out) + at) = pack_four(v[0], v[1], v[2], v[3]);
  else
    store<4>(static_cast<T*>(a.out) + at, v);
}

// Sums the parts of all blocks of a cluster: each block some of the columns.
template <class F>
__device__ void sum_parts(const FewCall& a, const FewMemory<F>& m, const Few<F>& few, int rank, int blocks) {
  constexpr int kAcross = F::kSize / 4;
  const int rows = a.run * a.group;
  for (int i = threadIdx.x * blocks + rank; i < rows * kAcross; i += blocks * F::kConsumers) {
    const int row = i / kAcross, column = i % kAcross * 4;
    Sum sum;
#pragma unroll 8
    for (int part = 0; part < blocks * F::kGroups; ++part) {
      const uint32_t at = m.part(part % F::kGroups);
      sum.add(load_pair_from(at + kRows * F::kSize * 4 + row * 8, part / F::kGroups),
              load_from(at + (row * F::kSize + column) * 4, part / F::kGroups), a.scale);
    }
    store_sum<F>(a, few, row, column, sum);
  }
}

__device__ inline uint64_t load_acquire(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.gpu.global.b64 %0, [%1];\n" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ inline void store_release(uint64_t* p, uint64_t v) {
  asm volatile("st.release.gpu.global.b64 [%0], %1;\n" ::"l"(p), "l"(v) : "memory");
}

// Puts this block's part into memory; the last block of a head sums them all.
template <class F>
__device__ void join_parts(const FewCall& a, const FewMemory<F>& m, const Few<F>& few, int part) {
  constexpr int kAcross = F::kSize / 4;
  const int rows = a.run * a.group, before = blockIdx.x - part;
  const bool is_last = part == a.parts - 1;
  if (is_last) {
    for (int i = threadIdx.x; i < part; i += F::kConsumers) {
      while (load_acquire(a.there + before + i) != a.ticket) {
      }
      a.there[before + i] = 0;  // a graph comes again with the same ticket
    }
  }
  group_sync(kTurnBarrier, F::kConsumers);  // this block's own are in shared memory, those of the others in memory
  for (int i = threadIdx.x; i < rows * kAcross; i += F::kConsumers) {
    const int row = i / kAcross, column = i % kAcross * 4;
    Sum sum;
#pragma unroll
    for (int group = 0; group < F::kGroups; ++group)
      sum.add(load_pair_from(m.part(group) + kRows * F::kSize * 4 + row * 8, 0),
              load_from(m.part(group) + (row * F::kSize + column) * 4, 0), a.scale);
    if (is_last) {
#pragma unroll 8
      for (int64_t other = before; other < before + part; ++other)
        sum.add(__ldcg(a.part_sums + other * rows + row), __ldcg(a.part_out + other * rows * kAcross + i), a.scale);
      store_sum<F>(a, few, row, column, sum);
    } else {
      const int64_t at = blockIdx.x;
      a.part_out[at * rows * kAcross + i] = {sum.out[0], sum.out[1], sum.out[2], sum.out[3]};
      if (column == 0) a.part_sums[at * rows + row] = {sum.largest, sum.total};
    }
  }
  if (is_last) return;
  group_sync(kTurnBarrier, F::kConsumers);
  if (threadIdx.x == 0) store_release(a.there + blockIdx.x, a.ticket);
}

// `in_memory`: where the parts meet.
template <class F, bool in_memory>
__global__ void __launch_bounds__(F::kConsumers + 32, 1) attend_with_few(const __grid_constant__ FewCall a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const FewMemory<F> m(shared_address(memory));
  if (threadIdx.x == 0) {
    prefetch_map(a.query);
    prefetch_map(a.key);
    prefetch_map(a.value);
    barrier_init(m.query_full(), 1);
    for (int i = 0; i < F::kStages; ++i) {
      barrier_init(m.key_full(i), 1);
      barrier_init(m.value_full(i), 1);
      barrier_init(m.key_empty(i), 4);
      barrier_init(m.value_empty(i), 4);
    }
    barriers_ready();
  }
  clear_queries<F>(m.query, a.run * a.group, threadIdx.x, F::kConsumers + 32);
  __syncthreads();
  let_next_kernel_begin();
  int blocks = a.parts, rank = blockIdx.x % blocks;
  if constexpr (!in_memory) {
    asm volatile("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(blocks));
    rank = cluster_rank();
  }
  wait_for_earlier_kernels();
  const Few<F> few(a, rank, blocks);
  if (threadIdx.x < F::kConsumers)
    attend_few<F>(a, m, few);
  else if (threadIdx.x == F::kConsumers)
    load_few<F>(a, m, few);
  if constexpr (in_memory) {
    if (threadIdx.x < F::kConsumers) join_parts<F>(a, m, few, rank);
    return;
  }
  __syncthreads();  // for compute-sanitizer, to which the next barrier does not count within a block
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x < F::kConsumers) sum_parts<F>(a, m, few, rank, blocks);
  __syncwarp();
  cluster_arrive();
  cluster_wait();  // until the others have read this block's parts
}

template <class T>
constexpr CUtensorMapDataType kMapType =
    std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;

// Boxes of a tensor of four dims, kLine columns wide, with zeros where there are fewer; sizes, strides (in elements) and
// the box from the second dim on.
CUtensorMap boxes_of(void* data, CUtensorMapDataType type, int64_t columns, const int64_t (&sizes)[3],
                     const int64_t (&strides)[3], const int64_t (&box)[3]) {
  cuuint64_t all_sizes[4] = {static_cast<cuuint64_t>(columns)}, bytes[3];
  cuuint32_t whole_box[4] = {kLine}, steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 3; ++i) {
    all_sizes[i + 1] = sizes[i];
    bytes[i] = sizes[i] > 1 ? strides[i] * 2 : 16;  // of a single one any will do
    whole_box[i + 1] = static_cast<cuuint32_t>(box[i]);
  }
  CUtensorMap map;
  const CUresult result =
      encoder()(&map, type, 4, data, all_sizes, bytes, whole_box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) refuse("the copy engine refuses a tensor (CUDA error %d)", static_cast<int>(result));
  return map;
}

// [batch][head][row][size], boxes of `rows` of `all` rows: one of each line of a head; or, where heads fill their lines,
// [batch][line][row][kLine], one of all lines of a head.
template <class F>
CUtensorMap rows_map(const CudaAttention& a, const CudaGrid& grid, int64_t all, int64_t heads, int64_t rows) {
  const bool fills = fills_lines<F>(a.head_size);
  const int64_t columns = fills ? kLine : a.head_size, lines = fills ? F::kLines : 1;
  return boxes_of(grid.data, kMapType<typename F::T>, columns, {all, heads * lines, a.batch},
                  {grid.row_stride, columns, grid.batch_stride}, {rows, lines, 1});
}

int64_t runs_of(const CudaAttention& a, int64_t run) { return (a.queries + run - 1) / run; }

template <class F>
void run(const CudaAttention& a, int processors, void* stream) {
  Call c{};
  c.query = rows_map<F>(a, a.query, a.queries, a.heads, kRows);
  c.out = a.out.data;
  c.out_batch_stride = a.out.batch_stride;
  c.out_row_stride = a.out.row_stride;
  c.out_scale = a.out_scale;
  c.key = rows_map<F>(a, a.key, a.keys, a.kv_heads, F::kKeys);
  c.value = rows_map<F>(a, a.value, a.keys, a.kv_heads, F::kKeys);
  c.size = static_cast<int>(a.head_size);
  c.lengths = a.lengths;
  c.lengths_stride = a.lengths_stride;
  c.offsets = a.offsets;
  c.offsets_stride = a.offsets_stride;
  c.batch = static_cast<int>(a.offsets ? a.sequences : a.batch);
  c.queries = static_cast<int>(a.queries);
  c.keys = static_cast<int>(a.offsets ? kMostRows : a.keys);  // behind those of a sequence are those of the next
  c.behind = static_cast<int>(a.keys - a.queries);
  c.heads = static_cast<int>(a.heads);
  c.group = static_cast<int>(a.heads / a.kv_heads);
  c.runs = static_cast<int>(runs_of(a, F::kRun));
  c.tiles = c.heads * (a.offsets ? c.runs + c.batch : c.runs * c.batch);  // of packed ones, no more than these
  c.scale = a.scale * kLog2E;
  c.causal = a.causal;
  c.sorts = a.offsets || (a.lengths && !a.causal && c.tiles > processors * F::kBlocks);  // else each block has one
  // What each run costs is known to nobody beforehand where both matter: the hardware hands them out.
  const int blocks = a.lengths && a.causal ? c.tiles : std::min(processors * F::kBlocks, c.tiles);
  const int64_t rows = a.batch * a.queries;
  const bool early = rows <= kEarlySpreadRows;
  launch_when(early, attend<F>, blocks, 1, F::kThreads,
              early ? spread_bytes(rows, blocks, processors, F::kBytes) : F::kBytes, stream, c);
}

constexpr int kMostBlocks = 16;  // of a cluster

// How many clusters of so many blocks run at a time.
template <class F>
std::array<int, kMostBlocks + 1> clusters_at_once() {
  const auto kernel = attend_with_few<F, false>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, FewMemory<F>::kBytes));
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  std::array<int, kMostBlocks + 1> found{};
  for (int blocks = 1; blocks <= kMostBlocks; ++blocks) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(F::kConsumers + 32);
    config.dynamicSmemBytes = FewMemory<F>::kBytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check_cuda(cudaOccupancyMaxActiveClusters(&found[blocks], kernel, &config));
  }
  return found;
}

// The most blocks with which all clusters run at once and each block has a block of keys for each warpgroup.
template <class F>
int cluster_for(const CudaAttention& a, int64_t clusters) {
  static const auto at_once = clusters_at_once<F>();  // of the first GPU that asks: others have at least one at a time
  int blocks = 1;
  for (int i = 2; i <= kMostBlocks; ++i)
    if (at_once[i] >= clusters && (i - 1) * F::kGroups * F::kKeys < a.keys) blocks = i;
  return blocks;
}

// A number that no memory holds by chance, and no launch before had.
uint64_t new_ticket() {
  static std::atomic<uint64_t> count{uint64_t{std::random_device{}()} << 32 | std::random_device{}()};
  uint64_t v = count += 0x9e3779b97f4a7c15;  // splitmix64 (Steele et al. 2014)
  v = (v ^ v >> 30) * 0xbf58476d1ce4e5b9;
  v = (v ^ v >> 27) * 0x94d049bb133111eb;
  return (v ^ v >> 31) | 1;
}

// Memory for the parts of `heads` heads. False where clusters are as fast (few parts, few keys for each, or many rows
// to sum: benchmarks/README.md), or the caller lends none.
template <class F>
bool take_parts(const CudaAttention& a, int64_t heads, int processors, FewCall& c) {
  constexpr int64_t kFewRows = 8, kFewParts = 4, kManyBlocks = 6;
  const int64_t blocks = (a.keys + F::kKeys - 1) / F::kKeys, wanted = processors / heads, rows = c.run * c.group;
  if (wanted < kFewParts || rows > kFewRows || blocks < kManyBlocks * wanted) return false;
  c.parts = static_cast<int>(wanted);
  const int64_t parts = heads * c.parts, out_bytes = parts * rows * F::kSize * 4, sums_bytes = parts * rows * 8;
  char* const memory = static_cast<char*>(a.memory.take(out_bytes + sums_bytes + parts * 8));
  if (!memory) return false;
  c.part_out = reinterpret_cast<float4*>(memory);
  c.part_sums = reinterpret_cast<float2*>(memory + out_bytes);
  c.there = reinterpret_cast<uint64_t*>(memory + out_bytes + sums_bytes);
  c.ticket = new_ticket();
  return true;
}

template <class F>
void run_few(const CudaAttention& a, int processors, void* stream) {
  FewCall c{};
  c.group = static_cast<int>(a.heads / a.kv_heads);
  c.run = static_cast<int>(std::min<int64_t>(a.queries, kRows / c.group));
  c.query = boxes_of(a.query.data, kMapType<typename F::T>, a.head_size, {a.heads, a.queries, a.batch},
                     {a.head_size, a.query.row_stride, a.query.batch_stride}, {c.group, c.run, 1});
  c.key = rows_map<F>(a, a.key, a.keys, a.kv_heads, F::kKeys);
  c.value = rows_map<F>(a, a.value, a.keys, a.kv_heads, F::kKeys);
  c.size = static_cast<int>(a.head_size);
  c.out = a.out.data;
  c.out_batch_stride = a.out.batch_stride;
  c.out_row_stride = a.out.row_stride;
  c.out_scale = a.out_scale;
  c.lengths = a.lengths;
  c.lengths_stride = a.lengths_stride;
  c.queries = static_cast<int>(a.queries);
  c.keys = static_cast<int>(a.keys);
  c.kv_heads = static_cast<int>(a.kv_heads);
  c.runs = static_cast<int>(runs_of(a, c.run));
  c.scale = a.scale * kLog2E;
  c.causal = a.causal;
  const int64_t heads = a.batch * a.kv_heads * c.runs;
  if (take_parts<F>(a, heads, processors, c))
    return launch_clusters(attend_with_few<F, true>, static_cast<int>(heads) * c.parts, 1, F::kConsumers + 32,
                           FewMemory<F>::kBytes, stream, c);
  const int cluster = cluster_for<F>(a, heads);
  launch_clusters(attend_with_few<F, false>, static_cast<int>(heads) * cluster, cluster, F::kConsumers + 32,
                  FewMemory<F>::kBytes, stream, c);
}

template <class T, int kSize>
void run_size(const CudaAttention& a, int processors, void* stream) {
  // The sizes of blocks are measured ones: benchmarks/README.md.
  constexpr bool is_large = kSize > 64;
  using Few = Form<T, kSize, is_large ? 64 : 128, 2, 6>;
  using Short = RunForm<T, std::min(kSize, 64), 64, 2, 4, false, 2>;
  using Long =
      std::conditional_t<is_large, RunForm<T, kSize, 128, 2, 2, true, 1>, RunForm<T, kSize, 64, 4, 6, false, 1>>;
  constexpr int64_t kManyKeys = 1024;
  constexpr int64_t kShortMean = 192;  // of packed sequences' lengths
  if (a.offsets) {
    if constexpr (!is_large)
      if (a.queries < kShortMean * a.sequences) return run<Short>(a, processors, stream);
    return run<Long>(a, processors, stream);
  }
  const int64_t group = a.heads / a.kv_heads;
  const bool idle = a.batch * a.heads * runs_of(a, Long::kRun) * 2 <= processors && a.keys >= kManyKeys;
  if (group <= kRows && (group * a.queries <= kRows || idle)) return run_few<Few>(a, processors, stream);
  if constexpr (!is_large)  // where the longer runs would be half empty
    if (a.queries < 2 * Long::kRun && (a.queries - 1) % Long::kRun < Short::kRun)
      return run<Short>(a, processors, stream);
  run<Long>(a, processors, stream);
}

// Whether the copy engine can take these tensors, and 32 bits count what there is.
bool is_for_hopper(const CudaAttention& a) {
  constexpr int64_t kMost = kMostRows;
  const auto fits = [&](const CudaGrid& g, int64_t rows) {
    const auto takes = [](int64_t stride, int64_t count) {
      return count == 1 || (stride > 0 && stride % 8 == 0 && stride < kMost * 64);
    };
    return aligned(g.data) && takes(g.row_stride, rows) && takes(g.batch_stride, a.batch);
  };
  const bool counts = a.keys > 0 && a.keys < kMost && a.queries < kMost && a.batch < kMost &&
                      a.heads < kMost / a.batch / (a.queries / kRows + 1 + (a.offsets ? a.sequences : 0));
  return a.head_size % 8 == 0 && a.head_size <= 128 && a.scale > 0 && a.scale < INFINITY && counts &&
         fits(a.query, a.queries) && fits(a.key, a.keys) && fits(a.value, a.keys) && fits(a.out, a.queries);
}

}  // namespace

template <class T>
bool hopper_attention(const CudaAttention& a, int processors, void* stream) {
  if (!is_for_hopper(a)) return false;
  if (a.head_size <= 32)
    run_size<T, 32>(a, processors, stream);
  else if (a.head_size <= 64)
    run_size<T, 64>(a, processors, stream);
  else if (a.head_size <= 96)
    run_size<T, 96>(a, processors, stream);
  else
    run_size<T, 128>(a, processors, stream);
  return true;
}

template bool hopper_attention<bf16>(const CudaAttention&, int, void*);
template bool hopper_attention<f16>(const CudaAttention&, int, void*);

}  // namespace kpdeploy
