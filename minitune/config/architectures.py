"""TODO docstring."""

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


MODEL_TYPES = ("llama", "mistral")
