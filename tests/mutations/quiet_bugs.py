"""Bugs of the streams, the lines and the logger."""

from mutations.mutation import Mutation

STREAMS = "test_streams.py::test_bars_and_lines_pass_by_a_stream_that_fails[failing]"
CALLS = "test_streams.py::test_every_public_call_works_whatever_the_streams_do[closed]"
LINES = "test_quiet.py::test_a_quiet_package_prints_nothing_and_logs_each_line_once"
WRAPPED = "test_quiet.py::test_logged_lines_are_not_wrapped_and_have_fitting_levels"
SIGNAL = "test_quiet.py::test_a_signal_is_told_by_the_last_line_only"
DESCRIPTOR = "test_streams.py::test_loading_leaves_a_descriptor_alone_that_was_no_stderr"
CODEC = "test_streams.py::test_lines_are_ascii_for_an_encoding_that_does_not_exist"
DELETED = "test_streams.py::test_bars_and_lines_pass_by_a_stream_that_fails[deleted isatty]"
WITHOUT = "test_streams.py::test_commands_work_without_a_stream[stderr]"
ONCE = "test_quiet.py::test_a_check_before_and_after_writing_a_file_warns_once"
COMMAND = "test_quiet.py::test_quiet_commands_print_results_on_stdout_and_nothing_else"

QUIET_BUGS = (
    Mutation(
        "a stream that fails ends the work",
        "minitune/streams.py",
        "with contextlib.suppress(Exception):\n                self._stream.write",
        "with contextlib.suppress(OSError):\n                self._stream.write",
        (STREAMS,),
    ),
    Mutation(
        "a deleted window ends the work",
        "minitune/streams.py",
        "except Exception:  # an object without isatty",
        "except (AttributeError, OSError, ValueError):  # an object without isatty",
        (DELETED,),
    ),
    Mutation(
        "an unknown encoding loses every line",
        "minitune/streams.py",
        'return "ascii"',
        "return encoding",
        (CODEC,),
    ),
    Mutation(
        "lines for a person go to stdout if there is no stderr",
        "minitune/progress.py",
        "print(text, end=end, file=LenientStream(sys.stderr), flush=True)",
        "print(text, end=end, file=sys.stderr, flush=True)",
        (WITHOUT,),
    ),
    Mutation(
        "a streamer writes to a closed stdout",
        "minitune/data/text_streamer.py",
        "file=LenientStream(sys.stdout), flush=True",
        "flush=True",
        (CALLS,),
    ),
    Mutation(
        "a quiet package prints the number of parameters",
        "minitune/language_model.py",
        "        print_result(\n",
        "        print(\n",
        (LINES,),
    ),
    Mutation(
        "logged lines stay wrapped",
        "minitune/progress.py",
        're.sub(r"\\n +", " ", text).split',
        "text.split",
        (WRAPPED,),
    ),
    Mutation(
        "a quiet run tells a signal on stderr",
        "minitune/progress.py",
        "not in (Output.NONE, Output.LOG)",
        "not in (Output.NONE,)",
        (SIGNAL,),
    ),
    Mutation(
        "loading redirects a descriptor of another file",
        "minitune/data/tokenization/library_errors.py",
        "if sys.__stderr__ is None:",
        "if sys is None:",
        (DESCRIPTOR,),
    ),
    Mutation(
        "a written file is warned of again",
        "minitune/gguf/verify.py",
        "warns=False",
        "warns=True",
        (ONCE,),
    ),
    Mutation(
        "the flag --quiet outlives its command",
        "minitune/config/cli/running.py",
        "        quiet(was_quiet)\n",
        "        quiet(is_quiet())\n",
        (COMMAND,),
    ),
)
