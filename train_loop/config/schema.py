"""All settings of a run: nested dataclasses that a YAML file fills and the command line overrides.

`train-loop train --help` prints their docstrings, which give the units. `config/load.py` reads them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from train_loop.config.parsing import Range

_POSITIVE = Range("> 0", lambda value: value > 0, most=10**15)
_NOT_NEGATIVE = Range(">= 0", lambda value: value >= 0, most=10**15)
PositiveInt = Annotated[int, _POSITIVE]
NonNegativeInt = Annotated[int, _NOT_NEGATIVE]
Seed = Annotated[int, _NOT_NEGATIVE._replace(most=2**64 - 1)]
Seconds = Annotated[int, _POSITIVE._replace(most=10**9)]  # 31 years; C++ counts nanoseconds in 64 bits
Tokens = Annotated[int, _POSITIVE._replace(most=2**24)]  # many times what blocks and vocabularies have
Processes = Annotated[int, _NOT_NEGATIVE._replace(most=1024)]
# In fp32, what is smaller becomes 0 sooner or later, and what is larger infinite.
PositiveFloat = Annotated[float, Range("> 0", lambda value: 0 < value < float("inf"), 1e-30, 1e30)]
NonNegativeFloat = Annotated[float, Range(">= 0", lambda value: 0 <= value < float("inf"), 1e-30, 1e30)]
Share = Annotated[float, Range("between 0 and 1, both excluded", lambda value: 0 < value < 1, 1e-12)]
Probability = Annotated[float, Range("> 0 and <= 1", lambda value: 0 < value <= 1)]
Beta = Annotated[float, Range(">= 0 and < 1", lambda value: 0 <= value < 1)]


@dataclass
class RunConfig:
    """The run as a whole.

    Args:
        output_dir: folder of the run; by default runs/ followed by the configuration file's name.
        seed: the only seed of the run, for the order of the data, initial weights, dropout and samples.
        resume: "auto" resumes from the newest whole checkpoint; "never" refuses a folder that already holds a run.
        mixed_precision: precision of the forward and backward pass; weights and moments stay in fp32. fp16 scales the
            loss; fp8 needs a GPU that supports it, and torchao or Transformer Engine.
        reproducible: "bitwise" gives the same bits on any number of processes, at some cost: gradients are summed in
            fixed point, and on a CPU each process uses one thread. It does not work with FSDP2, fp16, fp8 or
            model.compile.
        log_with: Accelerate trackers to log to (tensorboard, wandb, mlflow, ...), in addition to metrics.jsonl.
        keep_memory: on a CPU, keep the memory that a step has freed for the next step instead of returning it to the
            kernel, which makes steps faster.
        preflight_timeout_seconds: how long all processes have, before training, to report, agree and reach each other;
            a process that does not manage this is named.
        timeout_seconds: if a process gives no sign of life, or gets no answer, for this long, the other processes stop
            and name it.
    """

    output_dir: str | None = None
    seed: Seed = 0
    resume: Literal["auto", "never"] = "auto"
    mixed_precision: Literal["no", "bf16", "fp16", "fp8"] = "no"
    reproducible: Literal["no", "bitwise"] = "no"
    log_with: list[str] = field(default_factory=list)
    keep_memory: bool = True
    preflight_timeout_seconds: Seconds = 50
    timeout_seconds: Seconds = 600


@dataclass
class ModelConfig:
    """The causal language model: exactly one of name_or_path and architecture.

    Args:
        name_or_path: a model's name on the Hub, or a local folder.
        architecture: to train from scratch: model_type (gpt2, llama, ...) and that configuration's own fields, or the
            path of a config.json. Of a pasted config.json, names that mean nothing any more are left out.
        attention: attention implementation (sdpa, eager, flash_attention_2, ...); null leaves the choice to
            Transformers.
        compile: compile the model's layers, and the loss in bf16 on a GPU, with torch.compile, which makes steps faster
            after a minute or more of compiling.
        activation_checkpointing: what the backward pass computes again instead of keeping it, which takes less memory
            and more time. "full": each layer, for about a third more time. A number: every so many-th layer, beginning
            with the first. "attention": all of a layer but its matrix products with weights, that is, attention, norms,
            activation functions and dropout. (true means full, false none.)
        balance_weight: of the load-balancing loss, which keeps all experts of a mixture of experts in use; it is taken
            of each sequence in each layer, and is no part of the reported loss. null takes router_aux_loss_coef from
            the model's configuration if output_router_logits is true there, else 0; 0 balances nothing.
    """

    name_or_path: str | None = None
    architecture: dict[str, Any] | str | None = None
    attention: str | None = None
    compile: bool = False
    activation_checkpointing: Literal["none", "full", "attention"] | PositiveInt | bool = "none"
    balance_weight: NonNegativeFloat | None = None


@dataclass
class TokenizerConfig:
    """The tokenizer; by default the one of model.name_or_path.

    Args:
        name_or_path: a tokenizer's name on the Hub, or a local folder.
        train_vocab_size: train a byte-level BPE with this many entries on the training documents.
    """

    name_or_path: str | None = None
    train_vocab_size: Tokens | None = None


@dataclass
class DataConfig:
    """The documents, their split into train and validation, and their packing into blocks.

    Args:
        source: "stdlib" (the running Python's standard library), "files", or "hub" (Hugging Face Datasets).
        files: (files) paths or glob patterns of .txt (one document per file), .jsonl, .json, .csv, .tsv or .parquet
            (one document per row).
        validation_files: (files) the same for validation; without them, a part of `files` is split off.
        name: (hub) name of the data set, or a local folder that `datasets.load_dataset` can read.
        subset: (hub) name of the data set's configuration.
        split: (hub) split to train on, or a slice such as train[:5000].
        validation_split: (hub) split to validate on; without it, a part of `split` is split off.
        text_field: field that holds a row's text; dotted for nested fields (answers.text).
        join: string that joins the strings of a field that is a list.
        drop_duplicates: leave out documents whose text occurs more than once, for which the data is read once more:
            "across" leaves out training documents that are also validation documents, "all" also repetitions within
            either side (the first one stays). The ledger counts such documents in any case.
        test_size: share of the documents that is split off for validation if no validation data is named.
        split_seed: seed of that split, separate from run.seed so that runs can share their validation set.
        block_size: tokens of a sequence, which the model sees at once.
        isolate_documents: keep attention inside each document of a block, restart positions at each document, and don't
            predict a document's first token from the document before it.
        streaming: (hub) read the data without downloading everything first; use it with max_documents.
        max_documents: read at most this many documents (rows) of each split of the source.
        cache_dir: folder for prepared token stores; by default $TRAIN_LOOP_CACHE, or else ~/.cache/train_loop.
        num_workers: number of processes that read ahead; 0 reads in the training process, which is rarely slower.
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
    drop_duplicates: Literal["none", "across", "all"] = "none"
    test_size: Share = 0.1
    split_seed: Seed = 0
    block_size: Tokens = 128
    isolate_documents: bool = False
    streaming: bool = False
    max_documents: PositiveInt | None = None
    cache_dir: str | None = None
    num_workers: Processes = 0


@dataclass
class BatchConfig:
    """How many sequences an optimizer step sees, and how many of them are in memory at once.

    Args:
        sequences_per_step: sequences of one optimizer step, over all processes: a decision about training.
        micro_batch_size: sequences of one forward pass: a decision about memory that does not change the result. null
            means all of sequences_per_step. "auto" starts with a process's share of the step and halves it until a
            step fits into memory (not with FSDP2).
    """

    sequences_per_step: PositiveInt = 8
    micro_batch_size: PositiveInt | Literal["auto"] | None = None


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019).

    Args:
        learning_rate: peak learning rate, after warm-up.
        weight_decay: decoupled weight decay of matrices; norms, biases, scales and rates of change have none.
        decay_embeddings: whether embedding matrices decay as well.
        betas: decay rates of the first and second moments.
        eps: added to the square root of the second moment.
        max_grad_norm: scale gradients down to this global norm; null turns clipping off.
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
        decay_steps: (wsd) length of the final decay in steps; null means a tenth of all steps.
    """

    name: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = None


@dataclass
class TrainConfig:
    """How long to train.

    Args:
        epochs: passes over the training data.
        max_steps: number of optimizer steps; if given, it overrides epochs.
        patience: end training early after this many evaluations in a row without a new lowest loss; null never does.
        max_bad_steps: skip steps with a non-finite loss or gradient, but fail after this many of them in a row.
    """

    epochs: PositiveInt = 3
    max_steps: PositiveInt | None = None
    patience: PositiveInt | None = None
    max_bad_steps: PositiveInt = 10


@dataclass
class EvaluationConfig:
    """Exact evaluation on all validation data; the last step is always evaluated.

    Args:
        every: "epoch", or a number of optimizer steps.
        batch_size: sequences of one forward pass; it does not change the result. null means micro_batch_size.
    """

    every: PositiveInt | Literal["epoch"] = "epoch"
    batch_size: PositiveInt | None = None


@dataclass
class SampleConfig:
    """Sampling after each evaluation, and the defaults that are saved with the exported model.

    Args:
        prompts: texts to continue; null samples one text from scratch, an empty list samples nothing.
        max_new_tokens: add at most this many tokens.
        temperature: divides the logits; 0 always takes the likeliest token.
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
        every: "epoch", or a number of optimizer steps; the last step is always kept, and so is the step with the lowest
            validation loss.
        keep: how many of the newest checkpoints to keep.
        at: "log" also makes checkpoints of steps 0, 1, 2, 4, 8, ... for study, and keeps them all.
        background: go on with training while a copy of the state is written; the copy takes CPU memory, 12 bytes per
            parameter.
    """

    every: PositiveInt | Literal["epoch"] = "epoch"
    keep: PositiveInt = 2
    at: Literal["log"] | None = None
    background: bool = True


# A fact, a sum and a name that comes back: something to memorise, to work out, and to look up in the text.
PROBE = "When Mary and John went to the store, John gave a drink to Mary. Two plus two is four, and Paris is in France."


@dataclass
class StudyConfig:
    """What is watched while a run trains, and written to study.jsonl; it does not change what is computed.

    Args:
        every: watch each step whose number this divides: weights, gradients and updates, activations, attention, loss
            by position and frequency. null watches nothing and costs nothing.
        probe: at each evaluation, record the loss and the likeliest predictions of each token of this text, if steps
            are watched or the text is not the default; null or an empty text records nothing.
    """

    every: PositiveInt | None = None
    probe: str | None = PROBE

    @property
    def probing(self) -> bool:
        """Whether there is a probe to record."""
        return bool(self.probe) and (self.every is not None or self.probe != PROBE)


@dataclass
class ExportConfig:
    """What happens to the finished model, in addition to being written to output_dir/model.

    Args:
        from: "last" exports the weights of the last step, "best" those with the lowest validation loss.
        verify: load the exported model in a clean process, offline and without this package. The run is only complete
            if its weights, its loss and its greedy tokens are the same as the trained model's. If the model does not
            fit into the memory that is free then, the clean process compares weights alone, and the model card says so.
        max_shard_size: split the weights into files of at most this size (5GB, 500MB, or a number of bytes), with an
            index; a tensor that is larger has a file of its own.
        push_to_hub: upload the model to the Hugging Face Hub (needs a login).
        hub_model_id: repository to push to (name or user/name); null means the name of output_dir.
    """

    from_: Literal["last", "best"] = "last"
    verify: bool = True
    max_shard_size: str = "5GB"
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
        """The run's folder; `config/load.py` makes sure that there is one."""
        assert self.run.output_dir is not None
        return Path(self.run.output_dir)

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one forward pass in training, as far as the settings determine it."""
        chosen = self.batch.micro_batch_size
        return chosen if isinstance(chosen, int) else self.batch.sequences_per_step
