"""The training loop. Read this first, in this order.

loop.py           epochs and steps; what is due after each step
step.py           one optimizer step
state.py          the types behind the one idea: TrainState, StepBatch, StepContext, Observer
objective.py      a batch -> its summed loss
accumulators.py   how gradients are added up
optimizer.py      decay groups, AdamW
schedule.py       the learning rate as a function of the step
evaluation.py     exact loss, perplexity, bits per byte and accuracy
"""
