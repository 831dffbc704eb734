"""Small modules that the tests of the export use, as factories where a command line names them."""

from __future__ import annotations

import torch


class Classifier(torch.nn.Module):
    """Token ids and a scale to logits and a mean: two inputs, two outputs, two dynamic axes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(50, 16)
        self.hidden = torch.nn.Linear(16, 32)
        self.norm = torch.nn.LayerNorm(32)
        self.head = torch.nn.Linear(32, 3)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.norm(torch.nn.functional.gelu(self.hidden(self.table(ids))))
        return {"logits": self.head(rows) * scale[:, None, None], "mean": rows.mean(dim=1)}


CLASSIFIER_INPUTS = ("ids:int64[batch=1..6,seq=1..40]", "scale:float32[batch]")


class MixesRows(torch.nn.Module):
    """Subtracts the mean over the batch: a batch is not its rows asked alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - 0.5 * x.mean(dim=0, keepdim=True) + 1


class OneRow(torch.nn.Module):
    """Takes a batch of one only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.reshape(1, 12) * 2).reshape(1, 3, 4)


def classifier() -> Classifier:
    return Classifier()


def linear() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3)), torch.randn(2, 4)
