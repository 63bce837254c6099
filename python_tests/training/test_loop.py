"""The training loop: what it learns, writes, and does when something goes wrong."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
from tiny_recipe import tiny

import vtok_ext as vt
from vtok_ext.layers import FSQ
from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.training import checkpoint_storage, loop
from vtok_ext.training.blocks import BLOCKS, blocks, compile_blocks, recompute_activations
from vtok_ext.training.checkpoint import latest_checkpoint, read_shapes, read_tensors
from vtok_ext.training.gradients import clip_gradients
from vtok_ext.training.loop import train
from vtok_ext.training.run_log import RunLog, read_log
from vtok_ext.training.sentinel import NonFiniteLossError, first_bad_layer
from vtok_ext.training.setup import build_training
from vtok_ext.training.step import NonFiniteStep, Stepper
from vtok_ext.training.stop_request import stop_requests
from vtok_ext.training.tokenizer_task import TokenizerTask

PLAIN = ["loss.discriminator=none", "loss.perceptual_weight=0"]


def clip_batches(n, batch_size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, 3, 5, 16, 16)
    return [torch.randint(256, shape, dtype=torch.uint8, generator=generator) for _ in range(n)]


def log_of(out, kind="train"):
    lines = [line for line in read_log(out / "log.jsonl") if line["kind"] == kind]
    return [{k: v for k, v in line.items() if k != "clips_per_s"} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of six steps: (folder, result, what on_step saw)."""
    out, seen = tmp_path_factory.mktemp("run"), []
    result = train(tiny(), out, on_step=seen.append)
    return out, result, seen


def test_a_run_leaves_log_checkpoints_and_model(finished):
    out, result, seen = finished
    assert (result.step, result.resumed_from, result.stopped_by) == (6, 0, None)
    assert [progress.step for progress in seen] == list(range(1, 7))
    assert all(progress.clips_per_s > 0 for progress in seen)
    assert [line["step"] for line in log_of(out, "validation")] == [2, 3, 4, 6]
    assert [line["step"] for line in log_of(out, "checkpoint")] == [2, 4, 6]
    assert ["d_weight" in line for line in log_of(out)] == [False] * 2 + [True] * 4
    assert result.validation["rec_loss"] == log_of(out, "validation")[-1]["rec_loss"]
    found = latest_checkpoint(out / "checkpoints", pytest.fail)
    state = {name: torch.zeros(shape) for name, shape in read_shapes(found).items()}
    read_tensors(found, state)
    model = vt.load_model(out / "model").state_dict()
    averages = {n.partition(".")[2]: t for n, t in state.items() if n.startswith("averages.")}
    assert averages and all(torch.equal(model[name], a) for name, a in averages.items())
    assert state["loss.lecam.real_mean"] != 0


def test_discriminator_waits_for_its_start(finished):
    """Its optimiser counts every step, as published, but nothing moves before batch 2."""
    training = build_training(tiny(), torch.device("cpu"))
    step, before = Stepper(training), training.task.discriminator.main[0].weight.detach().clone()
    for number, parts in enumerate(clip_batches(3)):
        step([parts])
        moved = not torch.equal(training.task.discriminator.main[0].weight, before)
        assert moved == (number >= 2)
    counts = {float(s["step"]) for s in training.optimizers["discriminator"].state.values()}
    assert counts == {3.0}


@pytest.mark.parametrize("failing", ["validate", "pictures"])
def test_a_failing_validation_loses_no_steps(failing, tmp_path, monkeypatch):
    def fail(task, samples):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TokenizerTask, failing, fail)
    # At step 2 no checkpoint is due.
    recipe = tiny(*PLAIN, "run.sample_every=2", "run.validate_every=2", "run.checkpoint_every=6")
    with pytest.raises(RuntimeError, match="out of memory"):
        train(recipe, tmp_path)
    found = latest_checkpoint(tmp_path / "checkpoints", pytest.fail)
    assert found.step == 2 and (found.metric is None) == (failing == "validate")
    monkeypatch.undo()
    assert train(recipe, tmp_path, resume="auto", warn=lambda line: None).resumed_from == 2
    whole = train(recipe, tmp_path / "whole")
    assert log_of(tmp_path) == log_of(tmp_path / "whole") and whole.step == 6


