"""Training loops of a user's own: autograd modes, changes between forward and backward, hooks."""

import copy
import threading

import pytest
import torch
from tiny import draw_adapter, make_tiny_model

from minitune import FastLanguageModel
from minitune.training.optimizer import FlatAdamW

IDS = torch.tensor([[1, 5, 9, 20, 33, 7], [2, 8, 8, 40, 3, 11]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a tiny model."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(folder):
    """Return a model in NF4 with an adapter whose B is not zero."""
    return new_model(folder)


def new_model(folder, **options):
    model, _ = FastLanguageModel.from_pretrained(folder, device="cpu", **options)
    model = FastLanguageModel.get_peft_model(model, r=4)
    draw_adapter(model, 0.05)
    return model


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss


def gradients(model, loss=None):
    """Return the gradients of a loss, and clear them."""
    (loss_of(model) if loss is None else loss).backward()
    found = {name: p.grad.clone() for name, p in model.trainable_parameters()}
    model.zero_grad()
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- modes


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_losses_and_answers_without_gradients_leave_later_gradients_as_they_were(folder, mode):
    expected = gradients(new_model(folder))
    with mode():
        model = new_model(folder)
        loss_of(model)
        model.generate([[1, 5, 9]], max_new_tokens=3)
        model(input_ids=IDS)
    assert_same(gradients(model), expected)


def test_an_optimizer_made_in_inference_mode_trains_outside_of_it(model):
    with torch.inference_mode():
        optimizer = FlatAdamW([p for _, p in model.trainable_parameters()])
    loss_of(model).backward()
    assert optimizer.step(1e-3) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("from_logits", [False, True])
def test_backward_in_autocast_gives_the_gradients_of_one_outside(model, dtype, from_logits):
    def loss():
        return model(input_ids=IDS).logits.square().mean() if from_logits else loss_of(model)

    expected = gradients(model, loss())
    with torch.autocast("cpu", dtype=dtype):
        loss().backward()
    found = {name: p.grad for name, p in model.trainable_parameters()}
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_in_autocast_rounds_as_one_outside(model, tmp_path, dtype):
    model.save_pretrained_merged(tmp_path / "plain")
    with torch.autocast("cpu", dtype=dtype):
        model.save_pretrained_merged(tmp_path / "autocast")
    plain, autocast = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "autocast")
    )
    assert plain == autocast


@pytest.mark.parametrize("save_on_cpu", [False, True])
def test_backward_in_another_thread_gives_the_same_gradients(model, save_on_cpu):
    expected = gradients(model)
    if save_on_cpu:
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(model)
    else:
        loss = loss_of(model)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_same({name: p.grad for name, p in model.trainable_parameters()}, expected)


def test_the_gradients_of_a_deep_copy_are_its_own(model):
    expected, twin = gradients(model), copy.deepcopy(model)
    assert_same(gradients(twin), expected)
    with torch.no_grad():
        for _, p in twin.trainable_parameters():
            p.mul_(2)
    assert not torch.equal(*(gradients(m)[next(iter(expected))] for m in (model, twin)))
    assert_same(gradients(model), expected)


# ---- changes between forward and backward


def lora_b_changes(model):
    with torch.no_grad():
        model.trainable_parameters()[-1][1].add_(1)


def lora_a_changes(model):
    with torch.no_grad():
        model.trainable_parameters()[0][1].zero_()


def torch_optimizer_steps(model):
    parameters = [p.detach() for _, p in model.trainable_parameters()]
    torch._foreach_mul_(parameters, 0.9)  # as torch.optim does


def own_optimizer_steps(model):
    optimizer = FlatAdamW([p for _, p in model.trainable_parameters()], weight_decay=0.1)
    optimizer.step(1e-2)


def norm_changes(model):
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(2)


def quantised_weight_changes(model):
    model.model.layers[1].mlp.up_proj.quantized.absmax.add_(1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lora_b_changes, "mlp.down_proj.lora_B.weight"),
        (lora_a_changes, "self_attn.q_proj.lora_A.weight"),
        (torch_optimizer_steps, "lora_"),
        (own_optimizer_steps, "lora_"),
        (norm_changes, "input_layernorm.weight"),
        (quantised_weight_changes, "a quantised weight"),
    ],
)
def test_a_change_between_forward_and_backward_is_a_runtime_error_as_in_torch(model, change, named):
    loss = loss_of(model)
    change(model)
    with pytest.raises(RuntimeError, match=rf"{named}.* was modified by an in-place operation"):
        loss.backward()
    model.zero_grad()
    gradients(model)  # a new loss has gradients again


