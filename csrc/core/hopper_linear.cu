// linear_activation and gated_linear on compute capability 9.0: the copy engine fills stages of shared memory, two
// warpgroups multiply on the tensor cores, bias and activation are applied to the sums in registers.
//
// Many rows: a persistent block makes tiles of 128 rows x kColumns, 64 rows to a warpgroup. A tile is finished (activation,
// rounding, storing) while the tensor cores work on the next one.
// Few rows (up to 64) of a gated one: out^T = weight x^T, 64 rows of each weight to a block; the blocks of a cluster share
// out K, and add their sums through each other's shared memory. The weights are read once.
// One row: dot products, but for a gated one of 8-bit floats, which is few rows. Others: hopper_shares.cu.

#include <algorithm>

#include "hopper_finish.cuh"
#include "hopper_linear.h"
#include "hopper_shares.h"

namespace kpdeploy {

CUtensorMap tensor_map(const void* data, CUtensorMapDataType type, int item_bytes, int64_t rows, int64_t columns,
                       int64_t stride, int box_rows, int line) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(line / item_bytes), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encoder()(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                line == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) refuse("the copy engine refuses a tensor (CUDA error %d)", static_cast<int>(result));
  return map;
}

namespace {

constexpr int kTileRows = 128;
constexpr int kGroups = 2, kConsumers = kGroups * 4;  // warpgroups that multiply, and their warps
constexpr int kThreads = kGroups * 128 + 128;         // and a warpgroup, one thread of which loads

template <class T, class Out, int kColumns, bool kGated>
struct Tile {
  static constexpr int kOut = kGated ? kColumns / 2 : kColumns;
  static constexpr int kBox = kColumns / (kGated ? 2 : 1);  // rows of a weight in one load
  static constexpr int kStage = (kTileRows + kColumns) * kLine;
  static constexpr int kVectors = kOut * (kIsF8<T> ? 2 : 1);  // floats of a warpgroup: bias, scales of the weight
  // What a warp stores at once: rows of whole lines, of which there is a whole number in a tile.
  static constexpr int kOutLine = kOut * int{sizeof(Out)} % kLine ? kLine / 2 : kLine;
  static constexpr int kPatch = 16 * kLine, kLines = kOut * int{sizeof(Out)} / kOutLine;
  static constexpr int kRoom = kShared - kGroups * kVectors * 4 - 256;
  static constexpr int kPatches = kRoom >= 4 * kStage + 2 * kConsumers * kPatch ? 2 : 1;
  static constexpr int kFit = (kRoom - kPatches * kConsumers * kPatch) / kStage, kStages = kFit < 8 ? kFit : 8;
  static constexpr int kBytes = kStages * kStage + kPatches * kConsumers * kPatch + kGroups * kVectors * 4 + 256;
  static_assert(kStages >= 3 && kBytes <= kShared);
};

// Where a tile starts. Blocks that run together share a band of rows, and with it what is in the second cache.
__device__ inline int2 corner_of(const Grid& g, int tile, int columns) {
  constexpr int kBand = 8;
  const int band = tile / (kBand * g.across), within = tile % (kBand * g.across);
  const int height = min(kBand, g.down - band * kBand);
  const int down = band * kBand + within % height;
  return {down * kTileRows, within / height * columns};
}

// The patches of a warp, which its lines of 16 rows leave from in turns. With kAdd each line of the residual is asked for
// while the line ahead is at work, and comes into the patch that its sums then leave from.
template <class S, class Out, bool kAdd>
struct Lines {
  static_assert(!kAdd || (S::kPatches == 2 && S::kOutLine == kLine));
  const CUtensorMap &out, &residual;
  uint32_t patches, barriers;  // of the residual's lines, one a patch
  int gone = 0;                // of the tiles before

  __device__ int turn(int line) const { return kAdd || S::kLines % 2 ? gone + line : line; }
  __device__ uint32_t patch(int line) const { return patches + turn(line) % S::kPatches * S::kPatch; }
  __device__ int column(int line, int2 at) const { return at.y + line * S::kOutLine / int{sizeof(Out)}; }
  // By one thread, after the line before the last was committed.
  __device__ void ask(int line, int2 at) const {
    const uint32_t barrier = barriers + turn(line) % 2 * 8;
    wait_boxes_read<0>();
    arrive_expecting(barrier, S::kPatch);
    copy_box(patch(line), residual, column(line, at), at.x, barrier);
  }
  __device__ void begin(int line, int2 at) const {
    if constexpr (kAdd) {
      if (threadIdx.x % 32 == 0 && line + 1 < S::kLines) ask(line + 1, at);
      wait_for(barriers + turn(line) % 2 * 8, turn(line) / 2 % 2);
    } else if (threadIdx.x % 32 == 0) {
      wait_boxes_read<S::kPatches - 1>();
    }
    __syncwarp();
  }
  __device__ void end(int line, int2 at) const {
    fence_stores();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      store_box(out, patch(line), column(line, at), at.x);
      commit_boxes();
    }
  }
};

