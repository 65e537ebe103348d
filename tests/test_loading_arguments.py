"""Arguments of Unsloth, transformers and PEFT are taken, or refused with a reason."""

import dataclasses
import inspect

import pytest
import torch
from tiny import draw_adapter, make_tiny_model

from minitune import FastLanguageModel, LoraConfig, get_peft_model, is_bfloat16_supported
from minitune.config.foreign_arguments import ANYTHING, Renamed, foreign_arguments
from minitune.config.loading_arguments import (
    ATTACHING,
    ATTACHING_CONFIG,
    CONFIG_ATTRIBUTES,
    LOADING,
    LOADING_ADAPTER,
    LORA,
    SAVING,
)
from minitune.model.activations import SaveLevel

IDS = torch.tensor([[5, 17, 300, 42, 7, 7, 260, 99, 3]])
# The arguments in Unsloth's documentation, with its defaults
UNSLOTH_LOADING = {
    "max_seq_length": 64,
    "dtype": None,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "load_in_16bit": False,
    "full_finetuning": False,
    "token": None,
    "device_map": "sequential",
    "rope_scaling": None,
    "fix_tokenizer": True,
    "trust_remote_code": False,
    "use_gradient_checkpointing": "unsloth",
    "resize_model_vocab": None,
    "revision": None,
    "use_exact_model_name": False,
    "offload_embedding": False,
    "float32_mixed_precision": None,
    "fast_inference": False,
    "gpu_memory_utilization": 0.5,
    "float8_kv_cache": False,
    "random_state": 3407,
    "max_lora_rank": 64,
    "disable_log_stats": True,
    "qat_scheme": None,
    "load_in_fp8": False,
    "unsloth_tiled_mlp": False,
}
UNSLOTH_ATTACHING = {
    "r": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora_alpha": 8,
    "lora_dropout": 0,
    "bias": "none",
    "layers_to_transform": None,
    "layers_pattern": None,
    "use_gradient_checkpointing": "unsloth",
    "random_state": 3407,
    "max_seq_length": 64,
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "loftq_config": {},
    "temporary_location": "_unsloth_temporary_saved_buffers",
    "finetune_vision_layers": False,
    "finetune_language_layers": True,
    "finetune_attention_modules": True,
    "finetune_mlp_modules": True,
    "task_type": "CAUSAL_LM",
    "qat_scheme": None,
    "ensure_weight_tying": False,
}
TABLES = {
    "loading": LOADING,
    "attaching": ATTACHING,
    "attaching a config": ATTACHING_CONFIG,
    "loading an adapter": LOADING_ADAPTER,
    "saving": SAVING,
    "lora": LORA,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def load(folder, **options):
    return FastLanguageModel.from_pretrained(folder, **{"device": "cpu"} | options)[0]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_all_of_unsloths_arguments_with_their_defaults_change_nothing(tiny):
    model, _ = FastLanguageModel.from_pretrained(model_name=tiny, **UNSLOTH_LOADING)
    plain = load(tiny, max_seq_length=64)
    assert torch.equal(logits(model), logits(plain))
    model = FastLanguageModel.get_peft_model(model, **UNSLOTH_ATTACHING)
    plain = FastLanguageModel.get_peft_model(plain, r=8, lora_alpha=8)
    assert model.lora == plain.lora
    for (_, p), (_, q) in zip(
        model.trainable_parameters(), plain.trainable_parameters(), strict=True
    ):
        assert torch.equal(p, q)


@pytest.mark.parametrize("table", TABLES)
def test_each_foreign_argument_takes_its_neutral_values_and_refuses_others(table):
    @foreign_arguments(**TABLES[table])
    def function(model_name=None, dtype=None, folder=None):
        return "called"

    for name, entry in TABLES[table].items():
        if isinstance(entry, Renamed):
            assert function(**{name: 1}) == "called"
            continue
        for value in entry.neutral or ("anything",):
            assert function(**{name: value}) == "called", name
        if entry.neutral is not ANYTHING:
            with pytest.raises(ValueError, match=f"{name}=.* is not supported: [A-Za-z]"):
                function(**{name: object()})


REFUSED = {
    "load_in_8bit": (True, "use load_in_4bit=True"),
    "full_finetuning": (True, "only LoRA adapters are trained"),
    "fast_inference": (True, "there is no vLLM"),
    "rope_scaling": ({"type": "linear", "factor": 4}, "change it there"),
    "resize_model_vocab": (1000, "embeddings are frozen"),
    "revision": ("v2", "folder of the snapshot"),
    "cache_dir": ("/tmp/x", "HF_HUB_CACHE"),
    "quantization_config": (object(), "use load_in_4bit=True"),
    "load_in_16bit": (True, "needs load_in_4bit=False"),
    "device_map": ({"": "cpu", "model.norm": "cuda:0"}, "one device holds the whole model"),
    "attn_implementation": ("other", "attention='auto'"),
    "dtype": ("int8", "not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_values_of_from_pretrained_are_refused_with_the_remedy(tiny, name):
    value, remedy = REFUSED[name]
    with pytest.raises(ValueError, match=remedy):
        FastLanguageModel.from_pretrained(tiny, **{name: value})


def test_an_unknown_argument_of_from_pretrained_is_a_type_error_with_a_hint(tiny):
    with pytest.raises(TypeError, match="did you mean max_seq_length"):
        FastLanguageModel.from_pretrained(tiny, max_seq_len=64)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, torch.device("cpu"), "auto", None])
def test_device_map_names_the_device_in_transformers_form(tiny, device_map):
    model, _ = FastLanguageModel.from_pretrained(tiny, device_map=device_map)
    assert model.device == torch.device("cpu") or torch.cuda.is_available()
    assert model.to("cpu") is model.cpu() is model
    with pytest.raises(ValueError, match="stays on its device"):
        model.to(torch.float64)


def test_torch_dtype_and_auto_choose_the_dtype_of_transformers(tiny):
    assert load(tiny, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(tiny, dtype="auto").dtype == torch.bfloat16  # of the weights
    assert load(tiny).dtype == torch.float32
    assert not any(linear.is_quantized for _, linear in load(tiny, load_in_4bit=False).linears())


def test_gradient_checkpointing_of_from_pretrained_and_for_training_reaches_the_planner(tiny):
    model = load(tiny, use_gradient_checkpointing=True)
    assert model.planner.level is SaveLevel.INPUT
    assert FastLanguageModel.for_training(model, use_gradient_checkpointing=False) is model
    assert model.planner.level is SaveLevel.ALL and model.training
    assert FastLanguageModel.for_inference(model) is model and not model.training
    assert model.for_training() is model and model.for_inference() is model


def test_get_peft_model_returns_a_model_that_has_the_adapter_and_refuses_another(tiny):
    model = FastLanguageModel.get_peft_model(load(tiny), r=4)
    draw_adapter(model, b=0.1)
    before = logits(model)
    with pytest.warns(UserWarning, match="has this adapter already"):
        assert FastLanguageModel.get_peft_model(model, r=4) is model
    assert torch.equal(logits(model), before)
    for other in ({"r": 8}, {"lora_alpha": 32, "r": 4}, {"r": 4, "target_modules": ["q_proj"]}):
        with pytest.raises(ValueError, match=r"other settings already: LoraConfig.r=4.*load the"):
            FastLanguageModel.get_peft_model(model, **other)
    with pytest.raises(ValueError, match=r"max_seq_length is 4096, but the model was loaded for"):
        FastLanguageModel.get_peft_model(load(tiny), max_seq_length=4096)


def test_pefts_get_peft_model_attaches_a_config(tiny):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=False,
    )
    model = get_peft_model(load(tiny), config, adapter_name="default")
    assert model.lora.r == 4 and model.lora.scaling == 2
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"peft_config is a peft.*minitune.LoraConfig"):
        get_peft_model(load(tiny), peft.LoraConfig())


