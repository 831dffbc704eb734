"""Ask a served MiniLM how near three sentences are to each other, and PyTorch whether that is right.

    kpdeploy export minilm --target triton --repo models/
    kpdeploy serve models/
    python examples/ask.py localhost:8001

Tokens and lengths vary from request to request, as real text does; the model takes them as they come.
"""

from __future__ import annotations

import sys

import numpy as np
import tritonclient.grpc as triton
from tokenizers import Tokenizer

from kpdeploy.load.examples import minilm_folder

SENTENCES = [
    "The server came back up after the night's update.",
    "Once it was patched, the machine started again.",
    "Simmer the leeks in butter until they are soft.",
]


def tokenize(sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask of one padded batch, int64 [batch, seq]."""
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    encoded = tokenizer.encode_batch(sentences)
    return np.array([e.ids for e in encoded]), np.array([e.attention_mask for e in encoded])


def ask(url: str, *arrays: np.ndarray) -> np.ndarray:
    """The answer of the served model: float32 [batch, 384]."""
    with triton.InferenceServerClient(url) as client:
        # Formats name their tensors differently; the order is always the model's own.
        names = [tensor.name for tensor in client.get_model_metadata("minilm").inputs]
        inputs = []
        for name, array in zip(names, arrays, strict=True):
            inputs.append(triton.InferInput(name, list(array.shape), "INT64"))
            inputs[-1].set_data_from_numpy(array)
        result = client.infer("minilm", inputs)
        return result.as_numpy(result.get_response().outputs[0].name)


def pytorch(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The same by eager PyTorch, straight from the weights: mean over the tokens, length 1."""
    import torch
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModel.from_pretrained(minilm_folder(), local_files_only=True).eval()
    with torch.inference_mode():
        hidden = model(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state
    kept = torch.from_numpy(mask).unsqueeze(-1)
    mean = (hidden * kept).sum(1) / kept.sum(1)
    return torch.nn.functional.normalize(mean).numpy()


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "localhost:8001"
    ids, mask = tokenize(SENTENCES)
    embeddings = ask(url, ids, mask)
    reference = pytorch(ids, mask)

    print(
        f"\nTriton at {url}: {embeddings.shape[0]} embeddings of {embeddings.shape[1]} numbers. Cosine similarities:\n"
    )
    for sentence, row in zip(SENTENCES, embeddings @ embeddings.T, strict=True):
        print(f"  {sentence:52}", *(f"{cosine:6.3f}" for cosine in row))
    error = np.linalg.norm(embeddings - reference) / np.linalg.norm(reference)
    print(f"\nagainst eager PyTorch: ‖Δ‖/‖ref‖ = {error:.1e}")
    if not error <= 1e-5:
        sys.exit("the served answer is not PyTorch's")


if __name__ == "__main__":
    main()
