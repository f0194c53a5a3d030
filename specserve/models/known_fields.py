"""The fields of config.json that do not affect what a model computes here.

A field that the readers do not read must be listed here; any other field is an error, unless it is
null, false, zero or empty.
"""

from collections.abc import Mapping
from typing import Any, Final

# Origin of the file, and settings of the libraries that wrote it or run it.
_ORIGIN = """
    architectures model_type name_or_path dtype torch_dtype tokenizer_class is_llama_config
    finetuning_task task_specific_params prefix problem_type id2label label2id num_labels
    attn_implementation use_flash_attn use_flash_attention use_flash_attention_2 flash_attn
    use_bfloat16 use_cache return_dict torchscript tf_legacy_loss pruned_heads onnx
    pretraining_tp gradient_checkpointing use_gradient_checkpointing is_decoder
    tie_last_hidden_states tie_encoder_decoder cross_attention_hidden_size
    num_nextn_predict_layers ignore_index keys_to_ignore_at_inference
"""
# Used only in training.
_TRAINING = """
    initializer_range attention_dropout attn_dropout attn_pdrop embd_pdrop resid_pdrop dropout
    hidden_dropout hidden_dropout_prob residual_dropout embedding_dropout layerdrop
    attention_probs_dropout_prob neftune_noise_alpha router_aux_loss_coef output_router_logits
"""
# Generation defaults of the library that wrote the file; here each request has its own settings.
_GENERATION = """
    max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings
    do_sample num_beams num_beam_groups use_mtp cache_implementation cache_config max_cache_len
    temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty
    encoder_repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids force_words_ids renormalize_logits constraints
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens sequence_bias token_healing guidance_scale
    watermarking_config num_return_sequences output_attentions output_hidden_states output_scores
    output_logits return_dict_in_generate return_legacy_cache encoder_outputs
    prompt_lookup_num_tokens max_matching_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit
    assistant_lookbehind target_lookbehind penalty_alpha dola_layers low_memory prefill_chunk_size
    compile_config disable_compile is_assistant
"""
# Special tokens and lengths of the tokenizer, which are read from the tokenizer's own files.
_TOKENS = """
    bos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id
    model_max_length max_sequence_length max_seq_len max_seq_length seq_length n_ctx
"""
_HARMLESS: Final = frozenset(f"{_ORIGIN} {_TRAINING} {_GENERATION} {_TOKENS}".split())
_HARMLESS_PREFIXES: Final = ("_", "tokenizer_", "transformers", "unsloth")

# Features that are not supported, with the value at which each has no effect. Other values are
# errors.
NEUTRAL: Final[Mapping[str, Any]] = {
    "is_causal": True,
    "causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "logit_scale": 1,
    "lm_head_multiplier": 1,
    "rotary_pct": 1,
}

# Fields of rope_scaling that may stay unread: parameters of the supported kinds, because a model of
# one kind may list those of another, and fields that have no effect on text input.
_ROPE = """
    type rope_type factor original_max_position_embeddings low_freq_factor high_freq_factor
    beta_fast beta_slow attention_factor mscale mscale_all_dim truncate finetuned mrope_section
"""
HARMLESS_ROPE: Final = frozenset(_ROPE.split())


def is_harmless(name: str) -> bool:
    """Whether a field of config.json is known not to affect what the model computes."""
    return name in _HARMLESS or name.startswith(_HARMLESS_PREFIXES)
