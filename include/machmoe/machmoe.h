/* machmoe: Mixture-of-Experts layers, C ABI.
 *
 * Rules that hold for every call:
 *  - The caller owns all memory. Sizes come from the *_bytes functions, which are pure host functions of the descriptor.
 *  - Every descriptor starts with struct_size = sizeof(its type), also one that a call fills: older callers keep working with newer libraries.
 *    Zero-initialise descriptors and set struct_size, 0 is refused; any other zero field is "none" or the documented default.
 *  - Calls return a status. On failure machmoe_last_error() holds one sentence: the argument, what came, what was expected, the fix.
 *  - CUDA calls run on the current device and the given stream, never synchronise, and can be captured in a CUDA graph.
 *  - Tensors are row-major and contiguous unless a stride says otherwise; strides count elements.
 *  - Workspaces and metadata are aligned to 256 bytes on CUDA, to 16 on the CPU. What else CUDA wants aligned says the comment of the field.
 * Symbols are those of arXiv 2512.14080: X, W1, H, A, W2, Y, O, S; T tokens, d hidden, n intermediate, E experts, K active. */
#ifndef MACHMOE_H
#define MACHMOE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MACHMOE_VERSION_MAJOR 0
#define MACHMOE_VERSION_MINOR 1
#define MACHMOE_VERSION_PATCH 0
#define MACHMOE_API __attribute__((visibility("default")))

typedef enum machmoe_status {
  MACHMOE_OK = 0,
  MACHMOE_INVALID_ARGUMENT = 1,
  MACHMOE_UNSUPPORTED = 2,
  MACHMOE_WORKSPACE_TOO_SMALL = 3,
  MACHMOE_OUT_OF_MEMORY = 4,
  MACHMOE_BACKEND_ERROR = 5,
  MACHMOE_INTERNAL_ERROR = 6
} machmoe_status;

typedef enum machmoe_dtype { MACHMOE_F32 = 0, MACHMOE_BF16 = 1, MACHMOE_F16 = 2, MACHMOE_F64 = 3, MACHMOE_I32 = 4, MACHMOE_I64 = 5 } machmoe_dtype;
typedef enum machmoe_device { MACHMOE_CPU = 0, MACHMOE_CUDA = 1 } machmoe_device;

/* Value and derivative: src/core/activation.h. g = gate, u = up column of H. */
typedef enum machmoe_activation {
  MACHMOE_SWIGLU = 0,     /* silu(g) u; limit > 0: g = min(g, limit), u = clamp(u, -limit, limit) */
  MACHMOE_SWIGLU_OAI = 1, /* g = min(g, limit), u = clamp(u, -limit, limit), (u + 1) g sigmoid(alpha g); gpt-oss: alpha 1.702, limit 7 */
  MACHMOE_GEGLU = 2,      /* gelu_tanh(g) u */
  MACHMOE_REGLU = 3,      /* relu(g) u */
  MACHMOE_RELU2 = 4,      /* relu(u)^2; this and the following have no gate */
  MACHMOE_RELU = 5,
  MACHMOE_GELU = 6, /* tanh form */
  MACHMOE_GELU_ERF = 7,
  MACHMOE_SILU = 8
} machmoe_activation;

typedef enum machmoe_routing_kind {
  MACHMOE_TOPK = 0,  /* ids and weights [T, K], pair (t, k) is slot t K + k; row_capacity = T K */
  MACHMOE_LISTS = 1, /* any (token, expert, score) set of at most row_capacity entries */
  MACHMOE_ROWS = 2   /* rows already dispatched and grouped by expert; T = row_capacity; output row r belongs to input row r */
} machmoe_routing_kind;

typedef enum machmoe_router {
  MACHMOE_TOPK_SOFTMAX = 0,     /* top-K of the logits, softmax over the selected */
  MACHMOE_SOFTMAX_TOPK = 1,     /* softmax over all experts, then top-K */
  MACHMOE_SOFTMAX_TOPK_NORM = 2 /* ... renormalised to sum 1 */
} machmoe_router;

