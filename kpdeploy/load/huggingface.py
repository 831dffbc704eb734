"""MODEL as a Hugging Face folder (config and safetensors), `transformers:ARCH` or `timm:NAME`."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kpdeploy.artifact import sha256
from kpdeploy.decision import Applied, Decision
from kpdeploy.errors import InputsUnknown, ModelBroken, ModelNotFound, ModelUnsafe, PackageMissing, TaskUnknown
from kpdeploy.load import Request, choose, model_name
from kpdeploy.load.describe import model_from_module
from kpdeploy.load.factory import from_module
from kpdeploy.model import Model
from kpdeploy.signature import Axis, Signature, TensorSpec, Values

TASKS = {
    "feature-extraction": "AutoModel",
    "sentence-embedding": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
}
"""`--task` names, and the transformers class that each one is."""

LONGEST = 512
"""The longest sequence that is offered when the config allows more: state --input to get more."""

TOKENIZER = "tokenizer.json"

IMAGE_SIZE = 224
"""Height and width of images where the config states none: what most image models were trained with."""


def load_folder(argument: str, request: Request) -> Model:
    """A folder with config.json and *.safetensors; with modules.json it is a sentence-transformers encoder."""
    folder = Path(argument)
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"{argument} is a folder without a config.json",
            next_step="give a Hugging Face folder (config.json and *.safetensors), or another kind of MODEL",
        )
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt")])
        kind = ModelUnsafe if pickles else ModelNotFound
        raise kind(
            f"{argument} holds no *.safetensors",
            why=f"{pickles[0]} is a pickle, which can run code when it is loaded" if pickles else "no weights there",
            next_step="save the model again with save_pretrained(folder, safe_serialization=True)",
        )
    if request.task is not None:
        choose("task", request.task, tuple(TASKS))
    transformers = _transformers()
    source = {"kind": "huggingface", "folder": folder.name, "weights": weights_digest(folder)}
    sentence = (folder / "modules.json").is_file() and request.task in (None, "sentence-embedding")
    config, module = _reading(folder, lambda: _open(transformers, folder, request, sentence))
    model = describe_transformer(
        module, config, request, name=folder.resolve().name, source=source, names=_tokenizer_names(folder)
    )
    return replace(model, tokenizer=folder if (folder / TOKENIZER).is_file() else None)


def _open(transformers: Any, folder: Path, request: Request, sentence: bool) -> tuple[Any, torch.nn.Module]:
    if sentence:
        encoder = sentence_encoder(folder)
        return encoder.transformer.config, encoder
    _refuse_own_code(transformers, folder)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = _model_class(transformers, config, request.task, folder)
    return config, _with_weights(kind, folder, config)


def _with_weights(kind: Any, folder: Path, config: Any = None, *, unused: str = "no tensor") -> torch.nn.Module:
    """The module with the folder's weights; transformers would draw the missing ones at random, with a mere warning."""
    module, told = kind.from_pretrained(
        folder,
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        dtype="auto",
        output_loading_info=True,
    )
    missing = sorted(name for name in told["missing_keys"] if unused not in name)
    if missing:
        raise ModelBroken(
            f"the weights in {folder} are not those of a {type(module).__name__}",
            why=f"{len(missing)} of its tensors are missing there, such as {missing[0]}",
            next_step="check that config.json and the safetensors belong together, or choose another --task",
        )
    module.eval()
    found: torch.nn.Module = module
    return found


def _refuse_own_code(transformers: Any, folder: Path) -> None:
    """An architecture that transformers lacks and a Python file brings is not loaded: that would run the file."""
    config = json.loads((folder / "config.json").read_text())
    if "auto_map" in config and config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ModelUnsafe(
            f"{folder} brings Python code of its own",
            why=f"config.json names it under auto_map, and transformers itself has no {config.get('model_type')!r}",
            next_step="read that code; then write a factory that builds the model: MODEL = package.module:factory",
        )


def _model_class(transformers: Any, config: Any, task: str | None, folder: Path) -> Any:
    if task is not None:
        return getattr(transformers, TASKS[task])
    names = getattr(config, "architectures", None) or []
    if not names or not hasattr(transformers, names[0]):
        raise TaskUnknown(
            f"{folder} does not tell what the model is for",
            why=f"config.json names the architecture {names[0] if names else 'nowhere'}",
            next_step=f"say it with --task: {', '.join(TASKS)}",
        )
    return getattr(transformers, names[0])


def _reading(folder: Path, open_model: Any) -> tuple[Any, torch.nn.Module]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        pair: tuple[Any, torch.nn.Module] = open_model()
        return pair
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError) as error:
        raise _broken(folder, error) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("safetensors", "safetensors_rust", "huggingface_hub"):
            raise _broken(folder, error) from None
        raise


def _broken(folder: Path, error: Exception) -> ModelBroken:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelBroken(
        f"the model in {folder} cannot be read",
        why=f"{type(error).__name__}: {lines[0]}",
        next_step="check that config.json and the safetensors are whole and belong together",
    )


