"""Training causal language models: from scratch, or on from a dense checkpoint with a teacher.

`token_windows` reads a folder of text and packs it into windows of equal length; `train` trains on them with
transformers' Trainer, so that it runs unchanged under `accelerate launch` and `torchrun`, with DDP and FSDP2. A killed
run goes on from its last checkpoint with the same steps. Methods that change weights are put into the model before, and
are told of every step.
"""

from lissom.train.config import Distillation, TrainConfig
from lissom.train.data import TokenWindows, text_fingerprint, token_windows
from lissom.train.run import train
from lissom.train.scratch import new_model, new_tokenizer
from lissom.train.trainer import CausalTrainer

__all__ = [
    "CausalTrainer",
    "Distillation",
    "TokenWindows",
    "TrainConfig",
    "new_model",
    "new_tokenizer",
    "text_fingerprint",
    "token_windows",
    "train",
]
