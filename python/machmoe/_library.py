"""Loads the operators and gives each a fake: the shapes and dtypes of its results, for torch.compile and meta tensors."""

import pathlib
import re

import torch

_FILE = pathlib.Path(__file__).with_name("libmachmoe_torch.so")
if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 11):
    raise ImportError(f"torch is {torch.__version__}, expected 2.11 or later: the operators use its stable ABI; pip install -U torch")
if not _FILE.exists():
    raise ImportError(f"{_FILE.name} is not in {_FILE.parent}: build it with ./dev build, or install machmoe with pip")
torch.ops.load_library(str(_FILE))
ops = torch.ops.machmoe

TOPK, LISTS, ROWS = 0, 1, 2  # machmoe_routing_kind
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # machmoe_dtype
INDEX_DTYPES = (torch.int32, torch.int64)
_FLOATS = {code: dtype for dtype, code in DTYPES.items()}
GATED_ACTIVATIONS = 4  # machmoe_activation below this has a gate


def accum_of(dtype):
    """The dtype of scores and accumulation beside data of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _aligned(count):
    return (count + 63) // 64 * 64  # 256 bytes, in int32


def metadata_layout(kind, num_tokens, num_experts, capacity, *, cuda, f64=False):
    """Where the arrays of a routing lie in its metadata, in int32: {name: (start, length)} and the total. Mirrors book_routing in src/moe.cpp."""
    parts = {"counts": num_experts, "offsets": num_experts + 1}
    if cuda:
        experts_with_rows = min(num_experts, capacity)  # torch.sym_min of plain sizes cannot be traced
        parts["tiles"] = 4 + 4 * num_experts + 4 * (capacity // 128 + experts_with_rows)  # src/cuda/work.h
    if kind == TOPK:
        parts |= {"inverse": capacity, "slot": capacity}
    if kind == LISTS:
        parts |= {"inverse": capacity, "token": capacity, "score": capacity * (2 if f64 else 1), "token_offsets": num_tokens + 1}
    layout, start = {}, 0
    for name, length in parts.items():
        layout[name] = (start, length)
        start += _aligned(length)
    return layout, start


def rounded_capacity(num_tokens, num_experts, k, tile, rule):
    """Rows that token rounding may need: the mirror of rounded_capacity in src/core/token_rounding.h."""
    if num_tokens < tile:
        return num_tokens * k
    extra = {0: num_experts * (tile // 2), 4: 0, 5: tile // 2}.get(rule, num_experts * (tile - 1))
    return torch.sym_min(num_tokens * k + extra, num_tokens * num_experts)


@torch.library.register_fake("machmoe::routing_lists")
def _(token_ids, expert_ids, scores, num_tokens, num_experts):
    capacity = token_ids.shape[0]
    _, size = metadata_layout(LISTS, num_tokens, num_experts, capacity, cuda=token_ids.is_cuda, f64=scores.dtype == torch.float64)
    return tuple(token_ids.new_empty(length, dtype=torch.int32) for length in (size, capacity, capacity))


@torch.library.register_fake("machmoe::routing_rows")
def _(counts, rows):
    _, size = metadata_layout(ROWS, rows.shape[0], counts.shape[0], rows.shape[0], cuda=rows.is_cuda)
    return counts.new_empty(size, dtype=torch.int32)


@torch.library.register_fake("machmoe::token_round")
def _(scores, k, tile, rule, renormalize, seed):
    tokens, experts = scores.shape
    capacity = rounded_capacity(tokens, experts, k, tile, rule)
    _, size = metadata_layout(LISTS, tokens, experts, capacity, cuda=scores.is_cuda)
    return scores.new_empty(size, dtype=torch.int32), scores.new_empty(capacity, dtype=torch.int32)


@torch.library.register_fake("machmoe::token_round_backward")
def _(d_score, scores, metadata, expert, renormalize):
    return scores.new_empty(scores.shape)


@torch.library.register_fake("machmoe::route_forward")
def _(logits, k, router):
    tokens, experts = logits.shape
    accum = accum_of(logits.dtype)
    return (
        logits.new_empty((tokens, k), dtype=torch.int32),
        logits.new_empty((tokens, k), dtype=accum),
        logits.new_empty(experts, dtype=torch.int32),
        logits.new_empty((), dtype=accum),
    )


@torch.library.register_fake("machmoe::route_backward")
def _(dweights, daux, logits, ids, weights, counts, router):
    return logits.new_empty(logits.shape)


# Results that are not wanted are None, undefined tensors in the library.
def _forward(x, w2, rows, activation, save_h):
    planes = 2 if activation < GATED_ACTIVATIONS else 1
    return x.new_empty(x.shape), x.new_empty((rows, planes, w2.shape[2])) if save_h else None


@torch.library.register_fake("machmoe::experts_forward")
def _(x, w1, w1_up, w2, b1, b1_up, b2, addend, metadata, counts, score, kind, activation, alpha, limit, interleaved, save_h):
    return _forward(x, w2, score.shape[0] if kind == LISTS else x.shape[0], activation, save_h)


@torch.library.register_fake("machmoe::topk_experts_forward")
def _(x, w1, w1_up, w2, b1, b1_up, b2, addend, ids, weights, activation, alpha, limit, interleaved, save_h):
    tokens, k = ids.shape
    _, size = metadata_layout(TOPK, tokens, w2.shape[0], tokens * k, cuda=x.is_cuda)
    return *_forward(x, w2, tokens * k, activation, save_h), ids.new_empty(size, dtype=torch.int32)


def _like(tensor, needed):
    return tensor.new_empty(tensor.shape) if needed and tensor is not None else None


@torch.library.register_fake("machmoe::experts_backward")
@torch.library.register_fake("machmoe::experts_backward_")
def _(d_o, x, w1, w1_up, w2, b1, b1_up, b2, h, metadata, counts, score, kind, k, activation, alpha, limit, interleaved,
      need_dx, need_w1, need_w2, need_b1, need_b2, score_dtype):  # fmt: skip
    shape = (x.shape[0], k) if kind == TOPK else score.shape if kind == LISTS else x.shape[:1]
    dscore = x.new_empty(shape, dtype=_FLOATS[score_dtype]) if score_dtype >= 0 else None
    pairs = ((x, need_dx), (w1, need_w1), (w1_up, need_w1), (w2, need_w2), (b1, need_b1), (b1_up, need_b1), (b2, need_b2))
    return *(_like(*pair) for pair in pairs), dscore


@torch.library.register_fake("machmoe::layer_backward")
@torch.library.register_fake("machmoe::layer_backward_")
def _(d_o, daux, x, router_w, w1, w1_up, w2, b1, b1_up, b2, h, metadata, logits, ids, weights, route_counts, router, activation, alpha, limit,
      interleaved, need_w1, need_w2, need_b1, need_b2):  # fmt: skip
    pairs = ((w1, need_w1), (w1_up, need_w1), (w2, need_w2), (b1, need_b1), (b1_up, need_b1), (b2, need_b2))
    return x.new_empty(x.shape), router_w.new_empty(router_w.shape), *(_like(*pair) for pair in pairs)
