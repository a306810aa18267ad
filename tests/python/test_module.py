"""MoE as a module: names, initialisation, modes, copies, activation checkpointing, FSDP2."""

import copy
import pickle
import socket

import machmoe
import pytest
import torch
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint


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


def test_a_module_that_has_run_can_be_copied_and_pickled():
    moe = machmoe.MoE(16, 24, 5, 2)
    x = torch.randn(4, 16)
    out = moe(x)
    assert moe.aux_loss.requires_grad
    assert torch.equal(copy.deepcopy(moe)(x), out)
    assert torch.equal(pickle.loads(pickle.dumps(moe))(x), out)


@pytest.mark.parametrize("options", [{}, {"routing": "token-rounding", "tile": 8}], ids=["one node", "parts"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_layer_keeps_nothing_of_its_recomputation(use_reentrant, options):
    """Its aux_loss counts inside the block; when the gradient has left the layer, the graph of what was recomputed is gone."""
    torch.manual_seed(3)
    moe, x = machmoe.MoE(16, 24, 5, 2, **options), torch.randn(40, 16, requires_grad=True)
    losses = []
    x.register_hook(lambda _: losses.append(moe.aux_loss))

    def block(x):
        return torch.nn.functional.layer_norm(moe(x), (16,)) + 3 * moe.aux_loss

    def gradients(out):
        moe.zero_grad()
        x.grad = None
        out.square().sum().backward()
        return [x.grad, *(p.grad for p in moe.parameters())]

    want = gradients(block(x))
    out = checkpoint(block, x, use_reentrant=use_reentrant)
    of_the_forward = moe.aux_loss
    got = gradients(out)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert losses[1] is of_the_forward and moe.aux_loss is of_the_forward


def test_a_recomputation_leaves_the_loss_of_a_later_forward_alone():
    torch.manual_seed(3)
    moe, inputs = machmoe.MoE(16, 24, 5, 2), torch.randn(2, 40, 16)

    def block(x):
        return torch.nn.functional.silu(moe(x))

    def gradients(forward):
        first, second = forward(inputs[0]), forward(inputs[1])
        first.sum().backward()
        return torch.autograd.grad(second.sum() + 100 * moe.aux_loss, tuple(moe.parameters()))

    for got, want in zip(gradients(lambda x: checkpoint(block, x, use_reentrant=False)), gradients(block), strict=True):
        assert torch.equal(got, want)


def test_the_loss_outside_a_checkpoint_counts_too():
    torch.manual_seed(3)
    moe, x = machmoe.MoE(16, 24, 5, 2), torch.randn(40, 16, requires_grad=True)

    def gradients(out):
        return torch.autograd.grad(out.square().sum() + moe.aux_loss, [x, *moe.parameters()])

    want = gradients(moe(x))
    got = gradients(checkpoint(moe, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_equal_bits(use_reentrant):
    moe = machmoe.MoE(16, 24, 5, 2)
    x = torch.randn(12, 16, requires_grad=True)
    moe(x).square().sum().backward()
    want = [x.grad, *(p.grad for p in moe.parameters())]
    x.grad = None
    moe.zero_grad()
    checkpoint(moe, x, use_reentrant=use_reentrant).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip([x.grad, *(p.grad for p in moe.parameters())], want, strict=True))


def test_frozen_experts_leave_the_other_gradients_alone():
    moe = machmoe.MoE(16, 24, 5, 2, bias=True)
    x = torch.randn(12, 16)
    moe(x).square().sum().backward()
    want = moe.gate.weight.grad
    moe.zero_grad()
    moe.experts.requires_grad_(False)
    moe(x).square().sum().backward()
    assert torch.equal(moe.gate.weight.grad, want) and moe.experts.w1.grad is None


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
