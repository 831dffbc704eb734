// Compiled once for each instruction set, with KPDEPLOY_ISA (its name) and KPDEPLOY_WIDTH (floats in a vector).
// All code is in a namespace of that name; headers with inline functions of their own stay out (see vector.h).

#include "isa.h"

#include "kpdeploy.h"

#define KPDEPLOY_TEXT_OF(name) #name
#define KPDEPLOY_TEXT(name) KPDEPLOY_TEXT_OF(name)

namespace kpdeploy {
namespace KPDEPLOY_ISA {
namespace {

#include "vector.h"
// after vector.h
#include "linear_kernel.h"
#include "norm_kernel.h"
// after linear_kernel.h
#include "attention_kernel.h"
#include "rotary_kernel.h"

}  // namespace

extern const Kernels table;
const Kernels table = {
    KPDEPLOY_TEXT(KPDEPLOY_ISA),
    kTileRows,
    kPanel,
    {norm_row<float>, norm_row<bf16>},
    {pack_tile<float>, pack_tile<bf16>},
    {pack_panel<float>, pack_panel<bf16>},
    {multiply_block<float>, multiply_block<bf16>},
    {dot_rows<float>, dot_rows<bf16>},
    {finish_row<float>, finish_row<bf16>},
    {activate_row<float>, activate_row<bf16>},
    {gate_row<float>, gate_row<bf16>},
    attention_scratch,
    {attention_block<float>, attention_block<bf16>},
    {rotary_row<float>, rotary_row<bf16>},
};

}  // namespace KPDEPLOY_ISA
}  // namespace kpdeploy
