"""What an arm has spent: comparisons are at equal generated tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


@dataclass
class TokenLedger:
    """Tokens of all processes, so far.

    Attributes:
        generated: written by the policy in training, whatever became of them.
        prompt: read for that.
        trained: that gradients were taken of, each time.
        completions: written.
    """

    generated: int = 0
    prompt: int = 0
    trained: int = 0
    completions: int = 0

    def spend(self, **counts: int) -> None:
        """Add to some of them."""
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + int(count))

    def __str__(self) -> str:
        return f"{self.generated:,} tokens generated, {self.trained:,} trained on"


@dataclass
class LedgerCallback(TrainerCallback, ExportableState):
    """Keeps a ledger in the trainer's checkpoints, and ends the training where a budget is spent.

    Attributes:
        ledger: see there.
        budget: generated tokens after which no further step is made; None: no end.
    """

    ledger: TokenLedger = field(default_factory=TokenLedger)
    budget: int | None = None

    def state(self) -> dict[str, Any]:
        """What is written into a checkpoint."""
        return {"args": {}, "attributes": asdict(self.ledger)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Goes on with what a checkpoint has. Transformers would make a new callback of it, if it was asked to."""
        known = state.stateful_callbacks.get(type(self).__name__)
        if known is not None:
            self.ledger.__dict__.update(known["attributes"])

    @property
    def is_spent(self) -> bool:
        """Whether there was a budget."""
        return self.budget is not None and self.ledger.generated >= self.budget

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the training where the budget is spent, once all was learned from what was generated."""
        updates = max(1, args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)
        if self.is_spent and state.global_step % updates == 0:
            control.should_training_stop = True