/* Which multiple of the tile an expert's row count f is rounded to (arXiv 2512.14080, section 5 and appendix). */
typedef enum machmoe_rounding {
  MACHMOE_NR_F = 0, /* nearest */
  MACHMOE_SR_F = 1, /* up with probability (f - down) / tile */
  MACHMOE_NR_S = 2, /* up with probability by the scores of the ranks between down and up */
  MACHMOE_UP = 3,
  MACHMOE_DOWN = 4,
  MACHMOE_BALANCE_F = 5 /* running residual over the experts: the total stays within half a tile of T K */
} machmoe_rounding;

/* One experts layer. dtype: CPU F32, BF16, F64 (slow specification); CUDA BF16. Scores are F32 (F64 with F64 data). */
typedef struct machmoe_layer {
  size_t struct_size;
  int32_t device, dtype, activation, routing_kind;
  float alpha, limit;    /* of the activation; alpha 0 = 1.702 */
  int64_t T, d, n, E, K; /* K: TOPK only */
  int64_t row_capacity;  /* TOPK: T K */
} machmoe_layer;

/* Element (e, i, j) of an [E, rows, cols] weight: base[e expert_stride + i row_stride + j]. E = 1: expert_stride may be anything, as in a vector.
 * CUDA: base and strides are multiples of 16 bytes.
 * W1 concatenated [E, 2n, d]: gate {w, d, 2nd}, up {w + n d, d, 2nd}. Interleaved (row 2i gate, 2i + 1 up): gate {w, 2d, 2nd}, up {w + d, 2d, 2nd}. */
typedef struct machmoe_matrix {
  void* base;
  int64_t row_stride, expert_stride;
} machmoe_matrix;
/* Element (e, i) of an [E, cols] bias: base[e expert_stride + i stride]. */
typedef struct machmoe_vector {
  void* base;
  int64_t stride, expert_stride;
} machmoe_vector;

typedef struct machmoe_weights {
  size_t struct_size;
  machmoe_matrix w1_gate, w1_up; /* [E, n, d] each; activations without gate: w1_up alone */
  machmoe_matrix w2;             /* [E, d, n] */
  machmoe_vector b1_gate, b1_up; /* [E, n] each, optional */
  machmoe_vector b2;             /* [E, d], optional */
} machmoe_weights;

/* Routing metadata: views into one buffer of machmoe_routing_bytes(), or the caller's own arrays (LISTS, ROWS: then call machmoe_routing_complete).
 * Rows are grouped by expert. TOPK: machmoe_routing_carve leaves score null. Set it to the top-K weights, which must live, unchanged, until the last
 * backward. CUDA: every array is aligned to 16 bytes. */
typedef struct machmoe_routing {
  size_t struct_size;
  int32_t* slot;          /* TOPK [row_capacity] row -> slot, ascending inside one expert */
  int32_t* token;         /* LISTS [row_capacity] row -> token in [0, T), ascending inside one expert */
  int32_t* expert;        /* [row_capacity] row -> expert; optional output, read by machmoe_token_round_backward alone */
  void* score;            /* F32 (F64). TOPK [T, K]; else [row_capacity] in row order, null with ROWS: 1 */
  int32_t* counts;        /* [E] rows of each expert; R = their sum, on the device */
  int32_t* offsets;       /* [E + 1] */
  int32_t* token_offsets; /* [T + 1] LISTS only */
  int32_t* inverse;       /* [row_capacity] slot -> row, -1 dropped; LISTS: slots grouped by token */
  int32_t* tiles;         /* CUDA work lists, else null */
} machmoe_routing;

/* ---- library ------------------------------------------------------------------------------------------------------------- */
MACHMOE_API void machmoe_version(int* major, int* minor, int* patch);
MACHMOE_API const char* machmoe_last_error(void); /* of this thread; "" after a success */
MACHMOE_API const char* machmoe_status_name(machmoe_status status);
MACHMOE_API int machmoe_device_available(machmoe_device device);      /* 1 or 0 */
MACHMOE_API const char* machmoe_device_reason(machmoe_device device); /* why not, "" when available */
MACHMOE_API const char* machmoe_build_info(void);                     /* one line: version, compiler, oneDNN, CUDA */
MACHMOE_API void machmoe_set_num_threads(int threads);                /* CPU backend; 0 = all cores. Results do not depend on it */
MACHMOE_API int machmoe_get_num_threads(void);
/* Lends the CPU backend the threads of a host program: run(threads, work, context) calls work(context) on up to `threads` threads at once and
 * returns when all calls have returned; fewer calls are fine, one at least. Null: back to the library's own threads. */