// Part `part` of a tile, 32 columns of a warp's 16 rows, which start at `at`: pair(block, half, with) gives two neighbours
// in a row as `Out`, `with` being those of the residual. Lines are gathered in shared memory; whole ones go out.
template <class S, class Out, bool kAdd, class Pair>
__device__ inline void put(int part, const Lines<S, Out, kAdd>& lines, int2 at, const Pair& pair) {
  constexpr int kWide = S::kOutLine, kParts = kWide / (32 * int{sizeof(Out)});  // of a line
  const int lane = threadIdx.x % 32, line = part / kParts, in_line = part % kParts;
  const uint32_t patch = lines.patch(line);
  if (in_line == 0) lines.begin(line, at);
  // Where 16 bytes of a row go, as the copy engine swizzles lines of 128 and of 64 bytes.
  const auto at_chunk = [&](int row, int chunk) {
    return patch + row * kWide + (chunk ^ (kWide == 128 ? row % 8 : row / 2 % 4)) * 16;
  };
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const int block = part * 4 + j;
    if constexpr (kIsF8<Out>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i % 2 * 8, chunk = in_line * 2 + j / 2;  // 16 columns in 16 bytes
        const uint32_t to = at_chunk(row, chunk) + i / 2 * 8 + lane % 4 * 2;
        asm volatile("st.shared.b16 [%0], %1;\n" ::"r"(to), "h"(static_cast<uint16_t>(pair(block + i / 2, i % 2, 0u)))
                     : "memory");
      }
    } else {
      const int row = lane % 16, chunk = in_line * 4 + j + lane / 16;
      uint32_t with[4] = {};
      if constexpr (kAdd) load_matrices(with, at_chunk(row, chunk));
      const uint32_t a = pair(block, 0, with[0]), b = pair(block, 1, with[1]), c = pair(block + 1, 0, with[2]),
                     d = pair(block + 1, 1, with[3]);
      store_matrices(at_chunk(row, chunk), a, b, c, d);
    }
  }
  if (in_line + 1 == kParts) lines.end(line, at);
}

