"""Checkpoints: every damage is found, the last good one is never lost, and what comes back is what was saved."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llamahome.config import Config
from llamahome.errors import CheckpointError
from llamahome.training.checkpoint import (
    TrainingState,
    checkpoints,
    fault_of,
    load_state,
    model_folder,
    newest_good,
    pack_optimizer,
    pack_rng,
    restore,
    retain,
    run_of,
    save_checkpoint,
    set_aside_after,
    unpack_optimizer,
    unpack_rng,
)
from llamahome.training.optim import OPTIMIZERS, build_optimizer, build_scheduler, decay_groups

STATE = TrainingState(step=4, total_steps=9, samples_per_step=3, seed=5, best_value=1.25, plan={"token_budget": 64})


class Plain(nn.Module):
    """The smallest model that can be saved."""

    def __init__(self, value=0.0):
        super().__init__()
        self.matrix = nn.Parameter(torch.full((3, 5), value))
        self.vector = nn.Parameter(torch.full((5,), value))

    def save_pretrained(self, folder):
        save_file({name: p.detach() for name, p in self.named_parameters()}, folder / "model.safetensors")


class Words:
    is_fast = False

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def trained(name="adamw", steps=3, model=None):
    """A model and its optimizer (`adamw`, `sgd` or `adafactor`) after some steps with gradients of their own."""
    model = model or Plain()
    optimizer = OPTIMIZERS[name](decay_groups(model, 0.1), Config().optimization)
    advance(model, optimizer, range(steps))
    return model, optimizer


def advance(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def schedule(optimizer):
    return build_scheduler(optimizer, Config().optimization, 9)


def save(run, step=4):
    model, optimizer = trained()
    state = TrainingState(step=step, seed=5)
    return save_checkpoint(run, state, model, Words(), optimizer, schedule(optimizer))


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "run")


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def to_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "gone": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "first bit": lambda path: flip(path, 0),
    "middle bit": lambda path: flip(path, path.stat().st_size // 2),
    "last bit": lambda path: flip(path, -1),
    "a folder": to_folder,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damage_of_every_file_is_found(saved, tmp_path, kind, record_property):
    assert fault_of(saved) is None
    names = [path.name for path in saved.iterdir() if path.name != "manifest.json"]
    assert len(names) == 5
    for name in names:
        copy = Path(shutil.copytree(saved, tmp_path / name / saved.name))
        DAMAGE[kind](copy / name)
        fault = fault_of(copy)
        assert fault is not None
        assert fault.startswith(name)
        with pytest.raises(CheckpointError, match=f"no usable checkpoint: checkpoint-4: {name}"):
            newest_good(copy)
    record_property("corruptions", len(names))


def files_of(manifest, **change):
    manifest["files"] |= change


def names_outside(name):
    return lambda manifest: files_of(manifest, **{name: {"bytes": 1, "sha256": ""}})


MANIFESTS = {
    "of another format": (lambda m: m.update(format=2), "format 2 is not 1"),
    "of another step": (lambda m: m.update(step=3), "it is of step 3"),
    "that leads up": (names_outside("../x"), "../x leaves the folder"),
    "that is absolute": (names_outside("/etc/passwd"), "/etc/passwd leaves the folder"),
    "with a NUL": (names_outside("a\0b"), "manifest.json cannot be read"),
    "without the state": (lambda m: m["files"].pop("training_state.json"), "does not list training_state.json"),
    "without the optimizer": (lambda m: m["files"].pop("optimizer.safetensors"), "does not list optimizer.safetensors"),
    "without sizes": (lambda m: files_of(m, **{"rng.safetensors": {}}), "manifest.json cannot be read"),
    "with a list": (lambda m: m.update(files=[]), "does not list optimizer.safetensors"),
    "without files": (lambda m: m.pop("files"), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest(saved, kind):
    change, fault = MANIFESTS[kind]
    manifest = json.loads((saved / "manifest.json").read_text())
    change(manifest)
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert fault in fault_of(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"7", b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_none(saved, content):
    (saved / "manifest.json").write_bytes(content)
    assert fault_of(saved).startswith("manifest.json cannot be read: ")


def test_a_file_that_is_a_link_out_of_the_folder(saved, tmp_path):
    (saved / "rng.safetensors").rename(tmp_path / "elsewhere")
    (saved / "rng.safetensors").symlink_to(tmp_path / "elsewhere")
    assert fault_of(saved) == "rng.safetensors leaves the folder"


@pytest.fixture
def run(tmp_path):
    """A run's folder with the checkpoints 2, 4, 6, 8 and things that are none."""
    folder = tmp_path / "run"
    for step in (2, 4, 6, 8):
        save(folder, step)
    (folder / "checkpoint-99").write_text("a file")
    (folder / "checkpoint-5-copy").mkdir()
    (folder / "best").mkdir()
    (folder / "run.json").write_text("{}")
    return folder


