// linear_activation on compute capability 9.0 where there are too few tiles for the chip, or too little work in each:
// the blocks of a cluster share out K, give each other the sums of the columns that the other finishes, through
// shared memory, and each finishes its own. Two blocks fit a multiprocessor, so that the next kernel's are there, with
// their weights under way to the second cache, when this one ends.

#include <algorithm>

#include "hopper_finish.cuh"
#include "hopper_shares.h"

namespace kpdeploy {
namespace {

constexpr int kPart = 16;   // columns that are exchanged and finished at once
constexpr int kPatch = 48;  // bytes of a row of such a part in shared memory: no bank meets two lanes

// kGroups warpgroups with 64 rows each, kColumns rows of the weight.
template <int kGroups, int kColumns>
struct Share {
  static constexpr int kConsumers = kGroups * 4, kThreads = kGroups * 128 + 32;
  static constexpr int kParts = kColumns / kPart;
  static constexpr int kSent = kGroups * 128 * 32;  // bytes of one part's sums: eight floats of each thread
  static constexpr int kPatches = kConsumers * 16 * kPatch, kVectors = kColumns * 2 * 4;
};

// How a block works, beside its Grid.
struct Shares {
  int blocks;       // of a cluster
  int stages, box;  // of shared memory, and rows of x in one
  int received;     // where in shared memory others' sums come to
  bool constant;    // no kernel under way writes the weight
};

// Two neighbours of the residual; what is not there is 0.
template <class Out>
__device__ inline uint32_t residual_at(const Finish& f, const Grid& g, int row, int column) {
  const Out* const from = static_cast<const Out*>(f.residual) + row * f.residual_stride + column;
  if (row >= g.rows || column >= g.columns) return 0;
  return column + 1 < g.columns ? *reinterpret_cast<const uint32_t*>(from) : *reinterpret_cast<const uint16_t*>(from);
}

template <class T, class Out, int kGroups, int kColumns>
__global__ void __launch_bounds__(Share<kGroups, kColumns>::kThreads, 2)
    multiply_shares(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight, Out* const out,
                    const int64_t out_stride, const __grid_constant__ Finish f, const __grid_constant__ Grid g,
                    const __grid_constant__ Shares shares) {
  using S = Share<kGroups, kColumns>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t first_stage = shared_address(memory), received = first_stage + shares.received;
  const uint32_t after = received + (shares.blocks - 1) * (S::kParts / shares.blocks) * S::kSent;
  const uint32_t patches = after, vectors_at = patches + S::kPatches;
  float* const vectors = reinterpret_cast<float*>(memory + (vectors_at - first_stage));
  const uint32_t full = vectors_at + S::kVectors, empty = full + 8 * shares.stages, sent = empty + 8 * shares.stages;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = shares.blocks > 1 ? cluster_rank() : 0, per = S::kParts / shares.blocks;
  const int tile = blockIdx.x / shares.blocks;
  const int row = tile % g.down * 64 * kGroups, column = tile / g.down * kColumns;
  const int begin = g.steps * rank / shares.blocks, end = g.steps * (rank + 1) / shares.blocks;
  const int busy = min(S::kConsumers, (g.rows - row + 15) / 16);  // warps that have rows
  const int x_bytes = shares.box * kLine, stage_bytes = x_bytes + kColumns * kLine;
  constexpr int kStep = kLine / sizeof(T);

  if (threadIdx.x == 0) {
    for (int i = 0; i < shares.stages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, S::kConsumers);
    }
    barrier_init(sent, 1);
    barriers_ready();
    arrive_expecting(sent, (shares.blocks - 1) * per * busy * 32 * 32);
  }
  if (threadIdx.x == S::kConsumers * 32) {
    prefetch_map(weight);
    prefetch_map(x);
  }
  __syncthreads();
  if (shares.blocks > 1) cluster_arrive_relaxed();  // this block is there, and takes what others send
  let_next_kernel_begin();

  int stage = 0, phase = 0;
  const auto advance = [&] {
    if (++stage == shares.stages) {
      stage = 0;
      phase ^= 1;
    }
  };
  if (warp == S::kConsumers) {
    if (lane == 0) {
      const auto load_weight = [&](int k, int to) {
        arrive_expecting(full + 8 * to, stage_bytes);
        copy_box(first_stage + to * stage_bytes + x_bytes, weight, k * kStep, column, full + 8 * to);
      };
      const int first = min(end - begin, shares.stages), early = shares.constant ? first : 0;
      for (int i = 0; i < early; ++i) load_weight(begin + i, i);
      for (int i = early; i < first; ++i) prefetch_box(weight, (begin + i) * kStep, column);
      wait_for_earlier_kernels();
      for (int k = begin; k < end; ++k, advance()) {
        if (k >= begin + early) {
          wait_for(empty + 8 * stage, phase ^ 1);
          load_weight(k, stage);
        }
        copy_box(first_stage + stage * stage_bytes, x, k * kStep, row, full + 8 * stage);
      }
    }
    __syncwarp();
    if (shares.blocks > 1) cluster_wait();
    return;
  }

