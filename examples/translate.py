"""From a sentence to a sentence: the transformer of "Attention Is All You Need" and the recurrent models it replaced.

The sentences are Python expressions of the standard library; each is translated into the order in which a stack machine
computes it (``a + b * c`` into ``a b c * +``). Tokens must move across the sentence, so a model must know where to look.
Four models learn the same pairs: an LSTM that squeezes the sentence into one vector (Sutskever et al. 2014), the LSTM with
additive alignment (Bahdanau et al. 2014), with dot-product scores (Luong et al. 2015), and the transformer (Vaswani et al.
2017). One picture shows how many sentences of each length they get right and what training cost; another where they look.

    python examples/translate.py
"""

import argparse
import ast
import bisect
import io
import keyword
import random
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from common import History, device, file, loss_picture, run, stdlib, summarise, train
from matplotlib.figure import Figure
from torch import nn

import fused_attn
from fused_attn import files, viz
from fused_attn.nn import SinusoidalPositions, Transformer, generate
from fused_attn.tools.options import check_call

PAD, BEGIN, END = 0, 1, 2
LONGEST, FREQUENT, BINS = 32, 120, (8, 16, 24, 32)
BINARY = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
          ast.BitOr: "|", ast.BitAnd: "&", ast.BitXor: "^", ast.LShift: "<<", ast.RShift: ">>", ast.Eq: "==", ast.NotEq: "!=",
          ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Is: "is", ast.IsNot: "isnot", ast.In: "in",
          ast.NotIn: "notin", ast.And: "and", ast.Or: "or", ast.Not: "not", ast.USub: "neg", ast.Invert: "~"}


# --- data: expressions, and their order on a stack ---


def postfix(node: ast.AST) -> Iterator[str]:
    """The tokens of an expression in the order in which a stack machine takes them; ValueError for what it does not know."""
    match node:
        case ast.Name(id=name):
            yield name
        case ast.Constant(value=value):
            yield "STR" if isinstance(value, (str, bytes)) else repr(value)
        case ast.Attribute(value=value, attr=attr):
            yield from (*postfix(value), attr, ".")
        case ast.Subscript(value=value, slice=index):
            yield from (*postfix(value), *postfix(index), "[]")
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
            yield from (*postfix(left), *postfix(right), BINARY[type(op)])
        case ast.BoolOp(op=op, values=[first, *others]):
            yield from postfix(first)
            for value in others:
                yield from (*postfix(value), BINARY[type(op)])
        case ast.UnaryOp(op=op, operand=operand) if type(op) in BINARY:
            yield from (*postfix(operand), BINARY[type(op)])
        case ast.Call(func=function, args=args, keywords=[]) if len(args) < 5:
            yield from (*postfix(function), *(token for arg in args for token in postfix(arg)), f"call{len(args)}")
        case ast.Tuple(elts=parts) | ast.List(elts=parts) if 0 < len(parts) < 5:
            kind = "tuple" if isinstance(node, ast.Tuple) else "list"
            yield from (*(token for part in parts for token in postfix(part)), f"{kind}{len(parts)}")
        case _:
            raise ValueError(type(node).__name__)


def infix(text: str) -> list[str]:
    """The tokens of an expression as it is written."""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.string.strip()]
    return ["STR" if t.type == tokenize.STRING else t.string for t in tokens]


def pairs(files: str) -> list[tuple[list[str], list[str]]]:
    """Every expression of 3 to 32 tokens in these files of the standard library, with its translation, once."""
    found: dict[tuple[str, ...], list[str]] = {}
    for _, text in stdlib(files):
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.expr) and not isinstance(node, (ast.Name, ast.Constant)):
                try:
                    target, source = list(postfix(node)), infix(ast.unparse(node))
                except (ValueError, KeyError, tokenize.TokenError, RecursionError):
                    continue
                if 3 <= len(source) <= LONGEST and len(target) <= LONGEST:
                    found[tuple(source)] = target
    return [(list(source), target) for source, target in found.items()]


def is_name(token: str) -> bool:
    return token.isidentifier() and not keyword.iskeyword(token) and token != "STR"


