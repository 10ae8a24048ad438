"""Configurations of well-known models as published, and the parameters their makers count.

The values are those of each model's config.json, as far as sizes depend on them; the counts are
those of the checkpoints' tensors (a tied output head counted once). DeepSeek-V3's is without the
layers that predict further tokens.
"""

PUBLISHED = {
    "Llama-2-7B": (6_738_415_616, {
        "model_type": "llama", "max_position_embeddings": 4096, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    }),
    "Llama-3-8B": (8_030_261_248, {
        "model_type": "llama", "max_position_embeddings": 8192, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False,
    }),
    "Llama-3-70B": (70_553_706_496, {
        "model_type": "llama", "max_position_embeddings": 8192, "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128_256,
    }),
    "Llama-3.2-1B": (1_235_814_400, {
        "model_type": "llama", "max_position_embeddings": 131_072, "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "tie_word_embeddings":
        True,
    }),
    "Mistral-7B-v0.1": (7_241_732_096, {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size":
        32000, "max_position_embeddings": 32768, "sliding_window": 4096,
    }),
    "Mixtral-8x7B": (46_702_792_704, {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size":
        32000, "max_position_embeddings": 32768, "sliding_window": None, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }),
    "Qwen2-7B": (7_615_616_512, {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers":
        28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
        "max_position_embeddings": 131_072, "sliding_window": 131_072, "max_window_layers": 28,
        "use_sliding_window": False,
    }),
    "Gemma-7B": (8_537_680_896, {
        "model_type": "gemma", "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers":
        28, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "vocab_size":
        256_000, "max_position_embeddings": 8192,
    }),
    "Gemma-2B": (2_506_172_416, {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers":
        18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size":
        256_000, "max_position_embeddings": 8192,
    }),
    "Gemma-2-9B": (9_241_705_984, {
        "model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336,
        "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim":
        256, "vocab_size": 256_000, "max_position_embeddings": 8192, "sliding_window": 4096,
    }),
    "Gemma-2-2B": (2_614_341_888, {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers":
        26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size":
        256_000, "max_position_embeddings": 8192, "sliding_window": 4096,
    }),
    "Gemma-2-27B": (27_227_128_320, {
        "model_type": "gemma2", "hidden_size": 4608, "intermediate_size": 36864,
        "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim":
        128, "vocab_size": 256_000, "max_position_embeddings": 8192, "sliding_window": 4096,
    }),
    "Gemma-3-1B": (999_885_952, {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912,
        "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim":
        256, "vocab_size": 262_144, "max_position_embeddings": 32768, "sliding_window": 512,
        "sliding_window_pattern": 6,
    }),
    "GPT-2": (124_439_808, {
        "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
        "vocab_size": 50257,
    }),
    "GPT-2-XL": (1_557_611_200, {
        "model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024,
        "vocab_size": 50257,
    }),
    "Falcon-7B": (6_921_720_704, {
        "model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads":
        71, "vocab_size": 65024, "multi_query": True, "parallel_attn": True, "bias": False, "alibi":
        False, "new_decoder_architecture": False,
    }),
    "Falcon-40B": (41_303_293_952, {
        "model_type": "falcon", "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads":
        128, "num_kv_heads": 8, "vocab_size": 65024, "parallel_attn": True, "bias": False, "alibi":
        False, "new_decoder_architecture": True,
    }),
    "Phi-3-mini-4k": (3_821_079_552, {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers":
        32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
        "max_position_embeddings": 4096, "sliding_window": 2047, "tie_word_embeddings": False,
    }),
    "Phi-4": (14_659_507_200, {
        "model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers":
        40, "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100_352,
        "max_position_embeddings": 16384, "sliding_window": None,
    }),
    "DeepSeek-V2-Lite": (15_706_484_224, {
        "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "n_shared_experts": 2, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "vocab_size": 102_400, "max_position_embeddings": 163_840,
    }),
    "DeepSeek-V2": (235_741_434_880, {
        "model_type": "deepseek_v2", "hidden_size": 5120, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_hidden_layers": 60, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_shared_experts": 2, "n_routed_experts": 160,
        "num_experts_per_tok": 6, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "vocab_size": 102_400, "max_position_embeddings": 163_840,
    }),
    "DeepSeek-V3": (671_026_419_200, {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "first_k_dense_replace": 3, "moe_layer_freq": 1,
        "vocab_size": 129_280, "max_position_embeddings": 163_840, "num_nextn_predict_layers": 1,
    }),
    "gpt-oss-20b": (20_914_757_184, {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim":
        64, "num_local_experts": 32, "experts_per_token": 4, "vocab_size": 201_088,
        "max_position_embeddings": 131_072, "sliding_window": 128, "attention_bias": True,
        "tie_word_embeddings": False,
    }),
    "gpt-oss-120b": (116_829_156_672, {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim":
        64, "num_local_experts": 128, "experts_per_token": 4, "vocab_size": 201_088,
        "max_position_embeddings": 131_072, "sliding_window": 128, "attention_bias": True,
        "tie_word_embeddings": False,
    }),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, {
        "model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_hidden_layers":
        24, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "vocab_size": 151_936, "max_position_embeddings": 8192,
    }),
    "Qwen3-8B": (8_190_735_360, {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers":
        36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size":
        151_936, "max_position_embeddings": 40960,
    }),
    "Qwen3-32B": (32_762_123_264, {
        "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers":
        64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size":
        151_936, "max_position_embeddings": 40960,
    }),
    "Qwen3-0.6B": (596_049_920, {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers":
        28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size":
        151_936, "max_position_embeddings": 40960, "tie_word_embeddings": True,
    }),
    "Qwen3-30B-A3B": (30_532_122_624, {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "vocab_size": 151_936, "max_position_embeddings": 40960,
    }),
    "Qwen3-235B-A22B": (235_093_634_560, {
        "model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "vocab_size": 151_936, "max_position_embeddings": 40960,
    }),
    "BLOOM": (176_247_271_424, {
        "model_type": "bloom", "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112,
        "vocab_size": 250_880,
    }),
    "BLOOM-7B1": (7_069_016_064, {
        "model_type": "bloom", "n_embed": 4096, "n_layer": 30, "num_attention_heads": 32,
        "vocab_size": 250_880,
    }),
    "BLOOM-560M": (559_214_592, {
        "model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size":
        250_880,
    }),
    "Pythia-70M": (70_426_624, {
        "model_type": "gpt_neox", "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 50304,
        "max_position_embeddings": 2048,
    }),
    "Pythia-6.9B": (6_857_302_016, {
        "model_type": "gpt_neox", "hidden_size": 4096, "intermediate_size": 16384,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50432,
        "max_position_embeddings": 2048,
    }),
    "GPT-NeoX-20B": (20_554_567_680, {
        "model_type": "gpt_neox", "hidden_size": 6144, "intermediate_size": 24576,
        "num_hidden_layers": 44, "num_attention_heads": 64, "vocab_size": 50432,
        "max_position_embeddings": 2048,
    }),
    "OPT-350M": (331_196_416, {
        "model_type": "opt", "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "vocab_size": 50272, "word_embed_proj_dim": 512,
        "do_layer_norm_before": False, "max_position_embeddings": 2048,
    }),
    "OPT-125M": (125_239_296, {
        "model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "vocab_size": 50272, "word_embed_proj_dim": 768,
        "do_layer_norm_before": True, "max_position_embeddings": 2048,
    }),
    "OPT-13B": (12_853_473_280, {
        "model_type": "opt", "hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40,
        "num_attention_heads": 40, "vocab_size": 50272, "word_embed_proj_dim": 5120,
        "do_layer_norm_before": True, "max_position_embeddings": 2048,
    }),
}  # fmt: skip
