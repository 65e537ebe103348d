"""Names that notebooks import and minitune lacks: the import says what to use instead.

    from minitune import ORPOTrainer    ImportError: ... only supervised fine-tuning ...

The package asks `missing_name` for each name that it does not define.
"""

import difflib
from collections.abc import Iterable

_SFT_ONLY = (
    "only supervised fine-tuning is done: keep the preferred answers as completions, and train on "
    "them with SFTTrainer"
)
_REWARDS = "no model is trained on rewards; SFTTrainer trains on answers that were chosen before"
_TEXT_ONLY = "only text models are trained; FastLanguageModel loads the text model of a folder"
_LOADING = "model, tokenizer = FastLanguageModel.from_pretrained(folder) loads both"
_ADAPTER = "FastLanguageModel.from_pretrained(adapter_folder) loads the base with its adapter"
_QUANTIZED = "FastLanguageModel.from_pretrained(..., load_in_4bit=True) quantises to NF4"
_SETTINGS = "pass the settings to model.generate, such as temperature=0.7"
_NO_COLLATOR = "samples are packed without padding; leave data_collator out"
_ANSWERS = "use train_on_responses_only(trainer, instruction_part=..., response_part=...)"
_QUIET = "minitune.quiet() sends lines to logging.getLogger('minitune'), and shows no bars"
_NO_VLLM = "there is no vLLM; use model.generate(input_ids=..., max_new_tokens=...)"

# The name -> what to use instead.
ABSENT_NAMES = {
    # ---- trainers and their settings
    **dict.fromkeys(("DPOTrainer", "DPOConfig", "PatchDPOTrainer"), _SFT_ONLY),
    **dict.fromkeys(("ORPOTrainer", "ORPOConfig", "CPOTrainer", "CPOConfig"), _SFT_ONLY),
    **dict.fromkeys(("KTOTrainer", "KTOConfig"), _SFT_ONLY),
    **dict.fromkeys(("GRPOTrainer", "GRPOConfig", "PatchFastRL"), _REWARDS),
    **dict.fromkeys(("PPOTrainer", "PPOConfig", "RewardTrainer", "RewardConfig"), _REWARDS),
    "Trainer": "use SFTTrainer, which takes records or input_ids with labels",
    "Seq2SeqTrainer": "use SFTTrainer, which takes records or input_ids with labels",
    "UnslothTrainer": "use SFTTrainer; embeddings are not trained",
    "UnslothTrainingArguments": "use SFTConfig; embeddings are not trained",
    # ---- models
    **dict.fromkeys(("FastVisionModel", "UnslothVisionDataCollator"), _TEXT_ONLY),
    **dict.fromkeys(("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig"), _LOADING),
    **dict.fromkeys(("PeftModel", "AutoPeftModelForCausalLM", "PeftConfig"), _ADAPTER),
    "BitsAndBytesConfig": _QUANTIZED,
    "setup_chat_format": 'use get_chat_template(tokenizer, "chatml")',
    # ---- data
    "DataCollatorForLanguageModeling": _NO_COLLATOR,
    "DataCollatorWithPadding": _NO_COLLATOR,
    "default_data_collator": _NO_COLLATOR,
    "DataCollatorForCompletionOnlyLM": _ANSWERS,
    "to_sharegpt": "make messages of role and content from the columns with dataset.map",
    "apply_chat_template": "use tokenizer.apply_chat_template, or pass messages to SFTTrainer",
    # ---- generation
    "GenerationConfig": _SETTINGS,
    "pipeline": "use model.generate(**tokenizer(prompt, return_tensors='pt'), max_new_tokens=64)",
    "SamplingParams": _NO_VLLM,
    "StoppingCriteria": "pass the ids of the end tokens to model.generate as eos_token_id",
    "StoppingCriteriaList": "pass the ids of the end tokens to model.generate as eos_token_id",
    # ---- small helpers
    "is_bf16_supported": "use is_bfloat16_supported",
    "set_seed": "SFTConfig(seed=...), get_peft_model(random_state=...) and generate(seed=...)",
    **dict.fromkeys(("logging", "set_verbosity_error", "disable_progress_bar"), _QUIET),
    "TaskType": 'write LoraConfig(task_type="CAUSAL_LM"), or leave it out',
}


def missing_name(name: str, known: Iterable[str]) -> Exception:
    """Return the error for a name that the package lacks.

    An AttributeError is what Python expects of a module. The statement `from minitune import`
    replaces its text, so a name with a remedy is an ImportError.

    known: the names that the package has.
    """
    if name in ABSENT_NAMES:
        return ImportError(f"minitune has no {name}: {ABSENT_NAMES[name]}", name="minitune")
    close = difflib.get_close_matches(name, list(known), n=2)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return AttributeError(f"minitune has no {name!r}{hint}")
