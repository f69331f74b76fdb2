"""The learning rate as a function of the step."""

import math

from train_loop.config.schema import ScheduleConfig


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The learning rate of step `step`, counted from 0, out of `total_steps`.

    The shapes are those of Transformers' schedules: the first step of a warm-up has rate 0, and linear and cosine would
    reach 0 one step after the last. wsd (warm-up, stable, decay): Hu et al., "MiniCPM", 2024.
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * step / warmup
    remaining = (total_steps - step) / max(1, total_steps - warmup)
    if schedule.name == "linear":
        return peak * max(0.0, remaining)
    if schedule.name == "cosine":
        return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * (1 - remaining))))
    if schedule.name == "wsd":
        decay = schedule.decay_steps or max(1, total_steps // 10)
        return peak * min(1.0, max(0, total_steps - step) / decay)
    return peak