def steps(folder):
    return [int(path.name.removeprefix("checkpoint-")) for path in checkpoints(folder)]


def test_the_newest_good_one_is_found(run, caplog, monkeypatch):
    assert steps(run) == [2, 4, 6, 8]
    assert newest_good(run) == run / "checkpoint-8"
    assert newest_good(run / "checkpoint-4") == run / "checkpoint-4"
    monkeypatch.chdir(run / "checkpoint-6")
    assert newest_good(Path()) == run / "checkpoint-6"
    assert run_of(Path()) == run
    (run.parent / "link").symlink_to(run / "checkpoint-2")
    assert newest_good(run.parent / "link") == run / "checkpoint-2"
    flip(run / "checkpoint-8" / "model.safetensors", -1)
    (run / "checkpoint-6" / "manifest.json").unlink()
    assert newest_good(run) == newest_good(run / "checkpoint-6") == run / "checkpoint-4"
    assert "checkpoint-8 is not usable (model.safetensors is damaged (SHA-256 differs))" in caplog.text
    assert "checkpoint-6 is not usable (manifest.json is missing)" in caplog.text


def test_retention_keeps_the_newest_good_ones(run):
    (run / "checkpoint-8" / "rng.safetensors").unlink()
    retain(run, 2)
    assert steps(run) == [4, 6, 8]
    retain(run, 1)
    assert steps(run) == [6, 8]
    retain(run, 1)
    assert steps(run) == [6, 8]
    assert {"checkpoint-99", "checkpoint-5-copy", "best", "run.json"} <= {path.name for path in run.iterdir()}


