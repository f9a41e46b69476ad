"""What a language model costs by its shape: parameters, KV cache and work per token, read from its `config.json`.

A plain dict goes in, so that neither transformers nor the weights are needed. Only decoders whose parameters are
counted in `tests/scheduler/test_language_model_seam.py` against transformers' own are known; another one is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler.model.weight_format import INSTEAD, UnknownModel, WeightFormat, bytes_of_dtype, weight_format

_ALIASES = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_inner": "intermediate_size", "ffn_dim": "intermediate_size", "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts", "dtype": "torch_dtype",
}
"""Names that some families have for a key."""


@dataclass(frozen=True, slots=True)
class _Family:
    """What a `model_type` means beyond its keys.

    gated: the feed-forward layers have three matrices, else two. tied: the default of tie_word_embeddings. positions: a
    learnt table of positions. every: of so many layers one has full attention and the others a window, in configs
    without layer_types (0: all have the window; None: none has). defaults: values of keys that its configs leave out.
    """

    gated: bool = True
    tied: bool = False
    positions: bool = False
    every: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


_FAMILIES = {
    "llama": _Family(), "mistral": _Family(every=0), "qwen2": _Family(), "qwen3": _Family(), "phi3": _Family(every=0),
    "granite": _Family(), "olmo2": _Family(), "smollm3": _Family(tied=True), "glm4": _Family(),
    "gemma": _Family(tied=True, defaults={"head_dim": 256}),
    "gemma2": _Family(tied=True, every=2, defaults={"head_dim": 256, "sliding_window": 4096}),
    "gemma3_text": _Family(tied=True, every=6, defaults={
        "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "sliding_window": 4096,
    }),
    "cohere": _Family(tied=True), "starcoder2": _Family(gated=False, tied=True, every=0),
    "gpt_neox": _Family(gated=False), "phi": _Family(gated=False),
    "gpt2": _Family(gated=False, tied=True, positions=True), "opt": _Family(gated=False, tied=True, positions=True),
    "mixtral": _Family(every=0), "qwen2_moe": _Family(), "qwen3_moe": _Family(), "olmoe": _Family(),
    "gpt_oss": _Family(every=2), "glm4_moe": _Family(), "deepseek_v2": _Family(), "deepseek_v3": _Family(),
    "kimi_k2": _Family(),
}
_LAYERS_WITH_WINDOW = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def known_model_types() -> tuple[str, ...]:
    """The values of `model_type` that are known, sorted."""
    return tuple(sorted(_FAMILIES))


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """A decoder's shape; parameters count the language model alone.

    attention, feed_forward: parameters of these in all layers; feed_forward are those that every token passes (dense
    layers, shared experts, routers). expert: parameters of one routed expert, summed over the layers that have experts;
    experts: how many each such layer has, of which a token passes experts_per_token. embedding: of the input table;
    head: of the output projection (the same table if `tied`).
    windows: by layer the most tokens that its attention looks back (None: all). kv_numbers: numbers that a layer's KV
    cache holds per token, of kv_heads heads; latent: they are shared by all heads (MLA). attention_width: numbers that
    a token's queries have in a layer. weights: their format; dtype_bytes: of a number that is not quantised.
    """

    model_type: str
    layers: int
    hidden: int
    widest: int
    vocabulary: int
    heads: int
    kv_heads: int
    attention: int
    feed_forward: int
    expert: int
    experts: int
    experts_per_token: int
    embedding: int
    head: int
    tied: bool
    windows: tuple[int | None, ...]
    kv_numbers: int
    latent: bool
    attention_width: int
    longest: int
    weights: WeightFormat
    dtype_bytes: float

    @property
    def parameters(self) -> int:
        """Parameters in all, norms and biases left out."""
        table = self.embedding + (0 if self.tied else self.head)
        return self.attention + self.feed_forward + self.experts * self.expert + table

    @property
    def parameters_per_token(self) -> int:
        """Parameters that one token passes in the layers, without the input table and the output projection."""
        return self.attention + self.feed_forward + self.experts_per_token * self.expert

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights in memory."""
        table = self.embedding + (0 if self.tied else self.head)
        return self._layer_bytes(float(self.experts)) + table * self.dtype_bytes

    def read_bytes(self, tokens: float) -> float:
        """Bytes of weights that an iteration of `tokens` tokens reads: with experts, those of the experts it reaches.

        Each token takes its experts evenly and independently: a layer's n tokens reach E·(1 − (1 − k/E)^n) of E.
        """
        reached = 0.0
        if self.experts:
            reached = self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens)
        return self._layer_bytes(reached) + self.head * self.dtype_bytes

    def _layer_bytes(self, experts: float) -> float:
        quantised = self.weights.weight_bits / 8
        rest = quantised if self.weights.all_layers else self.dtype_bytes
        return (self.attention + self.feed_forward) * rest + experts * self.expert * quantised

    def kv_bytes_per_token(self, kv_bytes: float, tensor_parallel: int, context_tokens: int) -> float:
        """Bytes per token in one accelerator's KV cache, for requests of `context_tokens` tokens.

        Heads are divided among the accelerators, at least one each; a latent cache is whole on each. A layer with a
        window holds no more than its window of a request.
        """
        held = sum(1.0 if window is None else min(1.0, window / context_tokens) for window in self.windows)
        share = 1.0 if self.latent else max(1.0, self.kv_heads / tensor_parallel) / self.kv_heads
        return held * self.kv_numbers * kv_bytes * share

    def attention_flops_per_token(self, context_tokens: int) -> float:
        """Operations of a prompt token's attention, beside its weights', in the middle of `context_tokens` tokens."""
        seen = sum(context_tokens / 2 if window is None else min(context_tokens / 2, window) for window in self.windows)
        return 4.0 * self.attention_width * seen


