"""Settings of transformers' TrainingArguments and TRL's SFTConfig that SFTConfig does not have.

A setting is accepted with the values that ask for nothing here, and refused with any other value.
Settings that change only speed, memory or the display take every value.
"""

from enum import Enum
from typing import Any

from minitune.config.foreign_arguments import ANYTHING, Foreign, Renamed, Replaced

OFF = (None, False)
ONE_PROCESS = Foreign("one process trains on one device", neutral=ANYTHING)
NO_LOADER = Foreign("the samples are tokens in memory; there is no loader", neutral=ANYTHING)
NO_PADDING = Foreign("samples are packed without padding", neutral=ANYTHING)
NO_HUB = Foreign("nothing is uploaded, so this changes nothing", neutral=ANYTHING)
NO_LOGGER = Foreign(
    "minitune.quiet() sends lines to logging.getLogger('minitune'), which has a level",
    neutral=ANYTHING,
)
NO_TRACKER = Foreign("it names a run of a service that nothing reports to", neutral=ANYTHING)
OTHER_TRACKER = Foreign("pass a callback that reports there: SFTTrainer(callbacks=[...])")
ONE_DEVICE = Foreign("one GPU or the CPU trains; leave it out", neutral=(None, False, "", [], {}))
ALWAYS_SO = Foreign("this is always so", neutral=ANYTHING)
OWN_KERNELS = Foreign("the project's own kernels run in every case", neutral=ANYTHING)
ONLY_SCRIPTS = Foreign("only example scripts read it", neutral=ANYTHING)
RECOMPUTATION = Foreign(
    "it changes the memory and not the result; get_peft_model(use_gradient_checkpointing=...) "
    "decides",
    neutral=ANYTHING,
)
ON_CPU = Foreign('pass FastLanguageModel.from_pretrained(..., device="cpu") instead', neutral=OFF)
NO_COMPILER = Foreign(
    "steps already run own kernels, on a GPU as CUDA graphs; leave it out", neutral=OFF
)
SCORES_ONLY = Foreign(
    "evaluation computes the loss, and the scores of score_answer", neutral=(None, False, [])
)
SCHEDULE_ARGUMENTS = {"num_cycles": "lr_scheduler_cycles"}  # transformers' name -> the field


def _schedule_settings(values: Any) -> dict[str, Any]:
    """Return the settings that lr_scheduler_kwargs stand for.

    Raises: ValueError if one of them is not supported.
    """
    unknown = [name for name in values or {} if name not in SCHEDULE_ARGUMENTS]
    if unknown:
        raise ValueError(
            f"lr_scheduler_kwargs has {unknown[0]!r}; known is num_cycles, of "
            "lr_scheduler_type 'cosine_with_restarts'"
        )
    return {SCHEDULE_ARGUMENTS[name]: value for name, value in (values or {}).items()}


def plain_word(value: Any) -> Any:
    """Return a member of a library's Enum as its value, and any other value as it is."""
    return value.value if isinstance(value, Enum) else value


