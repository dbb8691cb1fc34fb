"""What TRL's trainers take: the fields of the classes themselves, not those that they inherit, in version 1.14.2.

Those of GKDConfig and GRPOConfig are the same in 1.16.0, which has no MiniLLM trainer any more.
"""


def names(text: str) -> list[str]:
    return text.split()


MINILLM_TRAINER = names("""
    model teacher_model reward_funcs args train_dataset eval_dataset processing_class reward_processing_classes callbacks
    optimizers peft_config rollout_func
""")
"""Arguments of the constructor of MiniLLMTrainer."""

METHODS = names("""
    train() train(resume_from_checkpoint=) train(trial=) train(ignore_keys_for_eval=) save_model()
    push_to_hub() push_to_hub(commit_message=) push_to_hub(blocking=) push_to_hub(token=) push_to_hub(revision=)
    push_to_hub(**kwargs)
""")
"""Its methods and their arguments, as its documentation has them."""

MINILLM_CONFIG = names("""
    teacher_model_init_kwargs disable_dropout rkl_advantage single_step_decomposition kd_temperature gamma
    length_normalization
""")

GKD_CONFIG = names("""
    temperature lmbda beta max_new_tokens teacher_model_name_or_path teacher_model_init_kwargs disable_dropout seq_kd
""")

GRPO_CONFIG = names("""
    learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32
    remove_unused_columns num_generations num_generations_eval max_completion_length ds3_gather_for_generation
    shuffle_dataset pad_to_multiple_of generation_batch_size steps_per_generation temperature top_p top_k min_p
    generation_kwargs chat_template_kwargs repetition_penalty cache_implementation use_vllm vllm_mode vllm_model_impl
    vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port
    vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size beta
    num_iterations epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos
    vespo_k_neg vespo_lambda_neg importance_sampling_level reward_weights multi_objective_aggregation scale_rewards loss_type
    mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile entropy_coef
    use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target max_tool_calling_iterations
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min off_policy_mask_threshold use_bias_correction_kl log_completions log_multimodal
    num_completions_to_print log_unique_prompts log_completions_hub_repo use_transformers_continuous_batching
    transformers_continuous_batching_config use_transformers_paged vllm_importance_sampling_cap
""")
