// attention_add_layer_norm on compute capability 9.0 for few rows: attention, the product of its result, the residual
// sum and its layer norm in two kernels, where each of the four alone is a launch that waits on the one ahead.
//
// The first attends: a block has 16 queries of a head, whose keys its warps share out. The second is the rest: the blocks
// of a cluster share out the columns of whole rows, the warps of a block share out K, and the moments of a row meet in
// shared memory. Its part of the weight is on its way while the first runs, where it is constant.
//
// One kernel for all of it, with a head to a block and parts of the product exchanged, took as long as the three apart: its
// blocks need a whole multiprocessor each, and clusters of 12 of them (benchmarks/README.md, "Few rows").

#include <math.h>

#include <algorithm>

#include "hopper_attended.h"
#include "hopper_finish.cuh"

namespace kpdeploy {
namespace {

constexpr int kSize = 64;         // of a head
constexpr int kWarps = 8;         // that attend
constexpr int kRows = 16;         // of a matrix of the tensor cores
constexpr int kMostHeads = 16;
constexpr int kMostKeys = 256;    // of which each warp has two matrices
constexpr int kLineChunks = 8;    // of 16 bytes, in a row of a head in 16 bits
constexpr int kGroup = kRows * kLineChunks * 16;  // bytes of 16 queries, keys or values of a head
constexpr int kBlocks = 8;        // of a cluster
constexpr int kTilesAlone = 12;   // of 16 rows: as many have a cluster each, more of them one for two
// Shared memory of a block that attends: two at most are on a multiprocessor, where four would be alone on few of them,
// and one beside a block of the second kernel with a weight of 16 bits and 768 columns.
constexpr int kSpread = 76 << 10;
constexpr float kLog2E = 1.44269504f;

// Where a chunk of 16 bytes of a row lies, in rows of kChunks that no two rows of a matrix read from one bank; the copy
// engine's swizzles of 128 and of 64 bytes.
template <int kChunks>
__device__ inline int place_of(int row, int chunk) {
  return (row * kChunks + (kChunks == 8 ? chunk ^ row % 8 : chunk ^ row / 2 % 4)) * 16;
}

// Sequences that lie one after the other in one row of `rows`; null offsets: there are none.
struct Sequences {
  const int64_t* offsets;
  int64_t stride;
  int count, rows;
};

// 16 rows of a sequence, or fewer: the `first` of its own, which begins at row `start` of all. There are as many keys.
struct Piece {
  int start, first, length, keys;
};

// Of the tile: tiles are of one sequence each, and those behind the last sequence see no keys. Length 0: there is no such
// tile. Offsets are read before the kernels ahead have ended: none that lets others begin writes integers.
__device__ inline Piece piece_of(const Sequences& s, int tile) {
  int before = 0, start = 0;
  for (int i = 1; i <= s.count + 1; ++i) {
    const int64_t given = i <= s.count ? s.offsets[i * s.stride] : s.rows;
    const int end = static_cast<int>(max(int64_t{start}, min(given, int64_t{s.rows})));
    const int tiles = (end - start + kRows - 1) / kRows;
    if (tile < before + tiles) return {start, (tile - before) * kRows, end - start, i <= s.count ? end - start : 0};
    before += tiles;
    start = end;
  }
  return {};
}

// Queries, keys and values are [batch][rows][heads * kSize].
struct Attention {
  CUtensorMap query, key, value;  // boxes of 16 rows of a head
  const int64_t* lengths;         // null: all keys
  int64_t lengths_stride;
  Sequences sequences;
  int queries, keys, heads, tiles;  // tiles: of a sequence's queries
  float scale;                      // times log2 e
  bool causal;
  const float* x_scale;  // of an 8-bit result
  void* out;             // in the order of multiply_and_norm's operands: see there
};

struct Finished {
  Sequences sequences;
  int queries, tiles, all_tiles, heads;  // tiles: of a sequence's queries, and of all
  bool constant;
  const void *bias, *norm_weight, *norm_bias;  // bias and norm_bias: null where there is none
  const void* residual;
  void *sum, *normalized, *quantized;                            // quantized: only with out_scale
  int64_t residual_row, sum_row, normalized_row, quantized_row;  // strides in elements
  const float *x_scale, *weight_scale, *out_scale;               // the first two: of an 8-bit weight
  int weight_scale_step;
  float eps, by_heads, by_width;  // 1 / the heads, 1 / the width
  const void* x;                  // what attend_rows gives
};

__device__ inline void send_pair(uint32_t to, uint32_t barrier, int rank, float a, float b) {
  asm volatile(
      "{\n.reg .b32 there, at;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 at, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%3, %4}, [at];\n}\n" ::"r"(to),
      "r"(barrier), "r"(rank), "f"(a), "f"(b)
      : "memory");
}

// c [16][8] += a [16][32 bytes] b [8][32 bytes]^T.
template <class W>
__device__ inline void multiply_step(float (&c)[4], uint4 left, uint32_t b0, uint32_t b1) {
  const uint32_t a[4] = {left.x, left.y, left.z, left.w};
  if constexpr (kIsF8<W>)
    asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    multiply_add<W>(c, a, b0, b1);
}

// Two neighbours of a row of T as floats.
template <class T>
__device__ inline float2 pair_at(const void* from, int64_t at) {
  return unpacked<T>(*reinterpret_cast<const uint32_t*>(static_cast<const T*>(from) + at));
}

__device__ inline void copy_rows(uint32_t to, const CUtensorMap& map, int column, int row, int batch, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(
          to),
      "l"(&map), "r"(column), "r"(row), "r"(batch), "r"(barrier)
      : "memory");
}

// Groups of 16 keys for each warp.
__host__ __device__ inline int groups_of(int keys) { return ((keys + kRows - 1) / kRows + kWarps - 1) / kWarps; }

// T: of queries, keys and values; W: of the result, T or f8.
template <class T, class W>
__global__ void __launch_bounds__(kWarps * 32, 3) attend_rows(const __grid_constant__ Attention a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ float2 weights[kWarps][kRows];  // maximum and sum of each warp's
  __shared__ uint64_t barriers[kWarps + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.x % a.heads;
  const int tile = blockIdx.x / a.heads, batch = a.sequences.offsets ? 0 : tile / a.tiles;
  const Piece piece = a.sequences.offsets ? piece_of(a.sequences, tile)
                                          : Piece{0, tile % a.tiles * kRows, a.queries, a.keys};
  if (piece.length == 0) return;
  const int first = piece.first, each = max(1, groups_of(piece.keys)), own_first = warp * each * kRows;
  // Each warp's keys and values, group by group, in whose place is then what it attended to: a float4 of each lane.
  unsigned char *const queries = memory, *const groups = memory + kGroup;
  unsigned char* const own = groups + warp * each * 2 * kGroup;
  const uint32_t query_full = shared_address(barriers), own_full = query_full + 8 + warp * 8;
  if (lane == 0) {
    barrier_init(own_full, 1);
    if (warp == 0) barrier_init(query_full, 1);
    barriers_ready();
    arrive_expecting(own_full, each * 2 * kGroup);
    if (warp == 0) {
      arrive_expecting(query_full, kGroup);
      prefetch_map(a.query);
      prefetch_map(a.key);
      prefetch_map(a.value);
    }
  }
  __syncthreads();
  wait_for_earlier_kernels();
  // Not before: its blocks would be there, with their weights on the way, in the place of blocks of this kernel.
  let_next_kernel_begin();
  if (lane == 0) {
    if (warp == 0) copy_rows(shared_address(queries), a.query, head * kSize, piece.start + first, batch, query_full);
    for (int i = 0; i < each; ++i) {
      const uint32_t to = shared_address(own + i * 2 * kGroup);
      const int key = piece.start + own_first + i * kRows;
      copy_rows(to, a.key, head * kSize, key, batch, own_full);
      copy_rows(to + kGroup, a.value, head * kSize, key, batch, own_full);
    }
  }
  __syncwarp();
  const int64_t length = a.lengths ? a.lengths[batch * a.lengths_stride] : piece.keys;
  const float inverse = kIsF8<W> ? 1 / *a.x_scale : 1;
  const int seen = static_cast<int>(max(int64_t{0}, min(length, int64_t{piece.keys})));
  wait_for(query_full, 0);
  wait_for(own_full, 0);
  // What does not count may be NaN, and a weight of 0 would not hide it.
  if (own_first + each * kRows > seen) {
    for (int i = lane; i < each * kRows * kLineChunks; i += 32) {
      const int row = i / kLineChunks;
      if (own_first + row >= seen)
        *reinterpret_cast<uint4*>(own + row / kRows * 2 * kGroup + kGroup +
                                  place_of<kLineChunks>(row % kRows, i % kLineChunks)) = uint4{};
    }
    __syncwarp();
  }

  constexpr int kSteps = kMostKeys / kRows / kWarps;
  float scores[kSteps][2][4] = {};
  uint32_t left[kSize / 16][4];
#pragma unroll
  for (int k = 0; k < kSize / 16; ++k)
    load_matrices(left[k], queries + place_of<kLineChunks>(lane % 16, 2 * k + lane / 16));
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step >= each) continue;
    uint32_t right[kSize / 16][4];
#pragma unroll
    for (int k = 0; k < kSize / 16; ++k)
      load_matrices(right[k], own + step * 2 * kGroup +
                                  place_of<kLineChunks>(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
    for (int k = 0; k < kSize / 16; ++k) {
      multiply_add<T>(scores[step][0], left[k], right[k][0], right[k][1]);
      multiply_add<T>(scores[step][1], left[k], right[k][2], right[k][3]);
    }
  }
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {}, out[kSize / 8][4] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& s = scores[step][i / 4][i % 4];
      const int half = i / 2 % 2, key = own_first + step * kRows + i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int row = first + half * 8 + lane / 4;
      const int visible = a.causal ? min(seen, row + piece.keys - piece.length + 1) : seen;
      s = step < each && key < visible ? s * a.scale : -INFINITY;
      most[half] = fmaxf(most[half], s);
    }
#pragma unroll
  for (int half = 0; half < 2; ++half) most[half] = lanes_max<4>(most[half]);
  const float from[2] = {most[0] == -INFINITY ? 0 : most[0], most[1] == -INFINITY ? 0 : most[1]};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step >= each) continue;
    uint32_t weight[4], right[kSize / 16][4];
#pragma unroll
    for (int d = 0; d < kSize / 16; ++d)
      load_transposed(right[d], own + step * 2 * kGroup + kGroup + place_of<kLineChunks>(lane % 16, 2 * d + lane / 16));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const s = &scores[step][i / 2][i % 2 * 2];
      const float p = exp2_of(s[0] - from[i % 2]), q = exp2_of(s[1] - from[i % 2]);
      total[i % 2] += p + q;
      weight[i] = pack<T>(p, q);
    }
