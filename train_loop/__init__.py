"""train_loop: a causal-language-model training loop to read, to trust and to run anywhere.

The one idea: the state of a run is (weights, optimizer moments, step). Everything else, the order of the
data, the dropout masks, the learning rate, is a pure function of (configuration, seed, step).

Where to start reading: `loop.py` (the run on one screen), `step.py` (one optimizer step on another),
`data/order.py` (which tokens a step sees), `objective.py` (the loss).
"""

__version__ = "0.1.0"
