"""A deliberate fault turns the row of each check of the doctor to a failure."""

import pytest
import torch

from minitune.config.training_config import LoraConfig
from minitune.doctor import exports, passes, random_model, rates, runs
from minitune.doctor.examine import FILES, KERNELS, TRAINING
from minitune.doctor.kernel_checks import elementwise, products, weights
from minitune.doctor.report import FAIL, PASS, SKIPPED, Report
from minitune.doctor.subject import Request, find_source, load_subject
from minitune.memory.offload import ActivationOffloader
from minitune.memory.plan import Plan
from minitune.model.activations import SaveLevel
from minitune.model.decoder_layer import DecoderLayer
from minitune.training import micro_step
from minitune.training.optimizer import FlatAdamW

CPU = torch.device("cpu")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Return the small random model of the doctor, loaded in 16 bit."""
    request = Request(None, None, CPU, torch.float32, False, LoraConfig(r=4))
    folder, small = tmp_path_factory.mktemp("doctor"), random_model.CONFIG | SMALL
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_model, "CONFIG", small)
        return load_subject(request, find_source(request, folder), folder)


@pytest.fixture
def subject(loaded, tmp_path):
    """Return the model with a fresh folder and a fresh adapter."""
    loaded.folder = tmp_path
    loaded.draw_adapter_()
    return loaded


def finding_of(check, subject):
    """Return the finding of a check as the report has it."""
    return Report(show=lambda row: None).check("row", lambda: check(subject))


def spoil_(value):
    """Multiply all tensors in a result by 1.05, in place."""
    if isinstance(value, torch.Tensor):
        value.mul_(1.05)
    elif isinstance(value, tuple | list):
        for item in value:
            spoil_(item)


def spoiled(function):
    """Return a function whose result is wrong, or whose first argument if it has no result."""

    def wrong(*arguments, **options):
        result = function(*arguments, **options)
        spoil_(arguments[0] if result is None else result)
        return result

    return wrong


KERNEL_FAULTS = {
    "kernel rms_norm": (elementwise, ("rms_norm", "rms_norm_backward", "add_rms_norm_")),
    "kernel rope": (elementwise, ("rope_",)),
    "kernel gated_activation": (
        elementwise,
        ("gated_activation", "gated_activation_backward"),
    ),
    "kernel embedding": (elementwise, ("embed",)),
    "kernel attention": (products, ("attention",)),
    "kernel attention backward": (products, ("attention_backward",)),
    "kernel lora_linear": (
        products,
        ("lora_linear_", "lora_linear_backward_", "lora_gradients"),
    ),
    "kernel cross_entropy": (products, ("linear_cross_entropy",)),
    "kernel dequantize_nf4": (weights, ("dequantize_nf4",)),
    "kernel dequantize_ggml": (weights, ("dequantize_ggml",)),
    "kernel adamw": (weights, ("adamw_",)),
    "kernel adamw_8bit": (weights, ("adamw_8bit_",)),
    "kernel global_norm": (weights, ("global_norm",)),
}
CASES = [
    (row, *fault)
    for row, (module, names) in KERNEL_FAULTS.items()
    for fault in [(module, name) for name in names]
]


@pytest.mark.parametrize(("row", "module", "name"), CASES, ids=[case[2] for case in CASES])
def test_a_kernel_that_errs_by_a_twentieth_fails_its_row_and_only_then(
    subject, monkeypatch, row, module, name
):
    assert finding_of(KERNELS[row], subject).status == PASS
    monkeypatch.setattr(module, name, spoiled(getattr(module, name)))
    assert finding_of(KERNELS[row], subject).status == FAIL


def test_each_kernel_row_has_a_fault(subject):
    without = {
        name for name, check in KERNELS.items() if finding_of(check, subject).status == SKIPPED
    }
    assert without == {"kernel qk_norm_rope", "kernel attention of cuDNN"}
    assert KERNELS.keys() - without == KERNEL_FAULTS.keys()


def test_a_wrong_norm_of_heads_fails_its_row(tmp_path, monkeypatch):
    qwen = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
    monkeypatch.setattr(random_model, "CONFIG", random_model.CONFIG | SMALL | qwen)
    request = Request(None, None, CPU, torch.float32, False, LoraConfig(r=4))
    subject = load_subject(request, find_source(request, tmp_path), tmp_path)
    check = elementwise.check_qk_norm_rope
    assert finding_of(check, subject).status == PASS
    for name in ("qk_norm_rope", "qk_norm_rope_backward_"):
        with monkeypatch.context() as patch:
            patch.setattr(elementwise, name, spoiled(getattr(elementwise, name)))
            assert finding_of(check, subject).status == FAIL


def test_wrong_attention_of_cudnn_fails_its_row(subject, monkeypatch):
    """Run our attention in place of cuDNN's, which needs a GPU."""

    def bounds(q, L):
        start = torch.zeros(L, dtype=torch.int32)
        return start, torch.full_like(start, L)

    def forward(q, k, v, L, scale):
        return products.attention(q, k, v, *bounds(q, L), scale)

    def backward(dout, q, k, v, out, lse, L, scale):
        return products.attention_backward(dout, q, k, v, out, lse, *bounds(q, L), scale)

    monkeypatch.setattr(products, "CUDNN_MIN_LENGTH", 64)
    monkeypatch.setattr(products, "cudnn_supports", lambda *arguments: True)
    for wrong in (None, "cudnn_attention", "cudnn_attention_backward"):
        monkeypatch.setattr(products, "cudnn_attention", forward)
        monkeypatch.setattr(products, "cudnn_attention_backward", backward)
        if wrong:
            monkeypatch.setattr(products, wrong, spoiled(getattr(products, wrong)))
        status = finding_of(products.check_cudnn_attention, subject).status
        assert status == (FAIL if wrong else PASS)


