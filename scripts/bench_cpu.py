"""Times l4jax on a CPU: prefill, decode and training, interleaved with Hugging Face transformers on the same weights.

    python scripts/bench_cpu.py pair --preset mini-scout              # a table: tokens per CPU second, and the ratio
    taskset -c 0 python scripts/bench_cpu.py pair --preset mini-maverick --rounds 3
    python scripts/bench_cpu.py worker --model DIR [--engine hf]      # one engine, by lines of JSON

`pair` makes a model with random weights in Hugging Face format, starts a worker of each engine on it, and asks them in
turn, the order turned each round; medians and quartiles of the ratio round by round. On a machine with other work only
CPU seconds compare, and only with one thread on each side (`taskset`).

A worker prints {"ready": true}, then answers each line of its input, an op as a JSON object, by the op with `seconds`,
`cpu_seconds`, `tokens_done` and `peak_rss_mib`, or `error`. {"op": "quit"} ends it. An op is warmed up when it comes
for the first time.

    {"op": "prefill", "batch": 1, "tokens": 2048}              fills a fresh cache; logits of the last token
    {"op": "decode", "batch": 1, "context": 128, "steps": 32}  greedy, from a cache of `context` tokens
    {"op": "train", "batch": 1, "tokens": 512}                 forward, backward, AdamW
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Op = dict[str, Any]

# Scout and Maverick in small: width 512, 8 layers, 8/2 heads of 64, chunks of 512, experts of width 1024.
COMMON = {
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "intermediate_size_mlp": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 512,
    "floor_scale": 512,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "max_position_embeddings": 1 << 20,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
PRESETS = {
    "mini-scout": {**COMMON, "num_local_experts": 16, "interleave_moe_layer_step": 1, "use_qk_norm": True},
    "mini-maverick": {**COMMON, "num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False},
}
OPS = [
    *({"op": "prefill", "batch": 1, "tokens": tokens} for tokens in (512, 2048, 8192)),
    *({"op": "decode", "batch": batch, "context": 128, "steps": 32} for batch in (1, 8)),
    {"op": "train", "batch": 1, "tokens": 512},
]


class Clock:
    """Wall and CPU seconds of this process since it was made."""

    def __init__(self):
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._start[0], "cpu_seconds": time.process_time() - self._start[1]}


class L4jax:
    """The ops by way of `l4jax.load` and its engine, and of the training step of `l4jax train`."""

    def __init__(self, directory: str, dtype: str):
        from l4jax.host import keep_freed_memory

        keep_freed_memory()  # as the commands do
        import jax

        import l4jax

        self.jax, self.directory, self.dtype = jax, directory, dtype
        self.loaded = l4jax.load(directory, dtype=dtype)
        self.config, self.mesh = self.loaded.config, self.loaded.mesh
        self.engines: dict[int, Any] = {}
        self.decoding: tuple[Any, Any] = (None, None)
        self.training = None

    def _ids(self, batch: int, tokens: int):
        import numpy as np

        vocab_size = self.config.text_config.vocab_size
        return np.random.default_rng(7).integers(0, vocab_size, (batch, tokens)).astype(np.int32)

    def _engine(self, max_len: int):
        from l4jax.inference.engine import Engine

        if max_len not in self.engines:
            self.engines[max_len] = Engine(self.loaded.model, max_len=max_len, mesh=self.loaded.mesh)
        return self.engines[max_len]

    def prefill(self, batch: int = 1, tokens: int = 512) -> tuple[dict, int]:
        import numpy as np

        engine, ids = self._engine(tokens + 1), self._ids(batch, tokens)
        clock = Clock()
        for row in ids:
            np.asarray(engine.prefill(row).logits).argmax()
        return clock.read(), batch * tokens

    def decode(self, batch: int = 1, context: int = 128, steps: int = 32) -> tuple[dict, int]:
        import numpy as np

        from l4jax.inference.options import SamplingOptions

        jax, engine = self.jax, self._engine(context + steps + 1)
        if self.decoding[0] != (batch, context, steps):
            greedy, state = SamplingOptions(temperature=0.0, seed=0), None
            for row, ids in enumerate(self._ids(batch, context)):
                prompt = engine.prefill(ids)
                if state is None:
                    state, _ = engine.start(prompt, greedy, batch_size=batch)
                else:
                    state, _ = engine.insert(state, prompt, greedy, row)
            self.decoding = (batch, context, steps), state
        state, active = jax.block_until_ready(jax.tree.map(jax.numpy.copy, self.decoding[1])), np.ones(batch, bool)
        clock = Clock()
        for _ in range(steps):
            state, drawn = engine.decode(state, active)
            np.asarray(drawn.tokens)  # a server sends each token on
        return clock.read(), batch * steps

    def train(self, batch: int = 1, tokens: int = 512) -> tuple[dict, int]:
        import numpy as np

        if self.training is None:
            self.training = self._make_training()
        step, state = self.training
        ones = np.ones((batch, tokens), np.int32)
        positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), ones.shape)
        rows = {
            "ids": self._ids(batch, tokens),
            "positions": positions,
            "segment_ids": ones,
            "loss_mask": ones == 1,
            "source_ids": ones,
            "pictures": np.zeros_like(ones),
            "tiles": None,
        }
        clock = Clock()
        state, numbers = step(state, rows, None)
        self.jax.block_until_ready(state)
        float(numbers["loss_now"])
        self.training = step, state
        return clock.read(), batch * tokens

    def _make_training(self):
        """Takes the weights over from the loaded model: training writes into them."""
        from flax import nnx

        from l4jax.train.config import OptimizerConfig, ParallelConfig
        from l4jax.train.objective import NextToken
        from l4jax.train.optimizer import make_optimizer
        from l4jax.train.state import new_state, state_shardings
        from l4jax.train.step import make_train_step

        config, steps = self.config, 1000
        settings = OptimizerConfig(learning_rate=1e-5, warmup_steps=1)
        optimizer = make_optimizer(settings, steps)
        graphdef, params = nnx.split(self.loaded.model)
        shardings = state_shardings(self.loaded.model, optimizer, self.mesh)
        self.loaded = None
        start = self.jax.jit(
            lambda params: new_state(config, optimizer, params), donate_argnums=0, out_shardings=shardings
        )
        state = start(nnx.to_pure_dict(params))
        self.engines, self.decoding = {}, (None, None)
        parallel = ParallelConfig()
        return make_train_step(NextToken(graphdef, parallel), optimizer, parallel, shardings), state


class HuggingFace:
    """The same ops by transformers: sdpa attention, its own cache, torch's fused AdamW."""

    def __init__(self, directory: str, dtype: str):
        import torch

        self.torch = torch
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
        self.model = import_transformers().Llama4ForCausalLM.from_pretrained(directory, **options).eval()
        self.decoding: tuple[Any, Any] = (None, None)
        self.optimizer = None

    def _ids(self, batch: int, tokens: int):
        generator = self.torch.Generator().manual_seed(7)
        return self.torch.randint(0, self.model.config.vocab_size, (batch, tokens), generator=generator)

    def prefill(self, batch: int = 1, tokens: int = 512) -> tuple[dict, int]:
        ids = self._ids(batch, tokens)
        with self.torch.inference_mode():
            clock = Clock()
            out = self.model(ids, use_cache=True, logits_to_keep=1)
            out.logits[:, -1].argmax(-1).tolist()
            return clock.read(), batch * tokens

    def decode(self, batch: int = 1, context: int = 128, steps: int = 32) -> tuple[dict, int]:
        import copy

        with self.torch.inference_mode():
            if self.decoding[0] != (batch, context):
                out = self.model(self._ids(batch, context), use_cache=True, logits_to_keep=1)
                self.decoding = (batch, context), (out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True))
            cache, token = copy.deepcopy(self.decoding[1])
            clock = Clock()
            for _ in range(steps):
                out = self.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                token.tolist()
            return clock.read(), batch * steps

    def train(self, batch: int = 1, tokens: int = 512) -> tuple[dict, int]:
        if self.optimizer is None:
            self.model.train()
            parameters = self.model.parameters()
            self.optimizer = self.torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.1, fused=True)
        ids = self._ids(batch, tokens)
        clock = Clock()
        loss = self.model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()
        return clock.read(), batch * tokens


