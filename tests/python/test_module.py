"""MoE as a module: names, initialisation, modes, torch.compile, opcheck, FSDP2."""

import socket

import pytest
import torch
import torch.multiprocessing as mp

import machmoe

ops = torch.ops.machmoe


def test_parameter_names_are_those_of_qwen3_moe():
    moe = machmoe.MoE(16, 24, 5, 2, shared_intermediate_size=8)
    assert {name: tuple(p.shape) for name, p in moe.state_dict().items() if "shared" not in name} == {
        "gate.weight": (5, 16),
        "experts.gate_up_proj": (5, 48, 16),
        "experts.down_proj": (5, 16, 24),
    }


def test_meta_device_then_reset_parameters():
    with torch.device("meta"):
        moe = machmoe.MoE(16, 24, 5, 2, bias=True, shared_intermediate_size=8)
    moe.to_empty(device="cpu")
    moe.reset_parameters()
    out = moe(torch.randn(3, 16))
    assert torch.isfinite(out).all() and (moe.experts.b1 == 0).all()


def test_the_shared_expert_is_added():
    moe = machmoe.MoE(16, 24, 5, 2, shared_intermediate_size=8)
    x = torch.randn(2, 6, 16)
    both = moe(x)
    shared = moe.shared_expert(x)
    moe.shared_expert = None
    torch.testing.assert_close(both, moe(x) + shared)


def test_token_rounding_is_for_training_alone():
    torch.manual_seed(0)
    moe = machmoe.MoE(16, 24, 4, 2, routing="token-rounding", tile=16)
    x = torch.randn(64, 16)
    trained = moe(x)
    moe.eval()
    plain = moe(x)
    moe.routing = "topk"
    assert torch.equal(plain, moe(x))
    assert not torch.equal(plain, trained)
    trained.sum().backward()
    assert moe.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("routing", ["topk", "token-rounding"])
def test_compile_is_one_graph_for_every_number_of_tokens(routing):
    torch._dynamo.reset()
    moe = machmoe.MoE(16, 24, 5, 2, routing=routing, tile=8, shared_intermediate_size=8)
    compiles = 0

    def backend(graph, _):
        nonlocal compiles
        compiles += 1
        return graph

    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (33, 40, 57, 64):
        x = torch.randn(tokens, 16)
        torch.testing.assert_close(compiled(x), moe(x))
    assert compiles == 1


def test_compile_trains_with_aot_autograd():
    torch._dynamo.reset()
    moe = machmoe.MoE(16, 24, 5, 2)
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (9, 12, 17):
        x = torch.randn(tokens, 16)
        grads = [torch.autograd.grad(m(x).square().sum(), tuple(moe.parameters())) for m in (compiled, moe)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_opcheck_of_every_operator():
    torch.manual_seed(0)
    t, d, n, e, k = 6, 16, 8, 4, 2
    x, w1, w2, d_o = torch.randn(t, d), torch.randn(e, 2 * n, d), torch.randn(e, d, n), torch.randn(t, d)
    ids, weights = torch.rand(t, e).topk(k).indices, torch.rand(t, k)
    logits, router_w = torch.randn(t, e), torch.randn(e, d)
    nothing = (None, None, None)
    metadata = ops.routing_topk(ids, weights, e)
    o, h = ops.experts_forward(x, w1, None, w2, *nothing, None, metadata, None, None, 0, k, 0, 1.702, 0.0, False, True)
    rids, rweights, rcounts, _ = ops.route_forward(logits, k, 0)
    counts = torch.tensor([1, 2, 0, 2], dtype=torch.int32)
    calls = {
        ops.routing_topk: (ids, weights, e),
        ops.routing_lists: (torch.arange(t), ids[:, 0].contiguous(), weights[:, 0].contiguous(), t, e),
        ops.routing_rows: (counts, x),
        ops.token_round: (logits.softmax(-1), k, 2, 0, False, torch.tensor(0)),
        ops.route_forward: (logits, k, 0),
        ops.route_backward: (weights, None, logits, rids, rweights, rcounts, 0),
        ops.experts_forward: (x, w1, None, w2, *nothing, None, metadata, None, None, 0, k, 0, 1.702, 0.0, False, True),
        ops.experts_backward: (d_o, x, w1, None, w2, *nothing, h, metadata, None, None, 0, k, 0, 1.702, 0.0, False, True, True, True, False, False, 0),
        ops.layer_backward: (d_o, None, x, router_w, w1, None, w2, *nothing, h, ops.routing_topk(rids, rweights, e), logits, rids, rweights, rcounts, 0, 0, 1.702, 0.0, False, *[True] * 2, *[False] * 2),
    }  # fmt: skip
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, args in calls.items():
        # Metadata has gaps between its arrays, whatever was in memory: the last test would compare them.
        metadata = op in (ops.routing_topk, ops.routing_lists, ops.routing_rows, ops.token_round)
        torch.library.opcheck(op.default, args, test_utils=every[: 3 if metadata else 4])


def _fsdp_rank(rank, world, port, result):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.manual_seed(0)
    moe = machmoe.MoE(16, 24, 6, 2, shared_intermediate_size=8)
    alone = machmoe.MoE(16, 24, 6, 2, shared_intermediate_size=8)
    alone.load_state_dict(moe.state_dict())
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    fully_shard(moe, mesh=mesh)
    x = torch.randn(world, 20, 16)
    for _ in range(2):  # FSDP2 frees and refills the storage of the weights between the passes
        moe.zero_grad()
        moe(x[rank]).square().sum().backward()
    sum(alone(part).square().sum() for part in x).backward()
    for (name, p), q in zip(moe.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor() * world, q.grad, msg=name)
    result[rank] = True
    torch.distributed.destroy_process_group()


def test_fsdp2_over_two_processes_gives_the_gradients_of_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    result = mp.get_context("spawn").Manager().dict()
    mp.spawn(_fsdp_rank, args=(2, port, result), nprocs=2)
    assert dict(result) == {0: True, 1: True}