// `other`: the gate's weight, or with kAdd the residual.
template <class T, class Out, int kColumns, bool kGated, bool kAdd>
__global__ void __launch_bounds__(kThreads, 1)
    multiply_tiles(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
                   const __grid_constant__ CUtensorMap other, const __grid_constant__ CUtensorMap out,
                   const __grid_constant__ Finish f, const __grid_constant__ Grid g) {
  using S = Tile<T, Out, kColumns, kGated>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t stages = shared_address(memory), patches = stages + S::kStages * S::kStage;
  const uint32_t after = patches + S::kPatches * kConsumers * S::kPatch;
  float* const vectors = reinterpret_cast<float*>(memory + (after - stages));
  const uint32_t full = after + kGroups * S::kVectors * 4, empty = full + 8 * S::kStages;
  const uint32_t asked = empty + 8 * S::kStages;  // with kAdd two for each warp
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kConsumers);
    }
    if (kAdd)
      for (int i = 0; i < kConsumers * 2; ++i) barrier_init(asked + 8 * i, 1);
    barriers_ready();
  }
  if (threadIdx.x == kConsumers * 32) {
    prefetch_map(x);
    prefetch_map(weight);
    if (kAdd) prefetch_map(other);
  }
  __syncthreads();
  wait_for_earlier_kernels();
  let_next_kernel_begin();

  const int tiles = g.down * g.across, first = blockIdx.x, step = gridDim.x;
  int stage = 0, phase = 0;
  const auto advance = [&] {
    if (++stage == S::kStages) {
      stage = 0;
      phase ^= 1;
    }
  };
  if (warp >= kConsumers) {
    registers_down<40>();
    if (threadIdx.x == kConsumers * 32)
      for (int tile = first; tile < tiles; tile += step) {
        const int2 at = corner_of(g, tile, S::kOut);
        for (int k = 0; k < g.steps; ++k, advance()) {
          const uint32_t to = stages + stage * S::kStage, barrier = full + 8 * stage;
          const int column = k * (kLine / int{sizeof(T)});
          wait_for(empty + 8 * stage, phase ^ 1);
          arrive_expecting(barrier, S::kStage);
          const uint32_t weights = to + kTileRows * kLine;
          copy_box(to, x, column, at.x, barrier);
          copy_box(weights, kGated ? other : weight, column, at.y, barrier);
          if (kGated) copy_box(weights + S::kBox * kLine, weight, column, at.y, barrier);
        }
      }
  } else {
    registers_up<232>();
    const int group = warp / 4, in_group = threadIdx.x % 128;
    float* const own = vectors + group * S::kVectors;
    Lines<S, Out, kAdd> lines{out, other, patches + warp * S::kPatches * S::kPatch, asked + warp * 16};
    const auto release = [&](int which) {
      if (lane == 0) arrive(empty + 8 * which);
    };
    const float out_scale = kIsF8<Out> ? 1 / *f.out_scale : 1;
    // A tile's sums, rounded as a linear's output is, wait until the next tile is under way: what is left to do with them
    // is done while the tensor cores work on that one.
    constexpr int kParts = S::kOut / 32, kUp = kGated ? S::kOut / 8 : 0;
    using Held = std::conditional_t<kIsF8<T>, bf16, T>;
    uint32_t held[kColumns / 4] = {};
    int2 held_at{};
    bool holds = false;
    // Of a gated pair: gates, then products; of one that is added to: it, then the residual's.
    const auto finished = [&](float a, float b, float c, float d) {
      if constexpr (kAdd) {
        a += c;
        b += d;
      } else if constexpr (kGated) {
        silu<kExact<Out>>(a, b);
        a *= c;
        b *= d;
      } else if (f.smooth) {
        activate<true, kExact<Out>>(f, a, b);
      } else {
        activate<false, false>(f, a, b);
      }
      return packed<Out>(a * out_scale, b * out_scale);
    };
    const auto of_held = [&](int block, int half, uint32_t with) {
      const float2 v = unpacked<Held>(held[block * 2 + half]);
      const float2 u = unpacked<Held>(kAdd ? with : held[(kUp + block) * 2 + half]);
      return finished(v.x, v.y, u.x, u.y);
    };
    for (int tile = first; tile < tiles; tile += step) {
      const int2 at = corner_of(g, tile, S::kOut);
      // Asked for now, needed when the sums are there.
      float bias[(S::kOut + 127) / 128], scale[(S::kOut + 127) / 128], row_scales[2] = {1, 1};
#pragma unroll
      for (int i = 0; i < (S::kOut + 127) / 128; ++i) {
        const int column = at.y + in_group + i * 128;
        const bool there = column < g.columns;
        bias[i] = !kGated && f.bias && there ? to_float(static_cast<const BiasOf<T>*>(f.bias)[column]) : 0;
        if constexpr (kGated && kIsF8<T>) bias[i] = there ? f.gate_scale[column * f.gate_scale_step] : 0;  // in its place
        if constexpr (kIsF8<T>) scale[i] = there ? f.weight_scale[column * f.weight_scale_step] : 0;
      }
      if constexpr (kIsF8<T>)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          row_scales[i] = f.x_scale[min(at.x + warp * 16 + lane / 4 + i * 8, g.rows - 1) * f.x_scale_step];

      float sums[kColumns / 2];
      int k = 0, before = 0;
      const auto multiply = [&] {
        const uint32_t from = stages + stage * S::kStage;
        const uint64_t left = matrix_descriptor(from + group * 64 * kLine);
        const uint64_t right = matrix_descriptor(from + kTileRows * kLine);
        wait_for(full + 8 * stage, phase);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kLine / 32; ++i) wgmma<T, kColumns>(sums, left + 2 * i, right + 2 * i, k > 0 || i > 0);
        wgmma_commit();
        if (k > 0) {
          wgmma_wait<1>();
          release(before);
        }
        before = stage;
        advance();
        ++k;
      };
      if (holds) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          if (k < g.steps) multiply();
          put(part, lines, held_at, of_held);
        }
        lines.gone += S::kLines;
      }
      if (kAdd && lane == 0) lines.ask(0, {at.x + warp * 16, at.y});
      while (k < g.steps) multiply();
      wgmma_wait<0>();
      release(before);
#pragma unroll
      for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");

