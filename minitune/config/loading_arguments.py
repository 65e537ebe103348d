"""Arguments of Unsloth, transformers and PEFT that minitune lacks: load, call and save a model.

Each table belongs to one function or dataclass, which takes it by `foreign_arguments`. The reasons
say what to use instead.
"""

from minitune.config.foreign_arguments import ANYTHING, Foreign, Renamed

_ADAPTERS_ONLY = "only LoRA adapters are trained; use a larger r"
_VLLM = Foreign("vLLM is not used", neutral=ANYTHING)
_LOCAL = Foreign("nothing is downloaded", neutral=ANYTHING)
_LINEARS = "choose the linears with target_modules"

# PEFT's settings of methods beside plain LoRA
_OTHER_METHODS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "eva_config", "corda_config"),
    *("lora_ga_config", "velora_config", "monteclora_config", "kasa_config", "arrow_config"),
    *("alora_invocation_tokens", "megatron_config"),
)

# from_pretrained of Unsloth and transformers
LOADING = {
    "pretrained_model_name_or_path": Renamed("model_name"),
    "torch_dtype": Renamed("dtype"),
    # numbers
    "load_in_8bit": Foreign("use load_in_4bit=True, or load_in_4bit=False", (False, None)),
    "load_in_fp8": Foreign(
        "a folder of FP8 weights is read, with load_in_4bit=True or False", (False, None)
    ),
    "quantization_config": Foreign("use load_in_4bit=True, which is NF4"),
    "gguf_file": Foreign("give the path of the GGUF file itself as model_name"),
    "qat_scheme": Foreign("training rounds no weights; a GGUF file of that type can be the base"),
    "float32_mixed_precision": Foreign("adapters are always in float32", neutral=ANYTHING),
    # training
    "full_finetuning": Foreign(_ADAPTERS_ONLY, (False, None)),
    "random_state": Foreign("loading draws nothing; get_peft_model takes it", neutral=ANYTHING),
    "max_lora_rank": _VLLM,
    "unsloth_tiled_mlp": Foreign("the memory planner chooses tiles", neutral=ANYTHING),
    "unsloth_force_compile": Foreign("kernels are compiled once", neutral=ANYTHING),
    "use_cache": Foreign("generation has a cache, training has none", neutral=ANYTHING),
    # model and tokenizer
    "rope_scaling": Foreign("rope_scaling in config.json counts; change it there"),
    "fix_tokenizer": Foreign("the tokenizer's files count as they are", neutral=ANYTHING),
    "resize_model_vocab": Foreign("embeddings are frozen; use tokens of the vocabulary"),
    "padding_side": Foreign("samples are packed without padding", neutral=ANYTHING),
    "text_only": Foreign("only the text model of a folder is loaded", (True, None)),
    "attn_implementation": Foreign(
        "choose attention='auto' or 'triton'",
        (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    ),
    # files
    "token": _LOCAL,
    "use_auth_token": _LOCAL,
    "force_download": _LOCAL,
    "local_files_only": _LOCAL,
    "trust_remote_code": Foreign("no code of a model folder is run", neutral=ANYTHING),
    "low_cpu_mem_usage": Foreign("tensors are always read one by one", neutral=ANYTHING),
    "cache_dir": Foreign("set the environment variable HF_HUB_CACHE, or give the model's folder"),
    "revision": Foreign("give the folder of the snapshot", (None, "main")),
    "subfolder": Foreign("give the folder itself", (None, "")),
    "use_safetensors": Foreign("only safetensors are read", (None, True)),
    "use_exact_model_name": Foreign("a name always counts as it is", neutral=ANYTHING),
    # machine
    "max_memory": Foreign("SFTConfig(memory_budget='24GiB') limits a run's memory"),
    "offload_folder": Foreign("weights stay on one device; see offload_embedding"),
    # generation by vLLM
    "fast_inference": Foreign("there is no vLLM; model.generate needs no switch", (False, None)),
    "gpu_memory_utilization": _VLLM,
    "float8_kv_cache": _VLLM,
    "disable_log_stats": _VLLM,
}

# LoraConfig of PEFT
LORA = {
    "task_type": Foreign("only causal language models are trained", (None, "CAUSAL_LM")),
    "peft_type": Foreign("only LoRA is trained", (None, "LORA")),
    "inference_mode": Foreign("an adapter is always trainable", neutral=ANYTHING),
    "lora_dropout": Foreign("recomputation would need the same mask; use 0", (0, 0.0, None)),
    "bias": Foreign("biases stay frozen; use 'none'", ("none", None)),
    "modules_to_save": Foreign(
        f"embeddings, head and norms stay frozen: {_ADAPTERS_ONLY}", (None, [], ())
    ),
    "init_lora_weights": Foreign("A starts from Kaiming's values and B from 0; use True", (True,)),
    "loftq_config": Foreign("the base is quantised to plain NF4; use None", (None, {})),
    "layers_to_transform": Foreign("all layers get adapters"),
    "layers_pattern": Foreign("all layers get adapters", (None, [])),
    "layer_replication": Foreign("a model keeps its layers"),
    "exclude_modules": Foreign(_LINEARS, (None, [], ())),
    "rank_pattern": Foreign("all linears have the same r", (None, {})),
    "alpha_pattern": Foreign("all linears have the same lora_alpha", (None, {})),
    "fan_in_fan_out": Foreign("weights are stored as (out, in)", (False, None)),
    "target_parameters": Foreign(_LINEARS, (None, [])),
    "trainable_token_indices": Foreign("embeddings stay frozen"),
    "ensure_weight_tying": Foreign("embeddings and head stay frozen", neutral=ANYTHING),
    "base_model_name_or_path": Foreign("the model's own name is saved", neutral=ANYTHING),
    "revision": Foreign("the model's own folder is saved"),
    "auto_mapping": Foreign("PEFT finds the class from task_type"),
    "qat_scheme": Foreign("training rounds no weights; a GGUF file of that type can be the base"),
    "peft_version": Foreign("it changes no adapter", neutral=ANYTHING),
    "runtime_config": Foreign("it changes no adapter", neutral=ANYTHING),
    "qalora_group_size": Foreign("QALoRA is not used", neutral=ANYTHING),
    "megatron_core": Foreign("Megatron is not used", neutral=ANYTHING),
    **dict.fromkeys(_OTHER_METHODS, Foreign("use plain LoRA", (None, False))),
}

# get_peft_model of Unsloth takes these beside LoraConfig's
ATTACHING = LORA | {
    "temporary_location": Foreign("nothing is written", neutral=ANYTHING),
    "finetune_vision_layers": Foreign("only the text model is loaded; use False", (False, None)),
    "finetune_language_layers": Foreign("nothing else is trained; use True", (True, None)),
    "finetune_attention_modules": Foreign(_LINEARS, (True, None)),
    "finetune_mlp_modules": Foreign(_LINEARS, (True, None)),
}

# prepare_model_for_kbit_training of PEFT
_RECOMPUTATION = Foreign("get_peft_model(use_gradient_checkpointing=...) decides", neutral=ANYTHING)
PREPARING = {
    "use_gradient_checkpointing": _RECOMPUTATION,
    "gradient_checkpointing_kwargs": _RECOMPUTATION,
}

# get_peft_model of PEFT
ATTACHING_CONFIG = {
    "adapter_name": Foreign("a model has one adapter, 'default'", (None, "default")),
    "mixed": Foreign("a model has one adapter", (False,)),
    "autocast_adapter_dtype": Foreign("adapters are always in float32", neutral=ANYTHING),
    "low_cpu_mem_usage": Foreign("an adapter is small", neutral=ANYTHING),
    "revision": Foreign("the model's own folder is saved"),
}

# load_adapter of PEFT
LOADING_ADAPTER = ATTACHING_CONFIG | {
    "model_id": Renamed("folder"),
    "is_trainable": Foreign("an adapter is always trainable", neutral=ANYTHING),
    "torch_device": Foreign("the adapter goes to the model's device"),
    "ephemeral_gpu_offload": Foreign("the adapter stays on the model's device", (False,)),
    "key_mapping": Foreign("names are PEFT's"),
}

_UPLOAD = Foreign("nothing is uploaded; use `hf upload` on the folder", (False, None))

# save_pretrained, save_pretrained_merged and save_pretrained_gguf
SAVING = {
    "save_directory": Renamed("folder"),
    "safe_serialization": Foreign("only safetensors are written, no pickled files", (True, None)),
    "push_to_hub": _UPLOAD,
    "token": _LOCAL,
    "private": _LOCAL,
    "tags": _LOCAL,
    "commit_message": _LOCAL,
    "is_main_process": Foreign("there is one process", (True,)),
    "state_dict": Foreign("the model's own weights are saved"),
    "save_function": Foreign("only safetensors are written", neutral=ANYTHING),
    "variant": Foreign("file names have no variant"),
    "save_peft_format": Foreign("adapters have PEFT's format", (True,)),
    "save_embedding_layers": Foreign("embeddings are frozen", ("auto", False)),
    "selected_adapters": Foreign("a model has one adapter, 'default'", (None, ["default"])),
    "path_initial_model_for_weight_conversion": Foreign("the base is never altered"),
    "temporary_location": Foreign("files go straight to their folder", neutral=ANYTHING),
    "maximum_memory_usage": Foreign("tensors are written one by one", neutral=ANYTHING),
    "datasets": _LOCAL,
}
ADAPTER_SAVING = SAVING | {"max_shard_size": Foreign("an adapter is one file", neutral=ANYTHING)}
GGUF_SAVING = SAVING | {
    "max_shard_size": Foreign("a GGUF file is one file", neutral=ANYTHING),
    "first_conversion": Foreign("weights are quantised without a file between"),
}

# a call of a model of transformers
CALLING = {
    "use_cache": Foreign("generate has a cache, and a call has none", neutral=ANYTHING),
    "return_dict": Foreign("the result has the attributes loss and logits", (True, None)),
    "output_hidden_states": Foreign("hidden states are not returned", (False, None)),
    "output_attentions": Foreign("attention weights are never computed", (False, None)),
    "logits_to_keep": Foreign("cut the logits yourself", (0, None)),
    "past_key_values": Foreign("pass the whole text; generate has a cache"),
    "inputs_embeds": Foreign("pass token ids"),
    "token_type_ids": Foreign("these models read none; leave it out"),
}

# attributes of a model's config that notebooks assign
CONFIG_ATTRIBUTES = {
    "use_cache": Foreign("generation has a cache, training has none", neutral=ANYTHING),
    "pretraining_tp": Foreign("a model runs on one device", (1,)),
}
