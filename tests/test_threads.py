"""One model in several threads: each thread gets the numbers that it gets alone."""

import contextlib
import copy
import pickle
import threading
from functools import partial

import pytest
import torch
from tiny import draw_adapter, make_tiny_model

from minitune import FastLanguageModel
from minitune.data.batching import collate
from minitune.data.samples import Sample
from minitune.training.micro_step import MicroStep

REPEATS = 4


@pytest.fixture
def model(tmp_path):
    folder = make_tiny_model(tmp_path / "m", layers=3)
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=64, device="cpu")
    FastLanguageModel.get_peft_model(model, r=4)
    draw_adapter(model, b=0.1)
    return model


def random_ids(seed):
    return torch.randint(3, 400, (2, 20), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    parameters = [p for _, p in model.trainable_parameters()]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def evaluated_loss(model, ids):
    with torch.no_grad():
        return [model(input_ids=ids, labels=ids).loss]


def micro_step_result(model, micro_step, ids):
    for _, p in model.trainable_parameters():
        p.grad = None
    loss = micro_step(collate([Sample(sample, sample) for sample in ids.tolist()]), 50)
    return [loss, *(p.grad for _, p in model.trainable_parameters())]


def generated(model, ids):
    return [*model.generate(ids[:, :5], max_new_tokens=4)]


def wrong_results(calls):
    """Run every call REPEATS times in a thread of its own; count the results unlike those alone."""
    expected = [call() for call in calls]
    wrong, failures = [], []

    def work(call, wanted):
        try:
            for _ in range(REPEATS):
                if not all(map(torch.equal, call(), wanted)):
                    wrong.append(call)
        except Exception as error:
            failures.append(error)

    pairs = zip(calls, expected, strict=True)
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    return len(wrong)


def test_losses_and_gradients_from_four_threads_are_those_of_one_thread(model):
    calls = [partial(loss_and_gradients, model, random_ids(seed)) for seed in range(4)]
    assert wrong_results(calls) == 0


def test_training_evaluating_and_generating_at_once_change_no_number(model):
    micro_step = MicroStep(model, capture=False)
    calls = [
        partial(micro_step_result, model, micro_step, random_ids(0)),
        partial(evaluated_loss, model, random_ids(1)),
        partial(generated, model, random_ids(2)),
        partial(generated, model, random_ids(3)),
    ]
    assert wrong_results(calls) == 0


def test_without_the_lock_threads_overwrite_each_others_weights(model):
    """Guards the two tests above: they need calls that collide."""
    model.layer_context.weight_buffers.lock = contextlib.nullcontext()
    calls = [partial(loss_and_gradients, model, random_ids(seed)) for seed in range(4)]
    assert wrong_results(calls) > 0


def test_copied_and_pickled_models_have_buffers_and_a_lock_of_their_own(model):
    ids = random_ids(0)
    expected = loss_and_gradients(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        buffers = other.layer_context.weight_buffers
        assert len(buffers) == 0
        assert buffers.lock is not model.layer_context.weight_buffers.lock
        assert all(map(torch.equal, loss_and_gradients(other, ids), expected))