#pragma unroll
      for (int i = 0; i < (S::kOut + 127) / 128; ++i)
        if (in_group + i * 128 < S::kOut) {
          own[in_group + i * 128] = bias[i];
          if constexpr (kIsF8<T>) own[S::kOut + in_group + i * 128] = scale[i];
        }
      group_sync(1 + group, 128);
      // Two neighbours in a row, scaled and biased.
      const auto of_sums = [&](int block, int half) {
        float2 v{sums[block * 4 + half * 2], sums[block * 4 + half * 2 + 1]};
        const int column = (kGated ? block % (S::kOut / 8) : block) * 8 + lane % 4 * 2;
        if constexpr (kIsF8<T>) {
          const float2 by =
              *reinterpret_cast<const float2*>(own + (kGated && block < S::kOut / 8 ? 0 : S::kOut) + column);
          v.x *= by.x * row_scales[half];
          v.y *= by.y * row_scales[half];
        }
        if constexpr (!kGated) {
          const float2 by = *reinterpret_cast<const float2*>(own + column);
          v.x += by.x;
          v.y += by.y;
        }
        return v;
      };
      held_at = {at.x + warp * 16, at.y};
      holds = tile + step < tiles;
      if (holds) {
#pragma unroll
        for (int i = 0; i < kColumns / 4; ++i) {
          const float2 v = of_sums(i / 2, i % 2);
          held[i] = pack<Held>(v.x, v.y);
        }
      } else {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          put(part, lines, held_at, [&](int block, int half, uint32_t with) {
            const float2 v = of_sums(block, half);
            const float2 u = kGated ? of_sums(kUp + block, half) : kAdd ? unpacked<Held>(with) : v;
            return finished(v.x, v.y, u.x, u.y);
          });
        lines.gone += S::kLines;
      }
      group_sync(1 + group, 128);  // all have read `own`
    }
    if (lane == 0) wait_boxes_read<0>();
  }
}

constexpr int kFewThreads = 128 + 32;

// kMost: so many blocks at most share out K.
template <class T, int kRows, int kMost>
struct Few {
  static constexpr int kWeights = 2;
  static constexpr int kStage = (64 * kWeights + kRows) * kLine;
  static constexpr int kPitch = 64 + 4;  // floats of one row of x in the sums: no bank meets two lanes
  static constexpr int kSums = kRows * kPitch;
  static constexpr int kSent = kWeights * kRows / 8 * 128 * 16;  // bytes that a block sends: four floats of each thread
  // Two blocks to a processor: the next kernel's start while this one's run.
  static constexpr int kFit = (kShared / 2 - 1024 - 256 - (kMost - 1) * kSent) / kStage;
  static constexpr int kEnough = kIsF8<T> ? 4 : 8;  // of 8-bit floats five were slower (benchmarks/README.md)
  static constexpr int kStages = kFit < kEnough ? kFit : kEnough;
  static constexpr int kScales = kIsF8<T> ? (kWeights * 64 + kRows) * 4 : 0;  // bytes of the weights' and of the rows'
  static constexpr int kBytes = kStages * kStage + (kMost - 1) * kSent + 256;
  static_assert(kWeights * kSums * 4 + kScales <= kStages * kStage);
};

template <class T, class Out, int kRows, int kMost>
__global__ void __launch_bounds__(kFewThreads)
    multiply_few_rows(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
                      const __grid_constant__ CUtensorMap gate, Out* const out, const int64_t out_stride,
                      const __grid_constant__ Finish f, const __grid_constant__ Grid g, const int blocks,
                      const bool constant) {
  using S = Few<T, kRows, kMost>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t stages = shared_address(memory), received = stages + S::kStages * S::kStage;
  const uint32_t full = received + (kMost - 1) * S::kSent, empty = full + 8 * S::kStages;
  const uint32_t sent = empty + 8 * S::kStages;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blocks > 1 ? cluster_rank() : 0;
  const int column = blockIdx.x / blocks * 64;
  const int share = (g.steps + blocks - 1) / blocks, begin = rank * share, end = min(g.steps, begin + share);

  if (threadIdx.x == 128) {
    prefetch_map(weight);
    prefetch_map(x);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 4);
    }
    barrier_init(sent, 1);
    barriers_ready();
    arrive_expecting(sent, (blocks - 1) * S::kSent);
  }
  __syncthreads();
  if (blocks > 1) cluster_arrive_relaxed();  // this block is there, and takes what others send
  let_next_kernel_begin();
  int stage = 0, phase = 0;
  const auto advance = [&] {
    if (++stage == S::kStages) {
      stage = 0;
      phase ^= 1;
    }
  };
  if (warp == 4) {
    if (lane == 0) {
      constexpr int kStep = kLine / sizeof(T);
      const auto load_weights = [&](int k, int to) {
        const uint32_t at = stages + to * S::kStage, barrier = full + 8 * to;
        arrive_expecting(barrier, S::kStage);
        copy_box(at, weight, k * kStep, column, barrier);
        copy_box(at + 64 * kLine, gate, k * kStep, column, barrier);
      };
      const int first = min(end - begin, S::kStages), early = constant ? first : 0;
      for (int i = 0; i < early; ++i) load_weights(begin + i, i);
      for (int k = begin + early; k < begin + first; ++k) {
        prefetch_box(weight, k * kStep, column);
        prefetch_box(gate, k * kStep, column);
      }
      wait_for_earlier_kernels();
      for (int k = begin; k < end; ++k, advance()) {
        if (k >= begin + early) {
          wait_for(empty + 8 * stage, phase ^ 1);
          load_weights(k, stage);
        }
        copy_box(stages + stage * S::kStage + 64 * S::kWeights * kLine, x, k * kStep, 0, full + 8 * stage);
      }
    }
    __syncwarp();
    if (blocks > 1) cluster_wait();
    return;
  }
  wait_for_earlier_kernels();
  // Asked for now, needed when the sums are there: of a row of each weight, and of a row of x.
  float weight_scale = 1, row_scale = 1, out_scale = 1;
  if constexpr (kIsF8<T>) {
    const int n = min(column + static_cast<int>(threadIdx.x) % 64, g.columns - 1);
    weight_scale = threadIdx.x < 64 ? f.weight_scale[n * f.weight_scale_step] : f.gate_scale[n * f.gate_scale_step];
    row_scale = f.x_scale[min(static_cast<int>(threadIdx.x), g.rows - 1) * f.x_scale_step];
  }
  if constexpr (kIsF8<Out>) out_scale = 1 / *f.out_scale;
  float sums[S::kWeights][kRows / 2] = {};
  for (int k = begin; k < end; ++k) {
    const uint32_t from = stages + stage * S::kStage;
    const uint64_t right = matrix_descriptor(from + 64 * S::kWeights * kLine);
    wait_for(full + 8 * stage, phase);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kLine / 32; ++i)
