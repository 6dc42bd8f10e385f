"""Mutated models, configurations, mask files and data through onnxprune: anything but success or PruneError is a find.

    pip install atheris
    python tests/fuzz.py model 100000        # coverage-guided; model, shrink, config, masks or data
    python tests/fuzz.py model 2000 --plain  # without atheris: seeded mutations of the seeds alone

Finds are written to fuzz-found/TARGET-WHERE, one input for each place an exception comes from; run one again with
`python tests/fuzz.py model --replay FILE`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mutate
import numpy as np

MEMORY = 4 << 30
SECONDS = 10.0
"""Of processor time that one input may take; the issue's five on a machine that is not busy."""


class TooSlow(BaseException):
    """An input took too long; no handler of Exception may swallow it."""


# ------------------------------------------------------------------ what is tried


def run_model(data: bytes) -> None:
    """Load, inspect and prune by one of several configurations, and write what comes of it."""
    import onnxprune

    with given(data, ".onnx") as path:
        with contextlib.suppress(onnxprune.PruneError):
            onnxprune.inspect(path)
        result = onnxprune.prune(path, CONFIGS[len(data) % len(CONFIGS)])
        result.to_proto()
        result.save(f"{path}.out")


def run_shrink(data: bytes) -> None:
    """Find groups of channels and cut half of each out; nothing is run."""
    import onnxprune
    from onnxprune.structure import explain

    with given(data, ".onnx") as path:
        with contextlib.suppress(onnxprune.PruneError):
            explain(path)
        onnxprune.prune(path, [{"sparsity": 0.5, "pattern": "channel"}], verify=False).to_proto()


def run_config(data: bytes) -> None:
    """A configuration file of one of three forms, and where it is valid, a model pruned by it."""
    from onnxprune import config, prune

    form = ".toml" if b" = " in data else (".yaml", ".json")[len(data) % 2]
    with given(data, form) as path:
        config.load(path)
        prune(small_model(), path)


def run_masks(data: bytes) -> None:
    """A mask file: read, held by a pruner that goes on from it, written, and read again."""
    import onnxprune

    with given(data, ".npz") as path:
        masks = onnxprune.Masks.load(path)
        if sum(int(np.prod(shape, dtype=np.float64)) for _, shape in masks._bits.values()) < 1 << 20:
            pruner = onnxprune.AGPPruner([{"sparsity": 0.5}])
            pruner.load_state_dict({"epoch": 1, "step": 0, "masks": masks})
            with contextlib.suppress(onnxprune.PruneError):
                pruner.prune(small_model())
            masks.save(f"{path}.out")
            assert onnxprune.Masks.load(f"{path}.out") == masks


def run_data(data: bytes) -> None:
    """A data file for a model of two inputs."""
    from onnxprune.runtime.feeds import load_data
    from onnxprune.runtime.session import ModelInput

    inputs = [ModelInput("x", np.dtype(np.float32), (None, 4)), ModelInput("t", np.dtype(np.int64), (None,))]
    with given(data, ".npz") as path:
        list(load_data(path, inputs))


CONFIGS: list[list[dict[str, Any]]] = [
    [{"sparsity": 0.5}],
    [{"sparsity": 0.5, "op_types": ["default", "Embedding"]}],
    [{"sparsity": 0.5, "pattern": "2:4"}],
    [{"sparsity": 0.3, "pattern": "block:2x2"}],
    [{"sparsity": 0.7, "allocation": "global"}],
    [{"sparsity": 0.7, "allocation": "erk"}],
]


@contextlib.contextmanager
def given(data: bytes, ending: str) -> Iterator[str]:
    """A file with some content, in memory where the system has a place for it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = os.path.join(folder, f"input{ending}")
        with open(path, "wb") as file:
            file.write(data)
        yield path


def small_model() -> Any:
    """A net of three weights of two kinds."""
    global _small
    if _small is None:
        from nets import parse, pi

        _small = parse(
            "(float[1,2,6] x) => (float[1,5] y) "
            "{ a = Conv(x, conv) b = Relu(a) c = Flatten(b) d = MatMul(c, fc) e = Relu(d) y = MatMul(e, last) }",
            conv=pi(4, 2, 3),
            fc=pi(16, 8),
            last=pi(8, 5),
        )
    return _small


_small: Any = None

# ------------------------------------------------------------------ what it is tried on


def model_seeds() -> list[bytes]:
    """The small nets of other tests, a few of them with nested graphs, functions and tensors of many types."""
    import model_files
    import operator_nets
    import test_structure_contrib
    import test_structure_nets
    import test_structure_quantised
    import test_structure_rules_control
    import test_structure_rules_images
    import test_structure_rules_matrices
    import test_weights_loops
    import test_weights_nesting
    import test_weights_parts

    models = [net.model for net in (*operator_nets.FLOAT, *operator_nets.QUANTISED)]
    for module in (test_weights_loops, test_weights_nesting, test_weights_parts):
        models += [net.model for net in nets_of(module) if hasattr(net, "masks")]
    for module in (
        test_structure_contrib,
        test_structure_nets,
        test_structure_quantised,
        test_structure_rules_control,
        test_structure_rules_images,
        test_structure_rules_matrices,
    ):
        models += [net.model() for net in nets_of(module) if hasattr(net, "groups")]
    models.append(model_files.net())
    return [model.SerializeToString(deterministic=True) for model in models]


def nets_of(module: Any) -> list[Any]:
    """What a test module's tables hold."""
    found = []
    for table in vars(module).values():
        found += table if isinstance(table, list) else []
    return list({id(net): net for net in found if hasattr(net, "model")}.values())