typedef void (*machmoe_runner)(int threads, void (*work)(void* context), void* context);
MACHMOE_API void machmoe_set_runner(machmoe_runner run);

/* ---- router -------------------------------------------------------------------------------------------------------------- */
typedef struct machmoe_route {
  size_t struct_size;
  int32_t device, router, logits_dtype;
  int64_t T, E, K;
  const void* logits; /* [T, E] F32, BF16, F16, F64 */
  int32_t* ids;       /* [T, K] descending score, ties to the lower id */
  void* weights;      /* [T, K] F32 (F64) */
  int32_t* counts;    /* [E] */
  void* aux;          /* [1] F32 (F64) load-balance loss, optional */
} machmoe_route;
MACHMOE_API machmoe_status machmoe_route_workspace_bytes(const machmoe_route*, size_t* bytes);
MACHMOE_API machmoe_status machmoe_route_forward(const machmoe_route*, void* workspace, size_t bytes, void* stream);

typedef struct machmoe_route_grad {
  size_t struct_size;
  const void* dweights; /* [T, K] F32 (F64); null: dS is taken from the workspace of a machmoe_backward in phase ACTIVATION */
  const void* daux;     /* [1] F32 (F64), optional */
  void* dlogits;        /* [T, E] logits_dtype */
} machmoe_route_grad;
/* layer, routing, backward_workspace: those of the machmoe_backward that left dS; all null when dweights is given. */
MACHMOE_API machmoe_status machmoe_route_backward(const machmoe_route*, const machmoe_route_grad*, const machmoe_layer*, const machmoe_routing*,
                                                  void* backward_workspace, void* stream);

/* ---- routing metadata ---------------------------------------------------------------------------------------------------- */
MACHMOE_API machmoe_status machmoe_routing_bytes(const machmoe_layer*, int with_expert, size_t* metadata_bytes, size_t* workspace_bytes);
/* out.struct_size says how much of it is written. */
MACHMOE_API machmoe_status machmoe_routing_carve(const machmoe_layer*, int with_expert, void* metadata, machmoe_routing* out);
/* ids [T, K] I32 or I64. Ids outside [0, E) are dropped; negative ids and duplicates are an error on the CPU. out.score is neither read nor written. */
MACHMOE_API machmoe_status machmoe_routing_from_topk(const machmoe_layer*, const void* ids, int32_t ids_dtype, const machmoe_routing* out,
                                                     void* workspace, size_t bytes, void* stream);
/* row_capacity triples in any order; scores F32 (F64), optional. */
MACHMOE_API machmoe_status machmoe_routing_from_lists(const machmoe_layer*, const void* token_ids, const void* expert_ids, int32_t ids_dtype,
                                                      const void* scores,
                                                      int32_t* order /* [row_capacity] row -> list position, -1 past R; optional */,
                                                      const machmoe_routing* out, void* workspace, size_t bytes, void* stream);
/* ROWS, or ready-made arrays: offsets (and tiles) from counts; LISTS also token_offsets and inverse from token, whose
 * values in rows below R must lie in [0, T). */
MACHMOE_API machmoe_status machmoe_routing_complete(const machmoe_layer*, const machmoe_routing* io, void* workspace, size_t bytes, void* stream);

/* Token rounding: top-K of the scores, then each expert's rows rounded to a multiple of `tile` by dropping its worst pairs or adding
 * the best tokens that had not chosen it; down where up exceeds T. T < tile: plain top-K. Ties to the lower expert and token id. */
typedef struct machmoe_token_round_options {
  size_t struct_size;
  int64_t K, tile;
  int32_t rule;        /* machmoe_rounding */
  int32_t renormalize; /* 1: scores are divided by their sum over the kept pairs of the token */
  uint64_t seed;       /* SR_F, NR_S: Philox keyed by (seed, expert) */
} machmoe_token_round_options;
/* Rows that a rounded routing may need: the row_capacity of its layer. */
MACHMOE_API machmoe_status machmoe_rounded_capacity(int64_t T, int64_t E, int64_t K, int64_t tile, int32_t rule, int64_t* row_capacity);
MACHMOE_API machmoe_status machmoe_token_round_workspace_bytes(const machmoe_layer*, size_t* bytes);
/* scores [T, E] F32 in [0, 1]. The layer is LISTS of machmoe_rounded_capacity(); the routing is carved with_expert and comes out complete. */
MACHMOE_API machmoe_status machmoe_token_round(const machmoe_layer*, const machmoe_token_round_options*, const float* scores,
                                               const machmoe_routing* out, void* workspace, size_t bytes, void* stream);
