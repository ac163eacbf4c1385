"""Two gloo processes on the CPU compute what one process computes on the same global batch."""

import pandas as pd
import pytest
import tiny_study
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gloria_core import objectives
from gloria_core.checkpoints.model import build_model
from gloria_core.data.dataset import make_loader
from gloria_core.training.distributed import GlobalBatch, all_gather_with_grad, gather_batch, launch, world_size
from gloria_core.training.pretrain import pretrain

EPOCH = 3


def still_model(objective):
    """No dropout, BatchNorm on its running statistics: those of a batch would differ from rank to rank."""
    return tiny_study.model(objective, dropout=0.0).eval()


def first_batch(rank, processes, objective="gloria"):
    needs = objectives.objective_class(objective).needs
    sentence = "all" if needs.sentence_ids else "random"  # sentences of one report contrast with each other
    train, _ = tiny_study.datasets(views=needs.views, texts=needs.texts, sentence=sentence)
    loader = make_loader(
        train,
        tiny_study.collate(),
        batch_size=8 // processes,
        shuffle=True,
        epoch=EPOCH,
        rank=rank,
        world_size=processes,
    )
    return next(iter(loader))


def one_step(folder, objective):
    """Loss and gradients of one rank, to a file."""
    dist.init_process_group("gloo")
    model = still_model(objective)
    parallel = DistributedDataParallel(GlobalBatch(model), find_unused_parameters=True)
    torch.manual_seed(1)  # an objective that draws noise draws the same on every rank
    total, terms = parallel(first_batch(dist.get_rank(), world_size(), objective))
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save([total.detach(), {k: v.detach() for k, v in terms.items()}, gradients], folder / f"{dist.get_rank()}.pt")


@pytest.mark.parametrize("objective", objectives.available())
def test_loss_and_gradients_equal_those_of_one_process(tmp_path, objective):
    lengths = {rank: first_batch(rank, 2, objective).text.input_ids.shape[1] for rank in range(2)}
    assert len(set(lengths.values())) == 2, "the ranks must have texts of different length, or padding goes untested"
    launch(one_step, (tmp_path, objective), num_processes=2)
    model = still_model(objective)
    torch.manual_seed(1)
    total, terms = GlobalBatch(model)(first_batch(0, 1, objective))
    total.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for rank in range(2):
        their_total, their_terms, gradients = torch.load(tmp_path / f"{rank}.pt")
        assert their_total.item() == pytest.approx(total.item(), rel=1e-5)
        assert {k: v.item() for k, v in their_terms.items()} == pytest.approx(
            {k: v.item() for k, v in terms.items()}, rel=1e-5
        )
        assert set(wanted) <= set(gradients)  # DDP fills the others with zeros
        whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
        alive = sum(float(gradient.norm() > 1e-8 * whole) for gradient in wanted.values())
        assert alive > 0.8 * len(wanted)  # zeros agree with anything
        for name, gradient in wanted.items():
            off = (gradients[name] - gradient).norm()
            assert off <= 1e-4 * gradient.norm() + 1e-9 * whole, name


def gathering(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    rows = torch.full((2, 3), float(rank + 1), requires_grad=True)
    everyone = all_gather_with_grad(rows)
    # rank 0 asks for once the sum, rank 1 for ten times: the owner receives both
    (everyone.sum() * (1 if rank == 0 else 10)).backward()
    flags = all_gather_with_grad(torch.tensor([rank == 0, True]))
    batch = first_batch(rank, 2)
    whole, bare = gather_batch(batch, pixels=True), gather_batch(batch, pixels=False)
    result = [everyone.detach(), rows.grad, flags, whole.pixels, whole.index, whole.text.word_ids, bare.pixels]
    torch.save(result, folder / f"{rank}.pt")


def test_what_is_gathered(tmp_path):
    launch(gathering, (tmp_path,), num_processes=2)
    alone = first_batch(0, 1)
    for rank in range(2):
        everyone, gradient, flags, pixels, index, word_ids, bare = torch.load(tmp_path / f"{rank}.pt")
        assert everyone[:, 0].tolist() == [1, 1, 2, 2]
        assert (gradient == 11).all()
        assert flags.tolist() == [True, True, False, True]
        assert torch.equal(pixels, alone.pixels) and torch.equal(index, alone.index)
        assert torch.equal(word_ids, alone.text.word_ids)
        assert bare.shape == alone.pixels.shape and bare.isnan().all()


def whole_run(folder, processes):
    train, valid = tiny_study.datasets()
    still = tiny_study.model("gloria", dropout=0.0).config
    model = build_model(type(still)(**{**still.to_dict(), "frozen_image": True}), tiny_study.TOKENIZER)
    config = tiny_study.config(epochs=2, learning_rate=1e-4, checkpoint_steps=2)
    pretrain(model, train, valid, config, folder=folder / str(processes), show=False, device="cpu")


def test_pretraining_with_two_processes_follows_that_with_one(tmp_path):
    launch(whole_run, (tmp_path, 2), num_processes=2)
    launch(whole_run, (tmp_path, 1), num_processes=1)
    two, one = (
        pd.read_csv(tmp_path / str(n) / "history.csv").drop(columns=["images_per_second", "seconds"]) for n in (2, 1)
    )
    pd.testing.assert_frame_equal(two, one, rtol=2e-3)
    assert two["train_total"][1] != two["train_total"][0]


def failing():
    raise RuntimeError("this rank gave up")


def test_a_failing_process_is_not_silent():
    with pytest.raises(Exception, match="this rank gave up"):
        launch(failing, num_processes=2)


def test_one_process_gathers_nothing_and_bad_counts_are_refused(monkeypatch):
    rows = torch.ones(2, 2)
    assert world_size() == 1 and all_gather_with_grad(rows) is rows
    with pytest.raises(ValueError, match="at least 1"):
        launch(failing, num_processes=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="there are 2 GPUs"):
        launch(failing, num_processes=3)


def test_global_batch_is_the_model_when_alone():
    model, batch = still_model("gloria"), first_batch(0, 1)
    total, terms = GlobalBatch(model)(batch)
    assert isinstance(model, nn.Module) and total.item() == model(batch).total.item()
    assert set(terms) == set(model(batch).terms)
