// linear_activation, gated_linear and their pieces: x is laid out in tiles, the weight in panels (linear_kernel.h),
// then every tile meets every panel. A weight that is not packed beforehand is packed in groups of panels.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "checks.h"

struct kpdeploy_packed_weight {
  int64_t n, k;
  int dtype;
  const char* isa;
  float* panels;
  ~kpdeploy_packed_weight() { std::free(panels); }
};

namespace kpdeploy {
namespace {

constexpr int64_t kDotRows = 4;                 // up to here a weight's row is read once and multiplied in place
constexpr int64_t kGroupFloats = 2 << 20;       // of a weight that is packed on the way: 8 MiB
constexpr int64_t kTaskRows = 140;              // at most, of x in one task, and columns of the weight: what both
constexpr int64_t kTaskColumns = 256;           // need for one run of k is well within a core's second cache
constexpr int64_t kPackTask = 16;               // tiles or panels' halves packed by one task

thread_local bool constant_weights = false;

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// A weight [n, k], or two of one shape: as they are, or packed.
struct Weight {
  int64_t n, k;
  const Tensor* plain;
  const float* panels;
};

struct Linear {
  Tensor x, out;
  Weight weight, gate;  // gate.n < 0: none
  const void* bias;
  int activation;
  const Tensor* residual;  // null: none; on a GPU alone
};

Tensor weight_of(const char* name, const kpdeploy_tensor* weight, const Tensor& x) {
  const Tensor w = floats_like(name, weight, 2, x);
  if (w.rank != 2 || w.size(1) != x.size(-1))
    refuse("%s is %s, which does not fit x %s", name, w.shape().c_str(), x.shape().c_str());
  return w;
}

Weight packed_of(const char* name, const kpdeploy_packed_weight* packed, const Tensor& x) {
  if (!packed) refuse("%s is missing", name);
  if (packed->dtype != x.dtype) refuse("%s was packed from another dtype than x has", name);
  if (packed->k != x.size(-1))
    refuse("%s is [%lld, %lld], which does not fit x %s", name, (long long)packed->n, (long long)packed->k,
           x.shape().c_str());
  if (std::strcmp(packed->isa, kernels().name)) refuse("%s was packed for %s", name, packed->isa);
  return {packed->n, packed->k, nullptr, packed->panels};
}

Tensor out_of(const kpdeploy_tensor* out, const Tensor& x, int64_t n) {
  const Tensor o = floats_like("out", out, 1, x);
  bool fits = o.rank == x.rank && o.size(-1) == n;
  for (int i = 0; fits && i < x.rank - 1; ++i) fits = o.sizes[i] == x.sizes[i];
  if (!fits) refuse("out is %s, with x %s and %lld columns", o.shape().c_str(), x.shape().c_str(), (long long)n);
  return o;
}

void check_activation(int activation) {
  if (activation < KPDEPLOY_NONE || activation > KPDEPLOY_SILU)
    refuse("activation is none of none, relu, gelu, gelu_tanh, silu");
}

// A few rows: every row of the weight is read once, where it lies.
void multiply_few(const kpdeploy_context* context, const Linear& l) {
  const Kernels& k = kernels();
  const Rows x(l.x), out(l.out);
  const int64_t item = l.x.item_bytes(), per_task = 64;
  const auto dots = [&](const Tensor& w, int64_t first, int64_t columns, float (*result)[per_task]) {
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = 0; r < x.count(); ++r)
        k.dot_rows[l.x.dtype](x.row(r), w.data + (first + c) * w.stride(0) * item, l.weight.k, &result[r][c]);
  };
  parallel(context, blocks(l.weight.n, per_task), [&](int64_t task) {
    const int64_t first = task * per_task, columns = std::min(per_task, l.weight.n - first);
    float product[kDotRows][per_task], gate[kDotRows][per_task];
    dots(*l.weight.plain, first, columns, product);
    if (l.gate.n >= 0) dots(*l.gate.plain, first, columns, gate);
    for (int64_t r = 0; r < x.count(); ++r)
      k.finish_row[l.x.dtype](product[r], l.gate.n >= 0 ? gate[r] : nullptr,
                              l.bias ? static_cast<const char*>(l.bias) + first * item : nullptr, l.activation,
                              out.row(r) + first * item, columns);
    return true;
  });
}

// Rows in each tile: as few tiles as there can be, of even size, since a tile of one row takes half as long as one of
// fourteen.
int64_t rows_per_tile(int64_t rows) { return blocks(rows, blocks(rows, kernels().tile_rows)); }

// x in tiles [k][tile_rows], each followed by one vector of room.
const float* tiles_of(const kpdeploy_context* context, const Tensor& tensor, int64_t tile_floats) {
  const Kernels& kernel = kernels();
  const Rows x(tensor);
  const int64_t k = tensor.size(-1), each = rows_per_tile(x.count()), tiles = blocks(x.count(), each);
  float* packed = scratch(kSharedScratch, tiles * tile_floats);
  if (!packed) throw Refusal{KPDEPLOY_OUT_OF_MEMORY, "not enough memory to lay out x"};
  const bool regular = x.stride() >= 0;
  parallel(context, blocks(tiles, kPackTask), [&](int64_t task) {
    for (int64_t t = task * kPackTask; t < std::min(tiles, (task + 1) * kPackTask); ++t) {
      const int64_t first = t * each;
      const int rows = static_cast<int>(std::min(each, x.count() - first));
      const char* data = x.row(first);
      int64_t stride = x.stride();
      if (!regular) {  // rows that no single stride describes are gathered first
        char* gathered = reinterpret_cast<char*>(scratch(kTaskScratch, kernel.tile_rows * k));
        if (!gathered) return false;
        for (int r = 0; r < rows; ++r)
          std::memcpy(gathered + r * k * tensor.item_bytes(), x.row(first + r), k * tensor.item_bytes());
        data = gathered;
        stride = k;
      }
      kernel.pack_tile[tensor.dtype](data, stride, rows, k, packed + t * tile_floats);
    }
    return true;
  });
  return packed;
}

// Panels [first, first + count) of a weight, packed into `to`.
void pack(const kpdeploy_context* context, const Tensor& w, int64_t first, int64_t count, float* to) {
  const Kernels& kernel = kernels();
  const int64_t width = kernel.panel_columns, k = w.size(1);
  parallel(context, count, [&](int64_t p) {
    const int64_t column = (first + p) * width;
    const int columns = static_cast<int>(std::min(width, w.size(0) - column));
    kernel.pack_panel[w.dtype](w.data + column * w.stride(0) * w.item_bytes(), w.stride(0), columns, k,
                               to + p * width * k);
    return true;
  });
}

struct Product {
  const Linear& linear;
  const float* tiles;
  int64_t tile_floats;
};

// All tiles times panels [first, first + count); `panels` and `gates` hold just these.
void multiply_panels(const kpdeploy_context* context, const Product& product, int64_t first, int64_t count,
                     const float* panels, const float* gates) {
  const Linear& l = product.linear;
  const Kernels& kernel = kernels();
  const Rows out(l.out);
  const int64_t width = kernel.panel_columns, k = l.weight.k, item = l.x.item_bytes();
  const int64_t each = rows_per_tile(out.count()), tiles = blocks(out.count(), each);
  // Rows that share a panel's run, then as many panels as leave each thread a few tasks. All are of even size (to one
  // tile or panel), and where the rows do not make a task for each thread, the columns make as many for one as for all.
  const int64_t row_tasks = blocks(tiles, std::max<int64_t>(1, kTaskRows / kernel.tile_rows));
  const int64_t threads = std::max(context->threads, 1);
  const int64_t group = std::min(kTaskColumns / width, std::max<int64_t>(1, count * row_tasks / (4 * threads)));
  const int64_t wanted = blocks(count, group);
  const int64_t column_tasks = row_tasks % threads ? std::min(count, blocks(wanted, threads) * threads) : wanted;
  const int64_t space = blocks(tiles, row_tasks) * kernel.tile_rows * blocks(count, column_tasks) * width;
  parallel(context, row_tasks * column_tasks, [&](int64_t task) {
    const int64_t part = task % column_tasks, p = part * count / column_tasks, column = (first + p) * width;
    const int64_t panels_here = (part + 1) * count / column_tasks - p;
    const int64_t run = task / column_tasks, tile = run * tiles / row_tasks, row = tile * each;
    MultiplyBlock m{};
    m.a = product.tiles + tile * product.tile_floats;
    m.rows_per_tile = each;
    m.tile_floats = product.tile_floats;
    m.b = panels + p * width * k;
    m.b_gate = gates ? gates + p * width * k : nullptr;
    m.bias = l.bias ? static_cast<const char*>(l.bias) + column * item : nullptr;
    m.k = k;
    m.rows = std::min((run + 1) * tiles / row_tasks * each, out.count()) - row;
    m.columns = std::min(panels_here * width, l.weight.n - column);
    m.activation = l.activation;
    m.out = out.row(row) + column * item;
    m.out_stride = out.stride();
    m.scratch = scratch(kTaskScratch, space * (gates ? 2 : 1));
    if (!m.scratch) return false;
    kernel.multiply_block[l.x.dtype](m);
    return true;
  });
}

void multiply_on_gpu(const kpdeploy_context* context, const Linear& l) {
  const Rows x(l.x), out(l.out);
  const auto matrix = [](const Weight& w) {
    return w.n < 0 ? CudaMatrix{} : CudaMatrix{w.plain->data, w.plain->stride(0)};
  };
  CudaLinear c{};
  c.x = x.walk();
  c.out = out.walk();
  c.weight = matrix(l.weight);
  c.gate = matrix(l.gate);
  c.bias = l.bias;
  if (l.residual) c.residual = Rows(*l.residual).walk();
  c.rows = out.count();
  c.n = l.weight.n;
  c.k = l.weight.k;
  c.activation = l.activation;
  c.gated = l.gate.n >= 0;
  c.constant = constant_weights;
  cuda_kernels()->linear[l.x.dtype](c, context->stream);
}

void multiply(const kpdeploy_context* context, const Linear& l) {
  if (l.out.numel() == 0) return;
  const bool packed = l.weight.panels != nullptr;
  if (l.x.on_gpu()) {
    if (packed) refuse("x is on a GPU, and the weight was packed for the CPU");
    return multiply_on_gpu(context, l);
  }
  if (Rows(l.out).stride() < 0) refuse("out %s is not laid out by one stride", l.out.shape().c_str());
  if (!packed && Rows(l.x).count() <= kDotRows) return multiply_few(context, l);

  const Kernels& kernel = kernels();
  const int64_t k = l.weight.k, width = kernel.panel_columns, panels = blocks(l.weight.n, width);
  const int64_t tile_floats = blocks(k * kernel.tile_rows + 16, 16) * 16;
  const Product product{l, tiles_of(context, l.x, tile_floats), tile_floats};
  if (packed) return multiply_panels(context, product, 0, panels, l.weight.panels, l.gate.panels);

  const bool gated = l.gate.n >= 0;
  const int64_t panel_floats = std::max<int64_t>(1, width * k);
  const int64_t group = std::max<int64_t>(1, std::min(panels, kGroupFloats / panel_floats / (gated ? 2 : 1)));
  float* space = scratch(kShared2Scratch, group * panel_floats * (gated ? 2 : 1));
  if (!space) throw Refusal{KPDEPLOY_OUT_OF_MEMORY, "not enough memory to lay out the weight"};
  float* gates = gated ? space + group * panel_floats : nullptr;
  for (int64_t first = 0; first < panels; first += group) {
    const int64_t count = std::min(group, panels - first);
    pack(context, *l.weight.plain, first, count, space);
    if (gated) pack(context, *l.gate.plain, first, count, gates);
    multiply_panels(context, product, first, count, space, gates);
  }
}

constexpr Weight kNoWeight{-1, 0, nullptr, nullptr};

// What products of 8-bit floats share, checked.
struct Fp8Linear {
  Tensor x, weight, out;
  CudaLinear asked;
};

Fp8Linear fp8_linear_of(const char* weight_name, const kpdeploy_tensor* x, const kpdeploy_tensor* weight,
                        const kpdeploy_tensor* x_scale, const char* scale_name, const kpdeploy_tensor* weight_scale,
                        const kpdeploy_tensor* out_scale, const kpdeploy_tensor* out) {
  const Tensor a = gpu_tensor("x", x, KPDEPLOY_F8, 1), w = gpu_tensor(weight_name, weight, KPDEPLOY_F8, 2, &a);
  if (w.rank != 2 || w.size(1) != a.size(-1))
    refuse("%s is %s, which does not fit x %s", weight_name, w.shape().c_str(), a.shape().c_str());
  const Tensor o = gpu_tensor("out", out, out_scale ? KPDEPLOY_F8 : KPDEPLOY_BF16, 1, &a);
  bool fits = o.rank == a.rank && o.size(-1) == w.size(0);
  for (int i = 0; fits && i < a.rank - 1; ++i) fits = o.size(i) == a.size(i);
  if (!fits) refuse("out is %s, which does not fit x %s", o.shape().c_str(), a.shape().c_str());
  const Rows rows(a), outs(o);
  CudaLinear c{};
  c.x_scale = gpu_scales("x_scale", x_scale, rows.count(), a, &c.x_scale_rows);
  c.weight_scale = gpu_scales(scale_name, weight_scale, w.size(0), a, &c.weight_scale_rows);
  if (out_scale) c.out_scale = gpu_scales("out_scale", out_scale, 1, a, nullptr);
  c.x = rows.walk();
  c.out = outs.walk();
  c.weight = {w.data, w.stride(0)};
  c.rows = rows.count();
  c.n = w.size(0);
  c.k = w.size(1);
  c.constant = constant_weights;
  return {a, w, o, c};
}

// A bias of 8-bit x and weight.
const void* fp8_bias_of(const kpdeploy_tensor* bias, const Fp8Linear& l) {
  if (!bias) return nullptr;
  const Tensor b = gpu_tensor("bias", bias, KPDEPLOY_BF16, 1, &l.x);
  if (b.rank != 1 || b.size(0) != l.asked.n)
    refuse("bias is %s; [%lld] fits weight", b.shape().c_str(), (long long)l.asked.n);
  return b.data;
}

// linear_activation, or linear_add where there is a residual.
void linear(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* weight,
            const kpdeploy_tensor* bias, int activation, const kpdeploy_tensor* residual, const kpdeploy_tensor* out) {
  check_activation(activation);
  Linear l{};
  l.x = floats("x", x, 1);
  const Tensor w = weight_of("weight", weight, l.x);
  l.out = out_of(out, l.x, w.size(0));
  l.weight = {w.size(0), w.size(1), &w, nullptr};
  l.gate = kNoWeight;
  l.bias = vector_of("bias", bias, w.size(0), w);
  l.activation = activation;
  Tensor added{};
  if (residual) {
    if (!l.x.on_gpu()) refuse_unsupported("x is on the CPU, and this op has kernels for GPUs");
    added = floats_like("residual", residual, 1, l.x);
    same_sizes(added, l.out);
    l.residual = &added;
  }
  multiply(context, l);
}

}  // namespace
}  // namespace kpdeploy