def test_not_a_number_fails_a_row(subject, monkeypatch):
    monkeypatch.setattr(weights, "global_norm", lambda x: torch.tensor(float("nan")))
    found = finding_of(weights.check_global_norm, subject)
    assert found.status == FAIL and found.values["error"] == "nan"


# ---- passes over the model


def test_samples_that_attend_to_each_other_fail_packing(subject, monkeypatch):
    assert finding_of(passes.check_packing, subject).status == PASS

    def one_sample(batch, size, max_seq_length):
        return batch.input_ids, torch.arange(len(batch.input_ids))

    monkeypatch.setattr(micro_step, "_pad_batch", one_sample)
    assert finding_of(passes.check_packing, subject).status == FAIL


def test_a_lost_micro_step_fails_the_split_step(subject, monkeypatch):
    assert finding_of(passes.check_micro_steps, subject).status == PASS
    split = passes.micro_steps
    monkeypatch.setattr(passes, "micro_steps", lambda *arguments: split(*arguments)[:-1])
    assert finding_of(passes.check_micro_steps, subject).status == FAIL


def test_a_changed_activation_fails_saved_activations(subject, monkeypatch):
    assert finding_of(passes.check_saved_activations, subject).status == PASS
    forward = DecoderLayer.forward_saving_

    def wrong(layer, s, packed, context, level, tile_rows=None):
        activations = forward(layer, s, packed, context, level, tile_rows)
        if level == SaveLevel.QKV:
            activations.x.mul_(1.001)
        return activations

    monkeypatch.setattr(DecoderLayer, "forward_saving_", wrong)
    found = finding_of(passes.check_saved_activations, subject)
    assert found.status == FAIL and found.values["different"]["qkv"] > 0
    assert found.values["different"]["all"] == 0


def test_a_changed_copy_in_host_memory_fails_offloaded_activations(subject, monkeypatch):
    assert finding_of(passes.check_offloaded_activations, subject).status == PASS
    restore = ActivationOffloader.restore

    def wrong(offloader, i):
        activations = restore(offloader, i)
        activations.x.mul_(1.001)
        return activations

    monkeypatch.setattr(ActivationOffloader, "restore", wrong)
    assert finding_of(passes.check_offloaded_activations, subject).status == FAIL


def test_forgotten_moments_fail_the_resumed_run(subject, monkeypatch):
    assert finding_of(runs.check_resume, subject).status == PASS

    def forget(optimizer, state, steps):
        optimizer.steps = steps

    monkeypatch.setattr(FlatAdamW, "load_state_dict", forget)
    subject.folder = subject.folder / "again"
    subject.folder.mkdir()
    found = finding_of(runs.check_resume, subject)
    assert found.status == FAIL and found.values["different"] > 0


def test_a_step_that_is_slower_or_larger_than_its_plan_is_not_as_planned():
    plan = Plan((), parts=(("all", 1 << 30),), seconds=0.1)
    assert rates.is_as_planned(0.15, 1 << 30, plan)
    assert not rates.is_as_planned(0.3, 1 << 30, plan)
    assert not rates.is_as_planned(0.15, 3 << 29, plan)


# ---- files


def test_a_tokenizer_that_reads_back_otherwise_fails_its_row(subject, monkeypatch):
    assert finding_of(exports.check_tokenizer_files, subject).status == PASS

    class Other:
        @staticmethod
        def from_folder(folder):
            return Other()

        def encode_batch(self, texts):
            return [[1] for _ in texts]

    monkeypatch.setattr(exports, "Tokenizer", Other)
    subject.folder = subject.folder / "again"
    subject.folder.mkdir()
    assert finding_of(exports.check_tokenizer_files, subject).status == FAIL


@pytest.mark.parametrize("check", [exports.check_merge, exports.check_gguf])
def test_a_merge_without_the_adapter_fails_merge_and_gguf(subject, monkeypatch, check):
    assert finding_of(check, subject).status == PASS
    monkeypatch.setattr(
        "minitune.checkpoints.merge._merged_weight",
        lambda model, linear, original, name: linear.weight_as(torch.float32),
    )
    subject.folder = subject.folder / "again"
    subject.folder.mkdir()
    found = finding_of(check, subject)
    assert found.status == FAIL and found.values["error"] == pytest.approx(1, abs=0.1)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("row", ["CUDA graphs = eager", "training step, measured"])
def test_the_rows_of_a_gpu_pass_and_fail(tmp_path, monkeypatch, row):
    request = Request(None, None, torch.device("cuda", 0), torch.bfloat16, True, LoraConfig(r=16))
    subject = load_subject(request, find_source(request, tmp_path), tmp_path)
    assert finding_of(TRAINING[row], subject).status == PASS
    if row.startswith("CUDA"):
        run = micro_step.CUDAGraphCache.run
        monkeypatch.setattr(
            micro_step.CUDAGraphCache, "run", lambda *arguments: run(*arguments) * 1.01
        )
    else:
        monkeypatch.setattr(rates, "MAX_PEAK", 0.0)
        monkeypatch.setattr(rates, "PEAK_SLACK", 0)
    assert finding_of(TRAINING[row], subject).status == FAIL


def test_each_row_of_passes_and_files_has_a_fault_here():
    assert set(TRAINING) | set(FILES) == {
        "packed = one by one",
        "split step = whole step",
        "saved = recomputed",
        "offloaded = recomputed",
        "CUDA graphs = eager",
        "resumed = uninterrupted",
        "training step, measured",
        "tokenizer, read back",
        "merged = base + adapter",
        "GGUF file = base + adapter",
    }
