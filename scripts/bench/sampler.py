"""Tokens per second of the sampler, against Transformers' `generate` on the same model.

    python scripts/bench/sampler.py [--batch_sizes 1 8] [--rounds 5] [--layers 6] [--json]

The guide's call: DistilGPT2's shape with random weights, 100 new tokens, top-k 50, top-p 0.95, no early end. On a CPU,
the bound is the time that it takes to read all weights once per token, as they lie in memory; on a GPU, to copy them
within it, which reads and writes each byte, so about twice that time.
"""

import json
import time
from collections.abc import Callable

from measure import Contender, alternate, parser, report, seconds

NEW_TOKENS = 100


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="texts that grow together (1 8)")
    options.add_argument("--layers", type=int, default=6, help="of the model (6)")
    given = options.parse_args()

    import torch
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, GPT2Config, logging

    from train_loop.config.sampling import Sampling
    from train_loop.generation.decoding import generate
    from train_loop.generation.kv_cache import Decoder, Feed, StaticDecoder, recorder
    from train_loop.ops.packed_linear import pack

    logging.set_verbosity_error()
    device = PartialState().device
    gpu = device.type != "cpu"
    record = recorder(device)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=given.layers)
    theirs, mine = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    mine.load_state_dict(theirs.state_dict())
    theirs.to(device), mine.to(device)
    plain: Feed = Decoder(theirs)
    if record is not None:
        fast: Feed = StaticDecoder(mine, record)
    else:
        pack(mine)
        fast = Decoder(mine)
        several = torch.zeros(max(given.batch_sizes), 1, dtype=torch.int64)
        with torch.no_grad():
            first, second = (seconds(lambda: mine(several)) for _ in range(2))
    weights = [parameter.detach() for parameter in theirs.parameters()]  # tied ones once
    prompt = list(range(100, 110))

    def timed(work: Callable[..., None], *arguments: object) -> Callable[[], float]:
        def run() -> float:
            torch.get_device_module(device).synchronize()
            began = time.perf_counter()
            work(*arguments)
            torch.get_device_module(device).synchronize()
            return time.perf_counter() - began

        return run

    def generated(batch: int) -> None:
        ids = torch.tensor([prompt] * batch, device=device)
        settings = {"do_sample": True, "top_k": 50, "top_p": 0.95, "pad_token_id": 0}
        lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        found = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings, **lengths)
        assert found.shape[1] == len(prompt) + NEW_TOKENS

    def sampled(feed: Feed, batch: int) -> None:
        found = generate(feed, [prompt] * batch, Sampling(NEW_TOKENS), None, samples=range(batch))
        assert all(len(each.tokens) == NEW_TOKENS for each in found)

    def read() -> None:
        for _ in range(NEW_TOKENS):
            for weight in weights:
                weight.clone() if gpu else weight.sum()

    for batch in given.batch_sizes:
        contenders = [
            Contender("generate", timed(generated, batch)),
            Contender("the sampler, fed as it is", timed(sampled, plain, batch)),
            Contender("the sampler", timed(sampled, fast, batch)),
            Contender("all weights read once per token", timed(read)),
        ]
        found = alternate(contenders, given.rounds)
        report(f"batch {batch}, {NEW_TOKENS} tokens each, {device}", found, batch * NEW_TOKENS, "tokens", given.json)
    if not gpu:
        copying = max(0.0, first - second)
        told = f"\ncopies of the matrices, once, at most: {copying:.2f} s"
        print(json.dumps({"copying_seconds": copying}) if given.json else told)


if __name__ == "__main__":
    main()
