"""Architectures of transformers, from tiny configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from networks.case import Case, Feed

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TINY, "num_key_value_heads": 2}
HEAD = {**GROUPED, "head_dim": 8}
PICTURE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32}
SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
SPEECH = {
    **TINY,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
}

# model class: options of its configuration
TEXT: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": TINY,
    "RobertaForSequenceClassification": TINY,
    "DistilBertForSequenceClassification": {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "AlbertForMaskedLM": {**TINY, "embedding_size": 16},
    "ElectraForMaskedLM": {**TINY, "embedding_size": 16},
    "DebertaV2ForSequenceClassification": {**TINY, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "MPNetForMaskedLM": TINY,
    "MobileBertForMaskedLM": {**TINY, "embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "FNetForMaskedLM": {**TINY, "tpu_short_seq_length": 16},
    "ConvBertForMaskedLM": {**TINY, "embedding_size": 32},
    "RoFormerForMaskedLM": {**TINY, "embedding_size": 32},
    "ModernBertForMaskedLM": {**TINY, "cls_token_id": 1, "sep_token_id": 2},
    "NystromformerForMaskedLM": {**TINY, "num_landmarks": 4, "segment_means_seq_len": 16},
    "LongformerForMaskedLM": {**TINY, "attention_window": 8},
    "BigBirdForMaskedLM": {**TINY, "attention_type": "original_full"},
    "FunnelForMaskedLM": {"vocab_size": 99, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64},
    "XLNetLMHeadModel": {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "GPT2LMHeadModel": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTNeoForCausalLM": {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
    },
    "GPTJForCausalLM": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "GPTNeoXForCausalLM": TINY,
    "GPTBigCodeForCausalLM": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "CodeGenForCausalLM": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "OPTForCausalLM": {**TINY, "ffn_dim": 64, "word_embed_proj_dim": 16},
    "BloomForCausalLM": {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": {**GROUPED, "sliding_window": 8},
    "MixtralForCausalLM": {**GROUPED, "num_local_experts": 4},
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": HEAD,
    "Qwen2MoeForCausalLM": {
        **GROUPED,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
        "num_experts_per_tok": 2,
    },
    "DeepseekV3ForCausalLM": {
        **TINY,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "GemmaForCausalLM": HEAD,
    "Gemma2ForCausalLM": HEAD,
    "Gemma3ForCausalLM": HEAD,
    "PhiForCausalLM": TINY,
    "Phi3ForCausalLM": GROUPED,
    "FalconForCausalLM": TINY,
    "MptForCausalLM": {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64},
    "OlmoForCausalLM": GROUPED,
    "StableLmForCausalLM": GROUPED,
    "CohereForCausalLM": GROUPED,
    "GraniteForCausalLM": GROUPED,
    "Starcoder2ForCausalLM": GROUPED,
    "MambaForCausalLM": {"vocab_size": 99, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    "Mamba2ForCausalLM": {
        "vocab_size": 99,
        "hidden_size": 32,
        "state_size": 4,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "RwkvForCausalLM": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 32},
    "RecurrentGemmaForCausalLM": {**HEAD, "lru_width": 32, "num_hidden_layers": 3, "attention_window_size": 8},
    "T5ForConditionalGeneration": {
        "vocab_size": 99,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
    "BartForConditionalGeneration": SEQ2SEQ,
    "PegasusForConditionalGeneration": SEQ2SEQ,
    "MarianMTModel": SEQ2SEQ,
    "BlenderbotSmallForConditionalGeneration": SEQ2SEQ,
}
IMAGES: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": {**PICTURE, "patch_size": 8},
    "DeiTForImageClassification": {**PICTURE, "patch_size": 8},
    "BeitForImageClassification": {**PICTURE, "patch_size": 8, "use_relative_position_bias": True},
    "Dinov2ForImageClassification": {**PICTURE, "patch_size": 8},
    "SwinForImageClassification": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "ConvNextForImageClassification": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "ResNetForImageClassification": {
        "embedding_size": 16,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "SegformerForSemanticSegmentation": {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [16, 32],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16,
    },
    "PoolFormerForImageClassification": {
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "num_encoder_blocks": 2,
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "padding": [1, 1],
    },
    "ViTMAEForPreTraining": {
        **PICTURE,
        "patch_size": 8,
        "mask_ratio": 0.0,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 64,
    },
}
WAVES = {"Wav2Vec2ForCTC": SPEECH, "HubertForCTC": SPEECH, "WavLMForCTC": SPEECH}


def _build(name: str, options: dict[str, Any]) -> nn.Module:
    model = getattr(transformers, name)
    return model(model.config_class(**options))


def _tokens(name: str, training: bool) -> Feed:
    kwargs: dict[str, Any] = {"input_ids": torch.randint(3, 99, (2, 16))}
    if "ConditionalGeneration" in name or name == "MarianMTModel":
        kwargs["decoder_input_ids"] = torch.randint(3, 99, (2, 8))
    if not any(part in name for part in ("MaskedLM", "Classification", "XLNet")):
        kwargs["use_cache"] = False
    return Feed((), kwargs)


def _pictures(training: bool) -> Feed:
    return Feed((), {"pixel_values": torch.randn(2, 3, 32, 32)})


def _waves(training: bool) -> Feed:
    return Feed((), {"input_values": torch.randn(2, 800)})


def _clip() -> nn.Module:
    half = {key: TINY[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    text = {**TINY}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**half, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    return transformers.CLIPModel(config)


def _clip_feed(training: bool) -> Feed:
    return Feed((), {"input_ids": torch.randint(3, 99, (2, 16)), "pixel_values": torch.randn(2, 3, 32, 32)})


def _whisper() -> nn.Module:
    options = {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32}
    options.pop("max_position_embeddings")
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**options))


def _whisper_feed(training: bool) -> Feed:
    return Feed(
        (),
        {
            "input_features": torch.randn(2, 16, 40),
            "decoder_input_ids": torch.randint(3, 99, (2, 8)),
            "use_cache": False,
        },
    )


def _ast() -> nn.Module:
    half = {key: PICTURE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    config = transformers.ASTConfig(**half, patch_size=8, num_mel_bins=16, max_length=32, frequency_stride=8, time_stride=8)
    return transformers.ASTForAudioClassification(config)


def _patchtst() -> nn.Module:
    config = transformers.PatchTSTConfig(
        num_input_channels=3,
        context_length=32,
        patch_length=8,
        patch_stride=8,
        d_model=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        ffn_dim=64,
        prediction_length=8,
        do_mask_input=False,
    )
    return transformers.PatchTSTForPrediction(config)


def _perceiver() -> nn.Module:
    config = transformers.PerceiverConfig(
        vocab_size=99,
        num_latents=8,
        d_latents=32,
        d_model=32,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        qk_channels=16,
        v_channels=32,
        max_position_embeddings=64,
    )
    return transformers.PerceiverForMaskedLM(config)


OTHERS: dict[str, tuple[Callable[[], nn.Module], Callable[[bool], Feed]]] = {
    "CLIPModel": (_clip, _clip_feed),
    "WhisperForConditionalGeneration": (_whisper, _whisper_feed),
    "ASTForAudioClassification": (_ast, lambda training: Feed((), {"input_values": torch.randn(2, 32, 16)})),
    "PatchTSTForPrediction": (_patchtst, lambda training: Feed((), {"past_values": torch.randn(2, 32, 3)})),
    "PerceiverForMaskedLM": (_perceiver, lambda training: Feed((), {"inputs": torch.randint(3, 99, (2, 64))})),
}


def cases() -> Iterator[Case]:
    """List the architectures."""
    for name, options in TEXT.items():
        yield Case(f"transformers/{name}", partial(_build, name, options), partial(_tokens, name))
    gpt2 = "GPT2LMHeadModel"  # its layers are of a class of its own, Conv1D, which "all" does not know
    build, feed = partial(_build, gpt2, TEXT[gpt2]), partial(_tokens, gpt2)
    yield Case(f"transformers/{gpt2}.named", build, feed, targets=["c_attn", "c_proj", "c_fc"])
    for name, options in IMAGES.items():
        yield Case(f"transformers/{name}", partial(_build, name, options), _pictures)
    for name, options in WAVES.items():
        yield Case(f"transformers/{name}", partial(_build, name, options), _waves)
    for name, (build, feed) in OTHERS.items():
        yield Case(f"transformers/{name}", build, feed)
