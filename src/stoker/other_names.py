"""The names that other trainers and searchers use for stoker's keys, options and commands.

They are those of transformers' Trainer, TRL, peft, Axolotl, LLaMA-Factory, torchtune and Lightning, and of
Optuna, Ray Tune, Determined and W&B's sweeps; docs/coming-from-trainers.md and docs/coming-from.md have the
details.
"""

from __future__ import annotations

from collections.abc import Container

# A stoker key, a key with its value, or several keys -> the names that other trainers use for it.
_KEYS = {
    "model": (
        "base_model checkpoint_dir checkpoint_files model_name model_name_or_path "
        "pretrained_model_name_or_path"
    ),
    "data": "dataset dataset_name dataset_path datasets train_dataset train_file",
    "validation_data": "eval_data eval_dataset test_datasets val_dataset validation_dataset validation_file",
    "tokenizer": "tokenizer_name tokenizer_name_or_path",
    "columns": (
        "dataset_text_field field_instruction field_messages field_output message_field_content "
        "message_field_role message_property_mappings text_column text_field"
    ),
    "chat_template": "chat_template_jinja chat_template_path prompt_template template",
    "chat_template_kwargs": "enable_thinking",
    "lr": "learning_rate max_lr peak_lr",
    "schedule": "lr_schedule lr_scheduler lr_scheduler_type scheduler",
    "warmup": "num_warmup_steps warmup_ratio warmup_steps",
    "optimizer": "optim optimizer_name",
    "workers": "dataloader_num_workers num_workers",
    "weight_decay": "wd",
    "betas": "adam_beta1 adam_beta2 adam_betas",
    "eps": "adam_eps adam_epsilon epsilon",
    "min_lr": "cosine_min_lr_ratio lr_scheduler_kwargs min_lr_ratio min_lr_rate",
    "clip_norm": "clip_grad_norm grad_clip gradient_clip_val gradient_clipping max_grad_norm",
    "epochs": "max_epochs n_epochs num_epochs num_train_epochs",
    "max_steps": "max_iters max_train_steps num_steps num_training_steps total_steps",
    "batch_size": "global_batch_size train_batch_size",
    "batch_size micro_batch": (
        "accumulate_grad_batches grad_accum_steps gradient_accumulation_steps micro_batch_size "
        "per_device_batch_size per_device_train_batch_size per_gpu_train_batch_size"
    ),
    "micro_batch=auto": "auto_find_batch_size",
    "sequence_length": (
        "block_size context_length cutoff_len max_len max_length max_seq_len max_seq_length model_max_length "
        "seq_len seq_length sequence_len"
    ),
    "packing": "eval_sample_packing neat_packing packed sample_packing",
    "loss_on": (
        "assistant_only_loss completion_only_loss train_on_input train_on_inputs train_on_prompt "
        "train_on_responses_only"
    ),
    "loss_on=last": "last_turn_only mask_history train_on_last_turn_only",
    "backend": "ddp_backend",
    "lora.rank": "lora.r lora_r lora_rank peft_config.r r",
    "lora.alpha": "lora.lora_alpha lora_alpha peft_config.lora_alpha",
    "lora.dropout": "lora.lora_dropout lora_dropout peft_config.lora_dropout",
    "lora.targets": (
        "apply_lora_to_mlp apply_lora_to_output lora.target_modules lora_attn_modules lora_target "
        "lora_target_linear lora_target_modules peft_config.target_modules target_modules"
    ),
    "lora.modules_to_save": (
        "additional_target lora_modules_to_save modules_to_save peft_config.modules_to_save"
    ),
    "add_tokens": "additional_special_tokens new_special_tokens resize_vocab special_tokens",
    "lora.rslora": "lora_use_rslora peft_use_rslora use_rslora",
    "lora.dora": "lora_use_dora peft_use_dora use_dora",
    "lora.lr_ratio": "loraplus_lr_ratio",
    "lora.adapter": "adapter_name_or_path lora_model_dir",
    "train_only": "unfrozen_parameters freeze_trainable_modules",
    "router_aux_loss": "aux_loss_coef moe_aux_loss_coef output_router_logits router_aux_loss_coef",
    "neftune": "neftune_noise_alpha noisy_embedding_alpha",
    "quantisation=nf4": "load_in_4bit qlora quantization quantization_bit quantize_base",
    "precision": "dtype mixed_precision torch_dtype",
    "precision=bf16": "bf16",
    "precision=fp16": "fp16",
    "activation_checkpointing=full": "enable_activation_checkpointing gradient_checkpointing",
    "compile": "torch_compile",
    "kernels=liger": (
        "liger_fused_linear_cross_entropy liger_glu_activation liger_rms_norm liger_rope use_liger "
        "use_liger_kernel"
    ),
    "parallel": "distributed_strategy fsdp_config fsdp_sharding_strategy strategy",
    "on_bad_loss": "loss_watchdog_patience loss_watchdog_threshold",
    "ddp.find_unused_parameters": "ddp_find_unused_parameters find_unused_parameters",
    "eval_every": "eval_frequency eval_interval eval_steps evals_per_epoch val_check_interval",
    "patience": "early_stopping_patience",
    "load_best": "load_best_model_at_end restore_best_weights",
    "checkpoint_best": "save_best",
    "validation": "val_set_size val_size validation_split",
    "checkpoint_every": "save_every save_interval save_steps saves_per_epoch",
    "keep_checkpoints": "save_total_limit",
    "data_share": "limit_train_batches max_samples max_train_samples",
    "generate_tokens": "eval_max_new_tokens max_new_tokens",
    "deterministic": "full_determinism use_deterministic_algorithms",
    "seed": "data_seed manual_seed random_seed random_state",
}
_COMMANDS = {
    "output_dir": "every run has its own folder: use the options --runs DIR and --name NAME",
    "run_name": "use the option --name NAME",
    "resume_from_checkpoint": (
        "to resume from the newest checkpoint, repeat the command with the same --name NAME, or use "
        "`stoker resume RUN`"
    ),
    "report_to": "choose trackers with an environment variable, as in STOKER_SINKS=wandb",
    "logging_steps": "not needed: every value that is logged is kept, and recipes log every step",
    "num_processes": "use the option --nproc N",
    "num_machines": "use the option --nodes N",
    "push_to_hub": "when the run has ended, push it with `stoker models push RUN hub:org/name`",
    "plot_loss": "use `stoker report RUN`, which draws the curves",
    "wandb_project": (
        "set environment variables: STOKER_SINKS=wandb, and W&B's own, such as WANDB_PROJECT and WANDB_ENTITY"
    ),
    "shuffle": "not needed: data is always shuffled, in an order that depends on seed",
    "local_rank": "not needed: the option --nproc N starts the ranks",
    "overwrite_output_dir": "not needed: give another run another --name NAME",
    "save_strategy": "set intervals, as in checkpoint_every=500 and eval_every=1ep",
    "model_revision": "give the revision with the name: model=org/name@revision",
    "model_type": "not needed: it is read from the model's files",
    "trust_remote_code": "not supported: code from a hub is never run",
    "label_smoothing_factor": "stoker has no equivalent",
    "save_only_model": (
        "not needed: the export has the weights alone, and checkpoints have what a run is resumed from"
    ),
    "save_safetensors": "not needed: all weights are written as safetensors",
    "do_train": "not needed: `stoker train` trains, `stoker evaluate` only evaluates",
    "per_device_eval_batch_size": "not needed: evaluations take batches as training does",
    "gradient_checkpointing_kwargs": "not needed: activation checkpointing is never re-entrant",
    "log_peak_memory_stats": "not needed: the peak memory of each rank is in every run",
    "checkpointer": "not needed: models are read and exported as Hugging Face files",
    "device": "not needed: GPUs are used if there are any",
    "profiler": "use the option --profile FIRST:LAST, with two steps",
    "dataset_split": (
        "give the split with the name: data=org/name#/split, org/name#config/split, or a slice, "
        "org/name#/train[:20%]"
    ),
}
_OF_TEXTS = {
    "flash_attention": "not needed: on GPUs attention is one kernel, which attends within each document",
    "pad_to_sequence_len": (
        "not needed: packed rows are full, and others are padded to the longest row of their batch"
    ),
    "group_by_length": "not needed: with packing=true, documents share rows with almost no padding",
    "dataset_prepared_path": "not needed: tokenised data is cached in STOKER_CACHE and found by its content",
    "adapter": "to train adapters, set lora.rank, as in lora.rank=16; otherwise the model's own weights are",
    "loraplus_lr_embedding": "with lora.lr_ratio, the adapter of an embedding learns at lr",
    "eos_token": "special tokens come from the tokenizer; add_tokens adds others",
    "system_prompt": "put it into each record: a field `system`, or a first message with that role",
    "interleave_probs": "give each source its weight, as in data: {a.jsonl: 3, b.jsonl: 1}",
    "dataset_dir": "not needed: data takes paths, and a folder as a whole",
    "stage": (
        "not needed: texts are pretraining, pairs and conversations are fine-tuning; ZeRO's stage is "
        "deepspeed.stage"
    ),
    "dataloader_num_workers": "not needed: tokenised texts are read from memory",
    "eval_table_size": "the texts in prompts are answered at each evaluation, with generate_tokens at most",
    "plugins": "not supported; Liger's kernels are kernels=liger",
    "loss": "not needed: cross-entropy, which is computed in pieces where that saves memory",
    "lora_fan_in_fan_out": "not needed: it is known from the model's layers",
}
_SAME = {
    "output_dir": "default_root_dir log_dir logging_dir out_dir",
    "resume_from_checkpoint": "auto_resume_from_checkpoints ckpt_path recipe_checkpoint resume",
    "report_to": "logger metric_logger trackio_project use_wandb",
    "interleave_probs": "interleave_probability mix_strategy",
    "do_train": "do_eval do_predict",
    "per_device_eval_batch_size": "eval_batch_size",
    "dataloader_num_workers": "dataloader_pin_memory dataloader_prefetch_factor num_workers",
    "profiler": "profile torch_profiler",
    "save_only_model": "save_adapter_weights_only",
    "wandb_project": "wandb_entity wandb_log_model wandb_name wandb_run_id wandb_watch",
    "flash_attention": "attn_implementation flash_attn sdp_attention xformers_attention",
    "group_by_length": "train_sampling_strategy",
    "dataset_prepared_path": (
        "dataset_num_proc dataset_processes overwrite_cache preprocessing_num_workers tokenized_path"
    ),
    "local_rank": "ddp_timeout",
    "overwrite_output_dir": "overwrite",
    "save_strategy": "eval_strategy evaluation_strategy",
    "adapter": "finetuning_type",
    "model_type": "strict tokenizer_type",
    "dataset_split": "split train_split",
    "model_revision": "revision",
    "eos_token": "bos_token pad_token unk_token",
    "label_smoothing_factor": (
        "enable_activation_offloading fp8 init_lora_weights load_in_8bit lora_mlp_kernel lora_o_kernel "
        "lora_qkv_kernel peft_init_lora_weights roles_to_train"
    ),
    "logging_steps": "log_every_n_steps log_interval logging_strategy",
    "num_processes": "devices gpus n_gpus nproc nproc_per_node num_gpus",
    "num_machines": "nnodes num_nodes",
    "push_to_hub": "hub_model_id",
}
# An option of `stoker sweep` -> the names that other searchers use for it.
_OF_SEARCHES = {
    "--trials N": "max_trials n_trials num_samples num_trials run_cap",
    "--parallel N": "max_concurrent max_concurrent_trials n_jobs",
    "--goal min or --goal max": "direction directions",
    "--metric NAME": "objective",
    "--sampler NAME": "search_alg search_algorithm",
    "--scheduler NAME": "early_terminate pruner",
    "--max-time TIME": "time_budget_s",
    "--least DURATION": "grace_period min_resource",
    "--most DURATION": "max_resource max_t",
    "--factor N": "reduction_factor",
    "--nproc N": "gpus_per_trial resources_per_trial",
    "--study NAME": "study_name",
    "--try KEY=VALUE,...": "points_to_evaluate",
}
# Likewise, names that mean this only as an option of a search.
_IN_SEARCHES = {
    "--trials N": "count max_evals n_iter samples",
    "--parallel N": "concurrency concurrent jobs",
    "--goal min or --goal max": "mode",
    "--sampler NAME": "algorithm method",
    "--max-time TIME": "timeout",
}
_OURS = {name: key for key, names in _KEYS.items() for name in names.split()}
_OPTIONS = _COMMANDS | _OF_TEXTS
_OPTIONS |= {name: _OPTIONS[key] for key, names in _SAME.items() for name in names.split()}
_OPTIONS |= {
    name: f"use `stoker sweep`'s option {option}"
    for option, names in _OF_SEARCHES.items()
    for name in names.split()
}
_FOR_TEXTS = {*_OF_TEXTS, *(name for key in _OF_TEXTS for name in _SAME.get(key, "").split())}
_KEY_OF_TEXTS = "loss_on"
"""A key that only the configs of language models have."""

_LEAST = 5  # the fewest letters that identify a name by its beginning


def keys_for(name: str, keys: Container[str]) -> tuple[str, ...]:
    """The keys for another trainer's name: `lr`, or with a value `precision=bf16`; empty unless all exist."""
    found = tuple(_OURS.get(name, "").split())
    return found if all(key.partition("=")[0] in keys for key in found) else ()


def command_for(name: str, keys: Container[str] | None = None) -> str:
    """A clause that says what replaces another trainer's key; empty if unknown.

    Args:
        keys: of the config, if it is known: for some names there is an answer only in a language model's.
    """
    if keys is not None and name in _FOR_TEXTS and _KEY_OF_TEXTS not in keys:
        return ""
    return _OPTIONS.get(name, "")


def option_of_search(name: str) -> str:
    """The option of `stoker sweep` for another searcher's name; empty if unknown."""
    both = (*_OF_SEARCHES.items(), *_IN_SEARCHES.items())
    return next((option for option, names in both if name in names.split()), "")


def begun(name: str) -> str:
    """The shortest name of another trainer that starts like this (`gradient_accum`); empty if none does."""
    if len(name) < _LEAST:
        return ""
    return min((known for known in _OURS if known.startswith(name)), key=len, default="")