def test_a_rescue_that_fails_hides_nothing(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("disk full")

    def diverge(task, samples):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TokenizerTask, "validate", diverge)
    monkeypatch.setattr("vtok_ext.training.checkpoint.CheckpointWriter.save", fail)
    warnings = []
    with pytest.raises(RuntimeError, match="out of memory"):
        train(tiny(*PLAIN), tmp_path, warn=warnings.append)
    assert any("could not be saved: disk full" in line for line in warnings)


@pytest.mark.parametrize("where", ["step", "on_step", "clips"])
def test_an_error_loses_no_steps(where, tmp_path, monkeypatch):
    """Of the step that it comes in nothing is left, whatever that had drawn or changed by then."""
    accumulate, collate = TokenizerTask.accumulate, loop.step_batches

    def fail_in_a_step(task, batch, backward):
        terms = accumulate(task, batch, backward)
        if batch.step == 3:
            torch.rand(5)
            raise RuntimeError("out of memory")
        return terms

    def fail_while_reading(*arguments):
        for number, clips in enumerate(collate(*arguments)):
            if number == 3:
                raise RuntimeError("out of memory")
            yield clips

    def fail_while_showing(now):
        if now.step == 3:
            raise RuntimeError("out of memory")

    if where == "step":
        monkeypatch.setattr(TokenizerTask, "accumulate", fail_in_a_step)
    elif where == "clips":
        monkeypatch.setattr(loop, "step_batches", fail_while_reading)
    recipe = tiny("run.checkpoint_every=6", "run.log_every=1", "run.validate_every=6")
    shown = fail_while_showing if where == "on_step" else None
    with pytest.raises(RuntimeError, match="out of memory"):
        train(recipe, tmp_path, on_step=shown)
    assert latest_checkpoint(tmp_path / "checkpoints", pytest.fail).step == 3
    monkeypatch.undo()
    assert train(recipe, tmp_path, resume="auto", warn=lambda line: None).resumed_from == 3
    train(recipe, tmp_path / "whole")
    assert log_of(tmp_path) == log_of(tmp_path / "whole")


