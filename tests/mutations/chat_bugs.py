"""Deliberate bugs of the command generate: its chat, its files, the end of turn."""

from mutations.mutation import Mutation

HISTORY = "minitune/commands/chat_history.py"
FILE = "minitune/commands/answer_file.py"
ANSWERING = "minitune/commands/answering.py"
TALK = "test_chat.py::test_a_chat_answers_each_question_behind_the_conversation"
SIDES = "test_chat.py::test_both_sides_answer_and_the_adapter_goes_on"
ROOM = "test_chat.py::test_the_oldest_turns_are_left_out_by_name_when_the_context_is_full"
STOPPED = "test_chat.py::test_ctrl_c_stops_an_answer_and_keeps_the_chat"
RECORDS = "test_answer_file.py::test_each_record_gets_the_answer_to_its_conversation"
RESUMED = "test_answer_file.py::test_a_stopped_run_goes_on_behind_its_last_answer"
NULLS = "test_prompt_records.py::test_a_prompt_is_the_trained_text_up_to_the_last_answer"
END = "test_end_of_turn.py::test_generation_stops_at_the_end_of_turn_and_a_warning_says_so"
FOLLOWS = "test_end_of_turn.py::test_generation_follows_a_template_that_is_set_after_loading"

CHAT_BUGS = (
    Mutation(
        "a question is asked without the conversation",
        HISTORY,
        "for turn in self.turns:",
        "for turn in self.turns[:0]:",
        (TALK,),
    ),
    Mutation(
        "the newest turn is left out of a full context",
        HISTORY,
        "self.turns.pop(0)",
        "self.turns.pop()",
        (ROOM,),
    ),
    Mutation(
        "the base answers with the adapter",
        ANSWERING,
        'settings["adapter"] = adapters',
        "pass",
        (SIDES,),
    ),
    Mutation(
        "Ctrl-C lets the answer run to its end",
        ANSWERING,
        "return bool(caught) or token in ends",
        "return token in ends",
        (STOPPED,),
    ),
    Mutation(
        "the answer of a record is a part of its prompt",
        "minitune/data/records/prompt_records.py",
        "        messages.pop()\n",
        "        break\n",
        (RECORDS,),
    ),
    Mutation(
        "a prompt loses the null values of a call",
        "minitune/data/records/prompt_records.py",
        "tokenizer.template.render_prompt(conversation)",
        "tokenizer.template.render(conversation.messages, True, conversation.tools)",
        (NULLS,),
    ),
    Mutation(
        "the draws of a record depend on its place in the chunk",
        FILE,
        "range(self._output.done, self._output.done + len(chunk))",
        "range(len(chunk))",
        (RESUMED,),
    ),
    Mutation(
        "a resumed run keeps the line that was cut",
        "minitune/commands/answer_output.py",
        "        file.truncate(end)\n        file.seek(end)\n",
        "        file.seek(0, 2)\n",
        (RESUMED,),
    ),
    Mutation(
        "generation runs on behind the template's end of turn",
        "minitune/data/tokenization/tokenizer.py",
        "            ids.append(self._template_end)\n",
        "            pass\n",
        (END,),
    ),
    Mutation(
        "generation keeps the end tokens of the first template",
        "minitune/api.py",
        "model.follow_ends(tokenizer)",
        "model.eos_token_ids = tokenizer.eos_token_ids",
        (FOLLOWS,),
    ),
)
