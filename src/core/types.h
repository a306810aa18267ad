// The vocabulary of the library: element types, shapes and views. Leaf header: standard library only.
#pragma once
#include <cstddef>
#include <cstdint>

namespace machmoe {

// The numeric values are those of the C ABI (include/machmoe/machmoe.h).
enum class DType : int32_t { F32 = 0, BF16 = 1, F16 = 2, F64 = 3, I32 = 4, I64 = 5 };
enum class Device : int32_t { CPU = 0, CUDA = 1 };

// Where the rows of the grouped GEMMs come from, and how they return to tokens.
//   TopK:  R_cap = T K; token t owns the slots t K .. t K + K - 1 (per-token offsets are implicit).
//   Lists: any (token, expert, score) set; token t owns the slots token_offsets[t] .. token_offsets[t + 1] - 1.
//   Rows:  rows already dispatched and grouped by expert: row r is input row r and output row r, nothing is gathered or summed.
enum class RoutingKind : int32_t { TopK = 0, Lists = 1, Rows = 2 };

enum class ActivationKind : int32_t {
  SwiGLU = 0,
  SwiGLUOai = 1,
  GeGLU = 2,
  ReGLU = 3,  // gated: H has a gate and an up plane
  ReLU2 = 4,
  ReLU = 5,
  GELU = 6,
  GELUErf = 7,
  SiLU = 8,  // plain: H has one plane
};

struct Activation {
  ActivationKind kind = ActivationKind::SwiGLU;
  float alpha = 1.702f;  // swiglu_oai only
  float limit = 0.f;     // clamp of SwiGLU and swiglu_oai; 0 = none
  constexpr bool gated() const { return kind <= ActivationKind::ReGLU; }
};

constexpr size_t size_of(DType t) {
  switch (t) {
    case DType::BF16:
    case DType::F16: return 2;
    case DType::F32:
    case DType::I32: return 4;
    case DType::F64:
    case DType::I64: return 8;
  }
  return 0;
}

// The sizes and types of one experts layer. The row count R = sum(counts) lives on the device; R_cap bounds it on the host.
struct Shape {
  int64_t T = 0;      // tokens (Rows: equal to R_cap)
  int64_t d = 0;      // hidden size
  int64_t n = 0;      // intermediate size of one expert
  int64_t E = 0;      // experts
  int64_t K = 0;      // experts per token; TopK only, else 0
  int64_t R_cap = 0;  // capacity of every per-row buffer
  RoutingKind kind = RoutingKind::TopK;
  DType dtype = DType::BF16;  // X, W1, W2, biases, H, A, Y, O and their gradients
  Activation act;

  constexpr int64_t planes() const { return act.gated() ? 2 : 1; }                         // of H: gate and up, or one
  constexpr DType accum() const { return dtype == DType::F64 ? DType::F64 : DType::F32; }  // scores, dS, accumulation
};

// Element (e, i, j) of an [E, rows, cols] weight is base[e expert_stride + i row_stride + j]; strides in elements.
// This one view covers W1 concatenated, interleaved and as two tensors: gate and up are a view each.
template <class Void>
struct ExpertMatrix {
  Void* base = nullptr;
  int64_t row_stride = 0, expert_stride = 0;
};
// Element (e, i) of an [E, cols] bias is base[e expert_stride + i stride].
template <class Void>
struct ExpertVector {
  Void* base = nullptr;
  int64_t stride = 0, expert_stride = 0;
};

using ConstWeight = ExpertMatrix<const void>;
using MutableWeight = ExpertMatrix<void>;
using ConstBias = ExpertVector<const void>;
using MutableBias = ExpertVector<void>;

struct Stream {
  void* handle = nullptr;
};  // cudaStream_t; unused on the CPU

}  // namespace machmoe