def test_a_checkpoint_that_cannot_be_deleted_is_no_end(run, caplog, monkeypatch):
    def refuse(path, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", refuse)
    retain(run, 1)
    assert steps(run) == [2, 4, 6, 8]
    assert caplog.text.count("cannot delete the old ") == 3


def test_going_on_from_an_older_one_sets_the_later_ones_aside(run):
    set_aside_after(run / "checkpoint-4")
    assert steps(run) == [2, 4]
    save(run, 5)
    retain(run, 1)
    assert newest_good(run) == run / "checkpoint-5"
    save(run, 8)
    set_aside_after(run / "checkpoint-5")
    aside = {path.name: fault_of(path) for path in run.glob("*.superseded")}
    assert aside == {"checkpoint-6.superseded": None, "checkpoint-8.superseded": None}


def test_where_the_model_of_a_run_is(run, tmp_path):
    assert model_folder(run) == run / "checkpoint-8"
    (run / "final").mkdir()
    assert model_folder(run) == run / "final"
    assert model_folder(run / "best") == run / "best"
    assert model_folder(tmp_path / "none") == tmp_path / "none"


def test_what_is_no_run(tmp_path, saved):
    for path, fault in ((tmp_path / "none", "no such folder"), (tmp_path, "it holds no checkpoint-N folder")):
        with pytest.raises(CheckpointError, match=fault):
            run_of(path)
    copy = saved.rename(tmp_path / "my copy")
    assert newest_good(copy) == copy
    assert run_of(copy) == tmp_path


STRANGER = b'{"optimizer": {}, "scheduler": {}, "scaler": {}, "rng": {}, "stranger": 1}'


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", STRANGER])
def test_a_state_that_cannot_be_read(saved, content):
    (saved / "training_state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read: ") as raised:
        load_state(saved)
    assert raised.value.where.endswith("checkpoint-4/training_state.json")


def test_the_state_comes_back(tmp_path):
    model, optimizer = trained()
    folder = save_checkpoint(tmp_path, STATE, model, Words(), optimizer, schedule(optimizer))
    assert folder == tmp_path / "checkpoint-4"
    assert load_state(folder)[0] == STATE


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_with_the_same_bits(name, tmp_path):
    model, optimizer = trained(name)
    tensors, plain = pack_optimizer(model, optimizer)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    other, fresh = trained(name, steps=0)
    other.load_state_dict(model.state_dict())
    unpack_optimizer(other, fresh, load_file(tmp_path / "optimizer.safetensors"), json.loads(json.dumps(plain)))
    for each, its in ((model, optimizer), (other, fresh)):
        advance(each, its, range(3, 6))
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    again, rest = pack_optimizer(other, fresh)
    assert all(torch.equal(again[key], value) for key, value in pack_optimizer(model, optimizer)[0].items())
    assert rest == pack_optimizer(model, optimizer)[1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_of_another_shape_or_parameter_is_refused(name):
    model, optimizer = trained(name)
    tensors, plain = pack_optimizer(model, optimizer)
    wrong = [(tensors | {"other|exp_avg": torch.zeros(5)}, plain), (tensors, plain | {"other|x": 1})]
    for key, value in tensors.items():
        shapes = [(5, 3), (3, 5, 1), (1, 1), (4,), (1, 5), (3, 1), (15,), ()] if value.dim() else [(1,), (3, 5)]
        wrong += [(tensors | {key: torch.zeros(s)}, plain) for s in shapes if s != tuple(value.shape)]
    for given in wrong:
        with pytest.raises(CheckpointError, match="does not fit this model"):
            unpack_optimizer(*trained(name, steps=0), *given)


class Own(torch.optim.SGD):
    """An optimizer of the user's own, with states of shapes that only it knows."""

    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"]):
            state = self.state[parameter]
            state["sketch"], state["note"] = torch.ones(7) + state.get("sketch", torch.zeros(7)), "kept"


def test_the_states_of_an_own_optimizer_come_back():
    model = Plain()
    optimizer = Own(model.parameters(), lr=1.0)
    advance(model, optimizer, range(2))
    fresh = Own(model.parameters(), lr=1.0)
    unpack_optimizer(model, fresh, *pack_optimizer(model, optimizer))
    assert all(fresh.state[p]["sketch"].eq(2).all() and fresh.state[p]["note"] == "kept" for p in model.parameters())


def test_another_optimizer_is_refused_by_name(make_model, tiny_tokenizer, tmp_path):
    model, settings = make_model(), Config().optimization
    optimizer = build_optimizer(model, settings)
    folder = save_checkpoint(tmp_path, STATE, model, tiny_tokenizer, optimizer, schedule(optimizer))
    other = build_optimizer(model, Config.load(None, {"optimization.optimizer": "sgd"}).optimization)
    with pytest.raises(CheckpointError, match="the optimizer's state is AdamW's, not SGD's"):
        restore(folder, load_state(folder)[1], model, other, schedule(other))


def test_a_whole_checkpoint_comes_back(make_model, tiny_tokenizer, tmp_path):
    model, settings = make_model(), Config().optimization
    optimizer = build_optimizer(model, settings)
    scheduler = schedule(optimizer)
    for step in range(4):
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        scheduler.step()
    folder = save_checkpoint(tmp_path, STATE, model, tiny_tokenizer, optimizer, scheduler)
    other = make_model(**{"training.seed": 77})
    fresh = build_optimizer(other, settings)
    following = schedule(fresh)
    restore(folder, load_state(folder)[1], other, fresh, following)
    assert following.get_last_lr() == scheduler.get_last_lr()
    assert [group["lr"] for group in fresh.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert following.last_epoch == 4
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    before, after = pack_optimizer(model, optimizer)[0], pack_optimizer(other, fresh)[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def draw():
    return torch.rand(3).tolist(), torch.randn(2).tolist(), np.random.rand(3).tolist(), random.gauss(), random.random()


def test_random_numbers_go_on_where_they_were(tmp_path):
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    draw()
    random.gauss()  # the second of a pair waits
    tensors, plain = pack_rng()
    save_file(tensors, tmp_path / "rng.safetensors")
    expected = draw()
    torch.manual_seed(4)
    np.random.seed(4)
    random.seed(4)
    unpack_rng(load_file(tmp_path / "rng.safetensors"), json.loads(json.dumps(plain)))
    assert draw() == expected
