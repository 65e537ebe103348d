"""A run fixes the day that its chat template writes, so a run can be resumed after midnight."""

import datetime
import shutil
import tomllib
from types import SimpleNamespace

import pytest
from training_runs import adapter_bytes, make_smallest_model, new_trainer

from minitune import SFTConfig
from minitune.training import run_data

DATED = (
    "{{ strftime_now('%d %b %Y') }}|{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def set_today(monkeypatch, year, month, day):
    """Let a run start on a day."""
    today = datetime.date(year, month, day)
    clock = SimpleNamespace(date=SimpleNamespace(today=lambda: today))
    monkeypatch.setattr(run_data, "datetime", clock)


def test_a_run_continues_after_midnight_with_the_day_on_which_it_began(tmp_path, monkeypatch):
    folder = make_smallest_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(DATED, encoding="utf-8")
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    set_today(monkeypatch, 2024, 2, 29)
    new_trainer(folder, straight, **settings).train()
    shutil.copytree(straight, stopped)
    for name in ("checkpoint-4", "adapter"):
        shutil.rmtree(stopped / name)
    config = tomllib.loads((stopped / "config.toml").read_text(encoding="utf-8"))
    assert config["template_date"] == "2024-02-29"

    set_today(monkeypatch, 2024, 3, 1)
    trainer = new_trainer(folder, stopped, **settings)
    sample = trainer.data.train.samples[0]
    text = trainer.processing_class.decode(sample.input_ids, skip_special_tokens=False)
    assert "29 Feb 2024|" in text
    trainer.train(resume_from_checkpoint=True)
    assert adapter_bytes(stopped) == adapter_bytes(straight)


def test_a_new_run_takes_today_and_a_given_day_wins(tmp_path, monkeypatch):
    set_today(monkeypatch, 2025, 1, 2)
    assert run_data.with_template_date(SFTConfig()).template_date == "2025-01-02"
    (tmp_path / "config.toml").write_text('template_date = "2020-05-06"\n', encoding="utf-8")
    for settings, expected in (
        ({}, "2020-05-06"),
        ({"overwrite": True}, "2025-01-02"),
        ({"template_date": "2021-01-01"}, "2021-01-01"),
    ):
        config = SFTConfig(output_dir=tmp_path, **settings)
        assert run_data.with_template_date(config).template_date == expected


@pytest.mark.parametrize("content", ["template_date = 3\n", 'template_date = "x"\n', "= broken"])
def test_a_folder_without_a_day_does_not_decide_it(tmp_path, monkeypatch, content):
    set_today(monkeypatch, 2025, 1, 2)
    (tmp_path / "config.toml").write_text(content, encoding="utf-8")
    config = SFTConfig(output_dir=tmp_path)
    assert run_data.with_template_date(config).template_date == "2025-01-02"


def test_a_template_date_that_is_no_date_is_refused():
    with pytest.raises(ValueError, match="template_date is 'today'; write it as 2026-11-25"):
        SFTConfig(template_date="today")
