"""What architectures call their weights and hyper-parameters in GGUF and in transformers, in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lissom.errors import UserError
from lissom.models.gguf.file import GgufFile

LONG_FACTORS, SHORT_FACTORS, FACTORS = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
_LLAMA3 = {  # the file has the frequencies that follow from these, not these
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
_GEMMA3_27B = 62  # layers; the one Gemma 3 whose queries are not scaled by head_dim
_NO_ROPE_INTERVAL = 4  # llama.cpp has it in its code


@dataclass(frozen=True)
class Architecture:
    """An architecture that both sides know.

    Attributes:
        name: in GGUF.
        model_types: in transformers; the first one is what a file becomes.
        paired: whether the rows of q and k lie in the file as rotary pairs (0, d/2, 1, d/2 + 1, ...).
        norm_offset: what the file's norm weights have more than those of transformers.
        scaled_embedding: whether embeddings are multiplied by sqrt(hidden_size).
    """

    name: str
    model_types: tuple[str, ...]
    paired: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False


ARCHITECTURES = (
    Architecture("llama", ("llama", "mistral"), paired=True),
    Architecture("qwen2", ("qwen2",)),
    Architecture("qwen3", ("qwen3",)),
    Architecture("smollm3", ("smollm3",), paired=True),
    Architecture("gemma3", ("gemma3_text",), norm_offset=1.0, scaled_embedding=True),
    Architecture("phi3", ("phi3",)),
)
NAMES = tuple(architecture.name for architecture in ARCHITECTURES)


def of_file(file: GgufFile) -> Architecture:
    """The architecture of a file.

    Raises:
        UserError: it is not supported.
    """
    for known in ARCHITECTURES:
        if known.name == file.architecture:
            return known
    raise UserError(f"{file.path} is of the architecture {file.architecture!r}: {_supported('name')}")


def of_model_type(model_type: str) -> Architecture:
    """The architecture of a model of transformers.

    Raises:
        UserError: it is not supported.
    """
    for known in ARCHITECTURES:
        if model_type in known.model_types:
            return known
    raise UserError(f"Models of type {model_type!r} cannot be written as GGUF: {_supported('model_types')}")


def _supported(attribute: str) -> str:
    names = [getattr(known, attribute) for known in ARCHITECTURES]
    return f"supported are {', '.join(name if isinstance(name, str) else ', '.join(name) for name in names)}."


def names(architecture: Architecture, model: nn.Module, layers: int) -> dict[str, str]:
    """Name in the file of every module of `model` that has weights, without `.weight` or `.bias`."""
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    known = get_tensor_name_map(MODEL_ARCH(numbers[architecture.name]), layers)
    found = {}
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None and next(module.buffers(recurse=False), None) is None:
            continue
        other = known.get_name(name)
        if other is not None:
            found[name] = other
    return found


def pair_rows(rows: int, heads: int) -> torch.Tensor:
    """`[rows]`: the row of transformers at every row of the file, for q and k of `paired` architectures."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def heads_of(name: str, config: PreTrainedConfig) -> int:
    """Heads whose rows lie in pairs in the tensor `name` of a file, 0 for other tensors."""
    kind = name.split(".")[-1]
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(kind, 0)