  if (!shares.constant) wait_for_earlier_kernels();
  for (int i = threadIdx.x; i < kColumns; i += S::kConsumers * 32) {
    const bool there = column + i < g.columns;
    vectors[i] = there && f.bias ? to_float(static_cast<const BiasOf<T>*>(f.bias)[column + i]) : 0;
    if constexpr (kIsF8<T>) vectors[kColumns + i] = there ? f.weight_scale[(column + i) * f.weight_scale_step] : 0;
  }
  if (shares.constant) wait_for_earlier_kernels();
  const int own_row = row + warp * 16;  // the first of this warp's
  float row_scales[2] = {1, 1};
  if constexpr (kIsF8<T>)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      row_scales[i] = f.x_scale[min(own_row + lane / 4 + i * 8, g.rows - 1) * f.x_scale_step];
  const float out_scale = kIsF8<Out> ? 1 / *f.out_scale : 1;
  // Asked for now, added when the sums are there: as `pairs` below, of the parts that this block finishes.
  uint32_t added[S::kParts][4] = {};
  if constexpr (!kIsF8<Out>)
    if (f.residual) {
#pragma unroll
      for (int p = 0; p < S::kParts; ++p)
        if (p / per == rank)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            added[p][i] = residual_at<Out>(f, g, own_row + lane / 4 + i % 2 * 8, column + p * kPart + i / 2 * 8 + lane % 4 * 2);
    }

  float sums[kColumns / 2] = {};
  int before = 0;
  for (int k = begin; k < end; ++k) {
    const uint32_t from = first_stage + stage * stage_bytes;
    const uint64_t left = matrix_descriptor(from + warp / 4 * 64 * kLine), right = matrix_descriptor(from + x_bytes);
    wait_for(full + 8 * stage, phase);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kLine / 32; ++i) wgmma<T, kColumns>(sums, left + 2 * i, right + 2 * i, 1);
    wgmma_commit();
    if (k > begin) {
      wgmma_wait<1>();
      if (lane == 0) arrive(empty + 8 * before);
    }
    before = stage;
    advance();
  }
  wgmma_wait<0>();
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");
  group_sync(1, S::kConsumers * 32);  // `vectors` is there
  if (shares.blocks > 1) cluster_wait();
  if (warp >= busy) return;

  // To each other block the parts that it finishes; slots are in the order of the ranks.
  const uint32_t mine = received + threadIdx.x * 16;
  if (shares.blocks > 1) {
    int owner = 0, within = 0;
#pragma unroll
    for (int p = 0; p < S::kParts; ++p) {
      if (owner != rank) {
        const uint32_t to = mine + ((rank - (rank > owner)) * per + within) * S::kSent;
        const float* const v = sums + p * 8;
        send(to, sent, owner, v[0], v[1], v[2], v[3]);
        send(to + S::kSent / 2, sent, owner, v[4], v[5], v[6], v[7]);
      }
      if (++within == per) {
        within = 0;
        ++owner;
      }
    }
    wait_for(sent, 0);
  }

  const uint32_t patch = patches + warp * 16 * kPatch;
  int owner = 0, within = 0;
#pragma unroll
  for (int p = 0; p < S::kParts; ++p) {
    if (owner == rank) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = sums[p * 8 + i];
      for (int other = 0; other < shares.blocks - 1; ++other) {
        const unsigned char* const from =
            memory + (mine - first_stage) + (other * per + within) * S::kSent;
        const float4 low = *reinterpret_cast<const float4*>(from);
        const float4 high = *reinterpret_cast<const float4*>(from + S::kSent / 2);
        v[0] += low.x, v[1] += low.y, v[2] += low.z, v[3] += low.w;
        v[4] += high.x, v[5] += high.y, v[6] += high.z, v[7] += high.w;
      }
      uint32_t pairs[4];  // left and right eight columns, upper and lower eight rows of each
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float a = v[2 * i], b = v[2 * i + 1];
        const float* const vector = vectors + p * kPart + i / 2 * 8 + lane % 4 * 2;
        if constexpr (kIsF8<T>) {
          a *= vector[kColumns] * row_scales[i % 2];
          b *= vector[kColumns + 1] * row_scales[i % 2];
        }
        a += vector[0];
        b += vector[1];
        if constexpr (!kIsF8<Out>) {
          const float2 with = unpacked<Out>(added[p][i]);
          a += with.x;
          b += with.y;
        }
        if (f.smooth)
          activate<true, kExact<Out>>(f, a, b);
        else
          activate<false, false>(f, a, b);
        pairs[i] = packed<Out>(a * out_scale, b * out_scale);
      }
      constexpr int kBytes = kPart * sizeof(Out), kItems = 16 / sizeof(Out), kAcross = kBytes / 16;
      __syncwarp();
      if constexpr (kIsF8<Out>) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          asm volatile("st.shared.b16 [%0], %1;\n" ::"r"(patch + (lane / 4 + i % 2 * 8) * kPatch + i / 2 * 8 + lane % 4 * 2),
                       "h"(static_cast<uint16_t>(pairs[i]))
                       : "memory");
      } else {
        store_matrices(patch + lane % 16 * kPatch + lane / 16 * 16, pairs[0], pairs[1], pairs[2], pairs[3]);
      }
      __syncwarp();
      const int r = lane / kAcross, at = lane % kAcross * kItems, to_row = own_row + r;
      const int left = g.columns - (column + p * kPart + at);
      if (r < 16 && to_row < g.rows && left > 0) {
        const unsigned char* const from = memory + (patch - first_stage) + r * kPatch + at * sizeof(Out);
        Out* const to = out + to_row * out_stride + column + p * kPart + at;
        if (left >= kItems)
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        else
          for (int i = 0; i < left; ++i) to[i] = reinterpret_cast<const Out*>(from)[i];
      }
    }
    if (++within == per) {
      within = 0;
      ++owner;
    }
  }
}

