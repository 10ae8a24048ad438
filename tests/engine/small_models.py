"""Small models of the families that the engine serves, with random weights; import for tests."""

from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 80}
FAMILIES = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 24},
    "opt": {**SIZES, "ffn_dim": 80, "word_embed_proj_dim": 64, "init_std": 0.3},
    "gpt2": SIZES,
    "gpt_neox": {**SIZES, "intermediate_size": 80},
    "phi3": GROUPED,
    "gemma2": {
        **GROUPED,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 3.0,  # low enough to matter
        "sliding_window": 7,  # shorter than the prompts
    },
    "qwen2_moe": {  # its windows are in its masks alone
        **GROUPED,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 40,
    },
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@cache
def small(family, **changes):
    """A model of the family, the same in every call; in eval mode, on the CPU."""
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(config).eval()


def prompts(lengths, pad_to=None, seed=1):
    """Random prompts of these lengths, padded on the left: ids and mask, (B, longest)."""
    generator = torch.Generator().manual_seed(seed)
    width = max(*lengths, pad_to or 0, 1)
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def on_its_own(model):
    """The model with the attention that transformers itself gives it."""
    model.set_attn_implementation("eager" if model.config.model_type == "gemma2" else "sdpa")
    return model
