# A base model learns to follow instructions, written into one prompt text. The trainer's arguments
# stand in the form of older notebooks.

# %% The model with its adapter
from minitune import FastLanguageModel, SFTTrainer, TrainingArguments, is_bfloat16_supported

model, tokenizer = FastLanguageModel.from_pretrained("models/base", 256, None, True)
model = FastLanguageModel.get_peft_model(
    model, r=4, lora_alpha=8, lora_dropout=0, bias="none", use_gradient_checkpointing=True
)

# %% One text for each record
prompt_text = """Here is a task and what it is about. Do the task.

### Task:
{}

### About:
{}

### Result:
{}"""

EOS_TOKEN = tokenizer.eos_token


def formatting_prompts_func(examples):
    columns = examples["instruction"], examples["input"], examples["output"]
    return {"text": [prompt_text.format(*row) + EOS_TOKEN for row in zip(*columns)]}


from datasets import Dataset

rows = [
    {"instruction": "Name the city.", "input": f"{i} lamps to Oslo", "output": "Oslo"}
    for i in range(12)
]
dataset = Dataset.from_list(rows)
dataset = dataset.map(formatting_prompts_func, batched=True)

# %% Training
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=256,
    dataset_num_proc=2,
    packing=False,
    args=TrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=1,
        max_steps=3,
        learning_rate=2e-4,
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
trainer_stats = trainer.train()

# %% A prompt without its result
FastLanguageModel.for_inference(model)
inputs = tokenizer(
    [prompt_text.format("Name the city.", "7 lamps to Oslo", "")], return_tensors="pt"
).to("cpu")
outputs = model.generate(**inputs, max_new_tokens=8, use_cache=True)
answers = tokenizer.batch_decode(outputs)

# %% The same records through formatting_func
from minitune import SFTConfig

trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=rows,
    formatting_func=lambda row: prompt_text.format(*row.values()) + EOS_TOKEN,
    args=SFTConfig(max_steps=1, output_dir="outputs_2", report_to=[]),
)
trainer.train()
