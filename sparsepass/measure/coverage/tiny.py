"""Tiny random models of transformers architectures: the default configuration with every size made small."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from sparsepass.measure.coverage.architectures import Kind, class_name
from sparsepass.measure.coverage.own import checkpoint_config
from sparsepass.measure.coverage.special import (
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    MADE,
    SPECIAL,
    VOCABULARY,
    WINDOW,
)
from sparsepass.measure.models import ModelError

LAYERS, POSITIONS = 1, 1024
"""One layer of each type: they are all alike, and capturing them is most of the time."""
MOST_PARAMETERS = 80_000_000
"""A configuration that stays larger than this is not built."""


def _names(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


_SET_ANYWAY = ("head_dim", "n_inner", "pad_token_id", "num_key_value_heads")
LISTED = "is listed on its own"
ABSENT = "does not support an attention impl"
"""What transformers says of a model without SDPA."""


SIZES: dict[str, Any] = (
    _names(HIDDEN, "hidden_size d_model n_embd embedding_size encoder_embed_dim decoder_embed_dim decoder_hidden_size")
    | _names(HIDDEN, "emb_dim embed_proj_dim word_embed_proj_dim projection_dim lru_width conv_dim block_dim dim")
    | _names(HIDDEN, "hidden_size_per_layer_input_ moe_latent_size memory_size vision_hidden_size")
    | _names(INTERMEDIATE, "intermediate_size n_inner ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size")
    | _names(INTERMEDIATE, "moe_intermediate_size dense_intermediate_size shared_expert_intermediate_size dim_ff dff")
    | _names(INTERMEDIATE, "mlp_hidden_size block_ff_dim moe_shared_expert_intermediate_size intermediate_size_mlp")
    | _names(
        INTERMEDIATE, "feed_forward_size block_auto_adjust_ff_dim_ shared_intermediate_size expert_ffn_hidden_size"
    )
    | _names(INTERMEDIATE, "mlp_ffn_hidden_size mamba_d_ssm d_inner_ expert_ffn_size moe_ffn_hidden_size")
    | _names(HEADS, "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads")
    | _names(HEADS, "num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads")
    | _names(KV_HEADS, "num_key_value_heads n_kv_heads num_kv_heads kv_n_heads swa_num_key_value_heads")
    | _names(HEAD_DIM, "head_dim attention_head_dim d_kv kv_channels swa_head_dim swa_v_head_dim d_head_")
    | _names(
        HEAD_DIM,
        "qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim global_head_dim",
    )
    | _names(
        HEAD_DIM, "mamba_d_head mamba_head_dim mamba_d_state ssm_state_size mamba_headdim state_size time_step_rank_"
    )
    | _names(8, "rotary_dim hidden_size_per_layer_input mamba_n_heads mamba_num_heads n_mamba_heads_")
    | _names(
        32,
        "index_head_dim q_lora_rank kv_lora_rank o_lora_rank vocab_size_per_layer_input_ mamba_chunk_size chunk_size",
    )
    | _names(LAYERS, "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_decoder_layers")
    | _names(LAYERS, "num_encoder_layers decoder_num_hidden_layers encoder_num_hidden_layers depth")
    | _names(EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts moe_num_experts_ n_experts")
    | _names(2, "num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token experts_per_token moe_top_k")
    | _names(2, "linear_num_key_heads mamba_n_groups_ index_n_heads num_selects")
    | _names(4, "linear_num_value_heads mamba_d_conv mamba_dt_rank")
    | _names(1, "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace mamba_n_groups n_groups")
    | _names(VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size")
    | _names(WINDOW, "sliding_window attention_chunk_size local_attention window_size_ attention_window_size")
    | _names(
        POSITIONS, "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx max_source_positions"
    )
    | _names(POSITIONS, "max_target_positions seq_length_ max_sequence_len seq_len_")
    | {"index_topk": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    | {"image_token_id": 3, "image_size": 128, "patch_size": 8, "use_cache": False, "attn_layer_period": 2}
    | {"attn_layer_offset": 1, "attn_layer_indices": [1], "unk_token_id": 3, "sep_token_id": 2, "num_labels": 5}
    | {"num_kv_shared_layers": 0, "num_nextn_predict_layers": 0, "num_mem_blocks": 1, "num_global_layers": 1}
)
"""Sizes by the names that configurations give them. A name that ends in ``_`` is left out, on purpose."""


def tiny_config(arch: str, kind: Kind) -> Any:
    """The small configuration of an architecture. Raises ``ModelError``."""
    import transformers

    mapping: Any = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    try:
        if (kind, arch) in MADE:
            return MADE[kind, arch]()
        default = _default(mapping[arch], arch, kind)
        if kind is Kind.DECODER:
            text = default.get_text_config(decoder=True)
            if type(text) is not type(default) and text.model_type in mapping:
                if text.model_type in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                    raise ModelError(f"its language model is {text.model_type}, which {LISTED}")
                default = text
        return _shrunk(default, kind)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"no tiny configuration: {first_line(error)}") from error


def _default(made: Callable[[], Any], arch: str, kind: Kind) -> Any:
    """The default configuration; of the part that the model class takes, where the whole has none."""
    import transformers

    try:
        return made()
    except Exception:
        own: Any = getattr(getattr(transformers, class_name(kind, arch), None), "config_class", made)
        if own is made:
            raise
        return own()


def build(arch: str, kind: Kind, implementation: str) -> Any:
    """A tiny random fp32 model in eval mode on the CPU. Raises ``ModelError`` with what went wrong."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = tiny_config(arch, kind)
    own: Any = getattr(transformers, class_name(kind, arch), None)
    if own is not None and isinstance(config, getattr(own, "config_class", None) or ()):
        return _built(own._from_config, config, implementation)  # also for parts of larger models
    return _built(getattr(transformers, kind.auto_class).from_config, config, implementation)


