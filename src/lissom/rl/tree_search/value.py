"""What states are worth, read from the policy's own last hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lissom.errors import UserError
from lissom.files import atomic_path
from lissom.rl.hidden import read_states

FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """h → 4h → h → 1 with ReLUs, and tanh, scaled to the range of rewards (as in the published code, but for a norm
    there that is trained and never used in the search).

    Args:
        hidden: of the policy.
        low, high: between what values are.
    """

    def __init__(self, hidden: int, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        self.hidden, self.low, self.high = hidden, low, high
        self.layers = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.ReLU(), nn.Linear(4 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, states: Tensor) -> Tensor:
        """Values `[...]` of hidden states `[..., hidden]`, in fp32."""
        share = torch.tanh(self.layers(states.to(self.layers[0].weight.dtype)).squeeze(-1).float())
        return self.low + (share + 1) / 2 * (self.high - self.low)

    def save(self, folder: Path) -> None:
        """Beside the policy, in its folder."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        facts = {"hidden": str(self.hidden), "low": repr(self.low), "high": repr(self.high)}
        with atomic_path(folder / FILE) as temporary:
            save_file(tensors, temporary, metadata=facts)

    @classmethod
    def load(cls, folder: Path) -> ValueHead:
        """What `save` wrote.

        Raises:
            UserError: there is none, or it is damaged.
        """
        from safetensors import safe_open

        file = folder / FILE
        if not file.exists():
            raise UserError(f"{folder} has no {FILE}: it is not of a policy that was trained by tree search.")
        try:
            with safe_open(file, "pt") as opened:
                facts = opened.metadata() or {}
            head = cls(int(facts["hidden"]), float(facts["low"]), float(facts["high"]))
            head.load_state_dict(load_file(file))
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{file} is damaged ({type(error).__name__}).") from error
        return head


@torch.no_grad()
def values_of(
    model: nn.Module, head: ValueHead, prefixes: Sequence[Sequence[int]], padding: int, batch_size: int = 256
) -> list[float]:
    """The head's values at the last token of each prefix: of the state before anything else is written."""
    found: list[float] = []
    for states, _ in read_states(model, prefixes, padding, batch_size):
        found += head(states[:, -1]).tolist()
    return found