FOREIGN_SETTINGS: dict[str, Foreign | Renamed | Replaced] = {
    # ---- other names
    "evaluation_strategy": Renamed("eval_strategy"),
    "max_seq_length": Renamed("max_length"),
    "overwrite_output_dir": Renamed("overwrite"),
    "per_gpu_train_batch_size": Renamed("per_device_train_batch_size"),
    "lr_scheduler_kwargs": Replaced(_schedule_settings),
    # ---- speed and memory only
    "gradient_checkpointing": RECOMPUTATION,
    "gradient_checkpointing_kwargs": RECOMPUTATION,
    "activation_checkpointing": RECOMPUTATION,
    "activation_checkpointing_kwargs": RECOMPUTATION,
    "activation_offloading": RECOMPUTATION,
    "per_device_eval_batch_size": Foreign(
        "evaluation packs as many samples as micro_step_tokens allows", neutral=ANYTHING
    ),
    "per_gpu_eval_batch_size": NO_PADDING,
    "eval_accumulation_steps": ALWAYS_SO,
    "eval_do_concat_batches": NO_LOADER,
    "auto_find_batch_size": ALWAYS_SO,  # a lack of memory makes the plan of a step smaller
    "torch_empty_cache_steps": OWN_KERNELS,
    "use_liger_kernel": OWN_KERNELS,
    "use_liger": OWN_KERNELS,
    "liger_kernel_config": OWN_KERNELS,
    "use_cache": OWN_KERNELS,
    "torch_compile": NO_COMPILER,
    "torch_compile_backend": NO_COMPILER,
    "torch_compile_mode": NO_COMPILER,
    "tf32": Foreign("float32 stays exact; for speed load the model in bfloat16", neutral=OFF),
    "bf16_full_eval": Foreign("evaluation computes as training does; leave it out", neutral=OFF),
    "fp16_full_eval": Foreign("evaluation computes as training does; leave it out", neutral=OFF),
    "half_precision_backend": OWN_KERNELS,
    "fp16_backend": OWN_KERNELS,
    "fp16_opt_level": OWN_KERNELS,
    # ---- data
    "dataset_num_proc": Foreign("tokenizing uses the cores that are free", neutral=ANYTHING),
    "dataset_batch_size": NO_LOADER,
    "dataset_kwargs": Foreign(
        "the shapes of records decide; the names in SFTConfig choose", neutral=(None, {})
    ),
    "dataloader_num_workers": NO_LOADER,
    "dataloader_pin_memory": NO_LOADER,
    "dataloader_persistent_workers": NO_LOADER,
    "dataloader_prefetch_factor": NO_LOADER,
    "dataloader_multiprocessing_context": NO_LOADER,
    "dataloader_in_order": NO_LOADER,
    "dataloader_drop_last": Foreign(
        "the last step of an epoch trains on the samples that are left", neutral=OFF
    ),
    "remove_unused_columns": Foreign(
        "a column is used, harmless, or refused by name (ignore_fields)", neutral=ANYTHING
    ),
    "length_column_name": NO_LOADER,
    "group_by_length": Foreign("nothing is padded, so it saves nothing; leave it out", neutral=OFF),
    "train_sampling_strategy": Foreign(
        "the order is random, from seed and epoch", neutral=("random",)
    ),
    "shuffle_dataset": Foreign("each epoch has its own random order", neutral=ANYTHING),
    "data_seed": Foreign("the order of the samples follows from seed; set seed"),
    "eval_packing": NO_PADDING,
    "padding_free": NO_PADDING,
    "pad_to_multiple_of": NO_PADDING,
    "pad_token": NO_PADDING,
    "packing_strategy": Foreign("rows hold whole samples, best fit first: 'bfd'", neutral=("bfd",)),
    "truncation_mode": Foreign(
        "long samples lose their end: 'keep_start'", neutral=("keep_start",)
    ),
    "eos_token": Foreign(
        "the end token is the tokenizer's; get_chat_template(tokenizer, ...) sets that of a "
        "chat template"
    ),
    "chat_template_path": Foreign("assign the template's text: tokenizer.chat_template = ..."),
    "label_names": Foreign("the labels are always 'labels'", neutral=(None, [], ["labels"])),
    # ---- the loss and the optimizer
    "label_smoothing_factor": Foreign(
        "the loss is the plain cross entropy; use 0", neutral=(0.0, 0)
    ),
    "loss_type": Foreign("the loss is the plain cross entropy", neutral=("nll", "chunked_nll")),
    "neftune_noise_alpha": Foreign(
        "no noise is added to the embeddings; against overfitting use weight_decay, fewer epochs, "
        "or load_best_model_at_end"
    ),
    "router_aux_loss_coef": Foreign("there are no mixtures of experts", neutral=(None, 0.0, 0)),
    "optim_args": Foreign("set adam_beta1, adam_beta2 and adam_epsilon", neutral=(None, "")),
    "optim_target_modules": Foreign("one optimizer trains the whole adapter"),
    "adafactor": Foreign('use optim="adamw_8bit" to save memory', neutral=OFF),
    "embedding_learning_rate": Foreign("embeddings are not trained; leave it out"),
    "average_tokens_across_devices": ONE_PROCESS,
    # ---- evaluation, logging, saving
    "eval_delay": Foreign("evaluations start with the first interval", neutral=(0, 0.0, None)),
    "batch_eval_metrics": SCORES_ONLY,
    "include_for_metrics": SCORES_ONLY,
    "include_inputs_for_metrics": SCORES_ONLY,
    "predict_with_generate": Foreign("score_answer generates and scores answers", neutral=OFF),
    "generation_max_length": Foreign("set eval_max_new_tokens, which counts new tokens only"),
    "generation_num_beams": Foreign("answers are greedy; leave it out", neutral=(None, 1)),
    "generation_config": Foreign("answers are greedy; set eval_max_new_tokens"),
    "prediction_loss_only": ALWAYS_SO,
    "eval_use_gather_object": ONE_PROCESS,
    "include_num_input_tokens_seen": Foreign("tokens are always counted", neutral=ANYTHING),
    "include_tokens_per_second": Foreign("tokens are always counted", neutral=ANYTHING),
    "logging_nan_inf_filter": Foreign(
        "a loss that is not finite always ends the run with an error", neutral=ANYTHING
    ),
    "skip_memory_metrics": Foreign("memory is measured without a cost", neutral=ANYTHING),
    "log_level": NO_LOGGER,
    "log_level_replica": NO_LOGGER,
    "log_on_each_node": ONE_PROCESS,
    "project": NO_TRACKER,
    "trackio_space_id": OTHER_TRACKER,
    "trackio_bucket_id": OTHER_TRACKER,
    "trackio_static_space_id": OTHER_TRACKER,
    "report": Foreign(
        "after train(), minitune.write_report(trainer.output) writes it", neutral=OFF
    ),
    "save_only_model": Foreign(
        "a checkpoint holds the optimizer, so that it can be continued; it is small", neutral=OFF
    ),
    "save_safetensors": Foreign("all weights are saved as safetensors", neutral=(None, True)),
    "save_on_each_node": ONE_PROCESS,
    "ignore_data_skip": Foreign("a resumed run continues with the next samples", neutral=OFF),
    "restore_callback_states_from_checkpoint": Foreign(
        "a resumed run always restores its callbacks", neutral=ANYTHING
    ),
    "enable_jit_checkpoint": Foreign("Ctrl-C saves a checkpoint; leave it out", neutral=OFF),
    "resume_from_checkpoint": Foreign("pass it to trainer.train(resume_from_checkpoint=...)"),
    "push_to_hub": Foreign("nothing is uploaded; upload the saved folder yourself", neutral=OFF),
    "hub_model_id": NO_HUB,
    "hub_token": NO_HUB,
    "hub_strategy": NO_HUB,
    "hub_private_repo": NO_HUB,
    "hub_always_push": NO_HUB,
    "hub_revision": NO_HUB,
    # ---- the model and the machine
    "model_init_kwargs": Foreign(
        "load the model with FastLanguageModel.from_pretrained and its arguments",
        neutral=(None, {}),
    ),
    "trust_remote_code": Foreign("no code of a model folder is run", neutral=ANYTHING),
    "full_determinism": Foreign(
        'pass FastLanguageModel.from_pretrained(..., attention="triton"); runs then repeat bit '
        "for bit",
        neutral=OFF,
    ),
    "use_cpu": ON_CPU,
    "no_cuda": ON_CPU,
    "use_mps_device": Foreign("the devices are cpu and cuda; leave it out", neutral=OFF),
    "jit_mode_eval": NO_COMPILER,
    "deepspeed": ONE_DEVICE,
    "fsdp": ONE_DEVICE,
    "fsdp_config": ONE_DEVICE,
    "accelerator_config": ONE_DEVICE,
    "parallelism_config": ONE_DEVICE,
    "local_rank": Foreign("one process trains; leave it out", neutral=(-1, 0)),
    "ddp_backend": ONE_PROCESS,
    "ddp_broadcast_buffers": ONE_PROCESS,
    "ddp_bucket_cap_mb": ONE_PROCESS,
    "ddp_find_unused_parameters": ONE_PROCESS,
    "ddp_static_graph": ONE_PROCESS,
    "ddp_timeout": ONE_PROCESS,
    "debug": Foreign("there is no debug mode", neutral=(None, "", [])),
    "do_train": ONLY_SCRIPTS,
    "do_eval": ONLY_SCRIPTS,
    "do_predict": ONLY_SCRIPTS,
}
