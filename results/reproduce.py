"""The Python pieces of reproduce.sh: a function's name and its arguments, on the command line."""

import itertools
import json
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median
from timeit import default_timer, timeit

import mamba_sentiment as ms  # isort: split

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tensorflow as tf


def collect(name):
    """The metrics.json of all models in runs/NAME -> results/NAME.csv, and means over the seeds."""
    metrics = [json.loads(x.read_text()) for x in Path("runs", name).rglob("metrics.json")]
    settings = ["model", "selection", "train_sequences", "learning_rate", "dropout", "epochs"]
    scores = ["validation", "accuracy", "low", "high", "macro_f1", "n"]
    table = pd.DataFrame([x.pop("config") | x for x in metrics]).sort_values([*settings, "seed"])
    table = table[[*settings, "seed", *scores, "parameters", "train_seconds"]]
    table.round(5).to_csv(f"results/{name}.csv", index=False)
    groups = table.groupby([*settings, "parameters"])  # these tell two vocabularies apart
    means = groups[["validation", "accuracy", "macro_f1"]].agg(["mean", "std", "count"])
    print(means.reset_index().to_string(index=False))


def induction():
    """The lengths.csv of all models in runs/induction -> a table and a figure in results/."""
    rows = []
    for path in sorted(Path("runs/induction").rglob("lengths.csv")):
        accuracy = pd.read_csv(path).iloc[0].to_dict()
        metrics = json.loads((path.parent / accuracy.pop("model") / "metrics.json").read_text())
        config, name = metrics["config"], metrics["model"].upper()
        name = f"Mamba, selective: {config['selection']}" if name == "MAMBA" else name
        row = {"model": name, "seed": config["seed"], "train_seconds": metrics["train_seconds"]}
        rows.append(row | accuracy)
    table = pd.DataFrame(rows).sort_values(["model", "seed"])
    table.round(5).to_csv("results/induction.csv", index=False)
    print(table.to_string(index=False))
    chart = table.drop(columns=["seed", "train_seconds"]).groupby("model", sort=False).mean().T
    axes = chart.rename(int).plot(title="Accuracy by length", logx=True, marker="o", figsize=(9, 7))
    axes.figure.savefig("results/induction.png")


def step_sizes(model, ids):
    """The step size delta of each layer, mean over the channels: (layers, sequences, length)."""
    x, deltas = model.embedding(ids), []
    for norm, block in zip(model.norms, model.blocks):
        u, _, _ = block.convolve(norm(x))
        deltas.append(block.select(u)[0].numpy().mean(-1))
        x += block(norm(x))
    return np.array(deltas)


def selected(heads, tweets, tokenizer):
    """Two models and a tokenizer -> what Mamba selects in induction heads and in tweets, drawn."""
    heads, tweets = keras.models.load_model(heads), keras.models.load_model(tweets)
    encode = ms.load_tokenizer(tokenizer).backend_tokenizer.encode
    ids, _ = ms.induction_heads(256, 128, seed=3)
    deltas, special = step_sizes(heads, ids), ids == 16
    remembered = np.pad(special[:, :-1], ((0, 0), (1, 0)))  # the token after a special one
    for layer, delta in enumerate(deltas, 1):
        parts = special, remembered, ~(special | remembered)
        means = ", ".join(f"{delta[part].mean():.3f}" for part in parts)
        print(f"layer {layer}: mean delta at special tokens, the remembered one, others: {means}")
    row = np.flatnonzero(special[:, 15])[0]
    panels = [(["*" if x == 16 else x for x in ids[row, :34]], deltas[:, row, :34])]
    examples = "i am so happy today what a wonderful day", "my phone died and i lost everything"
    for words in map(encode, examples):
        panels.append((words.tokens, step_sizes(tweets, np.array([words.ids]))[:, 0]))
    figure, axes = plt.subplots(len(panels), figsize=(10, 8), layout="constrained", sharey=True)
    for axis, (labels, lines) in zip(axes, panels):
        axis.plot(lines.T, marker="o", label=[f"layer {i}" for i, _ in enumerate(lines, 1)])
        axis.set(xticks=range(len(labels)), xticklabels=labels, ylabel="delta", ylim=0)
    axes[0].legend(title="step size delta; * is the special token")
    figure.savefig("results/selected.png", dpi=80)


