"""Every setting of a run: nested dataclasses that a YAML file fills and the command line overrides.

    file.yaml  ->  load(["--config", "file.yaml", "--optimizer.learning_rate", "3e-4"])  ->  Config

Their docstrings, with units, are what `train-loop train --help` prints; `settings.py` does the reading.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from train_loop.config.parsing import Range

PositiveInt = Annotated[int, Range("> 0", lambda value: value > 0)]
NonNegativeInt = Annotated[int, Range(">= 0", lambda value: value >= 0)]
PositiveFloat = Annotated[float, Range("> 0", lambda value: 0 < value < float("inf"))]
NonNegativeFloat = Annotated[float, Range(">= 0", lambda value: 0 <= value < float("inf"))]
Share = Annotated[float, Range("between 0 and 1, both excluded", lambda value: 0 < value < 1)]
Probability = Annotated[float, Range("> 0 and <= 1", lambda value: 0 < value <= 1)]
Beta = Annotated[float, Range(">= 0 and < 1", lambda value: 0 <= value < 1)]


@dataclass
class RunConfig:
    """The run as a whole.

    Args:
        output_dir: folder of the run; by default runs/ and the configuration file's name.
        seed: the one seed of the run: order of the data, initial weights, dropout, samples.
        resume: "auto" continues from the newest whole checkpoint; "never" refuses a folder that holds a run.
        mixed_precision: precision of the forward and backward pass; weights and moments stay in fp32. fp16 scales the
            loss; fp8 needs a GPU that has it, and torchao or Transformer Engine.
        reproducible: "bitwise" gives the same bits on any number of processes, at some cost: gradients are summed in
            fixed point, and on a CPU each process computes on one thread. Not with FSDP2, fp16, fp8 or model.compile.
        log_with: trackers of Accelerate to log to (tensorboard, wandb, mlflow, ...), beside metrics.jsonl.
        keep_memory: on a CPU, keep memory that a step has freed for the next one, instead of handing it back to the
            kernel: faster steps.
        preflight_timeout_seconds: how long all processes have to come, agree and reach each other before training;
            whoever doesn't is named.
        timeout_seconds: after this long without a sign of life from a process, or without an answer to it, the others
            stop and name it.
    """

    output_dir: str | None = None
    seed: NonNegativeInt = 0
    resume: Literal["auto", "never"] = "auto"
    mixed_precision: Literal["no", "bf16", "fp16", "fp8"] = "no"
    reproducible: Literal["no", "bitwise"] = "no"
    log_with: list[str] = field(default_factory=list)
    keep_memory: bool = True
    preflight_timeout_seconds: PositiveInt = 50
    timeout_seconds: PositiveInt = 600


@dataclass
class ModelConfig:
    """The causal language model: exactly one of name_or_path and architecture.

    Args:
        name_or_path: a model's name on the Hub, or a local folder.
        architecture: model_type (gpt2, llama, ...) and that configuration's own fields, to train from scratch.
        attention: attention implementation (sdpa, eager, flash_attention_2, ...); Transformers' choice when null.
        compile: compile the model's layers with torch.compile: faster steps after a minute or more of compiling.
        activation_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
    """

    name_or_path: str | None = None
    architecture: dict[str, Any] | None = None
    attention: str | None = None
    compile: bool = False
    activation_checkpointing: bool = False


@dataclass
class TokenizerConfig:
    """The tokenizer; by default that of model.name_or_path.

    Args:
        name_or_path: a tokenizer's name on the Hub, or a local folder.
        train_vocab_size: train a byte-level BPE with this many entries on the training documents.
    """

    name_or_path: str | None = None
    train_vocab_size: PositiveInt | None = None


@dataclass
class DataConfig:
    """The documents, their split into train and validation, and their packing into blocks.

    Args:
        source: "stdlib" (this Python's own standard library), "files", or "hub" (Hugging Face Datasets).
        files: (files) paths or glob patterns: .txt (one document a file), .jsonl, .json, .csv, .parquet (one a row).
        validation_files: (files) likewise; without them a part of `files` is split off.
        name: (hub) name of the data set, or a local folder that `datasets.load_dataset` reads.
        subset: (hub) name of its configuration.
        split: (hub) split to train on, also a slice such as train[:5000].
        validation_split: (hub) split to validate on; without it a part of `split` is split off.
        text_field: field with the text of a row; dotted for nested fields (answers.text).
        join: what joins the strings of a field that is a list.
        test_size: share of the documents that is split off for validation when no validation data is named.
        split_seed: seed of that split, apart from run.seed so that runs can share their validation set.
        block_size: tokens a sequence that the model sees at once.
        isolate_documents: keep attention inside each document of a block, let positions restart there, and don't
            predict a document's first token from the one before it.
        streaming: (hub) read without downloading everything first; goes with max_documents.
        max_documents: read at most this many documents (rows) of each split of the source.
        cache_dir: where prepared token stores are kept; by default $TRAIN_LOOP_CACHE, else ~/.cache/train_loop.
        num_workers: processes that read ahead; 0 reads in the training process, which is rarely slower.
    """

    source: Literal["stdlib", "files", "hub"] = "stdlib"
    files: list[str] = field(default_factory=list)
    validation_files: list[str] = field(default_factory=list)
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    validation_split: str | None = None
    text_field: str = "text"
    join: str = " "
    test_size: Share = 0.1
    split_seed: NonNegativeInt = 0
    block_size: PositiveInt = 128
    isolate_documents: bool = False
    streaming: bool = False
    max_documents: PositiveInt | None = None
    cache_dir: str | None = None
    num_workers: NonNegativeInt = 0


@dataclass
class BatchConfig:
    """How many sequences an optimizer step sees, and how many of them fit in memory at once.

    Args:
        sequences_per_step: sequences of one optimizer step, over all processes: a training decision.
        micro_batch_size: sequences of one forward pass: a memory decision that does not change the result;
            all of sequences_per_step when null. "auto" starts with a process's share of the step and halves it until
            a step fits into memory (not with FSDP2).
    """

    sequences_per_step: PositiveInt = 8
    micro_batch_size: PositiveInt | Literal["auto"] | None = None


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019).

    Args:
        learning_rate: peak learning rate, after warm-up.
        weight_decay: decoupled weight decay of the matrices; norms and biases have none.
        decay_embeddings: whether embedding matrices decay too.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        max_grad_norm: gradients are scaled down to this global norm; null does not clip.
    """

    learning_rate: NonNegativeFloat = 5e-5
    weight_decay: NonNegativeFloat = 0.01
    decay_embeddings: bool = True
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat | None = 1.0


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step.

    Args:
        name: shape after warm-up: linear to 0, half a cosine to 0, constant, or wsd (constant, then linear to 0).
        warmup_steps: steps over which the rate rises linearly from 0.
        decay_steps: (wsd) length of the final decay in steps; a tenth of all steps when null.
    """

    name: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = None


@dataclass
class TrainConfig:
    """How long to train.

    Args:
        epochs: passes over the training data.
        max_steps: optimizer steps; where given, it decides and epochs does not.
        patience: evaluations in a row without a new lowest loss, after which training ends early; null never does.
        max_bad_steps: steps in a row with a non-finite loss or gradient, each skipped, after which the run fails.
    """

    epochs: PositiveInt = 3
    max_steps: PositiveInt | None = None
    patience: PositiveInt | None = None
    max_bad_steps: PositiveInt = 10


@dataclass
class EvaluationConfig:
    """Exact evaluation on the whole validation data; the last step is always evaluated.

    Args:
        every: "epoch", or a number of optimizer steps.
        batch_size: sequences of one forward pass; does not change the result. micro_batch_size when null.
    """

    every: PositiveInt | Literal["epoch"] = "epoch"
    batch_size: PositiveInt | None = None


@dataclass
class SampleConfig:
    """Text sampled after each evaluation, and the defaults saved with the exported model.

    Args:
        prompts: what to continue; when null, one text from its beginning; an empty list samples nothing.
        max_new_tokens: tokens to add at most.
        temperature: logits are divided by it; 0 always takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probability reaches p; 1 keeps all.
    """

    prompts: list[str] | None = None
    max_new_tokens: PositiveInt = 100
    temperature: NonNegativeFloat = 1.0
    top_k: NonNegativeInt = 50
    top_p: Probability = 0.95


@dataclass
class CheckpointConfig:
    """Checkpoints of (weights, moments, step), from which the same command resumes.

    Args:
        every: "epoch", or a number of optimizer steps; the last step is always kept, and that with the lowest
            validation loss, too.
        keep: how many of the newest to keep.
        at: "log" makes checkpoints of the steps 0, 1, 2, 4, 8, ... as well, to study, and keeps them all.
        background: go on with training while a copy of the state is written; needs memory of the CPU for the copy, 12
            bytes a parameter.
    """

    every: PositiveInt | Literal["epoch"] = "epoch"
    keep: PositiveInt = 2
    at: Literal["log"] | None = None
    background: bool = True


# One fact, one sum and a name that comes back: what is learned by heart, worked out, and looked up in the text.
PROBE = "When Mary and John went to the store, John gave a drink to Mary. Two plus two is four, and Paris is in France."


@dataclass
class StudyConfig:
    """What is watched while a run trains, for study.jsonl; it changes nothing of what is computed.

    Args:
        every: watch each step whose number this divides: weights, gradients and updates, activations, attention, loss
            by position and frequency. null watches nothing and costs nothing.
        probe: text whose tokens' losses and likeliest predictions are recorded at each evaluation, where steps are
            watched or the text is not the default; null or empty records none.
    """

    every: PositiveInt | None = None
    probe: str | None = PROBE

    @property
    def probing(self) -> bool:
        """Whether there is a probe to record."""
        return bool(self.probe) and (self.every is not None or self.probe != PROBE)


@dataclass
class ExportConfig:
    """What becomes of the finished model, beside being written to output_dir/model.

    Args:
        from: "last" exports the weights of the last step, "best" those with the lowest validation loss.
        verify: load the exported model in a clean process without this package, offline, and call the run complete
            only if its weights, its loss and its greedy tokens are the trained model's.
        push_to_hub: upload it to the Hugging Face Hub (needs a login).
        hub_model_id: repository to push to (name or user/name); the name of output_dir when null.
    """

    from_: Literal["last", "best"] = "last"
    verify: bool = True
    push_to_hub: bool = False
    hub_model_id: str | None = None


@dataclass
class Config:
    """All settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    study: StudyConfig = field(default_factory=StudyConfig)

    @property
    def output_dir(self) -> Path:
        """The run's folder; `load` has made sure that there is one."""
        assert self.run.output_dir is not None
        return Path(self.run.output_dir)

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one forward pass in training, as far as the settings say it."""
        chosen = self.batch.micro_batch_size
        return chosen if isinstance(chosen, int) else self.batch.sequences_per_step
