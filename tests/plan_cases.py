"""The model that the tests of plans use, Llama 3.1 8B with r = 16, and its micro-steps."""

from benchmark.model_shapes import SHAPES

from minitune.config.architectures import LORA_TARGETS
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import LoraConfig
from minitune.memory.device_rates import DeviceRates
from minitune.memory.memory_model import MemoryModel, static_parts
from minitune.memory.model_shape import ModelShape
from minitune.memory.plan import Plan, Workload
from minitune.memory.search import MemoryBudget, fastest_plan

GIB = 2**30
CONFIG = ModelConfig.from_dict(SHAPES["8b"])
LORA = LoraConfig(r=16, target_modules=LORA_TARGETS)
SHAPE = ModelShape.of(CONFIG, LORA, itemsize=2, max_seq_length=8192)
STATIC = static_parts(CONFIG, SHAPE, max_seqlen=2048)
SHORT = MemoryModel(SHAPE, Workload(4096, max_seqlen=2048))
LONG = MemoryModel(SHAPE, Workload(8192, max_seqlen=8192, cudnn=True))


def fastest(
    memory: MemoryModel,
    gib: float,
    host_gib: float = 0,
    rates: DeviceRates | None = None,
    allow_resident_weights: bool = False,
) -> Plan:
    """Return the fastest plan within budgets in GiB."""
    budget = MemoryBudget(int(gib * GIB), int(host_gib * GIB))
    return fastest_plan(memory, STATIC, budget, rates, allow_resident_weights)
