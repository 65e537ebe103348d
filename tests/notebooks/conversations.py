# A model learns to answer in the style of some conversations. The names are those of the usual
# fine-tuning notebooks; only the imports name minitune.

# %% Imports
from minitune import (
    DataCollatorForSeq2Seq,
    FastLanguageModel,
    SFTConfig,
    SFTTrainer,
    TextStreamer,
    get_chat_template,
    is_bfloat16_supported,
    standardize_sharegpt,
    train_on_responses_only,
)

# %% The base model
max_seq_length = 256
dtype = None  # chosen by the device
load_in_4bit = True

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="models/base",
    max_seq_length=max_seq_length,
    dtype=dtype,
    load_in_4bit=load_in_4bit,
    load_in_8bit=False,
    full_finetuning=False,
    token=None,
)

# %% The adapter
model = FastLanguageModel.get_peft_model(
    model,
    r=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)
model.print_trainable_parameters()

# %% The data: conversations in the form of ShareGPT become texts
from datasets import load_dataset

tokenizer = get_chat_template(tokenizer, chat_template="chatml")


def formatting_prompts_func(examples):
    texts = [
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        for turns in examples["conversations"]
    ]
    return {"text": texts}


dataset = load_dataset("json", data_files="conversations.jsonl", split="train")
dataset = standardize_sharegpt(dataset)
dataset = dataset.map(formatting_prompts_func, batched=True)
dataset[3]["conversations"], dataset[3]["text"]

# %% The trainer
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=max_seq_length,
    data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer),
    dataset_num_proc=2,
    packing=False,
    args=SFTConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        warmup_steps=2,
        max_steps=4,
        learning_rate=1e-2,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir="outputs",
        report_to="none",
    ),
)

# %% Only the answers are trained on
trainer = train_on_responses_only(
    trainer,
    instruction_part="<|im_start|>user\n",
    response_part="<|im_start|>assistant\n",
)

# %% One sample, and the part of it that is trained on
tokenizer.decode(trainer.train_dataset[3]["input_ids"])

# %%
space = tokenizer(" ", add_special_tokens=False).input_ids[0]
trained = tokenizer.decode(
    [space if label == -100 else label for label in trainer.train_dataset[3]["labels"]]
)

# %% Training
trainer_stats = trainer.train()
print(f"{trainer_stats.metrics['train_runtime']} seconds, loss {trainer_stats.training_loss}")

# %% An answer
FastLanguageModel.for_inference(model)
messages = [{"role": "user", "content": "3 lamps to Oslo"}]
inputs = tokenizer.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_tensors="pt"
).to("cpu")
outputs = model.generate(
    input_ids=inputs, max_new_tokens=16, use_cache=True, temperature=1.5, min_p=0.1
)
answers = tokenizer.batch_decode(outputs)

# %% The same, word by word
text_streamer = TextStreamer(tokenizer, skip_prompt=True)
_ = model.generate(
    input_ids=inputs,
    streamer=text_streamer,
    max_new_tokens=16,
    use_cache=True,
    temperature=1.5,
    min_p=0.1,
)

# %% Files
model.save_pretrained("lora_model")
tokenizer.save_pretrained("lora_model")
model.save_pretrained_merged("model_16bit", tokenizer, save_method="merged_16bit")
model.save_pretrained_merged("model_lora", tokenizer, save_method="lora")
model.save_pretrained_gguf("model_gguf", tokenizer, quantization_method=["q8_0", "f16"])

# %% Loading the adapter again
if True:
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name="lora_model",
        max_seq_length=max_seq_length,
        dtype=dtype,
        load_in_4bit=load_in_4bit,
    )
    FastLanguageModel.for_inference(model)
inputs = tokenizer.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_tensors="pt"
)
reloaded = tokenizer.batch_decode(model.generate(input_ids=inputs, max_new_tokens=16))