def build_checkpoint(source: str, kind: Kind, implementation: str, trust: bool) -> Any:
    """The same of a checkpoint's configuration, its own settings kept but for the sizes; its weights are not read.

    ``trust`` lets transformers run the checkpoint's own code. Raises ``ModelError``.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    given = checkpoint_config(source, trust)
    try:
        config = _shrunk(given, kind, given.to_dict())
    except Exception as error:
        raise ModelError(f"its configuration cannot be made small: {first_line(error)}") from error
    config._name_or_path = source
    if getattr(given, "auto_map", None):
        config.auto_map = given.auto_map
    auto: Any = getattr(transformers, kind.auto_class)
    return _built(functools.partial(auto.from_config, trust_remote_code=trust), config, implementation)


def _built(make: Callable[..., Any], config: Any, implementation: str) -> Any:
    import torch

    def made() -> Any:
        return make(copy.deepcopy(config), attn_implementation=implementation, dtype=torch.float32)

    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in made().parameters())
    except Exception:
        size = 0  # some constructors compute with their weights
    if size > MOST_PARAMETERS:
        raise ModelError(f"the tiny configuration still has {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    try:
        model = made().eval()
    except Exception as error:
        raise ModelError(f"the tiny model cannot be built: {first_line(error)}") from error
    settle(model)
    return model


def settle(model: Any) -> None:
    """Parameters that a constructor left unset (gates, sinks, positions) get small values."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if not torch.isfinite(parameter).all() or parameter.abs().max() > 1e4:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def _shrunk(default: Any, kind: Kind, kept: dict[str, Any] | None = None) -> Any:
    """The configuration again with every size made small; parts of it likewise. ``kept``: its other settings."""
    made = type(default)
    held = default.to_dict()
    mapped = getattr(default, "attribute_map", {})
    held |= {name: held[other] for name, other in mapped.items() if other in held}
    known = set(held) | set(mapped)
    fields = {name: value for name, value in SIZES.items() if name in known and not _derived(made, name)}
    for name in list(fields):  # None means "as another size" or "not used": keep it so
        unused = held.get(name) is None and name not in _SET_ANYWAY
        several = isinstance(held.get(name), list | tuple) and not isinstance(fields[name], list)
        if unused or several:
            del fields[name]
    if "kv_lora_rank" in known and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = HEADS  # latent attention expands to every head
    for name in getattr(made, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None and hasattr(part, "to_dict"):
            fields[name] = _shrunk(part, kind)
    fields |= _layers(default)
    rope = getattr(default, "rope_parameters", None)
    if rope and "mrope_section" in str(rope):
        fields["rope_parameters"] = _scaled_sections(rope)
    if kind is Kind.DECODER and hasattr(default, "is_decoder"):
        fields["is_decoder"] = True
    fields |= SPECIAL.get(default.model_type, {})
    for alias, name in mapped.items():
        if alias in fields and name in fields:
            del fields[alias]
    return _make(made, (kept or {}) | fields)


def _make(made: Callable[..., Any], fields: dict[str, Any]) -> Any:
    try:
        return made(**fields)
    except Exception:
        # A list of layers that does not fit, say: the architecture's own default pattern is the next best.
        rest = {name: value for name, value in fields.items() if name not in ("layer_types", "mlp_layer_types")}
        if rest == fields:
            raise
        return made(**rest)


def _layers(default: Any) -> dict[str, Any]:
    """One layer of each type, so that windows, full and linear attention are all there."""
    types = getattr(default, "layer_types", None)
    if not types or isinstance(getattr(type(default), "layer_types", None), list):  # the names that a class accepts
        return {}
    distinct = list(dict.fromkeys(types))
    chosen = distinct if len(distinct) > 1 else distinct * LAYERS
    fields: dict[str, Any] = {"num_hidden_layers": len(chosen)}
    if "layer_types" in default.to_dict() and not _derived(type(default), "layer_types"):
        fields["layer_types"] = chosen
    feed_forward = getattr(default, "mlp_layer_types", None)
    if feed_forward:
        kinds = list(dict.fromkeys(feed_forward))
        fields["mlp_layer_types"] = [kinds[min(place, len(kinds) - 1)] for place in range(len(chosen))]
    return fields


def _scaled_sections(rope: Any) -> Any:
    """Multimodal rotary sections of a head of 16: they must add up to half of it."""
    rope = copy.deepcopy(rope)
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if "mrope_section" in one:
            half = int(HEAD_DIM // 2 * one.get("partial_rotary_factor", 1.0))
            first = max(half // 4, 0)
            second = (half - first) // 2
            one["mrope_section"] = [half - 2 * second, second, second]
    return rope


def _derived(made: type, name: str) -> bool:
    held = getattr(made, name, None)
    return isinstance(held, property) and held.fset is None


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, at most 200 characters.

    Of a validation error, whose first line names a validator, the second.
    """
    lines = str(error).strip().splitlines()
    place = int(len(lines) > 1 and "Validation" in type(error).__name__)
    text = " ".join(lines[place].split())[:200] if lines else ""
    return (
        f"{type(error).__name__}: {text}"
        if text and not isinstance(error, ModelError)
        else text or type(error).__name__
    )
