"""Settings of musubi-tuner that no key of a recipe stands for, each with the reason."""

from finetune.importers.common import NOT_NEEDED

_PARTS = "each part is taken from model.path, in the layout of diffusers"
_STATE = "a checkpoint always has the optimizer's state"
DROPPED = {
    **dict.fromkeys(
        ("vae", "text_encoder", "text_encoder1", "text_encoder2", "t5", "clip", "byt5", "image_encoder"), _PARTS
    ),
    **dict.fromkeys(("vae_dtype", "fp8_t5", "fp8_llm", "fp8_vl", "text_encoder_cpu"), NOT_NEEDED["half_encoders"]),
    **dict.fromkeys(
        ("vae_tiling", "vae_chunk_size", "vae_spatial_tile_sample_min_size", "vae_cache_cpu"),
        "vae.tiling = true saves memory",
    ),
    **dict.fromkeys(
        ("sdpa", "flash_attn", "sage_attn", "xformers", "flash3", "split_attn"),
        'memory.attention = "auto" has torch choose',
    ),
    **dict.fromkeys(
        ("dit_dtype", "disable_numpy_memmap", "persistent_data_loader_workers"), "nothing here that it would change"
    ),
    **dict.fromkeys(("full_bf16", "full_fp16"), 'train.weights = "bf16" holds what is trained in bf16'),
    **dict.fromkeys(("cuda_allow_tf32", "cuda_cudnn_benchmark"), NOT_NEEDED["tf32"]),
    **dict.fromkeys(
        ("compile_backend", "compile_mode", "compile_dynamic", "compile_fullgraph", "compile_cache_size_limit"),
        "blocks are compiled one by one",
    ),
    **dict.fromkeys(
        ("dynamo_backend", "dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic"),
        "memory.compile = true compiles the blocks",
    ),
    **dict.fromkeys(
        ("logging_dir", "log_prefix", "log_tracker_config", "log_config", "no_metadata"), NOT_NEEDED["log"]
    ),
    **dict.fromkeys(
        (
            "metadata_title",
            "metadata_author",
            "metadata_description",
            "metadata_license",
            "metadata_tags",
            "metadata_reso",
            "metadata_arch",
            "training_comment",
        ),
        "push writes a model card",
    ),
    **dict.fromkeys(
        (
            "huggingface_repo_id",
            "huggingface_repo_type",
            "huggingface_path_in_repo",
            "huggingface_repo_visibility",
            "save_state_to_huggingface",
            "resume_from_huggingface",
            "async_upload",
        ),
        NOT_NEEDED["hub"],
    ),
    **dict.fromkeys(("huggingface_token", "wandb_api_key"), "log in once, by `hf auth login` or `wandb login`"),
    **dict.fromkeys(
        ("save_state", "save_state_on_train_end", "save_last_n_epochs_state", "save_last_n_steps_state"), _STATE
    ),
    **dict.fromkeys(
        ("ddp_gradient_as_bucket_view", "ddp_static_graph", "ddp_timeout"), "distributed.timeout_seconds is 1800"
    ),
    **dict.fromkeys(
        (
            "lr_decay_steps",
            "lr_scheduler_timescale",
            "lr_scheduler_min_lr_ratio",
            "lr_scheduler_type",
            "lr_scheduler_args",
        ),
        "no schedule of a recipe reads it",
    ),
    **dict.fromkeys(
        ("use_pinned_memory_for_block_swap", "block_swap_h2d_only", "block_swap_ring_size", "img_in_txt_in_offloading"),
        "memory.offload streams blocks from pinned memory",
    ),
    "one_frame": "frames of a clip follow each other",
    "dit_in_channels": "the checkpoint has its own",
    "text_encoder_dtype": NOT_NEEDED["half_encoders"],
    "vae_sample_size": "vae.tiling = true saves memory",
    "vae_enable_patch_conv": "vae.tiling = true saves memory",
    "resume": NOT_NEEDED["resume"],
    "save_precision": "adapters are exported as export says; see recipes/adapters.md",
    "network_module": "LoRA on the linear layers of the blocks",
    "dim_from_weights": "set lora.rank to that of lora.start_from",
    "scale_weight_norms": "no key does that",
    "flow_shift": "it was for samples",
    "show_timesteps": "it was for looking at them",
    "num_timestep_buckets": "objective.stratified = true spreads a batch over the levels",
    "offload_inactive_dit": "experts are trained one after the other",
    "force_v2_1_time_embedding": "the transformer of diffusers is taken as it is",
    "timestep_boundary": "it is read from the checkpoint",
    "sample_at_first": "samples are always made at the start",
}
