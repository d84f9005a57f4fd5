"""Runs of a few steps on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig

from lissom import NobleConfig
from lissom.errors import UserError
from lissom.models.method import Trainable
from lissom.train import Distillation, TokenWindows, TrainConfig, new_model, train
from lissom.train.distill import cross_entropy, kl_divergence
from lissom.train.folder import CHECKPOINTS, RunFolder, last_checkpoint
from lissom.train.trainer import CausalTrainer
from lissom.training_plugin import method_in_training
from lissom.weights.sparse_bitnet import SparseBitNetConfig
from lissom.weights.sparse_bitnet.apply import layers_of

VOCABULARY = 60
CONFIG = TrainConfig(
    steps=12, context=16, batch_size=4, learning_rate=3e-3, warmup_steps=2, logging_steps=1, eval_steps=6, save_steps=4
)


def windows(count: int = 80) -> TokenWindows:
    """Text with something to learn: each token is followed by the next number, mostly."""
    random = np.random.default_rng(0)
    steps = np.where(random.random(count * 16) < 0.9, 1, 7)
    return TokenWindows((np.cumsum(steps) % VOCABULARY).astype(np.uint16), 16)


def fresh():
    return new_model(VOCABULARY, hidden=48, layers=2, heads=3, intermediate=96, context=16, seed=1)


def run(output: Path, config: TrainConfig = CONFIG, settings: SparseBitNetConfig | None = None, model=None, **changes):
    model = model or fresh()
    if settings is not None:
        settings.convert(model)
    kept, held = windows().split(0.1)
    return train(config, model, None, kept, held, output, **changes), model


def losses(history) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


def test_it_learns_and_leaves_a_model(tmp_path):
    history, model = run(tmp_path, replace(CONFIG, steps=60, logging_steps=20))
    assert losses(history)[-1] < losses(history)[0] - 0.5
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [*range(6, 61, 6)]
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), windows()[0]["input_ids"][None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("settings", [None, SparseBitNetConfig(), SparseBitNetConfig(sparse_share=0.5)])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(settings, tmp_path):
    whole, model = run(tmp_path / "whole", settings=settings)

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 7:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "parts", settings=settings, progress=kill)
    assert last_checkpoint(tmp_path / "parts").name == "checkpoint-4"
    again, other = run(tmp_path / "parts", settings=settings)
    assert losses(again) == losses(whole)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(**_SIZES, intermediate_size=96, max_position_embeddings=32),
        MixtralConfig(**_SIZES, intermediate_size=32, num_key_value_heads=3, num_local_experts=2),
    ],
    ids=["gpt_neox", "mixtral"],
)
def test_models_whose_files_name_tensors_otherwise_go_on(config, tmp_path):
    def made():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)

    whole, model = run(tmp_path / "whole", model=made())
    shutil.copytree(
        tmp_path / "whole" / CHECKPOINTS / "checkpoint-8", tmp_path / "parts" / CHECKPOINTS / "checkpoint-8"
    )
    again, other = run(tmp_path / "parts", model=made())
    assert losses(again) == losses(whole)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_folder_knows_lists_again(tmp_path):
    facts = {"method": asdict(NobleConfig(rank=2, target_modules=("q_proj", "v_proj")))}
    for _ in range(2):
        with RunFolder.open(tmp_path / "run", facts):
            (tmp_path / "run" / CHECKPOINTS).mkdir(exist_ok=True)
    with (
        pytest.raises(UserError, match="target_modules"),
        RunFolder.open(tmp_path / "run", {"method": asdict(NobleConfig(rank=2))}),
    ):
        pass


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def full(*given: object, **named: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="Cannot write"):
        run(tmp_path)


def test_a_run_that_was_killed_behind_its_last_step_makes_no_other(tmp_path):
    whole, model = run(tmp_path)
    (tmp_path / "config.json").unlink()
    told = []
    again, other = run(tmp_path, progress=lambda done, total: told.append(done))
    assert not told and again == whole and (tmp_path / "config.json").exists()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_lines_of_the_log_are_the_same_wherever_it_goes_on(tmp_path):
    config = replace(CONFIG, logging_steps=5)  # 4 and 8 are saved
    whole, _ = run(tmp_path / "whole", config, SparseBitNetConfig())
    assert [entry["step"] for entry in whole if "loss" in entry] == [4, 5, 8, 10, 12]

    def interrupt(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", config, SparseBitNetConfig(), progress=interrupt)
    again, _ = run(tmp_path / "parts", config, SparseBitNetConfig())
    timed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    assert [{k: v for k, v in entry.items() if k not in timed} for entry in again] == [
        {k: v for k, v in entry.items() if k not in timed} for entry in whole
    ]
    assert all("mask_flips" in entry for entry in whole if "loss" in entry)


@pytest.mark.parametrize("every", [4, 5, 100])
def test_the_last_step_is_measured_once(every, tmp_path):
    history, _ = run(tmp_path, replace(CONFIG, steps=8, eval_steps=every))
    measured = [entry["step"] for entry in history if "eval_loss" in entry]
    assert measured == sorted({*range(every, 9, every), 8})


def test_tensorboard_has_what_is_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history, _ = run(tmp_path, replace(CONFIG, report_to="tensorboard"), SparseBitNetConfig())
    (events,) = tmp_path.rglob("events.out.*")
    read = EventAccumulator(str(events)).Reload()
    for name in ("loss", "zeros", "mask_flips"):
        logged = [(entry["step"], entry[name]) for entry in history if name in entry]
        seen = [(event.step, pytest.approx(event.value, rel=1e-5)) for event in read.Scalars(f"train/{name}")]
        assert logged == seen and logged


@pytest.mark.parametrize("times", [1, 2])
def test_a_half_written_checkpoint_is_passed_over(times, tmp_path):
    whole, _ = run(tmp_path, replace(CONFIG, steps=8))
    state = tmp_path / CHECKPOINTS / "checkpoint-8" / "trainer_state.json"
    for written in ("", '{"epoch": 1')[:times]:
        state.write_text(written)
        assert last_checkpoint(tmp_path).name == "checkpoint-4"
    state.unlink()
    assert last_checkpoint(tmp_path / "nothing") is None
    (tmp_path / CHECKPOINTS / "checkpoint-x.tmp").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    again, _ = run(tmp_path, replace(CONFIG, steps=8))
    assert losses(again) == losses(whole) and state.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_a_sentence(file, tmp_path):
    run(tmp_path)
    shutil.rmtree(tmp_path / CHECKPOINTS / "checkpoint-12")
    damaged = tmp_path / CHECKPOINTS / "checkpoint-8" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(UserError, match="checkpoint-8 cannot be read"):
        run(tmp_path)


@pytest.fixture
def ctrl_c():
    """Ctrl-C as Python has it: in a background job it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_run_keeps_its_steps(ctrl_c, tmp_path):
    whole, _ = run(tmp_path / "whole")

    def interrupt(done: int, total: int) -> None:
        if done == 7:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(UserError, match="Interrupted behind step 7, which is saved"):
        run(tmp_path / "parts", progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    told = []
    again, _ = run(tmp_path / "parts", progress=lambda done, total: told.append(done))
    assert told[0] == 8 and losses(again) == losses(whole)


@pytest.mark.parametrize("count", [3, 7])
def test_held_out_text_is_measured_whole(count, tmp_path):
    model, held = fresh(), windows(count)
    history = train(replace(CONFIG, steps=3), model, None, windows(8), held, tmp_path)
    ids = torch.stack([held[i]["input_ids"] for i in range(count)])
    with torch.no_grad():
        wanted = float(cross_entropy(model.eval()(ids).logits, ids))
    assert history[-1]["eval_loss"] == pytest.approx(wanted, rel=1e-5)


def test_text_of_less_than_a_batch_is_refused(tmp_path):
    with pytest.raises(UserError, match="3 windows of 16 tokens: fewer than a batch of 4"):
        train(CONFIG, fresh(), None, windows(3), None, tmp_path)


def test_settings_reach_the_trainer(tmp_path):
    config = replace(CONFIG, beta1=0.8, beta2=0.7, max_grad_norm=0.3, seed=5)
    arguments = CausalTrainer(fresh(), config, tmp_path, windows()).args
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.max_grad_norm) == (0.8, 0.7, 0.3)
    one, _ = run(tmp_path / "one", replace(CONFIG, steps=3))
    other, _ = run(tmp_path / "other", replace(CONFIG, steps=3, seed=1))
    assert losses(one) != losses(other)  # the order of windows


