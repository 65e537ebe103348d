"""Answers of the model to fixed prompts during a run, for a person to read (greedy_answers.py)."""

from collections.abc import Sequence
from typing import Any

import torch

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.model.decoding.kv_cache import NoCacheRoom
from minitune.model.sampling import LogitsNotFinite
from minitune.progress import print_message
from minitune.training.greedy_answers import answer_texts, greedy_answers
from minitune.training.micro_step import MicroStep

ANSWER_TOKENS = 128  # at most


class SamplePrompts:
    """Texts of a user, without a system message, that the model answers now and then."""

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        max_seq_length: int,
        template_date: str | None,
    ):
        """Render the texts with the chat template, or take them as they are if there is none.

        template_date: the day that the template writes.

        Raises: ValueError if a text is empty or leaves no room for an answer.
        """
        self.texts, self._tokenizer = texts, tokenizer
        self._prompts = [self._encode(text, template_date) for text in texts]
        for text, prompt in zip(texts, self._prompts, strict=True):
            if not 0 < len(prompt) < max_seq_length:
                raise ValueError(
                    f"sample_prompts: {text!r:.60} has {len(prompt):,} tokens; expected at least 1 "
                    f"and fewer than max_seq_length, which is {max_seq_length:,}"
                )
        self._limits = [min(ANSWER_TOKENS, max_seq_length - len(p)) for p in self._prompts]

    def _encode(self, text: str, template_date: str | None) -> list[int]:
        """Return the token ids of a prompt."""
        if self._tokenizer.chat_template is None:
            return self._tokenizer.encode(text)
        template = self._tokenizer.template.on(template_date)
        rendered = template.render([{"role": "user", "content": text}], True)
        return self._tokenizer.encode(rendered, add_special_tokens=False)

    def record(self, micro_step: MicroStep, step: int, show_bar: bool) -> dict[str, Any] | None:
        """Return the record of a step's answers.

        None, with a warning, if memory runs out or if the logits are not finite.
        """
        try:
            return {"step": step, "samples": self.answers(micro_step, show_bar)}
        except (torch.OutOfMemoryError, MemoryError, NoCacheRoom):
            reason = "out of memory"
        except LogitsNotFinite as error:
            reason = str(error)
        print_message("warning", f"no answers to sample_prompts at step {step}: {reason}")
        return None

    def answers(self, micro_step: MicroStep, show_bar: bool = True) -> list[dict[str, str]]:
        """Return {"prompt", "answer"} of each text.

        Raises: torch.OutOfMemoryError, MemoryError or NoCacheRoom if memory runs out;
            LogitsNotFinite if the logits are not finite.
        """
        ends = self._tokenizer.eos_token_ids
        answers = greedy_answers(
            micro_step.model, self._prompts, self._limits, ends, micro_step, show_bar
        )
        texts = answer_texts(answers, ends, self._tokenizer)
        return [
            {"prompt": prompt, "answer": text}
            for prompt, text in zip(self.texts, texts, strict=True)
        ]