using namespace kpdeploy;

bool kpdeploy::weights_are_constant() { return constant_weights; }

int kpdeploy_linear_activation(const kpdeploy_context* context, const kpdeploy_tensor* x,
                               const kpdeploy_tensor* weight, const kpdeploy_tensor* bias, int activation,
                               const kpdeploy_tensor* out) {
  return guarded(context, "linear_activation", [&] { linear(context, x, weight, bias, activation, nullptr, out); });
}

int kpdeploy_linear_add(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* weight,
                        const kpdeploy_tensor* bias, const kpdeploy_tensor* residual, const kpdeploy_tensor* out) {
  return guarded(context, "linear_add", [&] {
    if (!residual) refuse("residual is missing");
    linear(context, x, weight, bias, KPDEPLOY_NONE, residual, out);
  });
}

int kpdeploy_fp8_linear_add(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* weight,
                            const kpdeploy_tensor* x_scale, const kpdeploy_tensor* weight_scale,
                            const kpdeploy_tensor* bias, const kpdeploy_tensor* residual, const kpdeploy_tensor* out) {
  return guarded(context, "fp8_linear_add", [&] {
    const Fp8Linear l = fp8_linear_of("weight", x, weight, x_scale, "weight_scale", weight_scale, nullptr, out);
    CudaLinear c = l.asked;
    c.bias = fp8_bias_of(bias, l);
    const Tensor added = gpu_tensor("residual", residual, KPDEPLOY_BF16, 1, &l.x);
    same_sizes(added, l.out);
    c.residual = Rows(added).walk();
    if (l.out.numel() > 0) cuda_kernels()->fp8_linear(c, context->stream);
  });
}

