"""A decoder-only language model over bytes: pre-norm blocks of attention (rotary embedding) and a MoE layer."""

import torch
import torch.nn.functional as F
from torch import nn

import machmoe

from ..torch_layer import TorchMoE

VOCABULARY = 256
ROPE_BASE = 10_000.0


def moe_layer(config):
    if config.experts == "torch":
        return TorchMoE(config.d, config.n, config.num_experts, config.k)
    return machmoe.MoE(config.d, config.n, config.num_experts, config.k, routing=config.routing)


def rotary_table(context, head):
    """cos and sin [context, head / 2]."""
    inverse = ROPE_BASE ** (-torch.arange(0, head, 2).double() / head)
    angle = torch.outer(torch.arange(context).double(), inverse)
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """x [B, heads, S, head]: each pair (x_i, x_{i + head/2}) turned by its angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d, 3 * config.d, bias=False)
        self.out = nn.Linear(config.d, config.d, bias=False)

    def forward(self, x, cos, sin):
        batch, length, d = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, d))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.d)
        self.moe = moe_layer(config)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y = self.moe(self.moe_norm(x))
        return x + y, self.moe.aux_loss


class LanguageModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d)
        self.head = nn.Linear(config.d, VOCABULARY, bias=False)
        cos, sin = rotary_table(config.context, config.d // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens):
        """tokens [B, S] -> logits [B, S, 256] and the mean load-balance loss of the layers."""
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x, balances = self.embedding(tokens), []
        for block in self.blocks:
            x, balance = block(x, cos, sin)
            balances.append(balance)
        return self.head(self.norm(x)), torch.stack(balances).mean()

    def loss(self, tokens, targets):
        """Mean cross-entropy in nats, and the load-balance loss."""
        logits, balance = self(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), balance

    @torch.no_grad()
    def initialise(self, seed):
        """Draws every parameter from (seed, its name), so that two choices of experts start from the same weights."""
        depth = (2 * self.config.layers) ** -0.5  # residual branches add up to unit scale
        for index, (name, parameter) in enumerate(sorted(self.named_parameters())):
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            fan_in = self.config.d if name == "embedding.weight" else parameter.shape[-1]
            scale = fan_in**-0.5 * (depth if name.endswith(("out.weight", "down_proj")) else 1.0)
            generator = torch.Generator().manual_seed((seed << 20) + index)
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, scale, generator=generator))

    def num_parameters(self):
        """All, and those that one token uses."""
        total = sum(p.numel() for p in self.parameters())
        experts = sum(p.numel() for name, p in self.named_parameters() if ".experts." in name)
        return total, total - experts + experts * self.config.k // self.config.num_experts

    @torch.no_grad()
    def sample(self, prompt, length, seed, temperature=0.8):
        """Continues the bytes of prompt."""
        device = self.cos.device
        generator = torch.Generator().manual_seed(seed)
        text = list(prompt)
        for _ in range(length):
            tokens = torch.tensor([text[-self.config.context :]], device=device)
            logits = self(tokens)[0][0, -1].float().cpu()
            text.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
        return bytes(text)