def load_architecture(argument: str, request: Request) -> Model:
    """`transformers:ARCH`: the architecture in its default size, with random weights."""
    transformers = _transformers()
    arch = choose("architecture", argument.partition(":")[2], sorted(transformers.CONFIG_MAPPING.keys()))
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[arch]()
    try:
        module = transformers.AutoModel.from_config(config).eval()
    except (ValueError, ImportError) as error:
        raise TaskUnknown(f"transformers has no plain model of {arch!r}", why=str(error).splitlines()[0]) from None
    return describe_transformer(module, config, request, name=arch, source={"kind": "transformers", "arch": arch})


def load_timm(argument: str, request: Request) -> Model:
    """`timm:NAME`: the architecture with random weights (timm's own are on a hub)."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise PackageMissing(
            f"{argument} needs the package timm", why=str(error), next_step="pip install timm"
        ) from None
    name = choose("timm model", argument.partition(":")[2], timm.list_models())
    torch.manual_seed(0)
    module = timm.create_model(name, pretrained=False).eval()
    signature = _images(module.pretrained_cfg["input_size"], "x", request.max_batch)
    source = {"kind": "timm", "name": name, "weights": "random"}
    return from_module(module, None, request, name=name, source=source, signature=signature)


class SentenceEncoder(torch.nn.Module):
    """A transformer with mean or CLS pooling and optional normalization, as sentence-transformers computes it.

    Inputs input_ids and attention_mask, int64 [batch, seq]; answer: float [batch, hidden].
    """

    def __init__(self, transformer: torch.nn.Module, *, pooling: str, normalize: bool) -> None:
        super().__init__()
        self.transformer = transformer
        self.pooling = pooling
        self.normalize = normalize

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        return {"embedding": torch.nn.functional.normalize(pooled, dim=1) if self.normalize else pooled}


def sentence_encoder(folder: Path) -> SentenceEncoder:
    """The encoder of a sentence-transformers folder."""
    transformers = _transformers()
    steps = [step["type"].rsplit(".", 1)[-1] for step in json.loads((folder / "modules.json").read_text())]
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    kinds = [
        name.removeprefix("pooling_mode_") for name, on in pooling.items() if name.startswith("pooling_mode_") and on
    ]
    kinds = kinds or [pooling.get("pooling_mode", "")]
    kind = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}.get(kinds[0])
    if len(kinds) != 1 or kind is None or set(steps) - {"Transformer", "Pooling", "Normalize"}:
        raise TaskUnknown(
            f"the sentence encoder in {folder} pools in a way that is not known here",
            why=f"steps {', '.join(steps)}; pooling {', '.join(kinds)}",
            next_step="write a factory that returns the whole encoder: package.module:factory",
        )
    # The transformer's own pooler is not what pools here, and often not saved.
    module = _with_weights(transformers.AutoModel, folder, unused="pooler.")
    return SentenceEncoder(module, pooling=kind, normalize="Normalize" in steps)


def describe_transformer(
    module: torch.nn.Module,
    config: Any,
    request: Request,
    *,
    name: str,
    source: Mapping[str, Any],
    names: tuple[str, ...] = (),
) -> Model:
    """The Model of a transformers module: inputs from its config, unless the user stated them.

    Of an encoder-decoder, the encoder. `names` are the inputs that its tokenizer makes.
    """
    decisions: list[Decision] = []
    if getattr(config, "is_encoder_decoder", False) and hasattr(module, "get_encoder"):
        module = module.get_encoder()  # type: ignore[operator]
        decisions.append(Applied(what="the encoder of an encoder-decoder", detail="decoding is a loop around a model"))
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if hasattr(module, "set_experts_implementation"):
        # The default's own operator exists in Python only; this computes the same in plain ones.
        with contextlib.suppress(ValueError):  # the model has no experts
            module.set_experts_implementation("batched_mm")  # type: ignore[operator]
    if request.inputs or request.example:
        return from_module(module, None, request, name=name, source=source)
    signature, assumed = transformer_inputs(module, config, max_batch=request.max_batch, names=names)
    return model_from_module(
        module,
        signature,
        name=model_name(request.name or name),
        source=source,
        keywords=True,
        decisions=(*decisions, *assumed),
    )


def transformer_inputs(
    module: torch.nn.Module, config: Any, *, max_batch: int, names: tuple[str, ...] = ()
) -> tuple[Signature, list[Decision]]:
    """What a transformers module takes, read from its forward() and its config, and what had to be assumed.

    Raises:
        InputsUnknown: it takes none of input_ids, pixel_values, input_values, input_features.
    """
    parameters = list(inspect.signature(module.forward).parameters)
    main = getattr(module, "main_input_name", None)
    wanted = [main] if main in parameters else parameters
    if "input_ids" in wanted:
        return _text(module, config, max_batch, names), []
    if "pixel_values" in wanted:
        return _pixels(getattr(config, "vision_config", config), max_batch)
    config = getattr(config, "audio_config", config)
    if "input_values" in wanted:
        return _audio("input_values", _spectrogram(config), max_batch), []
    if "input_features" in wanted:
        return _audio("input_features", _features(config), max_batch), []
    raise InputsUnknown(
        f"the inputs of {type(module).__name__} cannot be told from its config",
        why=f"forward() takes {', '.join(parameters[:6])}",
        next_step='state them: --input "name:dtype[batch=1..8,…]"',
    )


def _text(module: torch.nn.Module, config: Any, max_batch: int, names: tuple[str, ...]) -> Signature:
    parameters = inspect.signature(module.forward).parameters
    config = getattr(config, "text_config", config)
    vocabulary = Values(kind="range", low=0, high=config.vocab_size - 1)
    axes = (Axis(name="batch", min=1, max=max_batch), Axis(name="seq", min=1, max=_longest(module, config)))
    specs = [TensorSpec(name="input_ids", dtype="int64", shape=("batch", "seq"), values=vocabulary)]
    if "attention_mask" in parameters:
        mask = Values(kind="prefix_mask")
        specs.append(TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "seq"), values=mask))
    if "token_type_ids" in parameters and "token_type_ids" in names:
        kinds = Values(kind="range", low=0, high=max(getattr(config, "type_vocab_size", 1), 1) - 1)
        specs.append(TensorSpec(name="token_type_ids", dtype="int64", shape=("batch", "seq"), values=kinds))
    return Signature(inputs=tuple(specs), axes=axes)


def _longest(module: torch.nn.Module, config: Any) -> int:
    """The longest sequence that the position table holds, at most LONGEST."""
    rows = next(
        (n for key in ("max_position_embeddings", "n_positions", "max_seq_len") if (n := getattr(config, key, 0))), 0
    )
    if not isinstance(rows, int) or rows <= 0:
        return LONGEST
    # RoBERTa and its kin count positions from padding_idx + 1, in a table that is larger by as much.
    tables: list[Any] = [
        m for m in module.modules() if getattr(m, "padding_idx", None) is not None and hasattr(m, "weight")
    ]
    offset: int = max((t.padding_idx + 1 for t in tables if len(t.weight) == rows), default=0)
    return min(rows - offset, LONGEST)


def _pixels(config: Any, max_batch: int) -> tuple[Signature, list[Decision]]:
    size = getattr(config, "image_size", None)
    decisions: list[Decision] = []
    if size is None:
        size = IMAGE_SIZE
        decisions.append(
            Applied(what=f"images of {size}×{size}", detail="the config states no size; state yours with --input")
        )
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return _images((getattr(config, "num_channels", 3), height, width), "pixel_values", max_batch), decisions


def _images(size: tuple[int, ...], name: str, max_batch: int) -> Signature:
    spec = TensorSpec(name=name, dtype="float32", shape=("batch", *size))
    return Signature(inputs=(spec,), axes=(Axis(name="batch", min=1, max=max_batch),))


def _spectrogram(config: Any) -> tuple[int | Axis, ...]:
    """Dims of input_values after the batch: a waveform, or [frames, bins] where the config counts mel bins."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return config.max_length, config.num_mel_bins
    return (Axis(name="samples", min=4000, max=32_000),)


