"""Every number that the paper states, the authors' artifact's settings, and Table 1's models.

    from vllm_sim import paper
    paper.FIG2["vLLM"]["tokens"]        # 96.3

Nothing outside this folder has a published number.
"""

from vllm_sim.paper.curves import *  # noqa: F403
from vllm_sim.paper.deployments import *  # noqa: F403
from vllm_sim.paper.figures import *  # noqa: F403
from vllm_sim.paper.text import *  # noqa: F403
