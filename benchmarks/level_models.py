"""The models of levels.py that ship no weights: their own architectures at their own sizes, with random weights."""

from __future__ import annotations

import torch
import transformers
from torch import nn


class Logits(nn.Module):
    """A transformers model as its logits (or last hidden state) alone."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: token ids [batch, seq], or images [batch, 3, 224, 224]."""
        found: torch.Tensor = self.model(x)[self.output]
        return found


def _made(kind: type, config: object, output: str) -> nn.Module:
    torch.manual_seed(0)
    return Logits(kind(config), output).eval()


def _ids() -> torch.Tensor:
    return torch.randint(0, 30522, (1, 64))


def bert() -> tuple[nn.Module, torch.Tensor]:
    """BERT-base: the last hidden state."""
    return _made(transformers.BertModel, transformers.BertConfig(), "last_hidden_state"), _ids()


def gpt2() -> tuple[nn.Module, torch.Tensor]:
    """GPT-2 (124 M): logits over the vocabulary, without a cache."""
    return _made(transformers.GPT2LMHeadModel, transformers.GPT2Config(use_cache=False), "logits"), _ids()


def vit() -> tuple[nn.Module, torch.Tensor]:
    """ViT-B/16: logits of 1000 classes."""
    config = transformers.ViTConfig(num_labels=1000)
    return _made(transformers.ViTForImageClassification, config, "logits"), torch.randn(1, 3, 224, 224)
