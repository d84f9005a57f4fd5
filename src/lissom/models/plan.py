"""The native plan of a decoder: what one native call needs to run all of its layers, checked and kept alive."""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from lissom.kernels import decoder, native, pages
from lissom.kernels import packed as formats
from lissom.kernels.packed import Packed
from lissom.models.decoder import describe_decoder

# Architectures whose layers are what the native pass computes. Others have other norms, branches or experts.
ARCHITECTURES = ("gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")

# Packages whose modules are what their names say. A subclass of somebody else may compute anything.
_KNOWN = ("lissom", "torch", "transformers")


class Unsupported(Exception):
    """The native pass does not compute this model; says why."""


def require_supported(model: PreTrainedModel) -> None:
    """What can be told without looking at the weights.

    Raises:
        Unsupported: the native pass does not compute such a model.
    """
    if native.library() is None:
        raise Unsupported("this installation has no native kernels")
    if not isinstance(model, PreTrainedModel):
        raise Unsupported(f"it is a {_kind(model)}")
    if model.config.model_type not in ARCHITECTURES:
        raise Unsupported(f"the architecture {model.config.model_type!r} is not supported yet")
    name = _activation(model.config.get_text_config(decoder=True))
    if name not in decoder.ACTIVATIONS:
        raise Unsupported(f"the activation {name!r} is not supported yet")
    if not type(model).forward.__module__.startswith("transformers.models."):
        raise Unsupported(f"{_kind(model)} has a forward function of its own")
    for place, module in model.named_modules():
        if place and "forward" in vars(module):
            raise Unsupported(f"the forward function of {place} has been exchanged")
        if place and type(module).__module__.partition(".")[0] not in _KNOWN:
            raise Unsupported(f"{place} is a {_kind(module)}")
    for parameter in model.parameters():
        if parameter.device.type != "cpu":
            raise Unsupported(f"the weights are on {parameter.device}")