int kpdeploy_fp8_linear_activation(const kpdeploy_context* context, const kpdeploy_tensor* x,
                                   const kpdeploy_tensor* weight, const kpdeploy_tensor* x_scale,
                                   const kpdeploy_tensor* weight_scale, const kpdeploy_tensor* bias,
                                   const kpdeploy_tensor* out_scale, int activation, const kpdeploy_tensor* out) {
  return guarded(context, "fp8_linear_activation", [&] {
    check_activation(activation);
    const Fp8Linear l = fp8_linear_of("weight", x, weight, x_scale, "weight_scale", weight_scale, out_scale, out);
    CudaLinear c = l.asked;
    c.bias = fp8_bias_of(bias, l);
    c.activation = activation;
    if (l.out.numel() > 0) cuda_kernels()->fp8_linear(c, context->stream);
  });
}

int kpdeploy_fp8_gated_linear(const kpdeploy_context* context, const kpdeploy_tensor* x,
                              const kpdeploy_tensor* gate_weight, const kpdeploy_tensor* up_weight,
                              const kpdeploy_tensor* x_scale, const kpdeploy_tensor* gate_scale,
                              const kpdeploy_tensor* up_scale, const kpdeploy_tensor* out_scale,
                              const kpdeploy_tensor* out) {
  return guarded(context, "fp8_gated_linear", [&] {
    const Fp8Linear l = fp8_linear_of("up_weight", x, up_weight, x_scale, "up_scale", up_scale, out_scale, out);
    CudaLinear c = l.asked;
    const Tensor gate = gpu_tensor("gate_weight", gate_weight, KPDEPLOY_F8, 2, &l.x);
    same_sizes(gate, l.weight);
    c.gate = {gate.data, gate.stride(0)};
    c.gate_scale = gpu_scales("gate_scale", gate_scale, c.n, l.x, &c.gate_scale_rows);
    c.gated = true;
    if (l.out.numel() > 0) cuda_kernels()->fp8_linear(c, context->stream);
  });
}