#pragma unroll
    for (int d = 0; d < kSize / 16; ++d) {
      multiply_add<T>(out[2 * d], weight, right[d][0], right[d][1]);
      multiply_add<T>(out[2 * d + 1], weight, right[d][2], right[d][3]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = lanes_sum<4>(total[half]);
    if (lane % 4 == 0) weights[warp][half * 8 + lane / 4] = {most[half], total[half]};
  }
  __syncwarp();  // the warp's keys and values are used
#pragma unroll
  for (int d = 0; d < kSize / 8; ++d)
    reinterpret_cast<float4*>(own)[d * 32 + lane] = {out[d][0], out[d][1], out[d][2], out[d][3]};
  __syncthreads();

  // Eight columns of the head to each warp.
  const float valid = length >= 0 && length <= piece.keys ? 1 : NAN;
  float4 parts[kWarps];
#pragma unroll
  for (int i = 0; i < kWarps; ++i)
    parts[i] = reinterpret_cast<const float4*>(groups + i * each * 2 * kGroup)[warp * 32 + lane];
  float v[2][2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = -INFINITY, sum = 0;
    float2 w[kWarps];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      w[i] = weights[i][half * 8 + lane / 4];
      largest = fmaxf(largest, w[i].x);
    }
    largest = largest == -INFINITY ? 0 : largest;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      const float factor = exp2_of(w[i].x - largest);  // 0 where a warp has no key that counts
      sum += w[i].y * factor;
      v[half][0] += (half ? parts[i].z : parts[i].x) * factor;
      v[half][1] += (half ? parts[i].w : parts[i].y) * factor;
    }
    const float by = valid * inverse * (sum == 0 ? 0 : inverse_of(sum));  // a query that sees no key gives 0
    v[half][0] *= by;
    v[half][1] *= by;
  }
  const uint32_t pairs[2] = {packed<W>(v[0][0], v[0][1]), packed<W>(v[1][0], v[1][1])};
  unsigned char* const to = static_cast<unsigned char*>(a.out) + blockIdx.x * int64_t{kRows * kSize * sizeof(W)};
  if constexpr (kIsF8<W>) {
    unsigned char* const at = to + warp / 4 * 512 + (lane / 4 * 4 + warp % 2 * 2 + lane % 4 / 2) * 16 + warp / 2 % 2 * 8 +
                              lane % 2 * 2;
    *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(pairs[0]);
    *reinterpret_cast<uint16_t*>(at + 4) = static_cast<uint16_t>(pairs[1]);
  } else {
    *reinterpret_cast<uint2*>(to + warp / 2 * 512 + lane * 16 + warp % 2 * 8) = {pairs[0], pairs[1]};
  }
}

