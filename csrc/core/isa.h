// What one instruction set offers: a table of functions, filled by isa.cpp, which is compiled once for each of them.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kpdeploy {

// One row of a layer or RMS norm. `work` (n floats, never null) holds the row in f32 between passes; it may be `sum`
// itself, or `x` where nothing has to be stored. `streams`: f32 results are written past the caches, where `work` is
// neither; n and their addresses are whole vectors, and `last` is the last such row of a thread.
struct NormRow {
  const void* x;
  const void* residual;  // null: none
  const void* weight;
  const void* bias;  // null: none
  void* normalized;
  void* sum;  // null: none
  float* work;
  int64_t n;
  float eps;
  bool rms;
  bool streams, last;
};

// Tiles of A times panels of B (see linear_kernel.h for both layouts), `tile_rows` and `panel_columns` at a time.
struct MultiplyBlock {
  const float* a;       // tiles [k][tile_rows], tile_floats apart
  const float* b;       // panels [k][panel_columns], next to each other
  const float* b_gate;  // null, or as many other panels: the result is SiLU(A b_gate) * (A b)
  const void* bias;     // null, or [columns]
  void* out;            // [rows][columns]
  int64_t tile_floats, out_stride;
  int64_t rows_per_tile;  // 1 to tile_rows
  int64_t k, rows, columns;
  int activation;
  float* scratch;  // rows times columns, these rounded up to whole panels; twice that with b_gate
};

struct AttentionBlock {
  const void* query;  // [queries][head_size]
  const void* key;    // [keys][head_size]
  const void* value;  // [keys][head_size]
  void* out;          // [queries][head_size]
  int64_t query_stride, key_stride, value_stride, out_stride;
  int64_t queries, keys, head_size;
  int64_t first_visible;  // causal: query i sees keys 0 to first_visible + i - 1. Otherwise `keys`, with `causal` 0
  int causal;
  float scale;
  float* scratch;  // attention_scratch floats
};

struct Kernels {
  const char* name;
  int tile_rows;
  int panel_columns;
  // Indexed by kpdeploy_dtype, F32 and BF16.
  void (*norm_row[2])(const NormRow&);
  void (*pack_tile[2])(const void* x, int64_t stride, int rows, int64_t k, float* tile);
  void (*pack_panel[2])(const void* weight, int64_t stride, int columns, int64_t k, float* panel);
  void (*multiply_block[2])(const MultiplyBlock&);
  void (*dot_rows[2])(const void* x, const void* weight, int64_t k, float* result);
  // activation(product + bias), or SiLU(gate) * product.
  void (*finish_row[2])(const float* product, const float* gate, const void* bias, int activation, void* out,
                        int64_t n);
  void (*activate_row[2])(const void* x, const void* bias, int activation, void* out, int64_t n);
  void (*gate_row[2])(const void* gate, const void* up, void* out, int64_t n);
  int64_t (*attention_scratch)(int64_t queries, int64_t head_size);
  void (*attention_block[2])(const AttentionBlock&);
  void (*rotary_row[2])(const void* x, const float* cos, const float* sin, void* out, int64_t heads, int64_t size,
                        int64_t turned);
};

// The kernels of the chosen instruction set.
const Kernels& kernels();

}  // namespace kpdeploy
