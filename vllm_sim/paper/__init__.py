# ruff: noqa: F403
"""Every number that the paper states, and the settings of the authors' artifact, as plain data.

    from vllm_sim import paper
    paper.FIG2["vLLM"]["tokens"]        # 96.3

curves.py has every point of Figs. 12, 14, 16 and 17, figures.py the other figures, text.py what
the text claims, settings.py what was run. Nothing outside this folder has a published number.

Every number carries a provenance mark, in its record or in the comment above its table: F-PDF
printed in the paper; F-VEC read from the vector figures; F-AE the authors' artifact (whose runs
may differ from those behind the paper); F-BLOG only in the launch blog; DERIVED.
"""

from vllm_sim.paper.curves import *
from vllm_sim.paper.figures import *
from vllm_sim.paper.settings import *
from vllm_sim.paper.text import *