def test_methods_are_told_of_steps_and_measured(tmp_path):
    history, model = run(tmp_path, settings=SparseBitNetConfig(sparse_share=0.25))
    logged = [entry for entry in history if "loss" in entry]
    assert all(layer.sparse for layer in layers_of(model).values())
    pruned = [entry["pruned"] for entry in logged]
    assert pruned[:9] == [0] * 9 and min(pruned[9:]) > 0.1  # 12 steps, sparse from the 10th on
    assert "mask_flips" not in logged[8] and 0 < logged[-1]["mask_flips"] < 0.2


def test_weight_decay_follows_its_schedule_and_spares_norms(tmp_path, monkeypatch):
    seen = []
    begin = CausalTrainer.begin_step

    def watched(self, step):
        begin(self, step)
        seen.append([group["weight_decay"] for group in self.optimizer.param_groups])

    monkeypatch.setattr(CausalTrainer, "begin_step", watched)
    run(tmp_path, replace(CONFIG, weight_decay_until=0.5))
    assert seen[0] == [0.1, 0.0] and seen[6:] == [[0.0, 0.0]] * 6
    assert 0.1 > seen[1][0] > seen[3][0] > 0


def test_accumulation_gives_the_same_steps(tmp_path):
    whole, model = run(tmp_path / "one")
    parts, other = run(tmp_path / "two", replace(CONFIG, batch_size=2, gradient_accumulation_steps=2))
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-4)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_a_student_comes_nearer_to_its_teacher(tmp_path):
    _, teacher = run(tmp_path / "teacher", replace(CONFIG, steps=60))
    student = fresh()
    student.load_state_dict(teacher.state_dict())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    config = replace(CONFIG, steps=60, logging_steps=5)
    history, _ = run(tmp_path / "student", config, SparseBitNetConfig(), student, teacher=teacher)
    logged = [entry for entry in history if "loss" in entry]
    assert logged[-1]["kl"] < 0.8 * logged[0]["kl"]
    assert logged[-1]["hidden"] < 0.8 * logged[0]["hidden"]
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    "settings", [Distillation(), Distillation(0.5, 0.0, 2.0, 3.0), Distillation(0.25, 3.0, 0.0, 0.5)]
)
def test_the_loss_of_a_student_is_what_its_weights_say(settings, tmp_path):
    student, teacher = fresh(), new_model(VOCABULARY, hidden=48, layers=2, heads=3, intermediate=96, seed=2)
    ids = torch.stack([windows(4)[i]["input_ids"] for i in range(4)])
    with torch.no_grad():
        ours, theirs = (model.eval()(ids, output_hidden_states=True) for model in (student, teacher))
    wanted = settings.labels * cross_entropy(ours.logits, ids)
    wanted += settings.kl * kl_divergence(ours.logits, theirs.logits, settings.temperature)
    for state, other in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):  # not the embedding
        wanted += settings.hidden / 2 * (state - other).square().mean() / other.square().mean()
    config = replace(CONFIG, steps=1, warmup_steps=0)
    history = train(config, student, None, windows(4), None, tmp_path, teacher, settings)
    assert losses(history) == [pytest.approx(float(wanted), rel=1e-4)]


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="tokens, the model"):
        run(tmp_path, teacher=tiny_model("llama"))
    other = new_model(VOCABULARY, hidden=96, layers=2, heads=3)
    with pytest.raises(UserError, match="leave out hidden states"):
        run(tmp_path, teacher=other)
    run(tmp_path, teacher=other, distillation=Distillation(hidden=0.0))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    model = fresh()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="loss is nan at step 1"):
        run(tmp_path, model=model)