def language_model(config: Mapping[str, Any], dtype: str | None = None) -> LanguageModel:
    """The shape that a `config.json` describes; of a model that also sees or hears, the language model.

    dtype: that of the weights which are not quantised; None: the config's own, as vLLM serves it.

    Raises:
        UnknownModel: a `model_type`, quantisation or layer that is not known, or a key that is missing.
    """
    if not isinstance(config, Mapping):
        raise UnknownModel(f"found {type(config).__name__}; a model's config.json is an object")
    try:
        return _read(config, dtype)
    except (AttributeError, LookupError, TypeError, ArithmeticError) as error:  # any JSON may stand there
        raise UnknownModel(f"a value in the config is of another kind than known ones: {error}; {INSTEAD}") from error


def _read(config: Mapping[str, Any], dtype: str | None) -> LanguageModel:
    text = config.get("text_config")
    outer = config
    if isinstance(text, Mapping) and str(text.get("model_type", "")) in _FAMILIES:
        config = {"torch_dtype": config.get("torch_dtype", config.get("dtype")), **text}
        for key in ("quantization_config", "compression_config"):
            if outer.get(key) and not config.get(key):
                config = {**config, key: outer[key]}
    keys = _Keys(config)
    count = _Counter(keys)
    table = keys["vocab_size"] * keys["hidden_size"]
    narrow = keys.config.get("word_embed_proj_dim", keys["hidden_size"])
    if narrow != keys["hidden_size"]:
        raise UnknownModel(f"word_embed_proj_dim {narrow} is not the hidden_size; {INSTEAD}")
    positions = (keys.get("max_position_embeddings", keys.config.get("n_positions", 0)) or 0) * keys["hidden_size"]
    name = dtype or _served(str(keys.config.get("torch_dtype") or "bfloat16"))
    return LanguageModel(
        model_type=keys.model_type, layers=keys["num_hidden_layers"], hidden=keys["hidden_size"], widest=count.widest,
        vocabulary=keys["vocab_size"], heads=keys["num_attention_heads"], kv_heads=count.kv_heads,
        attention=count.attention, feed_forward=count.feed_forward, expert=count.expert, experts=count.experts,
        experts_per_token=count.experts_per_token, embedding=table + (positions if keys.family.positions else 0),
        head=table, tied=bool(keys.config.get("tie_word_embeddings", keys.family.tied)), windows=_windows(keys),
        kv_numbers=count.kv_numbers, latent=count.latent, attention_width=count.attention_width,
        longest=keys.get("max_position_embeddings", keys.config.get("n_positions", 0)) or 0,
        weights=weight_format(keys.config, name), dtype_bytes=bytes_of_dtype(name),
    )


def _served(dtype: str) -> str:
    """The type in which vLLM serves a checkpoint's weights, where nothing else is asked for: 16 bits for 32."""
    return "bfloat16" if dtype.removeprefix("torch.") == "float32" else dtype


