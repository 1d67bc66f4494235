"""Flags of other trainers that `dti-fast train` does not have, and what to do instead.

The trainers are diffusers' textual_inversion scripts (and what its DreamBooth scripts add), kohya's
train_textual_inversion.py, OneTrainer's configuration, and the method's official code.
"""

import difflib
from collections.abc import Iterable

_ADVICE = {
    # The same thing under another name.
    "lr": "use --learning_rate",
    "batch_size": "use --train_batch_size",
    "steps": "use --max_train_steps",
    "base_model_name": "use --pretrained_model_name_or_path",
    "instance_data_dir concept_file_name": "use --train_data_dir",
    "token_string placeholder": "use --placeholder_token",
    "init_word initial_embedding_text": "use --initializer_token",
    "num_vectors_per_token num_new_tokens_per_abstraction token_count": "use --num_vectors",
    "token_scale": "use --magnitude",
    "what_to_teach": "use --learnable_property",
    "use_style_template": "use --learnable_property style",
    "use_object_template": "leave it out: templates for objects are the default, where no captions lie beside pictures",
    "v_parameterization": "use --prediction_type v_prediction",
    "output_model_destination workspace_dir": "use --output_dir",
    "resume": "use --resume_from_checkpoint, which takes a checkpoint file or latest",
    "save_every_n_steps save_every": "use --save_steps",
    "backup_after save_state save_state_on_train_end": "use --checkpointing_steps",
    "save_last_n_steps save_last_n_steps_state": "use --checkpoints_total_limit",
    "sample_every_n_steps sample_after": "use --validation_steps",
    "sample_prompts": "use --validation_prompt, once for each prompt",
    "train_device": "use --device",
    "train_dtype full_fp16 full_bf16": "use --mixed_precision",
    "weight_dtype fp8_base": "use --base_precision int8 or nf4",
    "learning_rate_scheduler lr_scheduler_type": "use --lr_scheduler, constant or cosine",
    "learning_rate_warmup_steps": "use --lr_warmup_steps",
    "rank network_dim": "use --lora_rank, which learns a LoRA beside the embedding",
    "network_alpha": "use --lora_alpha",
    "config_file config_path dataset_config": "use --config with a TOML file of this command's own flags",
    # Epochs.
    "num_train_epochs max_train_epochs epochs": "use --max_train_steps: a run is counted in steps",
    "save_every_n_epochs save_n_epoch_ratio save_last_n_epochs save_last_n_epochs_state": (
        "use --save_steps: a run is counted in steps"
    ),
    "validation_epochs sample_every_n_epochs": "use --validation_steps: a run is counted in steps",
    # Always so, or without a purpose here.
    "sdpa mem_eff_attn": "leave it out: this is the default (--attention)",
    "xformers enable_xformers_memory_efficient_attention": (
        "use --attention xformers; the default, PyTorch's own attention, needs no package"
    ),
    "center_crop": "leave it out: pictures are always cropped to their centred square",
    "repeats dataset_repeats": "leave it out: pictures are drawn again and again until --max_train_steps",
    "cache_latents cache_latents_to_disk latent_caching skip_cache_check vae_batch_size": (
        "leave it out: pictures are always encoded once, before the first step"
    ),
    "dataloader_num_workers max_data_loader_n_workers persistent_data_loader_workers dataloader_threads": (
        "leave it out: pictures are encoded once, before the first step, so that nothing waits for their files"
    ),
    "use_8bit_adam use_lion_optimizer optimizer_type optimizer_args fused_backward_pass": (
        "leave it out: so few numbers learn that their optimizer's state is tiny; --optimizer has the two of dti"
    ),
    "max_grad_norm": "leave it out: the length of dti's step does not depend on the gradient's norm",
    "preserve_embedding_norm": "leave it out: dti always keeps the norm; --magnitude says which one",
    "lowram highvram blocks_to_swap": "use --vram, which plans a run for so many GiB",
    "no_half_vae": "leave it out: the VAE computes in float32, or bfloat16 if the model does",
    "v2": "leave it out: the kind of model is read from its files",
    "save_model_as use_safetensors no_safe_serialization save_precision output_dtype output_model_format": (
        "leave it out: embeddings are float32 in .safetensors files; dti-fast convert writes the other layouts"
    ),
    "output_name": "leave it out: files are named after --placeholder_token",
    "metadata_title metadata_author metadata_description metadata_license metadata_tags": (
        "leave it out: the header of the file holds the settings of the run"
    ),
    # Not there.
    "report_to log_with log_prefix log_config log_tracker_name log_tracker_config wandb_run_name wandb_api_key "
    "tensorboard": "not there yet; log.jsonl in the output folder has the numbers",
    "logging_dir": "not there; log.jsonl lies in the output folder (--output_dir)",
    "push_to_hub hub_token hub_model_id huggingface_repo_id huggingface_repo_type huggingface_path_in_repo "
    "huggingface_token huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload": (
        "not there yet; upload the output folder when the run is over"
    ),
    "save_as_full_pipeline": "not there; dti_fast.load_embedding puts the concept into a pipeline",
    "revision cache_dir tokenizer_cache_dir": (
        "not there; download the files that you want, and give their folder as --pretrained_model_name_or_path"
    ),
    "tokenizer_name vae pretrained_vae_model_name_or_path vae_name_or_path": (
        "not there; put it into a diffusers folder, and give that as --pretrained_model_name_or_path"
    ),
    "weights": "not there; a concept starts from a word or phrase, --initializer_token",
    "adam_beta1 adam_beta2 adam_epsilon": "not a setting here; the methods other than dti use PyTorch's defaults",
    "lr_num_cycles lr_power lr_decay_steps lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_args "
    "lr_scheduler_timescale lr_scheduler_min_lr_ratio learning_rate_cycles": (
        "not there; --lr_scheduler is constant or cosine, --lr_warmup_steps warms up"
    ),
    "allow_tf32": "not there; --mixed_precision says how the model computes",
    "torch_compile dynamo_backend": "not there",
    "random_flip flip_aug color_aug random_crop face_crop_aug_range": "not there; pictures are not augmented",
    "enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale resize_interpolation": (
        "not there; pictures are cropped to their centred square of --resolution pixels"
    ),
    "masked_loss masked_training alpha_mask conditioning_data_dir": "not there; the whole square counts",
    "reg_data_dir class_data_dir with_prior_preservation prior_loss_weight": "not there; no other pictures are needed",
    "caption_extension caption_extention in_json caption_column": (
        "not there; the caption of dog.png is dog.txt beside it"
    ),
    "instance_prompt": "not there; write captions beside the pictures, or let templates be used",
    "shuffle_caption caption_separator keep_tokens keep_tokens_separator secondary_separator enable_wildcard "
    "caption_prefix caption_suffix caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate "
    "token_warmup_min token_warmup_step weighted_captions": "not there; captions are used as they are",
    "max_token_length": "not there; a text encoder sees as many tokens as its model was made for",
    "clip_skip": "not there; text features are taken where the model's pipeline takes them",
    "train_text_encoder text_encoder_lr": "not there; everything but the concept stays frozen",
    "network_module network_args network_weights": "not there; --lora_rank learns a LoRA beside the embedding",
    "snr_gamma min_snr_gamma noise_offset noise_offset_random_strength multires_noise_iterations "
    "multires_noise_discount ip_noise_gamma ip_noise_gamma_random_strength adaptive_noise_scale zero_terminal_snr "
    "min_timestep max_timestep loss_type huber_schedule huber_c huber_scale scale_v_pred_loss_like_noise_pred "
    "v_pred_like_loss debiased_estimation_loss timestep_distribution loss_weight_fn loss_weight_strength "
    "min_noising_strength max_noising_strength": "not there; the loss is the plain squared error at a random timestep",
    "ema ema_decay use_ema": "not there; the cosine schedule lets the concept settle",
    "sample_at_first sample_sampler": "not there; previews are drawn every --validation_steps, and at the end",
    "local_rank deepspeed zero_stage ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph": (
        "not there; a run uses one device, --device"
    ),
    "concepts_list": "not there; a run learns one concept",
    "debug_dataset cache_info": "not there; the first lines of a run say which pictures are used",
    "output_config": "leave it out: config.toml in the output folder holds the settings of every run",
    "v verbose quiet console_log_level": "not there; --logging_steps says how often numbers are read",
}
FOREIGN = {name: advice for names, advice in _ADVICE.items() for name in names.split()}

SIMILAR = 0.85  # so that a slip of the keys is recognised, and a word of another meaning is not


def explain(name: str, known: Iterable[str], foreign: bool) -> str:
    """What to say of the unknown setting `name`.

    Args:
        name: with underscores, without dashes in front.
        known: the settings that there are, likewise.
        foreign: whether other trainers' flags are to be explained.
    """
    if foreign and name in FOREIGN:
        return f"--{name}: {FOREIGN[name]}"
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=SIMILAR)
    return f"there is no setting --{name}" + (f"; did you mean --{near[0]}?" if near else "")
