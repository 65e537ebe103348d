"""Bugs of training: denominators, optimizer, schedule, order, resume, plans."""

from mutations.mutation import Mutation

SPLIT = "test_trainer.py::test_split_of_a_step_into_micro_steps_changes_neither_loss_nor_gradients"
EVALUATION = "test_trainer.py::test_evaluation_loss_is_the_mean_over_all_trained_on_tokens"
ORDER = "test_trainer.py::test_order_of_samples_is_a_function_of_seed_and_epoch"
LIKE_TORCH = "test_optimizer.py::test_flat_adamw_moves_parameters_as_torch_adamw_does"
SCHEDULES = "test_optimizer.py::test_schedules_equal_those_of_transformers"
WAVES = "test_optimizer.py::test_waves_of_the_learning_rate_equal_those_of_transformers"
WARMUP = "test_optimizer.py::test_warmup_is_a_number_of_steps_or_a_share_of_all"
REPLACED = "test_optimizer.py::test_replaced_values_and_gradients_are_copied_into_the_buffer"
RESUMED = "test_resume.py::test_resumed_run_is_bit_identical_to_one_that_was_not_interrupted"
REFUSED = (
    "test_resume.py::"
    "test_resume_refuses_what_changes_the_order_and_warns_of_what_changes_the_mathematics"
)
CHECKPOINT = "test_checkpoint.py::test_checkpoint_brings_back_adapter_moments_and_state"
PADDING = (
    "test_micro_step.py::test_padding_follows_the_samples_and_stays_within_the_known_positions"
)
BUDGET = "test_plan.py::test_plans_stay_within_their_budget_and_more_memory_is_never_slower"
HOST = (
    "test_plan.py::"
    "test_activations_are_offloaded_if_that_saves_time_and_as_far_as_the_host_has_memory"
)
OVERFLOW = (
    "test_loss_scale.py::test_an_overflow_repeats_the_step_with_half_the_scale_and_loses_nothing"
)
IN_FLOAT32 = (
    "test_loss_scale.py::test_losses_and_gradient_norms_are_those_of_float32_up_to_rounding"
)
SCALE_RESUMED = (
    "test_loss_scale.py::"
    "test_a_resumed_run_has_the_scale_and_the_bits_of_one_that_was_not_interrupted"
)
LOOP_SCALED = (
    "test_precision.py::"
    "test_a_loop_in_float16_has_the_gradients_of_float32_whatever_scales_its_loss"
)
LAYER_BYTES = "test_memory_replay.py::test_the_planned_bytes_and_launches_are_those_of_the_layer"
LOSS_BYTES = "test_memory_replay.py::test_the_planned_peak_of_the_loss_is_that_of_the_code"
LAST_ANSWER = (
    "test_scored_answers.py::test_the_last_answer_is_the_reference_and_the_rest_is_the_prompt"
)
BEST_SCORE = (
    "test_scored_answers.py::test_a_score_chooses_the_best_checkpoint_and_survives_an_interruption"
)
GENERATION = "test_generate_in_training.py::test_a_step_begins_without_the_memory_of_generation"