def test_torch_refuses_the_same_change_of_its_own_linear():
    linear = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    loss = linear(torch.ones(3)).sum()
    with torch.no_grad():
        linear[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_or_no_adapter_at_backward_is_refused(model, folder, tmp_path):
    model.save_pretrained(tmp_path / "same")
    other, _ = FastLanguageModel.from_pretrained(folder, device="cpu")
    FastLanguageModel.get_peft_model(other, r=8).save_pretrained(tmp_path / "other")
    loss = loss_of(model)
    with model.disable_adapter(), pytest.raises(RuntimeError, match="switched off between"):
        loss.backward()
    loss = loss_of(model)
    model.load_adapter(tmp_path / "same")  # in place
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        loss.backward()
    loss = loss_of(model)
    model.load_adapter(tmp_path / "other")
    with pytest.raises(RuntimeError, match="replaced, removed or switched off between"):
        loss.backward()


def test_a_head_that_changes_before_the_backward_of_logits_is_refused(folder):
    model = new_model(folder, load_in_4bit=False, dtype=torch.bfloat16)
    logits = model(input_ids=IDS).logits
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)  # tied: also the head
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        logits.sum().backward()


def test_a_second_backward_is_refused_or_gives_the_same_gradients_with_retain_graph(model):
    expected = gradients(model)
    loss = loss_of(model)
    for _ in range(2):
        loss.backward(retain_graph=True)
        assert_same({name: p.grad for name, p in model.trainable_parameters()}, expected)
        model.zero_grad()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_gradient_is_not_differentiated_again(model):
    p = model.trainable_parameters()[0][1]
    (gradient,) = torch.autograd.grad(loss_of(model), p, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


# ---- modules that no pass calls


def test_a_part_of_a_model_is_neither_cast_nor_moved(model):
    layer = model.model.layers[0]
    parts = (model, model.model, layer, layer.mlp, layer.mlp.up_proj, layer.input_layernorm)
    for part in (*parts, layer.self_attn, layer.self_attn.q_proj.lora_A, model.lm_head):
        for cast in (part.half, part.double, lambda part=part: part.to(torch.bfloat16)):
            with pytest.raises(ValueError, match="stays on its device and in its dtype"):
                cast()
    assert {p.dtype for _, p in model.trainable_parameters()} == {torch.float32}


def test_a_hook_that_would_never_run_is_refused(model):
    layer = model.model.layers[0]
    for module in (layer.mlp.up_proj, layer.self_attn, layer.input_layernorm, model.lm_head):
        for register in ("forward_pre", "forward", "full_backward", "full_backward_pre"):
            with pytest.raises(ValueError, match="would never run"):
                getattr(module, f"register_{register}_hook")(print)


def test_hooks_of_layers_the_model_and_parameters_run_in_a_loop_of_ones_own(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    model.model.layers[1].register_forward_hook(lambda *_: calls.append("layer"))
    model.model.layers[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    model.trainable_parameters()[0][1].register_hook(lambda gradient: calls.append("parameter"))
    gradients(model)
    assert calls == ["layer", "model", "backward", "parameter"]


# ---- PyTorch's defaults


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_is_refused_by_name(model, folder, dtype):
    try:
        torch.set_default_dtype(dtype)
        for call in (
            lambda: loss_of(model),
            lambda: model.generate([[1, 5]], max_new_tokens=1),
            lambda: FastLanguageModel.from_pretrained(folder, device="cpu"),
        ):
            with pytest.raises(ValueError, match=f"default dtype is {dtype}"):
                call()
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_default_device_is_refused_by_name(model, folder):
    for call in (
        lambda: loss_of(model),
        lambda: model.generate([[1, 5]], max_new_tokens=1),
        lambda: FastLanguageModel.from_pretrained(folder, device="cpu"),
    ):
        with torch.device("meta"), pytest.raises(ValueError, match="default device is meta"):
            call()
