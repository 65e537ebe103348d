"""A run that has everything that a report shows."""

from training_runs import RECORDS, make_smallest_model, new_trainer

SETTINGS = {
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "sample_prompts": ("a lamp", "<b>"),
}


def train_reported_run(folder):
    """Return a trainer of 4 steps with an evaluation and sample answers at each second one."""
    model = make_smallest_model(folder / "model")
    trainer = new_trainer(model, folder / "run", RECORDS[:5], **SETTINGS)
    trainer.train()
    return trainer