template <class T, class Out, int kGroups, int kColumns>
void run_shares(const CudaLinear& a, int blocks, int room, void* stream) {
  using S = Share<kGroups, kColumns>;
  Grid g{};
  g.rows = static_cast<int>(a.rows);
  g.columns = static_cast<int>(a.n);
  g.steps = blocks_of(a.k * sizeof(T), kLine);
  g.down = blocks_of(a.rows, 64 * kGroups);
  g.across = blocks_of(a.n, kColumns);
  Shares s{};
  s.blocks = blocks;
  s.constant = a.constant;
  s.box = std::min(64 * kGroups, blocks_of(a.rows, 8) * 8);
  const int stage = (s.box + kColumns) * kLine;
  const int rest = (blocks - 1) * (S::kParts / blocks) * S::kSent + S::kPatches + S::kVectors + 256;
  const int beyond = std::max(0, 64 * kGroups * kLine - stage);  // the last stage's rows of x that are not there
  s.stages = std::max(2, std::min({(room - rest - beyond) / stage, blocks_of(g.steps, blocks), 12}));
  s.received = s.stages * stage + beyond;
  const CUtensorMap x = tensor_map(a.x.data, kMapType<T>, sizeof(T), a.rows, a.k, pitch_of<T>(a.x, a.k), s.box);
  const CUtensorMap weight = map_of<T>(a.weight, a.n, a.k, kColumns);
  launch_when(a.rows <= kEarlyRows, multiply_shares<T, Out, kGroups, kColumns>, g.down * g.across * blocks, blocks,
              S::kThreads, s.received + rest, stream, x, weight, reinterpret_cast<Out*>(a.out.data),
              pitch_of<Out>(a.out, a.n) / int64_t{sizeof(Out)}, finish_of(a), g, s);
}

}  // namespace

template <class T, class Out>
bool hopper_shares(const CudaLinear& a, int processors, void* stream) {
  if (a.gated) return false;
  const int steps = blocks_of(a.k * sizeof(T), kLine);
  const auto tiles = [&](int rows, int columns) { return int64_t{blocks_of(a.rows, rows)} * blocks_of(a.n, columns); };
  // All of a multiprocessor's memory where each has one block at most; clusters of 4 leave some of them out.
  const auto room = [&](int64_t tiles, int blocks) {
    return tiles * blocks <= processors - (blocks > 2 ? processors / 8 : 0) ? kShared - 1024 : kShared / 2 - 1024;
  };
  // As many blocks as there are multiprocessors, about: what was measured fastest for rows from 1 to 1024.
  if (a.rows > 128) {
    const int64_t few = tiles(128, 64);
    if (few > processors) return false;
    const int blocks = few * 2 <= processors && steps >= 8 ? 2 : 1;
    run_shares<T, Out, 2, 64>(a, blocks, room(few, blocks), stream);
  } else if (a.rows > 64 ? steps >= 32 && tiles(64, 64) * 4 <= processors : !kIsF8<T>) {
    const int64_t few = tiles(64, 64);
    const int blocks = few * 4 <= processors && steps >= 16 ? 4 : few * 2 <= processors && steps >= 4 ? 2 : 1;
    run_shares<T, Out, 1, 64>(a, blocks, room(few, blocks), stream);
  } else {
    const int64_t few = tiles(64, 32);
    const int blocks = few * 2 <= (a.rows > 64 ? 1 : 2) * processors && steps >= 4 ? 2 : 1;
    run_shares<T, Out, 1, 32>(a, blocks, room(few, blocks), stream);
  }
  return true;
}

template bool hopper_shares<bf16, bf16>(const CudaLinear&, int, void*);
template bool hopper_shares<f16, f16>(const CudaLinear&, int, void*);
template bool hopper_shares<f8, bf16>(const CudaLinear&, int, void*);
template bool hopper_shares<f8, f8>(const CudaLinear&, int, void*);

}  // namespace kpdeploy
