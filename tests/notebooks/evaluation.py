# A run is evaluated while it trains: it stops early and ends with its best checkpoint.

# %% The trainer loads the model itself
from minitune import EarlyStoppingCallback, LoraConfig, SFTConfig, SFTTrainer, TrainerCallback


class LossWatcher(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.seen.append((state.global_step, logs["loss"]))


watcher = LossWatcher()
trainer = SFTTrainer(
    model="models/base",
    train_dataset="train.jsonl",
    eval_dataset="held_out.jsonl",
    peft_config=LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules="all-linear",
    ),
    args=SFTConfig(
        output_dir="outputs",
        max_length=256,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        lr_scheduler_type="cosine_with_restarts",
        num_train_epochs=3,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        run_name="a-first-run",
        disable_tqdm=True,
        report_to="none",
    ),
    callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
)
trainer.add_callback(watcher)

# %% Before, during and after
before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()
trainer.state.log_history[-1]

# %% The history as a table
import pandas

history = pandas.DataFrame(trainer.state.log_history)
history[["step", "eval_loss"]].dropna()

# %% The result
trainer.save_model("best")
tokenizer = trainer.processing_class
tokenizer.save_pretrained("best")