// A block has, for each warp, a box of the weight in shared memory: 64 of K in rows of its columns. Two warps have the same
// 128 of K, and half of the columns each. Their sums are then in the place of what they have used: for eight columns a
// float2 of each lane for the upper eight rows and one for the lower.
template <class W, int kTiles>
struct Memory {
  static constexpr int kChunks = kSize * sizeof(W) / 16;         // of a row of the weight
  static constexpr int kMatrix = 8 * kChunks * 16, kPart = 512;  // bytes of eight rows of the weight; of sums
  int box, moments, bytes;
  __host__ __device__ Memory(int heads) {
    box = heads * kMatrix;
    moments = heads * box;
    bytes = moments + kTiles * kRows * (kMostHeads + kBlocks) * int{sizeof(float2)} + (kMostHeads + 1) * 8;
  }
  __device__ int part(int pair, int matrix, int tile) const {
    constexpr bool kFit = kTiles * kPart <= kMatrix;
    return (2 * pair + (kFit ? 0 : tile)) * box + matrix * kMatrix + (kFit ? tile * kPart : 0);
  }
};

// Sums over lanes of both.
template <int lanes>
__device__ inline float2 lanes_sums(float a, float b) {
#pragma unroll
  for (int i = lanes / 2; i > 0; i /= 2) {
    const float c = __shfl_xor_sync(~0u, a, i), d = __shfl_xor_sync(~0u, b, i);
    a += c;
    b += d;
  }
  return {a, b};
}