int kpdeploy_check_linear_activation(const kpdeploy_context* context, const kpdeploy_tensor* x,
                                     const kpdeploy_tensor* weight, const kpdeploy_tensor* bias, int activation) {
  return guarded(context, "linear_activation", [&] {
    check_activation(activation);
    const Tensor w = weight_of("weight", weight, floats("x", x, 1));
    vector_of("bias", bias, w.size(0), w);
  });
}

int kpdeploy_check_gated_linear(const kpdeploy_context* context, const kpdeploy_tensor* x,
                                const kpdeploy_tensor* gate_weight, const kpdeploy_tensor* up_weight) {
  return guarded(context, "gated_linear", [&] {
    const Tensor a = floats("x", x, 1);
    same_sizes(weight_of("gate_weight", gate_weight, a), weight_of("up_weight", up_weight, a));
  });
}

int kpdeploy_linear_activation_packed(const kpdeploy_context* context, const kpdeploy_tensor* x,
                                      const kpdeploy_packed_weight* weight, const kpdeploy_tensor* bias,
                                      int activation, const kpdeploy_tensor* out) {
  return guarded(context, "linear_activation", [&] {
    check_activation(activation);
    Linear l{};
    l.x = floats("x", x, 1);
    l.weight = packed_of("weight", weight, l.x);
    l.out = out_of(out, l.x, l.weight.n);
    l.gate = kNoWeight;
    l.bias = vector_of("bias", bias, l.weight.n, l.x);
    l.activation = activation;
    multiply(context, l);
  });
}