def test_a_model_that_became_sparse_stays_so(tmp_path):
    run(tmp_path / "first", settings=SparseBitNetConfig(sparse_share=0.5))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert method_in_training(loaded) == SparseBitNetConfig()
    history, _ = run(tmp_path / "on", model=loaded)
    assert min(entry["pruned"] for entry in history if "loss" in entry) > 0.1


@pytest.mark.parametrize("save_steps", [1, 100])
def test_weights_that_are_no_numbers_are_not_kept(save_steps, tmp_path):
    config = replace(CONFIG, steps=3, warmup_steps=0, learning_rate=1e38, logging_steps=50, save_steps=save_steps)
    with pytest.raises(UserError, match="Weights are not finite"):
        train(config, fresh(), None, windows(8), None, tmp_path)
    assert last_checkpoint(tmp_path) is None and not (tmp_path / "config.json").exists()


_HEAD = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
from pathlib import Path
from dataclasses import asdict, replace
import gc, json, torch
from test_trainer import CONFIG, fresh, sharded_losses, windows
from lissom.train import CausalTrainer
from lissom import NobleConfig, SparseBitNetConfig
settings = {settings!r}
"""
_TRAINER = """
config = replace(CONFIG, batch_size=2, steps=6)
model = settings.convert(fresh())
kept, held = windows().split(0.1)
trainer = CausalTrainer(model, config, Path(sys.argv[1]), kept, held)
trainer.train()
if trainer.is_world_process_zero():
    Path(sys.argv[2]).write_text(json.dumps(trainer.state.log_history))
