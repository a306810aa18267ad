// The contract between the host schedule and the backends: one plain Args struct per op, shapes in comments.
// R = sum(counts) rows are valid and grouped by expert; buffers hold R_cap. Tensors are row-major and contiguous unless a view says otherwise.
// dtype = Shape::dtype, accum = Shape::accum() (fp32; fp64 with fp64 data). validate() throws Error and reads no device memory.
#pragma once
#include "core/token_rounding.h"
#include "core/types.h"

namespace machmoe {

// Kernels number rows in int32 and look ahead by a few tiles.
constexpr int64_t kMaxRows = (int64_t{1} << 31) - 512;

// All pointers are memory of the backend's device.
struct Routing {
  int32_t* slot = nullptr;           // TopK [R_cap] row -> slot t K + k, ascending inside one expert
  int32_t* token = nullptr;          // Lists [R_cap] row -> token, ascending inside one expert
  int32_t* expert = nullptr;         // [R_cap] row -> expert; optional output of the index ops, read by token_round_backward alone
  void* score = nullptr;             // accum. TopK [T, K]: the weights themselves. Else [R_cap] in row order; null: every score is 1 (Rows only)
  int32_t* counts = nullptr;         // [E]
  int32_t* offsets = nullptr;        // [E + 1] exclusive sum of counts
  int32_t* token_offsets = nullptr;  // [T + 1] Lists only: slots of a token
  int32_t* inverse =
      nullptr;               // TopK [T K]: slot t K + k -> row, -1 if dropped. Lists [R_cap]: slots grouped by token, ascending row inside one token
  int32_t* tiles = nullptr;  // CUDA work lists (src/cuda/work.h); null on the CPU
};

// Which row of X (or dO) row r of the experts is: index[r] / divisor, without an index r itself.
struct RowSource {
  const int32_t* index = nullptr;
  int64_t divisor = 1;
  int64_t operator[](int64_t row) const { return index ? index[row] / divisor : row; }
};
inline RowSource row_source(const Shape& s, const Routing& r) {
  if (s.kind == RoutingKind::TopK) return {r.slot, s.K};
  return {r.token, 1};
}

// ---- routing metadata ---------------------------------------------------------------------------------------------------------
// Stable counting sort of the slots by expert. Ids outside [0, E) are dropped (CPU: a negative id or a duplicate pair is an error).
struct IndexTopkArgs {
  Shape shape;
  const void* ids;
  DType ids_dtype;  // [T, K] I32 or I64
  Routing out;
  void* scratch;              // Backend::index_scratch(shape)
  uint32_t* turns = nullptr;  // [1] CUDA: set to 0 for the products that follow; optional
};
// The same from (token, expert, score) triples in any order; rows of one expert in ascending token order.
struct IndexListsArgs {
  Shape shape;
  const void* token_ids;   // [R_cap] ids_dtype
  const void* expert_ids;  // [R_cap] ids_dtype; outside [0, E): dropped
  DType ids_dtype;         // I32 or I64
  const void* scores;      // [R_cap] accum; null: out.score is left alone
  int32_t* order;          // [R_cap] row -> list position, -1 past R; optional
  Routing out;
  void* scratch;
};
// Rows and ready-made Routings: offsets (and the CUDA work lists) from counts; Lists: also the inverse map from token.
struct IndexRowsArgs {
  Shape shape;
  Routing out;  // counts is the input
  void* scratch;
};

// ---- router ------------------------------------------------------------------------------------------------------------------
enum class RouterKind : int32_t {
  TopkSoftmax = 0,      // top-K of the logits, softmax over the selected
  SoftmaxTopk = 1,      // softmax over all experts, then top-K
  SoftmaxTopkNorm = 2,  // ... renormalised to sum 1
};
// Ties go to the lower expert id; weights are in descending order of the selection.
struct TopkArgs {
  int64_t T, E, K;
  RouterKind kind;
  const void* logits;
  DType logits_dtype;  // [T, E] F32, BF16, F16, F64
  int32_t* ids;        // [T, K]
  void* weights;       // [T, K] fp32 (fp64 with fp64 logits)
  int32_t* counts;     // [E]
  void* aux;           // [1] fp32 (fp64): load-balance loss E sum_e (counts_e / (T K)) mean_t softmax(logits)_te; optional
  void* scratch;       // Backend::topk_scratch
};
struct TopkBackwardArgs {
  int64_t T, E, K;
  RouterKind kind;
  const void* logits;
  DType logits_dtype;
  const int32_t* ids;     // [T, K] from the forward
  const void* weights;    // [T, K] from the forward
  const int32_t* counts;  // [E]
  const void* dweights;   // [T, K] fp32 (fp64); null: taken from the parts below
  const void* ds_parts;
  int64_t parts;  // [parts][R_cap] accum, summed in order through `inverse` (layer: no launch of its own)
  const int32_t* inverse;
  int64_t R_cap;     // [T K] slot -> row, -1 dropped
  const void* daux;  // [1] fp32 (fp64) on the device; null: no gradient from the load-balance loss
  void* dlogits;     // [T, E] logits_dtype
};

// ---- token rounding ----------------------------------------------------------------------------------------------------------
// Top-K of the scores, then every expert's rows rounded to a multiple of the tile: the lowest-scoring pairs dropped, or the
// best-scoring tokens that had not chosen it added. Ties go to the lower expert id (top-K) and the lower token id (selection).
// T < tile: plain top-K. Writes a complete Lists routing.
struct TokenRoundArgs {
  Shape shape;  // kind Lists, R_cap = rounded_capacity()
  int64_t K, tile;
  RoundingRule rule;
  bool renormalize;     // scores divided by their sum over the kept pairs of the token
  uint64_t seed;        // SrF, NrS
  const float* scores;  // [T, E] in [0, 1]
  Routing out;          // every member, expert included
  void* scratch;        // Backend::token_round_scratch(shape)
};
// dp of the scores from ds of the rows: 0 where a pair is not kept, else ds; renormalised, with s = p / sum p over the kept pairs of the token,
// dp = (ds - <ds, s>) / sum p. A token whose kept scores sum to 0 was not renormalised.
struct TokenRoundBackwardArgs {
  Shape shape;  // kind Lists
  bool renormalize;
  const float* scores;  // [T, E] of the forward; read with renormalize alone
  Routing routing;      // from the forward, expert included
  const float* dscore;  // [R_cap], not read past R
  float* dscores;       // [T, E]
};

// ---- experts ------------------------------------------------------------------------------------------------------------------
// turns: CUDA alone. The products count in it; 0 before and after each. Two that share it must not run at once.
// A kernel: H = gather(X) W1^T + b1, A = act(H).
struct UpProjArgs {
  Shape shape;
  Routing routing;
  const void* x;               // [T, d]
  ConstWeight w1_gate, w1_up;  // [E, n, d] each; plain activations: w1_up alone
  ConstBias b1_gate, b1_up;    // [E, n] each, base null: none
  void* h;                     // [R_cap, planes, n], null: not stored
  void* a;                     // [R_cap, n], null: not stored (recompute)
  uint32_t* turns = nullptr;   // [1] see above
};
// Y kernel: Y = A W2^T. Rows: Y = s (A W2^T + b2), and rows R .. R_cap - 1 of Y are zeroed.
struct DownProjArgs {
  Shape shape;
  Routing routing;
  const void* a;              // [R_cap, n]
  ConstWeight w2;             // [E, d, n]
  ConstBias b2;               // [E, d], read here for Rows only
  void* y;                    // [R_cap, d]
  uint32_t* turns = nullptr;  // [1]
};
// The final sum of dS over column tiles: TopK writes slot order [T, K] (0 for dropped slots), Lists and Rows row order [R_cap] (0 past R).
struct ScoreGradArgs {
  Shape shape;
  Routing routing;
  const void* ds_parts;
  int64_t parts;  // [parts][R_cap] accum
  void* dscore;
  DType dscore_dtype;
};
// O and dX kernels, TopK and Lists: out_t = addend_t + sum over the slots of t, in slot order, of (s) (y_row + b2_e).
struct AggregateArgs {
  Shape shape;
  Routing routing;
  const void* y;       // [R_cap, d]
  bool weighted;       // true: O = sum s y; false: dX = sum y
  ConstBias b2;        // weighted only, base null: none
  const void* addend;  // [T, d] dtype, null: none
  void* out;           // [T, d]
};
// dH kernel: dA' = gather(dO) W2; A = act(H); dS = <dA', A> + <dO, b2>; dH = act'(H) s dA'; A' = s A.
struct DownProjBwdArgs {
  Shape shape;
  Routing routing;
  const void* d_o;            // [T, d]
  ConstWeight w2;             // [E, d, n]
  ConstBias b2;               // [E, d], base null: none
  const void* h;              // [R_cap, planes, n]
  void* dh;                   // [R_cap, planes, n]; may be h itself
  void* a_prime;              // [R_cap, n]
  void* ds_parts;             // [Backend::ds_parts(shape)][R_cap] accum
  uint32_t* turns = nullptr;  // [1]
};
// dX~ kernel: dX~ = dH W1. Rows: rows R .. R_cap - 1 are zeroed.
struct UpProjBwdArgs {
  Shape shape;
  Routing routing;
  const void* dh;              // [R_cap, planes, n]
  ConstWeight w1_gate, w1_up;  // [E, n, d] each
  void* dx_rows;               // [R_cap, d]
  uint32_t* turns = nullptr;   // [1]
};
// Weight gradients (varlen-K: the rows of an expert are the reduction). Experts without rows get zeros, or keep the accumulator.
struct WeightGradW2Args {  // dW2_e = gather(dO)^T A'
  Shape shape;
  Routing routing;
  const void* d_o;            // [T, d]
  const void* a_prime;        // [R_cap, n]
  MutableWeight dw2;          // [E, d, n] out_dtype
  DType out_dtype;            // dtype or F32
  bool accumulate;            // dw2 += ...
  uint32_t* turns = nullptr;  // [1]
};
struct WeightGradW1Args {  // dW1_e = dH^T gather(X)
  Shape shape;
  Routing routing;
  const void* x;                   // [T, d]
  const void* dh;                  // [R_cap, planes, n]
  MutableWeight dw1_gate, dw1_up;  // [E, n, d] each, out_dtype
  DType out_dtype;
  bool accumulate;
  uint32_t* turns = nullptr;  // [1]
};
struct BiasGradArgs {  // db1_e = sum dH, db2_e = sum s dO; a null base skips that bias
  Shape shape;
  Routing routing;
  const void* dh;                // [R_cap, planes, n]
  const void* d_o;               // [T, d]
  MutableBias db1_gate, db1_up;  // [E, n] each, out_dtype
  MutableBias db2;               // [E, d] out_dtype
  DType out_dtype;
  bool accumulate;
};

void validate_router(int64_t T, int64_t E, int64_t K, RouterKind, DType logits_dtype);
void check_scores(const Shape&, const Routing&);  // top-K weights are given
void validate_routing(const Shape&);              // T, E, K, R_cap and kind: what routing metadata depends on
void validate(const Shape&);                      // ... and d, n, dtype, activation
void validate(const IndexTopkArgs&);
void validate(const IndexListsArgs&);
void validate(const IndexRowsArgs&);
void validate(const TokenRoundArgs&);
void validate(const TokenRoundBackwardArgs&);
void validate(const TopkArgs&);
void validate(const TopkBackwardArgs&);
void validate(const UpProjArgs&);
void validate(const DownProjArgs&);
void validate(const ScoreGradArgs&);
void validate(const AggregateArgs&);
void validate(const DownProjBwdArgs&);
void validate(const UpProjBwdArgs&);
void validate(const WeightGradW2Args&);
void validate(const WeightGradW1Args&);
void validate(const BiasGradArgs&);

}  // namespace machmoe