def state(size, *models):
    """Mamba, new or loaded, reads induction heads in pieces of `size`: the microseconds a token in
    the first and in the last tenth, right answers (of 96 if loaded), and the peak memory.
    """
    size, tokens = int(size), 2**14 if size == "1" else 2**20
    ids, labels = ms.induction_heads(96 if models else 1, tokens, seed=3)
    for path in models or ["new"]:
        model = keras.models.load_model(path) if models else ms.build_model("mamba")
        read, carried, times = tf.function(model.read, jit_compile=True), None, []
        for i in [0, *range(0, tokens, size)]:  # the first call and the third compile
            start = default_timer()
            logits, carried = read(ids[:, i : i + size], carried if i else None)
            answers = logits.numpy().argmax(1)
            times.append(1e6 / size * (default_timer() - start))
        tenth = len(times) // 10 + 1
        begin, end = median(times[1:][:tenth]), median(times[-tenth:])
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{path}, {tokens} by {size}: {begin:.2f}, then {end:.2f} microseconds a token;")
        print(f"    {(answers == labels).sum()} of {len(labels)} right; {memory:.2f} GiB")


def tfidf():
    """CrowdFlower: TF-IDF of words and pairs of words, logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    source = ms.find_source("crowdflower", Path("data"))[1]
    tweets = ms.clean_and_split(ms.read_table(source, label_column="sentiment"))
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(max_iter=1000))
    model.fit(tweets["train"].text, tweets["train"].label)
    accuracy = model.score(tweets["test"].text, tweets["test"].label)
    print(f"TF-IDF of words and pairs, logistic regression: test accuracy {accuracy:.4f}")


def train_fasttext():
    """Sentiment140: fastText with word bigrams, on the parts of the learning curve."""
    import fasttext

    part, source = Path("runs/fasttext.txt"), ms.find_source("sentiment140", Path("data"))[1]
    tweets = ms.clean_and_split(ms.read_table(source))
    tables = tweets["train"], tweets["test"]
    train, test = ("__label__" + table.label + " " + table.text + "\n" for table in tables)
    options = {"wordNgrams": 2, "dim": 50, "epoch": 2, "lr": 0.2, "minCount": 3, "thread": 2}
    for count in (14683, 146828, None):  # those of the learning curve; None: all
        part.write_text("".join(train[:count]))
        model = fasttext.train_supervised(str(part), verbose=0, **options)
        part.write_text("".join(test))
        n, accuracy, _ = model.test(str(part))
        print(f"{len(train[:count])} tweets: test accuracy {accuracy:.4f} of {n}")


def medians(calls, rounds):
    """Median milliseconds of each of {name: function}; in each round they take turns."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 2):  # the first two compile
        for name, call in calls.items():
            times[name].append(1e3 * timeit(call, number=1))
    return {name: median(found[2:]) for name, found in times.items()}


