"""What a model is to the memory of a server: what it keeps of a sequence, and its weights.

Reproduces: section 3's arithmetic (2 x layers x K/V heads x head size x bytes, 800 KB a token for
OPT-13B), layer by layer, as the decoders that followed the paper's need it: grouped and
multi-query heads, windows, latent caches (MLA), states of linear layers, mixtures of experts.
presets.py has models by name; transformers_model.py reads any other.

    model = load_model("opt-13b")
    model.kv_bytes_per_token            # one slot in 16 bits: 819,200
    model.num_params, model.weight_bytes()
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

FULL, WINDOW, LATENT, STATE, NONE = "full", "window", "latent", "state", "none"
KINDS = (FULL, WINDOW, LATENT, STATE, NONE)
# Weights by what tensor parallelism and quantisation do to them.
MATRIX = "matrices"  # of attention and feed-forward layers: split
KV = "K/V projections"  # split by K/V heads, and copied where these do not suffice
EXPERTS = "experts"  # routed: split; memory holds all of them, whichever a token passes
WHOLE = "latent projections"  # MLA's projections down, indexers: whole on every GPU
EMBEDDING = "embeddings"  # of tokens: split, 16 bits; on the first stage of a pipeline
HEAD = "output head"  # split, 16 bits; on the last stage. Tied ones have no parameters here
ENCODER = "encoders"  # of images and audio: split, 16 bits; on the first stage
OTHER = "norms, biases, routers"  # whole on every GPU, 16 bits
ROLES = (MATRIX, KV, EXPERTS, WHOLE, EMBEDDING, HEAD, ENCODER, OTHER)
IN_LAYERS = (MATRIX, KV, EXPERTS, WHOLE)  # what --dtype fp8 and quantisation are about


@dataclass(frozen=True)
class Layers:
    """Layers that keep alike of a sequence.

    `elements` of K and V, or of a latent vector, a token and layer; `extra` beside them (keys of
    an indexer, compressed entries), a token and layer; `state_bytes` a sequence and layer, whatever
    its length. A window of W tokens keeps the last W of them.
    """

    count: int
    kind: str = FULL
    elements: int = 0
    kv_heads: int = 1  # over which tensor parallelism can split: 1 of a latent vector
    heads: int = 0  # query heads
    head_sizes: int = 0  # of a key and a value together, for attention's own FLOPs
    window: int | None = None
    extra: float = 0.0
    state_bytes: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a layer is one of {', '.join(KINDS)}, not {self.kind!r}")
        if min(self.count, self.kv_heads) < 1 or min(self.elements, self.state_bytes) < 0:
            raise ValueError(f"layers with impossible sizes: {self}")
        window = self.window
        if (self.kind == WINDOW) != (window is not None) or (window is not None and window < 1):
            raise ValueError(f"a window is a number of tokens of windowed layers: {self}")

    def parts(self, num_gpus: int) -> int:
        """Over how many of so many GPUs K and V are split; on the others they are copies."""
        return 1 if self.kind == LATENT else min(num_gpus, self.kv_heads)

    def slot_bytes(self, kv_bytes: int, num_gpus: int = 1) -> float:
        """Of one token on one GPU, in all of these layers; what is `extra` is whole on each."""
        shared = self.elements / self.parts(num_gpus)
        return self.count * (shared + self.extra) * kv_bytes

    def kept(self, num_tokens: int) -> int:
        """How many of a sequence's tokens are kept."""
        return min(num_tokens, self.window or num_tokens)


@dataclass(frozen=True)
class Weights:
    """Parameters of one role, stored alike: so many bits each, scales included."""

    role: str
    params: int
    bits: float = 16.0

    def __post_init__(self) -> None:
        if self.role not in ROLES or self.params < 0 or not 0.0 < self.bits <= 32.0:
            raise ValueError(f"weights that cannot be: {self}")