torch.distributed.destroy_process_group()
del trainer, model
gc.collect()  # they hold the group, whose threads must not outlive the interpreter
"""
_SHARDED = """
torch.distributed.init_process_group("gloo")
found = sharded_losses(torch.distributed.get_rank(), 2, settings)
if torch.distributed.get_rank() == 0:
    Path(sys.argv[2]).write_text(json.dumps(found))
torch.distributed.destroy_process_group()
gc.collect()
"""


def in_two_processes(body: str, folder: Path, settings: Trainable) -> list:
    """What the script wrote in the first of two processes."""
    here = Path(__file__).parent
    (folder / "script.py").write_text(_HEAD.format(tests=str(here.parent), here=str(here), settings=settings) + body)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(folder / "script.py"), str(folder / "two"), str(folder / "log.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "log.json").read_text())


METHODS = [(SparseBitNetConfig(), "zeros"), (NobleConfig(rank=4), "omega_drift")]


@pytest.mark.parametrize("settings,what", METHODS)
def test_two_processes_give_the_losses_of_one(settings, what, tmp_path):
    one, _ = run(tmp_path / "one", replace(CONFIG, steps=6), settings)
    two = in_two_processes(_TRAINER, tmp_path, settings)
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-3)
    measured = [[entry[what] for entry in history if "loss" in entry] for history in (one, two)]
    np.testing.assert_allclose(measured[1], measured[0], rtol=1e-2)


def sharded_losses(rank: int, processes: int, settings: Trainable) -> list[tuple[float, float]]:
    """Loss of a few steps and what the method measures first, the model's weights spread over the processes by FSDP2
    where there are several. (accelerate's own FSDP asks for a GPU.)"""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = settings.convert(fresh())
    if processes > 1:
        mesh = init_device_mesh("cpu", (processes,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    training = settings.training(model)
    optimizer = torch.optim.AdamW(training.parameter_groups(model, 3e-3, 0.01) or model.parameters(), 3e-3)
    found = []
    for step in range(6):
        ids = torch.stack([windows()[4 * step + i]["input_ids"] for i in range(4)])
        loss = cross_entropy(model(input_ids=ids.chunk(processes)[rank]).logits, ids.chunk(processes)[rank])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        if processes > 1:
            torch.distributed.all_reduce(whole)
        found.append((float(whole) / processes, next(iter(training.measures().values()))))
    return found


@pytest.mark.parametrize("settings,what", METHODS)
def test_spread_weights_learn_as_whole_ones(settings, what, tmp_path):
    one, two = sharded_losses(0, 1, settings), in_two_processes(_SHARDED, tmp_path, settings)
    np.testing.assert_allclose(two, one, rtol=5e-3)