def import_transformers():
    """Returns transformers without torchvision: text needs none, and PyPI's breaks beside a CPU build of torch."""
    sys.modules["torchvision"] = None
    import transformers

    return transformers


ENGINES: dict[str, Callable] = {"l4jax": L4jax, "hf": HuggingFace}


def serve_worker(engine: L4jax | HuggingFace) -> None:
    """Speaks the line protocol until told to quit; whatever a library prints goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm = set()

    def answer(spec: Op) -> Op:
        if spec.get("op") not in ("prefill", "decode", "train"):
            raise ValueError(f"no such op: {spec}")
        arguments = {key: value for key, value in spec.items() if key != "op"}
        run = getattr(engine, spec["op"])
        if (key := json.dumps(spec, sort_keys=True)) not in warm:
            run(**arguments)
            warm.add(key)
        times, tokens = run(**arguments)
        return {**spec, **times, "tokens_done": tokens, "peak_rss_mib": peak_rss_mib()}

    print(json.dumps({"ready": True, "peak_rss_mib": peak_rss_mib()}), file=out, flush=True)
    for line in filter(str.strip, sys.stdin):
        spec = json.loads(line)
        if spec.get("op") == "quit":
            break
        try:
            result = answer(spec)
        except (ValueError, TypeError, RuntimeError, MemoryError) as error:
            result = {**spec, "error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(result), file=out, flush=True)


def peak_rss_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class Worker:
    """The other end of the protocol."""

    def __init__(self, name: str, model: str, dtype: str):
        command = [sys.executable, __file__, "worker", "--engine", name, "--model", model, "--dtype", dtype]
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def _read(self) -> Op:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.name} worker ended with code {self._process.wait()}")
        return json.loads(line)

    def run(self, spec: Op) -> Op:
        self._process.stdin.write(json.dumps(spec) + "\n")
        self._process.stdin.flush()
        result = self._read()
        if "error" in result:
            raise RuntimeError(f"{self.name}: {result['error']}")
        return result

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)


def compare(workers: list[Worker], ops: list[Op], rounds: int) -> None:
    """Prints a row for each op: tokens per CPU second of each worker (median), and the ratio (median, quartiles)."""
    columns = "  ".join(f"{worker.name + ' tok/cpu-s':>16} {'wall tok/s':>10} {'peak MiB':>8}" for worker in workers)
    print(f"{'op':<44} {columns}  ratio (quartiles)", flush=True)
    for spec in ops:
        samples: dict[str, list[Op]] = {worker.name: [] for worker in workers}
        for turn in range(rounds):
            for worker in workers if turn % 2 == 0 else workers[::-1]:
                time.sleep(0.05)  # lets the other side's spinning threads go to sleep
                samples[worker.name].append(worker.run(spec))
        cells = []
        for taken in samples.values():
            fast, wall = ([x["tokens_done"] / x[kind] for x in taken] for kind in ("cpu_seconds", "seconds"))
            peak = taken[-1]["peak_rss_mib"]
            cells.append(f"{statistics.median(fast):16.1f} {statistics.median(wall):10.1f} {peak:8}")
        first, *others = samples.values()
        ratios = []
        for other in others:
            pairs = [b["cpu_seconds"] / a["cpu_seconds"] for a, b in zip(first, other, strict=True)]
            low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive") if rounds > 1 else pairs * 3
            ratios.append(f"{middle:.1f}x ({low:.1f}-{high:.1f})")
        name = " ".join(f"{key} {value}" if key != "op" else value for key, value in spec.items())
        print(f"{name:<44} {'  '.join(cells)}  {' '.join(ratios)}", flush=True)


def make_model(directory: str, preset: str) -> None:
    """Saves a model in Hugging Face format, its matrices drawn from N(0, 0.02)."""
    import torch

    transformers = import_transformers()
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**PRESETS[preset])).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02)
    model.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    pair = verbs.add_parser("pair", help="l4jax beside transformers, as a table")
    pair.add_argument("--preset", choices=sorted(PRESETS), default="mini-scout")
    pair.add_argument("--ops", type=json.loads, default=OPS, help="JSON list of ops")
    pair.add_argument("--rounds", type=int, default=5)
    pair.add_argument("--without-hf", action="store_true", help="time l4jax alone (making the model still takes torch)")
    worker = verbs.add_parser("worker", help="one engine, by the line protocol")
    worker.add_argument("--model", required=True, help="directory in Hugging Face format")
    worker.add_argument("--engine", choices=sorted(ENGINES), default="l4jax")
    for verb in (pair, worker):
        verb.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()

    if arguments.verb == "worker":
        serve_worker(ENGINES[arguments.engine](arguments.model, arguments.dtype))
        return
    with tempfile.TemporaryDirectory() as directory:
        model = str(Path(directory) / arguments.preset)
        make_model(model, arguments.preset)
        names = ["l4jax"] if arguments.without_hf else ["l4jax", "hf"]
        workers = []
        try:
            for name in names:
                workers.append(Worker(name, model, arguments.dtype))
            compare(workers, arguments.ops, arguments.rounds)
        finally:
            for started in workers:
                started.close()


if __name__ == "__main__":
    main()
