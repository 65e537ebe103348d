"""The methods of a tokenizer that notebooks call, under transformers' names and arguments.

Two results differ from transformers on purpose:

- A text that begins with the BOS gets no second one.
- apply_chat_template returns a list of ids unless tensors are asked for, as in transformers 4. With
  return_tensors="pt" it returns the encoding of transformers 5, which serves as the tensor of
  transformers 4 too (batch_encoding.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minitune.config.foreign_arguments import ANYTHING, Foreign, foreign_arguments
from minitune.data.sharegpt import standard_message
from minitune.data.tokenization.batch_encoding import (
    BatchEncoding,
    as_tensors,
    padded_encoding,
    read_lengths,
)
from minitune.data.tokenization.special_tokens import SpecialTokens

ONE_TEXT = "pass one text, with both parts in it"
ENCODE_SPANS = "call tokenizer.encode_with_offsets(text), which returns ids and spans"
# Stands behind the message to continue while it is rendered; a template that trims the message
# takes the space.
CONTINUED = "\ue000 "


class TokenizerCalls(SpecialTokens):
    """Methods of a tokenizer that transformers' tokenizers have too."""

    @foreign_arguments(
        text_pair=Foreign(ONE_TEXT),
        text_target=Foreign("labels are made by the trainer; call the tokenizer on that text"),
        stride=Foreign("texts are cut at their end", (0, None)),
        is_split_into_words=Foreign("join the words with spaces", (False, None)),
        pad_to_multiple_of=Foreign("padding is never computed; leave it out"),
        return_token_type_ids=Foreign("these models read none", (None, False)),
        return_overflowing_tokens=Foreign("encode the text in parts", (False, None)),
        return_special_tokens_mask=Foreign("compare with all_special_ids", (False, None)),
        return_offsets_mapping=Foreign(ENCODE_SPANS, (False, None)),
        return_length=Foreign("use attention_mask.sum(-1)", (False, None)),
        verbose=Foreign("nothing is printed", ANYTHING),
    )
    def __call__(
        self,
        text: str | Iterable[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> BatchEncoding:
        """Return input_ids and attention_mask of one text or of several.

        padding, truncation, max_length: as in transformers; batch_encoding.py says how.
        padding_side: None takes the tokenizer's.
        return_tensors: "pt" gives tensors (B, T); None gives lists, which are flat for one text.

        Raises: ValueError if an argument is wrong, or texts of several lengths become a tensor.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is {return_tensors!r}; choose 'pt', or leave it out")
        texts = [text] if isinstance(text, str) else _texts(text)
        lengths = read_lengths(padding, truncation, max_length, self.model_max_length)
        rows = [
            self._with_special_tokens(ids, add_special_tokens, lengths.longest)
            for ids in self.encode_batch(texts)
        ]
        side = self.padding_side if padding_side is None else padding_side
        encoding = padded_encoding(rows, lengths.padded, self.pad_token_id, side)
        if return_attention_mask is False:
            del encoding["attention_mask"]
        if return_tensors == "pt":
            return as_tensors(encoding)
        if isinstance(text, str):
            return BatchEncoding({key: rows[0] for key, rows in encoding.items()})
        return encoding

    def _with_special_tokens(
        self, ids: list[int], add_special_tokens: bool, longest: int | None
    ) -> list[int]:
        """Return the ids of a text with special tokens around it, cut to `longest` tokens."""
        prefix, suffix = self.special_tokens_around(ids) if add_special_tokens else ([], [])
        if longest is not None:
            room = max(0, longest - len(prefix) - len(suffix))
            cut = max(0, len(ids) - room)
            ids = ids[cut:] if self.truncation_side == "left" else ids[: len(ids) - cut]
        return [*prefix, *ids, *suffix]

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        *,
        return_tensors: str | None = None,
        **call_arguments: Any,
    ) -> Any:
        """Return the ids of a text: a list, or a tensor (1, T) with return_tensors="pt".

        add_special_tokens: add the special tokens that this tokenizer puts around a text, such as
            the BOS, unless the text begins or ends with them.
        call_arguments: truncation, max_length and others, as in a call of the tokenizer.
        """
        if not isinstance(text, str):
            raise ValueError(f"encode takes one text, not {text!r:.60}; call tokenizer(texts)")
        if return_tensors is None and not call_arguments:
            ids, _ = self.encode_with_offsets(text)
            return self._with_special_tokens(ids, add_special_tokens, None)
        return self(
            text,
            add_special_tokens=add_special_tokens,
            return_tensors=return_tensors,
            **call_arguments,
        )["input_ids"]

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """Return the text of ids, or a list of texts if the ids are nested.

        token_ids: an id, a list, an array or a tensor.

        Raises: ValueError for clean_up_tokenization_spaces=True.
        """
        if clean_up_tokenization_spaces:
            raise ValueError(
                "clean_up_tokenization_spaces=True is not supported: it removes spaces that the "
                "tokens hold; leave it out"
            )
        ids = _plain(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], list):
            return [self._backend.decode(row, skip_special_tokens) for row in ids]
        return self._backend.decode(ids, skip_special_tokens)

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """Return the text of each list of ids, as `decode`."""
        rows = _plain(sequences)
        texts = self.decode(rows, skip_special_tokens, clean_up_tokenization_spaces) if rows else []
        return [texts] if isinstance(texts, str) else texts

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """Return the tokens of a text as the vocabulary spells them."""
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens))

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """Return the id of a token, or a list of ids; that of unk_token if a token is unknown."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self.token_to_id(tokens)
        return self.unk_token_id if index is None else index

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return the token of an id as the vocabulary spells it, or a list of tokens."""
        ids = _plain(ids)
        if isinstance(ids, int):
            return self.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self.id_to_token(index) for index in ids if index not in skipped]

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token, added tokens included."""
        tokens = ((self.id_to_token(index), index) for index in range(self.id_count))
        return {token: index for token, index in tokens if token is not None}

    @foreign_arguments(
        chat_template=Foreign("assign the Jinja text to tokenizer.chat_template"),
        return_assistant_tokens_mask=Foreign(
            "trainer.train_dataset[i]['labels'] shows the trained tokens", (False, None)
        ),
        sanitize_control_tokens=Foreign("check the texts first", (False, None)),
        tokenizer_kwargs=Foreign("pass the arguments themselves", (None, {})),
    )
    def apply_chat_template(
        self,
        conversation: Sequence,
        tools: list | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool | None = None,
        **template_kwargs: Any,
    ) -> Any:
        """Return a conversation, or each of several ones, as the model sees it.

        conversation: messages of role and content, or of from and value; or lists of messages.
        add_generation_prompt: end with the beginning of an answer.
        continue_final_message: end with the last message, without its end of turn.
        tokenize: False returns the text.
        return_tensors: "pt" returns an encoding of tensors (B, T), None a list of ids.
        return_dict: True returns an encoding, False ids; None does as `return_tensors` says.
        template_kwargs: further variables for the template, such as enable_thinking=False.

        Raises: ValueError if a message has a wrong form or the template refuses it; TypeError if
            the template reads no variable of that name.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "continue_final_message continues an answer, and add_generation_prompt begins one; "
                "keep one of them"
            )
        first = conversation[0] if conversation and isinstance(conversation, Sequence) else None
        is_batch = isinstance(first, list | tuple)
        render = self._continued if continue_final_message else self._rendered
        texts = [
            render(messages, tools, add_generation_prompt, **template_kwargs)
            for messages in (conversation if is_batch else [conversation])
        ]
        text = texts if is_batch else texts[0]
        if not tokenize:
            return text
        encoding = self(
            text,
            add_special_tokens=False,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
        )
        as_encoding = return_tensors is not None if return_dict is None else return_dict
        return encoding if as_encoding else encoding["input_ids"]

    def _rendered(
        self, messages: Sequence, tools: list | None, prompts: bool, **template_kwargs: Any
    ) -> str:
        """Return one conversation as text; `prompts` adds the beginning of an answer."""
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise ValueError(
                f"a conversation is {messages!r:.60}; expected a list of messages, such as "
                '[{"role": "user", "content": "..."}]'
            )
        if any(map(callable, tools or ())):
            raise ValueError(
                "tools are functions; write each as its JSON schema, "
                '{"type": "function", "function": {"name": ..., "parameters": ...}}'
            )
        messages = [standard_message(message) for message in messages]
        return self.template.render(messages, prompts, tools, **template_kwargs)

    def _continued(self, messages: Sequence, *arguments: Any, **template_kwargs: Any) -> str:
        """Return one conversation as text, up to the end of its last message's content."""
        *before, last = map(standard_message, messages or [{}])
        if not isinstance(last.get("content"), str):
            raise ValueError("continue_final_message needs a last message with a text to continue")
        marked = [*before, {**last, "content": last["content"] + CONTINUED}]
        rendered = self._rendered(marked, *arguments, **template_kwargs)
        text, mark, behind = rendered.rpartition(CONTINUED.strip())
        if not mark:
            raise ValueError("the chat template leaves out the message that is to be continued")
        return text if behind.startswith(" ") else text.rstrip()


def _texts(texts: Any) -> list[str]:
    """Return several texts as a list.

    Raises: ValueError if they are no texts.
    """
    found = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, Mapping) else None
    if found is None or not all(isinstance(text, str) for text in found):
        raise ValueError(f"a tokenizer takes a text or a list of texts, not {texts!r:.60}")
    return found


def _plain(ids: Any) -> Any:
    """Return ids as an int, a list of ints, or a list of lists.

    Raises: ValueError if an id is no number, or negative.
    """
    if isinstance(ids, Mapping):
        ids = ids["input_ids"]
    if hasattr(ids, "tolist"):  # tensors, arrays and their numbers
        ids = ids.tolist()
    if isinstance(ids, int) and ids >= 0:
        return ids
    if isinstance(ids, str | int) or not isinstance(ids, Iterable):
        raise ValueError(
            f"a token id is {ids!r:.60}, expected a number from 0 on; labels of -100 mark tokens "
            "that are not trained on, so leave them out"
        )
    return [_plain(item) for item in ids]