#pragma unroll
      for (int w = 0; w < S::kWeights; ++w)
        wgmma<T, kRows>(sums[w], matrix_descriptor(from + 64 * w * kLine) + 2 * i, right + 2 * i, 1);
    wgmma_commit();
    wgmma_wait<0>();
    if (lane == 0) arrive(empty + 8 * stage);
    advance();
  }
#pragma unroll
  for (auto& part : sums)
#pragma unroll
    for (float& sum : part) asm volatile("" : "+f"(sum)::"memory");

  if (blocks > 1) {
    cluster_wait();
    const uint32_t mine = received + threadIdx.x * 16;
    if (rank > 0) {
#pragma unroll
      for (int w = 0; w < S::kWeights; ++w)
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j)
          send(mine + (rank - 1) * S::kSent + (w * kRows / 8 + j) * 2048, sent, 0, sums[w][4 * j], sums[w][4 * j + 1],
               sums[w][4 * j + 2], sums[w][4 * j + 3]);
      return;
    }
    wait_for(sent, 0);
    for (int r = 0; r < blocks - 1; ++r)
#pragma unroll
      for (int w = 0; w < S::kWeights; ++w)
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          const float4 part = *reinterpret_cast<const float4*>(memory + (mine - stages) + r * S::kSent +
                                                               (w * kRows / 8 + j) * 2048);
          sums[w][4 * j] += part.x;
          sums[w][4 * j + 1] += part.y;
          sums[w][4 * j + 2] += part.z;
          sums[w][4 * j + 3] += part.w;
        }
  }

  group_sync(1, 128);  // all stages have been read: the sums take their place, for whole rows to be stored
  float* const own = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int w = 0; w < S::kWeights; ++w)
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        own[w * S::kSums + (j * 8 + lane % 4 * 2 + i % 2) * S::kPitch + warp * 16 + lane / 4 + i / 2 * 8] =
            sums[w][j * 4 + i];
  float* const scales = own + S::kWeights * S::kSums;
  if constexpr (kIsF8<T>) {
    scales[threadIdx.x] = weight_scale;
    if (threadIdx.x < kRows) scales[128 + threadIdx.x] = row_scale;
  }
  group_sync(1, 128);
  for (int i = threadIdx.x; i < g.rows * 8; i += 128) {
    const int row = i / 8, from = column + i % 8 * 8;
    if (from >= g.columns) continue;
    float v[S::kWeights][8];
#pragma unroll
    for (int w = 0; w < S::kWeights; ++w) load(own + w * S::kSums + row * S::kPitch + i % 8 * 8, v[w]);
    const int there = min(8, g.columns - from);
    uint32_t result[8 * sizeof(Out) / 4];
#pragma unroll
    for (int h = 0; h < 8; h += 2) {
      float a = v[0][h], b = v[0][h + 1], c = v[1][h], d = v[1][h + 1];
      if constexpr (kIsF8<T>) {
        const float by_row = scales[128 + row];
        const float* const up = scales + i % 8 * 8 + h;
        a *= by_row * up[0];
        b *= by_row * up[1];
        c *= by_row * up[64];
        d *= by_row * up[65];
      }
      silu<kExact<Out>>(c, d);
      a *= c;
      b *= d;
      const uint32_t both = packed<Out>(a * out_scale, b * out_scale);
      if constexpr (kIsF8<Out>)
        result[h / 4] = h % 4 ? result[h / 4] | both << 16 : both;
      else
        result[h / 2] = both;
    }
    Out* const to = out + row * out_stride + from;
    if (there == 8) {
      if constexpr (kIsF8<Out>)
        *reinterpret_cast<uint2*>(to) = {result[0], result[1]};
      else
        *reinterpret_cast<uint4*>(to) = {result[0], result[1], result[2], result[3]};
    } else {
#pragma unroll
      for (int h = 0; h < 8; ++h)
        if (h < there) to[h] = reinterpret_cast<const Out*>(result)[h];
    }
  }
}

