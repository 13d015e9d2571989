"""What other trainers call the keys and commands here, for those who come from them.

The names are those of transformers' Trainer, TRL, peft, Axolotl, LLaMA-Factory, torchtune and Lightning, of
which docs/coming-from-trainers.md says more.
"""

from __future__ import annotations

from collections.abc import Container

# A key as it is called here, or with the value that is meant; several where both are.
_KEYS = {
    "model": "base_model model_name model_name_or_path pretrained_model_name_or_path",
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
    "packing": "neat_packing packed sample_packing",
    "loss_on": (
        "assistant_only_loss completion_only_loss train_on_input train_on_inputs train_on_prompt "
        "train_on_responses_only"
    ),
    "loss_on=last": "last_turn_only mask_history train_on_last_turn_only",
    "lora.rank": "lora.r lora_r lora_rank peft_config.r r",
    "lora.alpha": "lora.lora_alpha lora_alpha peft_config.lora_alpha",
    "lora.dropout": "lora.lora_dropout lora_dropout peft_config.lora_dropout",
    "lora.targets": (
        "lora.target_modules lora_target lora_target_linear lora_target_modules peft_config.target_modules "
        "target_modules"
    ),
    "lora.modules_to_save": (
        "additional_target lora_modules_to_save modules_to_save peft_config.modules_to_save"
    ),
    "add_tokens": "additional_special_tokens new_special_tokens resize_vocab special_tokens",
    "lora.rslora": "lora_use_rslora peft_use_rslora use_rslora",
    "lora.dora": "lora_use_dora peft_use_dora use_dora",
    "lora.adapter": "adapter_name_or_path lora_model_dir",
    "train_only": "unfrozen_parameters freeze_trainable_modules",
    "neftune": "neftune_noise_alpha noisy_embedding_alpha",
    "quantisation=nf4": "load_in_4bit qlora quantization quantization_bit",
    "precision": "dtype mixed_precision torch_dtype",
    "precision=bf16": "bf16",
    "precision=fp16": "fp16",
    "activation_checkpointing=full": "enable_activation_checkpointing gradient_checkpointing",
    "compile": "torch_compile",
    "kernels=liger": "use_liger use_liger_kernel",
    "parallel": "distributed_strategy strategy",
    "ddp.find_unused_parameters": "ddp_find_unused_parameters find_unused_parameters",
    "eval_every": "eval_frequency eval_interval eval_steps evals_per_epoch val_check_interval",
    "patience": "early_stopping_patience",
    "checkpoint_best": "load_best_model_at_end save_best",
    "validation": "val_set_size val_size validation_split",
    "checkpoint_every": "save_every save_interval save_steps saves_per_epoch",
    "keep_checkpoints": "save_total_limit",
    "data_share": "limit_train_batches max_samples max_train_samples",
    "generate_tokens": "max_new_tokens",
    "deterministic": "full_determinism use_deterministic_algorithms",
    "seed": "data_seed manual_seed random_seed random_state",
}
_COMMANDS = {
    "output_dir": "a run is written to a folder of its own under --runs DIR, called --name NAME",
    "run_name": "the option is --name NAME",
    "resume_from_checkpoint": (
        "the same command with the same --name NAME goes on from the newest checkpoint, and so does "
        "`stoker resume RUN`"
    ),
    "report_to": "trackers are named by a variable, as in STOKER_SINKS=wandb",
    "logging_steps": "it needs none: whatever is logged is kept, and recipes log every step",
    "num_processes": "the option is --nproc N",
    "num_machines": "the option is --nodes N",
    "push_to_hub": "a run that has ended is pushed by `stoker models push RUN hub:org/name`",
    "plot_loss": "curves are in `stoker report RUN`",
    "wandb_project": (
        "trackers are named by a variable, as in STOKER_SINKS=wandb, and W&B's own hold, as WANDB_PROJECT "
        "and WANDB_ENTITY"
    ),
    "flash_attention": "it needs none: on GPUs attention is one kernel, within each document",
    "pad_to_sequence_len": "it needs none: packed rows are full, others as long as the longest of a batch",
    "group_by_length": "it needs none: documents share rows by packing=true, with next to no padding",
    "dataset_prepared_path": "it needs none: what was tokenised is found by its content, in STOKER_CACHE",
    "shuffle": "it needs none: the order is shuffled by seed",
    "local_rank": "it needs none: ranks are begun by --nproc N",
    "overwrite_output_dir": "it needs none: another run has another --name NAME",
    "save_strategy": "say how often, as in checkpoint_every=500 and eval_every=1ep",
    "adapter": "adapters are trained where lora.rank is given, as in lora.rank=16, and else every weight is",
    "dataset_split": "a split is part of the name: data=org/name#/split, or org/name#config/split",
    "model_revision": "a revision is part of the name: model=org/name@revision",
    "eos_token": "they are the tokenizer's own; add_tokens gives it others",
    "system_prompt": "it is part of a record, its field `system` or a first message of the role `system`",
    "model_type": "it needs none: it is known from the model's files",
    "trust_remote_code": "there is none: code of a hub is never run here",
    "rope_scaling": "there is nothing like it here",
}
_SAME = {
    "output_dir": "default_root_dir logging_dir out_dir",
    "resume_from_checkpoint": "auto_resume_from_checkpoints ckpt_path resume",
    "report_to": "logger trackio_project use_wandb",
    "wandb_project": "wandb_entity wandb_log_model wandb_name wandb_run_id wandb_watch",
    "flash_attention": "attn_implementation flash_attn sdp_attention xformers_attention",
    "group_by_length": "train_sampling_strategy",
    "dataset_prepared_path": (
        "dataset_num_proc dataset_processes overwrite_cache preprocessing_num_workers tokenized_path"
    ),
    "local_rank": "ddp_backend ddp_timeout",
    "overwrite_output_dir": "overwrite save_only_model save_safetensors",
    "save_strategy": "eval_strategy evaluation_strategy",
    "adapter": "finetuning_type",
    "model_type": "strict tokenizer_type",
    "dataset_split": "split train_split",
    "model_revision": "revision",
    "eos_token": "bos_token pad_token unk_token",
    "rope_scaling": (
        "fp8 init_lora_weights label_smoothing_factor load_in_8bit loraplus_lr_ratio peft_init_lora_weights "
        "roles_to_train"
    ),
    "logging_steps": "log_every_n_steps log_interval logging_strategy",
    "num_processes": "devices gpus n_gpus nproc nproc_per_node num_gpus",
    "num_machines": "nnodes num_nodes",
    "push_to_hub": "hub_model_id",
}
_OURS = {name: key for key, names in _KEYS.items() for name in names.split()}
_OPTIONS = _COMMANDS | {name: _COMMANDS[key] for key, names in _SAME.items() for name in names.split()}

_LEAST = 5  # letters that tell which name is begun


def keys_for(name: str, keys: Container[str]) -> tuple[str, ...]:
    """What is called so elsewhere: `lr`, or with its value `precision=bf16`; empty where not all are keys."""
    found = tuple(_OURS.get(name, "").split())
    return found if all(key.partition("=")[0] in keys for key in found) else ()


def command_for(name: str) -> str:
    """Which option or command does what a key elsewhere does, as a clause; empty where none is known."""
    return _OPTIONS.get(name, "")


def begun(name: str) -> str:
    """What a key elsewhere is called of which this is the beginning, as `gradient_accum`; empty for none."""
    if len(name) < _LEAST:
        return ""
    return min((known for known in _OURS if known.startswith(name)), key=len, default="")
