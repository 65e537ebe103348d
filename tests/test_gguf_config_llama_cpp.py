"""llama.cpp computes what the config of a file says, for keys that the exporter never writes."""

import warnings

import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from gguf_files import metadata_of, tensors_of
from referees.llama_cpp import LlamaCpp
from tiny import make_tiny_model
from tiny_families import make_tiny_family

from minitune.config.model_config import ModelConfig
from minitune.gguf.base.open_gguf import open_gguf, read_config
from minitune.gguf.export import convert_folder
from minitune.gguf.file_weights import FileWeights
from minitune.gguf.streamed_logits import next_token_log_probabilities
from minitune.gguf.writer import Content, TensorInfo, write_gguf

DIVISORS = torch.linspace(1, 9, 8)
FREQS = {"rope_freqs.weight": DIVISORS}
FACTORS = {"rope_factors_long.weight": DIVISORS, "rope_factors_short.weight": DIVISORS.sqrt()}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
NO_BETAS = {"rope.scaling.yarn_beta_fast": None, "rope.scaling.yarn_beta_slow": None}
LIMIT = 5e-3  # of log probabilities; llama.cpp's GELU of Gemma is a table in float16
# name -> (family, keys that differ, None to leave one out, additional tensors)
CASES = {
    "the old key of a linear scaling": ("llama", {"rope.scale_linear": 2.0}, {}),
    "a linear scaling without its type": ("llama", {"rope.scaling.factor": 2.0}, {}),
    "no scaling": ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, {}),
    "scaled cosines": ("llama", {"rope.scaling.attn_factor": 1.5}, {}),
    "divisors": ("llama", {}, FREQS),
    "divisors and a factor": ("llama", {"rope.scaling.factor": 2.0}, FREQS),
    "longrope": (
        "llama",
        {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": 1.25,
        },
        FACTORS,
    ),
    "YaRN": ("llama", YARN, {}),
    "YaRN with scaled cosines": ("llama", YARN | {"rope.scaling.attn_factor": 1.5}, {}),
    "YaRN of Ministral": (
        "ministral3",
        {"rope.scaling.yarn_log_multiplier": 0.5, "rope.scaling.yarn_beta_fast": 4.0},
        {},
    ),
    "growing queries without a scaling": (
        "ministral3",
        {
            "attention.temperature_scale": 0.5,
            "rope.scaling.original_context_length": 4,
            "rope.scaling.type": None,
            "rope.scaling.factor": None,
            "rope.scaling.yarn_log_multiplier": None,
            **NO_BETAS,
        },
        {},
    ),
    "growing queries with a linear scaling": (
        "ministral3",
        {"rope.scaling.type": "linear", "rope.scaling.yarn_log_multiplier": None, **NO_BETAS},
        {},
    ),
    "growing queries with divisors": (
        "ministral3",
        {"rope.scaling.type": "none", "rope.scaling.yarn_log_multiplier": None, **NO_BETAS},
        {"rope_freqs.weight": torch.linspace(1, 9, 12)},
    ),
    "Granite without its scales": (
        "granite",
        {"attention.scale": None, "embedding_scale": None, "residual_scale": None},
        {},
    ),
    "another period of windows": ("gemma3", {"attention.sliding_window_pattern": 3}, {}),
    "a list of windows": (
        "gemma3",
        {"attention.sliding_window_pattern": [True, False, False, True, True, False, True]},
        {},
    ),
    "no bases": ("gemma3", {"rope.freq_base": None, "rope.freq_base_swa": None}, {}),
    "no soft caps": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        {},
    ),
    "OLMo 3 with a linear scaling": ("olmo3", {"rope.scaling.type": "linear", **NO_BETAS}, {}),
}


def write_case(folder, family, changes, tensors):
    """Write a float32 file of a family with other keys and tensors."""
    if family == "llama":
        make_tiny_model(folder, tokenizer="llama3", dtype=torch.float32)
    else:
        make_tiny_family(folder, family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of windows that llama.cpp ignores
        plain = convert_folder(folder, folder / "plain.gguf", "f32", verify=False)
    keys = {k: v for k, v in metadata_of(plain).items() if not k.startswith("GGUF.")}
    keys |= {f"{keys['general.architecture']}.{key}": value for key, value in changes.items()}
    keys = {key: value for key, value in keys.items() if value is not None}
    stored = tensors | {x.name: torch.from_numpy(x.data.copy()) for x in tensors_of(plain).values()}
    infos = [TensorInfo(name, tuple(x.shape), GGMLType.F32) for name, x in stored.items()]
    path = folder / "changed.gguf"
    write_gguf({path: Content(keys, infos)}, stored.values())
    return path


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_the_config_says(tmp_path, case):
    path = write_case(tmp_path, *CASES[case])
    reader = open_gguf(path)
    config = ModelConfig.from_dict(read_config(reader))
    ids = torch.randint(3, 400, (60,), generator=torch.Generator().manual_seed(2)).tolist()
    prompts = [ids[:length] for length in (17, 33, 60)]
    weights = FileWeights(reader, config)
    ours = next_token_log_probabilities(weights, prompts, torch.device("cpu")).double()
    llama_cpp = LlamaCpp(path)
    theirs = [llama_cpp.next_log_probabilities(p, config.vocab_size) for p in prompts]
    difference = (ours - torch.stack(theirs).double()).abs().max()
    assert difference < LIMIT, difference
