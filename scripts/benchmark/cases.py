"""The table of `bench.py --all`: the measured configurations, each with its memory budget.

A configuration keeps its number and its meaning, so that two commits are compared row by row.
"""

from dataclasses import dataclass
from typing import Any

# Mode of a case -> --checkpointing of its peers.
PEER_CHECKPOINTING = {"recomputed": "default", "saved": "none", "offloaded": "default"}


@dataclass(frozen=True)
class Case:
    """A configuration: a model shape, a step, and the memory that the planner may use.

    Budgets are 5% above the wanted peak, because the planner leaves 5% of a budget free. A case of
    short samples gets less, since later sizes need memory too; a case with a memory_limit gets
    less, since the allocator reserves more than it hands out.
    """

    shape: str  # a key of model_shapes.SHAPES
    targets: str  # the linears with an adapter: "qkvo" or "all"
    batch: int  # samples a step
    tokens: int  # of a sample; of a short sample, its limit
    memory_budget: str
    # "saved": the budget has room for all activations. "recomputed": backward recomputes the rest.
    # "offloaded": activations and the embedding may be in host memory too.
    mode: str = "recomputed"
    host_memory: str | None = None  # for offloaded activations
    eight_bit: bool = False  # the optimizer's moments
    short: bool = False  # short samples, through SFTTrainer
    r: int = 16
    memory_limit: str | None = None  # the memory that the GPU is to have; no peer runs in it
    steps: int | None = None  # timed steps and warm-up steps each, if a step takes long

    def __str__(self) -> str:
        """Return the configuration in a few words."""
        step = "short samples" if self.short else f"{self.batch} x {self.tokens}"
        words = [self.shape.upper(), self.targets, step]
        words += [f"r {self.r}"] if self.r != 16 else []
        words += ["8-bit moments"] if self.eight_bit else []
        words += [f"a GPU of {self.memory_limit}"] if self.memory_limit else []
        return ", ".join(words)

    def flags(self) -> list[str]:
        """Return the flags of bench.py that a peer takes too."""
        flags: dict[str, Any] = {
            "--batch": self.batch,
            "--tokens": self.tokens,
            "--targets": self.targets,
            "--r": self.r,
        }
        found = [str(part) for pair in flags.items() for part in pair]
        return [*found, "--short"] if self.short else found

    def own_flags(self, attention: str) -> list[str]:
        """Return the flags of bench.py that are minitune's alone."""
        found = ["--attention", attention, "--checkpointing", "auto"]
        found += ["--memory-budget", self.memory_budget]
        found += ["--memory-limit", self.memory_limit] if self.memory_limit else []
        if self.host_memory:
            found += ["--host-memory", self.host_memory, "--offload-embedding"]
        return [*found, "--optim", "adamw_8bit"] if self.eight_bit else found

    def peer_flags(self) -> list[str]:
        """Return the flags of peers.py that choose its checkpointing."""
        return [] if self.short else ["--checkpointing", PEER_CHECKPOINTING[self.mode]]

    def measures(self, peer: str) -> bool:
        """Return True if a peer runs this configuration. Short samples are Unsloth's recipe."""
        return self.memory_limit is None and (not self.short or peer == "unsloth")


IN_HOST_MEMORY = {"mode": "offloaded", "host_memory": "64GiB"}
LONGEST = {"mode": "offloaded", "host_memory": "110GiB", "eight_bit": True, "r": 32, "steps": 1}
CASES = {
    1: Case("8b", "qkvo", 2, 2048, "8GiB"),
    2: Case("8b", "all", 2, 2048, "8.6GiB"),
    3: Case("8b", "all", 2, 2048, "22.1GiB", mode="saved"),
    4: Case("8b", "all", 1, 8192, "11.05GiB"),
    5: Case("1b", "all", 2, 2048, "5.69GiB", mode="saved"),
    6: Case("135m", "all", 4, 1024, "2.31GiB", mode="saved"),
    7: Case("8b", "all", 2, 2048, "10GiB", short=True),
    8: Case("1b", "all", 2, 2048, "3GiB", short=True),
    9: Case("8b", "qkvo", 2, 2048, "6.81GiB", **IN_HOST_MEMORY),
    10: Case("8b", "all", 2, 2048, "7.4GiB", **IN_HOST_MEMORY),
    11: Case("8b", "all", 1, 8192, "8.4GiB", **IN_HOST_MEMORY),
    12: Case("8b", "all", 2, 2048, "6.1GiB", **IN_HOST_MEMORY, eight_bit=True),
    13: Case("8b", "all", 1, 32768, "14.9GiB", **IN_HOST_MEMORY, steps=3),
    14: Case("8b", "all", 1, 200_000, "21.5GiB", **LONGEST, memory_limit="24GiB"),
    15: Case("8b", "all", 1, 24_000, "7.7GiB", **LONGEST, memory_limit="8GiB"),
    16: Case("8b", "all", 1, 8192, "7.15GiB", **IN_HOST_MEMORY, eight_bit=True),
    17: Case("8b", "all", 1, 32768, "8.9GiB", **IN_HOST_MEMORY, eight_bit=True, steps=3),
}