def real_seeds() -> list[bytes]:
    """The trained models that are installed, with nine tenths of their channels cut out, so that they are small."""
    import importlib.metadata

    import test_real_models

    import onnxprune

    found = []
    for ending, (package, _) in test_real_models.MODELS.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, onnxprune.PruneError, StopIteration):
            files = (Path(str(f.locate())) for f in importlib.metadata.files(package) or [])
            path = next(p for p in files if p.as_posix().endswith(ending))
            config = [{"sparsity": 0.9, "pattern": "channel"}]
            cut = onnxprune.prune(path, config, verify=False, align=1).to_proto().SerializeToString()
            if len(cut) < 1 << 20:
                found.append(cut)
    return found


def config_seeds() -> list[bytes]:
    """Configurations of every pruner, in three forms."""
    entries: list[Any] = [
        [{"sparsity": 0.8, "op_types": "default"}, {"exclude": True, "op_names": ["fc", "l*"]}],
        {"pruner": "agp", "pattern": "2:4", "config_list": [{"final_sparsity": 0.5, "start_epoch": 0, "end_epoch": 9}]},
        {"pruner": "agp", "config_list": [{"initial_sparsity": 0.1, "sparsity": 0.9, "start_step": 1, "end_step": 7}]},
        {"pruner": "sensitivity", "config_list": [{"quality": 0.7, "op_types": ["MatMul"]}]},
        {"pruner": "sensitivity", "config_list": [{"sparsity": 0.7, "frequency": 2, "start_epoch": 3}]},
        {"score": "l2", "pattern": "channel", "allocation": "global", "config_list": [{"sparsity": 0.5}]},
        {"score": "wanda", "config_list": [{"sparsity": 0.5, "pattern": "block:1x4", "allocation": "erk"}]},
        {"pruner": "sparsegpt", "config_list": [{"sparsity": 0.5, "pattern": "2:4"}], "reconstruct": True},
        [{"sparsity": 0.75, "pattern": "grouped:4"}, {"sparsity": 0.5, "pattern": "head", "score": "fpgm"}],
    ]
    forms = [json.dumps(entry).encode() for entry in entries]
    toml = b'pruner = "agp"\n[[config_list]]\nfinal_sparsity = 0.5\nend_epoch = 3\nop_types = ["Conv", "MatMul"]\n'
    yaml = b'pruner: level\npattern: "2:4"\nconfig_list:\n  - {sparsity: 0.5, op_types: [MatMul]}\n  - {exclude: yes}\n'
    return [*forms, toml, yaml]


def mask_seeds() -> list[bytes]:
    """Masks of several weights, one of none, and one of another writer."""
    import onnxprune

    given_ = [
        {},
        {"fc": np.arange(128).reshape(16, 8) % 3 > 0, "conv": np.ones((4, 2, 3), bool), "": np.zeros((), bool)},
        {"last": np.zeros((8, 5), bool), "fc": np.ones((16, 8), bool), "none": np.ones((0, 3), bool)},
    ]
    found = []
    for masks in given_:
        with given(b"", ".npz") as path:
            onnxprune.Masks(masks).save(path)
            found.append(Path(path).read_bytes())
    plain = io.BytesIO()
    np.savez(plain, index=np.frombuffer(b'[["fc", [16, 8]]]', np.uint8), bits=np.arange(16, dtype=np.uint8))
    return [*found, plain.getvalue()]


def data_seeds() -> list[bytes]:
    """Data for the two inputs, with and without labels."""
    found = []
    x, t = np.ones((6, 4), np.float32), np.arange(6)
    for arrays in ({"x": x, "t": t}, {"x": x, "t": t, "labels": t % 3}, {"x": x.astype(np.float64), "t": t, "more": x}):
        for write in (np.savez, np.savez_compressed):
            file = io.BytesIO()
            write(file, **arrays)
            found.append(file.getvalue())
    return found