// x times weight, biased, added to the residual, normalized: a cluster has kTiles tiles of 16 rows. Of each tile and head, x
// has the operands of the tensor cores, one step along K after the other, 16 bytes of each lane: its two rows and of each
// the columns of both 16 bytes of the step.
template <class T, class W, int kTiles>
__global__ void __maxnreg__(kTiles == 1 ? 112 : 128)
    multiply_and_norm(const __grid_constant__ CUtensorMap weight, const __grid_constant__ Finished a) {
  using M = Memory<W, kTiles>;
  constexpr int kSteps = M::kChunks / 2, kAtOnce = 2;
  extern __shared__ __align__(1024) unsigned char memory[];
  const M room(a.heads);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = cluster_rank(), pair = warp / 2;
  const int tile = blockIdx.x / kBlocks * kTiles;
  float2* const warp_moments = reinterpret_cast<float2*>(memory + room.moments);  // [row][kMostHeads]
  float2* const moments = warp_moments + kTiles * kRows * kMostHeads;            // [row][rank]
  const uint32_t met = shared_address(moments + kBlocks * kTiles * kRows), full = met + 8;

  const auto load_weight = [&] {
    copy_box(shared_address(memory + warp * room.box), weight, warp * kSize, rank * a.heads * 8, full + warp * 8);
  };
  if (lane == 0) {
    barrier_init(full + warp * 8, 1);
    if (threadIdx.x == 0) barrier_init(met, 1 + kTiles * kRows);
    barriers_ready();
    arrive_expecting(full + warp * 8, room.box);
    if (threadIdx.x == 0) arrive_expecting(met, (kBlocks - 1) * kTiles * kRows * int{sizeof(float2)});
    if (a.constant) load_weight();
  }
  __syncthreads();
  cluster_arrive_relaxed();  // this block is there, and takes what others send
  let_next_kernel_begin();
  // The two columns that this thread finishes, and what is known of them.
  const int column = (rank * a.heads + warp) * 8 + lane % 4 * 2;
  float2 bias{}, norm_bias{}, norm_weight{}, weight_scale{1, 1};
  const auto load_vectors = [&] {
    if (a.bias) bias = pair_at<BiasOf<T>>(a.bias, column);
    if (a.norm_bias) norm_bias = pair_at<T>(a.norm_bias, column);
    norm_weight = pair_at<T>(a.norm_weight, column);
    if constexpr (kIsF8<W>)
      weight_scale = {a.weight_scale[column * a.weight_scale_step], a.weight_scale[(column + 1) * a.weight_scale_step]};
  };
  if (a.constant) load_vectors();
  const auto row_at = [&](int m, int half) { return m * kRows + half * 8 + lane / 4; };
  // Tile m's first row, and how many rows it has.
  int64_t first[kTiles];
  int rows[kTiles];
  const uint4* x[kTiles];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    const int of = min(tile + m, a.all_tiles - 1);
    if (a.sequences.offsets) {
      const Piece piece = piece_of(a.sequences, of);
      first[m] = piece.start + piece.first;
      rows[m] = min(kRows, piece.length - piece.first);
    } else {
      const int query = of % a.tiles * kRows;
      first[m] = int64_t{of / a.tiles} * a.queries + query;
      rows[m] = min(kRows, a.queries - query);
    }
    x[m] = static_cast<const uint4*>(a.x) + (int64_t{of} * a.heads + 2 * pair) * kSteps * 32 + lane;
  }
  wait_for_earlier_kernels();
  uint4 left[kTiles][2 * kSteps];
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int k = 0; k < 2 * kSteps; ++k) left[m][k] = x[m][k * 32];
  if (!a.constant) {
    if (lane == 0) load_weight();
    __syncwarp();
    load_vectors();
  }
  uint32_t residual[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      residual[m][half] = *reinterpret_cast<const uint32_t*>(
          static_cast<const T*>(a.residual) + (first[m] + max(0, min(half * 8 + lane / 4, rows[m] - 1))) * a.residual_row + column);
  const float x_scale = kIsF8<W> ? *a.x_scale : 1, out_scale = a.out_scale ? 1 / *a.out_scale : 1;

  wait_for(full + pair * 16, 0);
  wait_for(full + pair * 16 + 8, 0);
  const int half_matrices = a.heads / 2, first_matrix = warp % 2 * half_matrices;
  for (int from = 0; from < half_matrices; from += kAtOnce) {
    uint32_t right[kAtOnce][kSteps][4];
    float sums[kAtOnce][2][kTiles][4] = {};  // of either box
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
        load_matrices(right[i][k], memory + (2 * pair + k * 2 / kSteps) * room.box +
                                       place_of<M::kChunks>((first_matrix + min(from + i, half_matrices - 1)) * 8 + lane % 8,
                                                            k * 4 % M::kChunks + lane / 8));
#pragma unroll
    for (int k = 0; k < kSteps; ++k)  // of 32 bytes, in either box
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int box = 0; box < 2; ++box)
#pragma unroll
          for (int m = 0; m < kTiles; ++m)
            multiply_step<W>(sums[i][box][m], left[m][box * kSteps + k], right[i][(box * kSteps + k) / 2][k % 2 * 2],
                             right[i][(box * kSteps + k) / 2][k % 2 * 2 + 1]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (from + i >= half_matrices) continue;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        float2* const to = reinterpret_cast<float2*>(memory + room.part(pair, first_matrix + from + i, m)) + lane;
        const float(&v)[4] = sums[i][0][m], (&w)[4] = sums[i][1][m];
        to[0] = {v[0] + w[0], v[1] + w[1]};
        to[32] = {v[2] + w[2], v[3] + w[3]};
      }
    }
  }
  __syncthreads();

  float2 sums[kTiles][2]{};