def test_an_error_while_weights_move_saves_nothing(tmp_path, monkeypatch):
    """What is half moved is the state of no step."""

    def fail(stepper, num_samples):
        next(iter(stepper.training.optimizers.values())).step()
        raise RuntimeError("device lost")

    monkeypatch.setattr(Stepper, "_apply", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        train(tiny(*PLAIN), tmp_path)
    assert latest_checkpoint(tmp_path / "checkpoints", pytest.fail) is None


@pytest.mark.parametrize("stopped", [False, True])
def test_a_failed_background_checkpoint_does_not_cost_the_next(stopped, tmp_path, monkeypatch):
    """That of step 2 fails; that of step 4, or of a signal after step 3, is written."""
    write, calls = checkpoint_storage.write_part, []

    def fail_once(tensors, path):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return write(tensors, path)

    monkeypatch.setattr(checkpoint_storage, "write_part", fail_once)

    def stop(now):
        if stopped and now.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    warnings = []
    options = ["run.background_checkpoints=true", "run.log_every=1", "run.keep_last=9"]
    result = train(tiny(*PLAIN, *options), tmp_path, warn=warnings.append, on_step=stop)
    assert sum("No space left" in line for line in warnings) == 1
    folders = sorted(path.name[-1] for path in (tmp_path / "checkpoints").glob("step-*"))
    assert folders == (["3"] if stopped else ["4", "6"])
    assert result.step == (3 if stopped else 6) and result.checkpoint.is_dir()


def test_an_error_saves_the_step_whose_background_checkpoint_fails(tmp_path, monkeypatch):
    """The step has begun to be written when the error comes, and is not written for that."""
    write, calls = checkpoint_storage.write_part, []

    def fail_once(tensors, path):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return write(tensors, path)

    def fail_after_saving(self, step, stopped, mark=loop._Run._mark):
        mark(self, step, stopped)
        if step == 2:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(checkpoint_storage, "write_part", fail_once)
    monkeypatch.setattr(loop._Run, "_mark", fail_after_saving)
    warnings = []
    with pytest.raises(RuntimeError, match="out of memory"):
        train(tiny(*PLAIN, "run.background_checkpoints=true"), tmp_path, warn=warnings.append)
    assert sum("No space left" in line for line in warnings) == 1
    assert latest_checkpoint(tmp_path / "checkpoints", pytest.fail).step == 2


def test_another_run_is_not_overwritten(finished):
    out, _, _ = finished
    with pytest.raises(ValueError, match="out must be a folder without checkpoints"):
        train(tiny(), out)
    with pytest.raises(ValueError, match="resume must be one of"):
        train(tiny(), out, resume="yes")


def test_a_changed_recipe_is_announced_and_another_model_refused(finished):
    out, _, _ = finished
    warnings = []
    result = train(tiny("run.steps=6", "optimizer.clip=5.0"), out, resume="auto",
                   warn=warnings.append)  # fmt: skip
    assert result.resumed_from == result.step == 6
    assert warnings == ["resuming with another recipe: optimizer.clip was 20.0, is 5.0"]
    with pytest.raises(ValueError, match="must be of the same model and losses"):
        train(tiny("model.overrides.ch=8"), out, resume="auto", warn=lambda line: None)


def test_accumulated_micro_batches_equal_one_batch():
    """Without noise: FSQ. Its auxiliary loss is not a mean over clips, hence no part of this."""
    weights = []
    for accumulate in (1, 2):
        recipe = tiny(*PLAIN, f"run.accumulate={accumulate}", "loss.aux_weight=0", base="smoke_fsq")
        training = build_training(recipe, torch.device("cpu"))
        batch = clip_batches(1, batch_size=4)[0]
        terms = Stepper(training)(list(batch.chunk(accumulate)))
        weights.append([terms["loss"], terms["grad_norm"]])
    assert weights[0] == pytest.approx(weights[1], rel=1e-5)


def test_frozen_encoder_stays_and_the_decoder_learns():
    recipe = tiny("model.freeze=[encoder]", "loss.discriminator_start=0")
    training = build_training(recipe, torch.device("cpu"))
    before = {k: v.clone() for k, v in training.task.model.state_dict().items()}
    terms = Stepper(training)(clip_batches(1))
    changed = {k.split(".")[0] for k, v in training.task.model.state_dict().items()
               if not torch.equal(v, before[k])}  # fmt: skip
    assert changed == {"decoder"}
    assert "kl_loss" not in terms and "d_weight" in terms
    assert not training.task.model.encoder.training and training.task.model.decoder.training


def test_the_quantizer_anneals_by_the_step(monkeypatch):
    """Of the run, in each of its micro-batches."""
    seen, weight = [], FSQ.annealed_entropy_weight

    def record(quantizer, step):
        seen.append(step)
        return weight(quantizer, step)

    monkeypatch.setattr(FSQ, "annealed_entropy_weight", record)
    recipe = tiny(*PLAIN, "run.accumulate=2", base="smoke_fsq")
    training = build_training(recipe, torch.device("cpu"))
    for batch in clip_batches(3, batch_size=4):
        Stepper(training)(list(batch.chunk(2)))
    assert seen == [0, 0, 1, 1, 2, 2]


def test_bfloat16_trains():
    # Not 3d: torch 2.13's bfloat16 conv3d gives NaN weight gradients at these sizes on some CPUs.
    recipe = tiny("run.precision=bfloat16", "loss.discriminator=2d", "data.height=32",
                  "data.width=32")  # fmt: skip
    training = build_training(recipe, torch.device("cpu"))
    step = Stepper(training)
    clips = clip_batches(1)[0].repeat(1, 1, 1, 2, 2)
    for _ in range(3):
        terms = step([clips])
    assert terms["d_weight"] > 0 and terms["d_loss"] > 0
    assert all(p.dtype == torch.float32 for p in training.task.model.parameters())


def test_float16_leaves_steps_out_and_lowers_its_scale():
    """A scale at which gradients overflow: weights stay, the next step has half of it."""
    training = build_training(
        tiny(*PLAIN, "run.precision=float16", "run.steps=100"), torch.device("cpu")
    )
    step, weight = Stepper(training), training.task.last_weight
    training.loss_scale.value = 2.0**24
    before, terms = weight.detach().clone(), {"left_out": 1.0}
    for batch in clip_batches(40):
        if "left_out" not in terms:
            break
        assert torch.equal(weight, before)
        terms = step([batch])
    assert 1 < training.step < 40 and training.loss_scale.value < 2.0**24
    assert not torch.equal(weight, before) and terms["grad_norm"] > 0
    assert training.samples == 2 * training.step


def test_float16_has_the_adaptive_weight_of_float32():
    """Where its gradients overflow without the scale: a large reconstruction loss. Steps are left
    out until it is small enough, then the weight is no largest one."""
    options = ["loss.perceptual_weight=0", "loss.discriminator_start=0", "loss.learn_logvar=false",
               "loss.logvar=-9", "loss.generator_cross_entropy=false"]  # fmt: skip
    weights, left_out, samples = [], 0, 0
    for precision in ("float16", "float32"):
        training = build_training(tiny(*options, f"run.precision={precision}"), torch.device("cpu"))
        with torch.no_grad():
            training.task.discriminator.main[-1].weight *= 1e3
        training.samples = samples  # its noise
        step, batch = Stepper(training), clip_batches(1)
        while "left_out" in (terms := step(batch)):
            assert "d_weight" not in terms or terms["d_weight"] < 2000
            left_out, samples = left_out + 1, training.samples
        weights.append(terms["d_weight"])
    assert 3 < left_out < 12 and weights[0] == pytest.approx(weights[1], rel=0.1)
    assert weights[1] < 0.2 * 1e4


@pytest.mark.parametrize("change", [recompute_activations, "compile"])
def test_recomputed_and_compiled_blocks_compute_the_same(change):
    found = []
    for changed in (False, True):
        training = build_training(tiny(*PLAIN), torch.device("cpu"))
        if changed and change == "compile":
            count = compile_blocks(training.task.model, backend="eager")
        elif changed:
            count = change(training.task.model)
        torch.manual_seed(1)
        found.append(Stepper(training)(clip_batches(1)))
    assert count == sum(isinstance(m, BLOCKS) for m in training.task.model.modules()) > 5
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_switch_compiles_every_block_of_every_network():
    training = build_training(tiny(*PLAIN, "run.compile=true"), torch.device("cpu"))
    found = blocks(training.task.model)
    assert len(found) > 5 and all(block._compiled_call_impl is not None for block in found)


def test_recomputing_keeps_less():
    kept = []
    for recompute in (False, True):
        training = build_training(
            tiny(*PLAIN, f"run.checkpoint_activations={str(recompute).lower()}"),
            torch.device("cpu"),
        )
        sizes = []
        training.task.train_mode()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            training.task.model(torch.zeros(1, 3, 5, 16, 16))
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_sigterm_saves_and_ends(tmp_path):
    def terminate(progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    result = train(tiny(), tmp_path, on_step=terminate)
    assert (result.step, result.stopped_by, result.model) == (3, "SIGTERM", None)
    assert result.checkpoint.name == "step-00000003"
    assert signal.getsignal(signal.SIGTERM) is handler
    assert train(tiny(), tmp_path, resume="auto").resumed_from == 3


def test_sigterm_in_the_last_step_is_not_forgotten(tmp_path):
    """The run is complete; a stage after it must not begin."""

    def terminate(progress):
        if progress.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(tiny("run.steps=6"), tmp_path, on_step=terminate)
    assert (result.step, result.stopped_by, result.stop_wished) == (6, None, True)
    assert result.model is not None
    assert not train(tiny("run.steps=7"), tmp_path, resume="auto", warn=print).stop_wished


def test_one_process_at_a_time_writes_to_a_folder(tmp_path):
    hold = """if True:
        import fcntl, sys
        file = open(sys.argv[1], "w")
        fcntl.lockf(file, fcntl.LOCK_EX)
        print("held", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", hold, str(tmp_path / ".lock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"no other process trains in now, got {tmp_path}"):
            train(tiny("run.steps=1"), tmp_path)  # before it looks at checkpoints
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        other.stdin.close()
    assert train(tiny("run.steps=1"), tmp_path).step == 1


def test_a_warm_up_without_an_end_is_told(tmp_path):
    said = []
    train(tiny("run.steps=1", "optimizer.warmup=1"), tmp_path, warn=said.append)
    assert any("warmup is 1 and run.steps 1: the learning rate never" in line for line in said)


def test_samples_that_are_not_finite_do_not_end_a_run(tmp_path, monkeypatch):
    def fails(task, clips):
        raise FailedComputationError("decode: the model must give finite frames")

    monkeypatch.setattr(TokenizerTask, "pictures", fails)
    said = []
    result = train(tiny("run.steps=2", "run.sample_every=1"), tmp_path, warn=said.append)
    assert result.step == 2
    assert sum("no samples after step" in line and "finite frames" in line for line in said) == 2


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        train(tiny("model.name=null", "model.overrides={}", "model.weights=none"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_validation_that_is_not_finite_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "validate", lambda training, clips: {"rec_loss": float("nan")})
    said = []
    train(tiny("run.steps=1"), tmp_path, warn=said.append)
    assert "rec_loss of the held-out clips is nan after step 1; training goes on" in said
    assert log_of(tmp_path, "validation")[-1]["rec_loss"] is None


def test_sigterm_may_come_twice_and_to_the_workers_that_read_clips(tmp_path):
    """As from systemd and then from torchrun's agent, each to the whole group of processes."""
    killed = []

    def terminate(progress):
        if progress.step == 3:
            workers = multiprocessing.active_children()
            assert len(workers) == 1
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(workers[0].pid, number)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        if progress.step > 3:
            killed.append(progress.step)

    before = signal.signal(signal.SIGTERM, lambda *_: killed.append("SIGTERM"))
    try:
        result = train(tiny("data.num_workers=1", "run.steps=40"), tmp_path, on_step=terminate)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (result.step, result.stopped_by, killed) == (3, "SIGTERM", [])
    assert result.checkpoint.name == "step-00000003"
    assert not multiprocessing.active_children()  # what ignores signals must still end


def test_the_second_ctrl_c_is_not_held_back():
    # A shell lets its background processes ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), stop_requests() as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert request.signal_name == "SIGINT"
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.signal_name == "SIGINT"
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


class Overflow(torch.nn.Module):
    """Divides by zero in training after its first few calls."""

    def __init__(self, layer, first):
        super().__init__()
        self.layer, self.first, self.calls = layer, first, 0

    def forward(self, x):
        self.calls += self.training
        return self.layer(x) / float(self.calls <= self.first or not self.training)


RESTARTING = [*PLAIN, "model.overrides.regularizer=vq", "model.overrides.codebook_size=64",
              "model.overrides.restart_dead=true"]  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_restarts_of_a_codebook_belong_to_their_step(precision):
    """One that is not finite and one that overflows undo them; the next one has them."""
    recipe = tiny(*RESTARTING, f"run.precision={precision}")
    training = build_training(recipe, torch.device("cpu"))
    step, quantizer = Stepper(training), training.task.model.quantizer
    quantizer.dead_count = 2.0  # hardly a vector is chosen by so many in the first steps
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    block = training.task.model.decoder.mid.block_1
    if precision == "float32":
        norm, block.norm2 = block.norm2, Overflow(block.norm2, 0)
        with pytest.raises(NonFiniteStep, match="block_1.norm2"):
            step(clip_batches(1))
        block.norm2 = norm
    else:
        training.loss_scale.value = 2.0**24
        assert "left_out" in step(clip_batches(1))
        training.loss_scale.value = 1.0
    assert all(torch.equal(value, before[n]) for n, value in quantizer.state_dict().items())
    assert "left_out" not in step(clip_batches(1))
    # Vectors in +-1 / 64 that Adam moves by 1e-3 at most.
    moved = (quantizer.codebook - before["codebook"]).abs().amax(1)
    assert (moved > 0.05).sum() > 32


def test_restarts_are_refused_where_fsdp_would_lose_them():
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="run.parallel must be ddp for a VQ with restart_dead"):
        build_training(tiny(*RESTARTING, "run.parallel=fsdp"), device)
    for allowed in ("model.overrides.codebook=ema", "model.overrides.restart_dead=false"):
        build_training(tiny(*RESTARTING, "run.parallel=fsdp", allowed), device)


def test_a_batch_without_a_finite_loss_is_not_learned_from(tmp_path, monkeypatch):
    """Weights are as after step 3 and saved; the layer is named."""

    build = loop.build_training

    def with_fault(recipe, device):
        training = build(recipe, device)
        training.task.model.decoder.mid.block_1.norm2 = Overflow(
            training.task.model.decoder.mid.block_1.norm2, 3
        )
        return training

    monkeypatch.setattr(loop, "build_training", with_fault)
    message = r"step 4 must be finite, .* in layer decoder\.mid\.block_1\.norm2.*step-00000003"
    with pytest.raises(NonFiniteLossError, match=message):
        train(tiny(), tmp_path)
    found = latest_checkpoint(tmp_path / "checkpoints", pytest.fail)
    assert found.step == 3 and log_of(tmp_path)[-1]["step"] == 3
    assert read_log(tmp_path / "log.jsonl")[-1]["kind"] == "non_finite"


def test_exploded_weights_are_not_saved(tmp_path):
    """Held-out clips have no finite loss either: the checkpoint before is the good one."""
    with pytest.raises(NonFiniteLossError, match="the last good state is none"):
        train(
            tiny(*PLAIN, "optimizer.lr=1e30", "optimizer.warmup=0", "run.checkpoint_every=9"),
            tmp_path,
        )
    assert not (tmp_path / "checkpoints").exists()


def test_first_bad_layer():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    assert first_bad_layer({"": network}, lambda: network(torch.ones(1, 2))) is None
    with torch.no_grad():
        network[0].weight.fill_(float("inf"))
    assert first_bad_layer({"net": network}, lambda: network(torch.ones(1, 2))) == "net.0"


def test_gradients_are_clipped_together():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert float(clip_gradients([a, b], 10.0)) == 5 and float(a.grad) == 3
    assert float(clip_gradients([a, b], 1.0)) == 5
    assert float(b.grad) == pytest.approx(0.8)
    a.grad = torch.tensor([float("inf")])
    clip_gradients([a, b], 1.0)
    assert float(b.grad) == pytest.approx(0.8)


def test_a_log_goes_on_where_the_checkpoint_is(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, 0)
    for step in range(1, 5):
        log.write("train", step, loss=0.1 * step)
    with path.open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    assert [line["step"] for line in read_log(path)] == [1, 2, 3, 4]
    RunLog(path, 2).write("train", 3, loss=5.0)
    assert [line["loss"] for line in read_log(path)] == [0.1, 0.2, 5.0]
    log.write("validation", 4, psnr=float("nan"))
    assert read_log(path)[-1] == {"kind": "validation", "step": 4, "psnr": None}
    path.write_bytes(b"\0" * 40 + b"\n" + path.read_bytes())  # a power failure leaves such blocks
    said = []
    RunLog(path, 3, warn=said.append)
    assert [line["step"] for line in read_log(path, pytest.fail)] == [1, 2, 3]
    assert said == [f"1 of 5 lines of {path} are damaged"]
    RunLog(tmp_path / "none.jsonl", 0, active=False).write("train", 1)
    assert not (tmp_path / "none.jsonl").exists()
