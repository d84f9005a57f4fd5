"""A decoder in float64, written from the papers: what the native passes are checked against.

It shares no code with lissom or transformers: it takes a model's weights and config, and nothing of what they compute.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frequencies(rope: dict, size: int, trained: int, length: int) -> tuple[Tensor, float]:
    """Rotary frequencies `[size / 2]` and the factor on the rotated vectors, for sequences of `length` tokens.

    Args:
        rope: of the config: `rope_type`, `rope_theta` and what the type needs.
        trained: tokens that the model was trained on.
    """
    kind, theta, factor = rope.get("rope_type", "default"), rope["rope_theta"], rope.get("factor", 1.0)
    places = torch.arange(0, size, 2, dtype=torch.float64)
    if kind == "dynamic" and length > trained:  # NTK-aware, with the factor that the length asks for
        theta *= (factor * length / trained - (factor - 1)) ** (size / (size - 2))
    plain = theta ** (-places / size)
    if kind in ("default", "dynamic"):
        return plain, 1.0
    if kind == "linear":
        return plain / factor, 1.0
    original = rope["original_max_position_embeddings"]
    if kind == "llama3":
        turns = original * plain / (2 * math.pi)  # within the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * (share + (1 - share) / factor), 1.0
    assert kind == "yarn"

    def place(turns: float) -> float:
        """The pair that turns so often within the original context."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(place(32)), 0), min(math.ceil(place(1)), size - 1)
    ramp = ((torch.arange(size // 2).double() - first) / max(last - first, 1e-3)).clamp(0, 1)
    return plain * (1 - ramp) + plain / factor * ramp, 0.1 * math.log(factor) + 1


class Reference:
    """Reads tokens as a model would, in float64, and remembers them.

    Args:
        model: of one of `tiny.DECODERS`; packed layers count with what their codes mean.
    """

    def __init__(self, model) -> None:
        self.config, self.gemma = model.config, model.config.model_type == "gemma3_text"
        self.weights = {name: tensor.detach().double() for name, tensor in model.named_parameters()}
        for name, module in model.named_modules():
            if hasattr(module, "packed"):
                self.weights[f"{name}.weight"] = module.packed.unpack().double()
        self.weights.setdefault("lm_head.weight", self.weights["model.embed_tokens.weight"])
        self.kept: list[tuple[Tensor, Tensor] | None] = [None] * self.config.num_hidden_layers
        self.visible: Tensor | None = None
        self.longest = 0

    def _linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"] + self.gemma
        return x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * weight

    def _rotated(self, x: Tensor, positions: Tensor, layer: int) -> Tensor:
        """`x` `[rows, heads, tokens, head_dim]`: its halves are the two coordinates of each pair."""
        config = self.config
        if config.model_type == "smollm3" and not config.no_rope_layers[layer]:
            return x
        rope = config.rope_parameters
        rope = rope[config.layer_types[layer]] if self.gemma else rope
        turns, factor = frequencies(rope, x.shape[-1], config.max_position_embeddings, self.longest)
        angles = positions[:, None, :, None].double() * turns
        one, two = x.chunk(2, -1)
        cosine, sine = angles.cos() * factor, angles.sin() * factor
        return torch.cat([one * cosine - two * sine, two * cosine + one * sine], -1)

    def _window(self, layer: int) -> int | None:
        if self.gemma and self.config.layer_types[layer] != "sliding_attention":
            return None
        return getattr(self.config, "sliding_window", None) if self.config.model_type != "smollm3" else None

    def _attention(self, x: Tensor, positions: Tensor, layer: int) -> Tensor:
        config, name = self.config, f"model.layers.{layer}.self_attn"
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if config.model_type == "phi3":
            query, key, value = self._linear(x, f"{name}.qkv_proj").split(
                (heads * size, groups * size, groups * size), -1
            )
        else:
            query, key, value = (self._linear(x, f"{name}.{part}_proj") for part in "qkv")
        query, key, value = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in (query, key, value))
        if f"{name}.q_norm.weight" in self.weights:
            query, key = self._norm(query, f"{name}.q_norm"), self._norm(key, f"{name}.k_norm")
        query, key = self._rotated(query, positions, layer), self._rotated(key, positions, layer)
        if (before := self.kept[layer]) is not None:
            key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        self.kept[layer] = key, value
        scale = getattr(config, "query_pre_attn_scalar", size) ** -0.5
        scores = query @ key.repeat_interleave(heads // groups, 1).transpose(2, 3) * scale
        now, seen = torch.arange(key.shape[2])[-x.shape[1] :, None], torch.arange(key.shape[2])
        allowed = (seen <= now) & (seen > now - (self._window(layer) or key.shape[2]))
        allowed = allowed & self.visible[:, None, None]
        # A padded query sees nothing; what becomes of it concerns nobody, but must not be NaN.
        scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        out = scores.softmax(-1) @ value.repeat_interleave(heads // groups, 1)
        return self._linear(out.transpose(1, 2).flatten(2), f"{name}.o_proj")

    def _mlp(self, x: Tensor, layer: int) -> Tensor:
        name = f"model.layers.{layer}.mlp"
        if self.config.model_type == "phi3":
            gate, up = self._linear(x, f"{name}.gate_up_proj").chunk(2, -1)
        else:
            gate, up = self._linear(x, f"{name}.gate_proj"), self._linear(x, f"{name}.up_proj")
        if self.gemma:
            gate = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + torch.exp(-gate))
        return self._linear(gate * up, f"{name}.down_proj")

    def read(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits `[rows, tokens, vocabulary]` of `ids` behind what was read before.

        Args:
            mask: `[rows, tokens]`, 0 where a token of `ids` is padding, on the left.
        """
        new = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.visible = new if self.visible is None else torch.cat([self.visible, new], 1)
        positions = (self.visible.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        self.longest = max(self.longest, int(positions.max()) + 1)
        x = self.weights["model.embed_tokens.weight"][ids] * (self.config.hidden_size**0.5 if self.gemma else 1)
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}"
            out = self._attention(self._norm(x, f"{name}.input_layernorm"), positions, layer)
            if self.gemma:
                x = x + self._norm(out, f"{name}.post_attention_layernorm")
                out = self._mlp(self._norm(x, f"{name}.pre_feedforward_layernorm"), layer)
                x = x + self._norm(out, f"{name}.post_feedforward_layernorm")
            else:
                x = x + out
                x = x + self._mlp(self._norm(x, f"{name}.post_attention_layernorm"), layer)
        return self._linear(self._norm(x, "model.norm"), "lm_head")