// 16 bytes as floats.
template <class T>
__device__ inline void widen(const uint4& v, float (&to)[16 / sizeof(T)]) {
  if constexpr (kIsF8<T>) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const auto two = reinterpret_cast<const __nv_fp8x2_storage_t*>(&v)[i];
      const float2 wide = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3)));
      to[2 * i] = wide.x;
      to[2 * i + 1] = wide.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = to_float(reinterpret_cast<const T*>(&v)[i]);
  }
}

template <class Out>
__device__ inline Out rounded(float v) {
  if constexpr (kIsF8<Out>) {
    Out to;
    to.__x = __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
    return to;
  } else {
    return from_float<Out>(v);
  }
}

// One row: kWarps warps read two rows of the weight (one and its gate's), all that they hold asked for at once.
template <class T, class Out, bool kGated, int kWarps>
__global__ void __launch_bounds__(256) multiply_dots(const T* const x, const CudaMatrix weight, const CudaMatrix gate,
                                                     Out* const out, const __grid_constant__ Finish f,
                                                     const int columns, const int k, const bool constant) {
  constexpr int kAtOnce = 4, kItems = 16 / sizeof(T), kStep = 32 * kItems * kWarps;
  __shared__ float parts[8][2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, place = warp % kWarps * 32 + lane;
  const int n = (blockIdx.x * 8 + warp) / kWarps * (kGated ? 1 : 2);
  let_next_kernel_begin();
  const int at_first = min(n, columns - 1), at_second = min(n + 1, columns - 1);
  const T* const first = static_cast<const T*>(weight.data) + at_first * weight.stride;
  const T* const second = kGated ? static_cast<const T*>(gate.data) + at_first * gate.stride
                                 : static_cast<const T*>(weight.data) + at_second * weight.stride;
  uint4 w[2][kAtOnce];
  const auto ask = [&](int at) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool there = at + i * kStep < k;
      w[0][i] = there ? __ldcs(reinterpret_cast<const uint4*>(first + at + i * kStep)) : uint4{};
      w[1][i] = there ? __ldcs(reinterpret_cast<const uint4*>(second + at + i * kStep)) : uint4{};
    }
  };
  if (constant)
    ask(place * kItems);
  else
    for (int at = place * kLine / int{sizeof(T)}; at < k; at += kWarps * 32 * kLine / int{sizeof(T)}) {
      prefetch(first + at);
      prefetch(second + at);
    }
  wait_for_earlier_kernels();
  if (!constant) ask(place * kItems);
  // Asked for now, needed when the sums are there.
  float scales[2] = {1, 1}, out_scale = 1;
  if constexpr (kIsF8<T>) {
    const float by_row = *f.x_scale;
    scales[0] = by_row * f.weight_scale[at_first * f.weight_scale_step];
    scales[1] = by_row * (kGated ? f.gate_scale[at_first * f.gate_scale_step]
                                 : f.weight_scale[at_second * f.weight_scale_step]);
  }
  if constexpr (kIsF8<Out>) out_scale = 1 / *f.out_scale;
  float sums[2] = {};
  for (int at = place * kItems; at < k;) {
    uint4 v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      v[i] = at + i * kStep < k ? *reinterpret_cast<const uint4*>(x + at + i * kStep) : uint4{};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float a[kItems], b[kItems];
      widen<T>(v[i], a);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        widen<T>(w[s][i], b);
#pragma unroll
        for (int j = 0; j < kItems; ++j) sums[s] = fmaf(a[j], b[j], sums[s]);
      }
    }
    at += kAtOnce * kStep;
    if (at < k) ask(at);
  }
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    sums[s] = lanes_sum<32>(sums[s]);
    if (kWarps > 1 && lane == 0) parts[warp][s] = sums[s];
  }
  if (kWarps > 1) __syncthreads();
  if (place || n >= columns) return;
  float a = sums[0], b = sums[1];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) {
    a += parts[warp + i][0];
    b += parts[warp + i][1];
  }
  if constexpr (kIsF8<T>) {
    a *= scales[0];
    b *= scales[1];
  }
  if constexpr (kGated) {
    float c = 0;
    silu<kExact<Out>>(b, c);
    out[n] = rounded<Out>(a * b * out_scale);
  } else {
    const bool two = n + 1 < columns;
    if (f.bias) {
      a += to_float(static_cast<const BiasOf<T>*>(f.bias)[n]);
      b += to_float(static_cast<const BiasOf<T>*>(f.bias)[n + two]);
    }
    if constexpr (!kIsF8<Out>)
      if (f.residual) {
        a += to_float(static_cast<const Out*>(f.residual)[n]);
        b += to_float(static_cast<const Out*>(f.residual)[n + two]);
      }
    if (f.smooth)
      activate<true, kExact<Out>>(f, a, b);
    else
      activate<false, false>(f, a, b);
    out[n] = rounded<Out>(a * out_scale);
    if (two) out[n + 1] = rounded<Out>(b * out_scale);
  }
}

