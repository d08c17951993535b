"""GPT-2 with 124 M parameters (12 layers of width 768, 50,257 tokens), fused AdamW, a batch of 2 x 128 tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention

from workloads import Workload

LAYERS, HEADS, WIDTH, TOKENS, CONTEXT = 12, 12, 768, 50_257, 1024
BATCH, LENGTH = 2, 128


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm: 12 parameters, shaped as in the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.c_fc, self.c_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.c_attn(self.ln_1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
        x = x + self.c_proj(attended.transpose(1, 2).flatten(2))
        return x + self.c_out(gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """148 parameters; the embedding is the output's weight too, and is saved once."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(TOKENS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln_f = nn.LayerNorm(WIDTH)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        return linear(self.ln_f(self.h(x)), self.wte.weight)


def make() -> Workload:
    model = GPT2()
    tokens = torch.randint(TOKENS, (BATCH, LENGTH + 1))
    return Workload(
        model,
        # The other implementations map and touch new memory at each step, which is what one would measure then.
        torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        lambda: cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()),
    )