#pragma unroll
  for (int i = 0; i < kMostHeads / 2; ++i) {
    if (i >= half_matrices) continue;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 part = (reinterpret_cast<const float2*>(memory + room.part(i, warp, m)) + lane)[half * 32];
        sums[m][half].x += part.x, sums[m][half].y += part.y;
      }
  }
  float mean[kTiles][2], squares[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2& v = sums[m][half];
      const float2 r = unpacked<T>(residual[m][half]);
      if constexpr (kIsF8<W>) v = {v.x * x_scale * weight_scale.x, v.y * x_scale * weight_scale.y};
      v = {v.x + bias.x + r.x, v.y + bias.y + r.y};
      mean[m][half] = v.x + v.y;
    }
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    const float2 all = lanes_sums<4>(mean[m][0], mean[m][1]);
    mean[m][0] = all.x / 8, mean[m][1] = all.y / 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = sums[m][half].x - mean[m][half], y = sums[m][half].y - mean[m][half];
      squares[m][half] = x * x + y * y;
    }
    const float2 of = lanes_sums<4>(squares[m][0], squares[m][1]);
    if (lane % 4 == 0) {
      warp_moments[row_at(m, 0) * kMostHeads + warp] = {mean[m][0], of.x};
      warp_moments[row_at(m, 1) * kMostHeads + warp] = {mean[m][1], of.y};
    }
  }
  __syncthreads();
  cluster_wait();
  // Of parts of as many columns: their means' mean, and their squares with those of the means (Chan et al. 1979), which
  // are summed as what they differ from the first.
  for (int row = threadIdx.x / 16; row < kTiles * kRows; row += a.heads * 2) {
    const int i = threadIdx.x % 16;
    const float2 *const of_row = warp_moments + row * kMostHeads, part = of_row[i < a.heads ? i : 0];
    const float base = of_row[0].x, off = part.x - base;  // 0 where there is none
    const float2 all = lanes_sums<16>(off, i < a.heads ? part.y + 8 * off * off : 0);
    const float shift = all.x * a.by_heads;
    float2* const to = moments + row * kBlocks + rank;
    if (i == rank) {
      *to = {base + shift, all.y - 8 * all.x * shift};
      arrive(met);
    } else if (i < kBlocks) {
      send_pair(shared_address(to), met, i, base + shift, all.y - 8 * all.x * shift);
    }
  }
  wait_for(met, 0);
  float2 by[kTiles][2];  // what is taken off, and the factor
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2* const of_row = moments + row_at(m, half) * kBlocks;
      const float2 one = of_row[lane % 4], two = of_row[lane % 4 + 4];
      const float base = of_row[0].x, off = one.x - base, other = two.x - base, columns = a.heads * 8;
      const float2 all = lanes_sums<4>(off + other, one.y + two.y + columns * (off * off + other * other));
      const float shift = all.x / kBlocks;
      by[m][half] = {base + shift, rsqrtf((all.y - columns * all.x * shift) * a.by_width + a.eps)};
    }
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 8 + lane / 4;
      if (row >= rows[m] || tile + m >= a.all_tiles) continue;
      const int64_t at = first[m] + row;
      const float2 v = sums[m][half];
      const float x = (v.x - by[m][half].x) * by[m][half].y * norm_weight.x + norm_bias.x;
      const float y = (v.y - by[m][half].x) * by[m][half].y * norm_weight.y + norm_bias.y;
      *reinterpret_cast<uint32_t*>(static_cast<T*>(a.sum) + at * a.sum_row + column) = pack<T>(v.x, v.y);
      *reinterpret_cast<uint32_t*>(static_cast<T*>(a.normalized) + at * a.normalized_row + column) = pack<T>(x, y);
      if (a.out_scale)
        *reinterpret_cast<uint16_t*>(static_cast<char*>(a.quantized) + at * a.quantized_row + column) =
            static_cast<uint16_t>(packed<f8>(x * out_scale, y * out_scale));
    }
}