TRAINING_BUGS = (
    Mutation(
        "a micro-step divides by its own targets",
        "minitune/training/loss_scale.py",
        "loss += micro_step(batch, denominator)",
        "loss += micro_step(batch, batch.targets)",
        (SPLIT,),
    ),
    Mutation(
        "an overflow in float16 updates the adapter",
        "minitune/training/loss_scale.py",
        "        return False\n",
        "        return True\n",
        (OVERFLOW,),
    ),
    Mutation(
        "the loss scale stays in the gradients",
        "minitune/training/loss_scale.py",
        "torch._foreach_mul_(gradients, factor)",
        "torch._foreach_mul_(gradients, 1 / targets)",
        (IN_FLOAT32,),
    ),
    Mutation(
        "a resumed run begins with a new loss scale",
        "minitune/training/checkpoint.py",
        "return cls(**numbers, unlogged=losses, loss_scale=scale)",
        "return cls(**numbers, unlogged=losses)",
        (SCALE_RESUMED,),
    ),
    Mutation(
        "gradients of a loop in float16 underflow",
        "minitune/model/autograd.py",
        "scale = layer_scale(dy) if dtype == torch.float16 else None",
        "scale = None",
        (LOOP_SCALED,),
    ),
    Mutation(
        "the evaluation loss is a mean over samples",
        "minitune/training/metrics.py",
        "targets = int(samples.targets.sum())",
        "targets = len(samples)",
        (EVALUATION,),
    ),
    Mutation(
        "the order of samples is the same in every epoch",
        "minitune/training/run_data.py",
        "np.random.default_rng((seed, epoch)).permutation(count)",
        "np.random.default_rng((seed, 0)).permutation(count)",
        (ORDER,),
    ),
    Mutation(
        "steps of an epoch overlap by one sample",
        "minitune/training/run_data.py",
        "first = step_in_epoch * self.size.units_per_step",
        "first = step_in_epoch * (self.size.units_per_step - 1)",
        (ORDER,),
    ),
    Mutation(
        "a last step of fewer samples is dropped",
        "minitune/training/run_data.py",
        "steps_per_epoch = math.ceil(units / units_per_step)",
        "steps_per_epoch = max(1, units // units_per_step)",
        ("test_trainer.py::test_steps_count_samples_and_with_packing_rows",),
    ),
    Mutation(
        "AdamW's epsilon lacks the correction of v",
        "kernels/adamw.py",
        "eps=float(eps * root)",
        "eps=float(eps)",
        ("test_optimizer.py::test_a_large_epsilon_counts_as_in_torch",),
    ),
    Mutation(
        "weight decay lacks the learning rate",
        "kernels/adamw.py",
        "decay=float(1 - lr * weight_decay)",
        "decay=float(1 - weight_decay)",
        (LIKE_TORCH,),
    ),
    Mutation(
        "the first moment's correction takes beta2",
        "kernels/adamw.py",
        "lr * root / (1 - beta1**step)",
        "lr * root / (1 - beta2**step)",
        (LIKE_TORCH,),
    ),
    Mutation(
        "a gradient of another tensor is bound without a copy",
        "minitune/training/optimizer.py",
        "                grad.copy_(p.grad)\n",
        "",
        (REPLACED,),
    ),
    Mutation(
        "the learning rate's warm-up begins one step ahead",
        "minitune/training/optimizer.py",
        "return step / max(1, warmup)",
        "return (step + 1) / max(1, warmup)",
        (SCHEDULES,),
    ),
    Mutation(
        "the cosine counts the warm-up's steps",
        "minitune/training/optimizer.py",
        "math.cos(math.pi * (step - warmup) / decay_steps)",
        "math.cos(math.pi * step / decay_steps)",
        (SCHEDULES,),
    ),
    Mutation(
        "restarts of the learning rate never restart",
        "minitune/training/optimizer.py",
        "phase = cycles * progress % 1.0 if progress < 1 else 1.0",
        "phase = progress if progress < 1 else 1.0",
        (WAVES,),
    ),
    Mutation(
        "a share of warm-up steps is rounded down",
        "minitune/training/optimizer.py",
        "math.ceil(total_steps * (warmup_steps or warmup_ratio))",
        "int(total_steps * (warmup_steps or warmup_ratio))",
        (WARMUP,),
    ),
    Mutation(
        "a resumed optimizer counts its updates from zero",
        "minitune/training/optimizer.py",
        "            moment.copy_(state[name])\n        self.steps = steps",
        "            moment.copy_(state[name])\n        self.steps = 0",
        (CHECKPOINT,),
    ),
    Mutation(
        "a resumed optimizer keeps its zero moments",
        "minitune/training/optimizer.py",
        "moment.copy_(state[name])",
        "moment.copy_(moment)",
        (CHECKPOINT,),
    ),
    Mutation(
        "a resumed run forgets the losses since the last line",
        "minitune/training/checkpoint.py",
        "return cls(**numbers, unlogged=losses, loss_scale=scale)",
        "return cls(**numbers, loss_scale=scale)",
        (RESUMED,),
    ),
    Mutation(
        "a resumed run may have another seed",
        "minitune/training/resume.py",
        'SAME_ORDER = ("seed", ',
        "SAME_ORDER = (",
        (REFUSED,),
    ),
    Mutation(
        "a resumed run may have another learning rate without a word",
        "minitune/training/resume.py",
        '    "learning_rate",\n',
        "",
        (REFUSED,),
    ),
    Mutation(
        "padding extends one of several samples",
        "minitune/training/micro_step.py",
        "single_sample = not positions[1:].eq(0).any()",
        "single_sample = True",
        (PADDING,),
    ),
    Mutation(
        "plans add the margin to the budget",
        "minitune/memory/search.py",
        "limit = budget.gpu * (1 - MARGIN)",
        "limit = budget.gpu * (1 + MARGIN)",
        (BUDGET,),
    ),
    Mutation(
        "plans may use more host memory than there is",
        "minitune/memory/search.py",
        "if memory.host_bytes(candidate) <= budget.host",
        "if memory.host_bytes(candidate) // 2 <= budget.host",
        (HOST,),
    ),
    Mutation(
        "the plan forgets the saved output of o",
        "minitune/memory/memory_model.py",
        "elements += shape.QKV + shape.D  # q, k, v; o",
        "elements += shape.QKV",
        (LAYER_BYTES,),
    ),
    Mutation(
        "the plan counts the loss's logits once for all rows",
        "minitune/memory/memory_model.py",
        "width = (7 if rows < N else 6) * shape.D",
        "width = 6 * shape.D",
        (LOSS_BYTES,),
    ),
    Mutation(
        "the first answer of a conversation is scored",
        "minitune/training/scored_answers.py",
        "begin = int(gaps[-1]) + 1",
        "begin = int(gaps[0]) + 1",
        (LAST_ANSWER,),
    ),
    Mutation(
        "the lowest score is the best one",
        "minitune/training/run_control.py",
        "return value > than if self.greater_is_better else value < than",
        "return value < than",
        (BEST_SCORE,),
    ),
    Mutation(
        "the memory of generation stays during a step",
        "minitune/training/micro_step.py",
        "        self.model.free_generation_memory()\n",
        "",
        (GENERATION,),
    ),
)
