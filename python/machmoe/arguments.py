"""Names and checks of arguments: one sentence names the argument, what came, what was expected, and the fix."""

import torch

from ._library import DTYPES, GATED_ACTIVATIONS, INDEX_DTYPES

ACTIVATIONS = {"swiglu": 0, "swiglu_oai": 1, "geglu": 2, "reglu": 3, "relu2": 4, "relu": 5, "gelu": 6, "gelu_erf": 7, "silu": 8}
ROUTERS = {"topk_softmax": 0, "softmax_topk": 1, "softmax_topk_norm": 2}
LAYOUTS = ("concatenated", "interleaved")
RULES = {"nr_f": 0, "sr_f": 1, "nr_s": 2, "up": 3, "down": 4, "balance_f": 5}  # machmoe_rounding
NAMES = ("x", "w1", "w1[1]", "w2", "b1", "b1[1]", "b2", "addend")  # of the tensors that layer_arguments returns
# dtypes of x and the weights on each device
DATA_DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float64), "cuda": (torch.bfloat16,)}


def check_choice(value, name, known):
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def check_device(reference, reference_name, **tensors):
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(
                f"{name} is on {tensor.device}, expected {reference.device} as {reference_name}: move it with .to({str(reference.device)!r})"
            )


def check_index(ids, name):
    if ids.dtype not in INDEX_DTYPES:
        raise ValueError(f"{name} is {ids.dtype}, expected torch.int32 or torch.int64: cast it with .int()")


def check_score(scores, name):
    if scores.dtype not in DTYPES:
        raise ValueError(f"{name} is {scores.dtype}, expected torch.float32, bfloat16, float16 or float64: cast it with .float()")


def _pair(value, name):
    if not isinstance(value, (tuple, list)):
        return value, None
    if len(value) != 2:
        raise ValueError(f"{name} is a sequence of {len(value)} tensors, expected one tensor or a pair (gate, up)")
    return value


def layer_arguments(x, w1, w2, b1, b2, addend, activation, w1_layout, alpha, limit):
    """Checked and cast arguments: [x, w1, w1_up, w2, b1, b1_up, b2, addend], (activation, alpha, limit, interleaved)."""
    check_choice(activation, "activation", ACTIVATIONS)
    if w1_layout not in LAYOUTS:
        raise ValueError(f"w1_layout is {w1_layout!r}, expected one of {', '.join(LAYOUTS)}; a pair (gate, up) needs none")
    gated = ACTIVATIONS[activation] < GATED_ACTIVATIONS
    (w1, w1_up), (b1, b1_up) = _pair(w1, "w1"), _pair(b1, "b1")
    if b1 is not None and (b1_up is None) != (w1_up is None):
        raise ValueError("one of w1 and b1 is a pair, expected both to be one tensor, or both a pair (gate, up)")
    if x.dim() != 2 or w1.dim() != 3 or w2.dim() != 3:
        raise ValueError(f"x, w1, w2 have shapes {tuple(x.shape)}, {tuple(w1.shape)}, {tuple(w2.shape)}, expected [T, d], [E, 2n, d], [E, d, n]")
    num_experts, d, n = w2.shape
    if w1_up is not None and not gated:
        raise ValueError(f"w1 is a pair, expected one tensor [E, n, d]: {activation} has no gate")
    rows = 2 * n if gated and w1_up is None else n
    tensors = [x, w1, w1_up, w2, b1, b1_up, b2, addend]
    dtype, device = x.dtype, x.device
    kind = device.type
    known = DATA_DTYPES.get(kind)
    if known and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        tensors = [t if t is None else t.to(dtype) for t in tensors]
    if known and dtype not in known:
        fix = f"cast x and the weights, or use torch.autocast({kind!r}, torch.bfloat16)"
        raise ValueError(f"x is {dtype} on {kind}, expected {' or '.join(map(str, known))}: {fix}")
    x_shape, w1_shape, b1_shape = (x.shape[0], d), (num_experts, rows, d), (num_experts, rows)
    shapes = (x_shape, w1_shape, w1_shape, w2.shape, b1_shape, b1_shape, (num_experts, d), x_shape)
    for tensor, shape, name in zip(tensors, shapes, NAMES, strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape:
            beside = f"beside w2 [E, d, n] = {list(w2.shape)} and {activation}"
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {list(shape)} {beside}")
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, expected {dtype} on {device} as x: cast it, or use autocast")
    if activation == "swiglu_oai" and alpha == 0:
        raise ValueError("alpha is 0, expected another number: sigmoid(0 x) would be no gate")
    if limit is None:
        limit = 7.0 if activation == "swiglu_oai" else 0.0
    tensors[0] = tensors[0].contiguous()
    if addend is not None:
        tensors[7] = tensors[7].contiguous()
    return tensors, (ACTIVATIONS[activation], float(alpha), float(limit), w1_layout == "interleaved")