def test_the_targets_of_an_adapter_may_be_a_list_a_set_or_all_linear():
    everything = LoraConfig().target_modules
    assert LoraConfig(target_modules="all-linear") == LoraConfig(target_modules=None)
    assert set(LoraConfig(target_modules=set(everything)).target_modules) == set(everything)
    with pytest.raises(ValueError, match=r"lora_dropout=0.05 is not supported: recomputation"):
        LoraConfig(lora_dropout=0.05)
    with pytest.raises(TypeError, match="did you mean lora_alpha"):
        LoraConfig(alpha=8)


def test_pefts_signatures_hold_no_name_that_is_unknown_here():
    peft = pytest.importorskip("peft")
    for field in dataclasses.fields(peft.LoraConfig):
        value = field.default
        if value is dataclasses.MISSING:
            value = field.default_factory()
        if field.name != "peft_type":
            LoraConfig(**{field.name: value})
    signatures = {
        peft.get_peft_model: ("attaching a config", {"model", "peft_config"}),
        peft.PeftModel.load_adapter: ("loading an adapter", {"self", "kwargs"}),
        peft.PeftModel.save_pretrained: ("saving", {"self", "kwargs"}),
    }
    for function, (table, own) in signatures.items():
        names = set(inspect.signature(function).parameters) - own
        assert names <= TABLES[table].keys(), names - TABLES[table].keys()


def test_assignments_of_notebooks_to_the_config_are_taken_or_explained(tiny):
    config = load(tiny).config
    config.use_cache = False
    config.pretraining_tp = 1
    assert set(CONFIG_ATTRIBUTES) == {"use_cache", "pretraining_tp"}
    with pytest.raises(ValueError, match=r"pretraining_tp=2 is not supported"):
        config.pretraining_tp = 2
    with pytest.raises(AttributeError, match=r"vocab_size cannot be assigned: the files"):
        config.vocab_size = 3


@pytest.mark.parametrize("name", ["merge_and_unload", "push_to_hub", "generation_config"])
def test_an_absent_attribute_names_the_way_to_the_same_end(tiny, name):
    model = load(tiny)
    assert not hasattr(model, name)
    with pytest.raises(AttributeError, match=f"has no {name}: .*(save|generate)"):
        getattr(model, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        model.nothing  # noqa: B018


def test_a_model_has_one_adapter_called_default(tiny):
    model = FastLanguageModel.get_peft_model(load(tiny), r=4)
    model.set_adapter("default")
    with pytest.raises(ValueError, match=r"'other' does not exist.*load_adapter"):
        model.set_adapter("other")
    with pytest.raises(ValueError, match=r"adapter_name='other' is not supported"):
        model.load_adapter("x", adapter_name="other")


def test_a_cpu_computes_in_bfloat16():
    assert is_bfloat16_supported(torch.device("cpu")) is True
    assert isinstance(is_bfloat16_supported(), bool)


def test_a_call_takes_transformers_arguments_that_ask_for_nothing(tiny):
    model, _ = FastLanguageModel.from_pretrained(tiny)
    neutral = {"use_cache": False, "return_dict": True, "output_hidden_states": False}
    assert torch.equal(model(IDS, **neutral).logits, model(input_ids=IDS).logits)
    with pytest.raises(ValueError, match=r"output_hidden_states=True .* hidden states are not"):
        model(IDS, output_hidden_states=True)
    with pytest.raises(TypeError, match="no argument 'label'; did you mean labels"):
        model(IDS, label=IDS)
