"""float16 in a training loop of a user's own, and the settings of cuBLAS during our passes."""

import threading

import pytest
import torch
from tiny import draw_adapter, make_tiny_model
from tiny_families import make_tiny_family
from training_runs import new_trainer

from minitune import FastLanguageModel
from minitune.data.batching import collate
from minitune.data.samples import Sample
from minitune.model.linear import FusedLinear
from minitune.model.precision import LAYER_PEAK, layer_scale, own_precision
from minitune.training.loss_scale import LossScale, run_micro_steps
from minitune.training.micro_step import MicroStep
from minitune.training.optimizer import FlatAdamW

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 5, 9, 20, 33, 7], [2, 8, 8, 40, 3, 11]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
SETTINGS = ("allow_fp16_accumulation", "allow_fp16_reduced_precision_reduction")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a tiny model."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def new_model(folder, dtype):
    model, _ = FastLanguageModel.from_pretrained(
        folder, device="cpu", dtype=dtype, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    draw_adapter(model, 0.05)
    return model


def loop_gradients(model, scale=1.0, divisor=None):
    """Return the gradients of a scaled loss, divided by the scale: (P,)."""
    model.zero_grad()
    (model(IDS, labels=IDS, num_items_in_batch=divisor).loss * scale).backward()
    return torch.cat([p.grad.flatten() / scale for _, p in model.trainable_parameters()])


# ---- a user's own loop


def test_a_loop_in_float16_has_the_gradients_of_float32_whatever_scales_its_loss(folder):
    # A mean over two million tokens would underflow without a scale.
    divisor = 2_000_000
    expected = loop_gradients(new_model(folder, "float32"), divisor=divisor)
    model = new_model(folder, "float16")
    found = loop_gradients(model, divisor=divisor)
    assert (found - expected).norm() <= 5e-3 * expected.norm()
    for scale in (2.0**-20, 2.0**16, 2.0**40):  # torch.amp.GradScaler begins with 2^16
        assert torch.equal(loop_gradients(model, scale, divisor), found)
    as_tensor = loop_gradients(model, divisor=torch.tensor(divisor))
    assert torch.equal(as_tensor, found)


def gradients_through_logits(model, loss_of_logits, scale=1.0):
    """Return the gradients of a scaled loss of the logits, divided by the scale: (P,)."""
    model.zero_grad()
    logits = model(IDS, attention_mask=MASK).logits
    (loss_of_logits(logits[MASK.bool()].float()) * scale).backward()
    return torch.cat([p.grad.flatten() / scale for _, p in model.trainable_parameters()])


@pytest.mark.parametrize("case", ["granite", "gemma2"])
@pytest.mark.parametrize("kind", ["cross entropy", "squares"])
def test_a_loss_of_the_logits_in_float16_has_the_gradients_of_float32(tmp_path, case, kind):
    def loss_of_logits(logits):
        if kind == "squares":
            return (logits - 0.1).square().sum() / 2**17
        labels = IDS[MASK.bool()]
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / 2**17

    folder = make_tiny_family(tmp_path / "model", case)
    models = {dtype: new_model(folder, dtype) for dtype in ("float32", "bfloat16", "float16")}
    expected, in_bfloat16, found = (
        gradients_through_logits(model, loss_of_logits) for model in models.values()
    )
    assert (found - expected).norm() < (in_bfloat16 - expected).norm() / 4
    assert (in_bfloat16 - expected).norm() < 0.1 * expected.norm()
    model = models["float16"]
    assert model(IDS).logits.dtype == torch.float32
    for scale in (2.0**-30, 2.0**33):
        assert torch.equal(gradients_through_logits(model, loss_of_logits, scale), found)


def test_a_loop_with_a_grad_scaler_trains_and_skips_a_loss_that_is_not_finite(folder):
    model = new_model(folder, "float16")
    parameters = [p for _, p in model.trainable_parameters()]
    optimizer, scaler = torch.optim.AdamW(parameters, lr=1e-2), torch.amp.GradScaler("cpu")
    losses = []
    for step in range(6):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        before = parameters[0].detach().clone()
        scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, parameters[0]) == (step == 2)
    assert losses[-1] < losses[0]


