"""ViT-B/16 (86.6 M parameters) and its exponential moving average, fused AdamW, 2 images of 224 x 224."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from workloads import Workload

LAYERS, HEADS, WIDTH, PATCH, PIXELS, CLASSES, IMAGES = 12, 12, 768, 16, 224, 1000, 2


class ViT(nn.Module):
    """152 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, (PIXELS // PATCH) ** 2 + 1, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        return self.head(self.encoder(tokens + self.positions)[:, 0])


class Averaged(nn.Module):
    """What is trained, and its average, in one module: so everybody saves both, in the way in which it saves one."""

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self.trained = trained
        self.ema = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.999)).requires_grad_(False)


def make() -> Workload:
    model = Averaged(ViT())
    images, classes = torch.randn(IMAGES, 3, PIXELS, PIXELS), torch.randint(CLASSES, (IMAGES,))
    return Workload(
        model,
        torch.optim.AdamW(model.trained.parameters(), lr=1e-4, fused=True),
        lambda: cross_entropy(model.trained(images), classes),
        lambda: model.ema.update_parameters(model.trained),
    )