class _Keys:
    """A config by the names that most families use; numbers only."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.model_type = str(config.get("model_type", ""))
        if self.model_type not in _FAMILIES:
            raise UnknownModel(
                f"model_type {self.model_type!r} is not known; known: {', '.join(known_model_types())}; {INSTEAD}"
            )
        self.family = _FAMILIES[self.model_type]
        renamed = {_ALIASES[key]: value for key, value in config.items() if key in _ALIASES and value is not None}
        given = {key: value for key, value in config.items() if value is not None}
        self.config: dict[str, Any] = {**self.family.defaults, **renamed, **given}

    def __getitem__(self, key: str) -> int:
        value = self.config.get(key)
        if value is None:
            raise UnknownModel(
                f"the config of model_type {self.model_type} has no {key}; take the config.json that lies beside the "
                "model's weights"
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UnknownModel(f"{key} is {value!r} in the config; it must be a whole number >= 1")
        return value

    def get(self, key: str, otherwise: int) -> int:
        return self[key] if self.config.get(key) else otherwise


class _Counter:
    """Parameters of the layers; biases and norms, less than 0.1 %, are left out."""

    def __init__(self, keys: _Keys) -> None:
        self._keys = keys
        self._hidden, self._layers = keys["hidden_size"], keys["num_hidden_layers"]
        heads = keys["num_attention_heads"]
        self.latent = bool(keys.config.get("kv_lora_rank"))
        if self.latent:
            self._latent(heads)
        else:
            head = keys.get("head_dim", self._hidden // heads)
            self.kv_heads = keys.get("num_key_value_heads", heads)
            self.kv_numbers = 2 * self.kv_heads * head
            self.attention_width = heads * head
            self.attention = self._layers * self._hidden * (2 * heads * head + self.kv_numbers)
        self._feed_forward()

    def _latent(self, heads: int) -> None:
        """Multi-head latent attention: queries and keys with and without positions, keys and values compressed."""
        keys, hidden = self._keys, self._hidden
        latent, rope = keys["kv_lora_rank"], keys["qk_rope_head_dim"]
        plain, value, queries = keys["qk_nope_head_dim"], keys["v_head_dim"], keys.get("q_lora_rank", 0)
        width = heads * (plain + rope)
        query = hidden * queries + queries * width if queries else hidden * width
        self.attention = self._layers * (
            query + hidden * (latent + rope) + latent * heads * (plain + value) + heads * value * hidden
        )
        self.kv_heads, self.kv_numbers, self.attention_width = 1, latent + rope, heads * (plain + rope + value) // 2

    def _feed_forward(self) -> None:
        keys, hidden = self._keys, self._hidden
        matrices = 3 if keys.family.gated else 2
        dense = keys.get("intermediate_size", 0 if keys.config.get("moe_intermediate_size") else 4 * hidden)
        self.experts = keys.get("num_experts", 0)
        self.experts_per_token, self.expert, self.widest = 0, 0, dense
        with_experts = self._layers_with_experts() if self.experts else 0
        self.feed_forward = (self._layers - with_experts) * matrices * hidden * dense
        if not self.experts:
            return
        self.experts_per_token = keys["num_experts_per_tok"]
        inner = keys.get("moe_intermediate_size", dense)
        shared = keys.get("shared_expert_intermediate_size", keys.get("n_shared_experts", 0) * inner)
        self.expert = with_experts * matrices * hidden * inner
        self.feed_forward += with_experts * hidden * (matrices * shared + self.experts)
        self.widest = max(shared + self.experts_per_token * inner, dense if with_experts < self._layers else 0)

    def _layers_with_experts(self) -> int:
        config, layers = self._keys.config, self._layers
        dense = config.get("mlp_only_layers") or []
        if not isinstance(dense, list | tuple):
            raise UnknownModel(f"mlp_only_layers is {dense!r} in the config; it must be a list of layers; {INSTEAD}")
        first, step = int(config.get("first_k_dense_replace") or 0), int(config.get("decoder_sparse_step") or 1)
        every = config.get("moe_layer_freq") or 1
        every = every if isinstance(every, int) else 1
        return sum(
            layer >= first and layer not in dense and (layer + 1) % step == 0 and layer % every == 0
            for layer in range(layers)
        )


def _windows(keys: _Keys) -> tuple[int | None, ...]:
    config, layers = keys.config, keys["num_hidden_layers"]
    if kinds := config.get("layer_types"):
        strange = sorted({str(kind) for kind in kinds} - {"full_attention", *_LAYERS_WITH_WINDOW})
        if strange:
            raise UnknownModel(f"layer_types has {strange[0]}, whose cost is not known; {INSTEAD}")
        if len(kinds) != layers:
            raise UnknownModel(f"layer_types has {len(kinds)} layers of {layers} in num_hidden_layers; {INSTEAD}")
        return tuple(keys[_LAYERS_WITH_WINDOW[kind]] if kind in _LAYERS_WITH_WINDOW else None for kind in kinds)
    window = config.get("sliding_window")
    if window is None or keys.family.every is None or config.get("use_sliding_window") is False:
        return (None,) * layers
    every = int(config.get("sliding_window_pattern") or keys.family.every)
    return tuple(None if every and (layer + 1) % every == 0 else keys["sliding_window"] for layer in range(layers))
