"""All checks in their order: the machine, the model, its kernels, its passes, its files."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from minitune.doctor import exports, machine, passes, rates, runs
from minitune.doctor.kernel_checks import elementwise, products, weights
from minitune.doctor.report import Finding, Report, passed, skipped
from minitune.doctor.subject import Request, Subject, find_source, load_subject
from minitune.doctor.versions import PACKAGES, check_version

# Name of a row -> its check.
MODEL: dict[str, Callable[[Subject], Finding]] = {
    "whole model fits": rates.check_whole_model,
    "disk space": lambda s: machine.check_disk(s.folder, s.bytes_to_write),
}
KERNELS: dict[str, Callable[[Subject], Finding]] = {
    "kernel rms_norm": elementwise.check_rms_norm,
    "kernel rope": elementwise.check_rope,
    "kernel qk_norm_rope": elementwise.check_qk_norm_rope,
    "kernel gated_activation": elementwise.check_gated_activation,
    "kernel embedding": elementwise.check_embedding,
    "kernel attention": products.check_attention,
    "kernel attention backward": products.check_attention_backward,
    "kernel attention of cuDNN": products.check_cudnn_attention,
    "kernel lora_linear": products.check_lora_linear,
    "kernel cross_entropy": products.check_cross_entropy,
    "kernel dequantize_nf4": weights.check_nf4,
    "kernel dequantize_ggml": weights.check_ggml,
    "kernel adamw": weights.check_adamw,
    "kernel adamw_8bit": weights.check_adamw_8bit,
    "kernel global_norm": weights.check_global_norm,
}
TRAINING: dict[str, Callable[[Subject], Finding]] = {
    "packed = one by one": passes.check_packing,
    "split step = whole step": passes.check_micro_steps,
    "saved = recomputed": passes.check_saved_activations,
    "offloaded = recomputed": passes.check_offloaded_activations,
    "CUDA graphs = eager": passes.check_cuda_graphs,
    "resumed = uninterrupted": runs.check_resume,
    "training step, measured": rates.check_step,
}
FILES: dict[str, Callable[[Subject], Finding]] = {
    "tokenizer, read back": exports.check_tokenizer_files,
    "merged = base + adapter": exports.check_merge,
    "GGUF file = base + adapter": exports.check_gguf,
}


def examine(request: Request, report: Report) -> None:
    """Run all checks; nothing but caches stays on the disk."""
    _examine_machine(request, report)
    try:
        place = tempfile.TemporaryDirectory(prefix="minitune-doctor-", ignore_cleanup_errors=True)
    except OSError:
        report.check("model", lambda: skipped("there is no temporary folder"))
        return
    with place as folder:
        _examine_model(request, report, Path(folder))


def _examine_machine(request: Request, report: Report) -> None:
    device = request.device
    for name in ("python", *PACKAGES):
        report.check(name, partial(check_version, name, device))
    report.check("GPU", partial(machine.check_gpu, device, request.dtype))
    report.check("driver", partial(machine.check_driver, device))
    report.check("GPU memory", partial(machine.check_gpu_memory, device))
    report.check("host memory", machine.check_host_memory)
    report.check("C compiler", partial(machine.check_compiler, device))
    report.check("Triton's cache", partial(machine.check_triton_cache, device))
    report.check("temporary folder", machine.check_temporary_folder)


def _examine_model(request: Request, report: Report, folder: Path) -> None:
    loaded: list[Subject] = []

    def load() -> Finding:
        source = find_source(request, folder)
        subject = load_subject(request, source, folder)
        loaded.append(subject)
        name = "a small random model" if request.model is None else source.name
        return passed(_loaded_text(name, subject), name=name, layers=subject.layers_text)

    report.check("model", load)
    for name, check in (MODEL | KERNELS | TRAINING | FILES).items():
        if not loaded:
            report.check(name, lambda: skipped("the model was not loaded"))
            continue
        report.check(name, partial(check, loaded[0]))


def _loaded_text(name: str, s: Subject) -> str:
    """Return the loaded model in words."""
    model = s.model
    dtype = str(model.dtype).removeprefix("torch.")
    linears, adapted = model.config.linears(), model.lora.target_modules
    names = "all linears" if len(adapted) == len(linears) else ", ".join(adapted)
    lora = f"r {model.lora.r} on {names}"
    form = f"{model.formats_text}, computes in {dtype} on {model.device}"
    return f"{name}: {s.layers_text}, {form}; {lora}"