def _features(config: Any) -> tuple[int | Axis, ...]:
    """Dims of input_features after the batch. Whisper's are [bins, frames] of a fixed length, others [frames, bins]."""
    widths = ("input_feat_per_channel", "feature_projection_input_dim")
    width = next((getattr(config, key) for key in widths if hasattr(config, key)), None)
    if width is not None:
        longest = min(getattr(config, "max_source_positions", LONGEST), LONGEST)
        return Axis(name="frames", min=16, max=longest), width * getattr(config, "input_channels", 1)
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return config.num_mel_bins, 2 * config.max_source_positions
    raise InputsUnknown(
        "the width of input_features cannot be told from the config",
        next_step='state it: --input "input_features:float32[batch=1..8,frames=16..512,80]"',
    )


def _audio(name: str, dims: tuple[int | Axis, ...], max_batch: int) -> Signature:
    axes = (Axis(name="batch", min=1, max=max_batch), *(d for d in dims if isinstance(d, Axis)))
    shape = ("batch", *(d.name if isinstance(d, Axis) else d for d in dims))
    return Signature(inputs=(TensorSpec(name=name, dtype="float32", shape=shape),), axes=axes)


def weights_digest(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def _tokenizer_names(folder: Path) -> tuple[str, ...]:
    try:
        data = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return ()
    names = data.get("model_input_names")
    if names is None and "Bert" in str(data.get("tokenizer_class", "")):
        names = ["input_ids", "token_type_ids", "attention_mask"]
    return tuple(names or ())


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise PackageMissing(
            "this MODEL needs the package transformers", next_step="pip install 'kpdeploy[export]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