def peer_scans():
    """The scan, forward and with gradient: ours, mambapy's and a loop in PyTorch."""
    import torch
    from mambapy.pscan import pscan

    def gradient(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(tf.square(ms.selective_scan(*inputs)))
        return tape.gradient(loss, inputs)

    def loop(u, delta, A, B, C, D):
        a = torch.exp(torch.einsum("bld,dn->bldn", delta, A))
        inflow = torch.einsum("bld,bln,bld->bldn", delta, B, u)
        h, y = torch.zeros(len(u), *A.shape), []
        for t in range(u.shape[1]):
            h = a[:, t] * h + inflow[:, t]
            y.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
        return torch.stack(y, 1) + u * D

    def mambapy(u, delta, A, B, C, D):
        a = torch.exp(delta.unsqueeze(-1) * A)
        inflow = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
        return (pscan(a, inflow) @ C.unsqueeze(-1)).squeeze(3) + D * u

    def torch_gradient(scan, inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(scan(*leaves).square().sum(), leaves)

    def measure(batch, length):
        random, widths = np.random.default_rng(0), (128, 128, 16, 16)
        u, delta, B, C = (random.standard_normal((batch, length, x), "f4") for x in widths)
        A = -np.tile(np.arange(1, 17, dtype="f4"), (128, 1))
        arrays = u, np.log1p(np.exp(delta - 3)), A, B, C, np.ones(128, "f4")
        inputs, tensors = [tf.constant(x) for x in arrays], [torch.tensor(x) for x in arrays]
        compiled = tf.function(ms.selective_scan, autograph=False)
        compiled_gradient = tf.function(gradient, autograph=False)
        forward = {
            "ours": lambda: compiled(*inputs).numpy(),
            "ours eager": lambda: ms.selective_scan(*inputs).numpy(),
            "mambapy": lambda: mambapy(*tensors),
            "loop": lambda: loop(*tensors),
        }
        gradients = {
            "ours": lambda: compiled_gradient(*inputs)[0].numpy(),
            "ours eager": lambda: gradient(*inputs)[0].numpy(),
            "mambapy": lambda: torch_gradient(mambapy, tensors),
        }
        if length <= 64:  # beyond, the loop's gradient takes seconds
            gradients["loop"] = lambda: torch_gradient(loop, tensors)
        return {"forward": medians(forward, 7), "with gradient": medians(gradients, 7)}

    print(ms.machine(), *(f"{x} {version(x)}" for x in ("torch", "mambapy", "transformers")))
    rows, shapes = [], [(256, 16), (64, 64), (16, 256), (4, 1024), (1, 4096)]
    for run, (batch, length) in itertools.product((1, 2, 3), shapes):
        for name, found in measure(batch, length).items():
            row = {"batch": batch, "length": length, "pass": name, **found}
            for peer, own in (("mambapy", "ours"), ("mambapy", "ours eager"), ("loop", "ours")):
                row[f"{peer} / {own}"] = found.get(peer, np.nan) / found[own]
            rows.append(row | {"run": run})
    table = pd.DataFrame(rows)
    table.round(2).to_csv("results/peers.csv", index=False)
    print(table.to_string(index=False, float_format="{:.2f}".format))
    groups = table.drop(columns="run").groupby(["batch", "length", "pass"], sort=False)
    print(f"\nmedians of the runs\n{groups.median().round(2).to_string()}")


def peer_steps():
    """A training step of 256 tweets of 24 tokens: our models, and Mamba of transformers."""
    import torch
    from transformers import MambaConfig, MambaModel

    ids, labels = torch.randint(1, 30000, (256, 24)), torch.randint(0, 3, (256,))
    batch = tf.range(256, dtype=tf.int64), *(tf.constant(x.int().numpy()) for x in (ids, labels))
    steps = {}
    for name in ms.MODELS:
        model = ms.build_model(name)
        step = ms.training_step(model, ms.make_optimizer(model, 1000))
        steps[name] = lambda step=step: step(*batch).numpy()

    def transformers_step(wrap, **options):
        sizes = {"vocab_size": 30522, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}
        model, head = wrap(MambaModel(MambaConfig(**sizes, **options))), torch.nn.Linear(64, 3)
        optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()])

        def step():
            optimizer.zero_grad()
            pooled = model(ids, use_cache=False).last_hidden_state.mean(1)
            torch.nn.functional.cross_entropy(head(pooled), labels).backward()
            optimizer.step()

        return step

    peers = {"transformers with mambapy": transformers_step(lambda model: model, use_mambapy=True)}
    compiled = transformers_step(torch.compile, use_associative_scan=True)
    print(f"\ncompiling a step of transformers' Mamba: {timeit(compiled, number=1):.0f} s")
    peers["transformers, torch.compile"] = compiled
    for name, milliseconds in (medians(steps, 11) | medians(peers, 3)).items():
        print(f"{name}: {milliseconds:.0f} ms, {256e3 / milliseconds:.0f} tweets/s")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
