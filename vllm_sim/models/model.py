"""What a model is: its dimensions, how its checkpoint is stored, and the sizes that follow.

Reproduces: section 3's arithmetic (2 x layers x K/V heads x head size x bytes, 800 KB a token for
OPT-13B), also for the decoders that followed the paper's: grouped and multi-query heads, mixtures
of experts, latent caches (MLA) and sliding windows. presets.py has the paper's models and makes
one of a config.json.

    model = load_model("opt-13b")
    model.kv_bytes_per_token            # one slot in 16 bits: 819,200
    model.num_params, model.weight_bytes(16)
"""

from __future__ import annotations

from dataclasses import dataclass

COUNTS = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size", "ffn_size")
COUNTS += ("vocab_size",)


@dataclass(frozen=True)
class Experts:
    """The feed-forward part of the layers that have routed experts. Sizes in elements."""

    num_layers: int
    num_experts: int
    num_active: int  # a token
    ffn_size: int  # of one expert
    shared_ffn_size: int = 0  # of the expert that every token passes, all of them together
    shared_gate: bool = False  # one more row of the router, for the shared expert
    router_bias: bool = False  # one number an expert
    biases: bool = False  # of each expert


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: one latent vector a token and layer is kept, not K and V."""

    kv_rank: int  # kv_lora_rank
    rope_size: int  # qk_rope_head_dim, the part of the key that has its own position
    nope_size: int  # qk_nope_head_dim
    value_size: int  # v_head_dim
    query_rank: int | None  # q_lora_rank; None: queries are projected directly


@dataclass(frozen=True)
class CacheLayers:
    """Layers whose cache is alike: elements a token and layer, and how many tokens they keep."""

    count: int
    elements: int
    window: int | None = None  # None: all


@dataclass(frozen=True)
class Weights:
    """Parameters, by what quantisation and tensor parallelism do to them."""

    attention: int  # matrices of queries and output: split by heads
    kv_projection: int  # of K and V: split by K/V heads, and copied where these do not suffice
    feed_forward: int  # dense and shared
    experts: int  # routed, all of them: memory holds each, whichever a token passes
    latent: int  # MLA's projections down: whole on every GPU
    embeddings: int  # input and output
    other: int  # norms, biases, positions, routers: whole on every GPU
    active: int  # of the total, those that one token passes

    @property
    def split(self) -> int:
        """What tensor parallelism splits over the GPUs."""
        matrices = self.attention + self.kv_projection + self.feed_forward
        return matrices + self.experts + self.embeddings

    @property
    def whole(self) -> int:
        """What every GPU holds."""
        return self.latent + self.other

    @property
    def total(self) -> int:
        return self.split + self.whole


@dataclass(frozen=True)
class Quantisation:
    """How a checkpoint's matrices are stored: bytes a parameter, scales included."""

    method: str
    bytes_per_param: float
    experts_only: bool = False


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer. Sizes in elements, windows and positions in tokens.

    `norm_vectors` is 1 for RMS norms (a weight) and 2 for layer norms (a weight and a bias).
    ValueError for dimensions that fit no such model.
    """

    name: str
    family: str
    num_layers: int  # L
    hidden_size: int
    num_heads: int  # H
    num_kv_heads: int  # H_kv
    head_size: int  # D
    ffn_size: int  # of dense layers
    vocab_size: int
    max_len: int | None  # None: nothing bounds it (ALiBi)
    tied: bool = True  # the output head is the input embedding
    gated: bool = True  # three feed-forward matrices, not two
    norm_vectors: int = 1
    norms_per_layer: int = 2
    final_norm: bool = True
    embedding_norm: bool = False
    head_norms: bool = False  # of queries and keys, one vector of D each
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    sinks: bool = False  # one number a head
    position_rows: int = 0  # of a learned table
    embedding_size: int | None = None  # None: the hidden size; else two projections
    experts: Experts | None = None
    latent: Latent | None = None
    windows: tuple[int | None, ...] = ()  # of each layer; (): no layer has one
    notes: tuple[str, ...] = ()  # what a reader of the sizes must know
    dtype: str = ""  # of the checkpoint, fp16 or bf16; "": not said
    quantisation: Quantisation | None = None  # of the checkpoint
    vision_params: int = 0  # of an image encoder, about: its matrices alone, 16 bits each

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} K/V heads evenly"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} layer types for {self.num_layers} layers")
        if self.experts and not 0 <= self.experts.num_layers <= self.num_layers:
            raise ValueError(f"experts in {self.experts.num_layers} of {self.num_layers} layers")
        if self.experts and self.experts.num_active > self.experts.num_experts:
            raise ValueError(
                f"{self.experts.num_active} of {self.experts.num_experts} experts a token"
            )

    # -- the cache ------------------------------------------------------------------------------

    @property
    def layer_elements(self) -> int:
        """What one layer keeps of one token: K and V of its heads, or the latent vector."""
        if self.latent:
            return self.latent.kv_rank + self.latent.rope_size
        return 2 * self.num_kv_heads * self.head_size

    @property
    def slot_elements(self) -> int:
        """Of one token in all layers: one slot."""
        return self.num_layers * self.layer_elements

    @property
    def kv_bytes_per_token(self) -> int:
        """One slot in 16 bits."""
        return 2 * self.slot_elements

    @property
    def cache_layers(self) -> tuple[CacheLayers, ...]:
        """The layers by window, those without one first."""
        windows = self.windows or (None,) * self.num_layers
        kinds = sorted(set(windows), key=lambda window: (window is not None, window or 0))
        return tuple(CacheLayers(windows.count(w), self.layer_elements, w) for w in kinds)

    def cached_elements(self, num_tokens: int) -> int:
        """What a sequence of that length keeps, where each window drops what is behind it."""
        return sum(
            layers.count * layers.elements * min(num_tokens, layers.window or num_tokens)
            for layers in self.cache_layers
        )

    # -- the parameters -------------------------------------------------------------------------

    @property
    def num_params(self) -> int:
        return self.weights().total

    def weight_bytes(self, matrix_bits: int = 16, num_gpus: int = 1) -> int:
        """Bytes of the weights on one of `num_gpus` GPUs (tensor parallelism), rounded up.

        `matrix_bits` is 16, or 8 for matrices in fp8 (`--dtype`); embeddings, norms, biases and
        routers stay in 16 bits, as serving systems keep them. A quantised checkpoint has what its
        configuration says. Matrices are split; what is small is on every GPU; K/V projections are
        split as far as there are heads.
        """
        w = self.weights()
        dense_bytes = routed_bytes = matrix_bits / 8
        if self.quantisation:
            routed_bytes = self.quantisation.bytes_per_param
            dense_bytes = 2.0 if self.quantisation.experts_only else routed_bytes
        kv_parts = min(num_gpus, self.num_kv_heads)
        split = (w.attention + w.feed_forward) / num_gpus + w.kv_projection / kv_parts
        total = (split + w.latent) * dense_bytes + w.experts / num_gpus * routed_bytes
        total += 2 * (w.embeddings / num_gpus + w.other + self.vision_params)
        return int(-(-total // 1))

    def weights(self) -> Weights:
        """All parameters, counted from the dimensions."""
        h, width = self.hidden_size, self.num_heads * self.head_size
        kv_width = self.num_kv_heads * self.head_size
        layers, moe = self.num_layers, self.experts
        norm = self.norm_vectors * h
        small = self.norms_per_layer * norm
        small += 2 * self.head_size * self.head_norms + self.num_heads * self.sinks
        small += (width + 2 * kv_width) * self.qkv_bias + h * self.output_bias
        attention, kv, down, latent_norms = 2 * h * width, 2 * h * kv_width, 0, 0
        if self.latent:
            attention, down, latent_norms = self._latent_weights(self.latent)
            kv = 0
        matrices = 3 if self.gated else 2
        sparse = moe.num_layers if moe else 0
        dense = layers - sparse
        feed_forward = dense * matrices * h * self.ffn_size
        ffn_bias = ((matrices - 1) * self.ffn_size + h) * self.ffn_bias
        other = layers * (small + latent_norms) + dense * ffn_bias
        routed = 0
        if moe:
            feed_forward += sparse * matrices * h * moe.shared_ffn_size
            routed = sparse * moe.num_experts * matrices * h * moe.ffn_size
            router = moe.num_experts * (h + moe.router_bias) + h * moe.shared_gate
            expert_bias = ((matrices - 1) * moe.ffn_size + h) * moe.biases
            other += sparse * router
            routed += sparse * moe.num_experts * expert_bias
        other += norm * self.final_norm + norm * self.embedding_norm
        other += self.position_rows * h
        embedding_size = self.embedding_size or h
        embeddings = (1 if self.tied else 2) * self.vocab_size * embedding_size
        if embedding_size != h:
            other += 2 * embedding_size * h
        idle = routed - routed * moe.num_active // moe.num_experts if moe else 0
        total = layers * (attention + kv + down) + feed_forward + routed + embeddings + other
        parts = layers * attention, layers * kv, feed_forward, routed, layers * down
        return Weights(*parts, embeddings, other, total - idle)

    def _latent_weights(self, latent: Latent) -> tuple[int, int, int]:
        """(matrices split by heads, matrices that are whole everywhere, norms) of one layer."""
        h, heads = self.hidden_size, self.num_heads
        key_size = latent.nope_size + latent.rope_size
        split = heads * (
            latent.kv_rank * (latent.nope_size + latent.value_size) + latent.value_size * h
        )
        down, norms = h * (latent.kv_rank + latent.rope_size), latent.kv_rank
        if latent.query_rank is None:
            return split + heads * key_size * h, down, norms
        split += heads * key_size * latent.query_rank
        return split, down + h * latent.query_rank, norms + latent.query_rank

    @property
    def widest(self) -> int:
        """The widest intermediate result of a layer that tensor parallelism splits, a token."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        ffn = self.ffn_size
        if self.experts:
            moe = self.experts
            ffn = max(ffn, moe.num_active * moe.ffn_size + moe.shared_ffn_size)
        return max(qkv, (1 + self.gated) * ffn)
