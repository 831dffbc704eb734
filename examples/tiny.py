"""A tiny text classifier as a factory: what MODEL = package.module:factory looks like.

    cd examples && kpdeploy export tiny:classifier --repo models/ \\
        --input "ids:int64[batch=1..8,seq=1..32]" --input "mask:int64[batch,seq]{mask}"
"""

from __future__ import annotations

import torch


class Classifier(torch.nn.Module):
    """Mean over the embeddings of the tokens that the mask keeps, and one hidden layer.

    ids, mask: int64 [batch, seq]; answer: probabilities, float32 [batch, 3].
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(100, 16)
        self.hidden = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = mask.unsqueeze(-1).float()
        mean = (self.table(ids) * kept).sum(1) / kept.sum(1)
        hidden = torch.nn.functional.gelu(self.hidden(mean))
        return {"probabilities": self.head(hidden).softmax(-1)}


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier()
