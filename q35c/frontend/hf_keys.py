"""What the keys of a Hugging Face `config.json` mean for the logits of the text tower.

A key that is not named here is refused unless its value says "nothing of the kind": null, false or empty. A weight that a
feature needs, or lacks, shows among the tensors as well.
"""

from __future__ import annotations

from typing import Any

# Keys that name a variant of the math of which one value is implemented.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attn_output_gate": (True,),
    "output_gate_type": ("swish", "silu"),
    "hidden_act": ("silu",),
    "mamba_ssm_dtype": ("float32",),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1,),
    "norm_topk_prob": (True,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
}
# Keys that other families' math takes: whatever they say, it is nothing that is computed here.
REFUSED = {
    "quantization_config": "use the unquantized (bf16, f16 or f32) checkpoint",
    "quantization": "an MLX conversion; use the unquantized original of it",
    "text_config": "a text config cannot hold another one",
    "qkv_bias": None,
    "router_jitter_noise": None,
    "moe_router_topk": None,
}

# Of the common base class: where a model comes from, what it returns, how it is run, the classes of a classifier's head.
# `auto_map` asks for code from the model directory: it is ignored, never run.
_BASE_CLASS = """architectures auto_map attn_implementation bos_token_id dtype experts_implementation finetuning_task
gradient_checkpointing id2label is_decoder label2id name_or_path num_labels output_attentions output_hidden_states
pad_token_id prefix problem_type return_dict sep_token_id task_specific_params tie_encoder_decoder tokenizer_class torch_dtype
torchscript transformers_version transformers_weights use_bfloat16 use_cache base_model_tp_plan base_model_pp_plan
pad_token eos_token bos_token unk_token processor_class"""
# Of training, of the family's relatives, and of other towers.
_OTHER_PARTS = """attention_dropout hidden_dropout embd_pdrop initializer_range initializer_factor output_router_logits
router_aux_loss_coef language_model_only max_window_layers model_name model_max_length num_nextn_predict_layers
vision_config vision_start_token_id vision_end_token_id image_token_id image_token_index video_token_id
video_token_index audio_config audio_token_id"""
# How text is sampled: generation_config.json is where q35c reads that.
SAMPLING = frozenset(
    [
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "generation_config",
    ]
)
_OTHER_GENERATION = """top_h typical_p epsilon_cutoff eta_cutoff
frequency_penalty length_penalty diversity_penalty encoder_repetition_penalty no_repeat_ngram_size
encoder_no_repeat_ngram_size bad_words_ids force_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id
forced_eos_token_id decoder_start_token_id sequence_bias guidance_scale watermarking_config renormalize_logits
remove_invalid_values exponential_decay_length_penalty max_length max_new_tokens min_length min_new_tokens max_time stop_strings
early_stopping num_beams num_beam_groups num_return_sequences penalty_alpha dola_layers constraints low_memory token_healing
output_scores output_logits return_dict_in_generate cache_implementation cache_config max_cache_len compile_config
disable_compile prefill_chunk_size continuous_batching_config prompt_lookup_num_tokens max_matching_ngram_size
num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit
assistant_ensemble_weight assistant_lookbehind target_lookbehind is_assistant speculation_type use_mtp"""
IRRELEVANT = SAMPLING.union(_BASE_CLASS.split(), _OTHER_PARTS.split(), _OTHER_GENERATION.split())
# Private notes, notes of tools about their own work, and the draft layer for speculation.
_NOTES = (
    "_",
    "unsloth",
    "transformers.js",
    "axolotl",
    "llamafactory",
    "mergekit",
    "swift_",
    "trl_",
    "peft_",
    "mtp_",
)


def is_irrelevant(key: str) -> bool:
    """Tell whether a key cannot change the logits, whatever its value is."""
    return key in IRRELEVANT or key.startswith(_NOTES)


def is_absent(value: Any) -> bool:
    """Tell whether the value of a key that is not known says that the model has nothing of the kind."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)
