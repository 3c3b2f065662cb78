"""What some architectures need besides small sizes: patterns of layers, stages of images, sizes that must agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsepass.measure.coverage.architectures import Kind

HIDDEN, INTERMEDIATE, VOCABULARY = 64, 128, 320
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
EXPERTS, WINDOW = 4, 200

_MIXED = ["linear_attention", "full_attention"]
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_STAGES = {"depths": [1, 1], "hidden_sizes": [32, 64], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}
_WINDOWS = {"image_size": 256, "embed_dim": HIDDEN, "depths": [2], "num_heads": [HEADS], "window_size": 16}
"""Four windows of 256 tokens, and the same shifted."""
_TWO_STAGES = {"num_stages": 2, "depths": [1, 1], "hidden_sizes": [16, 32]}

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "blt_local_decoder": {"hidden_size_global": HIDDEN},
    "blt_local_encoder": {"hidden_size_global": HIDDEN},
    "cohere_compass_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "convnext": _TWO_STAGES,
    "convnextv2": _TWO_STAGES,
    "cvt": {"embed_dim": [32, 64, 64], "num_heads": [2, 4, 4], "depth": [1, 2, 3]},
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": INTERMEDIATE, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "donut-swin": _WINDOWS,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": HEADS},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": _MIXED},
    "hiera": {
        "image_size": [128, 128],
        "embed_dim": 32,
        "depths": [1, 2],
        "num_heads": [2, 4],
        "num_query_pool": 1,
        "masked_unit_attention": [True, False],
    },
    "levit": {
        "image_size": 256,
        "patch_size": 16,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
    },
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "luke": {"entity_vocab_size": VOCABULARY, "entity_emb_size": HIDDEN},
    "mamba2": {"num_heads": 8, "head_dim": HEAD_DIM, "n_groups": 1},
    "mobilebert": {"intra_bottleneck_size": HIDDEN, "embedding_size": 32},
    "mobilevit": {"image_size": 256, "patch_size": 2},
    "mobilevitv2": {"image_size": 256},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3},
    "perceiver": {"d_latents": HIDDEN, "num_latents": 256, "num_self_attends_per_block": 1, "image_size": 32}
    | {"num_self_attention_heads": HEADS, "num_cross_attention_heads": HEADS},
    "pvt": _STAGES
    | {"num_encoder_blocks": 2, "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2], "strides": [4, 2]},
    "pvt_v2": _STAGES
    | {
        "image_size": [128, 128],
        "num_encoder_blocks": 2,
        "sr_ratios": [2, 1],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "num_buckets": 8},
    "rwkv": {"num_hidden_layers": 2},
    "segformer": _STAGES | {"num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2]},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "swin": _WINDOWS,
    "swinv2": _WINDOWS | {"pretrained_window_sizes": [0]},
    "vibevoice_acoustic_tokenizer_encoder": {"depths": [1] * 7, "num_filters": 2},
    "xlnet": {"d_head": HEAD_DIM, "d_inner": INTERMEDIATE},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": _HYBRID, "attention_hidden_size": 2 * HIDDEN}
    | {"attention_head_dim": 2 * HEAD_DIM, "num_key_value_heads": HEADS},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": _HYBRID, "num_key_value_heads": HEADS},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": HIDDEN},
}
"""By ``model_type``; parts of configurations have one of their own."""


def _encoder_and_decoder() -> Any:
    """BERT for both, with cross-attention: the class itself has no sizes."""
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 1024,
    }
    return transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**sizes),
        transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True),
        decoder_start_token_id=1,
        pad_token_id=0,
    )


MADE: dict[tuple[Kind, str], Callable[[], Any]] = {
    (Kind.ENCODER_DECODER, "encoder-decoder"): _encoder_and_decoder,
}
"""Configurations that no default leads to."""