@dataclass(frozen=True)
class Model:
    """A decoder. Sizes in elements, windows and positions in tokens.

    Without `layers` all of `num_layers` keep K and V of `num_kv_heads` heads. ValueError for
    dimensions that fit no such model.
    """

    name: str
    family: str  # the model_type of its configuration
    num_layers: int  # L
    hidden_size: int
    num_heads: int  # H; 0: no attention
    num_kv_heads: int  # H_kv
    head_size: int  # D
    vocab_size: int
    max_len: int | None  # None: nothing bounds it
    widest: int = 1  # intermediate result of a layer that tensor parallelism splits, a token
    layers: tuple[Layers, ...] = ()
    weights: tuple[Weights, ...] = ()
    num_experts: int = 0  # of one layer
    active_experts: int = 0  # a token
    rotary_bytes: int = 0  # tables of rotary positions, whole on every GPU
    tied: bool = True  # the output head is the input embedding
    notes: tuple[str, ...] = ()  # what a reader of the sizes must know
    dtype: str = ""  # of the checkpoint, fp16 or bf16; "": not said
    quantisation: str = ""  # how the checkpoint is stored; "": in 16 bits
    kv_dtype: str = ""  # of K and V, where the checkpoint states it: fp8

    def __post_init__(self) -> None:
        if type(self.rotary_bytes) is not int or self.rotary_bytes < 0:
            raise ValueError(f"rotary_bytes must be a whole number, not {self.rotary_bytes!r}")
        for name in ("num_layers", "hidden_size", "vocab_size", "widest"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, not {value!r}")
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads and (kv_heads < 1 or heads % kv_heads):
            raise ValueError(f"{heads} query heads cannot share {kv_heads} K/V heads evenly")
        if not 0 <= self.active_experts <= self.num_experts:
            raise ValueError(f"{self.active_experts} of {self.num_experts} experts a token")
        if not self.layers:
            size = 2 * self.head_size
            own = Layers(self.num_layers, FULL, size * kv_heads, kv_heads, heads, size)
            object.__setattr__(self, "layers", (own,))
        if sum(layers.count for layers in self.layers) != self.num_layers:
            raise ValueError(f"{self.layers} are not {self.num_layers} layers")

    # -- the cache ------------------------------------------------------------------------------

    @property
    def slot_elements(self) -> int:
        """K and V, or latent vectors, of one token in all layers: one slot."""
        return sum(layers.count * layers.elements for layers in self.layers)

    @property
    def extra_elements(self) -> float:
        """What layers keep of a token beside K and V: keys of indexers, compressed entries."""
        return sum(layers.count * layers.extra for layers in self.layers)

    @property
    def kv_bytes_per_token(self) -> int:
        """One slot in 16 bits."""
        return 2 * self.slot_elements

    @property
    def state_bytes(self) -> int:
        """Of one sequence, whatever its length: states of linear layers."""
        return sum(layers.count * layers.state_bytes for layers in self.layers)

    @property
    def windows(self) -> tuple[int, ...]:
        """Those that layers have, shortest first."""
        return tuple(sorted({layers.window for layers in self.layers if layers.window}))

    @property
    def latent(self) -> bool:
        """Whether a latent vector is kept instead of K and V."""
        return any(layers.kind == LATENT for layers in self.layers)

    def slot_bytes(self, kv_bytes: int = 2, num_gpus: int = 1) -> int:
        """Bytes of one token in all layers on one of so many GPUs (tensor parallelism)."""
        return round(sum(layers.slot_bytes(kv_bytes, num_gpus) for layers in self.layers))

    def cached_bytes(self, num_tokens: int, kv_bytes: int = 2) -> float:
        """What a sequence of that length keeps, where each window drops what is behind it."""
        return self.state_bytes + sum(
            layers.count * kv_bytes * (layers.elements * layers.kept(num_tokens))
            + layers.count * kv_bytes * layers.extra * num_tokens
            for layers in self.layers
        )

    # -- the parameters -------------------------------------------------------------------------

    def params(self, *roles: str) -> int:
        """Parameters of these roles, of all without any."""
        return sum(w.params for w in self.weights if not roles or w.role in roles)

    @property
    def num_params(self) -> int:
        return self.params()

    @property
    def active_params(self) -> int:
        """Those that one token passes: of the experts its share."""
        experts = self.params(EXPERTS)
        idle = experts - experts * self.active_experts // max(1, self.num_experts)
        return self.num_params - idle

    @property
    def split_params(self) -> int:
        """What tensor parallelism splits over the GPUs."""
        return self.params(MATRIX, KV, EXPERTS, EMBEDDING, HEAD, ENCODER)

    @property
    def whole_params(self) -> int:
        """What every GPU holds."""
        return self.params(WHOLE, OTHER)

    def weight_bytes(self, num_gpus: int = 1, roles: Iterable[str] = ROLES) -> int:
        """Bytes of the weights of these roles on one of `num_gpus` GPUs, rounded up.

        Tensor parallelism splits what is large; what is small is on every GPU; K/V projections are
        split as far as there are heads.
        """
        parts = dict.fromkeys(ROLES, num_gpus) | {WHOLE: 1, OTHER: 1}
        parts[KV] = min(num_gpus, max(1, self.num_kv_heads))
        chosen = set(roles)
        bits = sum(w.params * w.bits / parts[w.role] for w in self.weights if w.role in chosen)
        return int(-(-bits // 8))

    def with_matrix_bits(self, bits: float) -> Model:
        """The same model with so many bits for each weight of its layers' matrices."""
        stored = tuple(replace(w, bits=bits) if w.role in IN_LAYERS else w for w in self.weights)
        return replace(self, weights=stored)