/* dscores [T, E] F32, 0 where a pair was not kept, from dscore [row_capacity] F32 (not read past R), the gradient of the routing's score.
 * layer, renormalize, scores, routing: those of the machmoe_token_round, expert included; scores may be null without renormalize. */
MACHMOE_API machmoe_status machmoe_token_round_backward(const machmoe_layer*, int renormalize, const float* scores, const machmoe_routing*,
                                                        const float* dscore, float* dscores, void* stream);

/* ---- experts ------------------------------------------------------------------------------------------------------------- */
typedef struct machmoe_forward_io {
  size_t struct_size;
  const void* x;      /* [T, d]; CUDA: x, addend, h and o are aligned to 16 bytes */
  const void* addend; /* [T, d] added to O, optional; not with ROWS */
  void* h;            /* [row_capacity, 2 or 1, n] saved for the backward; null: inference or recompute */
  void* o;            /* [T, d]; ROWS: [row_capacity, d], rows past R are zero */
  /* 1, TOPK: the routing is made first, from ids as by machmoe_routing_from_topk, in the workspace of this call. 0: it is complete. */
  int32_t from_topk;
  int32_t ids_dtype;
  const void* topk_ids; /* [T, K] */
} machmoe_forward_io;
MACHMOE_API machmoe_status machmoe_forward_workspace_bytes(const machmoe_layer*, size_t* bytes);
MACHMOE_API machmoe_status machmoe_forward(const machmoe_layer*, const machmoe_routing*, const machmoe_weights*, const machmoe_forward_io*,
                                           void* workspace, size_t bytes, void* stream);

/* Phases may be called apart on one workspace, ACTIVATION first: the router's backward belongs between ACTIVATION and INPUT, for dX~ may lie over dS;
 * WEIGHT may be delayed as long as the workspace, x, d_o, dh and the routing with its score live. INPUT and WEIGHT may run at once on two streams,
 * two calls of one phase may not. */
enum { MACHMOE_PHASE_ACTIVATION = 1, MACHMOE_PHASE_WEIGHT = 2, MACHMOE_PHASE_INPUT = 4, MACHMOE_PHASE_ALL = 7 };
typedef struct machmoe_backward_io {
  size_t struct_size;
  const void* x;                        /* [T, d]; CUDA: x, h, d_o, addend, dx and dh are aligned to 16 bytes */
  const void* h;                        /* from the forward; null: recomputed from x */
  const void* d_o;                      /* [T, d] */
  const void* addend;                   /* [T, d] added to dX, optional; not with ROWS */
  void* dx;                             /* [T, d], optional */
  void* dscore;                         /* TOPK: [T, K], else [row_capacity]; optional; written in phase ACTIVATION */
  int32_t dscore_dtype;                 /* F32, BF16, F16, F64 */
  int32_t grad_dtype;                   /* of the weight and bias gradients: the layer's dtype or F32 */
  int32_t accumulate;                   /* 1: gradients are added to what is there */
  machmoe_matrix dw1_gate, dw1_up, dw2; /* base null: not wanted */
  machmoe_vector db1_gate, db1_up, db2;
  void* dh; /* [row_capacity, 2 or 1, n] takes dH, the same in every phase, optional: the workspace does else. h itself where H is not needed again */
} machmoe_backward_io;
/* with_dh: io.dh is given. phases: of one call. A workspace for several calls has the largest of their sizes; dX~ lies over A' where INPUT
 * and WEIGHT are one call. */
MACHMOE_API machmoe_status machmoe_backward_workspace_bytes(const machmoe_layer*, int with_dh, uint32_t phases, size_t* bytes);
MACHMOE_API machmoe_status machmoe_backward(const machmoe_layer*, const machmoe_routing*, const machmoe_weights*, const machmoe_backward_io*,
                                            uint32_t phases, void* workspace, size_t bytes, void* stream);

#ifdef __cplusplus
}
#endif
#endif