class NativePlan:
    """A decoder as the native pass sees it.

    Attributes:
        plan: for `kernels.decoder.decode`.
        info: sizes of the decoder.
        windows: of each layer, 0 where it sees everything.
    """

    def __init__(self, model: PreTrainedModel, planes: int = 2) -> None:
        """`planes`: bytes of an activation that meets integer weights.

        Raises:
            Unsupported: the model is not what the native pass computes.
        """
        require_supported(model)
        config = model.config.get_text_config(decoder=True)
        pages.unmap(t for m in model.modules() if hasattr(m, "packed") for t in m.buffers(recurse=False))
        body: Any = model.base_model
        self.info = describe_decoder(model)
        self._weights: list[Packed] = []
        self._kept: list[Any] = []
        self._seen: dict[tuple[int, tuple[int, ...]], Packed] = {}
        self._sources: list[_Source] = []
        self._model, self._modules = model, list(model.modules())
        self._rotary = body.rotary_emb
        self._kinds = self._rope_kinds()
        self._frequencies: dict[int, torch.Tensor] = {}
        first = body.layers[0]
        self._hidden, self._intermediate = config.hidden_size, first.mlp.down_proj.in_features
        self._epsilon, self._scaling = _epsilon(body.norm), first.self_attn.scaling
        self._settings = type(ACT2FN[_activation(config)]), self._scaling, True
        self._layers, self._norms = body.layers, list[Any]()
        self.windows = tuple(
            self._window(layer.self_attn, config) if slides else 0
            for layer, slides in zip(body.layers, self.info.sliding, strict=False)
        )
        layers = (decoder.Layer * len(body.layers))(*(self._layer(i, layer) for i, layer in enumerate(body.layers)))
        self._ropes = (decoder.Rope * max(1, len(self._kinds)))()
        self.plan = decoder.Plan(
            layers=ctypes.addressof(layers),
            ropes=ctypes.addressof(self._ropes),
            embedding=self._pack(body.embed_tokens, "embed_tokens", None, self._hidden).matrix(),
            head=self._linear(model.lm_head, "lm_head", None, self._hidden),
            final_norm=self._norm(body.norm, "norm", self._hidden),
            layer_count=len(layers),
            rope_count=len(self._kinds),
            hidden=self._hidden,
            intermediate=self._intermediate,
            query_heads=self.info.num_attention_heads,
            kv_heads=self.info.num_key_value_heads,
            head_dim=self.info.head_dim,
            activation=decoder.ACTIVATIONS[_activation(config)],
            planes=planes,
            epsilon=self._epsilon,
            attention_scale=self._scaling,
            attention_softcap=0.0,
            final_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
            embedding_scale=self._scale(body.embed_tokens),
        )
        self._kept += [layers]
        self.refresh(1)
        pages.collapse(tensor for packed in self._weights for tensor in packed.tensors().values())

    def _layer(self, index: int, layer: Any) -> decoder.Layer:
        attention, mlp, where = layer.self_attn, layer.mlp, f"layers.{index}."
        for module in (layer, attention, mlp):
            if not type(module).__module__.startswith("transformers.models."):
                raise Unsupported(f"layer {index} has a {_kind(module)}")
        if not getattr(attention, "is_causal", True):
            raise Unsupported(f"the attention of layer {index} is not causal")
        if _settings(layer) != self._settings:  # the plan has one of each for all layers
            raise Unsupported(f"layer {index} has another activation or scale of attention than the model")
        head_dim = self.info.head_dim
        queries, keys = (n * head_dim for n in (self.info.num_attention_heads, self.info.num_key_value_heads))

        def linear(module: Any, name: str, rows: int, columns: int) -> formats.Matrix:
            return self._linear(module, where + name, rows, columns)

        if hasattr(attention, "qkv_proj"):
            query = linear(attention.qkv_proj, "qkv_proj", queries + 2 * keys, self._hidden)
            key = value = formats.Matrix()
        else:
            query = linear(attention.q_proj, "q_proj", queries, self._hidden)
            key = linear(attention.k_proj, "k_proj", keys, self._hidden)
            value = linear(attention.v_proj, "v_proj", keys, self._hidden)
        if hasattr(mlp, "gate_up_proj"):
            gate, up = self._halves(mlp.gate_up_proj, where + "gate_up_proj")
        else:
            gate, up = (linear(getattr(mlp, n), n, self._intermediate, self._hidden) for n in ("gate_proj", "up_proj"))

        def norm(name: str, module: Any = layer, size: int = self._hidden) -> int | None:
            return self._norm(getattr(module, name, None), where + name, size)

        four_norms = hasattr(layer, "pre_feedforward_layernorm")
        return decoder.Layer(
            query=query,
            key=key,
            value=value,
            out=linear(attention.o_proj, "o_proj", self._hidden, queries),
            gate=gate,
            up=up,
            down=linear(mlp.down_proj, "down_proj", self._hidden, self._intermediate),
            attention_norm=norm("input_layernorm"),
            mlp_norm=norm("pre_feedforward_layernorm" if four_norms else "post_attention_layernorm"),
            query_norm=norm("q_norm", attention, head_dim),
            key_norm=norm("k_norm", attention, head_dim),
            after_attention_norm=norm("post_attention_layernorm") if four_norms else None,
            after_mlp_norm=norm("post_feedforward_layernorm") if four_norms else None,
            rope=self._rope(index, attention),
            window=self.windows[index],
        )

    @staticmethod
    def _window(attention: Any, config: Any) -> int:
        return int(getattr(attention, "sliding_window", None) or getattr(config, "sliding_window", None) or 0)

    # ---- Weights ----

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _watch(self, module: nn.Module, *names: str) -> None:
        for name in names:
            owner = module._parameters if name in module._parameters else module._buffers
            tensor = owner.get(name)
            if tensor is None:
                raise Unsupported(f"the {name} of a {_kind(module)} is computed")
            self._sources.append((owner, name, tensor, tensor.data_ptr(), _version(tensor)))

    def _pack(self, module: Any, name: str, rows: int | None, columns: int) -> Packed:
        """The packed weights `[rows, columns]` of a linear layer or an embedding; None: any number of rows."""
        packed = getattr(module, "packed", None)
        if packed is None:
            if type(module) is not nn.Linear and not isinstance(module, nn.Embedding):
                raise Unsupported(f"{name} is a {_kind(module)}")
            weight = module.weight
            if weight.dtype not in formats.OF_DTYPE:
                raise Unsupported(f"{name} is {weight.dtype}")
            self._watch(module, "weight")
            key = (weight.data_ptr(), tuple(weight.shape))
            if key not in self._seen:
                self._seen[key] = formats.pack_floats(weight, formats.OF_DTYPE[weight.dtype])
            packed = self._seen[key]
        else:
            self._watch(module, *packed.tensors())
            for part, tensor in packed.tensors().items():
                if tensor.is_floating_point() and not tensor.is_meta:
                    formats.check_finite(tensor, f"{name}.{part}")
        if packed.quants.device.type != "cpu":
            raise Unsupported(f"the weights are on {packed.quants.device}")
        if packed.columns != columns or packed.rows != (rows or packed.rows):
            wanted = f"{rows or 'any number of'} x {columns}"
            raise Unsupported(f"{name} is {packed.rows} x {packed.columns} and not {wanted}")
        if all(
            other.quants.data_ptr() != packed.quants.data_ptr() for other in self._weights
        ):  # a tied one counts once
            self._weights.append(packed)
        return packed

    def tensors(self) -> list[torch.Tensor]:
        """The weights that the plan was made of, and those that it computes with."""
        return [source[2] for source in self._sources] + [t for p in self._weights for t in p.tensors().values()]

    def _bias(self, module: Any, name: str) -> torch.Tensor | None:
        bias = getattr(module, "bias", None)
        if bias is None:
            return None
        self._watch(module, "bias")
        formats.check_finite(bias, f"{name}.bias")
        padded = F.pad(bias.detach().float(), (0, -len(bias) % formats.BLOCK)).contiguous()
        self._kept.append(padded)
        return padded

    def _linear(self, module: Any, name: str, rows: int | None, columns: int) -> formats.Matrix:
        return self._pack(module, name, rows, columns).matrix(self._bias(module, name))

    def _halves(self, module: Any, name: str) -> tuple[formats.Matrix, formats.Matrix]:
        """The two halves of a fused layer, without a copy."""
        packed = self._pack(module, name, 2 * self._intermediate, self._hidden)
        half = packed.rows // 2
        if half % packed.row_step or module.bias is not None:
            raise Unsupported(f"{name} has {packed.rows} outputs, which do not divide into blocks")
        parts = [packed.part(first, half) for first in (0, half)]
        self._kept += parts
        return parts[0].matrix(), parts[1].matrix()

    @staticmethod
    def _scale(module: Any) -> float:
        if hasattr(module, "packed"):
            return float(torch.tensor(module.embed_scale, device="cpu").to(module.dtype))
        scale = getattr(module, "embed_scale", None)
        return 1.0 if scale is None else float(torch.as_tensor(scale).to(module.weight.dtype))

    def _norm(self, module: Any, name: str, size: int) -> int | None:
        if module is None:
            return None
        if "RMSNorm" not in type(module).__name__:
            raise Unsupported(f"{name} is a {type(module).__name__} and no RMSNorm")
        if module.weight.numel() != size or _epsilon(module) != self._epsilon:
            raise Unsupported(f"{name} has another size or epsilon than the model")
        self._norms.append(module)
        self._watch(module, "weight")
        formats.check_finite(module.weight, "The weight of a norm")
        weight = module.weight.detach().float()
        return self._keep((1.0 + weight if type(module).__name__.startswith("Gemma") else weight.clone()).contiguous())

    # ---- Rotations ----

    def _rope_kinds(self) -> list[str]:
        """Prefixes of the rotary module's buffers: one for each type of layer that has its own frequencies."""
        kinds = getattr(self._rotary, "layer_types", None)
        return [f"{kind}_" for kind in kinds] if kinds else [""]

    def _rope(self, index: int, attention: Any) -> int:
        if not getattr(attention, "use_rope", True):
            return -1
        kind = getattr(attention, "layer_type", None)
        return self._kinds.index(f"{kind}_") if len(self._kinds) > 1 else 0

    def refresh(self, length: int) -> None:
        """Take the frequencies that hold for sequences of `length` tokens; few types of scaling depend on it.

        They are those of a model that has read nothing else: in transformers a longer sequence, perhaps of another
        thread, leaves its frequencies to the next one.
        """
        types = self._rotary.rope_type
        for number, kind in enumerate(self._kinds):
            layer_type = kind.removesuffix("_")
            rotary, rope_type = self._rotary, types[layer_type] if kind else types
            frequencies = getattr(rotary, f"{kind}inv_freq")
            if "dynamic" in rope_type or rope_type == "longrope":
                rotary = self._own_rotary
                setattr(rotary, f"{kind}max_seq_len_cached", rotary.original_max_seq_len)
                last = torch.tensor([[length - 1]], device="cpu")
                rotary(torch.empty(1, device="cpu"), last, *((layer_type,) if kind else ()))
                frequencies = getattr(rotary, f"{kind}inv_freq")
                if "dynamic" in rope_type and length <= rotary.original_max_seq_len:
                    frequencies = getattr(rotary, f"{kind}original_inv_freq")
            frequencies = frequencies.detach().to(torch.float32, copy=True).contiguous()
            scaling = getattr(rotary, f"{kind}attention_scaling")
            self._ropes[number] = decoder.Rope(frequencies.data_ptr(), 2 * len(frequencies), float(scaling))
            self._frequencies[number] = frequencies  # keeps it alive

    @cached_property
    def _own_rotary(self) -> Any:
        """A rotary module that nobody else changes."""
        with torch.device("cpu"):
            return type(self._rotary)(config=self._rotary.config)

    @property
    def rotations_depend_on_length(self) -> bool:
        types = self._rotary.rope_type
        return any(
            "dynamic" in kind or "longrope" in kind for kind in (types.values() if isinstance(types, dict) else [types])
        )

    def is_current(self, thorough: bool = True) -> bool:
        """Whether no weight or setting has changed, and no module was exchanged, since the plan was made.

        Args:
            thorough: look at all of them. Otherwise at two weights only, in next to no time, which shows a model that
                was moved, trained or loaded anew as a whole.
        """
        sources = self._sources if thorough else (self._sources[0], self._sources[-1])
        for owner, name, tensor, pointer, version in sources:
            if tensor.data_ptr() != pointer or _version(tensor) != version or owner.get(name) is not tensor:
                return False
        if not thorough:
            return True
        if any(_settings(layer) != self._settings for layer in self._layers):
            return False
        if any(_epsilon(norm) != self._epsilon for norm in self._norms):
            return False
        modules = list(self._model.modules())
        return len(modules) == len(self._modules) and all(
            now is then and (now is self._model or "forward" not in vars(now))
            for now, then in zip(modules, self._modules, strict=True)
        )


# The module's own dictionary, the name in it, and what lay there when the plan was made.
_Source = tuple[dict[str, torch.Tensor | None], str, torch.Tensor, int, int]


def _version(tensor: torch.Tensor) -> int:
    """A number that changes when the tensor is written to. Those of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _settings(layer: Any) -> tuple[Any, ...]:
    """What a layer computes with besides its weights: activation, scale of attention, and whether that is causal."""
    attention, mlp = layer.self_attn, layer.mlp
    activation = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
    return type(activation), attention.scaling, getattr(attention, "is_causal", True)


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _epsilon(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


def _kind(module: Any) -> str:
    return f"{type(module).__name__} of {type(module).__module__}"