template <class T, class Out, int kColumns, bool kGated, bool kAdd = false>
void run_tiles(const CudaLinear& a, int processors, void* stream) {
  using S = Tile<T, Out, kColumns, kGated>;
  Grid g{};
  g.rows = static_cast<int>(a.rows);
  g.columns = static_cast<int>(a.n);
  g.steps = blocks_of(a.k * sizeof(T), kLine);
  g.down = blocks_of(a.rows, kTileRows);
  g.across = blocks_of(a.n, S::kOut);
  const CUtensorMap x = tensor_map(a.x.data, kMapType<T>, sizeof(T), a.rows, a.k, pitch_of<T>(a.x, a.k), kTileRows);
  const CUtensorMap weight = map_of<T>(a.weight, a.n, a.k, S::kBox);
  const auto lines = [&](const Walk& to) {
    return tensor_map(to.data, kMapType<Out>, sizeof(Out), a.rows, a.n, pitch_of<Out>(to, a.n), 16, S::kOutLine);
  };
  const CUtensorMap other = kGated ? map_of<T>(a.gate, a.n, a.k, S::kBox) : kAdd ? lines(a.residual) : weight;
  launch_when(a.rows <= kEarlyRows, multiply_tiles<T, Out, kColumns, kGated, kAdd>, std::min(g.down * g.across, processors),
              1, kThreads, S::kBytes, stream, x, weight, other, lines(a.out), finish_of(a), g);
}

template <class T, class Out, int kRows, int kMost>
void run_few_of(const CudaLinear& a, int tiles, int blocks, void* stream) {
  using S = Few<T, kRows, kMost>;
  Grid g{};
  g.rows = static_cast<int>(a.rows);
  g.columns = static_cast<int>(a.n);
  g.steps = blocks_of(a.k * sizeof(T), kLine);
  const CUtensorMap x = tensor_map(a.x.data, kMapType<T>, sizeof(T), a.rows, a.k, pitch_of<T>(a.x, a.k), kRows);
  const CUtensorMap weight = map_of<T>(a.weight, a.n, a.k, 64);
  const CUtensorMap gate = map_of<T>(a.gate, a.n, a.k, 64);
  launch_clusters(multiply_few_rows<T, Out, kRows, kMost>, tiles * blocks, blocks, kFewThreads, S::kBytes, stream, x,
                  weight, gate, reinterpret_cast<Out*>(a.out.data), pitch_of<Out>(a.out, a.n) / int64_t{sizeof(Out)},
                  finish_of(a), g, blocks, a.constant);
}

template <class T, class Out, int kRows>
void run_few(const CudaLinear& a, int processors, void* stream) {
  const int tiles = blocks_of(a.n, 64);
  if (tiles * 2 <= processors && blocks_of(a.k * sizeof(T), kLine) >= 4)
    return run_few_of<T, Out, kRows, 2>(a, tiles, 2, stream);
  // With 64 rows the room for another block's sums is that of a fourth stage.
  run_few_of<T, Out, kRows, kRows == 64 ? 1 : 2>(a, tiles, 1, stream);
}

template <class T, class Out, bool kGated, int kWarps>
void run_dots_of(const CudaLinear& a, void* stream) {
  launch_clusters(multiply_dots<T, Out, kGated, kWarps>, blocks_of(a.n * kWarps, kGated ? 8 : 16), 1, 256, 0, stream,
                  reinterpret_cast<const T*>(a.x.data), a.weight, a.gate, reinterpret_cast<Out*>(a.out.data),
                  finish_of(a), static_cast<int>(a.n), static_cast<int>(a.k), a.constant);
}

// False where the last 16 bytes of a row are not all its own.
template <class T, class Out, bool kGated>
bool run_dots(const CudaLinear& a, void* stream) {
  const int64_t bytes = a.k * int64_t{sizeof(T)};
  if (bytes % 16) return false;
  // Beyond 2048 bytes a warp would have to ask a second time. Four have room for 8192, and what is not there takes as long
  // as what is: twice as long a byte of 8-bit floats.
  constexpr int kSome = kIsF8<T> ? 2 : 4;
  if (bytes <= 2048)
    run_dots_of<T, Out, kGated, 1>(a, stream);
  else if (bytes <= 4096)
    run_dots_of<T, Out, kGated, kSome>(a, stream);
  else
    run_dots_of<T, Out, kGated, 4>(a, stream);
  return true;
}