def test_the_optimizer_of_the_package_trains_a_loop_in_float16_without_a_scaler(folder):
    model = new_model(folder, "float16")
    optimizer = FlatAdamW([p for _, p in model.trainable_parameters()])
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step(1e-2)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_the_scale_of_a_layer_is_the_power_of_two_that_suits_the_largest_element():
    generator = torch.Generator().manual_seed(0)
    for exponent in range(-80, 81, 5):
        dy = torch.randn(3, 5, generator=generator) * 2.0**exponent
        scale = layer_scale(dy)
        assert torch.frexp(scale).mantissa == 0.5
        assert LAYER_PEAK / 2 <= (dy * scale).abs().max() <= LAYER_PEAK
    assert layer_scale(torch.zeros(2, 3)).isfinite()
    for wrong in (float("inf"), float("nan")):
        assert layer_scale(torch.tensor([[1.0, wrong]])).isnan()


@pytest.mark.parametrize("case", ["granite", "gemma2"])
def test_gradients_of_a_family_in_float16_are_closer_to_float32_than_those_in_bfloat16(
    case, tmp_path
):
    folder = make_tiny_family(tmp_path / "model", case)
    batch = collate([Sample(ids, ids) for ids in IDS.tolist()])
    distances = {}
    for dtype in ("float32", "bfloat16", "float16"):
        model = new_model(folder, dtype)
        in_loop = loop_gradients(model)
        model.zero_grad()
        run_micro_steps(MicroStep(model), [batch], LossScale.of_dtype(model.dtype))
        in_trainer = torch.cat([p.grad.flatten() for _, p in model.trainable_parameters()])
        if dtype == "float32":
            expected = in_loop
        for gradients in (in_loop, in_trainer):
            distance = float((gradients - expected).norm() / expected.norm())
            distances[dtype] = max(distance, distances.get(dtype, 0.0))
    assert distances["float32"] < 1e-5
    assert distances["float16"] < distances["bfloat16"] / 4 < 2e-2


# ---- the sums of float16 products


def cublas_settings():
    return tuple(getattr(torch.backends.cuda.matmul, name) for name in SETTINGS)


@pytest.fixture
def recorded(monkeypatch):
    """Let the user allow sums in float16, and record the settings during each matmul."""
    found, before = [], cublas_settings()
    for name in SETTINGS:
        setattr(torch.backends.cuda.matmul, name, True)
    for method in ("forward_", "backward_"):
        original = getattr(FusedLinear, method)

        def recording(*args, original=original, **options):
            found.append(cublas_settings())
            return original(*args, **options)

        monkeypatch.setattr(FusedLinear, method, recording)
    yield found
    for name, value in zip(SETTINGS, before, strict=True):
        setattr(torch.backends.cuda.matmul, name, value)


def train(model, folder, output):
    trainer = new_trainer(
        folder, output, model_options={"dtype": model.dtype, "load_in_4bit": False}, max_steps=1
    )
    trainer.train()


def run_loop(model, folder, output):
    loop_gradients(model)


def generate(model, folder, output):
    model.generate(input_ids=IDS[:1], max_new_tokens=2)


@pytest.mark.parametrize("work", [train, run_loop, generate])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cublas_sums_in_float32_during_our_passes_in_float16_only(
    folder, tmp_path, recorded, work, dtype
):
    work(new_model(folder, dtype), folder, tmp_path / "run")
    assert recorded
    assert set(recorded) == {(dtype != "float16",) * 2}
    assert cublas_settings() == (True, True)


def test_the_settings_come_back_after_an_error_and_after_the_last_of_several_threads(recorded):
    with pytest.raises(RuntimeError, match="stop"), own_precision(CPU, torch.float16):
        raise RuntimeError("stop")
    assert cublas_settings() == (True, True)
    entered, leave = threading.Event(), threading.Event()

    def overlap():
        with own_precision(CPU, torch.float16):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=overlap)
    with own_precision(CPU, torch.float16):
        thread.start()
        assert entered.wait(10)
    assert cublas_settings() == (False, False)
    leave.set()
    thread.join()
    assert cublas_settings() == (True, True)
