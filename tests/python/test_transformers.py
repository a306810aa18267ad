"""The routers against those of the transformers library on random weights. Runs where it is installed: it needs version 5."""

import importlib

import machmoe
import pytest
import torch

transformers = pytest.importorskip("transformers")
T, D, E, K = 64, 16, 16, 4


def router_class(module, name):
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def dense(weights, ids):
    """[T, E]: equal for every order of the K."""
    return torch.zeros(weights.shape[0], E).scatter(1, ids.long(), weights.float())


def weights_and_ids(outputs):
    """The [T, K] tensors among a router's results, whatever else it returns."""
    flat = [o for o in outputs if isinstance(o, torch.Tensor) and o.shape == (T, K)]
    return next(o for o in flat if o.is_floating_point()), next(o for o in flat if not o.is_floating_point())


def randomise(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.normal_(0, 0.3)
    return module


def expect_equal(ours, theirs):
    ids, weights, _, _ = ours
    want_weights, want_ids = theirs
    assert torch.equal(ids.sort(-1).values, want_ids.sort(-1).values.int())
    torch.testing.assert_close(dense(weights, ids), dense(want_weights, want_ids), atol=1e-6, rtol=1e-6)


def test_qwen3_moe():
    config = transformers.Qwen3MoeConfig(hidden_size=D, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True)
    router = randomise(router_class("qwen3_moe.modeling_qwen3_moe", "Qwen3MoeTopKRouter")(config))
    x = torch.randn(T, D)
    expect_equal(machmoe.route(x @ router.weight.t(), K, router="softmax_topk_norm"), weights_and_ids(router(x)))


def test_gpt_oss():
    config = transformers.GptOssConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K)
    router = randomise(router_class("gpt_oss.modeling_gpt_oss", "GptOssTopKRouter")(config))
    x = torch.randn(T, D)
    expect_equal(machmoe.route(x @ router.weight.t() + router.bias, K, router="topk_softmax"), weights_and_ids(router(x)))


def test_deepseek_v3():
    config = transformers.DeepseekV3Config(
        hidden_size=D, n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
        moe_intermediate_size=8, intermediate_size=8, n_shared_experts=1,
    )  # fmt: skip
    router = randomise(router_class("deepseek_v3.modeling_deepseek_v3", "DeepseekV3TopkRouter")(config))
    x = torch.randn(T, D)
    options = {"router_bias": router.e_score_correction_bias, "groups": 4, "topk_groups": 2, "scale": 2.5}
    expect_equal(machmoe.route(x @ router.weight.t(), K, router="sigmoid_topk_norm", **options), weights_and_ids(router(x)))