// Whether the copy engine can: rows a multiple of 16 bytes apart, from an address that is one.
bool boxes_fit(const void* data, int64_t stride_bytes, int64_t width_bytes) {
  return aligned(data) && stride_bytes % 16 == 0 && stride_bytes >= width_bytes && stride_bytes < int64_t{1} << 40;
}

template <class T, class Out>
bool fits(const CudaLinear& a) {
  constexpr int64_t kItem = sizeof(T), kMost = INT32_MAX - 1024;
  const auto matrix = [&](const CudaMatrix& m) { return !m.data || boxes_fit(m.data, m.stride * kItem, a.k * kItem); };
  const auto rows = [&](const Walk& of) {
    return of.dims <= 1 && boxes_fit(of.data, pitch_of<Out>(of, a.n), a.n * int64_t{sizeof(Out)});
  };
  return a.k > 0 && a.rows < kMost && a.n < kMost && a.k < kMost && a.x.dims <= 1 &&
         boxes_fit(a.x.data, pitch_of<T>(a.x, a.k), a.k * kItem) && matrix(a.weight) && matrix(a.gate) &&
         rows(a.out) && (!a.residual.data || rows(a.residual));
}

// How long tiles of this many columns take, in columns: each wave its tile, and what is not hidden behind the next one.
int64_t cost_of(const CudaLinear& a, int columns, int processors) {
  const int64_t tiles = int64_t{blocks_of(a.rows, kTileRows)} * blocks_of(a.n, columns);
  return (tiles + processors - 1) / processors * (columns + 16) + columns / 2;
}

template <class T, class Out, bool kAdd>
void run_widest(const CudaLinear& a, int processors, void* stream) {
  const int64_t wide = cost_of(a, 256, processors), narrow = cost_of(a, 128, processors) * 5 / 4;
  const int64_t middle = cost_of(a, 192, processors) * 21 / 20;
  if constexpr (!kAdd || Tile<T, Out, 256, false>::kPatches == 2)  // else no patch for the next line of the residual
    if (wide <= middle && wide <= narrow) return run_tiles<T, Out, 256, false, kAdd>(a, processors, stream);
  if (middle <= narrow) return run_tiles<T, Out, 192, false, kAdd>(a, processors, stream);
  run_tiles<T, Out, 128, false, kAdd>(a, processors, stream);
}

template <class T, class Out>
void run_gated(const CudaLinear& a, int processors, void* stream) {
  // Of one row, the tensor cores take 8-bit floats as they are; dots would have to make floats of them first.
  if constexpr (!kIsF8<T>)
    if (a.rows == 1 && run_dots<T, Out, true>(a, stream)) return;
  if (a.rows <= 16) return run_few<T, Out, 16>(a, processors, stream);
  if (a.rows <= 32) return run_few<T, Out, 32>(a, processors, stream);
  if (a.rows <= 64) return run_few<T, Out, 64>(a, processors, stream);
  // Half of the columns in a tile, where all of them have a multiprocessor each.
  if (blocks_of(a.rows, kTileRows) * blocks_of(a.n, 64) <= processors)
    return run_tiles<T, Out, 128, true>(a, processors, stream);
  run_tiles<T, Out, 256, true>(a, processors, stream);
}

template <class T, class Out>
bool hopper_linear_as(const CudaLinear& a, int processors, void* stream) {
  if (!fits<T, Out>(a)) return false;
  if (a.gated) {
    run_gated<T, Out>(a, processors, stream);
  } else if (!(a.rows == 1 && run_dots<T, Out, false>(a, stream)) && !hopper_shares<T, Out>(a, processors, stream)) {
    if constexpr (!kIsF8<Out>)
      if (a.residual.data) return run_widest<T, Out, true>(a, processors, stream), true;
    run_widest<T, Out, false>(a, processors, stream);
  }
  return true;
}

}  // namespace

template <class T>
bool hopper_linear(const CudaLinear& a, int processors, void* stream) {
  return hopper_linear_as<T, T>(a, processors, stream);
}

template bool hopper_linear<bf16>(const CudaLinear&, int, void*);
template bool hopper_linear<f16>(const CudaLinear&, int, void*);

bool hopper_fp8_linear(const CudaLinear& a, int processors, void* stream) {
  return a.out_scale ? hopper_linear_as<f8, f8>(a, processors, stream)
                     : hopper_linear_as<f8, bf16>(a, processors, stream);
}

}  // namespace kpdeploy
