"""What a model and a GPU are: presets, configurations, GPUs and the memory plan.

from vllm_sim.models import DEPLOYMENTS, GPUS, MODELS, kv_blocks
MODELS["opt-13b"].kv_bytes_per_token    # 819,200
kv_blocks(DEPLOYMENTS["opt-13b"])       # 983
"""

from vllm_sim.models.gpus import GPU, GPUS
from vllm_sim.models.memory_plan import Deployment, PlanError, kv_blocks, paper_plan
from vllm_sim.models.model import Model
from vllm_sim.models.presets import DEPLOYMENTS, MODELS, PRESETS, load_model, opt

__all__ = [
    "DEPLOYMENTS",
    "GPU",
    "GPUS",
    "MODELS",
    "PRESETS",
    "Deployment",
    "Model",
    "PlanError",
    "kv_blocks",
    "load_model",
    "opt",
    "paper_plan",
]
