"""Helpers of the tests that run micro-steps: models, samples, fixed plans, results."""

import torch
from conftest import GPU
from gguf_files import make_tiny_gguf
from tiny import draw_adapter, make_tiny_model

from minitune import FastLanguageModel
from minitune.data.batching import collate
from minitune.data.samples import Sample
from minitune.model.activations import SaveLevel

DEVICE = "cuda" if GPU else "cpu"


class FixedPlanner:
    """A planner that knows a single plan."""

    level = SaveLevel.INPUT

    def __init__(self, plan):
        self.plan = plan

    def measure_rates(self, device):
        """Measure nothing: the plan is known."""

    def plan_for(self, model, packed, already_allocated=0, allow_resident_weights=False):
        """Return the plan."""
        return self.plan


def load(folder, **options):
    """Return the model of a folder with a non-zero adapter, as after training."""
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=256, device=DEVICE, **options
    )
    FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
    draw_adapter(model, b=0.05)
    return model


def random_samples(lengths, vocab=512, seed=1):
    """Return samples of random tokens; the first third of each has no labels."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        prompt = length // 3
        samples.append(Sample(ids, [-100] * prompt + ids[prompt:]))
    return samples


def gradients(model):
    """Return all gradients as one vector, and clear them."""
    found = torch.cat([p.grad.flatten().clone() for _, p in model.trainable_parameters()])
    for _, p in model.trainable_parameters():
        p.grad.zero_()
    return found


def results(micro_step, batches):
    """Return loss and gradients of each batch, with a denominator of 50."""
    return [(micro_step(batch, 50), gradients(micro_step.model)) for batch in batches]


def assert_same_bits(found, expected):
    """Assert that losses and gradients, as from `results`, are equal and not all zero."""
    for (loss, grads), (expected_loss, expected_grads) in zip(found, expected, strict=True):
        assert torch.equal(loss, expected_loss)
        assert torch.equal(grads, expected_grads) and grads.any()


# ---- CUDA graphs

GRAPH_SHAPE = {
    "hidden": 256,
    "layers": 3,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 64,
    "ffn": 704,
    "vocab": 512,
}
# A model with 8B's width ratios.
WIDE_SHAPE = {
    "hidden": 1024,
    "layers": 8,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 128,
    "ffn": 3584,
    "vocab": 4096,
}
BATCHES = [
    collate(random_samples(lengths))
    for lengths in ([40, 9, 30], [200, 250, 100, 90], [128, 128], [3])
]


def load_wide(folder, max_seq_length):
    """Make a model of WIDE_SHAPE in `folder`, and return it with an adapter of rank 16."""
    make_tiny_model(folder, **WIDE_SHAPE, positions=max_seq_length)
    return load_with_adapter(folder, max_seq_length)


def load_wide_gguf(folder, max_seq_length, **shape):
    """Make a Q4_K_M file of WIDE_SHAPE in `folder`, and return its model as `load_wide`.

    shape: arguments of make_tiny_model that differ from WIDE_SHAPE.
    """
    options = WIDE_SHAPE | {"positions": max_seq_length} | shape
    return load_with_adapter(make_tiny_gguf(folder, "q4_k_m", **options), max_seq_length)


def load_with_adapter(base, max_seq_length):
    """Return a model in bfloat16 with an adapter of rank 16."""
    model, _ = FastLanguageModel.from_pretrained(
        base, max_seq_length=max_seq_length, dtype=torch.bfloat16
    )
    FastLanguageModel.get_peft_model(model, r=16)
    return model