int kpdeploy_gated_linear(const kpdeploy_context* context, const kpdeploy_tensor* x,
                          const kpdeploy_tensor* gate_weight, const kpdeploy_tensor* up_weight,
                          const kpdeploy_tensor* out) {
  return guarded(context, "gated_linear", [&] {
    Linear l{};
    l.x = floats("x", x, 1);
    const Tensor gate = weight_of("gate_weight", gate_weight, l.x), up = weight_of("up_weight", up_weight, l.x);
    same_sizes(gate, up);
    l.out = out_of(out, l.x, up.size(0));
    l.weight = {up.size(0), up.size(1), &up, nullptr};
    l.gate = {gate.size(0), gate.size(1), &gate, nullptr};
    multiply(context, l);
  });
}

int kpdeploy_gated_linear_packed(const kpdeploy_context* context, const kpdeploy_tensor* x,
                                 const kpdeploy_packed_weight* gate_weight, const kpdeploy_packed_weight* up_weight,
                                 const kpdeploy_tensor* out) {
  return guarded(context, "gated_linear", [&] {
    Linear l{};
    l.x = floats("x", x, 1);
    l.gate = packed_of("gate_weight", gate_weight, l.x);
    l.weight = packed_of("up_weight", up_weight, l.x);
    if (l.gate.n != l.weight.n)
      refuse("gate_weight has %lld rows, and up_weight %lld", (long long)l.gate.n, (long long)l.weight.n);
    l.out = out_of(out, l.x, l.weight.n);
    multiply(context, l);
  });
}