class Corpus:
    """Pairs as numbers. Rare names become x1, x2, ... in the order in which an expression names them."""

    def __init__(self, seed: int, files: str) -> None:
        drawn = pairs(files)
        counts = Counter(token for source, _ in drawn for token in source if is_name(token))
        known = {name for name, _ in counts.most_common(FREQUENT)}
        self.pairs = []
        seen = set()
        for source, target in drawn:
            names: dict[str, str] = {}
            for token in source:
                if (is_name(token) and token not in known) or (token[0].isdigit() and len(token) > 1):
                    names.setdefault(token, f"x{len(names) + 1}")
            # A number may be written in more ways than repr knows; such a pair has a token that the source has not.
            renamed = [names.get(t, t) for t in source], [names.get(t, t) for t in target]
            if len(names) <= 9 and tuple(renamed[0]) not in seen:
                seen.add(tuple(renamed[0]))
                self.pairs.append(renamed)
        frequent = Counter(token for pair in self.pairs for side in pair for token in side)
        self.words = ["<pad>", "<s>", "</s>", *(word for word, count in frequent.most_common() if count >= 5)]
        number = {word: i for i, word in enumerate(self.words)}
        coded = [([number[t] for t in s], [number[t] for t in t_]) for s, t_ in self.pairs
                 if all(t in number for t in (*s, *t_))]
        random.Random(seed).shuffle(coded)
        held = len(coded) // 10
        self.test, self.train = coded[:held], coded[held:]
        self.train.sort(key=lambda pair: len(pair[0]))  # batches of like lengths, with little padding
        self.lengths = [len(source) for source, _ in self.train]

    def batch(self, chosen: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(source [B, S], its lengths [B], target [B, T] from BEGIN to END), padded on the right."""
        sources = [torch.tensor(s) for s, _ in chosen]
        targets = [torch.tensor([BEGIN, *t, END]) for _, t in chosen]
        padded = [nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=PAD) for x in (sources, targets)]
        lengths = torch.tensor([len(s) for s in sources])
        return padded[0].to(device()), lengths.to(device()), padded[1].to(device())

    def batch_at(self, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Half of the batches are of any pairs, half of a length that is as likely as any other: long ones are rare."""
        draw = random.Random(step)
        last = max(0, len(self.train) - size)
        start = draw.randint(0, last)
        if step % 2:
            start = min(last, max(0, bisect.bisect(self.lengths, draw.randint(3, LONGEST)) - size // 2))
        return self.batch(self.train[start : start + size])


# --- models: memory() reads a sentence, forward() continues a translation, maps() shows where it looked ---


class TransformerTranslator(nn.Module):
    """Encoder and decoder of the paper, pre-norm, with sinusoidal positions and shared embeddings."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=PAD)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.positions = SinusoidalPositions(width)
        self.body = Transformer(width, 4, 2, 2, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True, causal=True)
        self.scale = width**0.5

    def memory(self, source: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        padding = torch.arange(source.shape[1], device=source.device) >= lengths[:, None]
        return self.body.encoder(self.positions(self.embed(source) * self.scale), src_key_padding_mask=padding), padding

    def begin(self, source: torch.Tensor, lengths: torch.Tensor) -> tuple:
        return (*self.memory(source, lengths), self.body.decoder.new_cache())

    def forward(self, tokens: torch.Tensor, cache: tuple, padding: None = None) -> torch.Tensor:
        memory, ignored, layers = cache
        x = self.positions(self.embed(tokens) * self.scale, layers[0].own.length if layers else 0)
        x = self.body.decoder(x, memory, memory_key_padding_mask=ignored, cache=layers or None)
        return F.linear(x, self.embed.weight)

    def teach(self, source: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self(target, (*self.memory(source, lengths), None))

    def maps(self, source: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with viz.record(self) as recorded:
            self.teach(source, lengths, target)
        return recorded["body.decoder.layers.1.multihead_attn"].mean(1)


class RecurrentTranslator(nn.Module):
    """LSTM encoder and decoder; ``alignment``: None, "additive" or "dot", looked up with each state of the decoder."""

    def __init__(self, words: int, width: int, alignment: str | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=PAD)
        self.encoder = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.LSTM(width, width, batch_first=True)
        self.alignment = alignment
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.score = nn.Parameter(torch.randn(width) * width**-0.5)
        self.combine = nn.Linear(2 * width if alignment else width, width)
        self.out = nn.Linear(width, words)

    def begin(self, source: torch.Tensor, lengths: torch.Tensor) -> dict:
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(source), lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, (hidden, cell) = self.encoder(packed)
        memory, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])
        state = tuple(torch.cat((x[0], x[1]), -1)[None] for x in (hidden, cell))  # both directions' last
        return {"memory": memory[:, None], "lengths": lengths, "state": state}

    def scores(self, states: torch.Tensor, memory: torch.Tensor) -> tuple:
        """(q, k, arguments) of the alignment of decoder states [B, 1, T, width] with the memory [B, 1, S, width]."""
        if self.alignment == "additive":
            return self.query(states), self.key(memory), {"score_weight": self.score}
        return states, self.key(memory), {"scale": 1.0}

    def forward(self, tokens: torch.Tensor, cache: dict, padding: None = None) -> torch.Tensor:
        states, cache["state"] = self.decoder(self.embed(tokens), cache["state"])
        if self.alignment:
            q, k, more = self.scores(states[:, None], cache["memory"])
            context = fused_attn.attention(q, k, cache["memory"], key_lengths=cache["lengths"], **more)[:, 0]
            states = torch.cat((states, context), -1)
        return self.out(torch.tanh(self.combine(states)))

    def teach(self, source: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self(target, self.begin(source, lengths))

    def maps(self, source: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        cache = self.begin(source, lengths)
        states, _ = self.decoder(self.embed(target), cache["state"])
        q, k, more = self.scores(states[:, None], cache["memory"])
        return fused_attn.attention_weights(q, k, key_lengths=lengths, **more)[:, 0]


MODELS = {
    "LSTM": lambda words, width: RecurrentTranslator(words, width, None),
    "LSTM, additive alignment": lambda words, width: RecurrentTranslator(words, width, "additive"),
    "LSTM, dot-product scores": lambda words, width: RecurrentTranslator(words, width, "dot"),
    "transformer": TransformerTranslator,
}


# --- training, accuracy, pictures ---


def training(model: str) -> str:
    """The name of a model's training, of which its checkpoint is called."""
    return model.replace(",", "").replace(" ", "-")


def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    source, lengths, target = batch
    logits = model.teach(source, lengths, target[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)


@torch.no_grad()
def accuracy(model: nn.Module, corpus: Corpus, most: int) -> dict[int, tuple[float, int]]:
    """{longest source length of a bin: (part of its sentences translated without a mistake, how many)}, by greedy decoding."""
    right: Counter = Counter()
    total: Counter = Counter()
    chosen = sorted(corpus.test[:most], key=lambda pair: len(pair[0]))
    for start in range(0, len(chosen), 100):
        source, lengths, target = corpus.batch(chosen[start : start + 100])
        begin = torch.full((len(source), 1), BEGIN, device=source.device)
        drawn = generate(model, begin, target.shape[1], cache=model.begin(source, lengths), temperature=0, eos=END).tolist()
        for (words, expected), found in zip(chosen[start : start + 100], drawn, strict=True):
            longest = next(edge for edge in BINS if len(words) <= edge)
            total[longest] += 1
            right[longest] += [*expected, END] == found[: len(expected) + 1]
    return {edge: (right[edge] / total[edge], total[edge]) for edge in BINS if total[edge]}


def comparison(results: dict[str, dict], histories: dict[str, History], path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [3, 2]})
    for name, by_length in results.items():
        left.plot(list(by_length), [part for part, _ in by_length.values()], marker="o", label=name)
    left.set(xlabel="tokens in the expression, up to", ylabel="translated without a mistake", ylim=(0, 1.02), xticks=BINS)
    left.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    right.barh(list(histories), [history.seconds for history in histories.values()],
               color=[f"C{i}" for i in range(len(histories))])
    right.set(xlabel=f"seconds for {len(next(iter(histories.values())).losses)} steps on {device()}")
    right.invert_yaxis()
    files.write_figure(path, figure, dpi=150)


def main(options: argparse.Namespace) -> None:
    steps, batch, width, most = (600, 64, 64, 300) if options.quick else (4000, 64, 128, 3000)
    check_call(device(), score_weight=torch.zeros(16, device=device()))  # of the additive alignment
    corpus = Corpus(options.seed, "*.py" if options.quick else "**/*.py")
    print(f"{len(corpus.train)} pairs to learn, {len(corpus.test)} to test, {len(corpus.words)} words; e.g.")
    source, target = corpus.test[0]
    print(f"  {' '.join(corpus.words[t] for t in source)}\n  {' '.join(corpus.words[t] for t in target)}")
    histories, results, models, sizes = {}, {}, {}, {}
    for name, build in MODELS.items():
        torch.manual_seed(options.seed)
        model = models[name] = build(len(corpus.words), width).to(device())
        histories[name] = train(f"translate-{training(name)}", model, lambda batch, model=model: loss(model, batch),
                                lambda step: corpus.batch_at(step, batch), steps, options.out,
                                lr=1e-3 if name == "transformer" else 2e-3)
        results[name] = accuracy(model, corpus, most)
        whole = sum(part * n for part, n in results[name].values()) / sum(n for _, n in results[name].values())
        sizes[name] = sum(x.numel() for x in model.parameters())
        print(f"{name}, {sizes[name]} parameters: {whole:.1%} translated without a mistake; "
              f"{histories[name].seconds:.0f} s of training")
    comparison(results, histories, file(options, "comparison.png"))
    loss_picture(histories, file(options, "loss.png"), "infix to postfix")
    shown = next(pair for pair in corpus.test if 12 <= len(pair[0]) <= 18)
    source, lengths, target = corpus.batch([shown])
    words = [[corpus.words[t] for t in x] for x in (source[0].tolist(), target[0, 1:].tolist())]
    with torch.no_grad():
        maps = {name: model.maps(source, lengths, target[:, :-1])[0].cpu() for name, model in models.items() if name != "LSTM"}
    viz.save(viz.side_by_side(maps, words[1], words[0]), file(options, "alignment.png"))
    found = {name: {"accuracy": {str(edge): part for edge, (part, _) in results[name].items()},
                    "seconds": histories[name].seconds, "last_loss": sum(histories[name].losses[-20:]) / 20,
                    "parameters": sizes[name]} for name in MODELS}
    whole = sum(history.seconds for history in histories.values())  # those before an interruption too
    summarise({"training_seconds": whole, "steps": steps, "pairs": len(corpus.train), "models": found}, options)


if __name__ == "__main__":
    sys.exit(run(__doc__.splitlines()[0], "translate", [training(name) for name in MODELS],
                 ("comparison", "loss", "alignment"), main))