TARGETS: dict[str, tuple[Callable[[bytes], None], mutate.Mutate, Callable[[], list[bytes]]]] = {
    "model": (run_model, mutate.model, model_seeds),
    "shrink": (run_shrink, mutate.model, model_seeds),
    "real": (run_model, mutate.model, real_seeds),
    "realshrink": (run_shrink, mutate.model, real_seeds),
    "config": (run_config, mutate.config, config_seeds),
    "masks": (run_masks, mutate.archive, mask_seeds),
    "data": (run_data, mutate.archive, data_seeds),
}

# ------------------------------------------------------------------ trying


class Fuzzer:
    """Runs inputs of one target, and keeps one of every kind that is a find."""

    def __init__(self, target: str, folder: Path | None = None) -> None:
        self.target, self.folder = target, folder
        self.run, self.mutate, self.seeds = TARGETS[target]
        self.runs = self.passed = 0
        self.found: dict[str, bytes] = {}
        self.started = time.monotonic()
        signal.signal(signal.SIGVTALRM, self._late)

    def _late(self, *_: Any) -> None:
        raise TooSlow

    def __call__(self, data: bytes) -> None:
        """Try one input."""
        from onnxprune import PruneError

        self.runs += 1
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.run(data)
            self.passed += 1
        except PruneError:
            pass
        except (Exception, TooSlow) as error:
            self.keep(error, data)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if self.runs % 1000 == 0:
            self.say()

    def keep(self, error: BaseException, data: bytes) -> None:
        """Keep the smallest input for each place of ours that an exception comes through."""
        ours = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}onnxprune{os.sep}" in f.filename]
        place = f"{Path(ours[-1].filename).stem}.{ours[-1].name}" if ours else "test"
        key = f"{type(error).__name__}-{place}"
        if key in self.found and len(self.found[key]) <= len(data):
            return
        if key not in self.found:
            print(f"find {len(self.found) + 1}: {key}: {str(error)[:200]!r}", flush=True)
        self.found[key] = data
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True, parents=True)
            (self.folder / f"{self.target}-{key}").write_bytes(data)
            text = "".join(traceback.format_exception(error))
            (self.folder / f"{self.target}-{key}.txt").write_text(text[-6000:])

    def say(self) -> None:
        """One line of progress."""
        seconds = time.monotonic() - self.started
        line = f"{self.target}: {self.runs} executions, {self.passed} without an error, "
        line += f"{len(self.found)} finds, {seconds:.0f} s"
        print(line, flush=True)
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True, parents=True)
            (self.folder / f"{self.target}.count.{os.getpid()}").write_text(line + "\n")


def plain(fuzzer: Fuzzer, indices: Iterable[int], seed: int = 0) -> None:
    """The inputs of these numbers: the first ones are the seeds, the others seeds mutated one to five times."""
    seeds = fuzzer.seeds()
    for index in indices:
        rng = random.Random(f"{seed} {index}")
        data = seeds[index] if index < len(seeds) else rng.choice(seeds)
        for _ in range(0 if index < len(seeds) else rng.randint(1, 5)):
            data = fuzzer.mutate(rng, data)
        fuzzer(data)


def guided(fuzzer: Fuzzer, count: int, corpus: Path, options: Sequence[str]) -> None:
    """Mutations chosen by the code of onnxprune that they reach. Does not return."""
    import atheris

    corpus.mkdir(exist_ok=True, parents=True)
    for index, data in enumerate(fuzzer.seeds()):
        (corpus / f"seed{index}").write_bytes(data)

    def mutator(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        out = fuzzer.mutate(rng, data)
        return out if len(out) <= longest else data

    longest = f"-max_len={mutate.LONGEST}"
    given_ = [sys.argv[0], f"-runs={count}", longest, "-timeout=120", "-rss_limit_mb=6000", *options, str(corpus)]
    atheris.Setup(given_, fuzzer, custom_mutator=mutator)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("runs", type=int, nargs="?", default=10_000)
    parser.add_argument("--plain", action="store_true", help="without atheris")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("fuzz-found"))
    parser.add_argument("--replay", type=Path, help="run one file, and let its exception through")
    parser.add_argument("options", nargs="*", help="of libFuzzer")
    arguments, more = parser.parse_known_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if arguments.replay is not None:
        TARGETS[arguments.target][0](arguments.replay.read_bytes())
        return
    if arguments.plain:
        fuzzer = Fuzzer(arguments.target, arguments.folder)
        plain(fuzzer, range(arguments.runs), arguments.seed)
        fuzzer.say()
        sys.exit(bool(fuzzer.found))
    import atheris

    with atheris.instrument_imports(include=["onnxprune"]):
        import onnxprune.api
        import onnxprune.inspection
        import onnxprune.structure.plan  # noqa: F401
    fuzzer = Fuzzer(arguments.target, arguments.folder)
    corpus = arguments.folder / f"corpus-{arguments.target}"
    guided(fuzzer, arguments.runs, corpus, [f"-seed={arguments.seed + 1}", *more])


if __name__ == "__main__":
    main()
