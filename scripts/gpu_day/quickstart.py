"""Part "quickstart": the first steps of configs/quickstart.yaml in each precision, compiled and not, beside fp32's.

All variants are set up as the command does, with the same seed, and take the same steps by the loop's own `train_step`;
evaluation, samples and checkpoints are left to one run of the whole command. A loss that fp32 does not have shows a
precision that is not what it is called; how far losses may be apart is said beside `LIMITS`.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpu_day.models import device, forget_accelerator, only_on, quiet, relative, settle
from gpu_day.rows import Finding, Rows, Skipped, at_most, figure, holds, needs, one_line, part
from gpu_day.runs import Training


class Variant(NamedTuple):
    """A precision: its name, run.mixed_precision, and whether fp32 products are rounded to TF32."""

    name: str
    mixed_precision: str
    tf32: bool = False


FP32 = Variant("fp32", "no")
REFERENCE = (FP32, False)  # not compiled
VARIANTS = (FP32, Variant("TF32", "no", True), Variant("bf16", "bf16"), Variant("fp16", "fp16"))
# Relative to fp32's loss: of the first step, and of any of the first _EARLY. First: how logits are rounded in four
# layers, on average over a thousand tokens. Early: what training makes of it. In bf16 on a CPU 8e-5 and 3e-3 were seen;
# the others have as many digits more as their numbers have.
LIMITS = {"fp32": (1e-5, 1e-4), "TF32": (2e-4, 2e-3), "bf16": (1e-3, 1e-2), "fp16": (2e-4, 3e-3)}
_EARLY = 50
# In the end weights have gone ways of their own: single losses are off by up to 2 %, their mean by less.
_END_LIMIT = 1e-2
_EAGER_SECONDS, _COMPILED_SECONDS = 4, 12  # that a variant takes at least


def checks(rows: Rows, cpu: bool, folder: Path) -> None:
    """The whole command, then each variant, those that are not compiled first."""
    quiet()
    quickstart = Quickstart(cpu, folder)
    rows.check("the whole command", quickstart.whole_command)
    for compiled in (False, True):
        for variant in VARIANTS:
            name = f"{variant.name}, compiled" if compiled else variant.name
            seconds = _COMPILED_SECONDS if compiled else _EAGER_SECONDS
            rows.check(f"{name}: truth sheet", quickstart.train, variant, compiled, seconds=seconds)
            if (variant, compiled) not in quickstart.losses:
                continue
            rows.check(f"{name}: it learns", quickstart.learns, variant, compiled)
            if (variant, compiled) != REFERENCE:
                rows.check(f"{name}: first loss beside fp32's", quickstart.first_loss, variant, compiled)
                rows.check(f"{name}: losses beside fp32's", quickstart.losses_beside, variant, compiled)
                rows.check(f"{name}: ends where fp32 ends", quickstart.end, variant, compiled)
            rows.add(f"{name}: a step", quickstart.speeds[variant, compiled])
            rows.add(f"{name}: peak memory", quickstart.memory[variant, compiled])


class Quickstart:
    """The quickstart's variants, and what was seen of each."""

    def __init__(self, cpu: bool, folder: Path) -> None:
        self._cpu, self._folder = cpu, folder
        self._steps = 6 if cpu else 150
        self.losses: dict[tuple[Variant, bool], list[float]] = {}
        self.speeds: dict[tuple[Variant, bool], Finding] = {}
        self.memory: dict[tuple[Variant, bool], Finding] = {}

    def _settings(self) -> list[str]:
        root = Path(__file__).resolve().parent.parent.parent
        arguments = ["--config", str(root / "configs" / "quickstart.yaml"), "--train.max_steps", str(self._steps)]
        arguments += ["--evaluation.every", "1000", "--checkpoint.every", "1000"]
        tiny = ["--data.max_documents", "12", "--data.test_size", "0.2", "--tokenizer.train_vocab_size", "512"]
        tiny += ["--data.block_size", "64", "--schedule.warmup_steps", "4"]
        return arguments + (tiny if self._cpu else [])

    def whole_command(self) -> Finding:
        """Prepare, train, evaluate, sample, export, and verify what was exported in a clean process."""
        needs("evaluate", "datasets")
        run = Training(self._folder / "command", self._settings())
        run.finish_well()
        status = json.loads((run.folder / "status.json").read_text(encoding="utf-8"))
        loss = run.events("evaluation")[-1]["loss"]
        return holds(status["state"] == "complete", status["state"], "complete", f"validation loss {loss:.4f}")

    def train(self, variant: Variant, compiled: bool) -> Finding:
        """Set up and train; the truth sheet must say that the run is what was asked for."""
        if compiled and self._cpu:
            raise Skipped("compiling takes half a minute on a CPU; tests/training/test_loop.py does it there")
        if variant.tf32:
            only_on("cuda")
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if variant.tf32 else "highest")
        try:
            return self._train(variant, compiled)
        finally:
            torch.set_float32_matmul_precision(before)
            settle()

    def _train(self, variant: Variant, compiled: bool) -> Finding:
        from train_loop import devices
        from train_loop.analysis import truth_sheet
        from train_loop.analysis.replay import take
        from train_loop.config.load import config_from_arguments
        from train_loop.errors import InputError
        from train_loop.job import set_up

        forget_accelerator()
        backend = torch.get_device_module(device())
        if hasattr(backend, "reset_peak_memory_stats"):
            backend.reset_peak_memory_stats()
        changes = ["--run.mixed_precision", variant.mixed_precision, "--model.compile", str(compiled).lower()]
        given = config_from_arguments([*self._settings(), *changes, "--run.output_dir", str(self._folder / "never")])
        try:
            run = set_up(given).run
        except InputError as error:
            if self._cpu and variant.mixed_precision == "fp16":
                raise Skipped(one_line(str(error))) from None
            raise
        sheet = truth_sheet.measure(run)
        truth_sheet.check(sheet)
        run.context.objective.train()
        losses, seconds = [], []
        for _ in range(self._steps):
            devices.synchronize(device())
            began = time.perf_counter()
            losses.append(take(run).loss)
            devices.synchronize(device())
            seconds.append(time.perf_counter() - began)
        self.losses[variant, compiled] = losses
        usual = statistics.median(seconds[len(seconds) // 2 :])
        tokens = given.batch.sequences_per_step * given.data.block_size
        self.speeds[variant, compiled] = figure(
            usual * 1e3, "ms", f"{tokens / usual:,.0f} tokens/s; first {seconds[0]:.1f} s"
        )
        self.memory[variant, compiled] = figure(devices.peak_memory(device())() / 2**20, "MiB")
        return self._as_asked(sheet, variant, compiled)

    def _as_asked(self, sheet: dict[str, Any], variant: Variant, compiled: bool) -> Finding:
        """Whether a truth sheet says what was asked for."""
        precision, wanted = sheet["precision"], {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
        seen = {
            "computes in": precision["compute"],
            "weights": ", ".join(precision["parameters"]),
            "moments": ", ".join(precision["moments"]),
            "loss scaled": precision["loss_scaling"],
            "compiled": sheet["model"]["compiled"],
            "device": sheet["processes"]["each"][0]["device"].split(":")[0],
        }
        scaled = variant.mixed_precision == "fp16"
        expected = dict(
            zip(
                seen,
                (wanted[variant.mixed_precision], "float32", "float32", scaled, compiled, device().type),
                strict=True,
            )
        )
        why = f"loss {sheet['loss']['difference']:.1g} from the model's own"
        return holds(seen == expected, seen, "as asked" if seen == expected else str(expected), why)

    def first_loss(self, variant: Variant, compiled: bool) -> Finding:
        """Before any weight has changed."""
        mine, fp32 = self.losses[variant, compiled], self._fp32()
        return at_most(relative(mine[:1], fp32[:1]), LIMITS[variant.name][0], why=f"{mine[0]:.5f}, fp32 {fp32[0]:.5f}")

    def losses_beside(self, variant: Variant, compiled: bool) -> Finding:
        """The largest relative difference of the early steps."""
        mine, fp32 = self.losses[variant, compiled][:_EARLY], self._fp32()[:_EARLY]
        return at_most(relative(mine, fp32), LIMITS[variant.name][1], why=f"the first {len(mine)} steps")

    def end(self, variant: Variant, compiled: bool) -> Finding:
        """The mean loss of the last third."""
        mine, fp32 = (
            statistics.mean(each[-len(each) // 3 :]) for each in (self.losses[variant, compiled], self._fp32())
        )
        return at_most(relative([mine], [fp32]), _END_LIMIT, why=f"mean of the last third {mine:.4f}, fp32 {fp32:.4f}")

    def learns(self, variant: Variant, compiled: bool) -> Finding:
        """The mean loss of the last three steps is below that of the first three."""
        losses = self.losses[variant, compiled]
        first, last = statistics.mean(losses[:3]), statistics.mean(losses[-3:])
        return holds(last < first, last, f"below {first:.4f}", f"{len(losses)} steps")

    def _fp32(self) -> list[float]:
        if REFERENCE not in self.losses:
            raise Skipped("fp32's losses are not there to compare with")
        return self.losses[REFERENCE]


if __name__ == "__main__":
    part(checks)
