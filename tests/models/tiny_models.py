"""Configurations of 2 to 4 layers: one of each kind of model that the library knows."""

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 100}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES |= {"max_position_embeddings": 512}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
LINEAR |= {"linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, "conv_kernel": 4, "expand": 2}
MAMBA |= {"vocab_size": 100}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
LATENT |= {"v_head_dim": 8, "head_dim": 4}
DEEPSEEK = SIZES | LATENT | {"num_hidden_layers": 2, "num_key_value_heads": 4, "n_group": 1}
DEEPSEEK |= {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK |= {"n_shared_experts": 1, "topk_group": 1, "first_k_dense_replace": 1}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
GEMMA = SIZES | {"sliding_window": 16}
GEMMA |= {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
HALF = ["linear_attention", "full_attention"] * 2

TINY = {
    "llama": SIZES,
    "mistral": SIZES | {"sliding_window": 16},
    "qwen2": SIZES | {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
    "phi3": SIZES | {"pad_token_id": 0},
    "gemma3_text": GEMMA,
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": SIZES | LINEAR | EXPERTS | {"moe_intermediate_size": 16, "layer_types": HALF},
    "qwen3_5_text": SIZES | LINEAR | {"layer_types": [HALF[0]] * 3 + [HALF[1]]},
    "jamba": SIZES
    | EXPERTS
    | {"attn_layer_period": 4, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_d_conv": 4}
    | {"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
    "minimax": SIZES
    | {"layer_types": HALF, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16},
    "lfm2": SIZES | {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3},
    "mamba": MAMBA,
    "mamba2": MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 100, "context_length": 128},
    "falcon": FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gpt2": GPT,
    "gpt_bigcode": GPT | {"multi_query": True},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100},
    "deepseek_v3": DEEPSEEK,
    "longcat_flash": LATENT
    | {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    | {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "n_routed_experts": 4}
    | {"zero_expert_num": 2, "moe_topk": 2, "max_position_embeddings": 512},
    "gemma3": {
        "text_config": GEMMA | {"model_type": "gemma3_text"},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": SIZES | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
    },
}
TINY = {name: {"model_type": name, **values} for name, values in TINY.items()}