def head_dim_of(config: PreTrainedConfig) -> int:
    """Values of a head of q and k."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# ---- from a file


def config_of(file: GgufFile) -> PreTrainedConfig:
    """The config of transformers that describes the model of a file.

    Raises:
        UserError: the architecture or a setting of it is not supported, or a hyper-parameter is missing.
    """
    architecture = of_file(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{file.path} has no tensor token_embd.weight: it holds no language model.")
    heads = file.require("attention.head_count")
    facts: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": file.require("embedding_length"),
        "intermediate_size": file.require("feed_forward_length"),
        "num_hidden_layers": file.require("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("attention.head_count_kv", heads),
        "max_position_embeddings": file.require("context_length"),
        "rms_norm_eps": file.require("attention.layer_norm_rms_epsilon"),
    }
    if any(isinstance(value, list) for value in facts.values()):
        raise UserError(f"{file.path} has layers of different sizes, which is not supported.")
    if not all(isinstance(value, int | float) and value > 0 for value in facts.values()):
        raise UserError(f"{file.path} is damaged: its metadata does not fit its tensors.")
    if facts["hidden_size"] != embedding.shape[1] or not 0 < facts["num_hidden_layers"] < len(file.tensors):
        raise UserError(f"{file.path} is damaged: its metadata does not fit its tensors.")
    facts["tie_word_embeddings"] = "output.weight" not in file.tensors
    facts["head_dim"] = file.get("attention.key_length", facts["hidden_size"] // heads)
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        facts[f"{role}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if architecture.name in ("llama", "qwen3", "smollm3"):
        facts["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture.name in ("llama", "smollm3"):
        facts["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    facts["rope_parameters"] = _rope_of(file, facts)
    if architecture.name == "gemma3":
        facts |= _gemma3_of(file, facts)
    if architecture.name == "phi3":
        facts["sliding_window"] = file.get("attention.sliding_window") or None
        rotated = file.get("rope.dimension_count", facts["head_dim"])
        facts["rope_parameters"]["partial_rotary_factor"] = rotated / facts["head_dim"]
        original = file.get("rope.scaling.original_context_length")
        facts |= {"original_max_position_embeddings": original} if original else {}
    try:
        config = AutoConfig.for_model(architecture.model_types[0], **facts)
    except Exception as error:  # of many kinds: whatever a config class says to values that do not fit together
        raise UserError(f"{file.path} has metadata that do not fit together: {str(error).splitlines()[0]}") from error
    if FACTORS in file.tensors:
        config.rope_parameters = _scaled_rope_of(file, config)
    return config


def _rope_of(file: GgufFile, facts: dict[str, Any]) -> dict[str, Any]:
    kind = file.get("rope.scaling.type", "none")
    found = {"rope_type": "default", "rope_theta": file.get("rope.freq_base", 10000.0)}
    if LONG_FACTORS in file.tensors:
        return found | {
            "rope_type": "longrope",
            "long_factor": _values(file, LONG_FACTORS),
            "short_factor": _values(file, SHORT_FACTORS),
            "attention_factor": file.get("rope.scaling.attn_factor"),
        }
    if kind == "none":
        return found
    factor = file.require("rope.scaling.factor")
    if kind == "linear":
        return found | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = file.get("rope.scaling.original_context_length", facts["max_position_embeddings"])
        betas = {f"beta_{end}": file.get(f"rope.scaling.yarn_beta_{end}") for end in ("fast", "slow")}
        betas = {key: value for key, value in betas.items() if value is not None}
        return found | {
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas,
        }  # fmt: skip
    raise UserError(f"{file.path} has rotary positions of the kind {kind!r}, which is not supported.")


def _values(file: GgufFile, name: str) -> list[float]:
    if name not in file.tensors or file.tensors[name].kind.name != "F32":
        raise UserError(f"{file.path} has no tensor {name} of type F32.")
    return file.tensors[name].data.view("<f4").flatten().tolist()


def _scaled_rope_of(file: GgufFile, config: PreTrainedConfig) -> dict[str, Any]:
    """Rope parameters from the factors that a file has for every frequency: Llama 3's settings where they give these,
    otherwise the factors themselves, as LongRoPE has them, the same at any length."""
    factors, theta = _values(file, FACTORS), config.rope_parameters["rope_theta"]
    llama3 = _LLAMA3 | {"rope_theta": theta, "factor": round(max(factors), 4)}
    again = frequency_factors(config, llama3)
    if len(factors) != len(again) or not min(factors) > 0:
        raise UserError(f"{file.path}: tensor {FACTORS} does not fit the heads of the model.")
    if torch.allclose(torch.tensor(factors), again, rtol=1e-3):
        return llama3
    return {
        "rope_type": "longrope", "rope_theta": theta, "long_factor": factors, "short_factor": factors,
        "attention_factor": 1.0, "original_max_position_embeddings": config.max_position_embeddings,
    }  # fmt: skip


def _gemma3_of(file: GgufFile, facts: dict[str, Any]) -> dict[str, Any]:
    period = file.get("attention.sliding_window_pattern", 6)
    layers, window = facts["num_hidden_layers"], file.get("attention.sliding_window")
    sliding = period if isinstance(period, list) else [(layer + 1) % period != 0 for layer in range(layers)]
    scalar = facts["head_dim"]
    if layers == _GEMMA3_27B:
        scalar = facts["hidden_size"] // facts["num_attention_heads"]
    return {
        "layer_types": ["sliding_attention" if window and slides else "full_attention" for slides in sliding],
        "sliding_window": window,
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": file.get("final_logit_softcapping"),
        "rope_parameters": {
            "full_attention": facts["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": file.get("rope.freq_base_swa", 10000.0)},
        },
    }


def frequency_factors(config: PreTrainedConfig, rope: dict[str, Any]) -> torch.Tensor:
    """`[head_dim / 2]`: how much slower than by default each rotary frequency of Llama 3 is."""
    scaled = type(config)(**config.to_dict() | {"rope_parameters": rope})
    frequencies = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))[0]
    size = head_dim_of(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / frequencies


# ---- to a file


def metadata_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Hyper-parameters of a model by their keys in a file, without the architecture before them.

    Raises:
        UserError: a setting of the model cannot be said in GGUF.
    """
    architecture, size = of_model_type(config.model_type), head_dim_of(config)
    facts: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    rope = config.rope_parameters
    window = getattr(config, "sliding_window", None)
    if architecture.name == "gemma3":
        facts |= _gemma3_to(config)
        rope = rope["full_attention"]
    elif architecture.name == "phi3":
        facts |= {"attention.sliding_window": window} if window else {}
    elif window and getattr(config, "use_sliding_window", True):
        # llama.cpp has no window for these; without it the model is itself only as far as the window reaches.
        facts["context_length"] = min(facts["context_length"], window)
    if architecture.name == "smollm3":
        expected = [int((layer + 1) % _NO_ROPE_INTERVAL != 0) for layer in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != expected:
            raise UserError("GGUF knows SmolLM3 only with every fourth layer without rotary positions.")
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != ("gelu_pytorch_tanh" if architecture.name == "gemma3" else "silu"):
        raise UserError(f"GGUF has no activation {activation!r} for {config.model_type}.")
    facts["rope.dimension_count"] = int(size * rope.get("partial_rotary_factor", 1.0))
    facts["rope.freq_base"] = float(rope["rope_theta"])
    return facts | _rope_to(config, rope)


def _rope_to(config: PreTrainedConfig, rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn" and rope.get("attention_factor") is None and not rope.get("mscale"):
        betas = {f"rope.scaling.yarn_beta_{end}": rope.get(f"beta_{end}") for end in ("fast", "slow")}
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            **{key: float(value) for key, value in betas.items() if value},
        }
    if kind == "longrope":
        scale = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))[1]
        original = config.original_max_position_embeddings
        return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": float(scale)}
    raise UserError(f"Rotary positions of the kind {kind!r} cannot be said in GGUF.")


def _gemma3_to(config: PreTrainedConfig) -> dict[str, Any]:
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    period = slides.index(False) + 1 if False in slides else 0
    if period == 0 or slides != [(layer + 1) % period != 0 for layer in range(len(slides))]:
        raise UserError("GGUF knows Gemma 3 only with windows at regular intervals.")
    large = config.num_hidden_layers == _GEMMA3_27B
    scalar = config.hidden_size // config.num_attention_heads if large else head_dim_of(config)
    if config.query_pre_attn_scalar != scalar or config.attn_logit_softcapping:
        raise UserError(f"GGUF knows Gemma 3 only with query_pre_attn_scalar={scalar} and no softcapping of attention.")
    facts = {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": period,
        "rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"]),
    }
    if config.final_logit_softcapping:
        facts["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return facts


def factor_tensors(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """fp32 tensors of rotary factors that a file of this model has."""
    rope = config.rope_parameters
    kind = rope.get("rope_type")
    if kind == "llama3":
        return {FACTORS: frequency_factors(config, rope)}
    if kind == "longrope":
        return {LONG_FACTORS: torch.tensor(rope["long_factor"]), SHORT_FACTORS: torch.tensor(rope["short_factor"])}
    return {}