// Boxes of 16 rows of a head.
template <class T>
CUtensorMap boxes_of(const CudaGrid& grid, int64_t batch, int64_t rows, int64_t width) {
  const auto bytes = [](int64_t count, int64_t stride) { return static_cast<cuuint64_t>(count > 1 ? stride * 2 : 16); };
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[] = {bytes(rows, grid.row_stride), bytes(batch, grid.batch_stride)};
  const cuuint32_t box[] = {kSize, kRows, 1}, steps[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result = encoder()(&map, kMapType<T>, 3, grid.data, sizes, strides, box, steps,
                                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) refuse("the copy engine refuses a tensor (CUDA error %d)", static_cast<int>(result));
  return map;
}

Sequences sequences_of(const CudaAttention& of) {
  return {of.offsets, of.offsets_stride, static_cast<int>(of.sequences), static_cast<int>(of.queries)};
}

// Of 16 rows; of packed sequences, and of what is behind them, the most there can be.
int tiles_of(const CudaAttention& of) {
  return of.offsets ? blocks_of(of.queries + of.sequences * (kRows - 1), kRows)
                    : blocks_of(of.queries, kRows) * static_cast<int>(of.batch);
}

template <class T>
Attention attention_of(const CudaAttended& a, void* out) {
  const CudaAttention& of = a.attention;
  const int64_t width = of.heads * kSize;
  Attention c{};
  c.query = boxes_of<T>(of.query, of.batch, of.queries, width);
  c.key = boxes_of<T>(of.key, of.batch, of.keys, width);
  c.value = boxes_of<T>(of.value, of.batch, of.keys, width);
  c.lengths = of.lengths;
  c.lengths_stride = of.lengths_stride;
  c.sequences = sequences_of(of);
  c.queries = static_cast<int>(of.queries);
  c.keys = static_cast<int>(of.keys);
  c.heads = static_cast<int>(of.heads);
  c.tiles = blocks_of(of.queries, kRows);
  c.scale = of.scale * kLog2E;
  c.causal = of.causal;
  c.x_scale = a.x_scale;
  c.out = out;
  return c;
}

Finished finished_of(const CudaAttended& a, const void* x) {
  Finished c{};
  c.sequences = sequences_of(a.attention);
  c.queries = static_cast<int>(a.attention.queries);
  c.tiles = blocks_of(a.attention.queries, kRows);
  c.all_tiles = tiles_of(a.attention);
  c.heads = static_cast<int>(a.attention.heads);
  c.by_heads = 1.0f / c.heads;
  c.by_width = 1.0f / (c.heads * kSize);
  c.x = x;
  c.constant = a.constant;
  c.bias = a.bias;
  c.norm_weight = a.norm_weight;
  c.norm_bias = a.norm_bias;
  c.residual = a.residual.data;
  c.sum = a.sum.data;
  c.normalized = a.normalized.data;
  c.quantized = a.quantized.data;
  c.residual_row = step_of(a.residual);
  c.sum_row = step_of(a.sum);
  c.normalized_row = step_of(a.normalized);
  c.quantized_row = step_of(a.quantized);
  c.x_scale = a.x_scale;
  c.weight_scale = a.weight_scale;
  c.weight_scale_step = a.weight_scale_rows;
  c.out_scale = a.out_scale;
  c.eps = a.eps;
  return c;
}

template <class T, class W, int kTiles>
bool run_tiles(const CudaAttended& a, void* stream) {
  const CudaAttention& of = a.attention;
  const int heads = static_cast<int>(of.heads), tiles = tiles_of(of);
  const int bytes = Memory<W, kTiles>(heads).bytes;
  if (bytes > kShared) return false;
  const int64_t width = heads * kSize;
  void* const attended = of.memory.take(tiles * kRows * width * int64_t{sizeof(W)});
  if (!attended) return false;
  const Attention attention = attention_of<T>(a, attended);
  const CUtensorMap weight = tensor_map(a.weight.data, kMapType<W>, sizeof(W), width, width,
                                        a.weight.stride * int64_t{sizeof(W)}, heads * 8, kSize * sizeof(W));
  const int needed = kGroup * (1 + 2 * kWarps * groups_of(attention.keys));
  launch_clusters(attend_rows<T, W>, tiles * heads, 1, kWarps * 32, std::max(needed, kSpread), stream,
                  attention);
  launch_clusters(multiply_and_norm<T, W, kTiles>, blocks_of(tiles, kTiles) * kBlocks, kBlocks, heads * 32, bytes, stream,
                  weight, finished_of(a, attended));
  return true;
}

template <class T, class W>
bool run(const CudaAttended& a, void* stream) {
  // With a tile to a cluster, no more clusters than run at once.
  return tiles_of(a.attention) <= kTilesAlone ? run_tiles<T, W, 1>(a, stream) : run_tiles<T, W, 2>(a, stream);
}

bool fits(const CudaAttended& a, int64_t weight_bytes) {
  const CudaAttention& of = a.attention;
  const auto grid = [&](const CudaGrid& g) { return aligned(g.data) && g.row_stride % 8 == 0 && g.batch_stride % 8 == 0; };
  const auto rows = [](const Walk& w) { return w.dims <= 1 && reinterpret_cast<uintptr_t>(w.data) % 4 == 0 && step_of(w) % 2 == 0; };
  const auto pairs = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 4 == 0; };
  return of.head_size == kSize && of.heads == of.kv_heads && of.heads % 2 == 0 && of.heads <= kMostHeads && of.keys > 0 &&
         of.keys <= kMostKeys && of.batch * of.queries <= kEarlyRows && grid(of.query) && grid(of.key) &&
         grid(of.value) && rows(a.residual) && rows(a.sum) && rows(a.normalized) && rows(a.quantized) && pairs(a.bias) &&
         pairs(a.norm_weight) && pairs(a.norm_bias) && aligned(a.weight.data) && a.weight.stride * weight_bytes % 16 == 0;
}

}  // namespace

template <class T>
bool hopper_attended(const CudaAttended& a, void* stream) {
  if (!fits(a, a.x_scale ? 1 : 2)) return false;
  if constexpr (std::is_same_v<T, bf16>)
    if (a.x_scale) return run<T, f8>(a, stream);
  return run<T, T>(a, stream);
}

template bool hopper_attended<bf16>(const CudaAttended&, void*);
template bool hopper_attended<f16>(const CudaAttended&, void*);

}  // namespace kpdeploy
