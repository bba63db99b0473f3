"""Time the scan and the models on a GPU whose machine has JAX but no TensorFlow.

    python results/gpu.py export FOLDER   with TensorFlow, on any machine: writes the programs
    python results/gpu.py run FOLDER      with JAX: checks, times -> a table, FOLDER/gpu.csv

TensorFlow compiles each function to StableHLO, and the XLA of JAX compiles that for its device.
"""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from timeit import default_timer, repeat

import numpy as np


def export(folder):
    """Write FOLDER/NAME BATCH LENGTH.npz a program; 10,000 values of an output, the rest are 0."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import tensorflow as tf
    from tensorflow.compiler.mlir.stablehlo import stablehlo

    import mamba_sentiment as ms

    def save(name, batch, length, function, inputs):
        compiled = ms.compiled(lambda *inputs: function(*inputs))
        types = [tf.TensorSpec(x.shape, x.dtype) for x in inputs]
        text = compiled.experimental_get_compiler_ir(*types)("stablehlo", platform_name="CPU")
        # Variables are copied by an operation that StableHLO lacks; this one changes nothing, too.
        text = text.replace("mhlo.copy", "stablehlo.convert")
        program = stablehlo.serialize_portable_artifact_str(text, stablehlo.get_current_version())
        # The program takes the variables after the inputs; a step returns them after its result.
        traced = compiled.get_concrete_function(*types)
        variables = [v for x in traced.captured_inputs for v in traced.variables if v.handle is x]
        arrays = {f"input {i}": np.asarray(x) for i, x in enumerate([*inputs, *variables])}
        outputs = tf.nest.flatten(compiled(*map(tf.constant, inputs)))
        for i, x in enumerate(outputs + variables if "step" in name else outputs):
            arrays[f"output {i}"] = np.where(random.random(x.shape) < 1e4 / np.size(x), x, 0)
        np.savez_compressed(folder / f"{name} {batch} {length}", program=np.void(program), **arrays)

    folder.mkdir(parents=True, exist_ok=True)
    ms.fast_method = lambda: "parallel"  # as on a GPU, where no batch is cut into shards, either
    random = np.random.default_rng(0)
    for size in (64, 64), (16, 256), (4, 1024), (1, 4096), (64, 1024):  # batch, length
        shapes = (*size, 128), (*size, 128), (128, 16), (*size, 16), (*size, 16), (128,)
        # Random values, which repeat every 28 kB, so that they can be compressed.
        u, delta, A, B, C, D = (np.resize(random.standard_normal(7001, "f4"), x) for x in shapes)
        inputs = u, np.log1p(np.exp(delta - 3)), -np.exp(A), B, C, D
        save("scan", *size, ms.selective_scan, inputs)
        save("scan gradient", *size, lambda *x: tf.gradients(ms.selective_scan(*x) ** 2, x), inputs)
    for name in ms.MODELS:
        model = ms.build_model(name)
        model.embedding.embeddings.assign(0.03 * np.resize(u.flat[:7001], (30522, 64)))
        for size in (1, 64), (1, 1024), (1, 4096), (128, 64):
            save(name, *size, model, [random.integers(1, 30522, size, "i4")])
        # The first learning rate is 0; a step is checked by what AdamW keeps of the gradients.
        step = ms.training_step(model, ms.make_optimizer(model, 1000))
        ids, labels = random.integers(1, 30522, (256, 24), "i4"), random.integers(0, 3, 256, "i4")
        save(f"{name} training step", 256, 24, step, [np.arange(256), ids, labels])


def peer_call(peer, inputs, gradient):
    """-> a function that computes the scan of a peer, or its gradients, in PyTorch on the GPU."""
    import torch

    module = importlib.import_module("mambapy.pscan" if peer == "mambapy" else peer)
    inputs = [torch.tensor(x, device="cuda") for x in inputs]
    if peer == "mamba_ssm":  # it wants time last
        inputs = [x.mT.contiguous().mT if x.ndim == 3 else x for x in inputs]
    u, delta, A, B, C, D = inputs = [x.requires_grad_(gradient) for x in inputs]

    def call():
        if peer == "mamba_ssm":
            y = module.selective_scan_fn(u.mT, delta.mT, A, B.mT, C.mT, D).mT
        else:
            a, inflow = (delta[..., None] * A).exp(), (delta * u)[..., None] * B[:, :, None]
            y = (module.pscan(a, inflow) @ C[..., None])[..., 0] + D * u
        outputs = torch.autograd.grad(y.square().sum(), inputs) if gradient else [y.detach()]
        torch.cuda.synchronize()
        return outputs

    return call


def run(folder):
    """Check and time the programs -> exit status; 1: error above 1e-5, in a model (TF32) 1e-2."""
    import jax.export

    jax.config.update("jax_enable_x64", True)  # some inputs are int64
    peers = [x for x in ("mambapy", "mamba_ssm") if importlib.util.find_spec(x)]
    print(jax.devices()[0].device_kind, "  installed peers:", *peers or ["none"])
    rows = [("program", "batch", "length", "by", "compile s", "error", "ms", "fastest", "slowest")]
    for path in sorted(folder.glob("*.npz")):
        program = path.stem.rsplit(" ", 2)
        data = np.load(path)
        inputs, saved = ([data[x] for x in data if kind in x] for kind in ("input", "output"))
        # An exported function of the same types, in which the program then replaces the constants.
        exported = jax.export.export(jax.jit(lambda *_, y=saved: y, keep_unused=True))(*inputs)
        exported = dataclasses.replace(exported, mlir_module_serialized=data["program"].tobytes())
        arrays = jax.device_put(inputs)
        start = default_timer()
        compiled = jax.jit(exported.call).lower(*arrays).compile()
        seconds = round(default_timer() - start, 2)
        calls = {"JAX": lambda f=compiled, x=arrays: jax.block_until_ready(f(*x))}
        if "scan" in path.stem and jax.default_backend() == "gpu":
            calls |= {x: peer_call(x, inputs, "gradient" in path.stem) for x in peers}
        for by, call in calls.items():
            pairs = [(np.asarray(x.cpu() if by in peers else x), y) for x, y in zip(call(), saved)]
            # What is below 1e-4 may be rounding only: the gradient of the bias of keys is 0.
            errors = [abs(x * (y != 0) - y).max() / max(abs(y).max(), 1e-4) for x, y in pairs]
            times = (1e3 * np.percentile(repeat(call, number=1, repeat=30), (50, 0, 100))).round(4)
            rows.append([*program, by, 0 if by in peers else seconds, np.max(errors), *times])
            print("{:24}{:>6}{:>6} {:10}{:7.1f} s{:9.1e}{:10.3f} ms".format(*rows[-1]), flush=True)
    np.savetxt(folder / "gpu.csv", rows, "%s", ",")
    return int(not all(x[5] < (1e-5 if "scan" in x[0] else 1e-2) for x in rows[1:]))


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](Path(sys.argv[2])))