int kpdeploy_pack_weight(const kpdeploy_context* context, const kpdeploy_tensor* weight,
                         kpdeploy_packed_weight** packed) {
  return guarded(context, "pack_weight", [&] {
    const Tensor w = floats("weight", weight, 2);
    if (w.rank != 2) refuse("weight is %s, not [N, K]", w.shape().c_str());
    if (w.on_gpu()) refuse("weight is on a GPU; packing is for the CPU");
    const int64_t panels = blocks(w.size(0), kernels().panel_columns);
    const size_t bytes = blocks(panels * kernels().panel_columns * w.size(1) * 4 + 64, 64) * 64;
    std::unique_ptr<kpdeploy_packed_weight> made(new kpdeploy_packed_weight{w.size(0), w.size(1), w.dtype,
                                                                            kernels().name, nullptr});
    made->panels = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (!made->panels) throw Refusal{KPDEPLOY_OUT_OF_MEMORY, "not enough memory to pack a weight"};
    if (w.numel() > 0) pack(context, w, 0, panels, made->panels);
    *packed = made.release();
  });
}

void kpdeploy_free_packed_weight(kpdeploy_packed_weight* packed) { delete packed; }

int kpdeploy_bias_activation(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* bias,
                             int activation, const kpdeploy_tensor* out) {
  return guarded(context, "bias_activation", [&] {
    check_activation(activation);
    const Tensor in = floats("x", x, 1), o = floats_like("out", out, 1, in);
    if (in.on_gpu()) refuse_unsupported("x is on a GPU, and this is for the CPU");
    same_sizes(o, in);
    const int64_t n = in.size(-1);
    const void* b = vector_of("bias", bias, n, in);
    if (in.numel() == 0) return;
    const Rows in_rows(in), out_rows(o);
    const int64_t per_task = std::max<int64_t>(1, (16 << 10) / n);
    parallel(context, blocks(in_rows.count(), per_task), [&](int64_t task) {
      for (int64_t r = task * per_task; r < std::min(in_rows.count(), (task + 1) * per_task); ++r)
        kernels().activate_row[in.dtype](in_rows.row(r), b, activation, out_rows.row(r), n);
      return true;
    });
  });
}

int kpdeploy_gate(const kpdeploy_context* context, const kpdeploy_tensor* gate, const kpdeploy_tensor* up,
                  const kpdeploy_tensor* out) {
  return guarded(context, "gate", [&] {
    const Tensor g = floats("gate", gate, 1), u = floats_like("up", up, 1, g), o = floats_like("out", out, 1, g);
    if (g.on_gpu()) refuse_unsupported("gate is on a GPU, and this is for the CPU");
    same_sizes(u, g);
    same_sizes(o, g);
    if (g.numel() == 0) return;
    const Rows gates(g), ups(u), outs(o);
    const int64_t n = g.size(-1), per_task = std::max<int64_t>(1, (16 << 10) / n);
    parallel(context, blocks(gates.count(), per_task), [&](int64_t task) {
      for (int64_t r = task * per_task; r < std::min(gates.count(), (task + 1) * per_task); ++r)
        kernels().gate_row[g.dtype](gates.row(r), ups.row(r), outs.row(r), n);
      return true;
    });
  });
}

int kpdeploy_activation_of(const char* name) {
  static const char* const kNames[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
  for (int i = 0; name && i < 5; ++i)
    if (!std::strcmp(name, kNames[i])) return i;
  return -1;
}

int kpdeploy_set_constant_weights(int constant) {
  const bool before = constant_weights;
  constant_weights = constant != 0;
  return before;
}
