"""How many architectures of transformers survive each format.

    python benchmarks/coverage.py [--only bert,gpt2] [--formats onnx,openvino] [-o benchmarks/results/coverage.json]

Each row of ARCHITECTURES is built offline from its config class, small and with random weights, and goes the way of a
user's model: described from its config, captured, exported, reloaded in a fresh process, compared with eager PyTorch.
A row runs in a process of its own, so that a crash or a row that hangs is one failed row. An existing -o file keeps
the rows and formats that this run does not make.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kpdeploy.hardware import environment

TIMEOUT_S = 300
GOALS = {"onnx": 95.0, "openvino": 90.0, "torchscript": 90.0, "pt2": 90.0}
SEED = 11


@dataclass(frozen=True)
class Architecture:
    """One row: `config` and `model` are classes of transformers ("AutoModel": whatever the config's plain model is),
    `small` the config's arguments; a nested dict becomes the nested config's arguments."""

    name: str
    kind: str
    config: str
    small: Mapping[str, Any] = field(default_factory=dict)
    model: str = "AutoModel"


TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
DECODER = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**DECODER, "num_key_value_heads": 2}
MOE = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT = {
    "vocab_size": 99,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}
SPEECH = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 4, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "do_stable_layer_norm": False,
}

ARCHITECTURES = (
    # encoders
    Architecture("albert", "encoder", "AlbertConfig", {**TEXT, "embedding_size": 16}),
    Architecture("bert", "encoder", "BertConfig", TEXT),
    Architecture("bert-classify", "encoder", "BertConfig", TEXT, "BertForSequenceClassification"),
    Architecture("big_bird", "encoder", "BigBirdConfig", {**TEXT, "attention_type": "original_full"}),
    Architecture("canine", "encoder", "CanineConfig", {**TEXT, "num_hash_buckets": 64, "local_transformer_stride": 8}),
    Architecture("convbert", "encoder", "ConvBertConfig", {**TEXT, "embedding_size": 32}),
    Architecture("deberta", "encoder", "DebertaConfig", TEXT),
    Architecture(
        "deberta-v2",
        "encoder",
        "DebertaV2Config",
        {**TEXT, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]},
    ),
    Architecture(
        "distilbert",
        "encoder",
        "DistilBertConfig",
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
    Architecture("esm", "encoder", "EsmConfig", {**TEXT, "pad_token_id": 1, "position_embedding_type": "rotary"}),
    Architecture("fnet", "encoder", "FNetConfig", TEXT),
    Architecture(
        "funnel",
        "encoder",
        "FunnelConfig",
        {
            "vocab_size": 99,
            "block_sizes": [1, 1],
            "block_repeats": [1, 1],
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 48,
        },
        "FunnelModel",
    ),
    Architecture("ibert", "encoder", "IBertConfig", {**TEXT, "quant_mode": False}),
    Architecture("longformer", "encoder", "LongformerConfig", {**TEXT, "attention_window": 8}),
    Architecture(
        "mobilebert",
        "encoder",
        "MobileBertConfig",
        {**TEXT, "embedding_size": 32, "hidden_size": 64, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    ),
    Architecture(
        "modernbert",
        "encoder",
        "ModernBertConfig",
        {**DECODER, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 16},
    ),
    Architecture("mpnet", "encoder", "MPNetConfig", TEXT),
    Architecture(
        "nystromformer", "encoder", "NystromformerConfig", {**TEXT, "num_landmarks": 8, "segment_means_seq_len": 64}
    ),
    Architecture("roberta", "encoder", "RobertaConfig", TEXT),
    Architecture("roformer", "encoder", "RoFormerConfig", {**TEXT, "embedding_size": 32}),
    Architecture("squeezebert", "encoder", "SqueezeBertConfig", {**TEXT, "embedding_size": 32}),
    Architecture(
        "xlnet", "encoder", "XLNetConfig", {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    ),
    # decoders
    Architecture("bloom", "decoder", "BloomConfig", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    Architecture("falcon", "decoder", "FalconConfig", DECODER),
    Architecture("gemma2", "decoder", "Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 16}),
    Architecture("gpt2", "decoder", "GPT2Config", GPT),
    Architecture(
        "gpt_neo",
        "decoder",
        "GPTNeoConfig",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "window_size": 8,
        },
    ),
    Architecture("gpt_neox", "decoder", "GPTNeoXConfig", DECODER),
    Architecture("gptj", "decoder", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    Architecture("llama", "decoder", "LlamaConfig", GROUPED),
    Architecture("llama-lm", "decoder", "LlamaConfig", GROUPED, "LlamaForCausalLM"),
    Architecture("mamba", "decoder", "MambaConfig", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2}),
    Architecture("mistral", "decoder", "MistralConfig", {**GROUPED, "sliding_window": 16}),
    Architecture("mixtral", "decoder", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    Architecture(
        "mpt", "decoder", "MptConfig", {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
    ),
    Architecture("opt", "decoder", "OPTConfig", {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    Architecture("phi3", "decoder", "Phi3Config", GROUPED),
    Architecture("qwen2", "decoder", "Qwen2Config", GROUPED),
    Architecture("qwen3", "decoder", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    Architecture("qwen3_moe", "decoder", "Qwen3MoeConfig", {**MOE, "head_dim": 8}),
    # the encoders of encoder-decoders
    Architecture("bart", "encoder-decoder", "BartConfig", SEQ2SEQ),
    Architecture("longt5", "encoder-decoder", "LongT5Config", {**T5, "local_radius": 8}),
    Architecture("m2m_100", "encoder-decoder", "M2M100Config", SEQ2SEQ),
    Architecture("t5", "encoder-decoder", "T5Config", T5),
    Architecture("umt5", "encoder-decoder", "UMT5Config", T5),
    # vision
    Architecture("beit", "vision", "BeitConfig", VISION),
    Architecture("bit", "vision", "BitConfig", {**STAGES, "hidden_sizes": [16, 24, 32, 40], "num_groups": 4}),
    Architecture(
        "convnext",
        "vision",
        "ConvNextConfig",
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "image_size": 64},
    ),
    Architecture("cvt", "vision", "CvtConfig", {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}),
    Architecture("dinov2", "vision", "Dinov2Config", VISION),
    Architecture(
        "dpt",
        "vision",
        "DPTConfig",
        {
            **VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
        },
        "DPTForDepthEstimation",
    ),
    Architecture(
        "efficientnet",
        "vision",
        "EfficientNetConfig",
        {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    ),
    Architecture(
        "focalnet",
        "vision",
        "FocalNetConfig",
        {
            "image_size": 64,
            "embed_dim": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
    ),
    Architecture("mobilenet_v2", "vision", "MobileNetV2Config", {"image_size": 64, "depth_multiplier": 0.25}),
    Architecture(
        "mobilevit",
        "vision",
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 24, 32, 32, 64]},
    ),
    Architecture(
        "poolformer", "vision", "PoolFormerConfig", {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
    ),
    Architecture(
        "pvt_v2",
        "vision",
        "PvtV2Config",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32, 40],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
        },
    ),
    Architecture("resnet", "vision", "ResNetConfig", {**STAGES, "layer_type": "basic"}),
    Architecture(
        "segformer",
        "vision",
        "SegformerConfig",
        {
            "hidden_sizes": [16, 24, 32, 40],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 32,
        },
        "SegformerForSemanticSegmentation",
    ),
    Architecture(
        "swin",
        "vision",
        "SwinConfig",
        {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    Architecture(
        "swinv2",
        "vision",
        "Swinv2Config",
        {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    Architecture("vit", "vision", "ViTConfig", VISION),
    Architecture("vit-classify", "vision", "ViTConfig", VISION, "ViTForImageClassification"),
    Architecture(
        "yolos",
        "vision",
        "YolosConfig",
        {**VISION, "image_size": [32, 48], "num_detection_tokens": 5},
        "YolosForObjectDetection",
    ),
    # audio
    Architecture(
        "audio-spectrogram-transformer",
        "audio",
        "ASTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_length": 64,
            "num_mel_bins": 32,
        },
    ),
    Architecture(
        "data2vec-audio",
        "audio",
        "Data2VecAudioConfig",
        {**SPEECH, "conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2},
    ),
    Architecture(
        "moonshine",
        "audio",
        "MoonshineConfig",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 48,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
        },
    ),
    Architecture("sew", "audio", "SEWConfig", {**SPEECH, "squeeze_factor": 2}),
    Architecture(
        "speech_to_text",
        "audio",
        "Speech2TextConfig",
        {
            **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
            "input_feat_per_channel": 16,
            "conv_channels": 32,
        },
    ),
    Architecture("wav2vec2", "audio", "Wav2Vec2Config", SPEECH),
    Architecture(
        "wav2vec2-bert",
        "audio",
        "Wav2Vec2BertConfig",
        {
            "vocab_size": 32,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "feature_projection_input_dim": 16,
        },
    ),
    Architecture("wav2vec2-ctc", "audio", "Wav2Vec2Config", SPEECH, "Wav2Vec2ForCTC"),
    Architecture("wavlm", "audio", "WavLMConfig", SPEECH),
    Architecture(
        "whisper",
        "audio",
        "WhisperConfig",
        {
            **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
            "num_mel_bins": 16,
            "max_source_positions": 60,
        },
    ),
    # towers of multimodal models
    Architecture("align-text", "tower", "AlignTextConfig", TEXT, "AlignTextModel"),
    Architecture("blip-text", "tower", "BlipTextConfig", {**TEXT, "encoder_hidden_size": 32}, "BlipTextModel"),
    Architecture("blip-vision", "tower", "BlipVisionConfig", VISION, "BlipVisionModel"),
    Architecture("clip-text", "tower", "CLIPTextConfig", DECODER, "CLIPTextModel"),
    Architecture(
        "clip-text-projection",
        "tower",
        "CLIPTextConfig",
        {**DECODER, "projection_dim": 16},
        "CLIPTextModelWithProjection",
    ),
    Architecture("clip-vision", "tower", "CLIPVisionConfig", VISION, "CLIPVisionModel"),
    Architecture("flava-image", "tower", "FlavaImageConfig", VISION, "FlavaImageModel"),
    Architecture("owlvit-vision", "tower", "OwlViTVisionConfig", VISION, "OwlViTVisionModel"),
    Architecture("siglip-text", "tower", "SiglipTextConfig", DECODER, "SiglipTextModel"),
    Architecture("siglip-vision", "tower", "SiglipVisionConfig", VISION, "SiglipVisionModel"),
)


def build(row: Architecture) -> Any:
    """The row as a kpdeploy Model, the way `kpdeploy export` would get it."""
    import torch
    import transformers

    from kpdeploy.load import Request
    from kpdeploy.load.huggingface import describe_transformer

    transformers.utils.logging.set_verbosity_error()
    config = getattr(transformers, row.config)(**row.small)
    torch.manual_seed(SEED)
    if row.model == "AutoModel":
        module = transformers.AutoModel.from_config(config)
    else:
        module = getattr(transformers, row.model)(config)
    return describe_transformer(module.eval(), config, Request(), name=row.name, source={"kind": "transformers"})


def try_format(name: str, model: Any, capture: Any, asked: Sequence[Any], folder: Path) -> dict[str, Any]:
    """Export one format and prove it as `kpdeploy export` does."""
    import numpy as np

    from kpdeploy.artifact import Artifact
    from kpdeploy.compare import TOLERANCES
    from kpdeploy.errors import KpdeployError
    from kpdeploy.export import FORMATS
    from kpdeploy.runtimes.process import RuntimeProcess
    from kpdeploy.verify import failure, prove

    chosen = FORMATS[name]
    folder.mkdir()
    start = time.perf_counter()
    result: dict[str, Any] = {"passed": False}
    try:
        chosen.export(capture, folder)
        artifact = Artifact(
            format=name,
            folder=folder,
            filename=chosen.filename,
            input_names=tuple(spec.name for spec in model.signature.inputs),
            output_names=tuple(spec.name for spec in model.signature.outputs),
            settings=chosen.variants[0],
        )
        with RuntimeProcess(artifact) as process:
            verdict = prove(process, model.signature, asked, TOLERANCES, np.random.default_rng(SEED))
        worst = verdict.worst
        result |= {"passed": verdict.passed, "output": worst.output, "error": worst.error, "tolerance": worst.tolerance}
        result |= {"points": verdict.points, "max_batch_size": verdict.max_batch_size, "notes": verdict.notes}
        if not verdict.passed:
            raise failure(name, verdict, asked)
    except KpdeployError as error:
        result["reason"] = told(error)
    return {**result, "seconds": round(time.perf_counter() - start, 1)}


def told(error: Any) -> str:
    return " — ".join(part for part in (type(error).__name__, error.what, error.why, error.next_step) if part)


def child(row: Architecture, formats: Sequence[str], into: Path) -> None:
    """Run one row, writing what is known after each format, so that a crash loses one format only."""
    import numpy as np
    import torch

    from kpdeploy.decision import Skipped
    from kpdeploy.errors import KpdeployError
    from kpdeploy.export.capture import Capture, settle_axes
    from kpdeploy.load.reference import reference
    from kpdeploy.verify import questions

    torch.set_num_threads(2)
    found: dict[str, Any] = {"formats": {}}

    def write() -> None:
        aside = into.with_suffix(".part")
        aside.write_text(json.dumps(found))
        aside.replace(into)

    with tempfile.TemporaryDirectory(prefix="kpdeploy-coverage-") as scratch:
        try:
            model = settle_axes(build(row), stated=False)
            asked = questions(model.signature, reference(model), np.random.default_rng(SEED))
        except Exception as error:
            reason = told(error) if isinstance(error, KpdeployError) else f"unforeseen {type(error).__name__}: {error}"
            found["formats"] = {name: {"passed": False, "reason": reason} for name in formats}
            return write()
        found["inputs"] = [str(spec) for spec in model.signature.inputs]
        found["axes"] = {a.name: [a.min, a.max] for a in model.signature.axes}
        found["skipped"] = [f"{d.what}: {d.reason}" for d in model.decisions if isinstance(d, Skipped)]
        capture = Capture(model, Path(scratch))
        for name in formats:
            found["formats"][name] = try_format(name, model, capture, asked, Path(scratch) / f"made-{name}")
            write()


def run(row: Architecture, formats: Sequence[str], scratch: Path) -> dict[str, Any]:
    """One row in a process of its own: whatever it does, there is a result for each format."""
    into = scratch / f"{row.name}.json"
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=child, args=(row, formats, into))
    process.start()
    process.join(TIMEOUT_S)
    ended = f"ended with code {process.exitcode}"
    if process.is_alive():
        ended = f"took longer than {TIMEOUT_S} s"
        process.terminate()
        process.join()
    found: dict[str, Any] = json.loads(into.read_text()) if into.exists() else {"formats": {}}
    for name in formats:
        found["formats"].setdefault(name, {"passed": False, "reason": f"the row's process {ended}"})
    return {"arch": row.name, "kind": row.kind, "class": row.model, "config": row.config, **found}


def line(result: Mapping[str, Any], formats: Sequence[str]) -> str:
    cells = []
    for name in formats:
        one = result["formats"].get(name, {})
        text = f"{one['error']:.1e}" if "error" in one else "-"
        cells.append(f"{'ok' if one.get('passed') else 'FAIL' if one else ''} {text}".rjust(13))
    return f"{result['arch']:<30}{result['kind']:<16}" + "".join(cells)


def shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per format: how many rows passed, of how many, in per cent, and the goal."""
    found = {}
    for name, goal in GOALS.items():
        made = [row["formats"][name] for row in rows if name in row["formats"]]
        if made:
            passed = sum(bool(one["passed"]) for one in made)
            per_cent = round(100 * passed / len(made), 1)
            found[name] = {
                "passed": passed,
                "of": len(made),
                "per_cent": per_cent,
                "goal": goal,
                "met": per_cent >= goal,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of architectures, separated by commas")
    parser.add_argument("--formats", default=",".join(GOALS), help="formats, separated by commas")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write or complete")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time; give OMP_NUM_THREADS cores / jobs")
    options = parser.parse_args()
    formats = options.formats.split(",")
    known = {row.name: row for row in ARCHITECTURES}
    names = options.only.split(",") if options.only else list(known)
    if unknown := [name for name in [*names, *formats] if name not in known and name not in GOALS]:
        parser.error(f"unknown: {', '.join(unknown)}")
    results: dict[str, dict[str, Any]] = {}
    if options.output and options.output.exists():
        results = {row["arch"]: row for row in json.loads(options.output.read_text())["rows"] if row["arch"] in known}
    # What all rows import is imported once, in the process that they are forked from.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "transformers", "kpdeploy.export"])
    print(f"{'architecture':<30}{'kind':<16}" + "".join(name.rjust(13) for name in formats))
    with tempfile.TemporaryDirectory(prefix="kpdeploy-coverage-") as scratch:
        rows = [known[name] for name in names]
        with ThreadPoolExecutor(options.jobs) as pool:
            made = pool.map(lambda row: run(row, formats, Path(scratch)), rows)
            for name, found in zip(names, made, strict=True):
                kept = results.get(name, {}).get("formats", {})
                results[name] = {**found, "formats": {**kept, **found["formats"]}}
                print(line(results[name], formats), flush=True)
                for format_name in formats:
                    if reason := results[name]["formats"][format_name].get("reason"):
                        print(f"    {format_name}: {reason}", flush=True)
                if options.output:
                    store(options.output, [results[n] for n in known if n in results])
    for name, share in shares(list(results.values())).items():
        print(f"{name}: {share['passed']} of {share['of']} passed, {share['per_cent']} % (goal {share['goal']} %)")


def store(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    data = {"environment": environment(), "shares": shares(rows), "rows": rows}
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
